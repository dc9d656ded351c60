"""The log of a training run: the sketch of every example in every step, and their sums weighted by learning
rates.

Each process of the run appends to files of its own:

- ``entries-<rank>``: a record of 32 bytes for each sketch (`_ENTRY`);
- ``sketches-<rank>``: the sketches, float32, in the same order;
- ``rates-<rank>``: a line of JSON for each step whose sketches are written, with its learning rates and the
  number of processes.

Steps are in order, so that a run that resumes at a step cuts off what comes after it, and nothing has to be
kept in the trainer's own checkpoints. The number of processes may be another then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rapidin.errors import UserError
from rapidin.files import reason, replace_file

_DEFINITION, _RATES, _ENTRIES, _SKETCHES = "definition.json", "rates", "entries", "sketches"
_ENTRY = np.dtype([("step", "<i8"), ("row", "<i8"), ("status", "<i8"), ("targets", "<i8")])


class StepLog:
    """Writes the log of one process.

    definition: what sketches depend on; a run that resumes must have the same. shape: of a sketch, (blocks,
    width). rank, processes: of this one, of which 0 leads, and how many there are.
    """

    def __init__(
        self,
        folder: Path,
        definition: Mapping[str, Any],
        shape: tuple[int, int],
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.folder, self.shape, self.rank, self._processes = folder, shape, rank, processes
        self._definition = dict(definition)
        self._files: list[Any] = []

    def begin(self, step: int) -> None:
        """Start a log at step 0, or resume one at another step: later steps are cut off. The leading process
        calls this first, alone.

        Raises UserError if there is no log of the steps before, or it is of other sketches.
        """
        try:
            if self.rank == 0:
                self._prepare(step)
            names = (_ENTRIES, _SKETCHES, _RATES)
            self._files = [(self.folder / f"{name}-{self.rank}").open("ab") for name in names]
        except OSError as error:
            raise self._failed(error) from None

    def _prepare(self, step: int) -> None:
        path = self.folder / _DEFINITION
        if step == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_files()
            replace_file(path, json.dumps(self._definition).encode())
            return
        if not path.exists():
            raise UserError(
                f"the training resumes at step {step}, and there are no sketches of the steps before it in "
                f"'{self.folder}'",
                "resume a run that had the callback from its start, or start a new one",
            )
        before = json.loads(path.read_bytes())
        if before != self._definition:
            key = next(k for k in {**before, **self._definition} if before.get(k) != self._definition.get(k))
            raise UserError(
                f"the sketches in '{self.folder}' were made with another '{key}'",
                "resume with the settings that the run was started with",
            )
        self._cut(step)

    def _cut(self, step: int) -> None:
        whole = read_rates(self.folder)
        if set(range(step)) - set(whole):
            raise UserError(
                f"the training resumes at step {step}, and the sketches in '{self.folder}' go up to step "
                f"{max(whole, default=-1) + 1}",
                "resume from an earlier checkpoint, or start a new run",
            )
        for path in self.folder.glob(f"{_RATES}-*"):
            kept = [line for line in _lines(path) if line["step"] < step]
            replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        size = 4 * self.shape[0] * self.shape[1]
        for path in self.folder.glob(f"{_ENTRIES}-*"):
            entries = _read_entries(path, size)
            count = int(np.searchsorted(entries["step"], step))
            os.truncate(path, count * _ENTRY.itemsize)
            os.truncate(_sketches_of(path), count * size)

    def add(
        self, step: int, rows: Sequence[int], sketches: Tensor, status: Sequence[int], targets: Sequence[int]
    ) -> None:
        """Append the sketches [n, blocks, width] of a step. targets: number of target tokens of each."""
        entries = np.empty(len(rows), dtype=_ENTRY)
        entries["step"], entries["row"], entries["status"], entries["targets"] = step, rows, status, targets
        data = sketches.to(torch.float32).contiguous().cpu().numpy()
        assert data.shape == (len(rows), *self.shape)
        try:
            self._files[1].write(data.data)
            self._files[0].write(entries.tobytes())
        except OSError as error:
            raise self._failed(error) from None

    def set_rates(self, step: int, rates: Sequence[float]) -> None:
        """Record the learning rate of each block in a step, whose sketches are all added; a single one if all
        are the same."""
        line = {"step": step, "rates": list(rates), "processes": self._processes}
        try:
            self._files[2].write((json.dumps(line) + "\n").encode())
            for file in self._files:  # the rates last, which say that the rest is there
                file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def flush(self) -> None:
        """Write all that was added to the disk."""
        try:
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Flush and close the files."""
        self.flush()
        for file in self._files:
            file.close()
        self._files = []

    def remove(self) -> None:
        """Remove the files of all processes, and the folder unless it holds something else. Raises UserError
        if they cannot be removed."""
        try:
            self._remove_files()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:
            raise self._failed(error) from None

    def _remove_files(self) -> None:
        """The folder may be the user's own, and hold other files."""
        own = (_DEFINITION, *(f"{name}-[0-9]*" for name in (_RATES, _ENTRIES, _SKETCHES)))
        for pattern in own:
            for path in self.folder.glob(pattern):
                path.unlink()

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"cannot write into '{self.folder}': {reason(error)}")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of rates; a last one that is torn is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            value = json.loads(line)
            rates = [float(rate) for rate in value["rates"]]
            lines.append({"step": int(value["step"]), "rates": rates, "processes": int(value["processes"])})
        except ValueError:
            break
    return lines


def read_rates(folder: Path) -> dict[int, list[float]]:
    """The rates of each step that all processes of the run have written."""
    found: dict[int, list[list[float]]] = {}
    processes = {}
    for path in sorted(folder.glob(f"{_RATES}-*")):
        for line in _lines(path):
            found.setdefault(line["step"], []).append(line["rates"])
            processes[line["step"]] = line["processes"]
    return {step: rates[0] for step, rates in sorted(found.items()) if len(rates) == processes[step]}


def _sketches_of(entries: Path) -> Path:
    return entries.with_name(entries.name.replace(_ENTRIES, _SKETCHES, 1))


def _read_entries(path: Path, size: int) -> Any:
    """The entries of a process whose sketches, of `size` bytes, are there in whole."""
    count = min(path.stat().st_size // _ENTRY.itemsize, _sketches_of(path).stat().st_size // size)
    return np.fromfile(path, dtype=_ENTRY, count=count)


@dataclass(frozen=True, slots=True)
class SeenRow:
    """What the log says of an example. visits: how often it was seen; status: of its sketch; targets: number
    of its target tokens."""

    row: int
    visits: int = 0
    status: int = 0
    targets: int = 1


class StepSums:
    """The sums of each example's sketches over the steps from `first` up to `last`, weighted by their
    learning rates.

    A sum is divided by `weight`, the mean over the examples that were seen of the sum of their steps'
    learning rates: a row that was seen once, at the mean rate, is its sketch. If all rates are 0, they count
    as 1.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], first: int, last: int) -> None:
        self.shape = shape
        self.rates = {step: rates for step, rates in read_rates(folder).items() if first <= step < last}
        if len(self.rates) != last - first:
            raise UserError(
                f"the sketches of {last - first - len(self.rates)} of {last - first} steps are not in "
                f"'{folder}'",
                "name a folder with steps=... that all machines of the run share",
            )
        self._zero = not any(any(rates) for rates in self.rates.values())
        parts = []
        self._data: list[Any] = []
        for path in sorted(folder.glob(f"{_ENTRIES}-*")):
            entries = _read_entries(path, 4 * shape[0] * shape[1])
            chosen = np.flatnonzero((entries["step"] >= first) & (entries["step"] < last))
            part = np.stack([entries["row"][chosen], np.full(len(chosen), len(self._data)), chosen], axis=1)
            parts.append((part, entries[chosen]))
            self._data.append(
                np.memmap(_sketches_of(path), dtype=np.float32, mode="r").reshape(-1, *shape)
                if len(entries)
                else np.zeros((0, *shape), np.float32)
            )
        places = np.concatenate([part for part, _ in parts]) if parts else np.zeros((0, 3), np.int64)
        entries = np.concatenate([e for _, e in parts]) if parts else np.zeros(0, _ENTRY)
        order = np.lexsort((entries["step"], places[:, 0]))
        self._places, self._entries = places[order], entries[order]

    @property
    def visits(self) -> int:
        """How many sketches are summed."""
        return len(self._entries)

    @cached_property
    def seen(self) -> int:
        """Number of examples that were seen."""
        return len(np.unique(self._entries["row"]))

    @cached_property
    def weight(self) -> float:
        """What sums are divided by."""
        if not len(self._entries):
            return 1.0
        return sum(self._rate(int(step)) for step in self._entries["step"]) / self.seen

    def _rate(self, step: int) -> float:
        """The learning rate of a step; of several, their mean."""
        rates = self.rates[step]
        return 1.0 if self._zero else sum(rates) / len(rates)

    def _range(self, row: int) -> range:
        first, last = np.searchsorted(self._entries["row"], [row, row + 1])
        return range(int(first), int(last))

    def of_row(self, row: int) -> SeenRow:
        """What is known of an example."""
        at = self._range(row)
        if not at:
            return SeenRow(row)
        entries = self._entries[at.start : at.stop]
        return SeenRow(row, len(at), int(entries["status"].max()), int(entries["targets"].max()))

    def sketches(self, rows: Sequence[int]) -> Tensor:
        """The weighted sums of these examples, [n, blocks, width] float32; zeros for those not seen."""
        out = torch.zeros(len(rows), *self.shape)
        for n, row in enumerate(rows):
            for at in self._range(row):
                _, file, place = self._places[at]
                step = int(self._entries["step"][at])
                sketch = torch.from_numpy(np.array(self._data[file][place]))
                rates = torch.ones(1) if self._zero else torch.tensor(self.rates[step], dtype=torch.float64)
                out[n] += (rates / self.weight).float()[:, None] * sketch
        return out
