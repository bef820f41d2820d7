"""The body that all decoder families share: embed, stacked blocks, final norm, output table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import Cache, Layout, make_context
from jax_lowrank.models.head import Classifier
from jax_lowrank.models.layers import Array, Embedding, Linear
from jax_lowrank.models.output import token_nll, unembed
from jax_lowrank.models.stack import scan_layers, unstack


class Decoder(nnx.Module):
    """A causal language model. Families supply the parts; this says how they run.

    `mask` (B, S) is True on real tokens; without it all are real. Pads may stand on either side.
    `segments` (B, S) number the texts of packed rows, which do not see each other.
    """

    def __init__(
        self,
        *,
        embed: Embedding,
        position: Embedding | None,
        blocks: nnx.Module,
        norm: nnx.Module | None,
        head: Embedding | None,
        classifier: Classifier | None,
        cache_shape: tuple[int, int, int],
        window: int | None,
        project_in: Linear | None = None,
        project_out: Linear | None = None,
    ):
        self.embed, self.position, self.blocks, self.norm, self.head = (
            embed,
            position,
            blocks,
            norm,
            head,
        )
        self.classifier = classifier
        self.project_in, self.project_out = project_in, project_out
        self.cache_shape, self.window = cache_shape, window  # (L, K, N)
        # Of activations: as the model was made, also where what is trained is a float32 copy.
        self.dtype = embed.table[...].dtype
        self.remat, self.layout = "dots", Layout()  # see `adapt.method.bind`
        # Token of each class, and what is taken off its logit; see `models.answering`.
        self.answers: tuple[int, ...] = ()
        self.offsets: tuple[float, ...] = ()

    def hidden(
        self,
        tokens: Array,
        mask: Array | None = None,
        cache: Cache | None = None,
        key: Array | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, Array, Cache | None]:
        """Residual stream after the last block (B, S, D), before each block (L, B, S, D), cache."""
        context, cache = make_context(tokens, mask, cache, self.window, key, segments)
        x = self.layout.look_up(self.embed, tokens)
        if self.project_in is not None:
            x = self.project_in(x, key)
        if self.position is not None:
            x = x + self.layout.look_up(self.position, context.positions)
        x = x.astype(self.dtype)
        return scan_layers(self.blocks, x, context, cache, remat=self.remat, layout=self.layout)

    def final(self, x: Array, key: Array | None = None) -> Array:
        """What a head reads of x (..., D): normed, and projected if the family does."""
        x = x if self.norm is None else self.norm(x)
        return x if self.project_out is None else self.project_out(x, key)

    @property
    def output_table(self) -> Array:
        """The unembedding (V, D): the head's own, or the embedding when they are tied."""
        if self.classifier is not None:
            raise ValueError("a classification model predicts no tokens; load it as causal-lm")
        return (self.embed if self.head is None else self.head).table[...]

    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        key: Array | None = None,
        segments: Array | None = None,
    ) -> Array:
        """Next-token logits (B, S, V) in float32."""
        x, _, _ = self.hidden(tokens, mask, key=key, segments=segments)
        return unembed(self.final(x, key), self.output_table)

    def classify(self, tokens: Array, mask: Array | None = None, key: Array | None = None) -> Array:
        """Class logits (B, C) in float32, read from the last real token of each row.

        Of the classification head, or of the classes' answer tokens coming next.
        """
        if self.classifier is None and not self.answers:
            raise ValueError("the model has no classification head; load it with one")
        x, _, _ = self.hidden(tokens, mask, key=key)
        if mask is None:
            last = x[:, -1]
        else:
            behind = jnp.argmax(mask[:, ::-1], axis=1)  # pads after the last real token
            last = jnp.take_along_axis(x, (tokens.shape[1] - 1 - behind)[:, None, None], axis=1)
            last = last[:, 0]
        last = self.final(last, key)
        if self.classifier is not None:
            return self.classifier(last, key)
        table = self.output_table[jnp.asarray(self.answers)]
        return unembed(last, table) - jnp.asarray(self.offsets, jnp.float32)[None]

    def nll(self, tokens: Array, key: Array | None = None, segments: Array | None = None) -> Array:
        """-log p(tokens[:, t] | tokens[:, :t]) in nats, (B, S) float32; 0 where a text begins.

        For right-padded rows: a pad is after every real token, so none of them sees it.
        """
        x, _, _ = self.hidden(tokens, key=key, segments=segments)
        rows = self.final(x, key)
        rows = rows.reshape(-1, rows.shape[-1])
        # The last position has no target; asking for token 0 there keeps the shape regular.
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        nll = token_nll(
            rows, self.output_table, targets.reshape(-1), self.layout.row_shards
        ).reshape(tokens.shape)
        nll = jnp.pad(nll[:, :-1], ((0, 0), (1, 0)))
        if segments is None:
            return nll
        same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
        return jnp.where(same, nll, 0.0)

    def lens(self, tokens: Array, mask: Array | None = None) -> Array:
        """LogitLens log-probabilities (B, L+1, V) of the token after the last one, in float32.

        Entry l reads the residual stream after l blocks through the final norm and the output
        table; entry L is the model's own prediction (nostalgebraist 2020).
        """
        x, before, _ = self.hidden(tokens, mask)
        states = jnp.concatenate([before[:, :, -1], x[None, :, -1]]).swapaxes(0, 1)
        return jax.nn.log_softmax(unembed(self.final(states), self.output_table), axis=-1)

    def new_cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `batch` rows of at most `slots` tokens."""
        layers, heads, width = self.cache_shape
        zeros = jnp.zeros((layers, batch, heads, slots, width), self.dtype)
        zeros = self.layout.pin(zeros, (None, "rows", "heads", None, None))
        # On CPU a loop over tokens would cut every layer out of the stack again for every token.
        apart = unstack(self.blocks) if jax.default_backend() == "cpu" else None
        return Cache(zeros, zeros, jnp.zeros((batch, slots), bool), jnp.int32(0), apart)

    def step(self, tokens: Array, mask: Array | None, cache: Cache) -> tuple[Array, Cache]:
        """Logits (B, V) of the token after `tokens` (B, S), which are added to the cache."""
        x, _, cache = self.hidden(tokens, mask, cache)
        return unembed(self.final(x[:, -1]), self.output_table), cache
