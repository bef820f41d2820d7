"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, GELU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import Context, attend
from jax_lowrank.models.decoder import Decoder
from jax_lowrank.models.head import Classifier, Head
from jax_lowrank.models.layers import (
    Array,
    Embedding,
    LayerNorm,
    Linear,
    gelu,
    gelu_tanh,
)
from jax_lowrank.models.weights import Row, UnsupportedModelError

ACTIVATIONS = {"gelu_new": gelu_tanh, "gelu": gelu, "relu": jax.nn.relu}

# kind of head -> end of the class name in transformers
HEADS = {"causal-lm": "LMHeadModel", "classification": "ForSequenceClassification"}
# Where their tensors begin in a checkpoint.
HEAD_TENSORS = ("lm_head.", "score.")


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of one GPT-2. The defaults are the 124 M model."""

    vocab_size: int = 50257
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 1024
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    tied: bool = True

    @classmethod
    def small(cls) -> GPT2Config:
        """124 M parameters."""
        return cls()

    @classmethod
    def medium(cls) -> GPT2Config:
        """355 M parameters."""
        return cls(num_layers=24, width=1024, num_heads=16, mlp_width=4096)

    @classmethod
    def large(cls) -> GPT2Config:
        """774 M parameters."""
        return cls(num_layers=36, width=1280, num_heads=20, mlp_width=5120)

    @classmethod
    def xl(cls) -> GPT2Config:
        """1.5 B parameters."""
        return cls(num_layers=48, width=1600, num_heads=25, mlp_width=6400)

    @classmethod
    def from_hf(cls, config: Mapping) -> GPT2Config:
        """Read a Hugging Face config.json; what this family cannot express is refused."""
        for field, only in (
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
        ):
            if config.get(field, only) != only:
                raise UnsupportedModelError(
                    f"{field}={config[field]} is not supported; only {only}"
                )
        activation = config.get("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"activation_function {activation!r} is not supported; one of {list(ACTIVATIONS)}"
            )
        return cls(
            vocab_size=config["vocab_size"],
            num_layers=config["n_layer"],
            width=config["n_embd"],
            num_heads=config["n_head"],
            mlp_width=config.get("n_inner") or 4 * config["n_embd"],
            max_positions=config["n_positions"],
            activation=activation,
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
            tied=config.get("tie_word_embeddings", True),
        )

    def to_hf(self, head: Head) -> dict:
        """The config.json that `from_hf` and transformers read back."""
        return {
            "model_type": "gpt2",
            **head.to_hf("GPT2" + HEADS[head.kind]),
            "vocab_size": self.vocab_size,
            "n_layer": self.num_layers,
            "n_embd": self.width,
            "n_head": self.num_heads,
            "n_inner": self.mlp_width,
            "n_positions": self.max_positions,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.norm_eps,
            "tie_word_embeddings": self.tied,
        }


class Attention(nnx.Module):
    """Multi-head attention with one fused projection to queries, keys and values."""

    def __init__(self, keys, config: GPT2Config, dtype):
        c, stack = config, (config.num_layers,)
        self.qkv = Linear(next(keys), c.width, 3 * c.width, stack=stack, dtype=dtype)
        std = 0.02 / (2 * c.num_layers) ** 0.5
        self.out = Linear(next(keys), c.width, c.width, stack=stack, std=std, dtype=dtype)
        self.num_heads = c.num_heads

    def __call__(self, x: Array, context: Context, kv, layer):
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x, context.key), 3, axis=-1))
        mixed, kv = attend(q, k, v, context, kv, layer)
        return self.out(mixed.reshape(x.shape), context.key), kv


class MLP(nnx.Module):
    """Two layers with an activation between them."""

    def __init__(self, keys, config: GPT2Config, dtype):
        c, stack = config, (config.num_layers,)
        self.up = Linear(next(keys), c.width, c.mlp_width, stack=stack, dtype=dtype)
        std = 0.02 / (2 * c.num_layers) ** 0.5
        self.down = Linear(next(keys), c.mlp_width, c.width, stack=stack, std=std, dtype=dtype)
        self.activation = c.activation

    def __call__(self, x: Array, key: Array | None) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x, key)), key)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, keys, config: GPT2Config, dtype):
        norm = {"stack": (config.num_layers,), "eps": config.norm_eps, "dtype": dtype}
        self.norm1 = LayerNorm(config.width, **norm)
        self.attn = Attention(keys, config, dtype)
        self.norm2 = LayerNorm(config.width, **norm)
        self.mlp = MLP(keys, config, dtype)

    def __call__(self, x: Array, context: Context, kv, layer):
        mixed, kv = self.attn(self.norm1(x), context, kv, layer)
        x = x + mixed
        return x + self.mlp(self.norm2(x), context.key), kv


def build(key: Array, config: GPT2Config, head: Head, dtype=jnp.float32) -> Decoder:
    """A randomly initialised GPT-2 with N(0, 0.02²) weights, scaled on the residual path."""
    c = config
    if c.width % c.num_heads:
        raise ValueError(f"width {c.width} is not divisible by num_heads {c.num_heads}")
    own_table = not c.tied and not head.labels
    keys = iter(jax.random.split(key, 8))
    return Decoder(
        embed=Embedding(next(keys), c.vocab_size, c.width, dtype=dtype),
        position=Embedding(next(keys), c.max_positions, c.width, std=0.01, dtype=dtype),
        blocks=Block(keys, c, dtype),
        norm=LayerNorm(c.width, eps=c.norm_eps, dtype=dtype),
        head=Embedding(next(keys), c.vocab_size, c.width, dtype=dtype) if own_table else None,
        classifier=Classifier(keys, c.width, len(head.labels), dtype=dtype)
        if head.labels
        else None,
        cache_shape=(c.num_layers, c.num_heads, c.width // c.num_heads),
        window=None,
    )


def rows(config: GPT2Config, head: Head) -> list[Row]:
    """Names of the tensors in a Hugging Face checkpoint. Its Conv1D weights are (in, out)."""
    table = [
        Row("transformer.wte.weight", "embed.table"),
        Row("transformer.wpe.weight", "position.table"),
        Row("transformer.ln_f.weight", "norm.scale"),
        Row("transformer.ln_f.bias", "norm.bias"),
    ]
    if head.labels:
        table.append(Row("score.weight", "classifier.out.kernel", transpose=True))
    elif not config.tied:
        table.append(Row("lm_head.weight", "head.table"))
    for theirs, ours in (("ln_1", "norm1"), ("ln_2", "norm2")):
        table.append(Row(f"transformer.h.{{l}}.{theirs}.weight", f"blocks.{ours}.scale"))
        table.append(Row(f"transformer.h.{{l}}.{theirs}.bias", f"blocks.{ours}.bias"))
    linears = {
        "attn.c_attn": "attn.qkv",
        "attn.c_proj": "attn.out",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
    for theirs, ours in linears.items():
        table.append(Row(f"transformer.h.{{l}}.{theirs}.weight", f"blocks.{ours}.kernel"))
        table.append(Row(f"transformer.h.{{l}}.{theirs}.bias", f"blocks.{ours}.bias"))
    return table


# `qv` is the fused projection, as in PEFT: GPT-2 has no separate query and value matrices.
PRESETS = {
    "all-linear": r"blocks\.(attn|mlp)\..*",
    "attention": r"blocks\.attn\..*",
    "qv": r"blocks\.attn\.qkv",
}
