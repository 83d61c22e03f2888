"""Text columns of CSV, TSV, JSON, JSON lines and parquet files, read whole and strictly: what does not fit is named by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffdistill.errors import UserError, did_you_mean

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_NAMED = 3  # how many of many bad rows a message names
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

Row = tuple[str, ...]


def read_text(path: Path) -> str:
    r"""Return the text of a UTF-8 file, a byte order mark dropped, line ends as \n.

    Raises:
        UserError: no such file, a folder, or bytes that are not UTF-8 text; names the line and the offset.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no file at {path}. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a file.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    if content.startswith(_UTF16):
        raise UserError(f"{path} is UTF-16; save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: line {_line(content, error.start)} has the byte 0x{content[error.start]:02x} "
            f"(offset {error.start}). Save the file as UTF-8."
        ) from error
    if (nul := content.find(b"\0")) >= 0:
        raise UserError(f"{path} is not text: line {_line(content, nul)} has a zero byte (offset {nul}). Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(content: bytes, offset: int) -> int:
    return content.count(b"\n", 0, offset) + 1


def some(names: Iterable[object]) -> str:
    """Return the first few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


def read_columns(path: str | Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a table, each the texts of the columns asked for, in their order.

    Rows count from 1, the header left out. JSON holds a list of objects, JSON lines one object a line; where one column is
    asked for, a JSON string may stand in place of an object.

    Args:
        path: the file; its ending is one of TABLE_SUFFIXES.
        columns: names of the columns.
    Raises:
        UserError: no such file, an unknown ending, damage, no rows, a missing column, a value that is no text or blank;
            parquet without pyarrow.
    """
    path = Path(path)
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file.")
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} has an unknown ending. Known: {', '.join(readers)}.")
    rows = readers[path.suffix.lower()](path, columns)
    if not rows:
        raise UserError(f"{path} holds no rows.")
    _check_texts(path, columns, rows)
    return rows


def check_columns(where: object, columns: Iterable[str], known: Iterable[str]) -> None:
    """Refuse columns that do not exist.

    Raises:
        UserError: names the columns that do, and the nearest.
    """
    known = list(known)
    for column in columns:
        if column not in known:
            raise UserError(f"{where} has no column {column!r}.{did_you_mean(column, known)} Columns: {', '.join(known)}.")


def _check_texts(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for position, column in enumerate(columns):
        values = [row[position] for row in rows]
        for number, value in enumerate(values, start=1):
            if value is not None and not isinstance(value, str):
                raise UserError(f"{path}: {column!r} must be text; row {number} holds {value!r} ({type(value).__name__}).")
        if blank := [number for number, value in enumerate(values, start=1) if value is None or not value.strip()]:
            raise UserError(f"{path}: no text in column {column!r} of row {some(blank)}. Fill or remove them.")


def _csv(path: Path, columns: Sequence[str]) -> list[Row]:
    return _separated(path, columns, ",")


def _tsv(path: Path, columns: Sequence[str]) -> list[Row]:
    return _separated(path, columns, "\t")


def _separated(path: Path, columns: Sequence[str], delimiter: str) -> list[Row]:
    reader = csv.reader(io.StringIO(read_text(path)), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        header = next((fields for fields in reader if fields), None)
        if header is None:
            raise UserError(f"{path} is empty.")
        check_columns(path, columns, header)
        positions = [header.index(column) for column in columns]
        for fields in reader:
            if fields and len(fields) != len(header):
                raise UserError(
                    f"{path}: row {len(rows) + 1} (line {reader.line_num}) has {len(fields)} fields, the header {len(header)}. "
                    "Put text that holds the separator or a line end in double quotes."
                )
            if fields:
                rows.append(tuple(fields[position] for position in positions))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not well-formed: {error}.") from error
    return rows


def _json_lines(path: Path, columns: Sequence[str]) -> list[Row]:
    items = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON: {error}.") from error
    return _objects(path, items, columns)


def _json(path: Path, columns: Sequence[str]) -> list[Row]:
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path} is empty.")
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}. One object a line is the format of .jsonl.") from error
    if not isinstance(items, list):
        raise UserError(f"{path} must hold a list of objects; it holds one {type(items).__name__}.")
    return _objects(path, items, columns)


def _objects(path: Path, items: Sequence[Any], columns: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, str) and len(columns) == 1:
            rows.append((item,))
            continue
        if not isinstance(item, dict):
            raise UserError(f"{path}: row {number} must be an object with {', '.join(columns)}; it is {item!r}.")
        check_columns(f"{path}: row {number}", columns, item)
        rows.append(tuple(item[column] for column in columns))
    return rows


def _parquet(path: Path, columns: Sequence[str]) -> list[Row]:
    if not path.exists():
        raise UserError(f"no file at {path}. Check the path.")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow. Or save the table as CSV.") from error
    try:
        with parquet.ParquetFile(path) as opened:
            check_columns(path, columns, opened.schema_arrow.names)
            table = opened.read(columns=list(columns))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return list(zip(*(table.column(column).to_pylist() for column in columns), strict=True))
