"""Training curves for TensorBoard: what a reader of the event files sees."""

import importlib.util
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from jax_lowrank import cli, tracking


def curves(directory):
    """{name: {step: value}} of the event files in a directory."""
    found = {}
    for file in directory.glob("events.*"):
        data = file.read_bytes()
        while data:  # TFRecord: length, its checksum, content, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_every_number_stands_at_its_step(tmp_path):
    log = tracking.tensorboard(tmp_path, "LoRA r=8 lr 0.001 seed 1 (final)")
    log({"step": 0, "validation_loss": 3.5})
    log({"step": 4, "num_steps": 8, "loss": 2.5, "learning_rate": 0.25})
    log({"step": 4, "num_steps": 8, "loss": 9.0, "resumed": True})  # told again after a restart
    log({"step": 8, "num_steps": 8, "loss": 1.5, "learning_rate": 0.125})
    assert curves(tmp_path / "LoRA_r=8_lr_0.001_seed_1_final") == {
        "validation_loss": {0: 3.5},
        "loss": {4: 2.5, 8: 1.5},
        "learning_rate": {4: 0.25, 8: 0.125},
    }


@pytest.mark.parametrize("arguments", [("study", "configs/demo.py"), ("finetune",)])
@pytest.mark.parametrize("flag", ["--track", "--out"])
def test_a_flag_without_its_value_is_one_sentence(arguments, flag, capsys):
    assert cli.main([*arguments, flag]) == 2
    assert capsys.readouterr().err == f"jax-lowrank: {flag} needs a value\n"


@pytest.mark.parametrize("command", ["study", "finetune"])
def test_a_missing_package_is_named_before_work_starts(command, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if "board" in n else found(n))
    assert cli.main([command, "configs/demo.py", "--track", "curves"]) == 2
    assert "pip install 'jax_lowrank[track]'" in capsys.readouterr().err
