"""trainable.safetensors as the safetensors library reads it; tests/test_processes.py: of two."""

import resource

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_lowrank import trainable_file


def test_safetensors_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(3, 4, 5)).astype(np.float32)
    arrays = {
        "blocks.q.kernel": jnp.asarray(stack),
        "turned": stack[0].T,  # not contiguous
        "scale": jnp.float32(2.5),
        "half": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 3), np.float32),
    }
    partial = trainable_file.begin(tmp_path / "run", arrays)
    assert partial.parent == tmp_path and partial.name.startswith(".partial-run-")
    found = load_file(partial / trainable_file.NAME)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == np.asarray(array).tobytes()
    assert not list(trainable_file.begin(tmp_path / "other", {}).iterdir())


def test_nothing_is_left_where_the_file_cannot_be_written(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            trainable_file.begin(tmp_path / "run", {name: np.ones(100) for name in "abcd"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())
