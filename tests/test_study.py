"""A small study end to end through the command line: pretraining, training, sampling, report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lowrank import cli, results

CONFIG = """
from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

def config():
    return Study(
        name="tiny",
        question="Does it run?",
        model=ModelSpec(family="gpt2", sizes={"num_layers": 2, "width": 32, "num_heads": 2,
                                              "mlp_width": 64, "max_positions": 32}),
        pretrain=TrainSpec(epochs=1, batch_size=64, max_length=24, learning_rate=3e-3),
        task=TaskSpec(name="world", options={"num_pretrain": 1280, "num_pretrain_validation": 64,
                                             "num_train": 64, "num_validation": 32}),
        methods=(MethodSpec("lora", (1e-2, 1e-3), rank=2), MethodSpec("full", (1e-3,))),
        train=TrainSpec(epochs=1, batch_size=16, max_length=24),
        seeds=(1, 2),
        evaluate=EvalSpec(samples_per_prompt=2, max_new_tokens=3, batch_size=112),
    )
"""


def run(arguments, monkeypatch, capsys):
    """(exit code, what was printed to stdout and stderr) of one command in this process."""
    monkeypatch.setattr(cli, "use_fast_memory", lambda: None)
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # how tyro ends on a wrong flag
        code = stop.code
    out, err = capsys.readouterr()
    return code, out + err


def words(text):
    """Text without line breaks and without the box that tyro draws around its errors."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config file, results directory) of the small study, run once."""
    folder = tmp_path_factory.mktemp("study")
    config = folder / "tiny.py"
    config.write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "use_fast_memory", lambda: None)
        patch.setattr(cli, "set_up_jax", lambda: None)
        assert cli.main(["study", str(config), "--out", str(folder / "out")]) == 0
    return config, folder / "out"


def outputs(directory: Path) -> dict:
    """Run name -> its per-example arrays and completions, where it has any."""
    runs = [path for path in (directory / "runs").iterdir() if (path / "outputs.npz").is_file()]
    return {path.name: results.read_run(path) for path in runs}


def test_every_run_is_there_with_its_guards(finished):
    study = results.read_study(finished[1])
    kinds = [run.record["kind"] for run in study.runs]
    assert kinds == ["base", "tune", "tune", "final", "final", "tune", "final", "final"]
    lora = next(r.record for r in study.runs if r.record["kind"] == "final")
    # Two layers of qkv 32x96, out 32x32, up 32x64 and down 64x32, two factors of rank 2 each.
    assert lora["trainable_parameters"] == 2 * 2 * ((32 + 96) + (32 + 32) + 2 * (32 + 64))
    assert lora["effective_scale"] == 8.0
    assert lora["dtypes"] == {"trainable": ["float32"], "frozen": ["float32"]}
    full = study.runs[-1].record
    assert full["dtypes"] == {"trainable": ["float32"], "frozen": []}
    assert full["effective_scale"] is None
    assert full["trainable_parameters"] == full["total_parameters"] == lora["total_parameters"]
    assert lora["environment"]["jax"] and lora["padding_fraction"] < 0.2


def test_outputs_have_one_row_a_prompt(finished):
    study = results.read_study(finished[1])
    for run_result in study.runs:
        if run_result.record["kind"] == "tune":
            assert run_result.arrays == {}
            continue
        for split in ("tuned", "transfer"):
            num_prompts = len(study.rows[split].texts)
            assert run_result.arrays[f"{split}/harm"].shape == (num_prompts, 2)
            assert np.array(run_result.completions[split]).shape == (num_prompts, 2)
            mass = run_result.arrays[f"{split}/lens_mass"]
            assert mass.shape == (num_prompts, 3) and ((mass >= 0) & (mass <= 1)).all()
            log_p = run_result.arrays[f"{split}/log_posterior"]
            np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-4)


def test_a_lora_run_stores_its_adapter_alone(finished):
    _, out = finished
    lora = [r for r in outputs(out).values() if r.record["rank"] == 2]
    assert lora
    for run_result in lora:
        stored = load_file(
            out / "runs" / run_result.record["fingerprint"] / "trainable.safetensors"
        )
        assert all(".adapter." in name for name in stored)
        assert sum(a.size for a in stored.values()) == run_result.record["trainable_parameters"]


def test_the_chosen_rate_has_the_lowest_validation_loss(finished):
    records = [run.record for run in results.read_study(finished[1]).runs]
    tuned = {r["learning_rate"]: r["validation_loss"] for r in records if r["kind"] == "tune"}
    lora = {rate: loss for rate, loss in tuned.items() if rate in (1e-2, 1e-3)}
    final = {r["learning_rate"] for r in records if r["kind"] == "final" and r["rank"] == 2}
    assert final <= set(lora) and len(final) == 1


def test_the_report_is_one_file_without_the_network(finished):
    page = (finished[1] / "report" / "index.html").read_text(encoding="utf-8")
    assert "tiny" in page and "What these runs show" in page
    assert 'src="http' not in page and "<script" not in page


def test_a_finished_study_runs_nothing_again(finished, monkeypatch, capsys):
    config, out = finished
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").glob("*/record.json")}
    code, _ = run(["study", config, "--out", out], monkeypatch, capsys)
    assert code == 0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "runs").glob("*/record.json")}


def test_an_interrupted_study_continues_with_the_same_numbers(
    finished, tmp_path, monkeypatch, capsys
):
    config, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    before = outputs(copy)
    lost = [name for name, r in before.items() if r.record["seed"] == 2]
    for name in lost:
        shutil.rmtree(copy / "runs" / name)
    partial = copy / "runs" / f".partial-{lost[0]}-killed"
    partial.mkdir()
    code, _ = run(["study", config, "--out", copy], monkeypatch, capsys)
    assert code == 0 and len(lost) == 2
    assert not partial.exists()
    after = outputs(copy)
    assert after.keys() == before.keys()
    for name in lost:
        assert after[name].completions == before[name].completions
        for key, array in before[name].arrays.items():
            np.testing.assert_array_equal(after[name].arrays[key], array, err_msg=key)


def test_a_study_grows_without_running_again(finished, tmp_path, monkeypatch, capsys):
    config, out = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    old = {path.name for path in (copy / "runs").iterdir()}
    code, text = run(["study", config, "--out", copy, "--seeds", 1, 2, 3], monkeypatch, capsys)
    assert code == 0
    # The guards are said before training, once a method.
    assert text.count("LoRA r=2: trains 1,536 of") == 1 and "at scale 8; trainable float32" in text
    assert text.count("full fine-tuning: trains") == 1
    new = {path.name for path in (copy / "runs").iterdir()} - old
    records = [json.loads((copy / "runs" / n / "record.json").read_text()) for n in new]
    assert {r["seed"] for r in records} == {3} and len(new) == 2


WRONG = {
    "config": (["study", "configs/dmeo.py"], "did you mean 'configs/demo.py'"),
    "command": (["stduy", "x"], "did you mean 'study'"),
    "field": (["--trian.epochs", "3"], "--trian.epochs"),
    "family": (["--model.family", "gtp2"], "did you mean 'gpt2'"),
    "size": (["--model.sizes.num-heads", "3"], "width 32 is not divisible by num_heads 3"),
    "method": (["--methods.0.name", "lroa"], "did you mean 'lora'"),
    "preset": (["--methods.0.targets", "all-lienar"], "matches no layer; use a preset (all-linear"),
    "pattern": (["--methods.0.targets", "blocks.attn.nope"], "blocks.attn.qkv"),
    "rank below 1": (["--methods.0.rank", "0"], "LoRA rank 0 is below 1; use 1 or more"),
    "rank above": (["--methods.0.rank", "33"], "above the smaller dimension of blocks.attn.out"),
    "new tokens": (
        ["--evaluate.max-new-tokens", "30"],
        "above the model's 32 positions; use at most",
    ),
    "seeds": (["--seeds", "0", "1"], "tune_seed 0 is one of seeds"),
    "accumulate": (["--train.accumulate", "3"], "not divisible by accumulate 3; use 15"),
    "task": (["--task.name", "wrold"], "did you mean 'world'"),
    "scorer file": (["--task.scorer", "lexicon:no/such.txt"], "no/such.txt"),
    "scorer module": (["--task.scorer", "no_module:f"], "no_module"),
    "checkpoint": (["--model.path", "./no-such-model"], "not both"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_message(case, finished, tmp_path, monkeypatch, capsys):
    extra, expected = WRONG[case]
    base = ["study", finished[0], "--out", tmp_path / "out"]
    arguments = extra if extra[0] in ("study", "stduy") else base + extra
    code, text = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert expected in words(text)
    assert "Traceback" not in text


def test_a_directory_of_another_study_is_refused(finished, monkeypatch, capsys):
    config, out = finished
    code, text = run(["study", config, "--out", out, "--name", "other"], monkeypatch, capsys)
    assert code == 2 and "belongs to another study: tiny" in text


def test_a_place_that_cannot_be_written_is_refused(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    code, text = run(
        ["study", finished[0], "--out", tmp_path / "file" / "out"], monkeypatch, capsys
    )
    assert code == 2 and "cannot write to" in text


def test_report_of_no_study(tmp_path, monkeypatch, capsys):
    code, text = run(["report", tmp_path], monkeypatch, capsys)
    assert code == 2 and "holds no study" in text


PRETRAINED = """
from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

def config():
    return Study(
        name="pretrained", question="?", model=ModelSpec(path={path!r}),
        task=TaskSpec(name="completions", scorer="lexicon:{words}", options={options!r}),
        methods=(MethodSpec("full", (1e-3,)),), train=TrainSpec(max_length=24), seeds=(1,),
    )
"""


@pytest.fixture
def files(tmp_path, finished):
    """A valid completions study on the pretrained base of `finished`; tests break one part."""
    base = next((finished[1] / "base").iterdir())
    model = tmp_path / "model"
    shutil.copytree(base, model)
    words = tmp_path / "words.txt"
    words.write_text("bad\n")
    header = "text\tcategory\n"
    for name, group in (("tuned", "a"), ("transfer", "b")):
        rows = "".join(f"the person number {i} is\t{group}\n" for i in range(6))
        (tmp_path / f"{name}.tsv").write_text(header + rows)
    (tmp_path / "train.txt").write_text("".join(f"a quiet day number {i}\n" for i in range(20)))
    (tmp_path / "neutral.txt").write_text("the rain falls\nthe sun shines\n")
    names = {
        "tuned": "tuned.tsv",
        "transfer": "transfer.tsv",
        "train": "train.txt",
        "neutral": "neutral.txt",
    }
    options = {key: str(tmp_path / name) for key, name in names.items()}
    config = tmp_path / "pretrained.py"
    config.write_text(PRETRAINED.format(path=str(model), words=words, options=options))
    return tmp_path, config


def break_pickle(folder):
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def break_missing_file(folder):
    (folder / "tuned.tsv").unlink()


def break_column(folder):
    (folder / "tuned.tsv").write_text("texts\tcategory\nx\ta\n")


def break_empty(folder):
    (folder / "neutral.txt").write_text("\n")


def break_vocabulary(folder):
    path = folder / "model" / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["person"] = 99999
    path.write_text(json.dumps(raw))


def break_model_type(folder):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "t5"}))


def break_tokenizer(folder):
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()


BROKEN = {
    break_pickle: "pickled weights (pytorch_model.bin)",
    break_missing_file: "tuned.tsv",
    break_column: "text",
    break_empty: "neutral",
    break_vocabulary: "tokenizer and model do not belong together",
    break_model_type: "model_type 't5' is not supported; supported are ['",
    break_tokenizer: "holds no tokenizer",
}


@pytest.mark.parametrize("breaking", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_part_is_named(breaking, files, monkeypatch, capsys):
    folder, config = files
    breaking(folder)
    code, text = run(["study", config, "--out", folder / "out"], monkeypatch, capsys)
    assert code == 2, text
    assert BROKEN[breaking] in words(text)
    assert "Traceback" not in text and "jax-lowrank: " in text


def test_own_files_run_through(files, monkeypatch, capsys):
    folder, config = files
    options = ["--train.epochs", 1, "--evaluate.samples-per-prompt", 1]
    code, text = run(["study", config, "--out", folder / "out", *options], monkeypatch, capsys)
    assert code == 0, text
    study = results.read_study(folder / "out")
    assert study.study["group_names"] == ["a", "b"]
    assert len(study.runs[-1].completions["tuned"]) == 6
