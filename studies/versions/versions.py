"""Does rapidin work with the newest and the oldest versions that pyproject.toml allows?

python studies/versions/versions.py [NAME ...]     # from the root of a checkout; all combinations, or these
python3.12 studies/versions/versions.py --as "Python 3.12"     # this interpreter, with the packages it has

Each combination of COMBINATIONS gets an environment in build/versions whose packages lie over those of the
interpreter that runs this file, and runs the flow there: a tiny Llama and a LoRA adapter are saved, `rapidin
cache` sketches twelve texts, and `rapidin query` asks for one of them, which must be the best hit. Results
are in versions.json, with the versions that were installed, and docs/guide/install.md shows them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "common"))
import doc_tables  # noqa: E402

RESULTS = HERE / "versions.json"
PAGE = doc_tables.DOCS / "guide/install.md"
PACKAGES = ("torch", "transformers", "peft", "numpy", "typer")
NUMPY, TYPER = ["numpy==1.26.0"], ["typer==0.26.0"]
TRANSFORMERS = ["--requirement", str(ROOT / "constraints-oldest.txt")]
# Which packages are older than those of `make`, as arguments of pip install.
COMBINATIONS = {
    "newest": [],
    "oldest numpy": NUMPY,
    "oldest typer": TYPER,
    "oldest transformers and peft": TRANSFORMERS,
    "oldest of these four": [*NUMPY, *TYPER, *TRANSFORMERS],
}
# Interpreters of their own, each with the packages that pip gives it for rapidin.
INTERPRETERS = ("newest torch", "oldest torch", "Python 3.10", "Python 3.12", "Python 3.13")


def environment(name: str) -> Path:
    """The interpreter of a combination, whose environment is made anew."""
    folder = ROOT / "build/versions" / name.replace(" ", "-")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = folder / "bin/python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    below, own = (
        Path(subprocess.run([each, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
        for each in (sys.executable, python)
    )
    (own / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    if COMBINATIONS[name]:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-installed"]
        subprocess.run([python, "-m", "pip", "install", *options, *COMBINATIONS[name]], check=True)
    return python


def flow() -> None:
    """Saves a model, caches and asks, with the packages of this process. Raises where that fails."""
    from tiny import save_tiny

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        saved = save_tiny(folder, lora=True)
        texts = [f"What is {n} and {n}? It is {n + n}." for n in range(12)]
        data = "".join(json.dumps({"prompt": text[:-9], "completion": text[-9:]}) + "\n" for text in texts)
        (folder / "data.jsonl").write_text(data)
        (folder / "query.jsonl").write_text(data.splitlines()[7] + "\n")
        run = [sys.executable, "-m", "rapidin"]
        model = [str(saved.model), "--adapter", str(saved.adapter), "--data", "data.jsonl", "--out", "cache"]
        subprocess.run([*run, "cache", *model], cwd=folder, check=True)
        query = ["query", "cache", "--data", "query.jsonl", "--json", "hits.json"]
        subprocess.run([*run, *query], cwd=folder, check=True)
        (result,) = json.loads((folder / "hits.json").read_text())["queries"]
        assert result["top"][0]["index"] == 7, result["top"]


def facts() -> dict[str, str]:
    """The versions of this process."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: metadata.version(name) for name in PACKAGES}}


def measured(name: str) -> dict[str, str]:
    """A row of the results."""
    python = Path(sys.executable) if name in INTERPRETERS else environment(name)
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"}
    command = [python, __file__]
    found = subprocess.run(
        [*command, "--facts"], env=variables, check=True, capture_output=True, text=True
    ).stdout
    done = subprocess.run([*command, "--flow"], env=variables, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
    return {"name": name, **json.loads(found), "flow": "fails" if done.returncode else "works"}


def table(rows: list[dict[str, str]]) -> str:
    """The rows as docs/guide/install.md shows them."""
    columns = ["name", "python", *PACKAGES, "flow"]
    return doc_tables.table(["", "Python", *columns[2:]], [[row[c] for c in columns] for row in rows])


def main(arguments: list[str]) -> int:
    if arguments == ["--flow"]:
        flow()
    elif arguments == ["--facts"]:
        print(json.dumps(facts()))
    else:
        rows = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
        known: tuple[str, ...] = INTERPRETERS if arguments[:1] == ["--as"] else tuple(COMBINATIONS)
        arguments = arguments[1:] if known == INTERPRETERS else arguments or list(COMBINATIONS)
        unknown = set(arguments) - set(known)
        if unknown:
            sys.exit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        for name in arguments:
            rows[name] = measured(name)
            print(rows[name], flush=True)
            kept = [rows[each] for each in (*COMBINATIONS, *INTERPRETERS) if each in rows]
            RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")
            doc_tables.write(PAGE, "versions", table(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
