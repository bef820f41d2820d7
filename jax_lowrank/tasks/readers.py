"""Files of prompts and texts: TSV and CSV with a header, JSON lines and plain text, each also
gzipped, and parquet, local or on the hub.

A prompt table has a column of prompts and one of groups. Where the prompt column holds "[M]" (the
HONEST templates of Nozza et al. 2021 and the data set Znreza/HONEST-RACE-RELIGION-AND-
COUNTERFACTS), the prompt is the text before it.
"""

import csv
import difflib
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank.tasks.task import TaskError

SLOT = "[M]"
HUB = "hub:"  # "hub:OWNER/NAME/FILE"
TFDS = "tfds:"  # "tfds:NAME" or "tfds:NAME:SPLIT" of tensorflow-datasets
TFDS_SPLIT = "tfds_split"  # the column that says of a row which split it is from
HONEST_COLUMN = "template_masked"


class Prompts(NamedTuple):
    """N different prompts with their groups.

    texts: what the model continues, without trailing space. suffixes: what follows "[M]" (""
    without it). templates: the `raw` column, or the prompt itself where there is none. kinds: the
    `type` column or "". groups: (N, G) bool.
    """

    texts: tuple[str, ...]
    suffixes: tuple[str, ...]
    templates: tuple[str, ...]
    kinds: tuple[str, ...]
    group_names: tuple[str, ...]
    groups: np.ndarray


def read_prompts(
    path: str | Path, *, text_column: str = "text", group_column: str = "category"
) -> Prompts:
    """A table of prompts; equal prompts become one that is a member of all their groups.

    path: .tsv, .csv or .jsonl (also .gz), or "hub:OWNER/NAME/FILE". text_column: read if it is
    there, else `template_masked`. group_column: one group a cell; JSON lines may hold a list.
    Groups come in the order of first mention. Raises TaskError for a missing file or column, an
    empty table, and a row without a prompt or group.
    """
    rows = read_table(path)
    if text_column not in rows[0] and HONEST_COLUMN in rows[0]:
        text_column = HONEST_COLUMN
    require_column(path, rows, text_column)
    require_column(path, rows, group_column)
    found: dict[str, tuple[str, str, str, dict[str, None]]] = {}
    for number, row in enumerate(rows, 1):
        text, _, suffix = str(row.get(text_column) or "").partition(SLOT)
        text = text.rstrip()
        cell = row.get(group_column)
        groups = [
            str(group).strip()
            for group in (cell if isinstance(cell, list) else [cell])
            if group is not None
        ]
        if not text or not groups or not all(groups):
            raise TaskError(
                f"{path}: row {number} lacks {text_column!r} before {SLOT} or {group_column!r}"
            )
        template, kind = str(row.get("raw") or text), str(row.get("type") or "")
        _, _, _, members = found.setdefault(text, (suffix, template, kind, {}))
        members.update(dict.fromkeys(groups))
    group_names = tuple(dict.fromkeys(name for *_, members in found.values() for name in members))
    return Prompts(
        texts=tuple(found),
        suffixes=tuple(suffix for suffix, *_ in found.values()),
        templates=tuple(template for _, template, *_ in found.values()),
        kinds=tuple(kind for _, _, kind, _ in found.values()),
        group_names=group_names,
        groups=np.array(
            [[name in members for name in group_names] for *_, members in found.values()], bool
        ),
    )


def read_texts(path: str | Path, *, column: str = "text") -> tuple[str, ...]:
    """The texts of a file, blank ones left out: the lines of a .txt file, else one column of a
    table.

    Raises TaskError for a missing file or column and where no text is left.
    """
    if suffix_of(path) == ".txt":
        lines: Sequence[str] = _local(path).split("\n")
    else:
        rows = read_table(path)
        require_column(path, rows, column)
        lines = [str(row.get(column) or "") for row in rows]
    texts = tuple(line.strip() for line in lines if line.strip())
    if not texts:
        raise TaskError(f"{path}: no text in it")
    return texts


def read_chunks(
    path: str | Path, *, column: str = "text", characters: int = 400
) -> tuple[str, ...]:
    """Texts for perplexity: rows of a table as they are; consecutive lines of a .txt file joined up
    to `characters`.

    A line that is longer stays whole. Raises TaskError as read_texts does.
    """
    texts = read_texts(path, column=column)
    if suffix_of(path) != ".txt":
        return texts
    chunks: list[str] = []
    for text in texts:
        if chunks and len(chunks[-1]) + 1 + len(text) <= characters:
            chunks[-1] += "\n" + text
        else:
            chunks.append(text)
    return tuple(chunks)


def file_name(path: str | Path) -> str:
    """What a report may say of a path: the name without directories; a hub address in full."""
    return str(path) if str(path).startswith((HUB, TFDS)) else Path(path).name


def read_text(path: str | Path) -> str:
    """A local file's text, unzipped where it is gzip. Raises TaskError as require_file does."""
    path = Path(path)
    require_file(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text (byte {error.start})") from error


def require_file(path: Path) -> None:
    """Raise TaskError for a missing file, naming those that lie near, and for a directory."""
    if path.is_dir():
        names = (
            ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_file()))
            or "no files"
        )
        raise TaskError(f"{path} is a directory; name a file in it: {names}")
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        raise TaskError(
            f"no file {path}" + (f"; did you mean {path.with_name(near[0])}?" if near else "")
        )


def _local(path: str | Path) -> str:
    if str(path).startswith(HUB):
        raise TaskError(f"{path}: only .csv, .tsv, .jsonl and .parquet files are read from the hub")
    return read_text(path)


def suffix_of(path: str | Path) -> str:
    """The ending that says how a file is read, without .gz."""
    name = str(path).lower().removesuffix(".gz")
    return Path(name).suffix


def read_table(
    path: str | Path, wanted: Callable[[str], bool] = lambda column: True
) -> list[Mapping[str, Any]]:
    """The rows of a .tsv, .csv, .jsonl or .parquet file. TaskError for none and for other files.

    path: also an address HUB or TFDS. wanted: which columns of a local parquet file to read; other
    files are read whole.
    """
    suffix = suffix_of(path)
    if str(path).startswith(TFDS):
        return _read_tfds(str(path))
    if suffix not in (".tsv", ".csv", ".jsonl", ".parquet"):
        raise TaskError(
            f"{path}: cannot read {suffix or 'a file without an ending'}; use .tsv, .csv, .jsonl "
            "(also .gz) or .parquet"
        )
    if str(path).startswith(HUB):
        rows = _read_hub(str(path))
    elif suffix == ".jsonl":
        rows = _read_json_lines(path)
    elif suffix == ".parquet":
        rows = _read_parquet(path, wanted)
    else:
        rows = _read_delimited(path, "\t" if suffix == ".tsv" else ",")
    if not rows:
        raise TaskError(f"{path}: no rows in it")
    return rows


def _read_delimited(path: str | Path, delimiter: str) -> list[Mapping[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(_local(path), newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise TaskError(f"{path}: cannot be read as a table: {error}") from error


def _read_json_lines(path: str | Path) -> list[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(_local(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path}: line {number} is not JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}: line {number} is not a JSON object")
            rows.append(row)
    return rows


def _read_parquet(path: str | Path, wanted: Callable[[str], bool]) -> list[Mapping[str, Any]]:
    import pyarrow  # half a second to import, and only wanted here
    import pyarrow.parquet

    require_file(Path(path))
    try:
        columns = pyarrow.parquet.read_schema(path).names
        kept = [column for column in columns if wanted(column)]
        return pyarrow.parquet.read_table(path, columns=kept).to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise TaskError(f"{path}: cannot be read as parquet: {reason}") from error


def _read_hub(address: str) -> list[Mapping[str, Any]]:
    parts = address.removeprefix(HUB).split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise TaskError(f"{address}: a file on the hub is written hub:OWNER/NAME/FILE")
    import datasets  # seconds to import, and only wanted here

    try:
        table = datasets.load_dataset("/".join(parts[:2]), data_files=parts[2], split="train")
    except Exception as error:  # many kinds: no network, no such data set, no such file, no access
        raise TaskError(f"{address}: cannot be loaded ({type(error).__name__}: {error})") from error
    return list(table)


def _read_tfds(address: str) -> list[Mapping[str, Any]]:
    """The rows of one or all splits, under $TFDS_DATA_DIR, with their split in TFDS_SPLIT."""
    name, _, split = address.removeprefix(TFDS).partition(":")
    import tensorflow_datasets as tfds  # a second to import, and only wanted here
    import tensorflow_datasets.text  # without TensorFlow nothing else registers these

    try:
        found = tfds.data_source(name, split=split or None)
    except Exception as error:  # many kinds: unknown name or split, not prepared, no network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise TaskError(f"{address}: cannot be read ({type(error).__name__}: {reason})") from error
    parts = {split: found} if split else found
    rows: list[Mapping[str, Any]] = []
    for part, source in parts.items():
        for row in source:
            plain = {key: _of_tfds(value) for key, value in row.items()}
            rows.append({**plain, TFDS_SPLIT: part})
    if not rows:
        raise TaskError(f"{address}: no rows in it")
    return rows


def _of_tfds(value: Any) -> Any:
    """Texts come as bytes, numbers as numpy's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a table's first rows."""
    return list(dict.fromkeys(name for row in rows[:100] for name in row if name is not None))


def require_column(path: str | Path, rows: Sequence[Mapping[str, Any]], column: str) -> None:
    """Raise TaskError, naming the columns that are there, unless the table has this one."""
    columns = columns_of(rows)
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"{path}: no column {column!r}; it has {', '.join(columns)}{hint}")
