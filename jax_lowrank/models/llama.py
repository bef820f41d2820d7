"""Llama 1, 2 and 3 (Touvron et al. 2023; Dubey et al. 2024), Mistral (Jiang et al. 2023), Qwen2.

RMSNorm before each part, rotary positions, SwiGLU, grouped-query attention; Mistral adds a sliding
window, Qwen2 and 2.5 (Yang et al. 2024) biases on queries, keys and values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import Context, attend
from jax_lowrank.models.decoder import Decoder
from jax_lowrank.models.head import Classifier, Head
from jax_lowrank.models.layers import (
    Array,
    Embedding,
    Linear,
    RMSNorm,
    swiglu,
)
from jax_lowrank.models.rotary import (
    UNSCALED,
    RopeScaling,
    inverse_frequencies,
    read_rope,
    rotate,
    write_rope,
)
from jax_lowrank.models.weights import Row, UnsupportedModelError

# kind of head -> end of the class name in transformers
HEADS = {"causal-lm": "ForCausalLM", "classification": "ForSequenceClassification"}
# Where their tensors begin in a checkpoint.
HEAD_TENSORS = ("lm_head.", "score.")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of one Llama. The defaults are Llama-2 7B."""

    vocab_size: int = 32000
    num_layers: int = 32
    width: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 32
    head_width: int = 128
    mlp_width: int = 11008
    max_positions: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = UNSCALED
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    model_type: str = "llama"

    @classmethod
    def llama1_7b(cls) -> LlamaConfig:
        """Llama 7B, the first."""
        return cls(max_positions=2048, norm_eps=1e-6)

    @classmethod
    def llama2_7b(cls) -> LlamaConfig:
        """Llama-2 7B."""
        return cls()

    @classmethod
    def llama2_13b(cls) -> LlamaConfig:
        """Llama-2 13B."""
        return cls(num_layers=40, width=5120, num_heads=40, num_kv_heads=40, mlp_width=13824)

    @classmethod
    def llama3_8b(cls) -> LlamaConfig:
        """Llama-3 8B."""
        return cls(
            vocab_size=128256,
            num_kv_heads=8,
            mlp_width=14336,
            max_positions=8192,
            rope_theta=500000.0,
        )

    @classmethod
    def llama31_8b(cls) -> LlamaConfig:
        """Llama-3.1 8B."""
        scaling = RopeScaling("llama3", factor=8.0)
        return replace(cls.llama3_8b(), max_positions=131072, rope_scaling=scaling)

    @classmethod
    def llama32_1b(cls) -> LlamaConfig:
        """Llama-3.2 1B."""
        return cls(
            vocab_size=128256,
            num_layers=16,
            width=2048,
            num_kv_heads=8,
            head_width=64,
            mlp_width=8192,
            max_positions=131072,
            rope_theta=500000.0,
            rope_scaling=RopeScaling("llama3", factor=32.0),
            tied=True,
        )

    @classmethod
    def llama32_3b(cls) -> LlamaConfig:
        """Llama-3.2 3B."""
        sizes = {"num_layers": 28, "width": 3072, "num_heads": 24, "head_width": 128}
        return replace(cls.llama32_1b(), **sizes)

    @classmethod
    def mistral_7b(cls) -> LlamaConfig:
        """Mistral 7B v0.1, with its sliding window."""
        return cls(
            num_kv_heads=8,
            mlp_width=14336,
            max_positions=32768,
            window=4096,
            model_type="mistral",
        )

    @classmethod
    def mistral_7b_v2(cls) -> LlamaConfig:
        """Mistral 7B v0.2: no window, slower rotation."""
        return replace(cls.mistral_7b(), window=None, rope_theta=1e6)

    @classmethod
    def mistral_7b_v3(cls) -> LlamaConfig:
        """Mistral 7B v0.3: v0.2 with a larger vocabulary."""
        return replace(cls.mistral_7b_v2(), vocab_size=32768)

    @classmethod
    def qwen25_05b(cls) -> LlamaConfig:
        """Qwen2.5 0.5B."""
        return cls(
            vocab_size=151936,
            num_layers=24,
            width=896,
            num_heads=14,
            num_kv_heads=2,
            head_width=64,
            mlp_width=4864,
            max_positions=32768,
            rope_theta=1e6,
            norm_eps=1e-6,
            tied=True,
            attention_bias=True,
            model_type="qwen2",
        )

    @classmethod
    def qwen25_15b(cls) -> LlamaConfig:
        """Qwen2.5 1.5B; Qwen2 1.5B has the same sizes."""
        sizes = {"num_layers": 28, "width": 1536, "num_heads": 12, "head_width": 128}
        return replace(cls.qwen25_05b(), **sizes, mlp_width=8960, max_positions=131072)

    @classmethod
    def qwen25_7b(cls) -> LlamaConfig:
        """Qwen2.5 7B; Qwen2 7B has the same sizes."""
        sizes = {"width": 3584, "num_heads": 28, "num_kv_heads": 4, "mlp_width": 18944}
        return replace(cls.qwen25_15b(), **sizes, vocab_size=152064, tied=False)

    @property
    def out_bias(self) -> bool:
        """Whether the attention's output has a bias like its inputs; not in Qwen2."""
        return self.attention_bias and self.model_type != "qwen2"

    @classmethod
    def from_hf(cls, config: Mapping) -> LlamaConfig:
        """Read a Hugging Face config.json (either layout); what cannot be expressed is refused."""
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(f"hidden_act {config['hidden_act']!r}; only 'silu'")
        theta, scaling = read_rope(config)
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            mlp_width=config["intermediate_size"],
            max_positions=config["max_position_embeddings"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            attention_bias=config["model_type"] == "qwen2" or config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            window=_read_window(config),
            model_type=config["model_type"],
        )

    def to_hf(self, head: Head) -> dict:
        """The config.json that `from_hf` and transformers read back."""
        out = {
            "model_type": self.model_type,
            **head.to_hf(self.model_type.capitalize() + HEADS[head.kind]),
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.mlp_width,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": write_rope(self.rope_theta, self.rope_scaling),
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        }
        if self.model_type == "mistral":
            return {**out, "sliding_window": self.window}
        if self.model_type == "qwen2":
            used = {"use_sliding_window": self.window is not None, "max_window_layers": 0}
            return {**out, **used, "sliding_window": self.window}
        return {**out, "attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}


def _read_window(config: Mapping) -> int | None:
    """The window that every layer has; layers that differ are refused."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    used = config.get("use_sliding_window", config["model_type"] == "mistral")
    if window is None or not used:
        return None
    # Qwen2: the first layers have none.
    windowed = max(0, layers - config.get("max_window_layers", 0))
    if kinds := config.get("layer_types"):
        windowed = kinds.count("sliding_attention")
    if 0 < windowed < layers:
        raise UnsupportedModelError(
            f"{windowed} of {layers} layers have a sliding window; only all or none are supported"
        )
    return window if windowed else None


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, keys, config: LlamaConfig, dtype):
        c = config
        kw = {"stack": (c.num_layers,), "bias": c.attention_bias, "dtype": dtype}
        self.q = Linear(next(keys), c.width, c.num_heads * c.head_width, **kw)
        self.k = Linear(next(keys), c.width, c.num_kv_heads * c.head_width, **kw)
        self.v = Linear(next(keys), c.width, c.num_kv_heads * c.head_width, **kw)
        kw["bias"] = c.out_bias
        self.out = Linear(next(keys), c.num_heads * c.head_width, c.width, **kw)
        self.config = config

    def __call__(self, x: Array, context: Context, kv, layer):
        c, lead, width, key = self.config, x.shape[:2], self.config.head_width, context.key
        frequencies = inverse_frequencies(c.rope_theta, c.rope_scaling, c.head_width)
        q = rotate(self.q(x, key).reshape(*lead, -1, width), context.positions, frequencies)
        k = rotate(self.k(x, key).reshape(*lead, -1, width), context.positions, frequencies)
        v = self.v(x, key).reshape(*lead, -1, width)
        mixed, kv = attend(q, k, v, context, kv, layer)
        return self.out(mixed.reshape(*lead, -1), key), kv


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, keys, config: LlamaConfig, dtype):
        c = config
        kw = {"stack": (c.num_layers,), "bias": c.mlp_bias, "dtype": dtype}
        self.gate = Linear(next(keys), c.width, c.mlp_width, **kw)
        self.up = Linear(next(keys), c.width, c.mlp_width, **kw)
        self.down = Linear(next(keys), c.mlp_width, c.width, **kw)

    def __call__(self, x: Array, key: Array | None) -> Array:
        return self.down(swiglu(self.gate(x, key), self.up(x, key)), key)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, keys, config: LlamaConfig, dtype):
        norm = {"stack": (config.num_layers,), "eps": config.norm_eps, "dtype": dtype}
        self.norm1 = RMSNorm(config.width, **norm)
        self.attn = Attention(keys, config, dtype)
        self.norm2 = RMSNorm(config.width, **norm)
        self.mlp = MLP(keys, config, dtype)

    def __call__(self, x: Array, context: Context, kv, layer):
        mixed, kv = self.attn(self.norm1(x), context, kv, layer)
        x = x + mixed
        return x + self.mlp(self.norm2(x), context.key), kv


def build(key: Array, config: LlamaConfig, head: Head, dtype=jnp.float32) -> Decoder:
    """A randomly initialised Llama with N(0, 0.02²) weights."""
    c = config
    if c.num_heads % c.num_kv_heads:
        raise ValueError(
            f"num_heads {c.num_heads} is not a multiple of num_kv_heads {c.num_kv_heads}"
        )
    if c.model_type != "llama" and (c.attention_bias, c.mlp_bias) != (
        c.model_type == "qwen2",
        False,
    ):
        raise ValueError(
            f"attention_bias={c.attention_bias}, mlp_bias={c.mlp_bias}: {c.model_type} has no such"
            " variant"
        )
    own_table = not c.tied and not head.labels
    keys = iter(jax.random.split(key, 9))
    return Decoder(
        embed=Embedding(next(keys), c.vocab_size, c.width, dtype=dtype),
        position=None,
        blocks=Block(keys, c, dtype),
        norm=RMSNorm(c.width, eps=c.norm_eps, dtype=dtype),
        head=Embedding(next(keys), c.vocab_size, c.width, dtype=dtype) if own_table else None,
        classifier=Classifier(keys, c.width, len(head.labels), dtype=dtype)
        if head.labels
        else None,
        cache_shape=(c.num_layers, c.num_kv_heads, c.head_width),
        window=c.window,
    )


def rows(config: LlamaConfig, head: Head) -> list[Row]:
    """Names of the tensors in a Hugging Face checkpoint, whose Linear weights are (out, in)."""
    table = [
        Row("model.embed_tokens.weight", "embed.table"),
        Row("model.norm.weight", "norm.scale"),
    ]
    if head.labels:
        table.append(Row("score.weight", "classifier.out.kernel", transpose=True))
    elif not config.tied:
        table.append(Row("lm_head.weight", "head.table"))
    layer = "model.layers.{l}."
    table.append(Row(layer + "input_layernorm.weight", "blocks.norm1.scale"))
    table.append(Row(layer + "post_attention_layernorm.weight", "blocks.norm2.scale"))
    linears = [
        ("self_attn.q_proj", "attn.q", config.attention_bias),
        ("self_attn.k_proj", "attn.k", config.attention_bias),
        ("self_attn.v_proj", "attn.v", config.attention_bias),
        ("self_attn.o_proj", "attn.out", config.out_bias),
        ("mlp.gate_proj", "mlp.gate", config.mlp_bias),
        ("mlp.up_proj", "mlp.up", config.mlp_bias),
        ("mlp.down_proj", "mlp.down", config.mlp_bias),
    ]
    for theirs, ours, bias in linears:
        table.append(Row(f"{layer}{theirs}.weight", f"blocks.{ours}.kernel", transpose=True))
        if bias:
            table.append(Row(f"{layer}{theirs}.bias", f"blocks.{ours}.bias"))
    return table


PRESETS = {
    "all-linear": r"blocks\.(attn|mlp)\..*",
    "attention": r"blocks\.attn\..*",
    "qv": r"blocks\.attn\.(q|v)",
}
