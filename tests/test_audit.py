"""The audit of topologies: which meshes, what it says, and one on two devices."""

import json
import math

import jax
import numpy as np
import pytest
from test_study import CONFIG

from jax_lowrank import provenance
from jax_lowrank.config import ConfigError, MeshSpec
from jax_lowrank.study import audit

TWO = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


@pytest.mark.parametrize("number", [2, 4, 6, 8])
def test_meshes_use_all_devices_and_each_order_once(number):
    found = audit.meshes(number)
    sizes = {name: math.prod(vars(spec).values()) for name, (spec, _) in found.items()}
    assert sizes.pop("one device") == 1 and set(sizes.values()) == {number}
    devices = list(range(number))
    placed = [(spec, tuple(order(devices))) for spec, order in found.values()]
    assert len(set(placed)) == len(placed)
    assert any(order != tuple(devices) for _, order in placed)
    axes = {axis for spec, _ in found.values() for axis, n in vars(spec).items() if n > 1}
    assert axes == set(vars(MeshSpec()))


def test_the_table_lays_meshes_beside_seeds():
    def trial(mesh, seed, loss):
        return audit.Trial("LoRA r=2", mesh, seed, (3.0, loss + 1), loss)

    trials = [trial("one device", 1, 2.0), trial("one device", 2, 2.5), trial("data 2", 1, 2.001)]
    head, line = audit.table(trials).splitlines()
    assert line == (
        "  LoRA r=2: 1.00e-03 (1.00e-03) over 2 meshes; 5.00e-01 (5.00e-01) over 2 seeds;"
        " meshes / seeds 0.002"
    )
    assert "validation loss" in head
    assert "nan (nan) over 1 seeds; meshes / seeds nan" in audit.table([trials[0], trials[2]])


def test_one_device_and_no_steps_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: ["one"])
    with pytest.raises(ConfigError, match=r"needs several devices; on CPU XLA_FLAGS=.*=8 makes 8"):
        audit.run(None, tmp_path / "out", 5, print)
    with pytest.raises(ConfigError, match="--steps 0 is below 1; 20 is a common number"):
        audit.run(None, tmp_path / "out", 0, print)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_audit_on_two_devices(tmp_path, forks):
    config = CONFIG.replace(', MethodSpec("full", (1e-3,))', ",")
    assert config != CONFIG
    (tmp_path / "tiny.py").write_text(config)
    line = ["audit-topology", tmp_path / "tiny.py", "--steps", 3, "--out", tmp_path / "out"]
    command = forks.start("jax_lowrank.cli", *line, **TWO)
    assert command.wait() == 0, command.said()
    content = json.loads((tmp_path / "out" / "audit.json").read_text())
    trials = [audit.Trial(**trial) for trial in content["trials"]]
    environment = content["environment"]
    assert environment["num_devices"] == 2 and environment["device"] == provenance.cpu_name()
    places = [(trial.mesh, trial.seed) for trial in trials]
    names = list(audit.meshes(2))
    assert places == [(names[0], 1), (names[0], 2), *((name, 1) for name in names[1:])]
    assert {len(trial.losses) for trial in trials} == {3}
    losses = [trial.losses for trial in trials if trial.seed == 1]
    np.testing.assert_allclose(losses, [losses[0]] * len(losses), rtol=1e-4)
    over_meshes, over_seeds = (
        audit.spread([t for t in trials if t.seed == 1])[0],
        audit.spread(trials[:2])[0],
    )
    assert over_meshes < 0.01 * over_seeds
    assert audit.table(trials) in command.printed()
