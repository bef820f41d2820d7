"""Layers that every model family is built from.

Shape letters, here and in the families: B batch, S sequence, T keys, D width, H heads, K
key/value heads, N head width, F hidden width of the MLP, V vocabulary, L layers, r adapter rank,
M rows (B*S). Parameters of a stack of layers carry a leading L; `scan_layers` runs one block over
it.

`Linear` is the only code that knows adapters exist. Several functions have hand-written
derivatives: on CPU, XLA's own derivative of a product over (B, S, D) rearranges the operands in
memory and is up to twice as slow as the same product over (M, D).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.attention import Cache, Context

Array = jax.Array


# ------------------------------------------------------------------------------------ products


@jax.custom_vjp
def low_rank(x: Array, a: Array, b: Array) -> Array:
    """(x @ a) @ b for x (M, in), a (in, r), b (r, out)."""
    return (x @ a) @ b


def _low_rank_fwd(x, a, b):
    u = x @ a
    return u @ b, (x, a, b, u)


def _low_rank_bwd(residuals, g):
    x, a, b, u = residuals
    t = g @ b.T
    # Contracting into (r, in) and transposing is several times faster than x.T @ t on CPU.
    return t @ a.T, (t.T @ x).T, u.T @ g


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


class Adapter(nnx.Module):
    """Low-rank factors beside one `Linear`: adds scale * dropout(x) @ a @ b (Hu et al. 2021).

    With a stack, `a` is (n, in, r) and `b` (n, r, out) for the n adapted `layers` only.
    """

    def __init__(self, a, b, *, scale: float, dropout: float, layers: tuple[int, ...], index: int):
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.scale, self.dropout, self.layers, self.index = scale, dropout, layers, index

    def __call__(self, x: Array, key: Array | None) -> Array:
        if self.dropout and key is not None:
            keep = jax.random.bernoulli(
                jax.random.fold_in(key, self.index), 1 - self.dropout, x.shape
            )
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        # The scale multiplies the small factor, not the (M, out) product.
        return low_rank(x, self.a[...].astype(x.dtype), (self.scale * self.b[...]).astype(x.dtype))

    def expand(self, num_layers: int) -> None:
        """Fill the factors up to `num_layers` with zeros, so that they can be scanned.

        New variables are made: a merged module shares its old ones with the state it came from.
        """
        if len(self.layers) == num_layers:
            return

        def filled(value):
            zeros = jnp.zeros((num_layers, *value.shape[1:]), value.dtype)
            return nnx.Param(zeros.at[jnp.array(self.layers)].set(value))

        self.a, self.b = filled(self.a[...]), filled(self.b[...])


class Linear(nnx.Module):
    """x @ kernel + bias, plus the adapter's part when there is one. kernel (*stack, in, out)."""

    def __init__(self, key, in_dim: int, out_dim: int, *, stack=(), bias=True, std=0.02, dtype):
        self.kernel = nnx.Param(normal(key, (*stack, in_dim, out_dim), std, dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, out_dim), dtype)) if bias else None
        self.adapter = nnx.data(None)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.kernel[...].astype(x.dtype)
        if self.adapter is not None:
            y = y + self.adapter(rows, key)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def attach(
        self, a: Array, b: Array, *, scale: float, dropout: float, layers: tuple[int, ...], index
    ) -> None:
        """Put low-rank factors beside the frozen kernel; see `Adapter`."""
        self.adapter = Adapter(a, b, scale=scale, dropout=dropout, layers=layers, index=index)

    def fold(self) -> None:
        """Add the adapter to the kernel and drop it: W + scale * A @ B, in float32."""
        if self.adapter is None:
            return
        adapter, kernel = self.adapter, self.kernel[...]
        if kernel.ndim == 3:
            adapter.expand(kernel.shape[0])
        delta = jnp.matmul(adapter.a[...], adapter.b[...] * adapter.scale)
        self.kernel = nnx.Param((kernel.astype(jnp.float32) + delta).astype(kernel.dtype))
        self.adapter = None


def normal(key: Array, shape: tuple[int, ...], std: float, dtype) -> Array:
    """Independent N(0, std²) draws, made in float32."""
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Embedding(nnx.Module):
    """Rows of a table (V, D)."""

    def __init__(self, key, num_rows: int, dim: int, *, std=0.02, dtype):
        self.table = nnx.Param(normal(key, (num_rows, dim), std, dtype))

    def __call__(self, ids: Array) -> Array:
        return self.table[...][ids]


# --------------------------------------------------------------------------------------- norms


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32."""
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + eps)
    lift = (1,) * (x.ndim - 1)
    y = (x32 - mean) * rstd * scale.astype(jnp.float32).reshape(*lift, -1)
    y = y + bias.astype(jnp.float32).reshape(*lift, -1)
    return y.astype(x.dtype), (x, scale, bias, mean, rstd)


def _layer_norm_bwd(eps, residuals, g):
    x, scale, bias, mean, rstd = residuals
    g32, lead = g.astype(jnp.float32), tuple(range(x.ndim - 1))
    normed = (x.astype(jnp.float32) - mean) * rstd
    gs = g32 * scale.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)
    dx = rstd * (gs - gs.mean(-1, keepdims=True) - normed * (gs * normed).mean(-1, keepdims=True))
    dscale, dbias = (g32 * normed).sum(lead), g32.sum(lead)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) * scale over the last axis, in float32."""
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x, scale, eps):
    x32 = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    normed = (x32 * rstd).astype(x.dtype)
    return normed * scale.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1), (x, scale, rstd)


def _rms_norm_bwd(eps, residuals, g):
    x, scale, rstd = residuals
    g32 = g.astype(jnp.float32)
    normed = x.astype(jnp.float32) * rstd
    gs = g32 * scale.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)
    dx = rstd * (gs - normed * (gs * normed).mean(-1, keepdims=True))
    dscale = (g32 * normed).sum(tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


class LayerNorm(nnx.Module):
    """`layer_norm` with its parameters, each (*stack, D)."""

    def __init__(self, dim: int, *, stack=(), eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((*stack, dim), dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, dim), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


class RMSNorm(nnx.Module):
    """`rms_norm` with its parameter (*stack, D)."""

    def __init__(self, dim: int, *, stack=(), eps: float, dtype):
        self.scale = nnx.Param(jnp.ones((*stack, dim), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


# --------------------------------------------------------------------------------- activations


def from_input(function: Callable) -> Callable:
    """An elementwise function whose derivative is taken from its inputs alone.

    Without this every intermediate value of it is kept for the backward pass.
    """

    @jax.custom_vjp
    def wrapped(*xs):
        return function(*xs)

    wrapped.defvjp(lambda *xs: (function(*xs), xs), lambda xs, g: jax.vjp(function, *xs)[1](g))
    return wrapped


gelu_tanh = from_input(lambda x: jax.nn.gelu(x, approximate=True))
gelu = from_input(lambda x: jax.nn.gelu(x, approximate=False))
swiglu = from_input(lambda gate, up: jax.nn.silu(gate) * up)


# ------------------------------------------------------------------------------------- stacks


def scan_layers(
    blocks: nnx.Module, x: Array, context: Context, cache: Cache | None, *, remat: bool
):
    """Run the stacked `blocks` over x (B, S, D).

    Returns x after the last block, x before every block (L, B, S, D) (dead code unless used), and
    the cache.
    """
    linears = [module for _, module in nnx.iter_graph(blocks) if isinstance(module, Linear)]
    num_layers = linears[0].kernel[...].shape[0]
    for linear in linears:
        if linear.adapter is not None:
            linear.adapter.expand(num_layers)
    graphdef, state = nnx.split(blocks)

    def step(carry, layer_input):
        x, kv = carry
        layer_state, layer = layer_input
        block = nnx.merge(graphdef, layer_state)
        key = None if context.key is None else jax.random.fold_in(context.key, layer)
        y, kv = block(x, context._replace(key=key), kv, layer)
        return (y, kv), x

    kv = None if cache is None else (cache.keys, cache.values)
    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    layers = jnp.arange(num_layers, dtype=jnp.int32)
    # One token at a time on CPU, the loop's copy of each layer's weights would cost as much as the
    # products; unrolled, the compiler lifts it out of the loop over tokens.
    unroll = cache is not None and jax.default_backend() == "cpu"
    (x, kv), before = jax.lax.scan(step, (x, kv), (state, layers), unroll=unroll)
    if cache is not None:
        cache = cache._replace(keys=kv[0], values=kv[1])
    return x, before, cache
