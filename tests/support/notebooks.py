"""Runs the notebooks of docs/, which make their data on the spot.

python tests/support/notebooks.py             # runs all, and stores what they print
python tests/support/notebooks.py auditor     # this one alone
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 1800  # of one cell, on a busy machine


_DEMO = 'assert main(["demo", "--out", "demo"]) == 0'


def executed(path: Path, folder: Path, demo: Path | None = None) -> Any:
    """The notebook with the outputs of a run in `folder`. demo: a folder that `rapidin demo` has made, of
    which a copy is taken instead of making another. Raises nbclient's error if a cell does."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    if demo is not None:
        (first,) = [cell for cell in notebook["cells"] if _DEMO in cell["source"]]
        copy = f"import shutil; shutil.copytree({str(demo)!r}, 'demo')"
        first["source"] = first["source"].replace(_DEMO, copy)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        client = NotebookClient(notebook, timeout=SECONDS, coalesce_streams=True)
        client.resources = {"metadata": {"path": str(folder)}}
        client.execute()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return notebook


def printed(notebook: Any) -> list[str]:
    """What each cell of code prints or shows, as text."""
    return [
        "".join(_text(output) for output in cell["outputs"] if not _is_warning(output))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def _is_warning(output: Any) -> bool:
    """What libraries say to programmers, with the paths of the machine."""
    return bool(output.get("name") == "stderr")


def _text(output: Any) -> str:
    text = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
    return text if isinstance(text, str) else "".join(text)


def _store(path: Path) -> None:
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(path, Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the run
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_warning(output)]
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data = {"text/plain": output.data["text/plain"]}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
    print(f"{path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    for chosen in NOTEBOOKS:
        if not sys.argv[1:] or chosen.stem in sys.argv[1:]:
            _store(chosen)
