"""Training data and queries as checked examples, from any source that `rapidin.data.opening` opens.

`open_examples` reads and checks the whole source once, so a broken line is found before any work is done. It
stops at the first, or counts such lines as malformed and skips them: rows and line numbers of the others stay
the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rapidin.data.converted import as_in_file, files_of
from rapidin.data.fields import FieldMap, has_form
from rapidin.data.opening import Reading, open_source
from rapidin.data.records import TEXTS, Forms, Record, canonical_json, check_record
from rapidin.data.sources import Malformed, Source
from rapidin.errors import UserError

_MAX_PROBLEMS = 10  # malformed examples that are reported one by one


class Examples:
    """Checked examples in order: `len`, iteration, and `examples[row]` are records in a form.

    path: absolute path of the file or folder, a list of several, None for data that cannot be read again.
    form: the form of every record, such as "prompt" (`rapidin.data.records`); "" if any record is read.
    reading: how the data is read.
    malformed: rows that cannot be read or are of no known form, if such rows are skipped; problems: what is
    wrong with the first of them, a line each.
    """

    def __init__(
        self,
        source: Source,
        limit: int | None,
        generations: bool,
        checked: bool,
        skip: bool,
        forms: Forms | None,
        reading: Reading | None = None,
    ) -> None:
        self._source, self._skip, self._forms, self._generations = source, skip, forms, generations
        self.reading = reading or Reading()
        self._identity: str | None = None
        self.path = source.path
        self.form = ""
        self.malformed: set[int] = set()
        self.problems: list[str] = []
        self._length = self._check_all(limit, generations) if checked else self._skim(limit, generations)
        if not self._length:
            where = ", ".join(self.path) if isinstance(self.path, list) else self.path
            raise UserError(f"no examples in {where or 'the data'}", "at least one is needed")
        if len(self.malformed) == self._length:
            raise UserError(f"all {self._length:,} examples are malformed: {self.problems[0]}")

    def _check_all(self, limit: int | None, generations: bool) -> int:
        """Read and check every record, and set `form` and `identity`. Returns how many there are."""
        count = 0
        digest = hashlib.sha256()
        for row, raw in enumerate(self._source.scan(limit)):
            count += 1
            entry = self._read(raw, row)
            line = b""
            try:
                if isinstance(entry, Malformed):
                    raise entry.error
                where = self._source.where(row)
                form = ""
                if self._forms is not None:
                    form = check_record(entry, self._forms, self.form, generations, where)
                line = self._canonical(entry, where)
                self.form = form
            except UserError as error:
                self._refuse(row, error)
                line = self._identity_line(row, entry)
            digest.update(line)
        self._identity = digest.hexdigest()
        return count

    def _skim(self, limit: int | None, generations: bool) -> int:
        """Locate the records, and set `form` to that of the first that is not malformed. Returns how many
        there are."""
        count = self._source.skim(limit)
        for row in range(count) if self._forms is not None else ():
            entry = self._read(self._source.read(row), row)
            assert self._forms is not None
            form = None if isinstance(entry, Malformed) else self._forms.of(entry, generations=generations)
            if form is not None:
                self.form = form
                break
        return count

    def _read(self, entry: Record | Malformed, row: int) -> Record | Malformed:
        """The entry with the fields of a form."""
        fields = self.reading.fields
        if isinstance(entry, Malformed) or (not fields.fields and has_form(entry, self._forms)):
            return entry
        try:
            where = self._source.where(row)
            return fields.read(entry, where, generations=self._generations, forms=self._forms)
        except UserError as error:
            return Malformed(error, self._content(entry))

    @staticmethod
    def _canonical(record: Record, where: str) -> bytes:
        try:
            return canonical_json(record)
        except UserError as error:
            raise UserError(f"{where}: {error.what}", error.remedy) from error

    @staticmethod
    def _content(record: Record) -> bytes:
        """The bytes of a malformed record; its fields alone if its values cannot be written."""
        try:
            return canonical_json(record)
        except UserError:
            return repr(sorted(record)).encode("utf-8", "backslashreplace")

    def _refuse(self, row: int, error: UserError) -> None:
        """Raise the error, or count the row as malformed."""
        if not self._skip:
            raise error
        if row not in self.malformed and len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(error.what)
        self.malformed.add(row)

    def check(self, check: Callable[[Record], object]) -> None:
        """Calls `check` with every record. Those for which it raises UserError are malformed; if such are not
        skipped, raises UserError for the first, with its location."""
        for row, record in self.good():
            try:
                check(record)
            except UserError as error:
                self._refuse(row, UserError(f"{self.where(row)}: {error.what}", error.remedy))

    def _identity_line(self, row: int, entry: Record | Malformed) -> bytes:
        """The bytes of an example that the identity is a hash of."""
        if isinstance(entry, Malformed) and row not in self.malformed:
            raise entry.error
        if isinstance(entry, Malformed):
            return b"malformed " + entry.content
        if row in self.malformed:
            return b"malformed " + self._content(entry)
        return self._canonical(entry, self._source.where(row))

    @property
    def identity(self) -> str:
        """sha256 (hex) over the canonical JSON of the records in order."""
        if self._identity is None:
            self._identity = self.identity_of(self._length)
        return self._identity

    def identity_of(self, rows: int) -> str:
        """The identity of the first `rows` examples."""
        if self._identity is not None and rows == self._length:
            return self._identity
        digest = hashlib.sha256()
        for row in range(min(rows, self._length)):
            digest.update(self._identity_line(row, self._read(self._source.read(row), row)))
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Record:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length} examples")
        entry = self._read(self._source.read(row), row)
        if isinstance(entry, Malformed):
            raise entry.error
        return entry

    def entry(self, row: int) -> Record | Malformed:
        """What `original` gives, or why there is none."""
        return as_in_file(self._source, row)

    def original(self, row: int) -> Record:
        """The record of a row as it came: with the fields of its file alone."""
        entry = self.entry(row)
        if isinstance(entry, Malformed):
            raise entry.error
        return entry

    @property
    def files(self) -> list[str]:
        """The files and folders that the examples are read from."""
        return files_of(self._source)

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(self._length))

    def good(self) -> Iterator[tuple[int, Record]]:
        """Row and record of each example that is not malformed."""
        return ((row, self[row]) for row in range(self._length) if row not in self.malformed)

    def get(self, row: int) -> Record | None:
        """The record of a row, None if it is malformed."""
        return None if row in self.malformed else self[row]

    def index(self, row: int) -> int:
        """The row's line number in the file, from 0. Blank lines are counted, and the numbers of several
        files
        continue from one to the next. For other sources it is the row."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length} examples")
        return self._source.index(row)

    def where(self, row: int) -> str:
        """The location of a row for a message: file and line, from 1 as editors count."""
        return self._source.where(row)

    def file(self, row: int) -> str | None:
        """The file or folder of a row, as it was named; None for data in memory."""
        return self._source.file(row)


def open_examples(
    source: Any,
    *,
    limit: int | None = None,
    generations: bool = False,
    checked: bool = True,
    skip: bool = False,
    forms: Forms | None = TEXTS,
    map: FieldMap | Mapping[str, str] | str | None = None,
    streaming: bool = False,
) -> Examples:
    """Open and check training examples, or with `generations` queries, whose completion may be missing.

    source: a file (jsonl, json, csv, tsv, parquet, arrow or feather, compressed or not), a folder or a
    pattern of such files, "-" for standard input, a HF dataset saved to disk or by name on the hub, an
    entry of LLaMA-Factory's dataset_info.json, several of them (a list of paths, or `Files`), an open file,
    a list or any other iterable of records, of texts, of (prompt, completion) pairs or of batches, a pandas
    or polars data frame, an Arrow table, or a HF dataset in memory; docs/guide/data.md shows each. What can
    be read only once is kept in a temporary file.
    limit: use only this many, from the start. checked: read all of it now; otherwise only locate the
    examples, which is quick for millions, and parse each on demand. skip: count invalid examples as malformed
    instead of raising an error. forms: of the records, by default those of a causal language model; None for
    any record. map: fields of a form by the names that they have in the data, such as
    {"prompt": "question"} or "prompt=question". streaming: fetch rows of a data set on the hub as they are
    read.
    Raises UserError, with the location, for a broken line, a record of no known form or of another form than
    the first, and a field of the wrong type, unless they are skipped; and if there are no examples.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of examples must be at least 1, got {limit}")
    reading = Reading(FieldMap.of(map), streaming)
    return Examples(open_source(source, reading), limit, generations, checked, skip, forms, reading)
