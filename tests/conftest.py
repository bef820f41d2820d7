"""Strict JAX, no network, and compiled programs kept in pytest's cache so that reruns are fast."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from importlib.metadata import version
from pathlib import Path

# Compiling is most of the work here. The older way of fusing takes a third of the time, and gives
# the same numbers but for rounding. An XLA that does not know a flag ends the process.
if version("jaxlib").startswith("0.10."):
    older = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{older} {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest
from forked import Forks

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Cheap machine code takes half of the time to make.
jax.config.update("jax_disable_most_optimizations", True)
# Tolerances are those of float32; an accelerator would multiply in less.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs where pytest keeps what it wants to find again."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of commands that tests start and kill; compiled programs are shared by all of them."""
    cache, root = tmp_path_factory.mktemp("compiled"), Path(__file__).parents[1]
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XDG_CACHE_HOME": str(cache),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # or the command starts itself again
        "PYTHONPATH": f"{root}:{root / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def forks(environment, tmp_path_factory):
    """Starts such commands."""
    with Forks(environment, tmp_path_factory.mktemp("logs")) as made:
        yield made
