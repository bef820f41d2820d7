"""The command line: help, one clear sentence for each mistake, and one real process."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_text
from tiny_text import jsonl

from jax_lowrank import cli

ROOT = Path(__file__).parents[1]
COMMANDS = ("study", "report", "finetune", "generate", "evaluate", "export")


def run(arguments, monkeypatch, capsys):
    """(exit code, stdout, stderr) of one command in this process."""
    monkeypatch.setattr(cli, "use_fast_memory", lambda: None)
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:  # how tyro ends on a wrong flag, and on --help
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chat checkpoint, one without a template, a pickled one, and files of every kind."""
    place = tmp_path_factory.mktemp("cli")
    tiny_text.checkpoint(place / "model", chat=True)
    tiny_text.checkpoint(place / "plain")
    for name in ("pickled", "other_type", "no_tokenizer", "broken"):
        shutil.copytree(place / "plain", place / name)
    (place / "pickled" / "model.safetensors").rename(place / "pickled" / "pytorch_model.bin")
    config = json.loads((place / "plain" / "config.json").read_text())
    (place / "other_type" / "config.json").write_text(json.dumps({**config, "model_type": "bart"}))
    (place / "no_tokenizer" / "tokenizer.json").unlink()
    (place / "broken" / "model.safetensors").write_bytes(b"not a checkpoint")
    jsonl(place / "pairs.jsonl", tiny_text.pairs())
    jsonl(place / "labelled.jsonl", tiny_text.labelled())
    jsonl(place / "chats.jsonl", tiny_text.chats())
    (place / "texts.txt").write_text("the cat is good\nthe dog is bad\n")
    (place / "empty.txt").write_text("\n")
    (place / "file").write_text("")
    (place / "taken").mkdir()
    (place / "taken" / "notes.txt").write_text("mine")
    return place


WRONG = {
    "model": ("--data pairs.jsonl", "no model; give --model DIRECTORY or a hub id"),
    "data": ("--model model", "no data; give --data FILE"),
    "model directory": ("--model ./modle --data pairs.jsonl", "no model directory at './modle'"),
    "file": ("--model model --data pair.jsonl", "did you mean pairs.jsonl?"),
    "ending": ("--model model --data file", "cannot read a file without an ending"),
    "empty": ("--model model --data empty.txt", "empty.txt: no text in it"),
    "method": ("{ok} --method lroa", "method: 'lroa' is not one of"),
    "rank": ("{ok} --rank 0", "LoRA rank 0 is below 1; use 1 or more"),
    "rank above": ("{ok} --rank 33", "above the smaller dimension of blocks.attn.out"),
    "preset": ("{ok} --method.targets all-lienar", "matches no layer; use a preset (all-linear"),
    "rates": ("{ok} --learning-rate 1e-3 1e-4", "a run has one learning rate, not 2"),
    "pretraining's rate": ("{ok} --train.learning-rate 0.1", "use --learning-rate"),
    "dtype": ("{ok} --model.dtype float16", "model.dtype: 'float16' is not one of"),
    "kind": ("{ok} --data.kind chatt", "did you mean 'chat'"),
    "share": ("{ok} --data.validation-fraction 1", "validation_fraction 1.0 is outside (0, 1)"),
    "length": ("{ok} --max-length 99", "is above the model's 48 positions; use --max-length 48"),
    "long prompt": ("{ok} --max-length 4", "its prompt fills all 4 tokens of train.max_length"),
    "column": ("{ok} --data.columns.prompt question", "has the columns prompt, completion; needed"),
    "kind without labels": ("{ok} --data.kind classification", "no column 'text'"),
    "label": (
        "--model model --data labelled.jsonl --data.labels pos good",
        "label 'neg' in column 'label' is not one of the classes pos, good",
    ),
    "template": (
        "--model plain --data chats.jsonl --max-length 32",
        "the tokenizer has no chat template",
    ),
    "pickle": ("--model pickled --data pairs.jsonl", "pickled weights (pytorch_model.bin)"),
    "model type": ("--model other_type --data pairs.jsonl", "model_type 'bart' is not supported"),
    "tokenizer": ("--model no_tokenizer --data pairs.jsonl", "holds no tokenizer"),
    "damaged": ("--model broken --data pairs.jsonl", "model.safetensors cannot be read: "),
    "place": ("{ok} --out file/run", "is not a writable directory"),
    "taken": ("{ok} --out taken", "taken is there and holds no run; choose another --out"),
    "store": ("{ok} --out gs://bucket/run", "--out gs://bucket/run is the address of a store"),
    "test file": ("{ok} --test labelled.jsonl", "labelled.jsonl: no column 'prompt'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_run_gets_one_sentence(case, folder, monkeypatch, capsys):
    line, expected = WRONG[case]
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    ok = "--model model --data pairs.jsonl --max-length 32"
    arguments = line.format(ok=ok).split()
    code, out, err = run(["finetune", *arguments], monkeypatch, capsys)
    said = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert code == 2 and not out and expected in err, err
    assert len(said) == 1 and said[0].startswith("jax-lowrank: ") and "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


OTHERS = {
    "command": ("fintune --model x", "did you mean 'finetune'"),
    "no target": ("evaluate --data x", "evaluate needs a run or a model"),
    "no prompt": ("generate model", "give --prompt TEXT or --prompts FILE"),
    "two prompts": ("generate model --prompt a --prompts b.txt", "give --prompt TEXT or"),
    "no template": ("generate plain --prompt a --chat", "the tokenizer has no chat template"),
    "too long": (
        "generate model --prompt cat --max-new-tokens 47",
        "above the model's 48 positions",
    ),
    "top_p": ("generate model --prompt a --top-p 2", "top_p 2.0 is outside (0, 1]"),
    "no model": ("generate ./nothing --prompt a", "no model directory at './nothing'"),
    "prompt column": ("generate model --prompts labelled.jsonl", "no column 'prompt'; it has text"),
    "no data": ("evaluate model", "no data; give --data FILE"),
    "not a classifier": (
        "evaluate model --data labelled.jsonl --data.kind classification",
        "the model has a causal-lm head, which cannot do 'classification'",
    ),
    "config": ("study configs/nothing.py", "no config file 'configs/nothing.py'"),
    "store": ("study any.py --out=s3://bucket/x", "--out s3://bucket/x is the address of a store"),
    "report": ("report taken more", "report takes one directory"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands_say_what_is_wrong(case, folder, monkeypatch, capsys):
    line, expected = OTHERS[case]
    monkeypatch.chdir(folder)
    code, out, err = run(line.split(), monkeypatch, capsys)
    assert code == 2 and not out and expected in err, err
    assert len(err.splitlines()) == 1 and err.startswith("jax-lowrank: ")


def test_an_unknown_field_is_named_with_one_that_is_near(monkeypatch, capsys):
    code, _, err = run(["finetune", "--trian.epochs", 3], monkeypatch, capsys)
    assert code == 2 and "--trian.epochs" in err and "--train.epochs" in err


def test_an_unknown_config_is_said_once(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, _, err = run(["study", "configs/dmeo.py"], monkeypatch, capsys)
    assert code == 2
    assert err == (
        "jax-lowrank: no config file 'configs/dmeo.py'; did you mean 'configs/demo.py'?\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_two_examples(command, monkeypatch, capsys):
    code, out, _ = run([command, "--help"], monkeypatch, capsys)
    assert code == 0 and out.count(f"  jax-lowrank {command} ") >= (1 if command == "report" else 2)
    if command in ("finetune", "generate", "evaluate"):
        assert "--model.dtype" in out and "Hugging Face" in out  # every field, with its meaning


def test_commands_that_need_something_say_so(monkeypatch, capsys):
    for command in ("study", "report", "generate", "evaluate"):
        code, _, err = run([command], monkeypatch, capsys)
        assert code == 2 and f"{command} needs a" in err


def started(*arguments, folder, **more):
    """One real process; (seconds, its result)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jax_lowrank", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return time.perf_counter() - began, done


def test_help_is_quick_and_loads_no_jax(folder):
    seconds, done = started("--help", folder=folder)
    assert done.returncode == 0 and "finetune --model PATH" in done.stdout and seconds < 1.5
    seconds, done = started("finetune", "--help", folder=folder)
    assert done.returncode == 0 and "--method.rank" in done.stdout and seconds < 3
    probe = (
        "import sys; from jax_lowrank.cli import main\n"
        "try: main(['finetune', '--help'])\n"
        "except SystemExit: print('jax' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.endswith("False False\n")


def test_one_run_as_a_real_process(folder):
    line = "finetune --model plain --data labelled.jsonl --method full --learning-rate 1e-2"
    more = "--epochs 1 --max-length 32 --batch-size 8 --out made/run"
    _, done = started(*line.split(), *more.split(), folder=folder)
    assert done.returncode == 0, done.stderr
    assert "classification: train 36 rows; validation 4 rows" in done.stderr
    assert "validation after: accuracy" in done.stdout and "run: made/run" in done.stdout
    assert "ETA" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in (folder / "made").iterdir()] == ["run"]
    with np.load(folder / "made" / "run" / "predictions.npz") as stored:
        assert stored["validation/logits"].shape == (4, 2)
        assert stored["validation/ids"][0].startswith("labelled.jsonl:")


@pytest.mark.slow
def test_rows_that_eight_devices_do_not_divide(folder, forks, tmp_path):
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    held_out = jsonl(tmp_path / "three.jsonl", tiny_text.labelled(43)[40:])
    line = f"finetune --model {folder}/plain --data {folder}/labelled.jsonl --epochs 1"
    line = [*line.split(), "--validation", held_out, "--max-length", 16, "--learning-rate", 1e-2]
    refused = forks.start("jax_lowrank.cli", *line, "--batch-size", 3, **eight)
    assert refused.wait() == 2 and not refused.printed()
    assert refused.said() == (
        "jax-lowrank: train.batch_size 3 cannot be split over 8 devices"
        " (data 1 x fsdp 8 x tensor 1); use 8\n"
    )
    # Three rows are measured all the same, before training and after it.
    found = {}
    for name, flags in (("one", {}), ("eight", eight)):
        out = tmp_path / name
        run = forks.start("jax_lowrank.cli", *line, "--batch-size", 16, "--out", out, **flags)
        assert run.wait() == 0, run.said()
        record, log = ((out / file).read_text() for file in ("record.json", "log.jsonl"))
        with np.load(out / "predictions.npz") as stored:
            found[name] = json.loads(record), list(map(json.loads, log.splitlines())), dict(stored)
    (record, log, one), (meshed, other_log, other) = found.values()
    assert len(one["validation/ids"]) == 3
    for key, values in one.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(other[key], values, rtol=1e-3, atol=1e-4, err_msg=key)
        else:
            np.testing.assert_array_equal(other[key], values)
    validations = [
        [line["validation_loss"] for line in lines if "validation_loss" in line]
        for lines in (log, other_log)
    ]
    assert len(validations[0]) == 2
    np.testing.assert_allclose(*validations, rtol=1e-4)
    environment = meshed["environment"]
    assert environment["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert environment["device_order"] == list(range(8)) and environment["num_devices"] == 8
    assert record["environment"]["device_order"] == [0]
    assert environment["device"] == record["environment"]["device"]
