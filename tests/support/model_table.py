"""Writes docs/reference/models.md: which models, adapters and quantised weights get autograd's gradients.

    python tests/support/model_table.py              # measures all with the versions that are installed
    python tests/support/model_table.py llama DoRA   # these rows alone
    python tests/support/model_table.py --speed      # the speeds, too, of which the rest are kept

Other cells stay as they are: rows of libraries that are not installed, and the columns of other versions. So
it is run once with the versions of constraints.txt, and once with those of constraints-oldest.txt.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import adapter_kinds
import causal_types
import quantised_kinds
from measured_models import TOLERANCE, Outcome, Reference, looks_ahead, outcome, own_sketches, speed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "models.md"
NOT_THERE = "-"


class Kind(NamedTuple):
    """A row of the table. reference: of the weights that count by default; lora: the same model with LoRA."""

    make: Callable[[], Any]
    reference: Reference = own_sketches
    tolerance: float = TOLERANCE
    lora: Callable[[], Any] | None = None


def _quantised(name: str) -> Kind:
    kind = quantised_kinds.KINDS[name]
    lora = partial(quantised_kinds.with_lora, kind.make) if kind.lora else None
    reference = own_sketches if kind.unpacked else quantised_kinds.unpacked_sketches
    return Kind(kind.make, reference, kind.tolerance, lora)


# Section: (a row's kind, the names of rows, whether what is installed has it).
SECTIONS: dict[str, tuple[Callable[[str], Kind], list[str], Callable[[str], bool]]] = {
    "Causal model types": (
        lambda name: Kind(partial(causal_types.tiny_causal, name)),
        list(causal_types.TYPES),
        causal_types.exists,
    ),
    "Adapters": (
        lambda name: Kind(partial(adapter_kinds.tiny_adapter, name)),
        list(adapter_kinds.KINDS),
        adapter_kinds.exists,
    ),
    "Quantised weights": (_quantised, list(quantised_kinds.KINDS), quantised_kinds.exists),
}


def exists(section: str, name: str) -> bool:
    """Whether the installed libraries have this kind."""
    return SECTIONS[section][2](name)


@cache
def measured(section: str, name: str) -> Mapping[str, Outcome]:
    """The outcome of each choice of parameters, by the column of the table."""
    import torch

    # Some quantised layers would be compiled, which takes longer than all the rest.
    with torch.compiler.set_stance("force_eager"):
        return _measured(section, name)


def _measured(section: str, name: str) -> Mapping[str, Outcome]:
    kind = SECTIONS[section][0](name)
    outcomes = {
        "default": outcome(kind.make, reference=kind.reference),
        '`--include "*"`': outcome(kind.make, ("*",), kind.reference),
    }
    if kind.lora is not None:
        outcomes["LoRA on it"] = outcome(kind.lora)
    if section == "Causal model types" and looks_ahead(kind.make()):
        fault = "no example has a gradient of its loss alone: its logits see later tokens"
        outcomes = {
            column: found if found.refused else replace(found, fault=fault)
            for column, found in outcomes.items()
        }
    return outcomes


def tolerance(section: str, name: str) -> float:
    return SECTIONS[section][0](name).tolerance


def cells(section: str, name: str) -> dict[str, str]:
    """The cells of a row that the installed versions decide, without its speed."""
    outcomes = measured(section, name)
    texts = {column: found.text(tolerance(section, name)) for column, found in outcomes.items()}
    refusal = outcomes["default"].refused and texts["default"]
    texts = {
        column: "refused likewise" if column != "default" and text == refusal else text
        for column, text in texts.items()
    }
    if not newest():
        words = {column: re.split("[:, ]", text)[0] for column, text in texts.items()}
        same = len(set(words.values())) == 1
        return {
            versions(): words["default"]
            if same
            else ", ".join(f"{column} {word}" for column, word in words.items())
        }
    if section == "Causal model types":
        found = outcomes["default"]
        texts = {"counted": f"{found.share:.0%}" if found.errors else NOT_THERE, **texts}
    return texts


def versions() -> str:
    """The versions of the libraries that decide what a model is, as the page names them."""
    return f"transformers {version('transformers')}, peft {version('peft')}"


def newest() -> bool:
    """Whether the libraries are those of constraints.txt."""
    pins = (ROOT / "constraints.txt").read_text()
    return all(f"\n{name}=={version(name)}" in pins for name in ("transformers", "peft"))


# -------------------------------------------------------------------------------------------- the page

_INTRODUCTION = """# Models, adapters and quantised weights

Each row is a tiny random model on a CPU in float32. rapidin sketches the gradients of all of its parameters
for four texts of unequal length, once in one batch and once one text at a time. These sketches are compared
with the sketches of the gradients that plain autograd computes for one text at a time: the model's own call
with all of its defaults, the cross-entropy of its logits, `loss.backward()`. An error is relative to the norm
of the parameter's sketch, or to a thousandth of the mean norm if the gradient is smaller than that: the
gradient of the bias of the keys of attention, for example, is only rounding error.

- **right**: the error of every parameter is at most 1e-4. *N of M by autograd*: the gradients of N of the M
  parameters are computed by autograd. *one at a time*: each example has its own pass, either for that reason
  or because a layer mixes the examples of a batch.
- **refused**: rapidin refuses the model and gives the reason.
- **wrong**: neither right nor refused; the tests fail then.
- **-**: these versions of the libraries do not have it, or it was not measured.

*default* means the parameters that are used by default: the linear layers and routed experts of the blocks,
or what an adapter trains. *counted* is their share of all elements outside embeddings and output head.
*speed* is the number of examples sketched per second of processor time, with the default parameters, divided
by the number of examples per second of a forward and backward pass without rapidin. In models as tiny as
these, hooks and Python take most of the time; real models are timed in
[performance.md](../measured/performance.md). The gradient of a packed weight is the gradient of the unpacked
weight. The int8 layers of bitsandbytes and AWQ's kernel compute in float16, so an error of up to 2e-3 is
right there. Kernels that need a GPU were not run: Marlin's and ExLlama's for GPTQ and AWQ, Triton's for fp8
and MXFP4, autoawq's. A model with such layers is tested when it is loaded: one layer of each kind has to
propagate the right gradient, or the model is refused.

The tests check every cell except the speeds (`tests/models`). `python tests/support/model_table.py` writes
the cells. The columns are for {newest}; the last column is for the oldest
versions that rapidin allows.
"""

_BY_VERSION = """
## From which version

What came of the parameters that are used by default, with the two versions that are measured: the number of
rows that are right with both, and the names of the others.

"""

Rows = dict[str, dict[str, dict[str, str]]]  # of each section, each row, the cell of each column


def read_page(text: str) -> Rows:
    rows: Rows = {}
    section, header = "", []
    for line in text.splitlines():
        if line.startswith("## "):
            section, header = line[3:], []
        elif line.startswith("| ") and section in SECTIONS:
            values = [value.strip() for value in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not header:
                header = values
            elif set(values[0]) != {"-"}:
                rows.setdefault(section, {})[values[0]] = dict(zip(header[1:], values[1:], strict=True))
    return rows


def write_page(rows: Rows, newest_versions: str) -> str:
    text = _INTRODUCTION.format(newest=newest_versions) + _by_version(rows, newest_versions)
    for section, (_, names, _) in SECTIONS.items():
        columns: dict[str, None] = {}
        for name in names:
            columns |= dict.fromkeys(rows.get(section, {}).get(name, {}))
        ordered = sorted(columns, key=lambda column: (column.startswith("transformers"), column == "speed"))
        text += f"\n## {section}\n\n"
        text += _line([_FIRST[section], *ordered]) + _line(["---"] * (len(ordered) + 1))
        for name in names:
            row = rows.get(section, {}).get(name, {})
            text += _line([name, *(row.get(column, NOT_THERE) for column in ordered)])
    return text


def _by_version(rows: Rows, newest_versions: str) -> str:
    """The table of what is right with which versions, made from the cells of all rows."""
    cells = [cell for of_section in rows.values() for row in of_section.values() for cell in row]
    oldest = next((column for column in cells if column.startswith("transformers")), "")
    names: dict[tuple[str, str], dict[str, list[str]]] = {("right", "right"): {}}
    for section, (_, kinds, _) in SECTIONS.items():
        for kind in kinds:
            row = rows.get(section, {}).get(kind, {})
            old, new = (
                re.split("[:, ]", row.get(column, NOT_THERE).removeprefix("default "))[0]
                for column in (oldest, "default")
            )
            names.setdefault((old, new), {}).setdefault(section, []).append(kind)
    text = _BY_VERSION + _line([oldest, newest_versions, *SECTIONS]) + _line(["---"] * (len(SECTIONS) + 2))
    for (old, new), by_section in names.items():
        found = [by_section.get(section, []) for section in SECTIONS]
        both = old == new == "right"
        text += _line([old, new, *(str(len(each)) if both else "; ".join(each) or "none" for each in found)])
    return text


_FIRST = {"Causal model types": "type", "Adapters": "adapter", "Quantised weights": "weights"}


def _line(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |\n"


def page_versions(text: str) -> str:
    """The versions that the page's columns are of."""
    found = re.search(r"The columns are for\s+(.*?);", text)
    return found[1] if found else ""


def main(arguments: list[str]) -> None:
    import torch
    import transformers

    chosen = [argument for argument in arguments if argument != "--speed"]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    page = PAGE.read_text() if PAGE.exists() else ""
    rows = read_page(page)
    for section, (kind_of, names, is_there) in SECTIONS.items():
        for name in chosen or names:
            if name not in names or not is_there(name):
                continue
            row, found = rows.setdefault(section, {}).setdefault(name, {}), cells(section, name)
            row |= found
            if newest() and not found["default"].startswith("right"):
                row["speed"] = NOT_THERE
            elif newest() and ("--speed" in arguments or row.get("speed", NOT_THERE) == NOT_THERE):
                row["speed"] = f"{speed(kind_of(name).make()):.2f}"
            print(section, name, *row.values(), sep=" | ", file=sys.stderr, flush=True)
            PAGE.write_text(write_page(rows, versions() if newest() else page_versions(page)))


if __name__ == "__main__":
    main(sys.argv[1:])
