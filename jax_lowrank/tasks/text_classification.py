"""The task text_classification: labelled texts with groups, in splits that are saved by id.

A split is training, validation and test rows of one seed. `check_unseen` refuses an evaluation on
rows that were trained on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank.tasks.grouped import (
    Grouped,
    read_columns,
    read_dlab,
    read_edos,
    read_hatexplain,
    read_jigsaw,
)
from jax_lowrank.tasks.imbalance import unbalanced
from jax_lowrank.tasks.task import TaskError
from jax_lowrank.tasks.text import split_hash

READERS: dict[str, Callable[..., Grouped]] = {
    "columns": read_columns,
    "hatexplain": read_hatexplain,
    "edos": read_edos,
    "dlab": read_dlab,
    "jigsaw": read_jigsaw,
}
SPLITS = ("stratified", "published", "source")
SOURCE_NAMES = {
    "train": "train",
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
    "test": "test",
}


class Answers(NamedTuple):
    """How a decoder names a class: by the word that follows the prompt.

    prompt: holds {text} once. words: one for each class, in the order of the classes. blank: a text
    that says nothing; how probable the words are after it is divided out (contextual calibration,
    Zhao et al. 2021), so that a word's own frequency chooses no class. Empty: nothing is.
    """

    prompt: str
    words: tuple[str, ...]
    blank: str


class Classification(NamedTuple):
    """splits: train, validation (if any) and test. hashes: of each split's ids in order. notes:
    what the report says of the data: counts, repeated texts, what was left out. answers: None where
    a head classifies.
    """

    splits: Mapping[str, Grouped]
    classes: tuple[str, ...]
    group_names: tuple[str, ...]
    hashes: Mapping[str, str]
    notes: Mapping[str, str]
    answers: Answers | None = None

    def ids(self) -> dict[str, list[str]]:
        """What a run saves of its splits."""
        return {name: list(split.ids) for name, split in self.splits.items()}


def make(
    path: str,
    *,
    reader: str = "columns",
    options: Mapping[str, Any] | None = None,
    split: str = "stratified",
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    ratio: Mapping[str, float] | None = None,
    max_rows: int = 0,
    max_train: int = 0,
    prompt: str = "",
    answers: Mapping[str, str] | None = None,
    blank: str = "N/A",
) -> Classification:
    """Read, split and, if asked, unbalance.

    reader: a row of READERS, called with path and `options`. split: 'stratified' by label and group
    pattern; 'published', the permutation of arXiv 2405.17512 (20 % test, no strata; validation is
    cut from its training rows); 'source', as the file says. validation_fraction: of all rows, and
    of the training rows for the other two. ratio: class or group name -> the share of the training
    rows that it shall have; rows are dropped for it (`imbalance.unbalanced`), and the notes say how
    many are left. max_rows: a seeded choice of all rows first, max_train: of the training rows
    last, within `ratio`; 0: all. prompt, answers (class -> word), blank: for decoders that answer
    by a word; see Answers. TaskError for what cannot be done.
    """
    if reader not in READERS:
        raise TaskError(f"reader must be one of {', '.join(READERS)}, not {reader!r}")
    if split not in SPLITS:
        raise TaskError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    fractions = (validation_fraction, test_fraction)
    if min(fractions) < 0 or sum(fractions) >= 1:
        raise TaskError(
            f"the fractions of validation and test must leave training rows: {fractions}"
        )
    rows = READERS[reader](path, **(options or {}))
    notes = {"rows": str(len(rows.ids)), "repeated texts left out": str(rows.num_repeated)}
    if 0 < max_rows < len(rows.ids):
        chosen = np.random.default_rng([seed, 3]).permutation(len(rows.ids))[:max_rows]
        rows = rows.take(np.sort(chosen))
        notes["rows chosen"] = str(max_rows)
    if split == "stratified":
        parts = stratified(rows, seed, validation_fraction, test_fraction)
    else:
        parts = published(len(rows.ids), seed) if split == "published" else _by_source(rows, path)
        if "validation" not in parts and validation_fraction:
            parts = _cut(rows, parts, seed, validation_fraction)
    if ratio:
        parts["train"], held = unbalanced(rows, parts["train"], ratio, seed, max_train)
        total = len(parts["train"])
        notes["shares of the training rows"] = ", ".join(
            f"{name} {held[name]} of {total} (asked: {share:g})" for name, share in ratio.items()
        )
    if 0 < max_train < len(parts["train"]):
        chosen = np.random.default_rng([seed, 4]).permutation(parts["train"])[:max_train]
        parts["train"] = np.sort(chosen)
        notes["training rows chosen"] = str(max_train)
    splits = {name: rows.take(index) for name, index in parts.items()}
    for name, part in splits.items():
        if not part.ids:
            raise TaskError(f"{path}: no rows are left for {name}; it has {len(rows.ids)} in all")
    hashes = {name: split_hash(part.ids) for name, part in splits.items()}
    asked = _answers(prompt, answers, blank, rows.classes)
    return Classification(splits, rows.classes, rows.group_names, hashes, notes, asked)


def data_hash(task: Classification) -> str:
    """SHA-256 over classes, group names, answers, and each split's ids, texts, labels, groups."""
    parts: list[Any] = [list(task.classes), list(task.group_names)]
    for name in sorted(task.splits):
        rows = task.splits[name]
        members = [np.flatnonzero(row).tolist() for row in rows.groups]
        parts.append([name, list(rows.ids), list(rows.texts), rows.labels.tolist(), members])
    if task.answers:
        parts.append(["answers", *task.answers])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def stratified(
    rows: Grouped, seed: int, validation_fraction: float, test_fraction: float
) -> dict[str, np.ndarray]:
    """Row numbers by split; every label and group pattern is split in proportion, to within a row.

    Rows are shuffled, ordered by pattern, and every 1/fraction-th is drawn from a random start, so
    that patterns of a few rows get their share over seeds too.
    """
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(rows.ids))
    keys = np.column_stack([rows.labels, rows.groups])[order]
    _, stratum = np.unique(keys, axis=0, return_inverse=True)
    order = order[np.argsort(stratum.ravel(), kind="stable")]
    test, rest = _every(order, test_fraction, rng)
    validation, train = _every(rest, validation_fraction / (1 - test_fraction), rng)
    parts = {"train": train, "validation": validation, "test": test}
    if not validation_fraction:
        del parts["validation"]
    return {name: np.sort(part) for name, part in parts.items()}


def published(num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Row numbers as datasets.Dataset.train_test_split(test_size=0.2, seed=seed) draws them."""
    order = np.random.default_rng(seed).permutation(num_rows)
    num_test = int(np.ceil(0.2 * num_rows))
    return {"train": order[num_test:], "test": order[:num_test]}


def check_unseen(trained: Sequence[str], evaluated: Sequence[str]) -> None:
    """TaskError if a row to evaluate on is one that was trained on (ids)."""
    both = set(trained) & set(evaluated)
    if both:
        raise TaskError(
            f"{len(both)} of {len(evaluated)} rows to evaluate on were trained on, e.g."
            f" {min(both)}: evaluate on the test split that was saved with the run"
        )


def _answers(
    prompt: str, words: Mapping[str, str] | None, blank: str, classes: Sequence[str]
) -> Answers | None:
    if not words and not prompt:
        return None
    if prompt.count("{text}") != 1:
        raise TaskError(f"prompt must hold {{text}} once, where the text goes; it is {prompt!r}")
    if set(words or {}) != set(classes):
        raise TaskError(
            f"answers must name a word for each of {', '.join(classes)}, not for"
            f" {', '.join(words or {}) or 'none'}"
        )
    return Answers(prompt, tuple(words[name] for name in classes), blank)


def _every(order: np.ndarray, fraction: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """A systematic sample of `fraction` of the rows, and the rest."""
    steps = np.floor(np.arange(order.size + 1) * fraction + rng.random())
    drawn = np.diff(steps) > 0
    return order[drawn], order[~drawn]


def _by_source(rows: Grouped, path: str) -> dict[str, np.ndarray]:
    unknown = sorted(set(rows.source_splits) - set(SOURCE_NAMES))
    if unknown:
        raise TaskError(f"{path}: split {unknown[0]!r} is not one of {', '.join(SOURCE_NAMES)}")
    names = np.array([SOURCE_NAMES[name] for name in rows.source_splits])
    parts = {name: np.flatnonzero(names == name) for name in ("train", "validation", "test")}
    parts = {name: part for name, part in parts.items() if part.size}
    if "train" not in parts or "test" not in parts:
        raise TaskError(f"{path}: its splits are {', '.join(parts)}; train and test are needed")
    return parts


def _cut(rows: Grouped, parts, seed: int, fraction: float) -> dict[str, np.ndarray]:
    """Validation rows out of the training rows, which keep their order."""
    train = parts["train"]
    inner = stratified(rows.take(train), seed, 0.0, fraction)
    return {
        "train": train[inner["train"]],
        "validation": train[inner["test"]],
        "test": parts["test"],
    }
