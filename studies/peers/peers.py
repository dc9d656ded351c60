"""Compares rapidin with other attribution packages: Bergson, dattri, traker (TRAK) and kronfluence.

    python studies/peers/peers.py setup FOLDER       # a virtual environment for them, outside the checkout
    python studies/peers/peers.py run FOLDER [--model MODEL --data TEXTS.jsonl] [--examples 64]
    python studies/peers/peers.py lds FOLDER --truth TRUTH --out studies/peers/peers-lds.json

`lds` scores a ground truth that `rapidin eval lds` made with every package, at the tuned model and half-way
from the base to it: see `peer_lds/`. It needs no network and takes an hour on a core; `--only` runs some of
them again.

`run` compares caching with Bergson and dattri's LoGra, which keep projected gradients. Each reads the same
texts (one "text" a line) with the same model on the CPU, keeps about 256 numbers for each linear layer of the
blocks, and writes them to disk, in batches of about 1,024 tokens. rapidin runs a second time with 2,048 bytes
an example, its codec learnt from the smaller run's examples, at the width that suits it. Without --model a
random Llama of 36 million parameters is made, and random texts. Each is run twice, on an eighth of the
examples and on all: speed and bytes are of the examples that the second run has more, so that imports,
loading and learning do not count (on a busy machine the difference may come out as nan: more examples). Peak
memory is the whole process's.

They bring their own torch and more, so they have an environment of their own. Bergson 2.5.1, dattri 0.3.0,
traker 0.3.2 and kronfluence 1.0.1 were tried, together in one. Bergson asks for torchvision and torchaudio,
which it never imports; where they were built for another torch, transformers cannot be imported, so `setup`
takes them away again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from peer_lds import judge

ROOT = Path(__file__).resolve().parents[2]
SIDE = 16  # of the double-sided projections: SIDE * SIDE numbers a layer
BATCH_TOKENS = 1024
DATTRI_BATCH = 8  # examples


def setup(folder: Path) -> None:
    """Make the environment; a package that does not install is named, and left out by `run`."""
    if folder.resolve().is_relative_to(ROOT):
        sys.exit(f"peers: '{folder}' is inside the checkout; name a folder outside it")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-q", "torch==2.13.0", "transformers", "numpy"], check=True)
    for name in ("dattri", "bergson", "traker", "kronfluence"):
        done = subprocess.run([*pip, "install", "-q", "torch==2.13.0", name])
        print(f"{name}: {'installed' if done.returncode == 0 else 'does not install'}")
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio"])


def make_model(folder: Path, texts: list[str]) -> None:
    """A random Llama of 36 million parameters and a tokenizer for the texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rapidin.cli.demo_session.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(texts[:200], size=8192)
    tokenizer.model_max_length = BATCH_TOKENS
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=BATCH_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_texts(count: int) -> list[str]:
    """Sentences of made-up words, 100 to 160 of them."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(2000)]
    return [" ".join(rng.choices(words, k=rng.randint(100, 160))) for _ in range(count)]


@dataclass
class Peer:
    """name; command: run with the model, the data and the folder to write put into it."""

    name: str
    command: list[str]
    python: str

    def run(self, places: dict[str, str]) -> tuple[float, float]:
        """(seconds, peak memory in MB) of a run; CalledProcessError where it failed."""
        out = Path(places["OUT"])
        command = [self.python, *(places.get(word, word) for word in self.command)]
        with tempfile.TemporaryFile() as log:
            start = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=out.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise subprocess.CalledProcessError(process.returncode, command, log.read())
        return seconds, used.ru_maxrss * 1024 / 1e6


def peers(folder: Path) -> list[Peer]:
    ours, theirs = sys.executable, str(folder / "bin/python")
    cache = ["-m", "rapidin", "cache", "MODEL", "--data", "DATA", "--out", "OUT", "--quiet"]
    cache += ["--batch-tokens", str(BATCH_TOKENS)]
    build = ["-m", "bergson", "build", "OUT", "--model", "MODEL", "--dataset", "DATA"]
    build += ["--projection_dim", str(SIDE), "--token_batch_size", str(BATCH_TOKENS), "--truncation"]
    return [
        Peer("rapidin, float16", [*cache, "--width", str(SIDE**2)], ours),
        Peer("rapidin, 2,048 bytes", [*cache, "--bytes", "2048", "--sample", "FEW"], ours),
        Peer("bergson", build, theirs),
        Peer("dattri, LoGra", [str(Path(__file__).resolve()), "dattri", "MODEL", "DATA", "OUT"], theirs),
    ]


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(folder: Path, model: Path | None, data: Path | None, examples: int) -> None:
    lines = data.read_text().splitlines()[:examples] if data else []
    if data and len(lines) < examples:
        sys.exit(f"peers: '{data}' has {len(lines)} lines, not {examples}")
    with tempfile.TemporaryDirectory() as work_name:
        work = Path(work_name)
        if not lines:
            import json

            lines = [json.dumps({"text": text}) for text in make_texts(examples)]
        if model is None:
            model = work / "model"
            make_model(model, lines)
        few = max(8, examples // 8)
        files = {count: work / f"texts{count}.jsonl" for count in (few, examples)}
        for count, file in files.items():
            file.write_text("\n".join(lines[:count]) + "\n")
        print(f"{'':24}{'examples/s':>12}{'bytes/example':>15}{'peak MB':>9}{'all, s':>8}{'start, s':>10}")
        for peer in peers(folder):
            seconds, size, peak = {}, {}, 0.0
            try:
                for count, file in files.items():
                    out = work / f"{peer.name.split(',')[0]}{count}"
                    places = {
                        "MODEL": str(model.resolve()),
                        "DATA": str(file),
                        "OUT": str(out),
                        "FEW": str(few),
                    }
                    seconds[count], peak = peer.run(places)
                    size[count] = bytes_of(out)
                    shutil.rmtree(out)
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                said = getattr(error, "output", b"") or str(error).encode()
                print(f"{peer.name:24}failed: {said.decode(errors='replace')[-600:]}")
                continue
            more = examples - few
            extra = seconds[examples] - seconds[few]
            start = seconds[few] - few * extra / more
            print(
                f"{peer.name:24}{more / extra if extra > 0 else float('nan'):>12.2f}"
                f"{(size[examples] - size[few]) / more:>15,.0f}{peak:>9.0f}"
                f"{seconds[examples]:>8.1f}{start:>10.1f}",
                flush=True,
            )


def dattri(model_folder: str, data: str, out: str) -> None:
    """dattri's LoGra attributor without a Hessian: runs in the peers' environment.

    Its own writing to disk needs pinned memory, so a GPU; here what it holds is saved by torch at the end.
    """
    import json

    import torch
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    encoded = [tokenizer(text, truncation=True, max_length=BATCH_TOKENS)["input_ids"] for text in texts]

    def collate(chosen: list[list[int]]) -> dict[str, torch.Tensor]:
        longest = max(map(len, chosen))
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def loss(model, batch, device):
        logits = model(**batch, use_cache=False).logits[:, :-1]
        wanted = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")

    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    ]
    attributor = LoGraAttributor(
        AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict()),
        layer_names=linear,
        hessian="Identity",
        proj_dim=SIDE**2,
        offload="cpu",
    )
    encoded.sort(key=len)
    loader = DataLoader(encoded, batch_size=DATTRI_BATCH, collate_fn=collate, shuffle=False)
    attributor.cache(loader)
    Path(out).mkdir()
    kept = [attributor.offload_manager.retrieve_gradients(n) for n in range(len(loader))]
    torch.save(kept, Path(out) / "gradients.pt")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("setup", "run"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name == "run":
            command.add_argument("--model", type=Path)
            command.add_argument("--data", type=Path)
            command.add_argument("--examples", type=int, default=64)
    command = commands.add_parser("lds", help="how well the packages' scores predict retraining")
    command.add_argument("folder", type=Path)
    command.add_argument("--truth", type=Path, required=True, help="a folder that `rapidin eval lds` made")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--only", nargs="+", choices=judge.PACKAGES, default=list(judge.PACKAGES))
    command.add_argument("--seeds", type=int, default=3, help="number of seeds of projections and sketches")
    command.add_argument("--work", type=Path, help="keep logs and scores in this folder")
    command = commands.add_parser("dattri", help="what `run` starts in the peers' environment")
    for name in ("model", "data", "out"):
        command.add_argument(name)
    args = parser.parse_args()
    if args.command == "setup":
        setup(args.folder)
    elif args.command == "run":
        run(args.folder, args.model, args.data, args.examples)
    elif args.command == "lds":
        with tempfile.TemporaryDirectory() as work_name:
            work = (args.work or Path(work_name)).resolve()
            judge.lds(
                args.folder.absolute(), args.truth, args.out, only=args.only, seeds=args.seeds, work=work
            )
    else:
        dattri(args.model, args.data, args.out)


if __name__ == "__main__":
    main()
