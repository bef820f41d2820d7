"""Shadow models of a classification study: who trains on what, and what is stored of them."""

import dataclasses

import numpy as np
import pytest
import tiny_text
from test_study import run
from test_study_classification import CONFIG, texts

from jax_lowrank import cli, results
from jax_lowrank.config import ConfigError, MembershipSpec, Run
from jax_lowrank.config_file import load_config
from jax_lowrank.study import membership
from jax_lowrank.study.prepare import make_task
from jax_lowrank.tasks import text_classification
from jax_lowrank.tasks.text import split_hash

METHODS = """MethodSpec("lora", (1e-2,), rank=2), MethodSpec("full", (1e-3,)),"""
AUDIT = "MembershipSpec(shadows=4, methods=('LoRA r=2',))"


def task_of(folder, **options):
    data = tiny_text.jsonl(folder / "data.jsonl", texts())
    columns = {"groups": ("even", "third"), "row_id": "id", "classes": ("neg", "pos")}
    return text_classification.make(str(data), options=columns, **options)


def test_online_every_audited_row_is_in_half_of_the_shadows(tmp_path):
    spec = MembershipSpec(shadows=6)
    task = membership.with_pool(task_of(tmp_path, test_fraction=0.5), spec)
    pool, train = task.splits[membership.POOL], task.splits["train"]
    assert pool.ids[: len(train.ids)] == train.ids
    assert set(pool.ids[len(train.ids) :]) <= set(task.splits["test"].ids)
    known = membership.inside(task, spec)
    assert (known.sum(1) == 3).all()
    for k in range(6):
        split, rows = membership.rows_of(task, spec, membership.FIRST_SEED + k)
        assert split == membership.POOL
        np.testing.assert_array_equal(np.flatnonzero(known[:, k]), rows)
    others = pool.labels[len(train.ids) :]
    apart = np.bincount(others, minlength=2) - np.bincount(train.labels, minlength=2)
    assert len(others) == len(train.ids) and not apart.any()  # the same shares of classes
    target = membership.known_to(task, spec, Run("final", None, None, 1))
    assert target.sum() == len(train.ids) and target[: len(train.ids)].all()


def shadow_rows(task, spec):
    """Of each published shadow, the rows that it trains on."""
    each = []
    for k in range(spec.num_shadows):
        split, rows = membership.rows_of(task, spec, membership.FIRST_SEED + k)
        each.append(task.splits[split].take(rows))
    return each


def test_published_shadows_share_no_row_with_the_audit_and_are_of_their_targets_size(tmp_path):
    spec = MembershipSpec(protocol="published")
    task = membership.with_pool(
        task_of(tmp_path, test_fraction=0.65, validation_fraction=0.1), spec
    )
    audited, train = set(task.splits[membership.POOL].ids), task.splits["train"]
    each = shadow_rows(task, spec)
    assert len(each) == 16 and len({rows.ids for rows in each}) == 16
    for rows in each:
        assert len(set(rows.ids)) == len(train.ids) == 10 and not audited & set(rows.ids)
        np.testing.assert_array_equal(np.bincount(rows.labels), np.bincount(train.labels))
    assert len(set().union(*(rows.ids for rows in each))) > len(train.ids)
    assert not membership.inside(task, spec).any()
    half = MembershipSpec(protocol="published", rows=5, shadows=3)  # the paper's size
    assert [len(rows.ids) for rows in shadow_rows(task, half)] == [5] * 3


def test_too_few_rows_for_published_shadows_are_refused(tmp_path):
    spec = MembershipSpec(protocol="published")
    task = task_of(tmp_path, test_fraction=0.4)
    with pytest.raises(
        ConfigError,
        match=r"trains on 20 rows, \d+ of them 'neg', and \d+ test rows .*"
        r"set membership.rows to (\d+) at most",
    ) as refused:
        membership.with_pool(task, spec)
    near = int(str(refused.value).split("rows to ")[1].split()[0])
    fits = dataclasses.replace(spec, rows=near)
    assert len(shadow_rows(membership.with_pool(task, fits), fits)[0].ids) == near
    with pytest.raises(ConfigError, match=f"trains on {near + 1} rows"):
        membership.with_pool(task, dataclasses.replace(spec, rows=near + 1))
    few = task_of(tmp_path, test_fraction=0.05, validation_fraction=0.1)
    with pytest.raises(ConfigError, match="test rows are too few"):
        membership.with_pool(few, spec)


def study_of(folder, methods, audit, replace=()):
    """(configuration, results directory) of a small audited study, run by its command."""
    paths = {"model": str(tiny_text.checkpoint(folder / "model"))}
    paths["data"] = str(tiny_text.jsonl(folder / "data.jsonl", texts()))
    text = CONFIG.format(**paths, asked="", methods=methods)
    text = text.replace("import EvalSpec,", "import EvalSpec, MembershipSpec,")
    for one, other in (("seeds=(1, 2),", f"seeds=(1, 2), membership={audit},"), *replace):
        assert one in text
        text = text.replace(one, other)
    config = folder / "tiny.py"
    config.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "use_fast_memory", lambda: None)
        patch.setattr(cli, "set_up_jax", lambda: None)
        assert cli.main(["study", str(config), "--out", str(folder / "out")]) == 0
    return config, folder / "out"


@pytest.mark.slow
def test_a_published_study_end_to_end(tmp_path):
    """Sixteen shadows of the target's size; no audited row is in any; records and page say so."""
    config, out = study_of(
        tmp_path,
        'MethodSpec("lora", (1e-2,), rank=2),',
        "MembershipSpec(protocol='published')",
        [
            ("seeds=(1, 2)", "seeds=(1,)"),
            ('"validation_fraction": 0.2', '"validation_fraction": 0.1'),
            ('"test_fraction": 0.3', '"test_fraction": 0.65'),
            ("batch_size=8", "batch_size=4"),
        ],
    )
    study, asked = results.read_study(out), load_config(str(config))
    task = membership.with_pool(make_task(asked), asked.membership)
    audited, rest = study.rows[membership.POOL].ids, task.splits[membership.OTHERS]
    assert audited == task.splits[membership.POOL].ids and len(audited) == 20
    shadows = [run for run in study.runs if run.record["kind"] == "shadow"]
    assert len(shadows) == 16 == len({run.record["splits"]["train"] for run in shadows})
    for each, rows in zip(shadows, shadow_rows(task, asked.membership)):
        said = {"protocol": "published", "trained_on": 10, "members": 0, "others": 20}
        assert each.record["audit"] == said and each.record["num_steps"] == 3
        assert each.record["splits"]["train"] == split_hash(rows.ids)
        assert set(rows.ids) <= set(rest.ids) and not set(rows.ids) & set(audited)
        assert not each.arrays["audited/inside"].any()
    (target,) = (run.record for run in study.runs if run.record["kind"] == "final")
    said = {"protocol": "published", "trained_on": 10, "members": 10, "others": 10}
    assert target["audit"] == said and target["num_steps"] == 3
    page = (out / "report" / "index.html").read_text()
    assert "16 shadow models of LoRA r=2, trained on other rows alone" in page
    assert "(10 each, their targets 10)" in page and "LiRA offline, tail" in page
    assert "LiRA online" not in page


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """(configuration, results directory) of a small study with shadows of one of two methods."""
    return study_of(tmp_path_factory.mktemp("audited"), METHODS, AUDIT)


def test_shadows_are_trained_as_their_targets_on_other_rows(audited):
    config, out = audited
    study = results.read_study(out)
    spec = load_config(str(config)).membership
    shadows = [run for run in study.runs if run.record["kind"] == "shadow"]
    assert len(shadows) == 4 == spec.num_shadows
    seen = [run.record["splits"] for run in shadows]
    assert len({each["train"] for each in seen}) == 4  # each trains on a half of its own
    (hashes,) = {str(r.record["splits"]) for r in study.runs if r.record["kind"] != "shadow"}
    assert study.study["splits"]["train"]["hash"] in hashes
    assert {each["test"] for each in seen} == {study.study["splits"]["test"]["hash"]}
    target = next(r.record for r in study.runs if r.record["kind"] == "final" and r.record["rank"])
    pool = study.rows[membership.POOL]
    for number, shadow in enumerate(shadows):
        record = shadow.record
        half = len(pool.ids) // 2
        said = {"protocol": "online", "trained_on": half, "members": half, "others": half}
        assert record["audit"] == said
        assert record["seed"] == membership.FIRST_SEED + number
        same = ("label", "learning_rate", "trainable_parameters")
        assert all(record[name] == target[name] for name in same)
        assert set(shadow.arrays) == {"audited/inside", "audited/logits", "validation/logits"}
        assert shadow.arrays["audited/logits"].shape == (len(pool.ids), 2)
        assert not (out / "runs" / record["fingerprint"] / "trainable.safetensors").exists()
    inside = np.stack([shadow.arrays["audited/inside"] for shadow in shadows], 1)
    assert (inside.sum(1) == 2).all()
    finals = [r for r in study.runs if r.record["kind"] == "final"]
    trained = set(study.study["splits"]["train"]["ids"])
    for final in finals:
        if final.record["rank"] is None:
            assert final.record["audit"] is None
            assert "audited/logits" not in final.arrays  # full fine-tuning is not audited
            continue
        member = final.arrays["audited/inside"]
        assert {pool.ids[row] for row in np.flatnonzero(member)} == trained
    page = (out / "report" / "index.html").read_text()
    assert "Can it be told which rows a run was trained on?" in page
    assert (out / "report" / "membership.csv").is_file()


@pytest.mark.slow
def test_more_shadows_keep_those_that_are_there(audited, monkeypatch, capsys):
    config, out = audited
    before = {p.name: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    line = ["study", config, "--out", out, "--membership.shadows", "6"]
    assert run(line, monkeypatch, capsys)[0] == 0
    after = {p.name: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    assert len(after) == len(before) + 2
    assert all(after[name] == before[name] for name in before)


WRONG = {
    "odd": ({"shadows": 3}, "membership.shadows 3 is not even; use 4"),
    "negative": ({"shadows": -2}, "is not even; use 2"),
    "one": ({"shadows": 1, "protocol": "published"}, "membership.shadows 1 is below 2; 16"),
    "rows": ({"rows": 5}, "membership.rows 5 is for protocol 'published'"),
    "fewer rows": ({"rows": -1, "protocol": "published"}, "membership.rows -1 is negative"),
    "protocol": ({"protocol": "onlin"}, "did you mean 'online'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_audits_are_refused(case):
    options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        MembershipSpec(**options)


def test_a_method_that_is_not_there_cannot_be_audited(audited):
    study = load_config(str(audited[0]))
    audit = dataclasses.replace(study.membership, methods=("LoRA r=3",))
    with pytest.raises(ConfigError, match=r"did you mean 'LoRA r=2'"):
        dataclasses.replace(study, membership=audit)
