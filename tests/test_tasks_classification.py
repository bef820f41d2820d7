"""Labelled texts with groups: the readers, the splits and their refusals."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lowrank.config_file import load_config
from jax_lowrank.tasks import grouped, imbalance, readers, text_classification
from jax_lowrank.tasks.task import TaskError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as handle:
        out = csv.DictWriter(handle, rows[0])
        out.writeheader()
        out.writerows(rows)
    return str(path)


def table(tmp_path, n=200, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"id": f"r{i}", "text": f"text {i}", "label": "ab"[rng.random() < 0.3]}
        | {"x": int(rng.random() < 0.4), "y": round(rng.random(), 2)}
        for i in range(n)
    ]
    return write_csv(tmp_path / "d.csv", rows)


COLUMNS = {"groups": ("x", "y"), "row_id": "id"}


@needs_data
def test_hatexplain_has_its_published_counts():
    path = str(SHARED / "hatexplain" / "derived_official_val_test.csv.gz")
    found = grouped.read_hatexplain(path)
    assert found.classes == ("normal", "offensive", "hatespeech")
    assert len(found.ids) == 3844 and found.num_repeated == 2
    sizes = dict(zip(found.group_names, found.groups.sum(0)))
    assert sizes["Islam"] == 398 and sizes["Men"] == 12 and "" not in sizes
    assert (found.groups.sum(1) > 1).any() and (found.groups.sum(1) == 0).any()
    two = grouped.read_hatexplain(path, classes="two")
    np.testing.assert_array_equal(two.labels, found.labels > 0)
    data = text_classification.make(path, reader="hatexplain", seed=1)
    share = [split.groups.mean(0) for split in data.splits.values()]
    assert np.abs(share[0] - share[2]).max() < 0.02


@needs_data
def test_edos_has_its_official_splits():
    path = str(SHARED / "edos" / "edos_labelled_aggregated.csv.gz")
    data = text_classification.make(path, reader="edos", split="source")
    sizes = {name: len(split.ids) for name, split in data.splits.items()}
    assert sizes == {"train": 14000, "validation": 2000, "test": 4000}
    test = data.splits["test"]
    assert len(data.group_names) == 4 and test.labels[test.groups.any(1)].all()
    options = {"groups": {"women": ("woman", "women"), "men": ("man", "men")}}
    terms = text_classification.make(path, reader="edos", split="source", options=options)
    first = terms.splits["test"]
    assert terms.group_names == ("women", "men") and first.groups[:, 0].sum() > 100
    inside = [text for text, member in zip(first.texts, first.groups[:, 0]) if member]
    assert all("wom" in text.lower() for text in inside)


def dlab(tmp_path):
    """Three comments by several annotators, as in the published file."""
    import pyarrow
    import pyarrow.parquet

    marks = ("race", "race_black", "race_white", "gender", "gender_women")
    flags = {
        "one": [(1, 1, 0, 0, 0), (1, 0, 1, 0, 0), (1, 1, 0, 1, 0)],
        "two": [(0, 0, 0, 1, 1), (1, 1, 0, 1, 1)],
        "three": [(1, 0, 1, 1, 1), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)],
    }
    scores = {"one": 0.51, "two": 0.5, "three": -2.0}
    rows = [
        {"comment_id": number, "text": text, "hate_speech_score": scores[text], "other": 1}
        | {f"target_{mark}": bool(flag) for mark, flag in zip(marks, row)}
        for number, text in enumerate(flags)
        for row in flags[text]
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    return str(tmp_path / "d.parquet")


def test_dlab_by_majority_and_as_published(tmp_path):
    path = dlab(tmp_path)
    found = grouped.read_dlab(path)
    assert found.ids == ("0", "1", "2") and found.labels.tolist() == [1, 0, 0]
    assert found.group_names == ("gender_women", "race_black", "race_white")
    assert found.groups.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]  # more than half
    assert found.num_repeated == 5
    first = grouped.read_dlab(path, flags="first", subset="race")
    assert first.ids == ("0", "2") and first.group_names == ("race_black", "race_white")
    assert first.groups.tolist() == [[1, 0], [0, 1]]
    assert grouped.read_dlab(path, subset="race").ids == ("0",)
    for options, message in (
        ({"subset": "rage"}, "no attribute 'rage'; it has gender, race, and all"),
        ({"flags": "any"}, "'majority' or 'first'"),
    ):
        with pytest.raises(TaskError, match=message):
            grouped.read_dlab(path, **options)


def test_a_table_of_any_kind(tmp_path):
    rows = [
        {"t": "a b", "toxicity": 0.5, "women": 0.7, "men": None},
        {"t": "c", "toxicity": 0.49, "women": 0.2, "men": 0.5},
        {"t": "a b", "toxicity": 0.9, "women": 1.0, "men": 1.0},
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"text": "t", "label": "toxicity", "positive_above": 0.5}
    found = grouped.read_columns(str(path), groups=("women", "men"), **options)
    assert found.labels.tolist() == [1, 0] and found.groups.tolist() == [[1, 0], [0, 1]]
    assert found.ids == ("c.jsonl:1", "c.jsonl:2") and found.num_repeated == 1
    rows = [{"text": "a", "label": 1, "of": "x|y"}, {"text": "b", "label": 0, "of": ""}]
    listed = grouped.read_columns(write_csv(tmp_path / "l.csv", rows), group_list="of")
    assert listed.group_names == ("x", "y") and listed.groups.tolist() == [[1, 1], [0, 0]]
    assert listed.classes == ("0", "1")


WRONG = [
    ({"groups": ("x", "z")}, "no column 'z'"),
    ({}, "name the columns of groups"),
    ({"groups": ("x",), "group_list": "y"}, "name the columns of groups"),
    ({"groups": ("text",)}, "column 'text' must hold numbers or true/false, not 'text 0'"),
    ({"groups": ("x",), "classes": ("a", "c")}, "label 'b' is not one of a, c"),
    ({"groups": ("x",), "classes": ("a",)}, r"1 class\(es\)"),
    ({"groups": ("x",), "row_id": "label"}, "the id '[ab]' occurs more than once"),
    ({"groups": ("x",), "positive_above": 0.5}, "column 'label' must hold numbers"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_tables_are_one_sentence(options, message, tmp_path):
    with pytest.raises(TaskError, match=message) as caught:
        grouped.read_columns(table(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_stratified_splits_keep_every_pattern_in_proportion(tmp_path):
    path = table(tmp_path, n=400)
    data = text_classification.make(path, options=COLUMNS, seed=3)
    sizes = {name: len(split.ids) for name, split in data.splits.items()}
    assert sizes["test"] in (79, 80, 81) and sizes["validation"] in (39, 40, 41)
    ids = data.ids()
    assert len(set().union(*ids.values())) == sum(sizes.values()) == 400
    whole = grouped.read_columns(path, **COLUMNS)
    for label in (0, 1):
        for pattern in np.unique(whole.groups, axis=0):
            counts = [
                ((split.labels == label) & (split.groups == pattern).all(1)).sum()
                for split in (data.splits["test"], whole)
            ]
            assert abs(counts[0] - 0.2 * counts[1]) < 1
    again = text_classification.make(path, options=COLUMNS, seed=3)
    assert again.hashes == data.hashes
    other = text_classification.make(path, options=COLUMNS, seed=4)
    assert other.hashes["test"] != data.hashes["test"]


def test_rare_patterns_reach_the_test_split_over_seeds(tmp_path):
    rows = grouped.read_columns(table(tmp_path, n=50), **COLUMNS)
    rows = rows._replace(groups=np.arange(100).reshape(50, 2) == 0)  # one row is alone
    seen = [0 in text_classification.stratified(rows, s, 0.1, 0.2)["test"] for s in range(200)]
    assert 0.1 < np.mean(seen) < 0.3


def test_the_published_split_is_the_datasets_librarys(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = table(tmp_path, n=123)
    data = text_classification.make(
        path, options=COLUMNS, split="published", seed=1337, validation_fraction=0.0
    )
    theirs = datasets.Dataset.from_dict({"i": list(range(123))}).train_test_split(
        test_size=0.2, seed=1337
    )
    for name in ("train", "test"):
        assert data.splits[name].ids == tuple(f"r{i}" for i in theirs[name]["i"])
    with_validation = text_classification.make(path, options=COLUMNS, split="published", seed=1337)
    assert with_validation.hashes["test"] == data.hashes["test"]
    parts = with_validation.splits
    assert {*parts["train"].ids, *parts["validation"].ids} == set(data.splits["train"].ids)


def test_the_source_says_the_split(tmp_path):
    rows = [
        {"text": f"t{i}", "label": i % 2, "g": i % 3 == 0, "part": name}
        for i, name in enumerate(["train"] * 20 + ["dev"] * 4 + ["test"] * 6)
    ]
    path = write_csv(tmp_path / "s.csv", rows)
    options = {"groups": ("g",), "split": "part"}
    data = text_classification.make(path, split="source", options=options)
    assert [len(part.ids) for part in data.splits.values()] == [20, 4, 6]
    with pytest.raises(TaskError, match="split '' is not one of train, dev"):
        text_classification.make(path, split="source", options={"groups": ("g",)})


def test_imbalance_is_imposed_on_training_rows_only(tmp_path):
    path = table(tmp_path, n=400)
    plain = text_classification.make(path, options=COLUMNS)
    data = text_classification.make(path, options=COLUMNS, ratio={"b": 0.1})
    train, before = data.splits["train"], plain.splits["train"]
    rare = (train.labels == 1).sum()
    assert abs(rare - 0.1 * len(train.ids)) <= 1
    assert (train.labels == 0).sum() == (before.labels == 0).sum()
    assert data.hashes["test"] == plain.hashes["test"] and set(train.ids) < set(before.ids)
    said = data.notes["shares of the training rows"]
    assert said == f"b {rare} of {len(train.ids)} (asked: 0.1)"
    again = text_classification.make(path, options=COLUMNS, ratio={"b": 0.1})
    assert again.hashes == data.hashes
    other = text_classification.make(path, options=COLUMNS, ratio={"b": 0.1, "x": 0.3})
    few = text_classification.make(path, options=COLUMNS, ratio={"b": 0.1, "x": 0.3}, max_train=50)
    for found in (other, few):
        rows = found.splits["train"]
        assert abs((rows.labels == 1).sum() - 0.1 * len(rows.ids)) <= 1
        assert abs(rows.groups[:, 0].sum() - 0.3 * len(rows.ids)) <= 1
    assert len(few.splits["train"].ids) == 50


@needs_data
def test_the_imbalanced_config_gets_the_shares_it_asks_for():
    options = load_config(str(ROOT / "configs/hate_speech.py") + ":imbalanced").task.options
    train = text_classification.make(**options).splits["train"]
    assert len(train.ids) == options["max_train"]
    found = {name: train.groups[:, i].mean() for i, name in enumerate(train.group_names)}
    found["toxic"] = train.labels.mean()
    for name, share in options["ratio"].items():
        assert abs(found[name] - share) * len(train.ids) <= 1


WRONG_RATIOS = [
    ({"z": 0.5}, "'z' is neither a class (a, b) nor a group (x, inner, all)"),
    ({"b": 1.0}, "the share of 'b' must lie in (0, 1), not 1"),
    ({"all": 0.5}, "the share of 'all' cannot be 0.5; by dropping rows only 1 can be reached"),
    (
        {"b": 0.2, "a": 0.5},
        "the share of 'a' cannot be 0.5; by dropping rows beside b 0.2 only 0.8 can be reached",
    ),
    (
        {"x": 0.2, "inner": 0.5},
        "the share of 'inner' cannot be 0.5; by dropping rows beside x 0.2 0 to 0.2 can be reached",
    ),
]


@pytest.mark.parametrize(("ratio", "message"), WRONG_RATIOS)
def test_shares_that_cannot_be_reached_name_those_that_can(ratio, message):
    x = np.arange(60) % 2 == 0
    groups = np.stack([x, x & (np.arange(60) % 3 == 0), np.ones(60, bool)], 1)
    rows = rows_of(np.arange(60) // 5 % 2, groups, ("x", "inner", "all"))
    with pytest.raises(TaskError) as caught:
        imbalance.unbalanced(rows, np.arange(60), ratio, 0)
    assert message in str(caught.value)


def rows_of(labels, groups, names):
    ids = tuple(str(i) for i in range(len(labels)))
    classes = tuple("abc"[: labels.max() + 1])
    parts = (labels.astype(np.int32), groups, classes, names, ("",) * len(ids), 0)
    return grouped.Grouped(ids, ids, *parts)


@given(st.integers(0, 10**6), st.integers(40, 600), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_shares_are_met_to_a_row_and_the_kind_dropped_least_stays_whole(seed, size, number):
    rng = np.random.default_rng(seed)
    names = ("x", "y", "z")
    groups = rng.random((size, 3)) < rng.uniform(0.1, 0.9, 3)
    rows = rows_of(rng.choice(3, size, p=(0.5, 0.3, 0.2)), groups, names)
    ratio = {str(n): rng.uniform(0.1, 0.9) for n in rng.permutation(["b", *names])[:number]}
    chosen = rng.permutation(size)[: size - 5]
    try:
        found, held = imbalance.unbalanced(rows, chosen, ratio, seed)
    except TaskError as error:
        assert "can be reached" in str(error)
        return
    columns = {n: rows.groups[:, i] for i, n in enumerate(names)} | {"b": rows.labels == 1}
    inside = np.stack([columns[name] for name in ratio], 1)
    where = {row: place for place, row in enumerate(chosen)}
    places = [where[row] for row in found]
    assert places == sorted(set(places))  # some of the rows, once each, in their order
    for name, share in ratio.items():
        assert held[name] == columns[name][found].sum()
        assert abs(held[name] - share * len(found)) <= 1
    cells, which = np.unique(inside[chosen], axis=0, return_inverse=True)
    before = np.bincount(which.ravel(), minlength=len(cells))
    after = [(inside[found] == cell).all(1).sum() for cell in cells]
    assert max(after / before) == 1.0  # else more could have stayed
    again, _ = imbalance.unbalanced(rows, chosen, ratio, seed)
    np.testing.assert_array_equal(found, again)
    few, held = imbalance.unbalanced(rows, chosen, ratio, seed, most=30)
    assert len(few) == min(30, len(found))
    assert all(abs(held[name] - share * len(few)) <= 1 for name, share in ratio.items())


def test_what_goes_together_stays_together():
    """A rare class and a rare group that overlap: the odds ratio between them does not change."""
    rng = np.random.default_rng(0)
    labels = (rng.random(40_000) < 0.4).astype(int)
    groups = rng.random((40_000, 1)) < np.where(labels, 0.6, 0.2)[:, None]
    rows = rows_of(labels, groups, ("x",))
    found, _ = imbalance.unbalanced(rows, np.arange(40_000), {"b": 0.1, "x": 0.1}, 0)

    def odds(of):
        both = 2 * labels[of] + groups[of, 0]
        none, group, rare, all_two = np.bincount(both)
        return none * all_two / (group * rare)

    assert odds(found) == pytest.approx(odds(slice(None)), rel=0.01)


def test_trained_rows_are_refused():
    text_classification.check_unseen(["a", "b"], ["c"])
    with pytest.raises(TaskError, match=r"1 of 2 rows to evaluate on were trained on, e\.g\. b"):
        text_classification.check_unseen(["a", "b"], ["b", "c"])


def test_options_are_checked(tmp_path):
    path = table(tmp_path)
    for options, message in (
        ({"reader": "csv"}, "reader must be one of columns, hatexplain"),
        ({"split": "random"}, "split must be one of stratified"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "must leave training rows"),
        ({"max_rows": 2}, r"d.csv: no rows are left for (validation|test)"),
    ):
        with pytest.raises(TaskError, match=message):
            text_classification.make(path, **{"options": COLUMNS, **options})
    few = text_classification.make(path, options=COLUMNS, max_rows=50)
    assert sum(len(part.ids) for part in few.splits.values()) == 50
    whole = text_classification.make(path, options=COLUMNS)
    less = text_classification.make(path, options=COLUMNS, max_train=30)
    assert len(less.splits["train"].ids) == 30
    assert set(less.splits["train"].ids) < set(whole.splits["train"].ids)
    assert less.splits["test"].ids == whole.splits["test"].ids


def test_a_tfds_source_with_its_splits(tmp_path, monkeypatch):
    """Rows as Civil Comments has them: shares of annotators, in a data set built here."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Identities(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = {"text": tfds.features.Text(), "id": tfds.features.Text()}
            kinds |= dict.fromkeys(("toxicity", "male", "female"), np.float32)
            features = tfds.features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            parts = (("train", 12), ("validation", 4), ("test", 4))
            return {name: self._generate_examples(name, number) for name, number in parts}

        def _generate_examples(self, name, number):
            for i in range(number):
                row = {"text": f"ein Satz für {name} {i}", "id": f"{name}{i}", "toxicity": i / 10}
                yield i, {**row, "male": 0.5 * (i % 2), "female": 0.4}

    builder = Identities(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    sources = builder.as_data_source()
    monkeypatch.setattr(
        tfds, "data_source", lambda name, split: sources[split] if split else sources
    )
    options = {
        "label": "toxicity",
        "positive_above": 0.5,
        "groups": ("male", "female"),
        "row_id": "id",
        "split": "tfds_split",
    }
    data = text_classification.make("tfds:identities", split="source", options=options)
    assert {name: len(part.ids) for name, part in data.splits.items()} == {
        "train": 12,
        "validation": 4,
        "test": 4,
    }
    train = data.splits["train"]
    place = train.ids.index("train7")
    assert train.texts[place] == "ein Satz für train 7" and train.labels[place] == 1
    assert train.groups[place].tolist() == [True, False]
    one = grouped.read_columns("tfds:identities:test", **options)
    assert set(one.source_splits) == {"test"} and len(one.ids) == 4


def test_civil_comments_has_the_columns_of_its_config(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    asked = []
    monkeypatch.setattr(tfds, "data_source", lambda name, split: asked.append(name) or {})
    options = load_config(str(ROOT / "configs/civil_comments.py")).task.options
    with pytest.raises(TaskError, match="no rows in it"):
        text_classification.make(**options)
    name, config = asked[0].split("/")  # the data set's own class, which needs no download
    builder = tfds.builder_cls(name)(config=config, data_dir=tmp_path)
    columns = {"text", options["options"]["label"], *options["options"]["groups"]}
    assert columns <= set(builder.info.features)


def test_a_tfds_address_that_names_nothing_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(TaskError, match="tfds:no_such_data: cannot be read"):
        grouped.read_columns("tfds:no_such_data", groups=("x",))


@needs_data
def test_jigsaws_templates_name_their_groups(tmp_path):
    lines = readers.read_text(SHARED / "jigsaw_bias" / "bias_madlibs_77k.csv.gz").splitlines()
    (tmp_path / "part.csv").write_text("\n".join(lines[:3000]))
    found = grouped.read_jigsaw(str(tmp_path / "part.csv"))
    assert found.classes == ("NOT_BAD", "BAD") and len(found.group_names) == 50
    place = found.texts.index("murder american")
    assert found.labels[place] == 1
    named = [n for n, inside in zip(found.group_names, found.groups[place]) if inside]
    assert named == ["american"]
    assert 0.4 < found.labels[found.groups[:, found.group_names.index("gay")]].mean() < 0.6


def test_jigsaws_later_templates_too(tmp_path):
    rows = [
        {"template": "verb_adj", "toxicity": "nontoxic", "phrase": "hug lesbian"},
        {"template": "name_adj", "toxicity": "toxic", "phrase": "Ying is a idiotic bisexual"},
        {"template": "x_tox", "toxicity": "toxic", "phrase": "A moronic middle eastern gay man"},
    ]
    found = grouped.read_jigsaw(write_csv(tmp_path / "t.csv", rows))
    assert found.classes == ("nontoxic", "toxic") and found.labels.tolist() == [0, 1, 1]
    named = [{n for n, inside in zip(found.group_names, row) if inside} for row in found.groups]
    assert named == [{"lesbian"}, {"bisexual"}, {"middle eastern", "gay"}]
    for row in rows:
        del row["toxicity"]
    with pytest.raises(TaskError, match="no column 'toxicity'; it has template, phrase"):
        grouped.read_jigsaw(write_csv(tmp_path / "t.csv", rows))
    with pytest.raises(TaskError, match="no column 'Text'"):
        grouped.read_jigsaw(write_csv(tmp_path / "t.csv", [{"a": "b"}]))


@needs_data
@pytest.mark.parametrize("name", ["en_sentence_templates", "intersectional_madlibs"])
def test_jigsaws_later_files_are_read(name, tmp_path):
    lines = readers.read_text(SHARED / "jigsaw_bias" / f"{name}.csv.gz").splitlines()
    (tmp_path / "part.csv").write_text("\n".join([lines[0], *lines[1::31]]))
    found = grouped.read_jigsaw(str(tmp_path / "part.csv"))
    assert len(found.group_names) == 50 and 0.4 < found.labels.mean() < 0.6
    assert ((found.groups.sum(1) > 1).mean() > 0.5) == (name == "intersectional_madlibs")


def test_a_hub_source_from_a_data_set_built_here(tmp_path, monkeypatch):
    """`datasets` reads a folder OWNER/NAME of the working directory as it reads the hub."""
    import datasets

    folder = tmp_path / "someone" / "posts"
    folder.mkdir(parents=True)
    table(folder, n=40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    address = "hub:someone/posts/d.csv"
    found = text_classification.make(address, options=COLUMNS, seed=1)
    local = text_classification.make(str(folder / "d.csv"), options=COLUMNS, seed=1)
    assert found.hashes == local.hashes
    assert text_classification.data_hash(found) == text_classification.data_hash(local)
