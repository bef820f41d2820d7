"""Model families against PyTorch: logits, hidden states, likelihoods, greedy text, causality."""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax
from tiny import FIXTURES, NAMES, apply_of, assert_close, logits_of, model_of, oracle_of, same_bytes

from jax_lowrank import infer, models
from jax_lowrank.models import weights
from jax_lowrank.models.gpt2 import GPT2Config
from jax_lowrank.models.head import Head
from jax_lowrank.models.llama import LlamaConfig
from jax_lowrank.models.opt import OPTConfig

# The others differ from these in nothing that a cache could get wrong.
CACHED = ("gpt2", "llama_tied", "mistral_window", "opt_350m", "qwen2")
SHARDED = ("llama_llama3_sharded", "llama_tied_sharded")
NEW = 16


def folders():
    return sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def test_every_folder_is_tested():
    assert folders() == sorted(NAMES + SHARDED)


@functools.partial(jax.jit, static_argnames="graphdef")
def forward(graphdef, params, tokens):
    """Logits, states before each block, final normed state and nll of full rows."""
    net = nnx.merge(graphdef, params)
    last, before, _ = net.hidden(tokens)
    return net(tokens), before, net.final(last), net.nll(tokens)


@pytest.mark.parametrize("name", NAMES + SHARDED)
def test_logits_hidden_states_and_nll(name):
    model, oracle = model_of(name), oracle_of(name.removesuffix("_sharded"))
    logits, before, final, nll = forward(model.graphdef, model.params, oracle["tokens"])
    assert logits.dtype == nll.dtype == jnp.float32
    assert_close(logits, oracle["logits"])
    assert_close(before, oracle["hidden"][:2])  # embedding and what leaves the first block
    assert_close(final, oracle.get("final", oracle["hidden"][-1]))
    log_probs = log_softmax(oracle["logits"][:, :-1].astype(np.float64), axis=-1)
    expected = -np.take_along_axis(log_probs, oracle["tokens"][:, 1:, None], axis=-1)[..., 0]
    assert_close(nll[:, 1:], expected)
    assert not np.asarray(nll[:, 0]).any()


@pytest.mark.parametrize("name", SHARDED)
def test_shards_give_the_same_bits(name):
    assert same_bytes(model_of(name).params, model_of(name.removesuffix("_sharded")).params)


def test_config_of_transformers_4(tmp_path):
    folder = FIXTURES / "llama_llama3"
    old, new = (json.loads((folder / f).read_text()) for f in ("config_v4.json", "config.json"))
    assert "rope_scaling" in old and "rope_parameters" not in old
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new)
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    model, oracle = models.load(tmp_path), oracle_of("llama_llama3")
    assert model.config.rope_scaling.kind == "llama3" and model.config.rope_theta == 20.0
    assert_close(forward(model.graphdef, model.params, oracle["tokens"])[0], oracle["logits"])


def grown(oracle):
    """The left-padded batch with PyTorch's greedy tokens behind it, and its mask (B, S + NEW)."""
    tokens = np.concatenate([oracle["left_tokens"], oracle["greedy"]], axis=1)
    mask = np.concatenate([oracle["left_mask"], np.ones_like(oracle["greedy"])], axis=1)
    return tokens, mask.astype(bool)


@functools.partial(jax.jit, static_argnames="graphdef")
def stepwise(graphdef, params, tokens, mask):
    """Logits after the prompt and after each new token but the last, from the cache (NEW, B, V)."""
    net = nnx.merge(graphdef, params)
    length = tokens.shape[1] - NEW
    cache = net.new_cache(len(tokens), tokens.shape[1])
    first, cache = net.step(tokens[:, :length], mask[:, :length], cache)

    def step(cache, token):
        logits, cache = net.step(token[:, None], None, cache)
        return cache, logits

    _, rest = jax.lax.scan(step, cache, tokens[:, length:-1].T)
    return jnp.concatenate([first[None], rest])


@pytest.mark.parametrize("name", NAMES)
def test_left_padding_greedy_text_and_cache(name):
    model, oracle = model_of(name), oracle_of(name)
    tokens, mask = grown(oracle)
    length = tokens.shape[1] - NEW
    full = np.asarray(logits_of(model.graphdef, (model.params,), tokens, mask))
    real = oracle["left_mask"].astype(bool)
    assert_close(full[:, :length][real], oracle["left_logits"][real])
    # One pass over the whole rows, no cache: each greedy token is the likeliest one.
    np.testing.assert_array_equal(full[:, length - 1 : -1].argmax(-1), oracle["greedy"])
    if name not in CACHED:
        return
    cached = stepwise(model.graphdef, model.params, tokens, mask)
    assert_close(cached, full[:, length - 1 : -1].swapaxes(0, 1))
    drawn = infer.generate(
        apply_of(model.graphdef),
        (model.params,),
        oracle["left_tokens"],
        real,
        jax.random.split(jax.random.key(0), len(tokens)),
        max_new_tokens=NEW,
        sampling=infer.Sampling(temperature=0.0),
        eos_id=None,
        pad_id=0,
    )
    np.testing.assert_array_equal(drawn, oracle["greedy"])


@pytest.mark.parametrize("name", NAMES)
def test_right_padding(name):
    model, oracle = model_of(name), oracle_of(name)
    mask = np.arange(24)[None] < np.array([24, 19, 13])[:, None]
    tokens = np.where(mask, oracle["tokens"], 0)
    logits = np.asarray(logits_of(model.graphdef, (model.params,), tokens, mask))
    assert_close(logits[mask], oracle["logits"][mask])


@functools.partial(jax.jit, static_argnames="graphdef")
def sensitivity(graphdef, params, mask):
    """max |d hidden[t] / d embedding[u]| (t, u) over directions, for a row of distinct tokens."""
    tokens = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    directions = jax.random.normal(jax.random.key(0), (mask.shape[1], model_width(params)))

    def projected(table):
        net = nnx.merge(graphdef, params)
        net.embed.table = nnx.Param(table)  # each position has its own row of it
        last, _, _ = net.hidden(tokens, mask)
        return (net.final(last)[0] * directions).sum(-1)

    table = models.by_path(params)["embed.table"]
    return jnp.abs(jax.jacrev(projected)(table)).max(-1)[:, : mask.shape[1]]


def model_width(params):
    return models.by_path(params)["embed.table"].shape[1]


@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "mistral_window", "mistral_full", "opt"])
@pytest.mark.parametrize("pads", [0, 5])
def test_causality_by_gradient(name, pads):
    model, size = model_of(name), 24
    mask = np.arange(size)[None] >= pads
    reach = np.asarray(sensitivity(model.graphdef, model.params, mask))[pads:]
    t, u = np.arange(pads, size)[:, None], np.arange(size)[None]
    window = model.config.window if name.startswith("mistral") else None
    # Two layers, each of which looks back on a token and the window - 1 before it.
    farthest = size if window is None else 2 * (window - 1)
    visible = (u <= t) & (u >= pads) & (t - u <= farthest)
    assert name != "mistral_window" or (t - u > farthest).any()
    assert (reach[~visible] == 0).all(), "the future, a pad or what lies beyond the window is seen"
    assert (reach[visible] > 0).all(), "something that should be seen is not"


def test_causality_without_a_mask():
    # Rows without padding take another path (is_causal): same bits of truth.
    model = model_of("gpt2")
    tokens = np.array(oracle_of("gpt2")["tokens"])
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    one, other = (forward(model.graphdef, model.params, x)[0] for x in (tokens, changed))
    np.testing.assert_array_equal(one[:, :12], other[:, :12])
    assert np.abs(one[:, 12:] - other[:, 12:]).min(axis=(0, 2)).max() > 0


def test_remat_changes_nothing():
    model, tokens = model_of("gpt2"), oracle_of("gpt2")["tokens"]

    def gradient(remat):
        def loss(params):
            net = nnx.merge(model.graphdef, params)
            net.remat = remat
            return net.nll(tokens).sum()

        return jax.jit(jax.grad(loss)).trace(model.params)

    plain, remat, offload = gradient("dots"), gradient("full"), gradient("offload")
    assert "<host>" in str(offload.jaxpr) and "<host>" not in str(plain.jaxpr)
    one, two, three = (traced.lower().compile() for traced in (plain, remat, offload))
    assert two.cost_analysis()["flops"] > 1.1 * one.cost_analysis()["flops"]
    expected = one(model.params)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(expected))
    chex.assert_trees_all_close(expected, two(model.params), atol=1e-5)
    chex.assert_trees_all_close(expected, three(model.params), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_export_gives_the_same_tensors(name, tmp_path):
    from safetensors.numpy import load_file

    model = model_of(name)
    models.save(tmp_path / "out", model, model.params)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(FIXTURES / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert ours[key].tobytes() == value.tobytes(), key
    again = models.load(tmp_path / "out")
    assert again.config == model.config and again.family == model.family
    assert same_bytes(again.params, model.params)


# Sizes that the authors published, in parameters.
PUBLISHED = [
    ("gpt2", GPT2Config.small(), 124_439_808),
    ("gpt2", GPT2Config.medium(), 354_823_168),
    ("gpt2", GPT2Config.large(), 774_030_080),
    ("gpt2", GPT2Config.xl(), 1_557_611_200),
    ("llama", LlamaConfig.llama1_7b(), 6_738_415_616),
    ("llama", LlamaConfig.llama2_7b(), 6_738_415_616),
    ("llama", LlamaConfig.llama2_13b(), 13_015_864_320),
    ("llama", LlamaConfig.llama3_8b(), 8_030_261_248),
    ("llama", LlamaConfig.llama31_8b(), 8_030_261_248),
    ("llama", LlamaConfig.llama32_1b(), 1_235_814_400),
    ("llama", LlamaConfig.llama32_3b(), 3_212_749_824),
    ("mistral", LlamaConfig.mistral_7b(), 7_241_732_096),
    ("mistral", LlamaConfig.mistral_7b_v2(), 7_241_732_096),
    ("mistral", LlamaConfig.mistral_7b_v3(), 7_248_023_552),
    ("opt", OPTConfig.opt_125m(), 125_239_296),
    ("opt", OPTConfig.opt_350m(), 331_196_416),
    ("opt", OPTConfig.opt_1_3b(), 1_315_758_080),
    ("opt", OPTConfig.opt_2_7b(), 2_651_596_800),
    ("opt", OPTConfig.opt_6_7b(), 6_658_473_984),
    ("opt", OPTConfig.opt_13b(), 12_853_473_280),
    ("qwen2", LlamaConfig.qwen25_05b(), 494_032_768),
    ("qwen2", LlamaConfig.qwen25_15b(), 1_543_714_304),
    ("qwen2", LlamaConfig.qwen25_7b(), 7_615_616_512),
]


@pytest.mark.parametrize(("family", "config", "size"), PUBLISHED)
def test_published_sizes_and_config_round_trip(family, config, size):
    module = models.FAMILIES[family].module
    abstract = nnx.eval_shape(lambda: module.build(jax.random.key(0), config, Head()))
    arrays = models.by_path(nnx.state(abstract))
    assert sum(array.size for array in arrays.values()) == size
    assert {row.path for row in module.rows(config, Head())} == arrays.keys()
    written = json.loads(json.dumps(config.to_hf(Head())))
    assert models.FAMILIES[written["model_type"]].config.from_hf(written) == config


@pytest.mark.parametrize(("family", "config", "size"), PUBLISHED)
def test_live_names_and_shapes_of_published_sizes(family, config, size):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = config.to_hf(Head())
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert sum(map(math.prod, expected.values())) == size
    module = models.FAMILIES[family].module
    abstract = nnx.eval_shape(lambda: module.build(jax.random.key(0), config, Head()))
    arrays = models.by_path(nnx.state(abstract))
    ours = {}
    for name, row, layer in weights.expand(module.rows(config, Head()), arrays):
        shape = arrays[row.path].shape[0 if layer is None else 1 :]
        ours[name] = shape[::-1] if row.transpose else shape
    assert ours == expected


def test_qwen2_windows():
    fields = LlamaConfig.qwen25_05b().to_hf(Head())

    def window(**changed):
        return LlamaConfig.from_hf({**fields, "sliding_window": 9, **changed}).window

    on = {"use_sliding_window": True}
    assert window(**on, max_window_layers=0) == 9
    assert window(**on, max_window_layers=24) is None and window(**on, max_window_layers=28) is None
    assert window(use_sliding_window=False) is None  # as the published ones have it
    assert window(**on, sliding_window=None) is None
    assert window(**on, max_window_layers=0, layer_types=["full_attention"] * 24) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_create(dtype):
    config = GPT2Config(vocab_size=50, num_layers=2, width=64, num_heads=4, mlp_width=128)
    model = models.create("gpt2", config, jax.random.key(0), dtype)
    arrays = models.by_path(model.params)
    assert {a.dtype for a in arrays.values()} == {jnp.dtype(dtype)}
    kernels = {k: np.asarray(v, np.float32) for k, v in arrays.items() if k.endswith("kernel")}
    assert kernels["blocks.attn.qkv.kernel"].std() == pytest.approx(0.02, rel=0.05)
    # The residual path is scaled by 1/sqrt(2 L), so that its variance does not grow with depth.
    assert kernels["blocks.mlp.down.kernel"].std() == pytest.approx(0.01, rel=0.05)
    assert not np.array_equal(*kernels["blocks.attn.qkv.kernel"])
    other = models.create("gpt2", config, jax.random.key(1), dtype)
    assert not same_bytes(model.params, other.params)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    logits = logits_of(model.graphdef, (model.params,), tokens)
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gpt2", GPT2Config(width=30, num_heads=4), "width 30 is not divisible by num_heads 4"),
        ("llama", LlamaConfig(num_heads=4, num_kv_heads=3), "num_heads 4 is not a multiple of"),
        ("qwen2", LlamaConfig(model_type="qwen2"), "attention_bias=False.*qwen2 has no such"),
        ("mistral", LlamaConfig(model_type="mistral", mlp_bias=True), "mistral has no such"),
        ("opt", OPTConfig(num_heads=5), "width 768 is not divisible by num_heads 5"),
        ("opt", OPTConfig(norm_first=False), "final_norm without norm_first"),
    ],
)
def test_sizes_that_do_not_fit(family, config, message):
    with pytest.raises(ValueError, match=message):
        models.create(family, config, jax.random.key(0))


LIVE = ("gpt2", "llama_bias", "llama_tied", "mistral_window", *NAMES[8:])


@pytest.mark.parametrize("name", LIVE)
def test_live_pytorch(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, oracle = model_of(name), oracle_of(name)
    noise = jax.tree.map(lambda x: x * 1.5 + 0.1, model.params)
    models.save(tmp_path, model, noise)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    left = oracle["left_mask"]
    rows = {
        "right": (oracle["tokens"], left[:, ::-1].copy()),
        "left": (oracle["left_tokens"], left),
    }
    rows["none"] = (oracle["tokens"], np.ones_like(left))
    for tokens, mask in rows.values():
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        with torch.no_grad():
            expected = theirs(
                torch.tensor(tokens).long(),
                attention_mask=torch.tensor(mask).long(),
                position_ids=torch.tensor(positions).long(),
            ).logits.numpy()
        ours = np.asarray(logits_of(model.graphdef, (noise,), tokens, mask.astype(bool)))
        assert_close(ours[mask == 1], expected[mask == 1], atol=2e-4)
