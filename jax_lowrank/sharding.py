"""Where every array lives: a mesh of devices, and rules from parameter paths to its axes.

Axes: `data` and `fsdp` cut the rows of a batch, `fsdp` cuts the parameters as well, `tensor` cuts
the inside of every layer (heads, MLP units, vocabulary). XLA inserts the communication.

A mesh of None is one device: nothing is placed, and every function here hands back what it got.
What is computed finds its mesh in the arrays it is given (`mesh_of`), so that only who makes or
loads a model needs to know one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Array = jax.Array
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # cut the rows of a batch
IN, OUT = ("qkv", "q", "k", "v", "gate", "up"), ("out", "down")  # into the inside of a layer; out

# End of a path -> axes of the last dimensions; the first that matches counts. A stack's leading
# layer axis is never cut, for the loop over layers would fetch each from one device. The families
# share these names; one with others adds its rows here.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embed|head)\.table", ("tensor", "fsdp")),
    (r"(position|types)\.table", (None, "fsdp")),
    (rf"blocks\.\w+\.({'|'.join(IN)})\.kernel", ("fsdp", "tensor")),
    (rf"blocks\.\w+\.({'|'.join(IN)})\.bias", ("tensor",)),
    (rf"blocks\.\w+\.({'|'.join(OUT)})\.kernel", ("tensor", "fsdp")),
    (r"(pooler|predictor\.dense|classifier\.\w+|project_in|project_out)\.kernel", ("fsdp", None)),
    (r"(bias|scale)", ()),
)


class MeshError(ValueError):
    """Devices, mesh and sizes do not fit together; the message names a choice that does."""


# --------------------------------------------------------------------------------------- the mesh


def sizes_of(data: int, fsdp: int, tensor: int, total: int) -> tuple[int, int, int]:
    """The sizes with -1 filled in for `total` devices. Raises MeshError when they do not fit."""
    sizes = (data, fsdp, tensor)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and total % known:
        raise MeshError(
            f"mesh {shown(sizes)} does not divide {total} devices; the product of its given sizes"
            f" must be one of {[n for n in range(1, total + 1) if total % n == 0]}"
        )
    found = tuple(total // known if size == -1 else size for size in sizes)
    if math.prod(found) > total:
        raise MeshError(
            f"mesh {shown(sizes)} is for {math.prod(found)} devices, there are {total}; -1 in one"
            " place takes what is left"
        )
    return found


def make_mesh(data: int, fsdp: int, tensor: int, devices=None) -> Mesh | None:
    """A mesh of the devices (all of them by default); one -1 stands for what is left.

    A smaller mesh than there are devices takes the first ones, in a single process. None for one
    device. Raises MeshError when the numbers do not fit the devices.
    """
    given = list(jax.devices() if devices is None else devices)
    sizes = sizes_of(data, fsdp, tensor, len(given))
    used = math.prod(sizes)
    if used < len(given) and jax.process_count() > 1:
        raise MeshError(
            f"mesh {shown(sizes)} leaves {len(given) - used} of {len(given)} devices out, and with"
            " them processes; -1 in one place takes what is left"
        )
    if used == 1:
        return None
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=given[:used])


def shown(sizes: Iterable[int]) -> str:
    """(1, 8, 1) -> `data 1 x fsdp 8 x tensor 1`."""
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))


def describe(mesh: Mesh | None) -> dict[str, Any]:
    """Sizes and device order of a mesh, for a run's record: two orders may give two results."""
    if mesh is None:
        return {"mesh": dict.fromkeys(AXES, 1), "device_order": [jax.local_devices()[0].id]}
    return {"mesh": dict(mesh.shape), "device_order": [int(d.id) for d in mesh.devices.flat]}


def row_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are cut."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def mesh_of(tree) -> Mesh | None:
    """The mesh that the arrays of a pytree lie on; None where they lie on one device."""
    for leaf in jax.tree.leaves(tree):
        found = getattr(leaf, "sharding", None)
        if isinstance(found, NamedSharding) and found.mesh.size > 1:
            return found.mesh
    return None


# --------------------------------------------------------------------------- parameters and states


@functools.cache
def axes_of(path: str) -> tuple[str | None, ...]:
    """Axes of the last dimensions of the array at a dotted path.

    An adapter follows its kernel and is whole along the rank. Optimizer state is found by the end
    of its path, which is that of its parameter. Raises MeshError for a path without a rule.
    """
    module, _, name = path.rpartition(".")
    if module.endswith(".adapter"):
        rows, columns = axes_of(module.removesuffix("adapter") + "kernel")
        return {"a": (rows, None), "b": (None, columns), "magnitude": (columns,)}[name.strip("0")]
    for pattern, axes in RULES:
        if re.search(rf"(^|\.){pattern}$", path):
            return axes
    raise MeshError(f"no rule says where {path!r} lives; add one to sharding.RULES")


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The rule for an array, without axes that do not divide their dimension (see `uncut`)."""
    if not shape:  # a step count
        return PartitionSpec()
    axes = axes_of(path)[-len(shape) :]
    lead = len(shape) - len(axes)
    cut = [
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape[lead:])
    ]
    while cut and cut[-1] is None:  # as JAX writes the sharding of a result
        cut.pop()
    return PartitionSpec(*[None] * lead, *cut) if cut else PartitionSpec()


def uncut(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh | None) -> list[str]:
    """One line for every dimension that an axis should cut and does not divide: whole there."""
    lines = []
    for path, shape in shapes.items() if mesh is not None else ():
        axes = axes_of(path)[-len(shape) :]
        for axis, size in zip(axes, shape[len(shape) - len(axes) :]):
            if axis and size % mesh.shape[axis]:
                lines.append(f"{path}: {size} does not divide by {axis} {mesh.shape[axis]}")
    return lines


def where(mesh: Mesh | None) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """(path, shape) -> sharding, for who reads weights; None for one device."""
    if mesh is None:
        return None
    return lambda path, shape: NamedSharding(mesh, spec_of(path, shape, mesh))


def path_of(keys) -> str:
    """The dotted path of an array in a state, as models.by_path writes it."""
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")


def tree_shardings(tree, mesh: Mesh):
    """The sharding of every array of a state (parameters, adapters, optimizer), by its path."""

    def place(keys, leaf):
        return NamedSharding(mesh, spec_of(path_of(keys), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def put(tree, mesh: Mesh | None):
    """A state with every array where its rule says. All processes hold equal values."""
    if mesh is None:
        return tree
    return jax.tree.map(_move, tree, tree_shardings(tree, mesh))


def settle(tree):
    """Results of a compiled step under the very shardings of their rules.

    XLA may write an equal sharding in another way, and the next call would be compiled again.
    """
    return put(tree, mesh_of(tree))


def _move(array, sharding: NamedSharding):
    old = getattr(array, "sharding", None)
    if old == sharding:
        return array
    if isinstance(old, NamedSharding) and old.memory_kind != sharding.memory_kind:
        return _move(_in_memory(array, sharding.memory_kind), sharding)
    if isinstance(old, NamedSharding) and old.is_equivalent_to(sharding, array.ndim):
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)
    if getattr(array, "is_fully_addressable", True) and jax.process_count() > 1:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return jax.device_put(array, sharding)


@functools.cache
def keeper(mesh: Mesh | None) -> Callable[[Any], Any]:
    """A function for traced code: a state with every array kept where its rule says.

    The same mesh gives the same function, so that it can be a static argument.
    """
    if mesh is None:
        return lambda tree: tree
    return lambda tree: jax.lax.with_sharding_constraint(tree, tree_shardings(tree, mesh))


# --------------------------------------------------------------------------------- rows and results


def check_rows(name: str, number: int, parts: int, mesh: Mesh | None) -> None:
    """Raise MeshError unless `number` rows, in `parts` micro-batches, divide over the mesh."""
    shards = row_shards(mesh) * parts
    if number % shards:
        below, above = number // shards * shards, -(-number // shards) * shards
        micro = f" in {parts} micro-batches" if parts > 1 else ""
        near = f"{below} or {above}" if below else f"{above}"
        raise MeshError(
            f"{name} {number} cannot be split over {row_shards(mesh)} devices"
            f" ({shown(mesh.shape[axis] for axis in AXES)}){micro}; use {near}"
        )


def check_remat(name: str, remat: str) -> None:
    """Raise MeshError where layers are to keep arrays in host memory and devices reach none."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if remat == "offload" and "pinned_host" not in kinds:
        raise MeshError(
            f"{name} 'offload' needs pinned host memory, which {device.platform} has not"
            f" ({', '.join(kinds)}); use 'full', which keeps less than 'dots' on the device"
        )


def up_to_shards(number: int, mesh: Mesh | None) -> int:
    """The next number of rows that divides over the mesh."""
    return -(-number // row_shards(mesh)) * row_shards(mesh)


def own_rows(number: int, mesh: Mesh | None) -> np.ndarray | None:
    """Which of a batch's rows this process reads, ascending; None for all of them."""
    if mesh is None or jax.process_count() == 1:
        return None
    parts = rows_sharding(mesh).addressable_devices_indices_map((number,)).values()
    return np.unique(np.concatenate([np.arange(number)[part] for (part,) in parts]))


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Of an array whose dimension `axis` is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, _used(ROWS, mesh)))


def _used(axes: tuple[str, ...], mesh: Mesh):
    """Those of the axes that cut anything, as JAX writes them in the sharding of a result."""
    used = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return used[0] if len(used) == 1 else used or None


def put_own_rows(tree, like, axis: int = 0):
    """Host arrays of the rows that `own_rows` names, as arrays on the mesh of `like`."""
    mesh = mesh_of(like)
    if mesh is None:
        return tree
    place = functools.partial(jax.make_array_from_process_local_data, rows_sharding(mesh, axis))
    return jax.tree.map(place, tree)


def put_rows(tree, like):
    """Host arrays of all rows, the same in every process, cut over the mesh of `like`."""
    mesh = mesh_of(like)
    if mesh is None:
        return tree

    def place(host):
        index = host.__getitem__
        return jax.make_array_from_callback(host.shape, rows_sharding(mesh), index)

    return jax.tree.map(place, tree)


def _is_here(leaf) -> bool:
    """Whether this process has all of an array."""
    return getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated


def fetch(tree):
    """Host copies of arrays, wherever their parts are; every process must take part."""

    def one(leaf):
        if _is_here(leaf):
            return leaf
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(_in_memory(leaf, "device"), tiled=True)

    return jax.device_get(jax.tree.map(one, tree))


def hold(tree):
    """A copy in the host's memory that outlives donation: NumPy arrays, but of what is cut over
    processes the parts that are here, so that no host holds all of a large model."""
    return jax.tree.map(
        lambda leaf: jax.device_get(leaf) if _is_here(leaf) else _in_memory(leaf, "pinned_host"),
        tree,
    )


def _in_memory(array: Array, kind: str) -> Array:
    """An array in another of its devices' memories; each process moves its own parts."""
    parts = [
        jax.device_put(shard.data, shard.data.sharding.with_memory_kind(kind))
        for shard in array.addressable_shards
    ]
    sharding = array.sharding.with_memory_kind(kind)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def pieces(array) -> Iterator[np.ndarray]:
    """Host copies of an array's parts, which make it up along its first axis: of a stack of layers
    that is cut over processes one at a time. Every process must take part, and gets them all."""
    if _is_here(array) or array.ndim < 3:
        yield fetch(array)
    else:
        array = _in_memory(array, "device")
        for i in range(array.shape[0]):
            yield fetch(_layer(array, i))


@jax.jit
def _layer(stack: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, i)


def pin(mesh: Mesh | None) -> Callable[[Array, tuple[str | None, ...]], Array]:
    """(x, names of its dimensions) -> x kept on the mesh: `rows` over data and fsdp, `heads` over
    tensor, `data` and `fsdp` over themselves; a dimension that does not divide is whole.
    """
    if mesh is None:
        return lambda x, names: x
    axes = {"rows": ROWS, "heads": ("tensor",), "data": ("data",), "fsdp": ("fsdp",), None: ()}

    def kept(x, names):
        spec = [
            _used(axes[name], mesh)
            if size % math.prod(mesh.shape[a] for a in axes[name]) == 0
            else None
            for name, size in zip(names, x.shape)
        ]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return kept
