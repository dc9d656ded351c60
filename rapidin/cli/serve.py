"""rapidin serve."""

import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from rapidin.attribution.options import ModelLocation, QueryOptions
from rapidin.cli.caches import facts_of, open_caches, with_models
from rapidin.cli.console import line, messages, quiet_libraries
from rapidin.cli.options import CacheFolders, Only, Quiet, TrainData, command
from rapidin.errors import UserError, needs
from rapidin.settings import option

if TYPE_CHECKING:
    from rapidin.attribution.ensemble import Ensemble
    from rapidin.serve.service import Service

_GOODBYE_SECONDS = 3  # that open connections have to end


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
        help="Token that requests must have; also read from RAPIDIN_TOKEN, which other users of the machine "
        "do not see.",
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
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token):
            raise UserError("the token has characters that addresses cannot have", "use letters and digits")


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

    The model, the caches and the training data stay loaded. The server listens on this machine alone and
    needs the token of the address that it prints, unless told otherwise. Ctrl-C ends it.
    """
    for module in ("fastapi", "uvicorn"):
        needs(module, "'rapidin serve'", "serve")
    listening = _listen(server.host, server.port)
    with quiet_libraries():
        from rapidin.serve.app import create_app
        from rapidin.serve.guard import LOOPBACK, Access
        from rapidin.serve.jobs import Worker

        service = _service(cache, location, train_data, server, quiet)
        worker = Worker(server.queue)
        hosts = [*LOOPBACK, *server.allow_host]
        if server.host not in ("0.0.0.0", "::"):
            hosts.append(server.host)
        else:
            hosts.append(socket.gethostname())
        access = Access(_token(server), hosts)
        shown = server.host if server.host not in ("0.0.0.0", "::") else socket.gethostname()
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{listening.getsockname()[1]}/"
        _run(
            create_app(service, worker, access),
            listening,
            lambda: _say(address, access.token, open_to_all=server.host not in LOOPBACK),
        )
        worker.close()


def _token(server: ServerOptions) -> str | None:
    import os
    import secrets

    if server.no_token:
        return None
    return server.token or os.environ.get("RAPIDIN_TOKEN") or secrets.token_urlsafe(24)


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
    examples, rows = (training_data(ensemble.caches[-1], join_paths(train_data)) for _ in range(2))
    ready = _with_all_models(with_models(messages(quiet), ensemble, location))
    about = {name: fact for name, fact in facts_of(ready).items() if name != "made"}
    task = task_name(ensemble.caches[-1].manifest)

    def made(options: QueryOptions) -> dict[str, Any]:
        # Names, not folders: those of this machine are no business of whoever asks.
        facts = {"version": rapidin.__version__, **about, "task": task}
        return {**facts, "settings": options.to_json()}

    return Service(ready, examples, rows, made=made, about=about, history=server.history)


def _with_all_models(ensemble: "Ensemble") -> "Ensemble":
    """The ensemble with the models of all of its caches in memory."""
    from rapidin.attribution.ensemble import Ensemble

    members = [
        member if member.source is not None else replace(member, source=ensemble.source(number))
        for number, member in enumerate(ensemble.members)
    ]
    return Ensemble(members, kind=ensemble.kind, location=ensemble.location)


def _listen(host: str, port: int) -> socket.socket:
    """The socket of the server, before anything is loaded. Raises UserError if the address is in use, or is
    none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}", "use another --host or --port"
        ) from None
    return listening


def _say(address: str, token: str | None, *, open_to_all: bool) -> None:
    if open_to_all:
        line("the server can be reached from other machines, and its connections are not encrypted")
    if token is None:
        line("requests need no token: whoever reaches the server may use it")
    line(f"open {address}{'' if token is None else f'?token={token}'} (Ctrl-C ends the server)")


def _run(app: Any, listening: socket.socket, on_start: Callable[[], None]) -> None:
    """Serve until a signal ends it."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_GOODBYE_SECONDS,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), name="rapidin-web", daemon=True)
    ended = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        ended.set()

    before = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        on_start()
        sys.stderr.flush()
        while not ended.wait(0.5):
            if not thread.is_alive():
                raise UserError("the server has ended by itself")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        server.should_exit = True
        thread.join(_GOODBYE_SECONDS + 2)
