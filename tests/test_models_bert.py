"""Encoders against PyTorch: embeddings, attention, states, heads, padding, names in files."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import FIXTURES, assert_close, same_bytes

from jax_lowrank import models
from jax_lowrank.adapt import METHODS
from jax_lowrank.models.attention import make_context
from jax_lowrank.models.bert import BertConfig
from jax_lowrank.models.head import Head
from jax_lowrank.models.weights import UnsupportedModelError, WeightsError

ENCODERS = FIXTURES.parent / "encoders"
FAMILIES = ("bert", "roberta", "distilbert")
KINDS = ("embedding", "masked-lm", "classification")
SIDES = ("right", "left")
CLASSES = Head("classification", ("no", "maybe", "yes"))
every_model = pytest.mark.parametrize("name", [f"{f}_{k}" for f in FAMILIES for k in KINDS])
every_family = pytest.mark.parametrize("family", FAMILIES)
both_sides = pytest.mark.parametrize("side", SIDES)


def test_every_folder_is_tested():
    folders = {path.name for path in ENCODERS.iterdir() if path.is_dir()}
    assert folders == {f"{f}_{k}" for f in FAMILIES for k in KINDS}


@functools.cache
def encoder(name):
    return models.load(ENCODERS / name)


@functools.cache
def oracle(name):
    with np.load(ENCODERS / name / "oracle.npz") as stored:
        return dict(stored)


@functools.partial(jax.jit, static_argnames=("graphdef", "method"))
def call(graphdef, params, method, *args, **kwargs):
    """A method of the module, compiled."""
    net = nnx.merge(graphdef, params)
    return getattr(net, method)(*args, **kwargs)


def ran(model, method, *args, **kwargs):
    return jax.tree.map(np.asarray, call(model.graphdef, model.params, method, *args, **kwargs))


@jax.jit
def first_attention(blocks, x, context):
    """Block 0's attention of x."""
    graphdef, state = nnx.split(blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda value: value[0], state))
    return block.attn(x, context, None, 0)[0]


@every_model
@both_sides
def test_embeddings_attention_and_states(name, side):
    model, o = encoder(name), oracle(name)
    tokens, mask = o[f"{side}_tokens"], o[f"{side}_mask"]
    real = mask.astype(bool)
    last, before = ran(model, "hidden", tokens, mask)
    assert_close(before[0][real], o[f"{side}_embeddings"][real])
    states = np.concatenate([before, last[None]])
    assert_close(states[:, real], o[f"{side}_states"][:, real])
    context, _ = make_context(jnp.asarray(tokens), mask, None, None, None, causal=False)
    net = nnx.merge(model.graphdef, model.params)
    mixed = np.asarray(first_attention(net.blocks, jnp.asarray(before[0]), context))
    assert_close(mixed[real], o[f"{side}_attention"][real])


@every_family
def test_rows_without_pads_need_no_mask(family):
    model, o = encoder(f"{family}_embedding"), oracle(f"{family}_embedding")
    last, _ = ran(model, "hidden", o["right_tokens"][:1])
    assert_close(last, o["right_states"][-1][:1])


@every_family
@both_sides
def test_masked_lm(family, side):
    model, o = encoder(f"{family}_masked-lm"), oracle(f"{family}_masked-lm")
    assert model.head == Head("masked-lm") and model.head_paths == ()
    logits = ran(model, "__call__", o[f"{side}_tokens"], o[f"{side}_mask"])
    assert logits.dtype == np.float32
    real = o[f"{side}_mask"].astype(bool)
    assert_close(logits[real], o[f"{side}_logits"][real])


@every_family
@both_sides
def test_classification(family, side):
    model, o = encoder(f"{family}_classification"), oracle(f"{family}_classification")
    parts = ("out",) if family == "bert" else ("dense", "out")
    paths = tuple(f"classifier.{part}.{end}" for part in parts for end in ("bias", "kernel"))
    assert model.head == CLASSES and model.head_paths == paths
    logits = ran(model, "classify", o[f"{side}_tokens"], o[f"{side}_mask"])
    assert logits.dtype == np.float32
    # PyTorch reads column 0, a pad in left-padded rows; the text's own first token is meant.
    assert_close(logits, o["right_logits"])
    assert_close(ran(model, "classify", o["right_tokens"][:1]), o["right_logits"][:1])


@pytest.mark.parametrize("kind", KINDS)
def test_token_types(kind):
    model, o = encoder(f"bert_{kind}"), oracle(f"bert_{kind}")
    tokens, mask, types = (o[f"right_{part}"] for part in ("tokens", "mask", "types"))
    if kind == "classification":
        logits = ran(model, "classify", tokens, mask, types=types)
        return assert_close(logits, o["typed_logits"])
    real = mask.astype(bool)
    if kind == "masked-lm":
        logits = ran(model, "__call__", tokens, mask, types=types)
        return assert_close(logits[real], o["typed_logits"][real])
    last, _ = ran(model, "hidden", tokens, mask, types=types)
    return assert_close(last[real], o["typed_states"][-1][real])


def test_a_family_without_token_types_refuses_them():
    model, o = encoder("distilbert_embedding"), oracle("distilbert_embedding")
    with pytest.raises(ValueError, match="no token types"):
        ran(model, "hidden", o["right_tokens"], types=o["right_types"])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pooler(family):
    model, o = encoder(f"{family}_embedding"), oracle(f"{family}_embedding")
    pooler = nnx.merge(model.graphdef, model.params).pooler
    pooled = np.tanh(np.asarray(pooler(jnp.asarray(o["right_states"][-1][:, 0]))))
    assert_close(pooled, o["right_pooler"])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bert_masked-lm", "__call__"),
        ("roberta_classification", "classify"),
        pytest.param("bert_classification", "classify", marks=pytest.mark.slow),
        ("bert_embedding", "sentence"),
    ],
)
def test_bfloat16_weights_give_float32_outputs(name, method):
    model, o = models.load(ENCODERS / name, jnp.bfloat16), oracle(name)
    tokens, mask = o["right_tokens"], o["right_mask"]
    output, exact = (ran(m, method, tokens, mask) for m in (model, encoder(name)))
    assert output.dtype == np.float32
    assert 0 < np.abs(output - exact)[mask > 0 if output.ndim == 3 else ...].max() < 0.2


@both_sides
def test_sentence_embeddings(side):
    model, o = encoder("bert_embedding"), oracle("bert_embedding")
    tokens, mask = o[f"{side}_tokens"], o[f"{side}_mask"].copy()
    states, weights = o["right_states"][-1], o["right_mask"][..., None]
    mean = (states * weights).sum(1) / weights.sum(1)
    expected = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    assert_close(ran(model, "sentence", tokens, mask), expected)
    assert_close(ran(model, "sentence", tokens[:1]), expected[:1])
    mask[2] = 0
    assert not ran(model, "sentence", tokens, mask)[2].any()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("classification", "classify"),
        pytest.param("masked-lm", "__call__", marks=pytest.mark.slow),
    ],
)
def test_a_row_of_pads_harms_nothing(kind, method):
    model, o = encoder(f"bert_{kind}"), oracle(f"bert_{kind}")
    mask = o["right_mask"].copy()
    mask[1] = 0
    logits = ran(model, method, o["right_tokens"], mask)
    assert np.isfinite(logits).all()
    keep = (mask > 0) if logits.ndim == 3 else np.array([0, 2])
    assert_close(logits[keep], o["right_logits"][keep])

    @jax.jit
    def gradient(params):
        def loss(params):
            net = nnx.merge(model.graphdef, params)
            return jnp.square(getattr(net, method)(o["right_tokens"], mask)).sum()

        return jax.grad(loss)(params)

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(model.params)))


@every_family
def test_packed_texts_do_not_see_each_other(family):
    model, o = encoder(f"{family}_masked-lm"), oracle(f"{family}_masked-lm")
    rows = [o["right_tokens"][i, : o["right_mask"][i].sum()] for i in range(3)]
    packed = np.concatenate(rows)[None]
    segments = np.concatenate([np.full(len(row), i, np.int32) for i, row in enumerate(rows)])[None]
    logits = ran(model, "__call__", packed, segments=segments)[0]
    assert_close(logits, o["right_logits"][o["right_mask"].astype(bool)])


@pytest.mark.slow  # the decoders' is quick
def test_remat_changes_nothing():
    model, o = encoder("bert_classification"), oracle("bert_classification")

    def gradient(remat):
        def loss(params):
            net = nnx.merge(model.graphdef, params)
            net.remat = remat
            return jnp.square(net.classify(o["right_tokens"], o["right_mask"])).sum()

        return jax.jit(jax.grad(loss)).trace(model.params)

    plain, remat = gradient("dots"), gradient("full")
    one, two = (traced.lower().compile() for traced in (plain, remat))
    assert two.cost_analysis()["flops"] > 1.1 * one.cost_analysis()["flops"]
    expected, other = one(model.params), two(model.params)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(expected))
    chex.assert_trees_all_close(expected, other, atol=1e-4)


# --------------------------------------------------------------------------------- checkpoints


@every_model
def test_export_gives_the_same_tensors(name, tmp_path):
    model = encoder(name)
    models.save(tmp_path / "out", model, model.params)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", ENCODERS / name))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert ours[key].tobytes() == value.tobytes(), key
    stored = json.loads((ENCODERS / name / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    named = model.head.kind == "classification"
    for field, value in written.items():
        assert stored[field] == value, field
    assert named == ("id2label" in written)
    again = models.load(tmp_path / "out")
    assert again.config == model.config and again.family == model.family
    assert again.head == model.head and same_bytes(again.params, model.params)


def rewritten(folder, name, change, **fields):
    """A copy of a fixture with its tensors changed and config fields replaced."""
    tensors = change(load_file(ENCODERS / name / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((ENCODERS / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_names_of_old_checkpoints(tmp_path):
    # As the hub's bert-base-uncased: TensorFlow's names, a buffer, heads that nobody asked for.
    def change(tensors):
        ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for name in list(tensors):
            for new, old in ends.items():
                if name.endswith(new):
                    tensors[name.removesuffix(new) + old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = np.arange(20)[None]
        tensors["bert.pooler.dense.weight"] = np.ones((16, 16), np.float32)
        tensors["bert.pooler.dense.bias"] = np.ones(16, np.float32)
        tensors["cls.seq_relationship.weight"] = np.ones((2, 16), np.float32)
        tensors["cls.predictions.decoder.weight"] = np.ones((61, 16), np.float32)
        return tensors

    folder = rewritten(tmp_path, "bert_masked-lm", change, architectures=["BertForPreTraining"])
    assert "bert.embeddings.LayerNorm.gamma" in load_file(folder / "model.safetensors")
    model = models.load(folder)
    assert model.head == Head("masked-lm")
    assert same_bytes(model.params, encoder("bert_masked-lm").params)


# What a body with that head lacks for a classification head.
LACKS = {
    "bert_embedding": ("classifier.out",),
    "bert_masked-lm": ("classifier.out", "pooler"),
    "roberta_embedding": ("classifier.dense", "classifier.out"),
    "roberta_masked-lm": ("classifier.dense", "classifier.out"),
    "distilbert_embedding": ("classifier.dense", "classifier.out"),
    "distilbert_masked-lm": ("classifier.dense", "classifier.out"),
}


@pytest.mark.parametrize("name", LACKS)
def test_a_new_classification_head(name):
    with pytest.raises(WeightsError, match=r"missing: (pre_)?classifier"):
        models.load(ENCODERS / name, head=CLASSES)
    model = models.load(ENCODERS / name, head=CLASSES, key=jax.random.key(0))
    expected = sorted(f"{m}.{end}" for m in LACKS[name] for end in ("bias", "kernel"))
    assert model.head_paths == tuple(expected)
    arrays, base = models.by_path(model.params), models.by_path(encoder(name).params)
    for path, value in arrays.items():
        if path not in model.head_paths:
            np.testing.assert_array_equal(value, base[path])
        elif path.endswith("bias"):
            assert not np.asarray(value).any()
        else:
            assert 0.01 < np.asarray(value).std() < 0.03
    logits = ran(model, "classify", oracle(name)["right_tokens"], oracle(name)["right_mask"])
    assert logits.shape == (3, 3) and np.isfinite(logits).all()


def test_a_new_masked_lm_head():
    model = models.load(ENCODERS / "bert_embedding", head=Head("masked-lm"), key=jax.random.key(0))
    parts = ("bias", "dense.bias", "dense.kernel", "norm.bias", "norm.scale")
    assert model.head_paths == tuple(f"predictor.{part}" for part in parts)
    assert (models.by_path(model.params)["predictor.norm.scale"] == 1).all()


def test_part_of_a_head_is_no_head(tmp_path):
    def change(tensors):
        del tensors["bert.pooler.dense.bias"]
        return tensors

    folder = rewritten(tmp_path, "bert_classification", change, architectures=["BertModel"])
    with pytest.raises(WeightsError, match=r"\(1 tensors\):\n  missing: bert.pooler.dense.bias"):
        models.load(folder, head=CLASSES, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert_embedding", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("bert_embedding", {"is_decoder": True}, "is_decoder=True"),
        ("bert_masked-lm", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("roberta_embedding", {"hidden_act": "swish"}, "hidden_act 'swish'.*'gelu'"),
        ("distilbert_embedding", {"activation": "swish"}, "activation 'swish'.*'gelu'"),
        ("bert_embedding", {"architectures": ["BertForTokenClassification"]}, "only embedding, "),
        ("bert_embedding", {"architectures": ["BertLMHeadModel"]}, "only embedding, masked-lm"),
    ],
)
def test_what_the_code_does_not_do_is_refused(tmp_path, name, fields, message):
    folder = rewritten(tmp_path, name, lambda tensors: tensors, **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        models.load(folder)


def test_calls_that_the_head_cannot_answer():
    tokens = np.zeros((1, 4), np.int32)
    for name, method in (
        ("bert_classification", "__call__"),
        ("bert_masked-lm", "classify"),
        ("bert_embedding", "classify"),
    ):
        with pytest.raises(ValueError, match=r"has no .* head; load it with one"):
            ran(encoder(name), method, tokens)


# Sizes of the base models that the authors published, with the pooler where there is one.
PUBLISHED = [
    (BertConfig.bert_base(), 109_482_240),
    (BertConfig.bert_base(cased=True), 108_310_272),
    (BertConfig.bert_large(), 335_141_888),
    (BertConfig.bert_large(cased=True), 333_579_264),
    (BertConfig.roberta_base(), 124_645_632),
    (BertConfig.roberta_large(), 355_359_744),
    (BertConfig.distilbert_base(), 66_362_880),
    (BertConfig.distilbert_base(cased=True), 65_190_912),
]


@pytest.mark.parametrize(("config", "size"), PUBLISHED)
def test_published_sizes_and_config_round_trip(config, size):
    module = models.FAMILIES[config.model_type].module
    for kind in KINDS:
        head = CLASSES if kind == "classification" else Head(kind)
        abstract = nnx.eval_shape(lambda head=head: module.build(jax.random.key(0), config, head))
        arrays = models.by_path(nnx.state(abstract))
        if kind == "embedding":
            assert sum(array.size for array in arrays.values()) == size
        assert {row.path for row in module.rows(config, head)} == arrays.keys()
        written = json.loads(json.dumps(config.to_hf(head)))
        assert models.FAMILIES[written["model_type"]].config.from_hf(written) == config


def test_create():
    config = BertConfig(50, 2, 64, 4, 128, 32)
    model = models.create("bert", config, jax.random.key(0))
    assert model.head == Head("embedding")
    for path, array in models.by_path(model.params).items():
        if path.endswith(("kernel", "table")):
            assert np.asarray(array).std() == pytest.approx(0.02, rel=0.15), path
    with pytest.raises(ValueError, match="bert has no head 'causal-lm'"):
        models.create("bert", config, jax.random.key(0), head=Head())
    with pytest.raises(ValueError, match="width 64 is not divisible by num_heads 5"):
        models.create("bert", BertConfig(width=64, num_heads=5), jax.random.key(0))


# ------------------------------------------------------------------------------------ adapters


PARTS = {
    "attention": ("attn.k", "attn.out", "attn.q", "attn.v"),
    "qv": ("attn.q", "attn.v"),
    "all-linear": ("attn.k", "attn.out", "attn.q", "attn.v", "mlp.down", "mlp.up"),
}


@every_family
def test_adapters_learn(family):
    model, o = encoder(f"{family}_classification"), oracle(f"{family}_classification")
    for preset, parts in PARTS.items():
        method = METHODS["lora"](rank=2, alpha=4.0, targets=preset)
        graphdef, trainable, frozen = method.split(jax.random.key(0), model)
        factors = {p for p in models.by_path(trainable) if p.endswith("adapter.b")}
        assert factors == {f"blocks.{part}.adapter.b" for part in parts}

    def loss(trainable):  # of the last preset, which has the others' layers
        net = nnx.merge(graphdef, trainable, frozen)
        return jnp.square(net.classify(o["right_tokens"], o["right_mask"])).sum()

    gradient = models.by_path(jax.jit(jax.grad(loss))(trainable))
    assert all(np.abs(gradient[path]).max(axis=(1, 2)).min() > 0 for path in factors)


@every_model
def test_live_pytorch(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model, o = encoder(name), oracle(name)
    noise = jax.tree.map(lambda x: x * 1.2 + 0.05, model.params)
    models.save(tmp_path, model, noise)
    kind = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(transformers, kind).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    tokens, mask = o["right_tokens"], o["right_mask"]
    with torch.no_grad():
        out = theirs.eval()(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long())
    method = {"embedding": "hidden", "masked-lm": "__call__", "classification": "classify"}
    ours = ran(model._replace(params=noise), method[model.head.kind], tokens, mask)
    if model.head.kind == "classification":
        return assert_close(ours, out.logits.numpy(), atol=2e-4)
    expected = out.logits if model.head.kind == "masked-lm" else out.last_hidden_state
    ours = ours[0] if model.head.kind == "embedding" else ours
    real = mask.astype(bool)
    return assert_close(ours[real], expected.numpy()[real], atol=2e-4)
