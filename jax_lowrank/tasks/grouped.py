"""Labelled texts with group membership: HateXplain, EDOS, measuring-hate-speech, and any table.

A group is a column of an (N, G) boolean matrix; a text may be of several groups or of none. Equal
texts become one row, the first, so that no text can be on two sides of a split.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank.tasks.readers import columns_of, file_name, read_table, require_column
from jax_lowrank.tasks.task import TaskError

DLAB_PREFIX = "target_"
# The identity terms of Jigsaw's templates; "_" is a space.
JIGSAW_WORDS = """
lesbian gay bisexual transgender trans queer lgbt lgbtq homosexual straight heterosexual male female
nonbinary african african_american black white european hispanic latino latina latinx mexican
canadian american asian indian middle_eastern chinese japanese christian muslim jewish buddhist
catholic protestant sikh taoist old older young younger teenage millenial middle_aged elderly blind
deaf paralyzed
"""
JIGSAW_TERMS = tuple(word.replace("_", " ") for word in JIGSAW_WORDS.split())
EDOS_NONE = "none"


class Grouped(NamedTuple):
    """N texts. labels: (N,) int32 numbers of `classes`; groups: (N, G) bool; source_splits: the
    split that the source names for each row, or "". num_repeated: rows left out as equal texts.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: np.ndarray
    groups: np.ndarray
    classes: tuple[str, ...]
    group_names: tuple[str, ...]
    source_splits: tuple[str, ...]
    num_repeated: int

    def take(self, rows: Sequence[int]) -> "Grouped":
        """These rows, in this order."""
        rows = list(rows)
        return self._replace(
            ids=tuple(self.ids[i] for i in rows),
            texts=tuple(self.texts[i] for i in rows),
            labels=self.labels[rows],
            groups=self.groups[rows],
            source_splits=tuple(self.source_splits[i] for i in rows),
        )


def joined(one: Grouped, two: Grouped) -> Grouped:
    """The rows of both, of one data set."""
    return one._replace(
        ids=one.ids + two.ids,
        texts=one.texts + two.texts,
        labels=np.concatenate([one.labels, two.labels]),
        groups=np.concatenate([one.groups, two.groups]),
        source_splits=one.source_splits + two.source_splits,
    )


def read_hatexplain(path: str, *, classes: str = "three") -> Grouped:
    """HateXplain's gold rows: majority label, and the targets that 2 of 3 annotators name.

    path: derived_official_val_test.csv (also .gz), with the columns id, split, text, label and
    targets_2of3 ("African|Women"). classes: 'three' (normal, offensive, hatespeech) or 'two'
    (normal against the other two). Mathew et al. (AAAI 2021).
    """
    if classes not in ("two", "three"):
        raise TaskError(f"classes must be 'two' or 'three', not {classes!r}")
    rows = read_table(path)
    for column in ("id", "text", "label", "targets_2of3"):
        require_column(path, rows, column)
    members = [[name for name in row["targets_2of3"].split("|") if name] for row in rows]
    names = ("normal", "offensive", "hatespeech")
    labels = [row["label"] for row in rows]
    if classes == "two":
        names = ("normal", "toxic")
        labels = ["normal" if label == "normal" else "toxic" for label in labels]
    return _grouped(
        path,
        [row["id"] for row in rows],
        [row["text"] for row in rows],
        labels,
        names,
        members,
        [row.get("split") or "" for row in rows],
    )


def read_edos(path: str, *, groups: Mapping[str, Sequence[str]] | None = None) -> Grouped:
    """EDOS: sexist or not. Groups by `terms_in` if given, else the four categories of sexism.

    path: edos_labelled_aggregated.csv (also .gz). Every row of a category is sexist, so that of its
    rates only the true positive rate says something. Kirk et al. (SemEval 2023).
    """
    rows = read_table(path)
    for column in ("rewire_id", "text", "label_sexist", "label_category", "split"):
        require_column(path, rows, column)
    texts = [row["text"] for row in rows]
    if groups:
        members = terms_in(texts, groups)
    else:
        found = [row["label_category"] for row in rows]
        members = [[] if name == EDOS_NONE else [name] for name in found]
    return _grouped(
        path,
        [row["rewire_id"] for row in rows],
        texts,
        [row["label_sexist"] for row in rows],
        ("not sexist", "sexist"),
        members,
        [row["split"] for row in rows],
        tuple(groups or ()),
    )


def read_dlab(path: str, *, subset: str = "all", flags: str = "majority") -> Grouped:
    """ucberkeley-dlab/measuring-hate-speech: hateful if hate_speech_score > 0.5.

    path: the parquet file (or hub:OWNER/NAME/FILE), one row an annotation. subset: 'all', or an
    attribute (race, religion, age, gender, sexuality, origin, disability): only texts that target
    it, and its subgroups target_<subset>_<tag>. flags: 'majority', more than half of a text's
    annotators; 'first', the first annotation alone, as arXiv 2405.17512 has it, where a text
    without the attribute's own flag is left out even if a subgroup's is set.
    """
    if flags not in ("majority", "first"):
        raise TaskError(f"flags must be 'majority' or 'first', not {flags!r}")
    plain = ("comment_id", "text", "hate_speech_score")
    rows = read_table(path, lambda column: column in plain or column.startswith(DLAB_PREFIX))
    for column in plain:
        require_column(path, rows, column)
    marks = sorted(name for name in columns_of(rows) if name.startswith(DLAB_PREFIX))
    attributes = [m for m in marks if any(other.startswith(m + "_") for other in marks)]
    names = [mark.removeprefix(DLAB_PREFIX) for mark in attributes]
    if subset != "all" and subset not in names:
        raise TaskError(f"{path}: no attribute {subset!r}; it has {', '.join(names)}, and all")
    first: dict[str, int] = {}
    unit = [first.setdefault(row["text"], len(first)) for row in rows]
    where = np.zeros(len(first), int)
    where[unit[::-1]] = np.arange(len(rows))[::-1]  # the first annotation of each text
    raised = np.array([[bool(row[mark]) for mark in marks] for row in rows], np.float64)
    if flags == "first":
        flagged = raised[where] > 0
    else:
        share = np.stack([np.bincount(unit, column, len(first)) for column in raised.T], 1)
        flagged = share > 0.5 * np.bincount(unit)[:, None]
    chosen = [m for m in marks if m not in attributes]
    kept = np.ones(len(first), bool)
    if subset != "all":
        kept = flagged[:, marks.index(DLAB_PREFIX + subset)]
        chosen = [m for m in chosen if m.startswith(f"{DLAB_PREFIX}{subset}_")]
    rows = [rows[i] for i in where[kept]]
    return Grouped(
        ids=tuple(str(row["comment_id"]) for row in rows),
        texts=tuple(row["text"] for row in rows),
        labels=np.array([row["hate_speech_score"] > 0.5 for row in rows], np.int32),
        groups=flagged[kept][:, [marks.index(m) for m in chosen]],
        classes=("not hateful", "hateful"),
        group_names=tuple(m.removeprefix(DLAB_PREFIX) for m in chosen),
        source_splits=("",) * len(rows),
        num_repeated=len(unit) - len(first),
    )


def read_jigsaw(path: str, *, terms: Sequence[str] = JIGSAW_TERMS) -> Grouped:
    """Jigsaw's template sentences: toxic or not, groups by the identity terms in them.

    path: bias_madlibs_77k.csv with the columns Text, Label (BAD, NOT_BAD) and Template; or
    en_sentence_templates.csv or intersectional_madlibs.csv with phrase, toxicity (toxic, nontoxic)
    and template; also .gz. In the first two every term meets every template that has a place for
    one, so that any gap between groups is the model's; sentences of the third name one to three.
    Dixon et al. (AIES 2018).
    """
    rows = read_table(path)
    columns, classes = ("Text", "Label", "Template"), ("NOT_BAD", "BAD")
    if "phrase" in columns_of(rows):
        columns, classes = ("phrase", "toxicity", "template"), ("nontoxic", "toxic")
    for column in columns:
        require_column(path, rows, column)
    text, label, _ = columns
    texts = [row[text] for row in rows]
    return _grouped(
        path,
        [f"{file_name(path)}:{i}" for i in range(1, len(rows) + 1)],
        texts,
        [row[label] for row in rows],
        classes,
        terms_in(texts, {term: (term,) for term in terms}),
        [""] * len(rows),
        tuple(terms),
    )


def read_columns(
    path: str,
    *,
    text: str = "text",
    label: str = "label",
    groups: Sequence[str] = (),
    group_list: str = "",
    classes: Sequence[str] = (),
    positive_above: float | None = None,
    member_above: float = 0.5,
    row_id: str = "",
    split: str = "",
) -> Grouped:
    """Any .csv, .tsv, .jsonl or .parquet table.

    groups: columns that say membership, 0/1, true/false, or a share of annotators: a member where
    the cell is >= member_above (Civil Comments: 0.5); empty cells are no members. group_list: a
    column of names instead, a list or "a|b". classes: names of the label's values in order; empty:
    the values, sorted. positive_above: the label is a number, and above this (>=) the class
    'positive'. row_id: a column of unique names; empty: file name and row number. split: a column.
    """
    rows = read_table(path)
    for column in (text, label, *groups, *filter(None, (group_list, row_id, split))):
        require_column(path, rows, column)
    if bool(groups) == bool(group_list):
        raise TaskError(f"{path}: name the columns of groups, or one column with lists of them")
    values = [row[label] for row in rows]
    if positive_above is not None:
        cells = [_number(path, value, label) for value in values]
        labels = ["positive" if c >= positive_above else "negative" for c in cells]
        classes = ("negative", "positive")
    else:
        labels = ["" if value is None else str(value).strip() for value in values]
        classes = tuple(classes) or tuple(sorted(set(labels)))
    if group_list:
        members = [_names(row[group_list]) for row in rows]
    else:
        members = [
            [name for name in groups if _number(path, row[name], name, 0.0) >= member_above]
            for row in rows
        ]
    name = file_name(path)
    return _grouped(
        path,
        [str(row[row_id]) if row_id else f"{name}:{i}" for i, row in enumerate(rows, 1)],
        ["" if row[text] is None else str(row[text]) for row in rows],
        labels,
        classes,
        members,
        [str(row[split]) if split else "" for row in rows],
        tuple(groups),
    )


def terms_in(texts: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The groups whose terms (whole words, any case) each text names."""
    patterns = {
        name: re.compile(r"\b(?:" + "|".join(map(re.escape, terms)) + r")\b", re.IGNORECASE)
        for name, terms in groups.items()
    }
    parts = {name: [term.lower() for term in terms] for name, terms in groups.items()}
    found = []
    for text in texts:
        low = text.lower()  # what holds no term as a part needs no pattern
        likely = [name for name, terms in parts.items() if any(term in low for term in terms)]
        found.append([name for name in likely if patterns[name].search(text)])
    return found


def _grouped(path, ids, texts, labels, classes, members, splits, names=()) -> Grouped:
    """Checked rows; groups in the order given, else sorted."""
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        repeated = next(i for i in ids if i in seen or seen.add(i))
        raise TaskError(f"{path}: the id {repeated!r} occurs more than once")
    if len(classes) < 2:
        raise TaskError(f"{path}: {len(classes)} class(es); at least 2 are needed")
    names = names or tuple(sorted({name for row in members for name in row}))
    numbers = {name: number for number, name in enumerate(classes)}
    first: dict[str, int] = {}
    for i, (text, label) in enumerate(zip(texts, labels)):
        if not text.strip():
            raise TaskError(f"{path}: row {i + 1} ({ids[i]}) has no text")
        if label not in numbers:
            raise TaskError(
                f"{path}: row {i + 1}: label {label!r} is not one of {', '.join(classes)}"
            )
        first.setdefault(text, i)
    kept = list(first.values())
    groups = np.zeros((len(kept), len(names)), bool)
    for place, i in enumerate(kept):
        groups[place] = [name in members[i] for name in names]
    return Grouped(
        tuple(ids[i] for i in kept),
        tuple(texts[i] for i in kept),
        np.array([numbers[labels[i]] for i in kept], np.int32),
        groups,
        tuple(classes),
        tuple(names),
        tuple(splits[i] for i in kept),
        len(ids) - len(kept),
    )


def _names(cell: Any) -> list[str]:
    if cell is None:
        return []
    parts = cell if isinstance(cell, list) else str(cell).split("|")
    return [str(part).strip() for part in parts if str(part).strip()]


def _number(path: str | Path, cell: Any, column: str, empty: float | None = None) -> float:
    words = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
    text = "" if cell is None else str(cell).strip().lower()
    if not text and empty is not None:
        return empty
    try:
        value = words[text] if text in words else float(text)
    except ValueError:
        value = np.nan
    if np.isnan(value):
        raise TaskError(f"{path}: column {column!r} must hold numbers or true/false, not {cell!r}")
    return value
