"""A real pretrained encoder, all-MiniLM-L6-v2: its tokens, its embeddings, its file."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tiny import FIXTURES, minilm

from jax_lowrank import models
from jax_lowrank.models.head import Head


@functools.cache
def encoder():
    return models.load(minilm())


@functools.cache
def oracle():
    with np.load(FIXTURES.parent / "encoders" / "minilm.npz") as stored:
        return dict(stored)


@functools.partial(jax.jit, static_argnames="graphdef")
def embeddings(graphdef, params, tokens, mask):
    """First state of every row after the last block, and the sentence embeddings."""
    net = nnx.merge(graphdef, params)
    return net.hidden(tokens, mask)[0][:, 0], net.sentence(tokens, mask)


def test_its_config_and_head():
    model = encoder()
    assert (model.family, model.head, model.head_paths) == ("bert", Head("embedding"), ())
    c = model.config
    assert (c.num_layers, c.width, c.num_heads, c.mlp_width) == (6, 384, 12, 1536)
    assert (c.max_positions, c.norm_eps, c.activation) == (512, 1e-12, "gelu")
    assert sum(array.size for array in models.by_path(model.params).values()) == 22_713_216


def test_its_tokenizer_gives_the_frozen_tokens():
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(minilm())(
        oracle()["texts"].tolist(), padding=True, return_tensors="np"
    )
    np.testing.assert_array_equal(batch["input_ids"], oracle()["tokens"])
    np.testing.assert_array_equal(batch["attention_mask"], oracle()["mask"])


@pytest.mark.parametrize("side", ["right", "left"])
def test_sentence_embeddings_equal_pytorch(side):
    model, o = encoder(), oracle()
    tokens, mask = o["tokens"], o["mask"]
    if side == "left":
        order = np.argsort(mask, axis=1, kind="stable")  # pads to the front, texts as they were
        tokens, mask = (np.take_along_axis(x, order, axis=1) for x in (tokens, mask))
    first, ours = embeddings(model.graphdef, model.params, tokens, mask)
    np.testing.assert_allclose(ours, o["embeddings"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    if side == "right":
        np.testing.assert_allclose(first, o["first"], atol=1e-5, rtol=1e-5)
    eating, bread, baby = np.asarray(ours)[1:4]
    assert eating @ bread > 0.6 > 0 > eating @ baby


def test_export_gives_the_same_tensors(tmp_path):
    model = encoder()
    models.save(tmp_path, model, model.params)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, minilm()))
    assert theirs.pop("embeddings.position_ids").dtype == np.int64  # a buffer that nothing reads
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)


def test_a_new_classifier_on_it():
    head = Head("classification", ("sexist", "not sexist"))
    model = models.load(minilm(), head=head, key=jax.random.key(0))
    assert model.head_paths == ("classifier.out.bias", "classifier.out.kernel")
    pooler = np.asarray(models.by_path(model.params)["pooler.kernel"])
    np.testing.assert_array_equal(pooler, models.by_path(encoder().params)["pooler.kernel"])
