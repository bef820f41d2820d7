"""OPT (Zhang et al. 2022): learned positions, LayerNorm before each part, ReLU.

The 350M model is the exception: LayerNorm after each part, no final one, and embeddings of half the
width with a projection in and out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import Context, attend
from jax_lowrank.models.decoder import Decoder
from jax_lowrank.models.head import Classifier, Head
from jax_lowrank.models.layers import Array, Embedding, LayerNorm, Linear, gelu
from jax_lowrank.models.weights import Row, UnsupportedModelError

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": gelu}
# kind of head -> end of the class name in transformers
HEADS = {"causal-lm": "ForCausalLM", "classification": "ForSequenceClassification"}
# Where their tensors begin in a checkpoint.
HEAD_TENSORS = ("lm_head.", "score.")
OFFSET = 2  # the first two rows of the position table belong to no position


@dataclass(frozen=True)
class OPTConfig:
    """Sizes of one OPT. The defaults are the 125 M model."""

    vocab_size: int = 50272
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 2048
    embed_width: int = 768
    activation: str = "relu"
    norm_first: bool = True
    final_norm: bool = True
    bias: bool = True
    tied: bool = True

    @classmethod
    def opt_125m(cls) -> OPTConfig:
        """125 M parameters."""
        return cls()

    @classmethod
    def opt_350m(cls) -> OPTConfig:
        """331 M parameters: norms after, embeddings of width 512."""
        sizes = {"num_layers": 24, "width": 1024, "num_heads": 16, "mlp_width": 4096}
        return cls(**sizes, embed_width=512, norm_first=False, final_norm=False)

    @classmethod
    def opt_1_3b(cls) -> OPTConfig:
        """1.3 B parameters."""
        return cls(num_layers=24, width=2048, num_heads=32, mlp_width=8192, embed_width=2048)

    @classmethod
    def opt_2_7b(cls) -> OPTConfig:
        """2.7 B parameters."""
        return cls(num_layers=32, width=2560, num_heads=32, mlp_width=10240, embed_width=2560)

    @classmethod
    def opt_6_7b(cls) -> OPTConfig:
        """6.7 B parameters."""
        return cls(num_layers=32, width=4096, num_heads=32, mlp_width=16384, embed_width=4096)

    @classmethod
    def opt_13b(cls) -> OPTConfig:
        """13 B parameters."""
        return cls(num_layers=40, width=5120, num_heads=40, mlp_width=20480, embed_width=5120)

    @classmethod
    def from_hf(cls, config: Mapping) -> OPTConfig:
        """Read a Hugging Face config.json; what this family cannot express is refused."""
        if not config.get("layer_norm_elementwise_affine", True):
            raise UnsupportedModelError(
                "layer_norm_elementwise_affine=False is not supported; only True"
            )
        activation = config.get("activation_function", "relu")
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"activation_function {activation!r} is not supported; one of {list(ACTIVATIONS)}"
            )
        norm_first = config.get("do_layer_norm_before", True)
        return cls(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            mlp_width=config["ffn_dim"],
            max_positions=config["max_position_embeddings"],
            embed_width=config.get("word_embed_proj_dim") or config["hidden_size"],
            activation=activation,
            norm_first=norm_first,
            final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
            bias=config.get("enable_bias", True),
            tied=config.get("tie_word_embeddings", True),
        )

    def to_hf(self, head: Head) -> dict:
        """The config.json that `from_hf` and transformers read back."""
        return {
            "model_type": "opt",
            **head.to_hf("OPT" + HEADS[head.kind]),
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.width,
            "num_attention_heads": self.num_heads,
            "ffn_dim": self.mlp_width,
            "max_position_embeddings": self.max_positions,
            "word_embed_proj_dim": self.embed_width,
            "activation_function": self.activation,
            "do_layer_norm_before": self.norm_first,
            "_remove_final_layer_norm": self.norm_first and not self.final_norm,
            "enable_bias": self.bias,
            "layer_norm_elementwise_affine": True,
            "tie_word_embeddings": self.tied,
        }


class Position(Embedding):
    """Learned positions (max_positions + OFFSET, D)."""

    def __call__(self, positions: Array) -> Array:
        return super().__call__(positions + OFFSET)


class Attention(nnx.Module):
    """Multi-head attention."""

    def __init__(self, keys, config: OPTConfig, dtype):
        c = config
        kw = {"stack": (c.num_layers,), "bias": c.bias, "dtype": dtype}
        self.q, self.k, self.v, self.out = (
            Linear(next(keys), c.width, c.width, **kw) for _ in range(4)
        )
        self.num_heads = c.num_heads

    def __call__(self, x: Array, context: Context, kv, layer):
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (f(x, context.key).reshape(heads) for f in (self.q, self.k, self.v))
        mixed, kv = attend(q, k, v, context, kv, layer)
        return self.out(mixed.reshape(x.shape), context.key), kv


class MLP(nnx.Module):
    """Two layers with an activation between them."""

    def __init__(self, keys, config: OPTConfig, dtype):
        c = config
        kw = {"stack": (c.num_layers,), "bias": c.bias, "dtype": dtype}
        self.up = Linear(next(keys), c.width, c.mlp_width, **kw)
        self.down = Linear(next(keys), c.mlp_width, c.width, **kw)
        self.activation = c.activation

    def __call__(self, x: Array, key: Array | None) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x, key)), key)


class Block(nnx.Module):
    """x + part(norm(x)) for attention and then the MLP, or norm(x + part(x)) in the 350M model."""

    def __init__(self, keys, config: OPTConfig, dtype):
        norm = {"stack": (config.num_layers,), "eps": 1e-5, "dtype": dtype}
        self.norm1 = LayerNorm(config.width, **norm)
        self.attn = Attention(keys, config, dtype)
        self.norm2 = LayerNorm(config.width, **norm)
        self.mlp = MLP(keys, config, dtype)
        self.norm_first = config.norm_first

    def __call__(self, x: Array, context: Context, kv, layer):
        if self.norm_first:
            mixed, kv = self.attn(self.norm1(x), context, kv, layer)
            x = x + mixed
            return x + self.mlp(self.norm2(x), context.key), kv
        mixed, kv = self.attn(x, context, kv, layer)
        x = self.norm1(x + mixed)
        return self.norm2(x + self.mlp(x, context.key)), kv


def build(key: Array, config: OPTConfig, head: Head, dtype=jnp.float32) -> Decoder:
    """A randomly initialised OPT with N(0, 0.02²) weights."""
    c = config
    if c.width % c.num_heads:
        raise ValueError(f"width {c.width} is not divisible by num_heads {c.num_heads}")
    if c.final_norm and not c.norm_first:
        raise ValueError("final_norm without norm_first: OPT has no such variant")
    keys = iter(jax.random.split(key, 11))
    block_keys = iter(jax.random.split(next(keys), 6))
    projected, own_table = c.embed_width != c.width, not c.tied and not head.labels
    linear = {"bias": False, "dtype": dtype}
    return Decoder(
        embed=Embedding(next(keys), c.vocab_size, c.embed_width, dtype=dtype),
        position=Position(next(keys), c.max_positions + OFFSET, c.width, dtype=dtype),
        project_in=Linear(next(keys), c.embed_width, c.width, **linear) if projected else None,
        blocks=Block(block_keys, c, dtype),
        norm=LayerNorm(c.width, eps=1e-5, dtype=dtype) if c.final_norm else None,
        project_out=Linear(next(keys), c.width, c.embed_width, **linear) if projected else None,
        head=Embedding(next(keys), c.vocab_size, c.embed_width, dtype=dtype) if own_table else None,
        classifier=Classifier(keys, c.embed_width, len(head.labels), dtype=dtype)
        if head.labels
        else None,
        cache_shape=(c.num_layers, c.num_heads, c.width // c.num_heads),
        window=None,
    )


def rows(config: OPTConfig, head: Head) -> list[Row]:
    """Names of the tensors in a Hugging Face checkpoint, whose Linear weights are (out, in)."""
    body, layer = "model.decoder.", "model.decoder.layers.{l}."
    table = [
        Row(body + "embed_tokens.weight", "embed.table"),
        Row(body + "embed_positions.weight", "position.table"),
    ]
    if config.embed_width != config.width:
        table.append(Row(body + "project_in.weight", "project_in.kernel", transpose=True))
        table.append(Row(body + "project_out.weight", "project_out.kernel", transpose=True))
    if config.final_norm:
        table.append(Row(body + "final_layer_norm.weight", "norm.scale"))
        table.append(Row(body + "final_layer_norm.bias", "norm.bias"))
    if head.labels:
        table.append(Row("score.weight", "classifier.out.kernel", transpose=True))
    elif not config.tied:
        table.append(Row("lm_head.weight", "head.table"))
    for theirs, ours in (("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2")):
        table.append(Row(f"{layer}{theirs}.weight", f"blocks.{ours}.scale"))
        table.append(Row(f"{layer}{theirs}.bias", f"blocks.{ours}.bias"))
    linears = {
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.out_proj": "attn.out",
        "fc1": "mlp.up",
        "fc2": "mlp.down",
    }
    for theirs, ours in linears.items():
        table.append(Row(f"{layer}{theirs}.weight", f"blocks.{ours}.kernel", transpose=True))
        if config.bias:
            table.append(Row(f"{layer}{theirs}.bias", f"blocks.{ours}.bias"))
    return table


# `all-linear` takes the 350M model's two projections along, as in PEFT.
PRESETS = {
    "all-linear": r"blocks\.(attn|mlp)\..*|project_(in|out)",
    "attention": r"blocks\.attn\..*",
    "qv": r"blocks\.attn\.(q|v)",
}
