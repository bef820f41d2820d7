"""Strict JAX, no network, and compiled programs kept in pytest's cache so that reruns are fast."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling is most of the work here; cheap machine code takes half of the time to make.
jax.config.update("jax_disable_most_optimizations", True)
# Tolerances are those of float32; an accelerator would multiply in less.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs where pytest keeps what it wants to find again."""
    cache = getattr(config, "cache", None)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
