"""A study's runs in packs against the same runs one by one, and what is trained with what."""

import dataclasses
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
from jax_lowrank.config import (
    EvalSpec, MembershipSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec,
)

def config():
    return Study(
        name="packed", question="?", model=ModelSpec(path={model!r}),
        task=TaskSpec("text_classification", {{
            "path": {data!r},
            "options": {{"groups": ("even", "third"), "row_id": "id", "classes": ("neg", "pos")}},
            "validation_fraction": 0.2, "test_fraction": 0.3,
        }}),
        methods=(
            MethodSpec("lora", (1e-3, 1e30), rank=2),
            MethodSpec("lora", (2e-3,), rank=4, layer_fraction=0.5, plus_ratio=4, epochs=3),
            MethodSpec("head", (1e-3, 3e-3)),
        ),
        train=TrainSpec(epochs=2, batch_size=4, max_length=16, steps_per_call=2), seeds=(1, 2),
        evaluate=EvalSpec(minimum=3, num_resamples=50),
        membership=MembershipSpec(shadows=4, methods=("LoRA r=2",)),
    )
"""
# As in test_sweep. Gradient norms are 4e-7 apart here; at three times the rates, where the tiny
# model has nearly learned its rows, the same rounding had grown to 5e-4 of a norm.
RTOL = 1e-5


def write_config(folder):
    """A config file of a study whose checkpoint has no head: every seed draws its own."""
    model = tiny_text.checkpoint(folder / "model")
    rows = texts()
    for row in rows[1::3] + rows[2::3]:  # batches of two widths
        row["text"] = " ".join([row["text"]] * 3)
    data = tiny_text.jsonl(folder / "data.jsonl", rows)
    (folder / "packed.py").write_text(CONFIG.format(model=str(model), data=str(data)))
    return folder / "packed.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """That file."""
    return write_config(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def prepared(config):
    """The study, ready to run in packs."""
    return prepare(load_config(str(config)), config.parent / "packs", print)


@pytest.fixture(scope="module")
def packed(prepared):
    """Results of the study in packs, of several seeds as well, however few its steps are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "COMPILING", 0)
        assert execute(prepared, print) == 0
    return prepared.out


def lines_of(run: Path) -> list[dict]:
    """A run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same(run, other):
    """Asserts that a run is another of its name: its record, but for times, and what is stored of
    it, to RTOL; completions are the same texts."""
    timed = ("seconds", "tokens_per_second")
    assert list(run.record) == list(other.record)
    assert run.record["seconds"].keys() == other.record["seconds"].keys()
    for key in run.record.keys() - {*timed, "validation_loss", "resumed_at"}:
        assert run.record[key] == other.record[key], key
    loss, wanted = (each.record["validation_loss"] for each in (run, other))
    assert loss == wanted if None in (loss, wanted) else loss == pytest.approx(wanted, rel=RTOL)
    assert run.arrays.keys() == other.arrays.keys() and run.completions == other.completions
    for key, array in run.arrays.items():
        np.testing.assert_allclose(array, other.arrays[key], rtol=RTOL, atol=RTOL, err_msg=key)


def told(run: Path) -> dict[tuple, float]:
    """What a run's log says: step and name -> number, of losses their sum over all steps so far.

    A call that several runs share ends where the width of any of their batches changes.
    """
    found, before, total = {}, 0, 0.0
    for line in lines_of(run):
        numbers = {k: v for k, v in line.items() if k not in ("step", "tokens_per_second")}
        if "loss" in line:
            total += (line["step"] - before) * line["loss"]
            numbers["loss"], before = total, line["step"]
        found |= {(line["step"], name): value for name, value in numbers.items()}
    return found


@pytest.mark.slow
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
    assert [run.record["fingerprint"] for run in found] == list(runs) and len(found) == 16
    diverged = 0
    for run in found:
        assert_same(run, runs[run.record["fingerprint"]])
        assert not run.record.get("resumed_at")
        folder, theirs = (path / "runs" / run.record["fingerprint"] for path in (packed, alone))
        assert {p.name for p in folder.iterdir()} == {p.name for p in theirs.iterdir()}
        said, wanted = told(folder), told(theirs)
        if run.record["kind"] == "tune":  # of one seed
            assert list(said) == list(wanted)
        losses = [{key for key in each if key[1] == "validation_loss"} for each in (said, wanted)]
        assert losses[0] == losses[1] <= said.keys() & wanted.keys()
        for key in said.keys() & wanted.keys():
            np.testing.assert_allclose(said[key], wanted[key], rtol=RTOL, err_msg=str(key))
        if run.record["diverged"]:
            diverged += 1
            continue
        if run.record["kind"] == "final":
            weights, wanted = (load_file(f / "trainable.safetensors") for f in (folder, theirs))
            assert weights.keys() == wanted.keys()
            for name, array in weights.items():
                apart = np.linalg.norm(array - wanted[name])
                assert apart <= RTOL * np.linalg.norm(wanted[name]), name
    assert diverged == 1


@pytest.mark.slow
def test_a_pack_that_is_stopped_goes_on_with_all_its_members(
    prepared, packed, tmp_path, monkeypatch
):
    again, said = prepared._replace(out=tmp_path / "again"), []
    monkeypatch.setattr(packs, "COMPILING", 0)
    asked = iter([False, True])

    def due(self):
        self.asked = next(asked, False)
        return self.asked

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", due)
        with pytest.raises(Interrupted, match=r"stopped after step \d of 15") as stopped:
            execute(again, said.append)
    stops = {"tune": [int(str(stopped.value).split()[3])], "shadow": []}
    (pack,) = packs.begun(again.out).values()
    assert sorted(rate for _, _, rate, _ in pack.values()) == [1e-3, 2e-3, 1e30]
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

    def due_for_finals(self):
        (pack,) = packs.begun(again.out).values()
        self.asked = {kind for kind, *_ in pack.values()} == {"final"}
        return self.asked

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", due_for_finals)
        with pytest.raises(Interrupted, match="of 15") as stopped:
            execute(again, said.append)
    (pack,) = packs.begun(again.out).values()
    assert sorted(seed for *_, seed in pack.values()) == [1, 1, 2, 2]
    stops["final"] = [int(str(stopped.value).split()[3])]
    assert execute(again, said.append) == 0
    assert not any((again.out / "checkpoints").iterdir())
    for run in results.read_study(packed).runs:
        other = results.read_run(again.out / "runs" / run.record["fingerprint"])
        if run.record["label"] == "head only":
            assert other.record["resumed_at"] == []
        elif run.record["kind"] != "base" and not run.record["diverged"]:
            assert other.record["resumed_at"] == stops[run.record["kind"]]
        for key, array in run.arrays.items():
            assert other.arrays[key].tobytes() == array.tobytes(), key
        lines, wanted = (
            lines_of(out / "runs" / run.record["fingerprint"]) for out in (again.out, packed)
        )
        assert [line.get("loss") for line in lines] == [line.get("loss") for line in wanted]


COMPLETIONS = """
from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

def config():
    return Study(
        name="completed", question="?", model=ModelSpec(path={model!r}),
        task=TaskSpec(name="completions", scorer={words!r}, options={options!r}),
        methods=(MethodSpec("lora", (3e-3, 1e-3), rank=2), MethodSpec("lora", (2e-3,), rank=4)),
        train=TrainSpec(epochs=2, batch_size=4, max_length=16, steps_per_call=2), seeds=(1, 2),
        evaluate=EvalSpec(samples_per_prompt=3, max_new_tokens=3),
    )
"""


def completions_config(folder):
    """A config file of a study of completions on the tiny checkpoint."""
    texts = [row["prompt"] + row["completion"] for row in tiny_text.pairs(24)]
    for name, group in (("tuned", "a"), ("transfer", "b")):
        lines = [
            f"{word} is the {animal}\t{group}"
            for word in ("what", "who", "where")
            for animal in ("cat", "dog")
        ]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tcategory", *lines, ""]))
    (folder / "train.txt").write_text("\n".join(f"see {text}" for text in texts))
    (folder / "neutral.txt").write_text("the box is small\nyou hear the red bird\n")
    (folder / "words.txt").write_text("bad\n")
    files = {name: f"{name}.tsv" for name in ("tuned", "transfer")}
    files |= {name: f"{name}.txt" for name in ("train", "neutral")}
    paths = {
        "model": str(tiny_text.checkpoint(folder / "model")),
        "words": f"lexicon:{folder / 'words.txt'}",
        "options": {name: str(folder / file) for name, file in files.items()},
    }
    (folder / "completed.py").write_text(COMPLETIONS.format(**paths))
    return folder / "completed.py"


@pytest.mark.slow
def test_a_study_of_completions_in_packs_gives_what_its_runs_give_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "COMPILING", 0)
    study, sizes, train_pack = load_config(str(completions_config(tmp_path))), [], grid.train_pack

    def counted(p, cells, named, programs):
        sizes.append(len(named))
        return train_pack(p, cells, named, programs)

    monkeypatch.setattr(grid, "train_pack", counted)
    for name, together in (("packs", True), ("alone", False)):
        prepared = prepare(study, tmp_path / name, print)
        assert execute(prepared, print, together=together) == 0
    assert sorted(sizes) == [3, 4]  # rates, then seeds; none of them one by one
    found, alone = (results.read_study(tmp_path / name).runs for name in ("packs", "alone"))
    assert len(found) == 8
    for run, other in zip(found, alone, strict=True):
        assert_same(run, other)
        if run.record["kind"] != "tune":
            texts = np.array(run.completions["tuned"])
            assert texts.shape == (6, 3) and {"tuned/log_posterior", "neutral/nll"} < set(
                run.arrays
            )
    finals = [run for run in found if run.record["kind"] == "final"]
    assert len({run.arrays["neutral/nll"].tobytes() for run in finals}) == 4


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


def sizes(prepared, steps, named, tokens=64, together=64, lanes=1):
    """Ranks of the members of each pack; together: tokens of a step of runs of several seeds."""
    packing = packs.Packing(prepared, tokens, steps, lambda runs: (tokens, together))
    packing.lanes = lanes
    found = packing(named)
    assert sorted(one.name for pack in found for one in pack) == sorted(n.name for n in named)
    return [[one.run.method.rank for one in pack] for pack in found]


def test_runs_that_share_a_program_and_batches_are_trained_together():
    rates = (1e-2, 1e-3, 1e-4)
    assert sizes(*of(lora(1, *rates), lora(2, *rates))) == [[2, 1] * 3]
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


def test_runs_of_several_seeds_are_trained_together_where_that_is_quicker(monkeypatch):
    methods = (lora(1), lora(2))
    apart = [[2, 1]] * 2
    assert sizes(*of(*methods, seeds=(1, 2))) == apart  # ten steps are done before it is compiled
    assert sizes(*of(*methods, seeds=(1, 2)), tokens=129, together=1) == apart  # busy
    monkeypatch.setattr(packs, "COMPILING", 0)
    assert sizes(*of(*methods, seeds=(1, 2))) == [[2, 1, 2, 1]]
    # A step costs its tokens and 256 / 8 that the pack shares: 64 + 16 apart.
    assert sizes(*of(*methods, seeds=(1, 2)), together=71) == apart  # 71 + 11: 256 // 71 are three
    assert sizes(*of(*methods, seeds=(1, 2)), together=63) == [[2, 1, 2, 1]]
    dropped = of(*(lora(r, dropout=0.1) for r in (1, 2)), seeds=(1, 2))
    assert sizes(*dropped) == apart  # draws by place in a batch, whose width may differ
    drawn = {"dora": True, "layer_fraction": 0.5, "layers": "random"}
    assert sizes(*of(lora(1, **drawn), seeds=(1, 2))) == [[1], [1]]
    prepared, steps, named = of(lora(1), seeds=(1, 2, 3))
    shadow = named[2]._replace(run=dataclasses.replace(named[2].run, kind="shadow"))
    assert sizes(prepared, steps, [*named[:2], shadow]) == [[1, 1], [1]]


def test_where_one_run_keeps_the_machine_busy_only_compilation_counts():
    rates = (1e-2, 1e-3, 1e-4)
    study = of(lora(1, *rates), lora(2, *rates))
    assert sizes(*study, tokens=512) == [[2, 1]] * 3  # packs of the same methods
    assert sizes(*of(lora(1, *rates)), tokens=512) == [[1]] * 3
    prepared, _, named = of(lora(1), lora(2), lora(32))
    long = {run.run.label: 10**6 for run in named}
    assert sizes(prepared, long, named, tokens=512) == [[32], [2], [1]]


def test_every_core_gets_a_member_of_a_pack(monkeypatch):
    rates = (1e-2, 1e-3, 1e-4)
    assert sizes(*of(lora(1, *rates)), tokens=512, lanes=2) == [[1, 1], [1]]
    assert sizes(*of(lora(1, *rates)), tokens=512, lanes=16) == [[1] * 3]
    seeds = of(lora(1), seeds=(1, 2))
    assert sizes(*seeds, tokens=512, together=550, lanes=2) == [[1], [1]]  # what compiling costs
    monkeypatch.setattr(packs, "COMPILING", 0)
    assert sizes(*seeds, tokens=512, together=550, lanes=2) == [[1, 1]]
    assert sizes(*seeds, tokens=512, together=650, lanes=2) == [[1], [1]]  # the widest batch of all
    assert sizes(*seeds, tokens=512, together=512) == [[1], [1]]


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
    own = 2 * (each.trainable + each.optimizer)
    room = each.frozen + 4 * each.step + 4.5 * own  # 256 // 64 of them at a time
    monkeypatch.setattr(memory, "of_this_device", lambda: room / packs.SHARE)
    assert sizes(prepared, steps, named) == [[1] * 4] * 2
    assert sizes(prepared, steps, named, lanes=2) == [[1] * 4] * 2  # all at once
    monkeypatch.setattr(memory, "of_this_device", lambda: 1)
    assert sizes(prepared, steps, named) == [[1]] * 8
    # Each of two devices computes all of its members at once.
    prepared.mesh = SimpleNamespace(size=2)
    room = each.frozen + 2.5 * (each.step + own)
    monkeypatch.setattr(memory, "of_this_device", lambda: room / packs.SHARE)
    assert sizes(prepared, steps, named) == [[1] * 4] * 2
    monkeypatch.setattr(memory, "of_this_device", lambda: each.frozen)  # cut, a base still fits
    assert sizes(prepared, steps, named) == [[1]] * 8


def test_on_several_devices_packs_give_each_a_member():
    study = of(lora(1), lora(2))
    study[0].mesh = SimpleNamespace(size=2)
    assert sizes(*study) == [[2, 1]]
    assert sizes(*study, tokens=512) == [[1], [2]]  # rows keep both busy
    study[0].mesh = SimpleNamespace(size=3)
    assert sizes(*study) == [[2], [1]]
    many = of(lora(1, *(1e-3 * i for i in range(1, 21))))
    many[0].mesh = SimpleNamespace(size=20)
    assert sizes(*many) == [[1] * 20]


def test_runs_are_alone_below_float32_unless_asked():
    for size, packs_of in ((0, [[1], [2]]), (2, [[2, 1]])):
        prepared, steps, named = of(lora(1), lora(2), sweep_size=size)
        half = jax.tree.map(lambda x: x.astype("bfloat16"), prepared.model.params)
        prepared.model = prepared.model._replace(params=half)
        assert sizes(prepared, steps, named) == packs_of
