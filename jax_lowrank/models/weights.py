"""Hugging Face checkpoints in and out, by a table of names. Safetensors only, never a pickle.

A `Row` ties one name pattern to one parameter path; `{l}` in it stands for the layer, and the
layers of a pattern fill one stacked array. The same table reads and writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class UnsupportedModelError(ValueError):
    """A checkpoint asks for something that the model code does not do."""


class WeightsError(ValueError):
    """A checkpoint does not hold the tensors that its configuration asks for."""


class Row(NamedTuple):
    """One name in the checkpoint, the parameter it fills, and whether it lies transposed."""

    name: str
    path: str
    transpose: bool = False


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Buffers that older checkpoints carry and nothing reads.
IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "embeddings.position_ids")
# Ends of names as TensorFlow wrote them -> today's.
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def resolve(path: str, revision: str = "main") -> Path:
    """The local directory of a checkpoint: `path` itself, or a snapshot of that hub repository.

    Raises FileNotFoundError with one sentence when it is neither.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise FileNotFoundError(f"no model directory at {path!r}; give a directory or a hub id")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{path!r} is neither a local directory nor a hub repository in reach: {reason}"
        ) from error


def resolve_config(path: str, revision: str = "main") -> Path:
    """As `resolve`, but of a hub repository config.json alone is fetched."""
    if Path(path).expanduser().is_dir() or path.count("/") != 1 or path.startswith((".", "/")):
        return resolve(path, revision)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, "config.json", revision=revision)).parent
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"no config.json of {path!r} in reach: {reason}") from error


def read_config(directory: Path) -> dict:
    """config.json as a dict."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no config.json; a Hugging Face model has one")
    return json.loads(path.read_text())


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those its index names."""
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{directory} lacks the shards {missing} that its index names")
        return [directory / name for name in names]
    single = directory / SINGLE
    if single.is_file():
        return [single]
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt*")
    )
    if pickles:
        raise UnsupportedModelError(
            f"{directory} holds pickled weights ({pickles[0]}), which can run code when read;"
            " convert them to model.safetensors first"
        )
    raise FileNotFoundError(f"{directory} has neither model.safetensors nor its index")


def load(
    directory: Path,
    rows: Sequence[Row],
    abstract: Mapping,
    dtype,
    *,
    heads: tuple[str, ...] = (),
    may_lack: bool = False,
    where: Callable | None = None,
) -> dict:
    """Parameters, as a dict from path to array, read tensor by tensor in `dtype`.

    Args:
      directory: where the safetensors files are.
      rows: the family's name table.
      abstract: path -> object with a shape, for every parameter; stacked ones lead with L.
      dtype: of the result. On CPU no more than one tensor of the checkpoint is in memory beside
        it, on an accelerator no more than one parameter is in host memory.
      heads: how the names of the tensors of any head begin. Those that `rows` does not ask for are
        not read.
      may_lack: whether such a beginning may be without any tensor that `rows` asks for; the
        parameters are then not in the result.
      where: (path, shape) -> sharding, for parameters on several devices. Each process reads the
        parts of its own devices, one at a time; None: one device.

    Raises:
      WeightsError: naming every missing, unexpected and mis-shaped tensor at once.
    """
    stored = _with_prefix(_tensors(directory), rows, heads)
    wanted = {name: (row, layer) for name, row, layer in expand(rows, abstract)}
    absent = tuple(h for h in heads if not any(n.startswith(h) for n in stored if n in wanted))
    missing = [name for name in wanted if name not in stored]
    if may_lack:
        rows = [row for row in rows if not row.name.startswith(absent)]
        missing = [name for name in missing if not name.startswith(absent)]
    problems = [f"missing: {name}" for name in missing]
    problems += [
        f"unexpected: {name}"
        for name in stored
        if name not in wanted and not name.endswith(IGNORED) and not name.startswith(heads)
    ]
    for name, (row, layer) in wanted.items():
        if name in stored:
            found, needed = stored[name].shape, _shape_in_file(row, layer, abstract)
            if found != needed:
                problems.append(f"mis-shaped: {name} is {found}, the configuration needs {needed}")
    if problems:
        raise WeightsError(
            f"{directory} does not fit its configuration ({len(problems)} tensors):\n  "
            + "\n  ".join(problems)
        )
    read = {}
    for row in rows:
        shape = tuple(abstract[row.path].shape)
        sharding = None if where is None else where(row.path, shape)
        read[row.path] = _read(row, shape, stored, dtype, sharding)
    return read


class Stored(NamedTuple):
    """Where a tensor lies: its file, and its name and shape there."""

    file: Path
    name: str
    shape: tuple[int, ...]


def _open(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:  # not a ValueError
        raise WeightsError(f"{file} cannot be read: {error}") from error


def _tensors(directory: Path) -> dict[str, Stored]:
    found = {}
    for file in weight_files(directory):
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                found[name] = Stored(file, name, tuple(handle.get_slice(name).get_shape()))
    return found


def _with_prefix(where: Mapping, rows: Sequence[Row], heads: tuple[str, ...]) -> dict:
    """The tensors under the names of `rows`. A base model is saved without the leading word."""
    prefix = rows[0].name.split(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in where)
    found = {}
    for stored in where:
        name = prefix + stored if bare and not stored.startswith(heads) else stored
        for old, new in RENAMED.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        found[name] = where[stored]
    return found


def without_prefix(rows: Sequence[Row]) -> list[Row]:
    """The rows as a base model is saved: names without the leading word."""
    prefix = rows[0].name.split(".")[0] + "."
    return [row._replace(name=row.name.removeprefix(prefix)) for row in rows]


def expand(rows: Sequence[Row], abstract: Mapping) -> Iterator[tuple[str, Row, int | None]]:
    """(name, row, layer) of every tensor; the layer is None for what is not stacked."""
    for row in rows:
        if "{l}" in row.name:
            for layer in range(abstract[row.path].shape[0]):
                yield row.name.format(l=layer), row, layer
        else:
            yield row.name, row, None


def _shape_in_file(row: Row, layer: int | None, abstract: Mapping) -> tuple[int, ...]:
    shape = tuple(abstract[row.path].shape)
    shape = shape if layer is None else shape[1:]
    return shape[::-1] if row.transpose else shape


def _read(row: Row, shape: tuple[int, ...], stored: Mapping, dtype, sharding) -> jax.Array:
    if sharding is None:
        whole = (slice(None),) * len(shape)
        return jax.device_put(_read_part(row, shape, whole, stored, dtype), may_alias=True)
    places: dict[tuple, list] = {}  # part -> the devices here that hold it
    for device, part in sharding.addressable_devices_indices_map(shape).items():
        ends = tuple(slice(*part[i].indices(n)) for i, n in enumerate(shape))
        places.setdefault(tuple((s.start, s.stop) for s in ends), []).append(device)
    arrays = []
    for ends, devices in places.items():
        part = _read_part(row, shape, tuple(slice(*e) for e in ends), stored, dtype)
        arrays += [jax.device_put(part, device) for device in devices]
        jax.block_until_ready(arrays)  # before the next part takes its place in host memory
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_part(row: Row, shape, part: tuple[slice, ...], stored: Mapping, dtype) -> np.ndarray:
    """A part of a parameter, for which only that part of its tensors is read."""
    out = _empty(tuple(len(range(*s.indices(n))) for s, n in zip(part, shape)), dtype)
    targets = [(row.name, out)]
    if "{l}" in row.name:
        layers, part = range(shape[0])[part[0]], part[1:]
        targets = [(row.name.format(l=layer), out[i]) for i, layer in enumerate(layers)]
    in_file, turn = (part[::-1], np.transpose) if row.transpose else (part, np.asarray)
    for name, target in targets:
        found = stored[name]
        # Opened for each tensor: an open file's pages count as this process's memory once read.
        with _open(found.file) as handle:
            target[...] = turn(handle.get_slice(found.name)[in_file])
    return out


def _empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes: on CPU, JAX takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


SHARD_BYTES = 5_000_000_000  # as transformers cuts; vLLM and others expect no more


def save(
    directory: Path,
    params: Mapping,
    rows: Sequence[Row],
    config: dict,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the safetensors that transformers reads; the inverse of `load`.

    Weights above `max_shard_bytes` go into several files and an index. No more than one file's
    tensors are in host memory at a time. Weights that the directory held before are removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(list(expand(rows, params)), params, max_shard_bytes)
    for old in [directory / INDEX, directory / SINGLE, *directory.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)
    width = f"-of-{len(shards):05}"
    files = [f"model-{number:05}{width}.safetensors" for number in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else [SINGLE]
    for file, shard in zip(files, shards, strict=True):
        tensors = {name: _to_file(params[row.path], row, layer) for name, row, layer in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(files) > 1:
        paths = {row.path for row in rows}
        index = {
            "metadata": {"total_size": sum(params[path].nbytes for path in paths)},
            "weight_map": {name: f for f, shard in zip(files, shards) for name, _, _ in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shards(tensors: list, params: Mapping, most: int) -> list[list]:
    """The tensors in files of at most `most` bytes; one that is larger has a file of its own."""
    shards, size = [[]], 0
    for name, row, layer in tensors:
        value = params[row.path]
        nbytes = value.nbytes if layer is None else value.nbytes // value.shape[0]
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append((name, row, layer))
        size += nbytes
    return shards


def _to_file(value, row: Row, layer: int | None) -> np.ndarray:
    value = np.asarray(value if layer is None else value[layer])
    return np.ascontiguousarray(value.T if row.transpose else value)
