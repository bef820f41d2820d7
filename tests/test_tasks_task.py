"""What a Split and a Task refuse, and what the data hash sees."""

from dataclasses import replace

import numpy as np
import pytest

from jax_lowrank.tasks import TASKS
from jax_lowrank.tasks.task import Split, Task, TaskError, data_hash


def split(*texts, groups=((True, False),), clusters=None):
    number = len(texts)
    member = np.array(list(groups) * number if len(groups) == 1 else groups, bool).reshape(
        number, 2
    )
    clusters = np.arange(number) if clusters is None else np.asarray(clusters)
    return Split(texts, tuple(f"id-{i}" for i in range(number)), member, clusters.astype(np.int32))


def task(**splits):
    usual = {
        "train": split("a b"),
        "validation": split("c d"),
        "tuned": split("e"),
        "transfer": split("f", groups=((False, True),)),
        "neutral": split("g h", groups=((False, False),)),
    }
    return Task("small", ("one", "two"), usual | splits, ("h",), {})


def test_table_names_the_tasks():
    assert set(TASKS) == {"world", "completions", "text_classification"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(split("a", "b"), ids=("x", "x")), "'x' occurs more than once"),
        (lambda: replace(split("a", "b"), ids=("x",)), "2 texts but 1 ids"),
        (
            lambda: replace(split("a"), groups=np.ones((1, 2))),
            r"bool of shape \(1, G\), got float64",
        ),
        (
            lambda: replace(split("a"), clusters=np.zeros(2, np.int32)),
            r"shape \(1,\), got int32 \(2,\)",
        ),
        (lambda: task(neutral=split(groups=np.zeros((0, 2)))), "split 'neutral' .* is empty"),
        (lambda: task(transfer=split("f")), "group 'two' has no prompt in tuned or transfer"),
        (lambda: replace(task(), group_names=("one",)), "2 group columns, the task 1 groups"),
        (lambda: replace(task(), group_names=("one", "one")), "must be unique, got one, one"),
        (
            lambda: replace(task(), splits={"train": split("a")}),
            "lacks the split 'validation'; it has train",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(TaskError, match=message):
        make()


def test_hash_is_frozen_and_sees_everything_but_notes_and_order():
    base = data_hash(task())
    assert base == "21a343ecf2c50cb4b0d747e12f714878e00a757986b7af2060383c73a0f37446"
    assert data_hash(replace(task(), notes={"train": "a file"})) == base
    assert data_hash(replace(task(), splits=dict(reversed(task().splits.items())))) == base
    changed = [
        replace(task(), name="other"),
        replace(task(), group_names=("one", "three")),
        replace(task(), harm_words=("h", "i")),
        task(train=split("a bc")),
        task(train=split("a b", clusters=[4])),
        task(train=split("a b", groups=((True, True),))),
        task(train=replace(split("a b"), ids=("other",))),
        task(extra=split("a b")),
        task(train=split("a", "b"), validation=split("c", "d")),
        task(train=split("ab", ""), validation=split("c", "d")),
    ]
    assert len({base, *(data_hash(other) for other in changed)}) == len(changed) + 1
