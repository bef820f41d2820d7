"""Examples for one fine-tuning run: files, directories and hub data sets to checked splits.

An example is plain text (of which a masked-lm run hides a part), a prompt with its completion, a
conversation, or a text with a class.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank.tasks.readers import (
    HUB,
    columns_of,
    file_name,
    read_table,
    read_texts,
    require_column,
    suffix_of,
)
from jax_lowrank.tasks.task import TaskError

KINDS = ("text", "completion", "chat", "classification", "masked-lm")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class Columns(NamedTuple):
    """Which column of a table is what."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    label: str = "label"


COLUMNS = Columns()


class Examples(NamedTuple):
    """N examples in file order.

    inputs: a string (text, classification, masked-lm), a pair (prompt, completion), or a list of
    messages with `role` and `content`. labels: (N,) int32, the number of the class; empty for other
    kinds.
    """

    ids: tuple[str, ...]
    inputs: tuple[Any, ...]
    labels: np.ndarray

    def take(self, rows: Sequence[int]) -> "Examples":
        """These rows, in this order."""
        labels = self.labels[list(rows)] if len(self.labels) else self.labels
        return Examples(
            tuple(self.ids[i] for i in rows), tuple(self.inputs[i] for i in rows), labels
        )


class Data(NamedTuple):
    """Splits (train and validation, maybe test) of one kind.

    classes: names, in the order of the label numbers. repeated: how many validation and test rows
    have an input that is also trained on.
    """

    kind: str
    splits: Mapping[str, Examples]
    classes: tuple[str, ...]
    repeated: Mapping[str, int]


def make(
    path: str,
    *,
    validation: str = "",
    test: str = "",
    split_column: str = "",
    validation_fraction: float = 0.1,
    max_train: int = 0,
    kind: str = "auto",
    columns: Columns = COLUMNS,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> Data:
    """The splits of a fine-tuning run.

    path, validation, test: see `load_tables`. Without a validation split a seeded share of the
    training rows becomes one; rows with equal inputs stay on one side. max_train: a seeded choice
    of the training rows; 0: all. classes: names in order; empty: those of the training rows,
    sorted. Raises TaskError for what is missing, empty or not of its kind.
    """
    tables = load_tables(path, split_column)
    for name, other in (("validation", validation), ("test", test)):
        if other:
            tables[name] = pick_table(load_tables(other, split_column), other, name)
    if "train" not in tables:
        raise TaskError(f"{path}: no training split; it has {', '.join(tables)}")
    kind = find_kind(kind, tables["train"], path, columns)
    if kind == "classification":
        classes = tuple(classes) or find_classes(tables["train"], path, columns.label)
    splits = {
        name: parse(rows, {"validation": validation, "test": test}.get(name) or path, kind, columns)
        if kind != "classification"
        else parse_labelled(rows, path, columns, classes)
        for name, rows in tables.items()
    }
    if "validation" not in splits:
        splits = _cut(splits, path, validation_fraction, seed)
    if 0 < max_train < len(splits["train"].ids):
        rows = np.random.default_rng([seed, 2]).permutation(len(splits["train"].ids))[:max_train]
        splits["train"] = splits["train"].take(np.sort(rows).tolist())
    trained = {key_of(example) for example in splits["train"].inputs}
    repeated = {
        name: sum(key_of(example) in trained for example in split.inputs)
        for name, split in splits.items()
        if name != "train"
    }
    return Data(kind, splits, tuple(classes), repeated)


def read_examples(
    path: str, kind: str, columns: Columns, classes: Sequence[str], split_column: str = ""
) -> tuple[str, Examples]:
    """Kind and all rows of one file, or its test split where there are several."""
    rows = pick_table(load_tables(path, split_column), path, "test")
    kind = find_kind(kind, rows, path, columns)
    if kind == "classification":
        return kind, parse_labelled(rows, path, columns, classes)
    return kind, parse(rows, path, kind, columns)


Table = list[tuple[str, Mapping[str, Any]]]  # (id, row)


def load_tables(path: str, split_column: str) -> dict[str, Table]:
    """Rows by split of a .jsonl, .csv, .tsv or .txt file (also .gz), a directory that the datasets
    library reads, hub:OWNER/NAME, or hub:OWNER/NAME/FILE. A single table is the training split.
    """
    if Path(path).is_dir() or (path.startswith(HUB) and path.count("/") == 1):
        tables = _load_datasets(path)
    elif suffix_of(path) == ".txt":
        tables = {"train": [{"text": line} for line in read_texts(path)]}
    else:
        tables = {"train": read_table(path)}
    name = file_name(path)
    if split_column:
        rows = [row for table in tables.values() for row in table]
        require_column(path, rows, split_column)
        tables = {}
        for row in rows:
            tables.setdefault(_split_of(row[split_column], path), []).append(row)
    return {
        split: [
            (f"{name}:{split}:{i}" if len(tables) > 1 else f"{name}:{i}", row)
            for i, row in enumerate(rows, 1)
        ]
        for split, rows in tables.items()
    }


def _split_of(value: Any, path: str) -> str:
    if str(value) not in SPLITS:
        raise TaskError(f"{path}: split {value!r} is not one of {', '.join(SPLITS)}")
    return SPLITS[str(value)]


def _load_datasets(path: str) -> dict[str, list[dict]]:
    import datasets  # seconds to import, and only wanted here

    name, local = path.removeprefix(HUB), Path(path)
    saved = (local / "dataset_dict.json").is_file() or (local / "state.json").is_file()
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # many kinds: no network, no such data set, no data file, no access
        reason = str(error).splitlines()[0] if str(error) else ""
        raise TaskError(f"{path}: cannot be loaded ({type(error).__name__}: {reason})") from error
    if not isinstance(loaded, Mapping):
        loaded = {"train": loaded}
    tables = {SPLITS[split]: _rows(part) for split, part in loaded.items() if split in SPLITS}
    if not tables:
        raise TaskError(f"{path}: has the splits {', '.join(loaded)}, none of {', '.join(SPLITS)}")
    return tables


def _rows(part: Any) -> list[dict]:
    """Rows of a datasets.Dataset, classes by name rather than number."""
    named = {k: f for k, f in part.features.items() if hasattr(f, "int2str")}
    return [{k: named[k].int2str(v) if k in named else v for k, v in row.items()} for row in part]


def pick_table(tables: dict[str, Table], path: str, split: str) -> Table:
    """The only table, or the one of that split."""
    if len(tables) > 1 and split not in tables:
        raise TaskError(f"{path}: no {split} split; it has {', '.join(tables)}")
    return tables[split] if split in tables else next(iter(tables.values()))


def find_kind(kind: str, table: Table, path: str, columns: Columns) -> str:
    """What the examples are: as asked, or by the columns that are there."""
    rows = [row for _, row in table]
    needs = {
        "chat": (columns.messages,),
        "completion": (columns.prompt, columns.completion),
        "classification": (columns.text, columns.label),
        "text": (columns.text,),
    }
    there = columns_of(rows)
    if kind == "auto":
        fitting = [k for k, names in needs.items() if all(name in there for name in names)]
        if not fitting:
            wanted = "; ".join(" and ".join(names) for names in needs.values())
            raise TaskError(
                f"{path}: has the columns {', '.join(there)}; needed are {wanted}; name yours with"
                " --data.columns.text COLUMN and the like"
            )
        return fitting[0]
    for name in needs["text" if kind == "masked-lm" else kind]:
        require_column(path, rows, name)
    return kind


def find_classes(table: Table, path: str, column: str) -> tuple[str, ...]:
    """The class names of a table: sorted, numbers by value."""
    names = {_cell(row, column) for _, row in table} - {""}
    if len(names) < 2:
        raise TaskError(f"{path}: column {column!r} has {len(names)} class(es); at least 2 needed")
    if all(name.lstrip("-").isdigit() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def parse_labelled(table: Table, path: str, columns: Columns, classes: Sequence[str]) -> Examples:
    """Texts with the numbers of their classes."""
    require_column(path, [row for _, row in table], columns.label)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for row_id, row in table:
        name = _cell(row, columns.label)
        if name not in numbers:
            raise TaskError(
                f"{row_id}: label {name!r} in column {columns.label!r} is not one of the classes"
                f" {', '.join(classes)}"
            )
        labels.append(numbers[name])
    texts = parse(table, path, "text", columns)
    if len(texts.ids) < len(table):
        blank = next(row_id for row_id, row in table if not _cell(row, columns.text))
        raise TaskError(f"{blank}: no text in column {columns.text!r}")
    return texts._replace(labels=np.array(labels, np.int32))


def parse(table: Table, path: str, kind: str, columns: Columns) -> Examples:
    """Examples of one kind; rows of blank text are left out. Raises TaskError naming the row."""
    find_kind(kind, table, path, columns)
    read = {"completion": _completion, "chat": _chat}.get(kind, _text)
    found = [(row_id, read(row_id, row, columns)) for row_id, row in table]
    found = [(row_id, example) for row_id, example in found if example]
    if not found:
        raise TaskError(f"{path}: no text in it")
    ids, inputs = zip(*found)
    return Examples(ids, inputs, np.zeros(0, np.int32))


def _cell(row: Mapping, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value).strip()


def _text(row_id: str, row: Mapping, columns: Columns) -> str:
    del row_id
    return _cell(row, columns.text)


def _completion(row_id: str, row: Mapping, columns: Columns) -> tuple[str, str]:
    # Not stripped: the space between the two belongs to one of them.
    prompt, completion = (str(row.get(c) or "") for c in (columns.prompt, columns.completion))
    if not completion.strip():
        raise TaskError(f"{row_id}: no text in column {columns.completion!r}")
    return prompt, completion


def _chat(row_id: str, row: Mapping, columns: Columns) -> list[dict]:
    messages = row.get(columns.messages)
    if isinstance(messages, str):  # a table's cell
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            messages = None
    good = isinstance(messages, list) and all(
        isinstance(m, Mapping) and m.get("role") and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good or not any(m["role"] == "assistant" for m in messages):
        raise TaskError(
            f"{row_id}: column {columns.messages!r} must hold a list of messages with 'role' and"
            " 'content', at least one of them of the assistant"
        )
    return [dict(message) for message in messages]


def key_of(example: Any) -> str:
    """The same for equal inputs."""
    return json.dumps(example, sort_keys=True)


def hashes(inputs: Sequence[Any]) -> list[str]:
    """16 hexadecimal characters for each input: what a run keeps of the rows it was trained on."""
    return [hashlib.sha256(key_of(one).encode()).hexdigest()[:16] for one in inputs]


def _cut(splits: dict[str, Examples], path: str, share: float, seed: int) -> dict[str, Examples]:
    """Part of the training rows as validation; rows with equal inputs stay together."""
    train = splits["train"]
    keys = [key_of(example) for example in train.inputs]
    unique = list(dict.fromkeys(keys))
    if len(unique) < 2:
        raise TaskError(
            f"{path}: {len(unique)} different example(s) cannot be split into training and"
            " validation; give a validation file"
        )
    count = min(max(1, round(share * len(unique))), len(unique) - 1)
    chosen = np.random.default_rng([seed, 1]).permutation(len(unique))[:count]
    held_out = {unique[i] for i in chosen}
    rows = [[i for i, key in enumerate(keys) if (key in held_out) == side] for side in (0, 1)]
    return {**splits, "train": train.take(rows[0]), "validation": train.take(rows[1])}


def data_hash(data: Data) -> str:
    """SHA-256 over kind, classes, and each split's inputs and labels in order."""
    parts = [data.kind, list(data.classes)]
    for name in sorted(data.splits):
        split = data.splits[name]
        parts.append([name, list(split.inputs), split.labels.tolist()])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def split_hash(ids: Sequence[str]) -> str:
    """SHA-256 over a split's row ids in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()
