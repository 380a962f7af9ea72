"""Read one local table: csv, tsv, json, jsonl, parquet or plain text, as an Arrow table in memory, with errors that name the row.

Rows are counted from 1 and without a header. Nothing is cached on disk: what is read is what the file holds now.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from petiole.errors import DataError, need
from petiole.tasks.names import listed, one_line

Table = Any  # pyarrow.Table


def read_table(path: Path) -> Table:
    """The table in a file, by its suffix.

    Raises:
        DataError: damaged, empty, not UTF-8, of two columns with one name; with file and row or line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: can't read {path.suffix or 'a file without suffix'}\nKnown: {', '.join(READERS)}.")
    try:
        table = reader(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({one_line(error)})") from error
    double = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if double:
        raise DataError(f"{path}: two columns are called {double[0]!r}\nRename one of them.")
    if table.num_rows == 0:
        raise DataError(f"{path}: no rows\nIt has the columns {listed(table.column_names)} and nothing below them.")
    return _plain(table)


def join(tables: Sequence[Table], paths: Sequence[Path]) -> Table:
    """Tables of one split, one after the other."""
    pa = need("compare", "pyarrow")
    for table, path in zip(tables, paths, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise DataError(
                f"{path}: columns {listed(table.column_names)}\n{paths[0]}: columns {listed(tables[0].column_names)}\n"
                "Files of one split must have the same columns."
            )
    try:
        return pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{paths[0]} and {len(paths) - 1} more: columns of different types ({one_line(error)})"
        ) from error


def _plain(table: Table) -> Table:
    """Without pandas' index, and with categories as the values they stand for."""
    pa = need("compare", "pyarrow")
    table = table.select([name for name in table.column_names if not name.startswith("__index_level_")])
    for i, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return table


def _text_of(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte {raw[error.start]:#04x})\nSave the file as UTF-8."
        ) from error


def _csv(path: Path, delimiter: str = ",") -> Table:
    pa, csv = need("compare", "pyarrow"), need("compare", "pyarrow.csv")
    text, bad = _text_of(path), []
    if not text.strip():
        raise DataError(f"{path}: the file is empty\nIt needs a first line with the names of its columns.")

    def refuse(row: Any) -> str:
        bad.append((row.number - 1, row.actual_columns, row.expected_columns))  # the header is row 1 to the reader
        return "error"

    try:
        return csv.read_csv(
            io.BytesIO(text.encode()),
            read_options=csv.ReadOptions(use_threads=False),  # else rows are not numbered
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse),
        )
    except pa.ArrowInvalid as error:
        if bad:
            row, found, expected = bad[0]
            raise DataError(
                f"{path}, row {row}: {found} fields where the first line has {expected}\nPut quotes around a field that holds {delimiter!r}."
            ) from error
        raise DataError(f"{path}: not a table ({one_line(error)})") from error


def _tsv(path: Path) -> Table:
    return _csv(path, "\t")


def _jsonl(path: Path) -> Table:
    records = []
    for number, line in enumerate(_text_of(path).split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})\nOne object a line."
                ) from error
    return _records(path, records)


def _json(path: Path) -> Table:
    try:
        records = json.loads(_text_of(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg})\nA list of objects is expected."
        ) from error
    if not isinstance(records, list):
        raise DataError(
            f"{path}: holds {type(records).__name__}, not a list of objects\nFor one object a line, call it .jsonl."
        )
    return _records(path, records)


def _records(path: Path, records: list[Any]) -> Table:
    pa = need("compare", "pyarrow")
    columns: dict[str, None] = {}  # a dict for its order: a later row may have more keys than the first
    for row, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(
                f'{path}, row {row}: {type(record).__name__} where an object is expected\nWrite it as {{"text": ..., "label": ...}}.'
            )
        columns.update(dict.fromkeys(record))
    return pa.table({name: _array(path, name, [record.get(name) for record in records]) for name in columns})


def _array(path: Path, name: str, values: list[Any]) -> Any:
    pa = need("compare", "pyarrow")
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        kinds = [None if value is None else type(value).__name__ for value in values]
        first = next(kind for kind in kinds if kind)
        row = next((i for i, kind in enumerate(kinds, start=1) if kind not in (None, first)), 1)
        raise DataError(
            f"{path}, row {row}, column {name!r}: {kinds[row - 1]} where rows before have {first}\nUse one type in a column."
        ) from error


def _parquet(path: Path) -> Table:
    pa, parquet = need("compare", "pyarrow"), need("compare", "pyarrow.parquet")
    try:
        return parquet.read_table(path)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{path}: damaged or not parquet ({one_line(error)})") from error


def _txt(path: Path) -> Table:
    pa = need("compare", "pyarrow")
    return pa.table({"text": [line for line in _text_of(path).splitlines() if line.strip()]})


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}
