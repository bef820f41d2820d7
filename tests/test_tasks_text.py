"""Files to examples: kinds by columns, splits by share and by column, classes, clear errors."""

import csv
import gzip
import json

import numpy as np
import pytest

from jax_lowrank.tasks import text
from jax_lowrank.tasks.task import TaskError
from jax_lowrank.tasks.text import Columns


def write_csv(path, rows):
    with path.open("w", newline="") as handle:
        out = csv.DictWriter(handle, rows[0])
        out.writeheader()
        out.writerows(rows)
    return str(path)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TEXTS = [{"text": f"row {i}", "label": "yes" if i % 3 else "no"} for i in range(20)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("rows", "kind", "first"),
    [
        ([{"text": "a"}, {"text": "b"}], "text", "a"),
        (
            [{"prompt": "p ", "completion": "c"}, {"prompt": "", "completion": "d"}],
            "completion",
            ("p ", "c"),
        ),
        ([{"messages": CHAT}, {"messages": CHAT[:2] * 2}], "chat", CHAT),
        (TEXTS, "classification", "row 0"),
    ],
)
def test_kind_goes_by_the_columns(rows, kind, first, tmp_path):
    found_kind, examples = text.read_examples(
        jsonl(tmp_path / "d.jsonl", rows), "auto", Columns(), ("no", "yes")
    )
    assert found_kind == kind and examples.inputs[0] == first
    assert examples.ids[:2] == ("d.jsonl:1", "d.jsonl:2")


def test_a_kind_can_be_asked_for_and_columns_named(tmp_path):
    path = write_csv(tmp_path / "d.csv", [{"body": "b1", "text": "t1", "label": "x"}])
    assert text.read_examples(path, "text", Columns(), ())[1].inputs == ("t1",)
    columns = Columns(text="body", label="text")
    kind, examples = text.read_examples(path, "auto", columns, ("t0", "t1"))
    assert kind == "classification" and examples.labels.tolist() == [1]


def test_chats_in_a_table_and_lines_of_a_text_file(tmp_path):
    path = write_csv(tmp_path / "c.csv", [{"messages": json.dumps(CHAT)}])
    assert text.read_examples(path, "auto", Columns(), ())[1].inputs == (CHAT,)
    (tmp_path / "t.txt").write_text("one\n\n two \n")
    assert text.read_examples(str(tmp_path / "t.txt"), "auto", Columns(), ())[1].inputs == (
        "one",
        "two",
    )


def test_the_validation_share_is_seeded_and_keeps_equal_rows_together(tmp_path):
    rows = [{"text": f"row {i % 10}"} for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    data = text.make(path, validation_fraction=0.3)
    train, held_out = data.splits["train"], data.splits["validation"]
    assert len(set(held_out.inputs)) == 3 and len(held_out.ids) == 12
    assert not set(train.inputs) & set(held_out.inputs) and data.repeated == {"validation": 0}
    assert len(train.ids) + len(held_out.ids) == 40
    assert text.make(path, validation_fraction=0.3).splits["validation"].ids == held_out.ids
    other = text.make(path, validation_fraction=0.3, seed=1)
    assert other.splits["validation"].ids != held_out.ids
    assert text.data_hash(other) != text.data_hash(data)


def test_a_column_says_the_split_and_training_rows_can_be_fewer(tmp_path):
    names = ["train"] * 14 + ["dev"] * 4 + ["test"] * 2
    rows = [{**row, "split": name} for row, name in zip(TEXTS, names)]
    plain = tmp_path / "d.csv"
    write_csv(plain, rows)
    path = tmp_path / "d.csv.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    data = text.make(str(path), split_column="split", max_train=5)
    assert {name: len(s.ids) for name, s in data.splits.items()} == {
        "train": 5,
        "validation": 4,
        "test": 2,
    }
    assert data.classes == ("no", "yes") and data.splits["test"].labels.tolist() == [0, 1]
    train = data.splits["train"]
    assert all(train.labels[i] == (int(x.split()[1]) % 3 > 0) for i, x in enumerate(train.inputs))
    assert train.ids == text.make(str(path), split_column="split", max_train=5).splits["train"].ids
    assert list(train.ids) == sorted(train.ids, key=lambda i: int(i.rsplit(":")[-1]))


def test_given_files_are_the_splits_and_overlap_is_counted(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", TEXTS)
    other = jsonl(tmp_path / "v.jsonl", [TEXTS[0], {"text": "new", "label": "no"}])
    data = text.make(path, validation=other, test=other)
    assert len(data.splits["train"].ids) == 20
    assert data.repeated == {"validation": 1, "test": 1}


def test_classes_are_sorted_numbers_by_value_or_given(tmp_path):
    rows = [{"text": str(i), "label": i % 11} for i in range(22)]
    assert text.make(jsonl(tmp_path / "d.jsonl", rows)).classes == tuple(map(str, range(11)))
    given = text.make(jsonl(tmp_path / "e.jsonl", TEXTS), classes=("yes", "no", "maybe"))
    assert given.classes == ("yes", "no", "maybe") and set(given.splits["train"].labels) == {0, 1}


def test_directories_of_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    both = datasets.DatasetDict({"train": part, "test": part.select([0])})
    both.save_to_disk(tmp_path / "saved")
    data = text.make(str(tmp_path / "saved"), validation_fraction=0.5)
    assert data.classes == ("neg", "pos") and data.splits["test"].labels.tolist() == [1]
    assert data.splits["test"].ids == ("saved:test:1",)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_csv(folder / "train.csv", [{"text": "x"}, {"text": "y"}])
    assert text.make(str(folder)).kind == "text"
    with pytest.raises(TaskError, match="nothing: cannot be loaded"):
        (tmp_path / "nothing").mkdir()
        text.make(str(tmp_path / "nothing"))


WRONG = [
    ([{"a": 1, "b": 2}], {}, r"has the columns a, b; needed are messages; prompt and completion"),
    ([{"text": "a"}], {"kind": "classification"}, "no column 'label'"),
    ([{"text": "a", "label": "x"}], {}, r"column 'label' has 1 class\(es\)"),
    (TEXTS, {"classes": ("yes", "na")}, "label 'no' in column 'label' is not one of the classes"),
    ([{"text": " "}], {}, "no text in it"),
    ([{"text": "a"}], {}, "1 different example"),
    ([{"prompt": "a", "completion": " "}], {}, "d.jsonl:1: no text in column 'completion'"),
    ([{"messages": CHAT[:1]}], {}, "at least one of them of the assistant"),
    ([{"messages": "no json"}], {}, "must hold a list of messages"),
    ([{"text": "a", "s": "trian"}], {"split_column": "s"}, "split 'trian' is not one of train"),
    ([{"text": "a", "s": "test"}], {"split_column": "s"}, "no training split; it has test"),
    ([{"text": "", "label": "b"}, {"text": "x", "label": "a"}], {}, "d.jsonl:1: no text"),
]


@pytest.mark.parametrize(("rows", "options", "message"), WRONG)
def test_wrong_data_is_one_sentence(rows, options, message, tmp_path):
    with pytest.raises(TaskError, match=message) as caught:
        text.make(jsonl(tmp_path / "d.jsonl", rows), **options)
    assert "\n" not in str(caught.value)


def test_a_label_that_only_validation_has_is_named(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", TEXTS)
    other = jsonl(tmp_path / "v.jsonl", [{"text": "a", "label": "maybe"}])
    with pytest.raises(TaskError, match=r"v.jsonl:1: label 'maybe' .* classes no, yes"):
        text.make(path, validation=other)


def test_hashes_tell_order_and_content(tmp_path):
    data = text.make(jsonl(tmp_path / "d.jsonl", TEXTS))
    split = data.splits["train"]
    swapped = split.take([1, 0, *range(2, len(split.ids))])
    assert text.split_hash(split.ids) != text.split_hash(swapped.ids)
    changed = data._replace(splits={**data.splits, "train": swapped})
    assert text.data_hash(changed) != text.data_hash(data)
    assert np.array_equal(swapped.labels[:2], split.labels[[1, 0]])
