"""Layers that every model family is built from.

Shape letters, here and in the families: B batch, S sequence, T keys, D width, H heads, K
key/value heads, N head width, F hidden width of the MLP, V vocabulary, L layers, r adapter rank,
M rows (B*S). Parameters of a stack of layers carry a leading L; `stack.scan_layers` runs one block
over it.

`Linear` is the only code that knows adapters exist. Several functions have hand-written
derivatives: on CPU, XLA's own derivative of a product over (B, S, D) rearranges the operands in
memory and is up to twice as slow as the same product over (M, D).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_lowrank.models.attention import saved

Array = jax.Array


# ------------------------------------------------------------------------------------ products


@jax.custom_vjp
def low_rank(x: Array, a: Array, b: Array) -> Array:
    """(x @ a) @ b for x (M, in), a (in, r), b (r, out)."""
    return (x @ a) @ b


def _low_rank_fwd(x, a, b):
    u = saved(x @ a)
    return u @ b, (x, a, b, u)


def _low_rank_bwd(residuals, g):
    x, a, b, u = residuals
    t = g @ b.T
    # Contracting into (r, in) and transposing is several times faster than x.T @ t on CPU, into
    # which XLA would turn it back but for the barrier.
    return t @ a.T, jax.lax.optimization_barrier(t.T @ x).T, u.T @ g


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


class Adapter(nnx.Module):
    """What fine-tuning puts beside one `Linear`; W is its kernel, which stays as it is.

    LoRA (Hu et al. 2021) adds ΔW = s·A·B. Where A and B start from W itself (PiSSA, OLoRA), the
    start A₀·B₀ is taken off again: ΔW = s·(A·B - A₀·B₀). DoRA (Liu et al. 2024) then gives every
    output unit the norm `magnitude`: ΔW' = m / |W + ΔW| * (W + ΔW) - W.

    a (*n, in, r), b (*n, r, out), magnitude (*n, out); n the number of adapted `layers` of a stack,
    which are () where there is no stack. a0 and b0 are shaped like a and b and stay frozen. `scale`
    is a number, or, where adapters of several scales share a program (see `pad`), data (*n,).
    """

    def __init__(
        self,
        a: Array,
        b: Array,
        *,
        scale: float,
        dropout: float,
        layers: tuple[int, ...],
        index: int,
        start: tuple[Array, Array] | None = None,
        magnitude: Array | None = None,
    ):
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.a0, self.b0 = map(nnx.Param, start) if start else (None, None)
        self.magnitude = None if magnitude is None else nnx.Param(magnitude)
        self.scale, self.dropout, self.layers, self.index = scale, dropout, layers, index

    def __call__(self, x: Array, y: Array, kernel: Array, key: Array | None) -> Array:
        """What is added to y = x @ kernel. x (M, in), y (M, out)."""
        if self.dropout and key is not None:
            keep = jax.random.bernoulli(
                jax.random.fold_in(key, self.index), 1 - self.dropout, x.shape
            )
            x = jnp.where(keep, x / (1 - self.dropout), 0)
            if self.magnitude is not None:
                y = x @ kernel  # as PEFT: what the norm changes sees the dropout too
        a, b = self.factors()
        b = self.factor() * b  # the small factor, not the (M, out) product
        if self.magnitude is None:
            return low_rank(x, a.astype(x.dtype), b.astype(x.dtype))
        ratio = self.ratio(kernel)
        added = low_rank(x, a.astype(x.dtype), (ratio[None] * b).astype(x.dtype))
        return (ratio - 1).astype(x.dtype)[None] * y + added

    def factor(self) -> float | Array:
        """s, in a shape that multiplies a or b."""
        return self.scale[...][..., None, None] if isinstance(self.scale, nnx.Param) else self.scale

    def factors(self) -> tuple[Array, Array]:
        """P (*n, in, R), Q (*n, R, out) with ΔW = s·P·Q; R is r, or 2r with a start to take off.

        A·B - A₀·B₀ = (A - A₀)·B + A₀·(B - B₀): nothing cancels, and at the start it is exactly 0.
        """
        a, b = self.a[...], self.b[...]
        if self.a0 is None:
            return a, b
        a0, b0 = self.a0[...], self.b0[...]
        return jnp.concatenate([a - a0, a0], -1), jnp.concatenate([b, b - b0], -2)

    def added(self, kernel: Array) -> Array:
        """W + ΔW (*n, in, out) in float32, before any norm."""
        a, b = self.factors()
        return kernel.astype(jnp.float32) + a @ (self.factor() * b)

    def ratio(self, kernel: Array) -> Array:
        """DoRA's magnitude / |W + ΔW| (*n, out) float32; the norm gets no gradient, as in PEFT."""
        norm = column_norm(jax.lax.stop_gradient(self.added(kernel)))
        return self.magnitude[...] / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)

    def merged(self, kernel: Array) -> Array:
        """The kernel (*n, in, out) with the adapter in it, float32."""
        whole = self.added(kernel)
        return whole if self.magnitude is None else self.ratio(kernel)[..., None, :] * whole

    def expand(self, kernel: Array) -> None:
        """Fill up to all layers of `kernel` (L, in, out) with what changes nothing, to be scanned.

        New variables are made: a merged module shares its old ones with the state it came from.
        """
        if len(self.layers) == len(kernel):
            return
        layers = jnp.array(self.layers)

        def filled(param):
            rest = jnp.zeros((len(kernel), *param.shape[1:]), param.dtype)
            return nnx.Param(rest.at[layers].set(param[...]))

        self.a, self.b = filled(self.a), filled(self.b)
        if self.a0 is not None:
            self.a0, self.b0 = filled(self.a0), filled(self.b0)
        if self.magnitude is not None:
            norm = column_norm(kernel.astype(jnp.float32))
            self.magnitude = nnx.Param(norm.at[layers].set(self.magnitude[...]))

    def pad(self, rank: int, kernel: Array) -> None:
        """Fill up to a rank with zeros and, without a magnitude, to all layers; the scale is data.

        Adapters of several ranks, layers and scales then have one form. What is filled up has
        gradient 0 and stays 0: a column of A meets a row of B that is 0, and the other way round. A
        magnitude of a layer that is not adapted would learn, so with one the layers stay. Arrays
        come out on the host.
        """
        rows = ()
        if self.layers and self.magnitude is None:
            rows, self.layers = (np.array(self.layers),), tuple(range(len(kernel)))

        def filled(param, axis):
            shape = list(param.shape)
            shape[axis] = rank
            shape[: len(rows)] = [len(self.layers)] * len(rows)
            rest = np.zeros(shape, param.dtype)
            part = (*rows, *[slice(size) for size in param.shape[len(rows) :]])
            rest[part] = param[...]
            return nnx.Param(rest)

        self.a, self.b = filled(self.a, -1), filled(self.b, -2)
        if self.a0 is not None:
            self.a0, self.b0 = filled(self.a0, -1), filled(self.b0, -2)
        scale = np.full(self.a.shape[:-2], self.scale, np.float32)
        self.scale = nnx.data(nnx.Param(scale))


def column_norm(kernel: Array) -> Array:
    """Euclidean norm (*stack, out) of the weights of each output unit; kernel (*stack, in, out)."""
    return jnp.sqrt(jnp.square(kernel).sum(-2))


class Linear(nnx.Module):
    """x @ kernel + bias, plus the adapter's part when there is one. kernel (*stack, in, out)."""

    def __init__(self, key, in_dim: int, out_dim: int, *, stack=(), bias=True, std=0.02, dtype):
        self.kernel = nnx.Param(normal(key, (*stack, in_dim, out_dim), std, dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, out_dim), dtype)) if bias else None
        self.adapter = nnx.data(None)

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        kernel = self.kernel[...].astype(x.dtype)
        y = rows @ kernel
        if self.adapter is not None:
            y = y + self.adapter(rows, y, kernel, key)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def attach(
        self,
        a: Array,
        b: Array,
        *,
        scale: float,
        dropout: float,
        layers: tuple[int, ...],
        index: int,
        from_base: bool = False,
        dora: bool = False,
    ) -> None:
        """Put factors beside the frozen kernel; see `Adapter`.

        from_base: a and b start from the kernel, so their start is taken off again.
        """
        self.adapter = Adapter(
            a,
            b,
            scale=scale,
            dropout=dropout,
            layers=layers,
            index=index,
            start=(a, b) if from_base else None,
            magnitude=column_norm(self.weights(layers)) if dora else None,
        )

    def weights(self, layers: tuple[int, ...]) -> Array:
        """The kernels (n, in, out) of some layers of a stack, or the one there is, in float32."""
        kernel = self.kernel[...]
        if kernel.ndim == 3 and len(layers) < len(kernel):
            kernel = kernel[jnp.array(layers)]
        return kernel.astype(jnp.float32)

    def fold(self) -> None:
        """Put the adapter into the kernel, in float32, and drop it."""
        if self.adapter is None:
            return
        kernel, layers = self.kernel[...], self.adapter.layers
        merged = self.adapter.merged(self.weights(layers)).astype(kernel.dtype)
        if merged.shape != kernel.shape:
            merged = kernel.at[jnp.array(layers)].set(merged)
        self.kernel, self.adapter = nnx.Param(merged), None


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
    x, mean, rstd = saved(x), saved(mean), saved(rstd)
    x32 = x.astype(jnp.float32)
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
    rstd = saved(jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps))
    x = saved(x)
    normed = (x.astype(jnp.float32) * rstd).astype(x.dtype)
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

    def forward(*xs):
        xs = tuple(map(saved, xs))
        return function(*xs), xs

    wrapped.defvjp(forward, lambda xs, g: jax.vjp(function, *xs)[1](g))
    return wrapped


gelu_tanh = from_input(lambda x: jax.nn.gelu(x, approximate=True))
gelu = from_input(lambda x: jax.nn.gelu(x, approximate=False))
swiglu = from_input(lambda gate, up: jax.nn.silu(gate) * up)
