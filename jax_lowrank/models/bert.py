"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and DistilBERT (Sanh et al. 2019).

Learned positions, attention to both sides, LayerNorm after each part, GELU. They differ in what
surrounds the blocks: RoBERTa counts positions from behind its padding id, DistilBERT has no token
types and no pooler, and each has its own heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import Context, attend
from jax_lowrank.models.encoder import Encoder, TokenPredictor
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

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
}
# kind of head -> end of the class name in transformers
HEADS = {
    "embedding": "Model",
    "masked-lm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
}
CLASS_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
# Where their tensors begin in a checkpoint.
HEAD_TENSORS = (
    *("cls.", "lm_head.", "vocab_", "classifier.", "pre_classifier."),
    *("bert.pooler.", "roberta.pooler."),
)
# Ours -> the name in config.json, where it is not that of BERT and RoBERTa.
FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
}
DISTIL_FIELDS = {
    **FIELDS,
    "num_layers": "n_layers",
    "width": "dim",
    "num_heads": "n_heads",
    "mlp_width": "hidden_dim",
    "activation": "activation",
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes of one encoder. The defaults are BERT base, uncased."""

    vocab_size: int = 30522
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512  # of real tokens; RoBERTa's table has pad_id + 1 rows more
    num_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pad_id: int = 0
    model_type: str = "bert"

    @classmethod
    def bert_base(cls, cased: bool = False) -> BertConfig:
        """BERT base, 110 M parameters (108 M cased)."""
        return cls(vocab_size=28996 if cased else 30522)

    @classmethod
    def bert_large(cls, cased: bool = False) -> BertConfig:
        """BERT large, 335 M parameters (334 M cased)."""
        return cls(28996 if cased else 30522, 24, 1024, 16, 4096)

    @classmethod
    def roberta_base(cls) -> BertConfig:
        """RoBERTa base, 125 M parameters."""
        return cls(50265, num_types=1, norm_eps=1e-5, pad_id=1, model_type="roberta")

    @classmethod
    def roberta_large(cls) -> BertConfig:
        """RoBERTa large, 355 M parameters."""
        sizes = (50265, 24, 1024, 16, 4096)
        return cls(*sizes, num_types=1, norm_eps=1e-5, pad_id=1, model_type="roberta")

    @classmethod
    def distilbert_base(cls, cased: bool = False) -> BertConfig:
        """DistilBERT base, 66 M parameters (65 M cased)."""
        vocab_size = 28996 if cased else 30522
        return cls(vocab_size, num_layers=6, num_types=0, model_type="distilbert")

    @property
    def first_position(self) -> int:
        """The row of the position table that the first token takes."""
        return self.pad_id + 1 if self.model_type == "roberta" else 0

    @classmethod
    def from_hf(cls, config: Mapping) -> BertConfig:
        """Read a Hugging Face config.json; what this family cannot express is refused."""
        for field, only in (
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
            ("tie_word_embeddings", True),
        ):
            if config.get(field, only) != only:
                raise UnsupportedModelError(
                    f"{field}={config[field]!r} is not supported; only {only!r}"
                )
        kind = config["model_type"]
        fields = DISTIL_FIELDS if kind == "distilbert" else FIELDS
        activation = config.get(fields["activation"], "gelu")
        if activation not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"{fields['activation']} {activation!r} is not supported; one of"
                f" {list(ACTIVATIONS)}"
            )
        new = cls(
            **{ours: config[name] for ours, name in fields.items() if ours != "activation"},
            num_types=0 if kind == "distilbert" else config.get("type_vocab_size", 2),
            activation=activation,
            norm_eps=1e-12 if kind == "distilbert" else config.get("layer_norm_eps", 1e-12),
            pad_id=_pad_id(config),
            model_type=kind,
        )
        return replace(new, max_positions=config["max_position_embeddings"] - new.first_position)

    def to_hf(self, head: Head) -> dict:
        """The config.json that `from_hf` and transformers read back."""
        distil = self.model_type == "distilbert"
        fields = DISTIL_FIELDS if distil else FIELDS
        out = {
            "model_type": self.model_type,
            **head.to_hf(CLASS_NAMES[self.model_type] + HEADS[head.kind]),
            **{name: getattr(self, ours) for ours, name in fields.items()},
            "max_position_embeddings": self.max_positions + self.first_position,
            "pad_token_id": self.pad_id,
            "tie_word_embeddings": True,
        }
        if distil:
            return out
        return {**out, "type_vocab_size": self.num_types, "layer_norm_eps": self.norm_eps}


def _pad_id(config: Mapping) -> int:
    """The padding id of a config.json, or what transformers takes for it."""
    pad = config.get("pad_token_id")
    if pad is None:
        return 1 if config["model_type"] == "roberta" else 0
    return pad


class Attention(nnx.Module):
    """Multi-head attention."""

    def __init__(self, keys, config: BertConfig, dtype):
        c, stack = config, (config.num_layers,)
        self.q = Linear(next(keys), c.width, c.width, stack=stack, dtype=dtype)
        self.k = Linear(next(keys), c.width, c.width, stack=stack, dtype=dtype)
        self.v = Linear(next(keys), c.width, c.width, stack=stack, dtype=dtype)
        self.out = Linear(next(keys), c.width, c.width, stack=stack, dtype=dtype)
        self.num_heads = c.num_heads

    def __call__(self, x: Array, context: Context, kv, layer):
        heads, key = (*x.shape[:2], self.num_heads, -1), context.key
        q, k, v = (part(x, key).reshape(heads) for part in (self.q, self.k, self.v))
        mixed, kv = attend(q, k, v, context, kv, layer)
        return self.out(mixed.reshape(x.shape), key), kv


class MLP(nnx.Module):
    """Two layers with an activation between them."""

    def __init__(self, keys, config: BertConfig, dtype):
        c, stack = config, (config.num_layers,)
        self.up = Linear(next(keys), c.width, c.mlp_width, stack=stack, dtype=dtype)
        self.down = Linear(next(keys), c.mlp_width, c.width, stack=stack, dtype=dtype)
        self.activation = c.activation

    def __call__(self, x: Array, key: Array | None) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x, key)), key)


class Block(nnx.Module):
    """x = norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, keys, config: BertConfig, dtype):
        norm = {"stack": (config.num_layers,), "eps": config.norm_eps, "dtype": dtype}
        self.attn = Attention(keys, config, dtype)
        self.norm1 = LayerNorm(config.width, **norm)
        self.mlp = MLP(keys, config, dtype)
        self.norm2 = LayerNorm(config.width, **norm)

    def __call__(self, x: Array, context: Context, kv, layer):
        mixed, kv = self.attn(x, context, kv, layer)
        x = self.norm1(x + mixed)
        return self.norm2(x + self.mlp(x, context.key)), kv


def has_pooler(config: BertConfig, head: Head) -> bool:
    """Whether there is a dense layer with tanh over the first token, as in transformers."""
    if config.model_type == "bert":
        return head.kind != "masked-lm"
    return config.model_type == "roberta" and head.kind == "embedding"


def build(key: Array, config: BertConfig, head: Head, dtype=jnp.float32) -> Encoder:
    """A randomly initialised encoder with N(0, 0.02²) weights."""
    c = config
    if c.width % c.num_heads:
        raise ValueError(f"width {c.width} is not divisible by num_heads {c.num_heads}")
    keys = iter(jax.random.split(key, 13))
    positions = c.max_positions + c.first_position
    pooler = predictor = classifier = None
    if has_pooler(c, head):
        pooler = Linear(next(keys), c.width, c.width, dtype=dtype)
    if head.kind == "masked-lm":
        # RoBERTa's has the exact gelu whatever its blocks have.
        activation = gelu if c.model_type == "roberta" else ACTIVATIONS[c.activation]
        predictor = TokenPredictor(keys, c.vocab_size, c.width, activation, c.norm_eps, dtype=dtype)
    if head.labels:
        between = {"bert": None, "roberta": jnp.tanh, "distilbert": jax.nn.relu}[c.model_type]
        sizes = (c.width, len(head.labels))
        classifier = Classifier(keys, *sizes, bias=True, between=between, dtype=dtype)
    return Encoder(
        embed=Embedding(next(keys), c.vocab_size, c.width, dtype=dtype),
        position=Embedding(next(keys), positions, c.width, dtype=dtype),
        types=Embedding(next(keys), c.num_types, c.width, dtype=dtype) if c.num_types else None,
        norm=LayerNorm(c.width, eps=c.norm_eps, dtype=dtype),
        blocks=Block(keys, c, dtype),
        pooler=pooler,
        predictor=predictor,
        classifier=classifier,
        first_position=c.first_position,
    )


def rows(config: BertConfig, head: Head) -> list[Row]:
    """Names of the tensors in a Hugging Face checkpoint, whose Linear weights are (out, in)."""
    kind, body = config.model_type, f"{config.model_type}."
    table = [
        Row(body + "embeddings.word_embeddings.weight", "embed.table"),
        Row(body + "embeddings.position_embeddings.weight", "position.table"),
        *_norm(body + "embeddings.LayerNorm", "norm"),
    ]
    if config.num_types:
        table.append(Row(body + "embeddings.token_type_embeddings.weight", "types.table"))
    linears, norms = DISTIL_LAYER if kind == "distilbert" else LAYER
    for theirs, ours in linears.items():
        table += _linear(f"{body}{theirs}", f"blocks.{ours}")
    for theirs, ours in norms.items():
        table += _norm(f"{body}{theirs}", f"blocks.{ours}")
    if has_pooler(config, head):
        table += _linear(body + "pooler.dense", "pooler")
    if head.kind == "masked-lm":
        dense, norm, bias = PREDICTOR[kind]
        table += [*_linear(dense, "predictor.dense"), *_norm(norm, "predictor.norm")]
        table.append(Row(bias, "predictor.bias"))
    if head.labels:
        for theirs, ours in CLASSIFIER[kind].items():
            table += _linear(theirs, f"classifier.{ours}")
    return table


def _linear(theirs: str, ours: str) -> list[Row]:
    return [
        Row(f"{theirs}.weight", f"{ours}.kernel", transpose=True),
        Row(f"{theirs}.bias", f"{ours}.bias"),
    ]


def _norm(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}.weight", f"{ours}.scale"), Row(f"{theirs}.bias", f"{ours}.bias")]


# Linear layers and norms of a block: their names -> ours.
LAYER = (
    {
        "encoder.layer.{l}.attention.self.query": "attn.q",
        "encoder.layer.{l}.attention.self.key": "attn.k",
        "encoder.layer.{l}.attention.self.value": "attn.v",
        "encoder.layer.{l}.attention.output.dense": "attn.out",
        "encoder.layer.{l}.intermediate.dense": "mlp.up",
        "encoder.layer.{l}.output.dense": "mlp.down",
    },
    {
        "encoder.layer.{l}.attention.output.LayerNorm": "norm1",
        "encoder.layer.{l}.output.LayerNorm": "norm2",
    },
)
DISTIL_LAYER = (
    {
        "transformer.layer.{l}.attention.q_lin": "attn.q",
        "transformer.layer.{l}.attention.k_lin": "attn.k",
        "transformer.layer.{l}.attention.v_lin": "attn.v",
        "transformer.layer.{l}.attention.out_lin": "attn.out",
        "transformer.layer.{l}.ffn.lin1": "mlp.up",
        "transformer.layer.{l}.ffn.lin2": "mlp.down",
    },
    {
        "transformer.layer.{l}.sa_layer_norm": "norm1",
        "transformer.layer.{l}.output_layer_norm": "norm2",
    },
)
# The masked-lm head's dense layer, its norm, and its bias for each token.
PREDICTOR = {
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
    ),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
}
CLASSIFIER = {
    "bert": {"classifier": "out"},
    "roberta": {"classifier.dense": "dense", "classifier.out_proj": "out"},
    "distilbert": {"pre_classifier": "dense", "classifier": "out"},
}
PRESETS = {
    "all-linear": r"blocks\.(attn|mlp)\..*",
    "attention": r"blocks\.attn\..*",
    "qv": r"blocks\.attn\.(q|v)",
}
