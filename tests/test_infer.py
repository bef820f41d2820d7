"""Sampling against brute force, likelihoods and lenses against PyTorch's numbers, and both on 8
devices against one.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import chi2
from test_sharding import finish, start
from tiny import apply_of, assert_close, model_of, oracle_of

from jax_lowrank import infer
from jax_lowrank.infer import Sampling


def applied(name="gpt2"):
    model = model_of(name)
    return apply_of(model.graphdef), (model.params,)


choose = jax.jit(infer.choose, static_argnames="sampling")


def kept_by_hand(logits, sampling):
    """Probabilities after the filters, by sorting in plain Python."""
    probs = softmax(logits / sampling.temperature)
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = order[: sampling.top_k] if sampling.top_k else order
    within = probs[kept] / probs[kept].sum()
    smallest = next(n for n in range(1, len(kept) + 1) if within[:n].sum() >= sampling.top_p - 1e-7)
    kept = kept[:smallest]
    out = np.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(top_k=3),
        Sampling(top_p=0.6),
        Sampling(temperature=2.0, top_k=6, top_p=0.7),
        Sampling(top_k=99),
        Sampling(top_p=1e-6),
    ],
)
def test_draws_follow_the_filtered_distribution(sampling):
    rng, draws = np.random.default_rng(0), 6000
    logits = rng.normal(0, 1.5, 10).astype(np.float32)
    expected = kept_by_hand(logits.astype(np.float64), sampling)
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = np.asarray(choose(jnp.tile(logits, (draws, 1)), keys, sampling=sampling))
    counts = np.bincount(tokens, minlength=10)
    assert not counts[expected == 0].any(), "a token that was filtered out is drawn"
    possible = expected > 0
    statistic = ((counts - draws * expected)[possible] ** 2 / (draws * expected)[possible]).sum()
    assert statistic <= chi2.ppf(0.9999, max(1, possible.sum() - 1))


def test_greedy_takes_the_likeliest():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(5, 9)))
    keys = jax.random.split(jax.random.key(0), 5)
    np.testing.assert_array_equal(
        choose(logits, keys, sampling=Sampling(temperature=0.0)), logits.argmax(-1)
    )


PROMPTS = ([3, 4, 5], [9], [7, 8, 20, 21, 22], [40, 41])


@functools.cache
def samples(batch_size, key=0, num_samples=3):
    return infer.sample(
        *applied(),
        [list(p) for p in PROMPTS],
        num_samples=num_samples,
        max_new_tokens=8,
        sampling=Sampling(),
        eos_id=None,
        pad_id=0,
        batch_size=batch_size,
        key=jax.random.key(key),
    )


def test_same_key_same_text_whatever_the_batch_size():
    reference = samples(12)
    assert reference.shape == (4, 3, 8) and reference.dtype == np.int32
    for batch_size in (1, 5, 64):
        np.testing.assert_array_equal(samples(batch_size), reference)


def test_samples_differ_by_number_prompt_and_key():
    texts = samples(12)
    rows = {tuple(row) for row in texts.reshape(-1, 8)}
    assert len(rows) == 12
    assert (samples(12, key=1) != texts).any(axis=2).all()
    # More samples of a prompt begin with the same ones.
    np.testing.assert_array_equal(samples(12, num_samples=6)[:, :3], texts)


def test_eos_stops_and_pads_follow():
    greedy = oracle_of("gpt2")["greedy"]
    oracle, eos = oracle_of("gpt2"), int(greedy[0, 3])
    drawn = np.asarray(
        infer.generate(
            *applied(),
            oracle["left_tokens"],
            oracle["left_mask"].astype(bool),
            jax.random.split(jax.random.key(0), 3),
            max_new_tokens=16,
            sampling=Sampling(temperature=0.0),
            eos_id=eos,
            pad_id=0,
        )
    )
    stopped = 0
    for row, wanted in zip(drawn, greedy, strict=True):
        at = np.flatnonzero(wanted == eos)
        end = at[0] + 1 if at.size else len(wanted)
        np.testing.assert_array_equal(row[:end], wanted[:end])  # the stop itself is kept
        assert not row[end:].any()
        stopped += bool(at.size)
    assert stopped >= 1


def test_a_prompt_that_ends_at_once():
    # Every token is the stop: one step, and all the rest is padding.
    model = model_of("gpt2")
    apply, states = applied()
    first = int(oracle_of("gpt2")["greedy"][0, 0])
    out = infer.sample(
        apply,
        states,
        [oracle_of("gpt2")["tokens"][0].tolist()],
        num_samples=2,
        max_new_tokens=4,
        sampling=Sampling(temperature=0.0),
        eos_id=first,
        pad_id=model.config.vocab_size - 1,
        batch_size=2,
        key=jax.random.key(0),
    )
    pad = model.config.vocab_size - 1
    assert out.tolist() == [[[first, pad, pad, pad]] * 2]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_likelihood_equals_the_sum_by_hand(batch_size):
    oracle = oracle_of("gpt2")
    lengths = (24, 7, 2)
    texts = [row[:n].tolist() for row, n in zip(oracle["tokens"], lengths, strict=True)]
    out = infer.likelihood(*applied(), texts, batch_size=batch_size, pad_id=0)
    assert out.tokens.tolist() == [n - 1 for n in lengths] and out.nll.dtype == np.float32
    log_probs = log_softmax(oracle["logits"].astype(np.float64), axis=-1)
    for row, length in enumerate(lengths):
        targets = oracle["tokens"][row, 1:length]
        expected = -log_probs[row, np.arange(length - 1), targets].sum()
        assert out.nll[row] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama_mha"])
def test_next_token_and_lens(name):
    from safetensors.numpy import load_file
    from tiny import FIXTURES

    oracle, words = oracle_of(name), [5, 9, 11]
    prompts = [oracle["tokens"][0].tolist(), oracle["tokens"][1, :24].tolist()]
    prompts += [
        row[mask > 0].tolist() for row, mask in zip(oracle["left_tokens"], oracle["left_mask"])
    ]
    out = infer.next_token(*applied(name), prompts, words, batch_size=2, pad_id=0)
    expected = np.concatenate([oracle["logits"][:2, -1], oracle["left_logits"][:, -1]])
    assert_close(out.log_posterior, log_softmax(expected, axis=-1))
    assert out.lens_mass.shape == (5, 3)
    np.testing.assert_allclose(
        out.lens_mass[:, -1], np.exp(out.log_posterior)[:, words].sum(1), rtol=1e-5
    )
    # Earlier layers, from PyTorch's hidden states through the final norm and the output table.
    tensors = load_file(FIXTURES / name / "model.safetensors")
    for layer in range(2):
        x = oracle["hidden"][layer, :2, -1].astype(np.float64)
        if name == "gpt2":
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * tensors["transformer.ln_f.weight"] + tensors["transformer.ln_f.bias"]
            table = tensors["transformer.wte.weight"]
        else:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * tensors["model.norm.weight"]
            table = tensors["lm_head.weight"]
        mass = softmax(x @ table.T, axis=-1)[:, words].sum(-1)
        np.testing.assert_allclose(out.lens_mass[:2, layer], mass, rtol=1e-4)


# L, B, K, T, N of 8 rows of 6 + 8 tokens on one device; a mixed mesh cuts rows by 4 and heads by 2.
CACHES = {"gpt2": [2, 8, 4, 14, 8], "llama_bias": [2, 8, 2, 14, 6]}


@pytest.mark.slow
def test_eight_devices_answer_as_one(tmp_path):
    fixtures = (*CACHES, "roberta_masked-lm", "distilbert_classification")
    finish(start(tmp_path / "out.json", *fixtures, script="asked.py"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == set(fixtures)
    for fixture, runs in found.items():
        one = runs.pop("one")
        caches = {name: run.pop("cache", None) for name, run in runs.items()}
        if fixture in CACHES:
            layers, rows, heads, slots, width = whole = CACHES[fixture]
            assert one.pop("cache") == [whole]
            assert caches == {
                "fsdp": [[layers, rows // 8, heads, slots, width]],
                "mixed": [[layers, rows // 4, heads // 2, slots, width]],
            }
        assert {len(x) for x in one.values()} == {3, 11}  # no row is dropped
        for name, run in runs.items():
            assert run.keys() == one.keys()
            for asked, values in run.items():
                exact = asked.startswith(("text", "tokens"))
                close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
                np.testing.assert_allclose(
                    values, one[asked], **close, err_msg=f"{fixture} {name} {asked}"
                )
