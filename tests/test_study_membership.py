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
from jax_lowrank.tasks import text_classification

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
    target = membership.known_to(task, spec, Run("final", None, None, 1))
    assert target.sum() == len(train.ids) and target[: len(train.ids)].all()


def test_published_shadows_share_no_row_with_the_audit(tmp_path):
    spec = MembershipSpec(shadows=4, protocol="published")
    task = membership.with_pool(task_of(tmp_path, test_fraction=0.5), spec)
    audited = set(task.splits[membership.POOL].ids)
    for k in range(4):
        split, rows = membership.rows_of(task, spec, membership.FIRST_SEED + k)
        ids = {task.splits[split].ids[row] for row in rows}
        assert ids and not ids & audited
    assert not membership.inside(task, spec).any()
    few = task_of(tmp_path, test_fraction=0.05, validation_fraction=0.1)
    with pytest.raises(ConfigError, match="test rows are too few"):
        membership.with_pool(few, spec)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """(configuration, results directory) of a small study with shadows of one of two methods."""
    folder = tmp_path_factory.mktemp("audited")
    paths = {"model": str(tiny_text.checkpoint(folder / "model"))}
    paths["data"] = str(tiny_text.jsonl(folder / "data.jsonl", texts()))
    text = CONFIG.format(**paths, asked="", methods=METHODS)
    text = text.replace("import EvalSpec,", "import EvalSpec, MembershipSpec,")
    text = text.replace("seeds=(1, 2),", f"seeds=(1, 2), membership={AUDIT},")
    config = folder / "tiny.py"
    config.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "use_fast_memory", lambda: None)
        patch.setattr(cli, "set_up_jax", lambda: None)
        assert cli.main(["study", str(config), "--out", str(folder / "out")]) == 0
    return config, folder / "out"


def test_shadows_are_trained_as_their_targets_on_other_rows(audited):
    config, out = audited
    study = results.read_study(out)
    spec = load_config(str(config)).membership
    shadows = [run for run in study.runs if run.record["kind"] == "shadow"]
    assert len(shadows) == 4 == spec.shadows
    seen = [run.record["splits"] for run in shadows]
    assert len({each["train"] for each in seen}) == 4  # each trains on a half of its own
    (hashes,) = {str(r.record["splits"]) for r in study.runs if r.record["kind"] != "shadow"}
    assert study.study["splits"]["train"]["hash"] in hashes
    assert {each["test"] for each in seen} == {study.study["splits"]["test"]["hash"]}
    target = next(r.record for r in study.runs if r.record["kind"] == "final" and r.record["rank"])
    pool = study.rows[membership.POOL]
    for number, shadow in enumerate(shadows):
        record = shadow.record
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
            assert "audited/logits" not in final.arrays  # full fine-tuning is not audited
            continue
        member = final.arrays["audited/inside"]
        assert {pool.ids[row] for row in np.flatnonzero(member)} == trained
    page = (out / "report" / "index.html").read_text()
    assert "Can it be told which rows a run was trained on?" in page
    assert (out / "report" / "membership.csv").is_file()


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
    "none": ({"shadows": 0}, "is not even; use 2"),
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
