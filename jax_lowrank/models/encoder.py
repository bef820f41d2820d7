"""The body that all encoder families share: embed, norm, stacked blocks, and a head."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import Layout, make_context
from jax_lowrank.models.head import Classifier
from jax_lowrank.models.layers import Array, Embedding, LayerNorm, Linear
from jax_lowrank.models.output import unembed
from jax_lowrank.models.stack import scan_layers


class TokenPredictor(nnx.Module):
    """What a masked-lm head does before the output table, and its bias for each token (V,)."""

    def __init__(
        self, keys, num_tokens: int, width: int, activation: Callable, eps: float, *, dtype
    ):
        self.dense = Linear(next(keys), width, width, dtype=dtype)
        self.norm = LayerNorm(width, eps=eps, dtype=dtype)
        self.bias = nnx.Param(jnp.zeros((num_tokens,), dtype))
        self.activation = activation

    def __call__(self, x: Array, table: Array, key: Array | None) -> Array:
        x = self.norm(self.activation(self.dense(x, key)))
        return unembed(x, table) + self.bias[...].astype(jnp.float32)[None, None]


class Encoder(nnx.Module):
    """A text encoder: every real token sees every real token. Families supply the parts.

    In all calls `mask` (B, S) is True on real tokens; without it all are real. Pads may stand on
    either side. `types` (B, S) are token types, 0 when not given; `segments` (B, S) number the
    texts of packed rows, which do not see each other.
    """

    def __init__(
        self,
        *,
        embed: Embedding,
        position: Embedding,
        types: Embedding | None,
        norm: LayerNorm,
        blocks: nnx.Module,
        pooler: Linear | None,
        predictor: TokenPredictor | None,
        classifier: Classifier | None,
        first_position: int,
    ):
        self.embed, self.position, self.types, self.norm = embed, position, types, norm
        self.blocks, self.pooler = blocks, pooler
        self.predictor, self.classifier = predictor, classifier
        self.first_position = first_position  # the row of `position` of a text's first token
        # Of activations: as the model was made, also where what is trained is a float32 copy.
        self.dtype = embed.table[...].dtype
        self.remat, self.layout = "dots", Layout()  # see `adapt.method.bind`

    def hidden(
        self,
        tokens: Array,
        mask: Array | None = None,
        key: Array | None = None,
        segments: Array | None = None,
        types: Array | None = None,
    ) -> tuple[Array, Array]:
        """What leaves the last block (B, S, D), and what enters each block (L, B, S, D)."""
        context, _ = make_context(tokens, mask, None, None, key, segments, causal=False)
        look_up = self.layout.look_up
        x = look_up(self.embed, tokens)
        if self.types is not None:
            x = x + look_up(self.types, jnp.zeros_like(tokens) if types is None else types)
        elif types is not None:
            raise ValueError("the model has no token types")
        x = self.norm(x + look_up(self.position, context.positions + self.first_position))
        x = x.astype(self.dtype)
        x, before, _ = scan_layers(
            self.blocks, x, context, None, remat=self.remat, layout=self.layout
        )
        return x, before

    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        key: Array | None = None,
        segments: Array | None = None,
        types: Array | None = None,
    ) -> Array:
        """Logits (B, S, V) in float32 of the token that belongs at each place."""
        x, _ = self.hidden(tokens, mask, key, segments, types)
        return self._predicted(x, key)

    def nll(
        self, tokens: Array, mask: Array, places: Array, targets: Array, key: Array | None = None
    ) -> Array:
        """-log p (B, K) in float32 of the targets (B, K) that belong at `places` (B, K)."""
        x, _ = self.hidden(tokens, mask, key)
        logits = self._predicted(jnp.take_along_axis(x, places[..., None], axis=1), key)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    def _predicted(self, x: Array, key: Array | None) -> Array:
        if self.predictor is None:
            raise ValueError("the model has no masked-lm head; load it with one")
        return self.predictor(x, self.embed.table[...], key)

    def classify(
        self,
        tokens: Array,
        mask: Array | None = None,
        key: Array | None = None,
        types: Array | None = None,
    ) -> Array:
        """Class logits (B, C) in float32, read from the first real token of each row."""
        if self.classifier is None:
            raise ValueError("the model has no classification head; load it with one")
        x, _ = self.hidden(tokens, mask, key, types=types)
        first = x[:, 0]
        if mask is not None:
            start = jnp.argmax(mask, axis=1)[:, None, None]
            first = jnp.take_along_axis(x, start, axis=1)[:, 0]
        if self.pooler is not None:
            first = jnp.tanh(self.pooler(first, key))
        return self.classifier(first, key)

    def sentence(
        self, tokens: Array, mask: Array | None = None, types: Array | None = None
    ) -> Array:
        """Sentence embeddings (B, D) in float32: the mean over real tokens, made of length 1.

        As sentence-transformers pools (Reimers & Gurevych 2019). A row of pads gives 0.
        """
        x, _ = self.hidden(tokens, mask, types=types)
        weights = jnp.ones(tokens.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
        total = (x.astype(jnp.float32) * weights[..., None]).sum(1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)
