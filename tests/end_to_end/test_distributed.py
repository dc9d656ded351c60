"""Several processes make the cache that one makes, and find the hits that one finds; killed, they go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inputs import torch_threads
from processes import together, torchrun
from tiny import save_tiny

from rapidin.attribution.attributor import Attributor
from rapidin.attribution.generate import generations_of
from rapidin.attribution.provenance import check_of
from rapidin.attribution.query_sketch import sketch_generations
from rapidin.cache import Cache, Manifest
from rapidin.cli import main
from rapidin.gradients.load import load_model
from rapidin.gradients.model import LoadedModel

pytestmark = pytest.mark.full

ROWS = 72


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun starts its processes: other numbers of threads round otherwise."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an adapter, data of mixed lengths, and the cache that one process makes of them."""
    folder = tmp_path_factory.mktemp("several")
    save_tiny(folder, lora=True)
    lines = [
        {"prompt": f"Say {n} ", "completion": "" if n % 11 == 5 else f"it is {n * n} " * (1 + n % 5)}
        for n in range(ROWS)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind in ("compact", "plain"):
        assert main(caching(folder, folder / kind, kind)) == 0
    return folder


def caching(work: Path, out: Path, kind: str = "compact") -> list[str]:
    """The command line that makes a cache: everything that is learnt, or nothing."""
    learnt = ["--bytes", "256", "--sample", "32", "--precondition", "sample"] if kind == "compact" else []
    return [
        *("cache", str(work / "model"), "--adapter", str(work / "adapter")),
        *("--data", str(work / "train.jsonl"), "--out", str(out)),
        *("--width", "32", "--shard-rows", "4", *learnt),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("size", "kind"), [(2, "plain"), (4, "compact")])
def test_processes_make_the_cache_of_one_byte_for_byte(
    work: Path, tmp_path: Path, size: int, kind: str
) -> None:
    ended = together(size, caching(work, tmp_path / "cache", kind), tmp_path / "said")
    assert [e.code for e in ended] == [0] * size
    assert contents(tmp_path / "cache") == contents(work / kind)
    assert not (tmp_path / "cache" / "receipts").exists()
    assert f"cached {ROWS} examples" in ended[0].err  # all count, and one speaks
    assert [e.err for e in ended[1:]] == [""] * (size - 1)


def test_a_killed_run_loses_only_shards_in_hand_and_goes_on_with_another_number(
    work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    # One that follows dies between a shard and its receipt: the leader makes the rest, and misses it.
    ended = together(2, caching(work, out), tmp_path / "a", kill={1: 2}, patience=6.0, torn=True)
    assert [e.code for e in ended] == [1, -9]
    assert "process 1 of 2 has given no sign of life" in ended[0].err
    assert ended[0].err.count("\n") == 1
    missing = set(range(ROWS // 4)) - {s.first // 4 for s in Manifest.read(out).shards}
    assert 0 < len(missing) < 16  # at least the torn one, and not what it had left receipts of
    # The leader dies with all that the others did since: their receipts are taken up by whoever comes next.
    for n in range(6):
        (out / f"shard-{n:06d}.safetensors").unlink(missing_ok=True)  # the torn one may be among them
    ended = together(3, caching(work, out), tmp_path / "b", kill={0: 1}, torn=True)
    assert ended[0].code == -9
    assert [e.code for e in ended[1:]] == [1, 1]
    assert all(e.err.count("\n") == 1 for e in ended[1:])
    receipts = list((out / "receipts").glob("*.json"))
    assert receipts
    # Receipts are believed no further than the shards go: one altered, one unreadable, one of no shard here.
    spoilt = json.loads(receipts[0].read_text())["file"]
    (out / spoilt).write_bytes((out / spoilt).read_bytes()[:-1] + b"?")
    (out / "receipts" / "shard-000000.safetensors.json").write_text("{")
    (out / "receipts" / "shard-000099.safetensors.json").write_text(receipts[0].read_text().replace("0", "9"))
    assert main([*caching(work, out), "--quiet"]) == 0
    assert contents(out) == contents(work / "compact")


def test_a_mistake_is_said_once_by_all(work: Path, tmp_path: Path) -> None:
    command = caching(work, tmp_path / "cache")
    command[command.index("--data") + 1] = "nowhere.jsonl"
    others = [*caching(work, work / "compact"), "--seed", "1"]  # only the leader sees this one
    for n, arguments in enumerate((command, others, ["info", str(work / "plain")])):
        ended = together(2, arguments, tmp_path / str(n))
        assert [e.code for e in ended] == [2, 2]
        assert "".join(e.err for e in ended).count("\n") == 1
    assert "runs in one process" in "".join(e.err for e in ended)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there is a GPU for each process")
def test_more_processes_than_gpus_are_a_mistake_that_is_said_once(work: Path, tmp_path: Path) -> None:
    arguments = [
        "cache",
        str(work / "model"),
        "--data",
        str(work / "train.jsonl"),
        "--out",
        str(tmp_path / "c"),
    ]
    ended = together(2, [*arguments, "--device", "cuda"], tmp_path / "run")
    assert [each.code for each in ended] == [2, 2]
    said = "".join(each.err for each in ended)
    assert said.count("\n") == 1
    assert "there are more processes than GPUs on this machine" in said
    assert "use --device cpu" in said


def test_processes_add_examples_to_a_cache(work: Path, tmp_path: Path) -> None:
    """Also to a shard that was not full, which is the leader's to write."""
    for name, size in (("one", 1), ("two", 2)):
        begun = [*caching(work, tmp_path / name, "plain"), "--precondition", "off", "--quiet"]
        assert main([*begun, "--limit", "30"]) == 0
        command = [*begun, "--append"]
        codes = [main(command)] if size == 1 else [e.code for e in together(size, command, tmp_path / "said")]
        assert codes == [0] * size
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ----------------------------------------------------------------------------------------------- queries


def asking(cache: Path, *options: str) -> list[str]:
    return [
        *("query", str(cache), "--prompt", "Say 7 ", "--completion", "it is 49 "),
        *("--json", "-", "--quiet", *options),
    ]


@pytest.mark.parametrize(
    ("size", "kind", "options"),
    [
        (2, "compact", ["--method", "fisher", "--top-k", "100"]),  # more than there are
        (4, "plain", ["--normalize", "cosine", "--top-k", "7"]),
        (3, "plain", ["--method", "datainf", "--normalize", "none", "--top-k", "100"]),
        (2, "compact", ["--rescore", "PLAIN", "--candidates", "9", "--top-k", "4", "--method", "fisher"]),
        (3, "plain", ["--fold", "--by", "prompt", "--baselines", "--top-k", "12"]),
        (2, "compact", ["--fuse", "--fold", "--top-k", "7"]),
    ],
)
def test_processes_find_the_hits_of_one(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, kind: str, options: list[str]
) -> None:
    options = [option.replace("PLAIN", str(work / "plain")) for option in options]
    assert main(asking(work / kind, *options)) == 0
    alone = capsys.readouterr().out
    ended = together(size, asking(work / kind, *options), tmp_path / "said")
    assert [e.code for e in ended] == [0] * size
    assert ended[0].out == alone
    assert [e.out + e.err for e in ended[1:]] == [""] * (size - 1)


def test_processes_break_ties_by_row_and_may_be_more_than_shards(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "Say it ", "completion": "again "}] * 8
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = caching(work, tmp_path / "cache", "plain")
    command[command.index("--data") + 1] = str(tmp_path / "same.jsonl")
    assert main([*command, "--quiet"]) == 0
    assert main(asking(tmp_path / "cache", "--top-k", "5")) == 0
    alone = capsys.readouterr().out
    (query,) = json.loads(alone)["queries"]
    tied = query["top"] or query["bottom"]  # all have the same score, of either sign
    assert [hit["index"] for hit in tied] == [0, 1, 2, 3, 4]
    assert together(3, asking(tmp_path / "cache", "--top-k", "5"), tmp_path / "said")[0].out == alone


def test_processes_select_what_one_selects(work: Path, tmp_path: Path) -> None:
    (tmp_path / "target.jsonl").write_text('{"prompt": "Say 3 ", "completion": "it is 9 "}\n')

    def command(name: str) -> list[str]:
        files = ["--out", str(tmp_path / f"{name}.jsonl"), "--scores", str(tmp_path / f"{name}.csv")]
        target = ["--target", str(tmp_path / "target.jsonl"), "--top", "10", "--quiet"]
        return ["select", str(work / "plain"), str(work / "compact"), *target, *files]

    assert main(command("alone")) == 0
    assert [e.code for e in together(2, command("together"), tmp_path / "said")] == [0, 0]
    for end in ("jsonl", "csv"):
        assert (tmp_path / f"together.{end}").read_text() == (tmp_path / f"alone.{end}").read_text()


# ---------------------------------------------------------------------------------------------- torchrun


def test_torchrun_starts_a_run_again_that_lost_a_process(work: Path, tmp_path: Path) -> None:
    torchrun(2, caching(work, tmp_path / "cache", "plain"), tmp_path / "dead", restarts=1, dies=3)
    assert contents(tmp_path / "cache") == contents(work / "plain")


def test_torchrun_ends_a_run_that_lost_a_process(work: Path, tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with pytest.raises(ChildFailedError):
        torchrun(2, caching(work, tmp_path / "cache", "plain"), tmp_path / "dead", restarts=0, dies=1)
    assert not Manifest.read(tmp_path / "cache").complete


# ------------------------------------------------------------------------- models larger than one device


def close(one: Path, other: Path) -> None:
    """The sketches and lengths of two caches are those of the same gradients, to float32's rounding."""
    a, b = Cache(one), Cache(other)
    assert torch.equal(a.status(), b.status())
    assert torch.allclose(a.sketches(), b.sketches(), atol=2e-5)
    assert torch.allclose(a.lengths(), b.lengths(), rtol=1e-4)


@pytest.mark.parametrize(("kind", "preconditioner"), [("adapter", "sample"), ("base", "kfac")])
def test_a_model_spread_over_processes_gives_the_same_sketches(
    work: Path, tmp_path: Path, kind: str, preconditioner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an adapter, and tuned in full; half-way and at a second point; uneven numbers of batches."""
    command = [
        *caching(work, tmp_path / "one", "plain"),
        "--dtype",
        "float32",
        "--at",
        "0.25,0.75",
        "--quiet",
    ]
    command += ["--precondition", preconditioner, "--limit", "26", "--batch-tokens", "200"]
    if kind == "base":
        save_tiny(tmp_path / "base", seed=5)
        place = command.index("--adapter")
        command[place : place + 2] = ["--base", str(tmp_path / "base" / "model")]
    assert main(command) == 0
    spread = [str(tmp_path / "spread") if part == str(tmp_path / "one") else part for part in command]
    ended = together(2, [*spread, "--shard-model"], tmp_path / "said")
    assert [(e.code, e.err) for e in ended] == [(0, ""), (0, "")]
    close(tmp_path / "one", tmp_path / "spread")
    found, alone = (check_of(Manifest.read(tmp_path / name)) for name in ("spread", "one"))
    assert found is not None
    assert alone is not None
    assert found.compared == found.total == alone.compared
    assert found.worst < 1e-5
    assert not found.by_autograd
    assert not found.unchecked
    # A query whose answer the spread model writes, too.
    ask = ["query", str(tmp_path / "one"), "--prompt", "Say 7 ", "--json", "-", "--max-new-tokens", "4"]
    assert main([*ask, "--quiet"]) == 0
    alone = json.loads(capsys.readouterr().out)["queries"][0]
    ended = together(2, [*ask, "--quiet", "--shard-model"], tmp_path / "asked")
    assert [e.code for e in ended] == [0, 0], ended
    here = json.loads(ended[0].out)["queries"][0]
    assert here["completion"] == alone["completion"]
    assert [hit["index"] for hit in here["top"]] == [hit["index"] for hit in alone["top"]]
    assert [h["score"] for h in here["top"]] == pytest.approx([h["score"] for h in alone["top"]], abs=1e-5)


def test_a_spread_model_that_loses_a_process_says_so(work: Path, tmp_path: Path) -> None:
    command = [*caching(work, tmp_path / "cache", "plain"), "--shard-model"]
    ended = together(2, command, tmp_path / "said", kill={1: 2})
    assert [e.code for e in ended] == [1, -9]
    assert "the processes lost each other" in ended[0].err
    assert ended[0].err.count("\n") == 1
    assert Manifest.read(tmp_path / "cache").shards


def test_a_device_map_changes_neither_sketches_nor_identity(work: Path, tmp_path: Path) -> None:
    """One layer and the output head stay on disk but for the moment that they compute."""
    from transformers import AutoModelForCausalLM

    whole = load_model(str(work / "model"), device="cpu")
    assert load_model(str(work / "model"), device="auto").identity == whole.identity
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
    mapped = AutoModelForCausalLM.from_pretrained(
        work / "model",
        device_map={**places, "model.layers.0": "disk", "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
        dtype=torch.float32,
    )
    assert any(p.is_meta for p in mapped.parameters())
    loaded = LoadedModel.of(mapped, whole.tokenizer)
    assert loaded.identity == whole.identity
    texts = [("Say 7 ", "it is 49 "), ("Say 2 ", "no")]
    found = [
        sketch_generations(attributor.source, generations_of(attributor.source, texts))
        for attributor in (
            Attributor(whole, width=64, preconditioner="off"),
            Attributor(loaded, width=64, preconditioner="off"),
        )
    ]
    assert torch.equal(*found)


def test_a_spread_model_without_processes_is_a_mistake(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*caching(work, tmp_path / "cache"), "--shard-model"]) == 2
    said = capsys.readouterr().err
    assert "start them with torchrun" in said
    assert said.count("\n") == 1
