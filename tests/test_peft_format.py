"""PEFT adapters in and out: PEFT's own files and logits, the same bits back, and refusals."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapt import batches_of, optimizer_of
from tiny import (
    FIXTURES,
    apply_of,
    assert_close,
    folder_of,
    logits_of,
    model_of,
    oracle_of,
    same_bytes,
)

from jax_lowrank import adapters, models, train
from jax_lowrank.adapt import METHODS, peft_format
from jax_lowrank.adapt.peft_format import PREFIX, PeftError, PeftFiles
from jax_lowrank.models.head import Head
from jax_lowrank.models.weights import Row

ADAPTERS = FIXTURES.parent / "adapters"
SMALL = {"rank": 2, "alpha": 4.0, "rslora": False, "dropout": 0.0}
# case -> base fixture, and the options that its adapter_config.json stands for
CASES = {
    "gpt2_patterns": (
        "gpt2",
        {
            "rank": 4,
            "alpha": 8.0,
            "rslora": False,
            "dropout": 0.1,
            "targets": r"blocks\.attn\.qkv|blocks\.mlp\.down",
            "rank_pattern": {r"blocks\.attn\.qkv": 2},
            "alpha_pattern": {r"blocks\.mlp\.down": 3},
        },
    ),
    "llama_layers": (
        "llama_tied",
        {
            "rank": 3,
            "alpha": 6.0,
            "rslora": True,
            "dropout": 0.0,
            "targets": r"blocks\.attn\.q|blocks\.attn\.v|blocks\.mlp\.down",
            "layers": "1",
        },
    ),
    "mistral_regex": (
        "mistral_window",
        {
            "rank": 2,
            "alpha": 5.0,
            "rslora": False,
            "dropout": 0.0,
            "targets": r"blocks\.mlp\.gate|blocks\.mlp\.up",
            "init": "gaussian",
        },
    ),
    "gpt2_classifier": (
        "gpt2",
        {
            "rank": 2,
            "alpha": 4.0,
            "rslora": False,
            "dropout": 0.0,
            "targets": r"blocks\.attn\.out",
        },
    ),
    "llama_dora": (
        "llama_bias",
        {
            "rank": 2,
            "alpha": 4.0,
            "rslora": False,
            "dropout": 0.0,
            "targets": r"blocks\.attn\.q|blocks\.mlp\.down",
            "dora": True,
        },
    ),
    "bert_all_linear": ("bert_classification", {**SMALL, "targets": ".*"}),
    "bert_masked": ("bert_masked-lm", {**SMALL, "targets": r"blocks\.(attn\.(q|out)|mlp\.down)"}),
    "bert_features": ("bert_embedding", {**SMALL, "targets": r"blocks\.attn\.v"}),
    "roberta_classifier": ("roberta_masked-lm", {**SMALL, "targets": r"blocks\.attn\.(k|v)"}),
    "distilbert_classifier": (
        "distilbert_masked-lm",
        {**SMALL, "targets": r"blocks\.(attn\.q|mlp\.down)"},
    ),
    "opt_all_linear": ("opt_350m", {**SMALL, "targets": ".*"}),
    "qwen2_classifier": (
        "qwen2",
        {
            **SMALL,
            "rslora": True,
            "targets": r"blocks\.(attn\.(q|v)|mlp\.gate)",
            "rank_pattern": {r"blocks\.mlp\.gate": 3},
        },
    ),
    "qwen2_dora_last": (
        "qwen2_window",
        {**SMALL, "targets": r"blocks\.(attn\.k|mlp\.up)", "dora": True, "layers": "1"},
    ),
}
OPT_LINEAR = ["fc1", "fc2", "k_proj", "out_proj", "project_in", "project_out", "q_proj", "v_proj"]
every_case = pytest.mark.parametrize("case", CASES)


def loaded(case):
    """The frozen adapter of a case beside its base, and its options."""
    found = adapters.load(ADAPTERS / case, str(folder_of(CASES[case][0])))
    return found, found.options


def answers(head, graphdef, states, oracle):
    """What the model's class answers in transformers."""
    model, mask = apply_of(graphdef)(*states), oracle.get("mask")
    mask = None if mask is None else mask > 0
    if head.kind == "classification":
        return model.classify(oracle["tokens"], mask)
    if head.kind == "embedding":
        return model.hidden(oracle["tokens"], mask)[0]
    return logits_of(graphdef, states, oracle["tokens"], mask)


@every_case
def test_logits_equal_those_of_peft(case):
    trained, options = loaded(case)
    assert set(options) == set(CASES[case][1])
    for name, value in CASES[case][1].items():
        assert options[name] == value or name == "targets"
    oracle = dict(np.load(ADAPTERS / case / "oracle.npz"))
    head, real = trained.base.head, oracle.get("mask", np.ones_like(oracle["tokens"])) > 0
    real = slice(None) if head.kind == "classification" else real
    beside = answers(head, trained.graphdef, (trained.trainable, trained.frozen), oracle)
    assert_close(np.asarray(beside)[real], oracle["logits"][real], atol=1e-5)
    merged = trained.method.merge(trained.graphdef, trained.trainable, trained.frozen)
    found = answers(head, trained.base.graphdef, (merged,), oracle)
    assert_close(np.asarray(found)[real], oracle["logits"][real], atol=1e-5)


def files_of(adapted, name="x/y"):
    """An adapter as PEFT's files."""
    parts = (adapted.graphdef, adapted.trainable, adapted.frozen)
    return adapters.to_files(adapted.base, *parts, adapted.options, name)


def adapted_modules(tensors):
    return {name.split(".lora_")[0] for name in tensors if ".lora_" in name}


@every_case
def test_what_peft_made_comes_back_bit_for_bit(case):
    original = peft_format.read(ADAPTERS / case)
    trained, _ = loaded(case)
    again = files_of(trained)
    assert set(again.tensors) == set(original.tensors)
    for name, value in original.tensors.items():
        assert again.tensors[name].dtype == value.dtype
        assert again.tensors[name].tobytes() == value.tobytes(), name
    same = ("r", "lora_alpha", "use_rslora", "lora_dropout", "use_dora", "bias", "task_type")
    same += ("fan_in_fan_out", "init_lora_weights", "layers_to_transform", "layers_pattern")
    for field in same:
        expected = original.config[field]
        if field == "fan_in_fan_out":
            expected = CASES[case][0] == "gpt2"
        if field == "layers_pattern" and expected:
            expected = [expected]
        assert again.config[field] == expected, field
    expected = {
        "gpt2_patterns": ["c_attn", "mlp.c_proj"],
        "llama_layers": ["down_proj", "q_proj", "v_proj"],
        "mistral_regex": ["gate_proj", "up_proj"],
        "gpt2_classifier": ["attn.c_proj"],
        "llama_dora": ["down_proj", "q_proj"],
        "bert_all_linear": ["dense", "key", "query", "value"],
        "bert_masked": ["output.dense", "query"],
        "bert_features": ["value"],
        "roberta_classifier": ["key", "value"],
        "distilbert_classifier": ["lin2", "q_lin"],
        "opt_all_linear": OPT_LINEAR,
        "qwen2_classifier": ["gate_proj", "q_proj", "v_proj"],
        "qwen2_dora_last": ["k_proj", "up_proj"],
    }
    assert again.config["target_modules"] == expected[case]
    saved = {
        "gpt2_classifier": ["score"],
        "bert_all_linear": ["classifier"],
        "roberta_classifier": ["classifier"],
        "distilbert_classifier": ["classifier", "pre_classifier"],
        "qwen2_classifier": ["score"],
    }
    assert again.config["modules_to_save"] == saved.get(case)
    assert again.config["auto_mapping"] == original.config["auto_mapping"]


def test_patterns_are_written_for_peft():
    trained, _ = loaded("gpt2_patterns")
    config = files_of(trained).config
    (rank_key, rank), *more = config["rank_pattern"].items()
    assert (rank, more) == (2, [])
    (alpha_key, alpha), *more = config["alpha_pattern"].items()
    assert (alpha, more) == (3, [])
    names = ["transformer.h.0.attn.c_attn", "transformer.h.11.attn.c_attn"]
    assert [peft_format._match({rank_key: 2}, name, 4) for name in names] == [2, 2]
    others = ["transformer.h.0.attn.c_attn.x", "h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert [peft_format._match({rank_key: 2}, name, 4) for name in others] == [4, 4, 4]
    assert peft_format._match({alpha_key: 3}, "transformer.h.1.mlp.c_proj", 8) == 3


OURS = {
    "plain": {"rank": 2, "alpha": 3.0},
    "rslora": {"rank": 3, "alpha": 5.0, "rslora": True, "dropout": 0.25},
    "last": {"rank": 2, "alpha": 4.0, "layers": "last", "layer_fraction": 0.5, "targets": "qv"},
    "patterns": {
        "rank": 2,
        "alpha": 4.0,
        "rank_pattern": {r"blocks\.mlp\..*": 3},
        "alpha_pattern": {r"blocks\.attn\.out": 1.5, r".*\.down": 7.0},
        "init": "gaussian",
    },
    "dora": {"rank": 2, "alpha": 4.0, "dora": True},
    "pissa": {"rank": 2, "alpha": 4.0, "init": "pissa"},
    "olora": {"rank": 2, "alpha": 4.0, "init": "olora", "rslora": True},
    "pissa_dora": {"rank": 2, "alpha": 4.0, "init": "pissa", "dora": True},
}


def made(name, option, head=None):
    """A LoRA model of ours whose every trained array is away from its start."""
    base = models.load(folder_of(name), head=head, key=jax.random.key(9))
    method = METHODS["lora"](**OURS[option])
    graphdef, trainable, frozen = method.split(jax.random.key(0), base)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trainable))))

    def moved(x):
        return x + 0.05 * jax.random.normal(next(keys), x.shape)

    trainable = jax.tree.map(moved, trainable)
    return adapters.Adapted(
        base, folder_of(name), method, OURS[option], graphdef, trainable, frozen
    )


BACK = [("llama_bias", option) for option in OURS]
# Its kernels lie the other way round, and two modules of a block have names with one ending.
BACK += [("gpt2", "plain"), ("gpt2", "patterns"), ("gpt2", "last"), ("opt_350m", "rslora")]
MORE = [("gpt2", option) for option in OURS if ("gpt2", option) not in BACK]


@pytest.mark.parametrize(
    ("name", "option"), [*BACK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
)
def test_what_we_made_comes_back(name, option, tmp_path):
    trained = made(name, option)
    peft_format.write(tmp_path, files_of(trained))
    back = adapters.load(tmp_path, str(FIXTURES / name))
    tokens = oracle_of(name)["tokens"]
    ours = logits_of(trained.graphdef, (trained.trainable, trained.frozen), tokens)
    theirs = logits_of(back.graphdef, (back.trainable, back.frozen), tokens)
    if OURS[option].get("init") in ("pissa", "olora"):  # on the original base the rank is doubled
        assert back.options["rank"] == 4 and "init" not in back.options
        assert_close(ours, theirs, atol=1e-5)
        return
    np.testing.assert_array_equal(ours, theirs)
    assert same_bytes(trained.trainable, back.trainable)
    assert files_of(back).config == files_of(trained).config


def test_a_classifier_comes_back(tmp_path):
    trained = made("llama_tied", "plain", Head("classification", ("a", "b", "c")))
    files = files_of(trained)
    assert files.config["task_type"] == "SEQ_CLS"
    assert files.tensors[PREFIX + "score.weight"].shape == (3, 24)
    peft_format.write(tmp_path, files)
    back = adapters.load(tmp_path, str(FIXTURES / "llama_tied"))
    assert back.base.head == Head("classification", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert same_bytes(trained.trainable, back.trainable)


def test_training_continues_from_an_imported_adapter():
    trained, _ = loaded("gpt2_patterns")
    optimizer = optimizer_of(trained)
    tokens = jnp.asarray(oracle_of("gpt2")["tokens"])
    copied = jax.tree.map(jnp.array, trained.trainable)
    after, _, losses, _ = train.run_steps(
        apply=apply_of(trained.graphdef),
        loss=train.causal_lm_loss,
        optimizer=optimizer,
        accumulate=1,
        trainable=copied,
        opt_state=optimizer.init(copied),
        frozen=trained.frozen,
        batches=batches_of("gpt2"),
        rates=np.full(3, 1e-2, np.float32),
        count=3,
        key=jax.random.key(0),
    )
    start = logits_of(trained.graphdef, (trained.trainable, trained.frozen), tokens)
    assert float(losses[2]) < float(losses[0])
    assert not np.array_equal(start, logits_of(trained.graphdef, (after, trained.frozen), tokens))


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type is 'IA3'; only 'LORA'"),
        ("bias", "lora_only", "bias='lora_only'"),
        ("lora_bias", True, "lora_bias=True"),
        ("target_parameters", ["x.weight"], "target_parameters="),
        ("trainable_token_indices", [3], "trainable_token_indices="),
        ("layer_replication", [[0, 2]], "layer_replication="),
        ("megatron_config", {"a": 1}, "megatron_config="),
        ("loftq_config", {"loftq_bits": 4}, "loftq_config="),
        ("eva_config", {"rho": 2.0}, "eva_config="),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens="),
        ("a_field_of_tomorrow", 1, "a_field_of_tomorrow=1"),
        ("init_lora_weights", "pissa", "init_lora_weights='pissa'.*path_initial_model"),
        ("init_lora_weights", "eva", "init_lora_weights='eva' is not supported"),
        ("use_dora", True, "does not fit use_dora=True"),
        (
            "rank_pattern",
            {"h.0.attn.c_attn": 3},
            "rank_pattern gives the layers of blocks.attn.qkv",
        ),
        ("alpha_pattern", {"1.mlp.c_proj": 9}, "alpha_pattern gives the layers of blocks.mlp.down"),
        ("r", 5, "blocks.mlp.down: lora_A is \\(4, 128\\).*rank 5"),
    ],
)
def test_fields_that_cannot_be_read(field, value, message, tmp_path):
    folder = copied_case("gpt2_patterns", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(PeftError, match=message):
        adapters.load(folder, str(FIXTURES / "gpt2"))


def copied_case(case, tmp_path):
    return Path(shutil.copytree(ADAPTERS / case, tmp_path / case))


def tensors_changed(change):
    """The tensors of a case, changed, read for its base."""
    files = peft_format.read(ADAPTERS / "gpt2_patterns")
    model, tensors = model_of("gpt2"), dict(files.tensors)
    change(tensors)
    rows = models.FAMILIES["gpt2"].module.rows(model.config, model.head)
    shapes = {path: value.shape for path, value in models.by_path(model.params).items()}
    return peft_format.from_peft(PeftFiles(files.config, tensors), rows, shapes)


QKV = PREFIX + "transformer.h.1.attn.c_attn.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QKV.format("B")), r"blocks.attn.qkv lacks lora_B.weight in layers \[1\]"),
        (
            lambda t: (t.pop(QKV.format("A")), t.pop(QKV.format("B"))),
            "adapted in different layers .*blocks.attn.qkv: .0.; ",
        ),
        (
            lambda t: t.update({PREFIX + "transformer.wte.lora_embedding_A": np.ones((2, 97))}),
            "does not fit the model: base_model.model.transformer.wte.lora_embedding_A",
        ),
        (
            lambda t: t.update({PREFIX + "lm_head.weight": np.ones((97, 32))}),
            "does not fit the model: base_model.model.lm_head.weight",
        ),
        (
            lambda t: t.update(
                {QKV.format("A"): np.ones((3, 32)), QKV.format("B"): np.ones((96, 3))}
            ),
            "different shapes",
        ),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
)
def test_tensors_that_cannot_be_read(change, message):
    with pytest.raises(PeftError, match=message):
        tensors_changed(change)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json"):
        peft_format.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors; it holds a pickle"):
        peft_format.read(tmp_path)


# --------------------------------------------------------------------------- choosing modules

ENCODER = [
    Row("bert.embeddings.word_embeddings.weight", "embed.table"),
    *(
        Row(f"bert.encoder.layer.{{l}}.{theirs}.weight", f"blocks.{ours}.kernel", True)
        for theirs, ours in {
            "attention.self.query": "attn.q",
            "attention.output.dense": "attn.out",
            "intermediate.dense": "mlp.up",
            "output.dense": "mlp.down",
        }.items()
    ),
    Row("bert.pooler.dense.weight", "pooler.kernel", True),
    Row("classifier.weight", "classifier.out.kernel", True),
    Row("classifier.bias", "classifier.out.bias"),
]


@pytest.mark.parametrize(
    ("adapted", "targets", "layers"),
    [
        ({"attn.q": (0, 1)}, ["query"], None),
        ({"attn.q": (1,), "attn.out": (1,)}, ["attention.output.dense", "query"], [1]),
        # `output.dense` is an ending of attention.output.dense too.
        ({"mlp.down": (1,)}, ["bert.encoder.layer.1.output.dense"], None),
        ({"attn.out": (0, 1), "mlp.down": (0, 1)}, ["output.dense"], None),
        (
            {"attn.q": (0,), "mlp.up": (1,)},
            [
                "bert.encoder.layer.0.attention.self.query",
                "bert.encoder.layer.1.intermediate.dense",
            ],
            None,
        ),
        ({"attn.q": (0, 1), "pooler": ()}, ["pooler.dense", "query"], None),
    ],
)
def test_targets_name_the_adapted_modules_alone(adapted, targets, layers):
    stacked = {row.path: (2, 4, 4) for row in ENCODER if "{l}" in row.name}
    shapes = {**stacked, "pooler.kernel": (4, 4), "classifier.out.kernel": (4, 3)}
    shapes["classifier.out.bias"] = (3,)
    factors = {}
    for path, chosen in adapted.items():
        path = path if path == "pooler" else f"blocks.{path}"
        stack = (len(chosen),) if chosen else ()
        a, b = np.zeros((*stack, 4, 1)), np.zeros((*stack, 1, 4))
        factors[path] = SimpleNamespace(a=a, b=b, scale=2.0, layers=chosen, magnitude=None)
    head = {"classifier.out.kernel": np.ones((4, 3)), "classifier.out.bias": np.ones(3)}
    files = peft_format.to_peft(
        *(factors, head, {"rank": 1, "alpha": 2.0}, ENCODER, shapes),
        kind="classification",
        base="b",
        architecture="BertForSequenceClassification",
    )
    assert files.config["target_modules"] == targets
    assert files.config["layers_to_transform"] == layers
    assert files.config["layers_pattern"] == (layers and ["layer"])
    assert files.config["modules_to_save"] == ["classifier"]
    assert files.tensors[PREFIX + "classifier.weight"].shape == (3, 4)
    if len(set(adapted.values()) - {()}) == 1:
        back = peft_format.from_peft(files, ENCODER, shapes, tuple(head))
        found = {p.removesuffix(".adapter.a") for p in back.arrays if p.endswith(".a")}
        assert found == set(factors)
        shaped = {p: v.shape for p, v in back.arrays.items()}
        assert all(shaped[f"{p}.adapter.a"] == f.a.shape for p, f in factors.items())


# ----------------------------------------------------------------------------------- live PEFT


@pytest.mark.parametrize("name", ["gpt2", "mistral_full", "opt", "opt_350m", "opt_bare", "qwen2"])
def test_live_all_linear_is_what_peft_takes(name):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(FIXTURES / name)
    options = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(base, config).state_dict()
    assert adapted_modules(theirs) == adapted_modules(files_of(made(name, "plain")).tensors)


@pytest.mark.parametrize("option", OURS)
@pytest.mark.parametrize(
    "name", ["gpt2", "llama_bias", "llama_tied", "mistral_window", "opt", "opt_350m", "qwen2"]
)
def test_live_peft_loads_ours(name, option, tmp_path):
    live(tmp_path, name, option, None)


OTHERS = ["opt", "opt_350m", "qwen2", "bert_masked-lm", "roberta_masked-lm", "bert_embedding"]


@pytest.mark.parametrize("name", [*OTHERS, "distilbert_masked-lm"])
def test_live_peft_loads_the_other_families(name, tmp_path):
    live(tmp_path, name, "patterns", None)


CLASSIFIERS = ["gpt2", "llama_bias", "opt_350m", "qwen2", "mistral_full", "bert_masked-lm"]


@pytest.mark.parametrize("name", [*CLASSIFIERS, "roberta_masked-lm", "distilbert_masked-lm"])
def test_live_peft_loads_our_classifier(name, tmp_path):
    live(tmp_path, name, "plain", Head("classification", ("a", "b", "c")))


AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}


def live(folder, name, option, head):
    """PEFT's logits with our files equal ours; it adapts the same modules and misses nothing."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    trained = made(name, option, head)
    files = files_of(trained, str(folder_of(name)))
    peft_format.write(folder, files)
    kind, extra = trained.base.head.kind, {"num_labels": len(head.labels)} if head else {}
    base = getattr(transformers, AUTO[kind]).from_pretrained(
        folder_of(name), attn_implementation="eager", **extra
    )
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    assert adapted_modules(files.tensors) == {
        name for name, module in theirs.named_modules() if hasattr(module, "lora_A") and name
    }
    stored = np.load(folder_of(name) / "oracle.npz")
    tokens = stored["tokens" if "tokens" in stored else "right_tokens"]
    tokens = np.maximum(tokens, 2)  # no pads, of which 0 and 1 are
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long())[0].numpy()
    states = (trained.trainable, trained.frozen)
    ours = answers(trained.base.head, trained.graphdef, states, {"tokens": tokens})
    assert_close(ours, expected, atol=1e-5)
