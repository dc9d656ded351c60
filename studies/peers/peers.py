"""Compares rapidin with other attribution packages: Bergson, dattri, traker (TRAK) and kronfluence.

    python studies/peers/peers.py setup FOLDER       # a virtual environment for them, outside the checkout
    python studies/peers/peers.py run FOLDER [--model MODEL --data TEXTS.jsonl] [--examples 64] [--out FILE]
    python studies/peers/peers.py lds FOLDER --truth TRUTH --out studies/peers/peers-lds.json

`lds` scores a ground truth that `rapidin eval lds` made with every package, at the tuned model and half-way
from the base to it: see `peer_lds/`. It needs no network and takes an hour on a core; `--only` runs some of
them again.

`run` compares the speed, memory and bytes of caching and of questions: see `peer_speed.py`. With `--out` the
table of README.md is written, too. Without --model a random Llama of 36 million parameters is made, and
random texts.

They bring their own torch and more, so they have an environment of their own. Bergson 2.5.1, dattri 0.3.0,
traker 0.3.2 and kronfluence 1.0.1 were tried, together in one. Bergson asks for torchvision and torchaudio,
which it never imports; where they were built for another torch, transformers cannot be imported, so `setup`
takes them away again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import peer_speed
from peer_lds import judge

ROOT = Path(__file__).resolve().parents[2]


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
            command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
            command.add_argument("--out", type=Path, help="keep the results, and write the README's table")
    command = commands.add_parser("lds", help="how well the packages' scores predict retraining")
    command.add_argument("folder", type=Path)
    command.add_argument("--truth", type=Path, required=True, help="a folder that `rapidin eval lds` made")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--only", nargs="+", choices=judge.PACKAGES, default=list(judge.PACKAGES))
    command.add_argument("--seeds", type=int, default=3, help="number of seeds of projections and sketches")
    command.add_argument("--work", type=Path, help="keep logs and scores in this folder")
    args = parser.parse_args()
    if args.command == "setup":
        setup(args.folder)
    elif args.command == "run":
        peer_speed.run(args.folder.absolute(), args.model, args.data, args.examples, args.threads, args.out)
        if args.out is not None:
            peer_speed.show(args.out)
    elif args.command == "lds":
        with tempfile.TemporaryDirectory() as work_name:
            work = (args.work or Path(work_name)).resolve()
            judge.lds(
                args.folder.absolute(), args.truth, args.out, only=args.only, seeds=args.seeds, work=work
            )


if __name__ == "__main__":
    main()
