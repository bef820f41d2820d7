"""A study's runs in packs against the same runs one by one, and what is trained with what."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_text
from safetensors.numpy import load_file
from test_study_classification import texts
from tiny import model_of

from jax_lowrank import cli, memory, results
from jax_lowrank.checkpoint import Checkpoints, Interrupted
from jax_lowrank.config import MethodSpec, ModelSpec, Run, Study, TaskSpec, TrainSpec
from jax_lowrank.config_file import load_config
from jax_lowrank.study import execute, grid, packs, prepare
from jax_lowrank.study.schedule import Named

CONFIG = """
from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

def config():
    return Study(
        name="packed", question="?", model=ModelSpec(path={model!r}),
        task=TaskSpec("text_classification", {{
            "path": {data!r},
            "options": {{"groups": ("even", "third"), "row_id": "id", "classes": ("neg", "pos")}},
            "validation_fraction": 0.2, "test_fraction": 0.3,
        }}),
        methods=(
            MethodSpec("lora", (3e-3, 1e30), rank=2, dropout=0.1),
            MethodSpec("lora", (5e-3,), rank=4, layer_fraction=0.5, dropout=0.1, plus_ratio=4,
                       epochs=3),
        ),
        train=TrainSpec(epochs=2, batch_size=8, max_length=16, steps_per_call=2), seeds=(1,),
        evaluate=EvalSpec(minimum=3, num_resamples=50),
    )
"""
RTOL = 1e-5  # as in test_sweep
# Of a model of width 16 that has nearly learned its rows: norms of 5 to 7, seen 3.8e-5 apart.
NORM_RTOL = 1e-4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of a study whose checkpoint has no head: every seed draws its own."""
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_text.checkpoint(folder / "model")
    data = tiny_text.jsonl(folder / "data.jsonl", texts())
    (folder / "packed.py").write_text(CONFIG.format(model=str(model), data=str(data)))
    return folder / "packed.py"


@pytest.fixture(scope="module")
def prepared(config):
    """The study, ready to run in packs."""
    return prepare(load_config(str(config)), config.parent / "packs", print)


@pytest.fixture(scope="module")
def packed(prepared):
    """Results of the study in packs."""
    assert execute(prepared, print) == 0
    return prepared.out


def lines_of(run: Path) -> list[dict]:
    """A run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_study_in_packs_gives_what_its_runs_give_alone(config, packed, monkeypatch, capsys):
    monkeypatch.setattr(cli, "use_fast_memory", lambda: None)
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    alone = config.parent / "alone"
    with monkeypatch.context() as patch:
        patch.setattr(grid, "train_pack", None)
        patch.setattr(cli, "write_report", lambda directory: 0)
        assert cli.main(["study", str(config), "--out", str(alone), "--no-sweep"]) == 0
    assert "together" not in capsys.readouterr().err
    runs = {run.record["fingerprint"]: run for run in results.read_study(alone).runs}
    found = results.read_study(packed).runs
    assert [run.record["fingerprint"] for run in found] == list(runs) and len(found) == 6
    diverged = 0
    for run in found:
        other = runs[run.record["fingerprint"]]
        timed = ("seconds", "tokens_per_second")
        assert list(run.record) == list(other.record)
        assert run.record["seconds"].keys() == other.record["seconds"].keys()
        for key in run.record.keys() - {*timed, "validation_loss"}:
            assert run.record[key] == other.record[key], key
        folder, theirs = (path / "runs" / run.record["fingerprint"] for path in (packed, alone))
        assert {p.name for p in folder.iterdir()} == {p.name for p in theirs.iterdir()}
        for line, wanted in zip(lines_of(folder), lines_of(theirs), strict=True):
            assert list(line) == list(wanted)
            for key in line.keys() - set(timed):
                rtol = NORM_RTOL if key == "gradient_norm" else RTOL
                np.testing.assert_allclose(line[key], wanted[key], rtol=rtol, err_msg=key)
        if run.record["diverged"]:
            diverged += 1
            continue
        for key, array in run.arrays.items():
            np.testing.assert_allclose(array, other.arrays[key], rtol=RTOL, atol=RTOL)
        if run.record["kind"] == "final":
            weights, wanted = (load_file(f / "trainable.safetensors") for f in (folder, theirs))
            assert weights.keys() == wanted.keys()
            for name, array in weights.items():
                apart = np.linalg.norm(array - wanted[name])
                assert apart <= RTOL * np.linalg.norm(wanted[name]), name
    assert diverged == 1


def test_a_pack_that_is_stopped_goes_on_with_all_its_members(
    prepared, packed, tmp_path, monkeypatch
):
    again, said = prepared._replace(out=tmp_path / "again"), []
    asked = iter([False, True])

    def due(self):
        self.asked = next(asked, False)
        return self.asked

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", due)
        with pytest.raises(Interrupted, match="stopped after step 3 of 9"):
            execute(again, said.append)
    (pack,) = packs.begun(again.out).values()
    assert sorted(rate for _, _, rate, _ in pack.values()) == [3e-3, 5e-3, 1e30]
    write, written = results.write_run, []

    def dying(out, record, *rest, **more):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(record["fingerprint"])
        return write(out, record, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_run", dying)
        with pytest.raises(KeyboardInterrupt):
            execute(again, said.append)
    assert next(iter(pack)) == written[0]
    assert execute(again, said.append) == 0
    assert not any((again.out / "checkpoints").iterdir())
    for run in results.read_study(packed).runs:
        other = results.read_run(again.out / "runs" / run.record["fingerprint"])
        if run.record["kind"] == "tune" and not run.record["diverged"]:
            assert other.record["resumed_at"] == [3]
        for key, array in run.arrays.items():
            assert other.arrays[key].tobytes() == array.tobytes(), key
        lines, wanted = (
            lines_of(out / "runs" / run.record["fingerprint"]) for out in (again.out, packed)
        )
        assert [line.get("loss") for line in lines] == [line.get("loss") for line in wanted]


def of(*methods, seeds=(1,), kind="tune", **train):
    """(Packing, runs) of a study of gpt2 with these methods, one run a rate and seed."""
    study = Study(
        name="s",
        question="?",
        model=ModelSpec(path="x"),
        task=TaskSpec(),
        methods=methods,
        train=TrainSpec(**{"batch_size": 8, "max_length": 16, **train}),
        seeds=seeds,
    )
    prepared = SimpleNamespace(study=study, mesh=None, model=model_of("gpt2"), out=Path("nowhere"))
    steps = {method.label: 10 for method in methods}
    runs = [
        Run(kind, method, rate, seed)
        for method in methods
        for rate in method.learning_rates
        for seed in seeds
    ]
    named = [Named(run, str(number)) for number, run in enumerate(runs)]
    return prepared, steps, named


def lora(rank, *rates, **more):
    return MethodSpec("lora", rates or (1e-3,), rank=rank, **more)


def sizes(prepared, steps, named, tokens=64):
    """Ranks of the members of each pack."""
    found = packs.Packing(prepared, tokens, steps)(named)
    assert sorted(one.name for pack in found for one in pack) == sorted(n.name for n in named)
    return [[one.run.method.rank for one in pack] for pack in found]


def test_runs_that_share_a_program_and_batches_are_trained_together():
    rates = (1e-2, 1e-3, 1e-4)
    assert sizes(*of(lora(1, *rates), lora(2, *rates))) == [[2, 1] * 3]
    assert sizes(*of(lora(1), lora(2), seeds=(1, 2))) == [[2, 1]] * 2  # batches follow the seed
    others = (
        lora(1, targets="qv"),
        lora(1, dropout=0.1),
        lora(1, dora=True),
        lora(1, init="olora"),
    )
    assert sizes(*of(lora(1), *others)) == [[1]] * 5
    assert sizes(*of(lora(1), lora(1, plus_ratio=4), lora(1, init="gaussian"))) == [[1] * 3]
    assert sizes(*of(MethodSpec("full", rates))) == [[0]] * 3
    halves = (lora(1, dora=True, layer_fraction=0.5), lora(2, dora=True))
    assert sizes(*of(*halves)) == [[1], [2]]


def test_where_one_run_keeps_the_machine_busy_only_compilation_counts():
    rates = (1e-2, 1e-3, 1e-4)
    study = of(lora(1, *rates), lora(2, *rates))
    assert sizes(*study, tokens=512) == [[2, 1]] * 3  # packs of the same methods
    assert sizes(*of(lora(1, *rates)), tokens=512) == [[1]] * 3
    prepared, _, named = of(lora(1), lora(2), lora(32))
    long = {run.run.label: 10**6 for run in named}
    assert sizes(prepared, long, named, tokens=512) == [[32], [2], [1]]


def test_packs_are_limited():
    rates = tuple(1e-3 * i for i in range(1, 21))
    assert sizes(*of(lora(1, *rates))) == [[1] * 10] * 2
    assert sizes(*of(lora(1, *rates), sweep_size=5)) == [[1] * 5] * 4
    assert sizes(*of(lora(1, *rates), sweep_size=1)) == [[1]] * 20
    # The tiny model's adapters of rank 1 and 32: 2 and 33 times the work of its base.
    assert sizes(*of(lora(1), lora(2), lora(32))) == [[32], [2, 1]]


def test_memory_limits_a_pack(monkeypatch):
    prepared, steps, named = of(lora(1, *(1e-3 * i for i in range(1, 9))))
    alone = memory.Sizes({"data": 1, "fsdp": 1, "tensor": 1})
    method = packs.method_of(prepared.study.methods[0])
    each = memory.estimate(prepared.model, method, prepared.study.train, 8, 16, alone)
    own = 2 * each.trainable + each.optimizer
    room = each.frozen + 4 * each.step + 4.5 * own  # 256 // 64 of them at a time
    monkeypatch.setattr(memory, "of_this_device", lambda: room / packs.SHARE)
    assert sizes(prepared, steps, named) == [[1] * 4] * 2
    monkeypatch.setattr(memory, "of_this_device", lambda: 1)
    assert sizes(prepared, steps, named) == [[1]] * 8


def test_runs_are_alone_on_several_devices_and_below_float32():
    prepared, steps, named = of(lora(1), lora(2))
    prepared.mesh = "two devices"
    assert sizes(prepared, steps, named) == [[1], [2]]
    prepared.mesh = None
    half = jax.tree.map(lambda x: x.astype("bfloat16"), prepared.model.params)
    prepared.model = prepared.model._replace(params=half)
    assert sizes(prepared, steps, named) == [[1], [2]]
