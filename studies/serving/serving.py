"""How a server of `rapidin serve` bears many clients, and what a large cache adds to an answer.

    python studies/serving/serving.py enlarge CACHE --rows 1000000 --out FOLDER
    python studies/serving/serving.py load CACHE --questions FILE --add NAME [--clients 50 --requests 20]
    python studies/serving/serving.py added CACHE LARGE --questions FILE
    python studies/serving/serving.py table

`enlarge` writes a large cache of random rows for the model of another. `load` starts a server of a cache, and
asks it the questions of rows, with their answers, so that nothing is generated. `added` asks both caches the
same in turns, in one process: what the rows of the large one add to each step of an answer.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "common"))
import doc_tables  # noqa: E402

TOKEN = "measuring"
QUESTIONS = 20
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprstvz" for b in "aeiou" for c in "nrstlm"]


def enlarge(cache: Path, rows: int, out: Path) -> None:
    """Write a cache of so many rows of random codes, with lengths and scales like those of a cache, and data
    of random words."""
    import torch

    from rapidin.cache import Cache, CacheWriter, Manifest, build
    from rapidin.cache.merge import copy_learned
    from rapidin.cache.shards import Rows
    from rapidin.data.records import record_hash

    out.mkdir(parents=True)
    chosen, random = Random(0), torch.Generator().manual_seed(0)
    hashes = torch.empty(rows, dtype=torch.int64)
    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for n in range(rows):
            words = chosen.choices(WORDS, k=24)
            record = {"instruction": " ".join(words[:10]), "input": "", "output": " ".join(words[10:])}
            hashes[n] = record_hash(record)
            file.write(json.dumps(record) + "\n")
    manifest = Manifest.read(cache)
    ((_, whole),) = Cache(cache).shards()
    made = replace(manifest, rows=rows, shards=[], fitted_codec=None)
    made.data = manifest.data | {"path": str(out / "train.jsonl")}
    made.shard_rows = build.shard_rows(made)
    with CacheWriter(out / "cache", made) as writer:
        copy_learned(cache, manifest, writer)
        for n in writer.missing:
            index = torch.arange(made.rows_of(n)) + n * made.shard_rows
            like = index % len(whole.index)
            fields = {
                name: torch.randint(0, 256, (len(index), *value.shape[1:]), generator=random).to(torch.uint8)
                if value.dtype == torch.uint8 and name != "length"
                else value[like]
                for name, value in whole.tensors.items()
            }
            good = torch.zeros(len(index), dtype=torch.uint8)
            writer.write(n, Rows(fields, index, good, good.clone(), hashes[index]), {"ok": len(index)})


class Server:
    """A process of `rapidin serve`."""

    def __init__(self, cache: Path, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "rapidin", "serve", str(cache), "--port", "0", "--token", TOKEN]
        self.process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if "open http" in line)
        self.port = int(line.split("127.0.0.1:")[1].split("/")[0])

    @property
    def memory(self) -> float:
        """Resident megabytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1000

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def post(self, value: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        connection.request("POST", "/query", json.dumps(value), headers)
        response = connection.getresponse()
        answered = response.status, json.loads(response.read())
        connection.close()
        return answered


def load(server: Server, questions: list[dict[str, str]], clients: int, requests: int) -> dict[str, Any]:
    """What so many clients see that ask so many questions each, one after the other."""
    expected = [found(server.post(question)) for question in questions]
    alone = []
    for question in questions:
        start = time.perf_counter()
        server.post(question)
        alone.append(time.perf_counter() - start)
    before, memory, begun = server.cpu_seconds, [server.memory], time.perf_counter()
    seconds: list[float] = []
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def client(number: int) -> None:
        for n in range(requests):
            which = (number * requests + n) % len(questions)
            start = time.perf_counter()
            answered = server.post(questions[which])
            took = time.perf_counter() - start
            right = answered[0] == 200 and found(answered) == expected[which]
            with lock:
                seconds.append(took)
                outcomes["right" if right else f"status {answered[0]}"] += 1
                if len(seconds) % max(1, clients * requests // 10) == 0:
                    memory.append(server.memory)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begun
    parts = quantiles(seconds, n=100)
    return {
        "clients": clients,
        "requests": clients * requests,
        "outcomes": dict(outcomes),
        "alone_ms": 1000 * median(alone),
        "p50_ms": 1000 * parts[49],
        "p99_ms": 1000 * parts[98],
        "per_second": clients * requests / wall,
        "cpu_ms": 1000 * (server.cpu_seconds - before) / (clients * requests),
        "memory_mb": [round(each) for each in memory],
    }


def added(small: Path, large: Path, questions: list[dict[str, str]]) -> dict[str, Any]:
    """Milliseconds of an answer and of its steps from both caches, medians over questions asked in turns."""
    import torch

    from rapidin.attribution.ensemble import Ensemble
    from rapidin.attribution.training_data import training_data
    from rapidin.serve.jobs import Job
    from rapidin.serve.service import Question, Service

    services = {}
    for name, path in (("small", small), ("large", large)):
        opened = Ensemble([path])
        services[name] = Service(opened, training_data(opened.caches[0], None), None)
    steps: dict[str, dict[str, list[float]]] = {name: {} for name in services}
    for repeat in range(2):  # the first time files are read and opened
        for question in questions:
            for name, service in services.items():
                asked = Question(**question)
                job = Job(lambda job, s=service, q=asked: s.explain(q, job), lambda *_: None)
                start = time.perf_counter()
                job.run()
                took = {"all": time.perf_counter() - start, **job.result.result().result.seconds}
                for step, seconds in took.items() if repeat else ():
                    steps[name].setdefault(step, []).append(1000 * seconds)
    rows = {name: len(service.ensemble.caches[0]) for name, service in services.items()}
    medians = {name: {step: median(values) for step, values in of.items()} for name, of in steps.items()}
    return {"rows": rows, "threads": torch.get_num_threads(), "ms": medians}


def added_table(result: dict[str, Any]) -> str:
    """What the rows add, by step, those first that add most, as a table in Markdown."""
    small, large = result["ms"]["small"], result["ms"]["large"]
    rows = result["rows"]
    order = sorted(large, key=lambda step: small.get(step, 0.0) - large[step])
    lines = [
        (
            step,
            f"{small.get(step, 0.0):.0f}",
            f"{large[step]:.0f}",
            f"{round(large[step] - small.get(step, 0.0))}",
        )
        for step in order
        if max(small.get(step, 0.0), large[step]) >= 1
    ]
    header = ("step", f"{rows['small']:,} rows, ms", f"{rows['large']:,} rows, ms", "added, ms")
    return doc_tables.table(header, lines)


def found(answered: tuple[int, dict[str, Any]]) -> Any:
    """What must be the same whoever else asks."""
    status, value = answered
    if status != 200:
        return status
    (query,) = value["queries"]
    return [(hit["index"], hit["score"]) for hit in (*query["top"], *query["bottom"])]


def questions_of(data: Path) -> list[dict[str, str]]:
    """The first rows of a jsonl file as questions with their answers."""
    with data.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in islice(file, QUESTIONS)]
    return [{"ask": record["instruction"], "completion": record["output"]} for record in records]


def table(results: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    header = ("cache", "rows", "clients", "requests", "right", "alone, ms", "p50, ms", "p99, ms", "a second")
    lines = [
        (
            name,
            f"{each['rows']:,}",
            str(each["clients"]),
            f"{each['requests']:,}",
            f"{each['outcomes'].get('right', 0):,}",
            f"{each['alone_ms']:.0f}",
            f"{each['p50_ms']:,.0f}",
            f"{each['p99_ms']:,.0f}",
            f"{each['per_second']:.1f}",
            f"{each['memory_mb'][0]:,} to {max(each['memory_mb']):,}",
        )
        for name, each in results.items()
    ]
    return doc_tables.table((*header, "memory, MB"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    enlarged = commands.add_parser("enlarge")
    enlarged.add_argument("cache", type=Path)
    enlarged.add_argument("--rows", type=int, required=True)
    enlarged.add_argument("--out", type=Path, required=True)
    loaded = commands.add_parser("load")
    loaded.add_argument("cache", type=Path)
    loaded.add_argument("--train-data", type=Path, help="of the cache; default: from where it was made")
    loaded.add_argument("--questions", type=Path, required=True, help="jsonl file of Alpaca records")
    loaded.add_argument("--clients", type=int, default=50)
    loaded.add_argument("--requests", type=int, default=20)
    loaded.add_argument("--add", required=True)
    loaded.add_argument("--out", type=Path, default=HERE / "serving.json")
    compared = commands.add_parser("added")
    compared.add_argument("cache", type=Path, help="the small cache")
    compared.add_argument("large", type=Path, help="the one that enlarge made of it")
    compared.add_argument("--questions", type=Path, required=True, help="jsonl file of Alpaca records")
    compared.add_argument("--out", type=Path, default=HERE / "added.json")
    commands.add_parser("table")
    chosen = parser.parse_args()
    if chosen.command == "enlarge":
        enlarge(chosen.cache, chosen.rows, chosen.out)
        return
    if chosen.command == "added":
        measured = added(chosen.cache, chosen.large, questions_of(chosen.questions))
        chosen.out.write_text(json.dumps(measured, indent=1) + "\n")
        print(added_table(measured))
        return
    path = HERE / "serving.json" if chosen.command == "table" else chosen.out
    results = json.loads(path.read_text()) if path.exists() else {}
    if chosen.command == "load":
        from rapidin.cache import Manifest

        arguments = [] if chosen.train_data is None else ["--train-data", str(chosen.train_data)]
        server = Server(chosen.cache, arguments)
        try:
            measured = load(server, questions_of(chosen.questions), chosen.clients, chosen.requests)
        finally:
            server.process.terminate()
            server.process.wait()
        results[chosen.add] = {"rows": Manifest.read(chosen.cache).rows, **measured}
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if path == HERE / "serving.json":
        doc_tables.write(HERE / "README.md", "serving", table(results))
        difference = json.loads((HERE / "added.json").read_text())
        doc_tables.write(HERE / "README.md", "added", added_table(difference))


if __name__ == "__main__":
    main()
