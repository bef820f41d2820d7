"""What a task is: named splits of texts with group membership and clusters, checked when they are
made.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

EVALUATION_SPLITS = ("tuned", "transfer")
REQUIRED_SPLITS = ("train", "validation", "tuned", "transfer", "neutral")


class TaskError(ValueError):
    """Data that a task cannot be made from; the message names the file, column, split or group."""


@dataclass(frozen=True, eq=False)
class Split:
    """Rows in a fixed order.

    texts: N strings. ids: N unique strings, stable across sessions. groups: (N, G) bool, may
    overlap, may be all False (neutral text). clusters: (N,) int32; rows of one template share a
    cluster and are resampled together. Raises TaskError for repeated ids and shapes or
    dtypes other than these.
    """

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    groups: np.ndarray
    clusters: np.ndarray

    def __post_init__(self):
        num_rows = len(self.texts)
        if len(self.ids) != num_rows:
            raise TaskError(f"{num_rows} texts but {len(self.ids)} ids")
        if len(set(self.ids)) != num_rows:
            seen: set[str] = set()
            repeated = next(i for i in self.ids if i in seen or seen.add(i))
            raise TaskError(f"ids must be unique; {repeated!r} occurs more than once")
        if self.groups.dtype != bool or self.groups.ndim != 2 or len(self.groups) != num_rows:
            raise TaskError(
                f"groups must be bool of shape ({num_rows}, G), got {self.groups.dtype} "
                f"{self.groups.shape}"
            )
        if self.clusters.dtype != np.int32 or self.clusters.shape != (num_rows,):
            raise TaskError(
                f"clusters must be int32 of shape ({num_rows},), got {self.clusters.dtype} "
                f"{self.clusters.shape}"
            )

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class Task:
    """Fine-tuning text, evaluation prompts and neutral text of one study.

    group_names: the G columns of every split's `groups`. splits: "train" and "validation" (fine-
    tuning text), "tuned" and "transfer" (evaluation prompts), "neutral" (utility text); others may
    follow. harm_words: words whose first tokens form the LogitLens set, may be empty. notes: where
    each split came from, for the report. Raises TaskError for a missing or empty split, a group
    without a prompt and a split with another number of groups.
    """

    name: str
    group_names: tuple[str, ...]
    splits: Mapping[str, Split]
    harm_words: tuple[str, ...]
    notes: Mapping[str, str]

    def __post_init__(self):
        missing = [name for name in REQUIRED_SPLITS if name not in self.splits]
        if missing:
            raise TaskError(
                f"task {self.name!r} lacks the split {missing[0]!r}; it has "
                f"{', '.join(self.splits)}"
            )
        if len(set(self.group_names)) != len(self.group_names):
            raise TaskError(f"group names must be unique, got {', '.join(self.group_names)}")
        for name, split in self.splits.items():
            if len(split) == 0:
                raise TaskError(f"split {name!r} of task {self.name!r} is empty; give it a row")
            if split.groups.shape[1] != len(self.group_names):
                raise TaskError(
                    f"split {name!r} has {split.groups.shape[1]} group columns, the task "
                    f"{len(self.group_names)} groups"
                )
        num_prompts = sum(self.splits[name].groups.sum(axis=0) for name in EVALUATION_SPLITS)
        for name, count in zip(self.group_names, num_prompts, strict=True):
            if count == 0:
                raise TaskError(
                    f"group {name!r} has no prompt in {' or '.join(EVALUATION_SPLITS)}: give it "
                    "prompts or leave it out"
                )


def data_hash(task: Task) -> str:
    """SHA-256 over names, splits, texts, ids, groups and clusters: 64 hex characters.

    The order of the splits does not enter; the notes do not either. The same on every machine and
    Python version.
    """
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:  # lengths first, so that ("ab", "c") and ("a", "bc") differ
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    def add_strings(strings: tuple[str, ...]) -> None:
        add(len(strings).to_bytes(8, "little"), *(s.encode() for s in strings))

    add(task.name.encode())
    add_strings(task.group_names)
    add_strings(task.harm_words)
    for name in sorted(task.splits):
        split = task.splits[name]
        add(name.encode())
        add_strings(split.texts)
        add_strings(split.ids)
        add(np.packbits(split.groups, axis=None).tobytes(), split.clusters.astype("<i4").tobytes())
    return digest.hexdigest()
