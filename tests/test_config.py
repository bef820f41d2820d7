"""Configurations: every rule says the value, the rule and the nearest valid choice."""

import dataclasses
import inspect
import re
import runpy
from pathlib import Path

import pytest
import tyro

from jax_lowrank import config, config_file
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.lora import INITS, LAYER_CHOICES
from jax_lowrank.config import (
    ConfigError,
    EvalSpec,
    MethodSpec,
    ModelSpec,
    Run,
    Study,
    TaskSpec,
    TrainSpec,
    fingerprint,
)
from jax_lowrank.config_file import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
LORA = MethodSpec("lora", (1e-3,), rank=8)


def study(**changed):
    fields = {
        "name": "s",
        "question": "q?",
        "model": ModelSpec(),
        "task": TaskSpec(),
        "methods": (LORA, MethodSpec("full", (1e-4,))),
        "train": TrainSpec(),
        "pretrain": TrainSpec(),
    }
    return Study(**{**fields, **changed})


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: MethodSpec("lorra", (1e-3,)), ["'lorra'", "['full', 'lora', ", "mean 'lora'"]),
        (lambda: MethodSpec("full", ()), ["full has no learning rate"]),
        (lambda: MethodSpec("full", (0.0,)), ["learning rate 0.0 is not positive", "1e-3"]),
        (lambda: MethodSpec("lora", (1e-3,)), ["rank 0 is below 1", "use 1"]),
        (lambda: dataclasses.replace(LORA, dropout=1.0), ["dropout 1.0", "[0, 1)"]),
        (lambda: dataclasses.replace(LORA, layer_fraction=0.0), ["layer_fraction 0.0", "(0, 1]"]),
        (lambda: dataclasses.replace(LORA, layers="lst"), ["'lst'", "mean 'last'"]),
        (lambda: dataclasses.replace(LORA, init="pisa"), ["init: 'pisa'", "mean 'pissa'"]),
        (lambda: dataclasses.replace(LORA, alpha=0.0), ["alpha 0.0 is not positive", "16"]),
        (lambda: dataclasses.replace(LORA, plus_ratio=0.5), ["plus_ratio 0.5 is below 1", "16"]),
        (lambda: dataclasses.replace(LORA, rank_pattern={"x": 0}), ["rank 0 is below 1"]),
        (lambda: dataclasses.replace(LORA, alpha_pattern={"x": -1.0}), ["alpha -1.0 is not"]),
        (lambda: MethodSpec("full", (1e-4,), dora=True), ["dora", "'lora', not of 'full'"]),
        (lambda: MethodSpec("head", (1e-4,), init="pissa"), ["init", "'lora', not of 'head'"]),
        (lambda: ModelSpec(dtype="bf16"), ["model.dtype", "'bf16'", "bfloat16"]),
        (lambda: TrainSpec(schedule="cosin"), ["'cosin'", "mean 'cosine'"]),
        (lambda: TrainSpec(epochs=0), ["train.epochs 0 is below 1"]),
        (lambda: TrainSpec(max_length=1), ["train.max_length 1 is below 2"]),
        (lambda: TrainSpec(batch_size=10, accumulate=4), ["10", "accumulate 4", "use 8"]),
        (lambda: TrainSpec(warmup_fraction=1.0), ["warmup_fraction 1.0", "[0, 1)"]),
        (lambda: EvalSpec(top_p=0.0), ["evaluate.top_p 0.0", "(0, 1]"]),
        (lambda: EvalSpec(top_k=-1), ["evaluate.top_k -1", "0 means all"]),
        (lambda: EvalSpec(temperature=-1.0), ["evaluate.temperature -1.0"]),
        (lambda: EvalSpec(level=1.0), ["evaluate.level 1.0", "(0, 1)"]),
        (lambda: EvalSpec(samples_per_prompt=0), ["evaluate.samples_per_prompt 0"]),
        (lambda: study(methods=()), ["at least one method"]),
        (lambda: study(methods=(LORA, LORA)), ["methods appear twice", "LoRA r=8"]),
        (lambda: study(seeds=()), ["at least one seed"]),
        (lambda: study(seeds=(1, 1)), ["seeds (1, 1) repeat"]),
        (lambda: study(tune_seed=2), ["tune_seed 2", "(1, 2, 3)", "use 4"]),
        (lambda: study(pretrain=None), ["model.path", "pretrain"]),
        (lambda: study(model=ModelSpec(path="x")), ["not both or neither"]),
    ],
)
def test_errors_name_value_rule_and_nearest(make, parts):
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_names_are_those_of_the_tables():
    # config.py imports no other room, so its names are written out there.
    assert set(config.METHOD_NAMES) == set(METHODS)
    assert config.LAYER_CHOICES == LAYER_CHOICES
    assert tuple(INITS) == config.INITS


def test_options_make_their_method():
    full = MethodSpec("full", (1e-4,))
    assert METHODS["full"](**full.options()).scale is None
    assert METHODS["lora"](**LORA.options()).scale == LORA.alpha / LORA.rank
    assert METHODS["lora"](**LORA.options()).rates is None
    plus = dataclasses.replace(LORA, plus_ratio=16.0, dora=True, init="olora")
    assert METHODS["lora"](**plus.options()).rates is not None
    for name in ("bitfit", "head"):
        assert METHODS[name](**MethodSpec(name, (1e-3,)).options()).scale is None
    # Every option of LoRA can be set from a configuration, and has the same default.
    options = inspect.signature(METHODS["lora"]).parameters
    assert LORA.options().keys() == options.keys()
    for name, value in dataclasses.replace(LORA, rank=1).options().items():
        if name not in ("rank", "alpha"):
            assert value == (options[name].default or value), name


def test_every_option_can_be_set_on_the_command_line():
    words = (
        "--method.rank-pattern blocks.mlp.up 4 blocks.attn.* 2 --method.init pissa --method.dora"
    )
    words += " --method.alpha-pattern blocks.mlp.up 3.5 --method.plus-ratio 16"

    @dataclasses.dataclass(frozen=True)
    class Holder:
        method: MethodSpec

    spec = tyro.cli(Holder, default=Holder(LORA), args=words.split()).method
    assert spec.rank_pattern == {"blocks.mlp.up": 4, "blocks.attn.*": 2}
    assert spec.alpha_pattern == {"blocks.mlp.up": 3.5}
    assert (spec.init, spec.dora, spec.plus_ratio, spec.rank) == ("pissa", True, 16.0, 8)


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({}, "LoRA r=8"),
        ({"alpha": 16.5}, "LoRA r=8 alpha=16.5"),
        ({"alpha": 32.0, "targets": "qv"}, "LoRA r=8 alpha=32 (qv)"),
        ({"targets": "qv"}, "LoRA r=8 (qv)"),
        ({"rslora": True}, "LoRA r=8 (rslora)"),
        ({"layers": "last", "layer_fraction": 0.25}, "LoRA r=8 (last 0.25 of layers)"),
        ({"layers": "0,3"}, "LoRA r=8 (layers 0,3)"),
        ({"dora": True, "dropout": 0.1}, "DoRA r=8 (dropout 0.1)"),
        ({"plus_ratio": 16, "init": "pissa"}, "LoRA+ r=8 (pissa, B's rate x16)"),
        (
            {"rank_pattern": {".*up": 2}, "alpha_pattern": {".*": 4}},
            "LoRA r=8 (.*up r=2, .* alpha=4)",
        ),
    ],
)
def test_labels(changed, label):
    spec = dataclasses.replace(LORA, **changed)
    assert spec.label == Run("final", spec, 1e-3, 1).label == label
    assert Run("base", None, 0.0, 0).label == "base"
    assert [MethodSpec(name, (1e-3,)).label for name in ("bitfit", "head")] == [
        "BitFit",
        "head only",
    ]


def test_fingerprint_is_the_same_everywhere():
    one = {"b": 1, "a": (1.5, "x", None), "c": {"z": True, "y": [LORA]}}
    other = {"c": {"y": (LORA,), "z": True}, "a": [1.5, "x", None], "b": 1}
    assert fingerprint(one) == fingerprint(other)
    # Frozen: results of earlier versions are found by it.
    assert fingerprint({"b": 1, "a": (1.5, "x", None)}, 2) == "dc71b833efce9ade"
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(study()))


def test_fingerprint_changes_with_every_field():
    def variants(spec):
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            skipped = ("accumulate", "checkpoint_seconds", "sweep_size")
            if isinstance(value, bool | int | float) and field.name not in skipped:
                fresh = (not value) if isinstance(value, bool) else value / 2 + 1
                fresh = int(fresh) + (int(fresh) == value) if isinstance(value, int) else fresh
                fresh = 16.0 if field.name == "plus_ratio" else fresh
                if field.name in ("dropout", "layer_fraction", "warmup_fraction", "top_p", "level"):
                    fresh = 0.37
                yield dataclasses.replace(spec, **{field.name: fresh})

    for spec in (LORA, TrainSpec(), EvalSpec()):
        marks = [fingerprint(spec), *map(fingerprint, variants(spec))]
        assert len(marks) > 4 and len(set(marks)) == len(marks)
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    # What no result depends on makes no run stale.
    free = TrainSpec(checkpoint_seconds=5.0, sweep_size=3)
    assert fingerprint(TrainSpec()) == fingerprint(free)


def functions_of(file):
    """Names of a config's functions that return a Study and need no argument."""
    found = runpy.run_path(str(file))
    return [name for name, value in found.items() if config_file.makes_study(value, file)]


EVERY = [(file, name) for file in sorted(CONFIGS.glob("*.py")) for name in functions_of(file)]


def test_every_config_has_functions_and_most_a_small_one():
    names = {file.stem: {name for f, name in EVERY if f == file} for file, _ in EVERY}
    assert set(names) == {file.stem for file in CONFIGS.glob("*.py")}
    assert {"hate_speech", "ding_ranks", "lira"} == {s for s, n in names.items() if "smoke" in n}
    assert {"gender", "race", "religion", "sexuality"} <= names["ding_llama2"]
    assert {"age", "gender", "race", "religion", "sexuality"} <= names["ding_mistral"]


@pytest.mark.parametrize(("file", "name"), EVERY, ids=[f"{f.stem}:{n}" for f, n in EVERY])
def test_every_function_of_every_config_makes_its_study(file, name, monkeypatch, tmp_path):
    if "stories" not in file.stem:  # which converts weights
        stand_in = tmp_path / "hatexplain" / "derived_official_val_test.csv.gz"
        stand_in.parent.mkdir()
        stand_in.touch()
        monkeypatch.setenv("JAX_LOWRANK_DATA", str(tmp_path))
    try:
        loaded = load_config(f"{file}:{name}")
    except ConfigError as error:
        if "JAX_LOWRANK_DATA" not in str(error):
            raise
        pytest.skip(f"its data is not here: {error}")
    assert isinstance(loaded, Study) and loaded.question.endswith("?")
    said = file.read_text().split('"""')[1]
    assert f"configs/{file.name}" in said
    assert name == "config" or name in said


def ding(stem, name):
    return load_config(f"{CONFIGS / stem}.py:{name}")


# study-2405.17512.md, 2.5: (epochs, learning rate) of full fine-tuning, of LoRA
SELECTED = {
    ("ding_llama2", "gender"): ((1, 1e-5), (2, 3e-4)),
    ("ding_llama2", "race"): ((1, 1e-5), (6, 3e-4)),
    ("ding_llama2", "religion"): ((2, 1e-5), (6, 3e-4)),
    ("ding_llama2", "sexuality"): ((1, 1e-5), (4, 1e-4)),
    ("ding_mistral", "age"): ((8, 1e-4), (8, 3e-4)),
    ("ding_mistral", "gender"): ((4, 1e-5), (2, 3e-4)),
    ("ding_mistral", "race"): ((4, 5e-5), (4, 1e-4)),
    ("ding_mistral", "religion"): ((2, 1e-5), (4, 3e-4)),
    ("ding_mistral", "sexuality"): ((3, 1e-5), (12, 1e-4)),
}
MODELS = {
    "ding_llama2": "meta-llama/Llama-2-7b-hf",
    "ding_mistral": "mistralai/Mistral-7B-v0.1",
}


def check_as_published(found, stem):
    """What all its runs have in common (2.1, 2.2, 1.1 of the same page)."""
    assert found.model.path == MODELS[stem]
    spec = found.train
    assert (spec.batch_size, spec.max_length, spec.schedule) == (32, 256, "cosine")
    assert (spec.warmup_fraction, spec.weight_decay, spec.clip) == (0.01, 1e-3, 1.0)
    assert found.seeds == (13, 1337, 42, 666, 888)
    options = found.task.options
    assert options["path"].startswith("hub:ucberkeley-dlab/measuring-hate-speech/")
    assert (options["split"], options["seed"]) == ("published", 13)
    for method in found.methods:
        if method.name == "lora":
            said = (method.alpha, method.targets, method.dropout, method.init, method.rslora)
            assert said == (16.0, "qv", 0.0, "kaiming", False)


@pytest.mark.parametrize(("stem", "subset"), SELECTED)
def test_the_7b_configs_carry_the_published_choices(stem, subset):
    found = ding(stem, subset)
    check_as_published(found, stem)
    assert found.task.options["options"]["subset"] == subset
    methods = {method.name: method for method in found.methods}
    for name, (epochs, rate) in zip(("full", "lora"), SELECTED[stem, subset]):
        assert (methods[name].epochs, methods[name].learning_rates) == (epochs, (rate,))
    assert methods["lora"].rank == 8


@pytest.mark.parametrize(("stem", "highest"), [("ding_llama2", 12), ("ding_mistral", 10)])
def test_the_7b_configs_carry_the_published_ranks(stem, highest):
    found = ding(stem, "ranks")
    check_as_published(found, stem)
    assert found.task.options["options"]["subset"] == "religion"
    lora = [method for method in found.methods if method.name == "lora"]
    assert {(m.epochs, m.learning_rates) for m in lora} == {(12, (3e-5,))}
    whole = [m.rank for m in lora if m.layer_fraction == 1]
    assert whole == [2**power for power in range(highest + 1)]
    parts = {(m.rank, m.layer_fraction, m.layers) for m in lora if m.layer_fraction < 1}
    fractions = (0.2, 0.4, 0.6, 0.8)
    assert parts == {(1, f, where) for f in fractions for where in ("first", "last", "random")}
    head, full = (next(m for m in found.methods if m.name == n) for n in ("head", "full"))
    assert head.epochs == 12 and 3e-5 in head.learning_rates
    assert (full.epochs, full.learning_rates) == (2, (1e-5,))


def test_load_config(tmp_path):
    demo = str(CONFIGS / "demo.py")
    assert load_config(demo + ":config") == load_config(demo)
    with pytest.raises(ConfigError, match=r"no config file .*demoo.py.*did you mean .*demo.py"):
        load_config(str(CONFIGS / "demoo.py"))
    with pytest.raises(ConfigError, match=r"'confg' is not one of \['config'\].*mean 'config'"):
        load_config(demo + ":confg")
    other = tmp_path / "other.py"
    other.write_text("def config():\n    return 3\n")
    with pytest.raises(ConfigError, match="returns int, not a Study"):
        load_config(str(other))
    several = tmp_path / "several.py"
    several.write_text(
        "from importlib.util import find_spec\nfrom jax_lowrank.config import Study\n"
        "def smoke() -> Study: ...\ndef config(): ...\ndef folder() -> str: ...\n"
        "def study(rows): ...\n"
    )
    with pytest.raises(ConfigError, match=r"'smok' is not one of \['smoke', 'config'\]"):
        load_config(f"{several}:smok")
    with pytest.raises(ConfigError, match="no config file"):
        load_config(str(tmp_path))
