"""A server for tests, on a free port of this machine."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import records, save_tiny

from rapidin.attribution.ensemble import Ensemble
from rapidin.attribution.training_data import training_data
from rapidin.cache import Cache
from rapidin.cli import main
from rapidin.serve.app import create_app
from rapidin.serve.guard import Access
from rapidin.serve.jobs import Worker
from rapidin.serve.server import listen, running
from rapidin.serve.service import Service

TOKEN = "a-token"


@dataclass
class Answered:
    """A response: its status, its headers by their names in lower case, and its body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The events of a stream: names and values."""
        blocks = [block.split("\n") for block in self.body.decode().split("\n\n") if block]
        return [(name.partition(": ")[2], json.loads(data.partition(": ")[2])) for name, data in blocks]


@dataclass
class Client:
    """Asks a server on this machine."""

    port: int
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})

    def connected(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(
        self, method: str, path: str, value: Any = None, *, body: bytes | None = None, **headers: str
    ) -> Answered:
        """One request; value: its body as JSON; headers: with _ for -; "" leaves one out."""
        sent = dict(self.headers)
        if value is not None:
            body = json.dumps(value).encode()
            sent["Content-Type"] = "application/json"
        sent |= {name.replace("_", "-"): text for name, text in headers.items()}
        connection = self.connected()
        try:
            connection.request(method, path, body, {name: text for name, text in sent.items() if text})
            response = connection.getresponse()
            headers = {name.lower(): text for name, text in response.getheaders()}
            return Answered(response.status, headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answered:
        return self.ask("GET", path, **headers)

    def post(self, path: str, value: Any, **headers: str) -> Answered:
        return self.ask("POST", path, value, **headers)


def tiny_cache(folder: Path, *, decoys: bool = False) -> Cache:
    """A cache of 30 rows with a column, in a folder; decoys: with 20 of them."""
    saved = save_tiny(folder, lora=True)
    rows = [row | {"source": f"book {n % 3}"} for n, row in enumerate(records())]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ["--data", str(folder / "train.jsonl"), "--width", "64", "--quiet", "--out", str(folder / "cache")]
    if decoys:
        texts = records(20, seed=5)
        (folder / "decoys.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        made += ["--decoys", str(folder / "decoys.jsonl")]
    assert main(["cache", str(saved.model), "--adapter", str(saved.adapter), *made]) == 0
    return Cache(folder / "cache")


def tiny_service(cache: Cache, **options: Any) -> Service:
    """What a server answers with for a cache."""
    ensemble = Ensemble([cache.path])
    return Service(ensemble, training_data(cache, None), training_data(cache, None), **options)


@contextmanager
def served(service: Service, *, waiting: int = 64, **access: Any) -> Iterator[Client]:
    """A server for the block."""
    listening, worker = listen("127.0.0.1", 0), Worker(waiting)
    try:
        with running(create_app(service, worker, Access(**({"token": TOKEN} | access))), listening):
            yield Client(listening.getsockname()[1])
    finally:
        worker.close()
