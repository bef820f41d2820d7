"""trainable.safetensors: what a run trained, by path, written without a host that holds it all."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_lowrank import results, sharding
from jax_lowrank.processes import is_first, once, raise_together

NAME = "trainable.safetensors"
# as safetensors writes them
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def begin(final: Path, arrays: Mapping[str, Any]) -> Path:
    """A directory for `results.write_directory` to go on with, with the arrays' file if there are
    any. Every process must call this; the first one writes, and an error is raised in all."""
    partial = Path(once(lambda: str(results.begin_directory(final))))
    if arrays:
        _write(partial / NAME, arrays)
    return partial


def _write(file: Path, arrays: Mapping[str, Any]) -> None:
    header, end = {}, 0
    for path, array in arrays.items():
        begin, end = end, end + array.nbytes
        dtype = DTYPES[str(array.dtype)]
        header[path] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    parts = (part.tobytes() for array in arrays.values() for part in sharding.pieces(array))
    blocks, error = itertools.chain([struct.pack("<Q", len(text)), text], parts), None
    try:
        if is_first():
            with open(file, "wb") as out:
                out.writelines(blocks)
    except OSError as problem:
        error = problem
        shutil.rmtree(file.parent)
    for _ in blocks:  # what is left needs every process
        pass
    raise_together(error)
