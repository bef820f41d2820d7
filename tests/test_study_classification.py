"""A small classification study end to end: head, LoRA and full on labelled texts with groups."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_text
from flax import nnx
from scipy.special import log_softmax
from test_study import run, words

from jax_lowrank import cli, models, results
from jax_lowrank.config_file import load_config
from jax_lowrank.evaluation import probabilities
from jax_lowrank.study import classification
from jax_lowrank.study.prepare import load_text
from jax_lowrank.tasks import TaskError, encode, text, text_classification

CONFIG = """
from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

def config():
    return Study(
        name="tiny_classes", question="Does it run?", model=ModelSpec(path={model!r}),
        task=TaskSpec("text_classification", {{
            "path": {data!r},
            "options": {{"groups": ("even", "third"), "row_id": "id", "classes": ("neg", "pos")}},
            "validation_fraction": 0.2, "test_fraction": 0.3, {asked}
        }}),
        methods=({methods}),
        train=TrainSpec(epochs=1, batch_size=8, max_length=16), seeds=(1, 2),
        evaluate=EvalSpec(minimum=3, num_resamples=50),
    )
"""
METHODS = """MethodSpec("head", (1e-2,)), MethodSpec("lora", (1e-2, 1e-3), rank=2),
                 MethodSpec("full", (1e-3,))"""


def texts(number=60):
    """Labelled texts of two groups that overlap."""
    return [
        {**row, "id": f"row {i}", "even": int(i % 4 < 2), "third": int(i % 3 == 0)}
        for i, row in enumerate(tiny_text.labelled(40))
    ][:number]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config file, results directory) of the small study, run once."""
    folder = tmp_path_factory.mktemp("classes")
    model = tiny_text.checkpoint(folder / "model")
    data = tiny_text.jsonl(folder / "data.jsonl", texts())
    config = folder / "tiny.py"
    paths = {"model": str(model), "data": str(data)}
    config.write_text(CONFIG.format(**paths, asked="", methods=METHODS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "use_fast_memory", lambda: None)
        patch.setattr(cli, "set_up_jax", lambda: None)
        assert cli.main(["study", str(config), "--out", str(folder / "out")]) == 0
    return config, folder / "out"


def test_every_run_stores_logits_of_the_held_out_rows(finished):
    study = results.read_study(finished[1])
    kinds = [run.record["kind"] for run in study.runs]
    assert (
        kinds
        == ["base", "tune", "final", "final", *["tune"] * 2, *["final"] * 2, "tune"] + ["final"] * 2
    )
    for each in study.runs:
        for split in ("validation", "test"):
            logits = each.arrays[f"{split}/logits"]
            assert logits.shape == (len(study.rows[split].ids), 2)
    assert study.rows["test"].labels.tolist() == [
        int(i.split()[1]) % 2 for i in study.rows["test"].ids
    ]


def test_what_is_chosen_by_is_the_validation_loss_of_what_is_stored(finished):
    study = results.read_study(finished[1])
    labels = study.rows["validation"].labels
    tuned = {}
    for each in study.runs[1:]:
        loss = probabilities.nll(each.arrays["validation/logits"], labels).mean()
        assert each.record["validation_loss"] == pytest.approx(loss, rel=1e-4)
        if each.record["kind"] == "tune" and each.record["rank"]:
            tuned[each.record["learning_rate"]] = loss
    final = {r.record["learning_rate"] for r in study.runs if r.record["rank"] == 2}
    chosen = [r.record for r in study.runs if r.record["rank"] == 2 and r.record["kind"] == "final"]
    assert {r["learning_rate"] for r in chosen} == {min(tuned, key=tuned.get)} <= final


def test_splits_are_saved_apart_and_texts_are_not(finished):
    out = finished[1]
    splits = results.read_study(out).study["splits"]
    ids = [set(part["ids"]) for part in splits.values()]
    assert sum(map(len, ids)) == len(set().union(*ids)) == 40
    assert all(len(part["hash"]) == 64 for part in splits.values())
    hashes = {name: part["hash"] for name, part in splits.items()}
    assert all(run.record["splits"] == hashes for run in results.read_study(out).runs)
    known = results.read_trained_on(next((out / "runs").iterdir()))
    trained = [row["text"] for row in texts() if row["id"] in splits["train"]["ids"]]
    assert known == set(text.hashes(trained)) and len(known) == len(set(trained))
    stored = "".join(p.read_text() for p in out.rglob("*.json*"))
    stored += (out / "report" / "index.html").read_text()
    assert not any(row["text"] in stored for row in texts())
    assert "too few" in stored


def test_evaluating_on_rows_that_were_trained_on_is_refused(finished):
    rows = {name: SimpleNamespace(ids=(f"{name} 1", "r2")) for name in ("train", "test")}
    rows["validation"] = SimpleNamespace(ids=("v",))
    with pytest.raises(TaskError, match="1 of 2 rows to evaluate on were trained on"):
        classification.check_apart(SimpleNamespace(splits=rows))


def test_a_run_is_measured_on_a_file_and_refuses_its_training_rows(
    finished, tmp_path, monkeypatch, capsys
):
    study = results.read_study(finished[1])
    one = next(r for r in study.runs if r.record["kind"] == "final" and r.record["rank"])
    place = finished[1] / "runs" / one.record["fingerprint"]
    rows = {row["id"]: row for row in texts()}
    test = [rows[row] for row in study.rows["test"].ids]
    line = ["evaluate", place, "--data", tiny_text.jsonl(tmp_path / "test.jsonl", test)]
    code, said = run([*line, "--out", tmp_path / "out"], monkeypatch, capsys)
    assert code == 0, said
    with np.load(tmp_path / "out" / "predictions.npz") as found:
        np.testing.assert_allclose(found["logits"], one.arrays["test/logits"], atol=1e-5)
        np.testing.assert_array_equal(found["labels"], study.rows["test"].labels)
    line[-1] = tiny_text.jsonl(tmp_path / "all.jsonl", texts())
    trained = len(study.study["splits"]["train"]["ids"])
    code, said = run(line, monkeypatch, capsys)
    assert code == 2 and f"{trained} of 40 rows to evaluate on were trained on" in said


def test_other_labels_are_another_study(finished, monkeypatch, capsys):
    config, out = finished
    data = config.parent / "data.jsonl"
    kept = data.read_text()
    rows = [json.loads(line) for line in kept.splitlines()]
    rows[0]["label"] = "pos"
    tiny_text.jsonl(data, rows)
    code, text = run(["study", config, "--out", out], monkeypatch, capsys)
    data.write_text(kept)
    assert code == 2 and "belongs to another study: tiny_classes" in text


@pytest.mark.slow
def test_a_decoder_answers_by_a_word_for_each_class(finished, monkeypatch, capsys, tmp_path):
    asked = {"prompt": "the {text} is", "answers": {"neg": " bad", "pos": " good"}}
    folder, config = finished[0].parent, tmp_path / "answers.py"
    paths = {"model": str(folder / "model"), "data": str(folder / "data.jsonl")}
    asked = str(asked | {"blank": "the box"})[1:-1]
    method = 'MethodSpec("lora", (1e-2,), rank=2),'
    config.write_text(CONFIG.format(**paths, asked=asked, methods=method))
    code, printed = run(["study", config, "--out", tmp_path / "out"], monkeypatch, capsys)
    assert code == 0, printed
    study = results.read_study(tmp_path / "out")
    said = study.study["answers"]
    assert said["words"] == [" bad", " good"] and said["prompt"] == "the {text} is"
    # The base model's logits are those of the two words, less their log probability when blank.
    text, model = (read(folder / "model") for read in (load_text, models.load))
    answers = [text.tokenizer(word)["input_ids"][0] for word in said["words"]]
    by_id = {row["id"]: row["text"] for row in texts()}

    def answer(words):
        tokens = text.tokenizer(f"the {words} is", add_special_tokens=False)["input_ids"]
        tokens = [text.tokenizer.bos_token_id] * text.bos + tokens
        logits = nnx.merge(model.graphdef, model.params)(np.asarray([tokens]))
        return np.asarray(logits[0, -1])[answers]

    log_prior = log_softmax(answer("the box"))
    np.testing.assert_allclose(said["blank_probabilities"], np.exp(log_prior), atol=1e-6)
    base = study.runs[0].arrays["test/logits"]
    for row, logits in list(zip(study.rows["test"].ids, base))[:3]:
        np.testing.assert_allclose(logits, answer(by_id[row]) - log_prior, atol=1e-5)
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "contextual calibration" in page and "drawn by the run" not in page


BAD_ANSWERS = {
    "no place": ({"prompt": "is it?"}, r"prompt must hold \{text\} once"),
    "a class without": ({"answers": {"neg": " bad"}}, "a word for each of neg, pos, not for neg"),
    "long": ({"answers": {"neg": " bad good", "pos": " good"}}, "' bad good' is 2 tokens, not one"),
    "the same": ({"answers": {"neg": " good", "pos": " good"}}, "are not distinct tokens"),
    "no room": ({"prompt": "the " * 15 + "{text} is"}, "max_length must be 18 at least"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_answers_that_cannot_be_are_refused(finished, case):
    config = load_config(str(finished[0]))
    asked, message = BAD_ANSWERS[case]
    right = {"prompt": "the {text} is", "answers": {"neg": " bad", "pos": " good"}}
    options = {**config.task.options, **right, **asked}
    text, model = (f(finished[0].parent / "model") for f in (load_text, models.load))
    with pytest.raises(TaskError, match=message):
        task = text_classification.make(**options)
        classification.with_answers(config, task, text, model, None)


def test_a_long_text_keeps_the_question(finished):
    text = load_text(finished[0].parent / "model")
    asked = {"prompt": "the {text} is good", "max_length": 6}
    found = encode.encode_questions(["a", "b"], ["box key cat dog box", "box"], text, **asked)
    words = [text.tokenizer.decode(tokens).split() for tokens in found.sequences]
    start = [text.tokenizer.bos_token] if text.bos else []
    assert words[0] == [*[*start, "the", "box", "key", "cat"][:4], "is", "good"]
    assert words[1][-4:] == ["the", "box", "is", "good"] and found.num_truncated == 1


def test_one_line_says_accuracy_and_the_worst_group_that_counts():
    groups = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 1, 1]], bool)
    test = SimpleNamespace(groups=groups, labels=np.array([0, 1, 0, 1]))
    study = SimpleNamespace(evaluate=SimpleNamespace(minimum=3))
    prepared = SimpleNamespace(task=SimpleNamespace(splits={"test": test}), study=study)
    record = {"trainable_parameters": 5, "total_parameters": 1000}
    logits = np.array([[1, 0], [0, 1], [0, 1], [1, 0]])  # right, right, wrong, wrong
    said = classification.summary(prepared, record, {"test/logits": logits})
    assert said == "test accuracy 0.500, worst group 0.333; 5 of 1,000 trained"


WRONG = {
    "positive": (["--evaluate.positive", "poss"], "did you mean 'pos'"),
    "scorer": (["--task.scorer", "lexicon:x"], "classification has labels"),
    "length": (["--train.max-length", "99"], "above the model's 48 positions"),
    "minimum": (["--evaluate.minimum", "0"], "evaluate.minimum 0 is below 1"),
    "margin": (["--evaluate.margin", "0"], "evaluate.margin 0.0 is not positive"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_message(case, finished, tmp_path, monkeypatch, capsys):
    extra, expected = WRONG[case]
    code, text = run(["study", finished[0], "--out", tmp_path, *extra], monkeypatch, capsys)
    assert code == 2 and expected in words(text) and "Traceback" not in text


def test_the_seed_draws_the_head_and_nothing_else(finished):
    head = models.Head("classification", ("neg", "pos"))
    model = models.load(finished[0].parent / "model", head=head, key=jax.random.key(0))
    one, other, again = (
        models.by_path(models.redraw(model, jax.random.key(seed), model.head_paths).params)
        for seed in (1, 2, 1)
    )
    assert model.head_paths
    for path, array in one.items():
        same = np.array_equal(array, other[path])
        assert same == (path not in model.head_paths or "bias" in path), path
        np.testing.assert_array_equal(array, again[path])


def test_the_hash_of_labelled_data_sees_every_part(tmp_path):
    options = {"groups": ("even", "third"), "row_id": "id"}
    rows = texts()

    def hash_of(changed):
        path = tiny_text.jsonl(tmp_path / "d.jsonl", changed)
        return text_classification.data_hash(text_classification.make(str(path), options=options))

    first = hash_of(rows)
    assert first == hash_of(rows)
    for key, value in (("text", "the other"), ("label", "pos"), ("third", 0), ("id", "row x")):
        assert hash_of([{**rows[0], key: value}, *rows[1:]]) != first, key
