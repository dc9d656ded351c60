"""rapidin serve."""

import ipaddress
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from rapidin.attribution.options import ModelLocation, QueryOptions
from rapidin.cli.caches import facts_of, open_caches, with_models
from rapidin.cli.console import line, messages, quiet_libraries
from rapidin.cli.options import CacheFolders, Only, Quiet, TrainData, command
from rapidin.errors import UserError, needs
from rapidin.settings import option

if TYPE_CHECKING:
    from rapidin.serve.service import Service

_STOP_SECONDS = 10  # that a question has to come to its next step, where it stops


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, and to whom. Raises UserError for what cannot be."""

    host: str = option(
        "127.0.0.1",
        help="Address to listen on; 0.0.0.0: all of this machine's.",
        metavar="HOST",
        panel="Server",
    )
    port: int = option(
        8000, help="Port to listen on; 0: a free one.", metavar="PORT", panel="Server", limits=(0, 65535)
    )
    token: str | None = option(
        None,
        help="Token that requests must have. Better set RAPIDIN_TOKEN: other users of the machine can see "
        "command lines.",
        metavar="TOKEN",
        panel="Server",
        default="a random one",
    )
    no_token: bool = option(False, help="Let in requests without a token.", panel="Server")
    allow_host: tuple[str, ...] = option(
        (),
        help="Name by which browsers address the server, besides localhost and HOST; repeat it for several.",
        metavar="NAME",
        panel="Server",
    )
    queue: int = option(
        64, help="Questions that may wait for their turn.", metavar="N", panel="Server", limits=(1, None)
    )
    history: int = option(
        50, help="Answers that are kept, in memory.", metavar="N", panel="Server", limits=(1, None)
    )

    def __post_init__(self) -> None:
        if self.no_token and self.token is not None:
            raise UserError("--token and --no-token do not go together")
        if self.token is not None:
            _check_token(self.token)


@command("serve", example="rapidin serve CACHE")
def serve(
    cache: CacheFolders,
    server: ServerOptions,
    location: Annotated[
        ModelLocation, Only("model", "adapter", "base", "tokenizer", "device", "trust_remote_code")
    ],
    train_data: TrainData = None,
    quiet: Quiet = False,
) -> None:
    """Serve a live view: ask the model in a browser, and see which training examples led to its answers.

    The model, the caches and the training data stay loaded. The server listens on this machine only, and the
    address that it prints contains the access token; --host and --no-token change this. Ctrl-C ends it.
    """
    for module in ("fastapi", "uvicorn"):
        needs(module, "'rapidin serve'", "serve")
    from rapidin.serve.server import listen, running

    listening = listen(server.host, server.port)  # before anything is loaded
    with quiet_libraries():
        from rapidin.serve.app import create_app
        from rapidin.serve.guard import LOOPBACK, Access
        from rapidin.serve.jobs import Worker

        service = _service(cache, location, train_data, server, quiet)
        address_of = ipaddress.ip_address(listening.getsockname()[0])
        named = socket.gethostname() if address_of.is_unspecified else server.host
        access = Access(_token(server), [*LOOPBACK, named, *server.allow_host])
        address = f"http://{f'[{named}]' if ':' in named else named}:{listening.getsockname()[1]}/"
        worker = Worker(server.queue)
        try:
            with running(create_app(service, worker, access), listening) as thread:
                _until_signal(thread, lambda: _say(address, access.token, not address_of.is_loopback))
                cancelled = worker.close(_STOP_SECONDS)  # those who wait are told before connections close
                if cancelled:
                    line(f"stopped; {cancelled} question{'s were' * (cancelled > 1) or ' was'} not answered")
        finally:
            worker.close(0)
        if worker.busy:  # in a long step; Python cannot end while a thread is inside of torch
            sys.stderr.flush()
            os._exit(0)


def _token(server: ServerOptions) -> str | None:
    if server.no_token:
        return None
    token = server.token or os.environ.get("RAPIDIN_TOKEN") or secrets.token_urlsafe(24)
    _check_token(token)
    return token


def _check_token(token: str) -> None:
    """Raise UserError for a token that an address or a cookie cannot have."""
    if not token:
        raise UserError("the token is empty", "leave it out, and a random one is made")
    if not re.fullmatch(r"[A-Za-z0-9._~-]+", token):
        raise UserError("the token has characters that addresses cannot have", "use letters and digits")


def _service(
    folders: list[str],
    location: ModelLocation,
    train_data: list[str] | None,
    server: ServerOptions,
    quiet: bool,
) -> "Service":
    import rapidin
    from rapidin.attribution.provenance import task_name
    from rapidin.attribution.training_data import training_data
    from rapidin.data.sources import join_paths
    from rapidin.serve.service import Service

    ensemble = open_caches(folders)
    # Before the model: a file that has moved shows at once. Opened twice, since single rows are read while a
    # question is explained.
    examples = training_data(ensemble.caches[-1], join_paths(train_data))
    rows = examples
    if examples is not None and isinstance(examples.path, str) and os.path.isfile(examples.path):
        rows = training_data(ensemble.caches[-1], examples.path)
    ready = with_models(messages(quiet), ensemble, location)
    about = {name: fact for name, fact in facts_of(ready).items() if name != "made"}
    task = task_name(ensemble.caches[-1].manifest)

    def made(options: QueryOptions) -> dict[str, Any]:
        # Names, not folders: those of this machine are no business of whoever asks.
        facts = {"version": rapidin.__version__, **about, "task": task}
        return {**facts, "settings": options.to_json()}

    return Service(ready, examples, rows, made=made, about=about, history=server.history)


def _say(address: str, token: str | None, open_to_all: bool) -> None:
    if open_to_all:
        line("the server can be reached from other machines, and its connections are not encrypted")
    if token is None:
        line("requests need no token: whoever reaches the server may use it")
    line(f"open {address}{'' if token is None else f'?token={token}'} (Ctrl-C ends the server)")


def _until_signal(server: threading.Thread, on_start: Callable[[], None]) -> None:
    """Wait until a signal ends the server. Raises UserError if it ends by itself."""
    ended = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        ended.set()

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        on_start()
        while not ended.wait(0.2):
            if not server.is_alive():
                raise UserError("the server has ended by itself")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
