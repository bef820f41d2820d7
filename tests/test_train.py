"""The train step against PyTorch, accumulation against the large batch, and the loop's promises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import FIXTURES, apply_of, assert_close, model_of, oracle_of, same_bytes

from jax_lowrank import models, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import decay_mask
from jax_lowrank.data import Batch, make_batches

FULL = METHODS["full"]()
# Ours -> theirs in train_gpt2.npz: path, and which layer of the stack.
WATCHED = {
    "c_attn_weight": ("blocks.attn.qkv.kernel", 0),
    "ln_weight": ("blocks.norm1.scale", 1),
    "c_fc_bias": ("blocks.mlp.up.bias", 1),
    "wte_weight": ("embed.table", ...),
}


def copied(tree):
    """A copy that a donating function may destroy."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def take(batch, steps=1, **changed):
    """Arguments of run_steps for full fine-tuning of the tiny GPT-2 on `steps` times `batch`."""
    model = model_of("gpt2")
    optimizer = changed.pop("optimizer", optax.identity())
    defaults = {
        "apply": apply_of(model.graphdef),
        "loss": train.causal_lm_loss,
        "optimizer": optimizer,
        "accumulate": 1,
        "trainable": copied(model.params),
        "opt_state": optimizer.init(model.params),
        "frozen": {},
        "batches": jax.tree.map(lambda x: np.stack([x] * steps), batch),
        "rates": np.full(steps, 1e-3, np.float32),
        "count": steps,
        "key": jax.random.key(0),
    }
    return train.run_steps(**{**defaults, **changed})


def whole(tokens):
    """A batch whose every token but the first of a row counts."""
    weights = np.ones(tokens.shape, np.float32)
    weights[:, 0] = 0
    return Batch(tokens, weights)


@functools.cache
def torch_run():
    with np.load(FIXTURES / "train_gpt2.npz") as stored:
        return dict(stored)


def test_three_steps_of_adamw_equal_those_of_pytorch():
    golden, model = torch_run(), model_of("gpt2")
    # PyTorch decayed every tensor of two or more dimensions; ours is the same set.
    shapes = models.by_path(model.params)
    for path, decayed in models.by_path(decay_mask(model.params)).items():
        assert decayed == (shapes[path].ndim - path.startswith("blocks.") >= 2), path
    optimizer = train.make_optimizer(model.params, FULL, weight_decay=0.1, clip=1.0)
    batch = whole(oracle_of("gpt2")["tokens"])
    trainable, _, losses, norms = take(batch, steps=4, optimizer=optimizer, count=4)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-5)
    np.testing.assert_allclose(norms[:3], golden["gradient_norms"], rtol=1e-4)
    trainable, _, losses, _ = take(batch, steps=4, optimizer=optimizer, count=3)
    assert not losses[3], "a step that was not asked for"
    arrays = models.by_path(trainable)
    for name, (path, layer) in WATCHED.items():
        before = np.asarray(shapes[path][layer])
        moved = np.abs(golden[f"after_{name}"] - before).max()
        # Three steps of 1e-3: a difference of 1 % of the movement would be seen.
        assert moved > 1e-3
        np.testing.assert_allclose(arrays[path][layer], golden[f"after_{name}"], atol=0.01 * moved)


def test_gradient_equals_that_of_pytorch():
    golden, model = torch_run(), model_of("gpt2")
    batch = whole(oracle_of("gpt2")["tokens"])
    # The update of the identity is the gradient itself.
    trainable, _, _, norms = take(batch, rates=np.ones(1, np.float32))
    for name, (path, layer) in WATCHED.items():
        before, after = models.by_path(model.params)[path], models.by_path(trainable)[path]
        wanted = golden[f"gradient_{name}"]
        assert_close(before[layer] - after[layer], wanted, atol=1e-4 * np.abs(wanted).max() + 1e-6)
    np.testing.assert_allclose(norms[0], golden["gradient_norms"][0], rtol=1e-5)


def test_decay_is_decoupled_from_the_gradient_and_clip_bounds_it():
    # Gradient zero: only decay acts, on kernels and not on norms.
    params = {"kernel": jnp.full((2, 2), 2.0), "scale": jnp.full(2, 2.0)}
    from flax import nnx

    state = nnx.State({name: nnx.Param(value) for name, value in params.items()})
    optimizer = train.make_optimizer(state, FULL, weight_decay=0.1, clip=0.0)
    zeros = jax.tree.map(jnp.zeros_like, state)
    updates, _ = jax.jit(_update, static_argnums=0)(optimizer, zeros, state)
    assert_close(models.by_path(updates)["kernel"], 0.2)
    assert not models.by_path(updates)["scale"].any()
    plain = FULL._replace(transform=lambda inner: optax.identity())
    clipped = train.make_optimizer(state, plain, weight_decay=0.0, clip=1.0)
    updates, _ = jax.jit(_update, static_argnums=0)(
        clipped, jax.tree.map(lambda x: x * 9, state), state
    )
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)


def _update(optimizer, grads, params):
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(grads, optimizer.init(params), params)


def ragged():
    """Eight rows whose weights differ much, one of them without any."""
    tokens = np.concatenate([oracle_of("gpt2")["tokens"]] * 3)[:8]
    lengths = np.array([24, 3, 9, 2, 17, 0, 24, 5])
    weights = (np.arange(24)[None] < lengths[:, None]).astype(np.float32)
    weights[:, 0] = 0
    return Batch(np.roll(tokens, 1, axis=0), weights)


def test_accumulated_micro_batches_equal_the_large_batch():
    # The optimizer is the identity, so that parameters move by the gradient itself.
    results = [take(ragged(), accumulate=n, rates=np.ones(1, np.float32)) for n in (1, 2, 4)]
    reference, _, loss, norm = results[0]
    assert float(norm[0]) > 0.1
    for trainable, _, other_loss, other_norm in results[1:]:
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        np.testing.assert_allclose(other_norm, norm, rtol=1e-5)
        chex.assert_trees_all_close(trainable, reference, atol=2e-6)
    # By hand: the sum over tokens by the number of tokens, not a mean of means.
    batch, model = ragged(), model_of("gpt2")
    nll = np.asarray(apply_of(model.graphdef)(model.params).nll(batch.tokens), np.float64)
    assert float(loss[0]) == pytest.approx((nll * batch.weights).sum() / batch.weights.sum())


def test_a_batch_without_weight_moves_nothing():
    batch = ragged()._replace(weights=np.zeros((8, 24), np.float32))
    trainable, _, loss, norm = take(batch)
    assert float(loss[0]) == float(norm[0]) == 0.0
    assert same_bytes(trainable, model_of("gpt2").params)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_schedules(shape):
    schedule = train.make_schedule(0.5, 100, 0.095, shape)
    assert schedule.warmup_steps == 10  # rounded up
    rates = schedule(np.arange(100))
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    done = np.arange(90) / 90
    expected = {"cosine": np.cos(done * np.pi / 2) ** 2, "linear": 1 - done, "constant": done**0}
    np.testing.assert_allclose(rates[10:], 0.5 * expected[shape], rtol=1e-5)
    assert rates.max() == 0.5 and rates[-1] > 0
    without = train.make_schedule(0.5, 4, 0.0, shape)(np.arange(4))
    assert without[0] == 0.5


# -------------------------------------------------------------------------------------- the loop


@functools.cache
def lora_with_dropout():
    model = model_of("gpt2")
    method = METHODS["lora"](rank=2, alpha=4.0, dropout=0.2)
    graphdef, trainable, frozen = method.split(jax.random.key(0), model)
    optimizer = train.make_optimizer(trainable, method, weight_decay=0.0, clip=1.0)
    return graphdef, trainable, frozen, optimizer


@functools.cache
def corpus():
    """Batches of two widths, 5 steps an epoch."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 97, n).tolist() for n in (7, 8) * 5 + (15, 16) * 4]
    batches = make_batches(sequences, batch_size=4, seed=0, pad_id=0)
    assert batches.steps_per_epoch == 5 and len(batches.widths) == 2
    return batches


def told(*values):
    """A validation that says these losses, one after another."""
    remaining = iter(values)
    return lambda trainable: next(remaining)


def fitted(steps=10, steps_per_call=3, batches=None, validate=None, peak=1e-2):
    """`fit` on the corpus, and its log lines."""
    graphdef, trainable, frozen, optimizer = lora_with_dropout()
    lines = []
    result = train.fit(
        apply=apply_of(graphdef),
        loss=train.causal_lm_loss,
        optimizer=optimizer,
        trainable=copied(trainable),
        frozen=frozen,
        batches=batches or corpus(),
        schedule=train.make_schedule(peak, steps, 0.1, "linear"),
        validate=validate or told(5.0, 4.0, 3.0, 2.0),
        log=lines.append,
        steps_per_call=steps_per_call,
        key=jax.random.key(1),
    )
    return result, lines


def test_steps_per_call_does_not_change_the_result():
    # Dropout included: it is decided by the number of the step, not by its place in a call.
    results = [fitted(steps_per_call=n)[0].trainable for n in (1, 3)]
    chex.assert_trees_all_close(*results, atol=1e-6)


def test_the_best_state_is_kept_on_the_host():
    seen, values = [], iter([5.0, 3.0, 4.0, 3.5])

    def validate(trainable):
        seen.append(jax.device_get(trainable))
        return next(values)

    result, _ = fitted(steps=15, validate=validate)
    assert len(seen) == 4  # before the first step and after each epoch
    assert (result.best_step, result.validation_loss, result.num_steps) == (5, 3.0, 15)
    assert same_bytes(result.trainable, seen[1]) and not same_bytes(seen[1], seen[3])
    assert {type(leaf) for leaf in jax.tree.leaves(result.trainable)} == {np.ndarray}
    assert result.seconds > 0 and result.tokens_per_second > 0


def test_the_state_before_training_can_be_the_best():
    result, _ = fitted(steps=5, validate=told(1.0, 1.0))
    assert result.best_step == 0 and same_bytes(result.trainable, lora_with_dropout()[1])


def test_the_last_epoch_may_be_cut():
    result, lines = fitted(steps=7)
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 5, 7]
    assert result.num_steps == 7 and result.best_step == 7


def test_log_lines():
    _, lines = fitted(steps=10)
    assert lines[0] == {"step": 0, "validation_loss": 5.0}
    training = [line for line in lines if "loss" in line]
    names = {"step", "num_steps", "loss", "gradient_norm", "learning_rate", "tokens_per_second"}
    assert all(line.keys() == names and line["num_steps"] == 10 for line in training)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert lines[-1] == {"step": 10, "validation_loss": 3.0}
    assert training[-1]["step"] == 10 and training[-1]["learning_rate"] == pytest.approx(1e-2 / 9)
    # Losses of calls, weighted by their steps, are those of the epoch.
    assert all(3 < line["loss"] < 8 and line["gradient_norm"] > 0 for line in training)


class Spoiled:
    """The corpus, with weights that are infinite from batch `at` on."""

    def __init__(self, at):
        self.inner, self.at, self.steps_per_epoch = corpus(), at, 5

    def width(self, t):
        """Of the corpus."""
        return self.inner.width(t)

    def batch(self, t):
        """Of the corpus, spoiled or not."""
        batch = self.inner.batch(t)
        return batch if t < self.at else batch._replace(weights=batch.weights * np.inf)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 * inf is what this test wants
@pytest.mark.parametrize(("at", "steps_per_call"), [(0, 3), (6, 3), (7, 3), (9, 1)])
def test_a_loss_that_is_not_a_number_stops_training(at, steps_per_call):
    with pytest.raises(train.DivergedError, match="lower the learning rate") as caught:
        fitted(batches=Spoiled(at), steps_per_call=steps_per_call)
    assert caught.value.step == at + 1  # steps are counted from 1 in words
    assert not np.isfinite(caught.value.loss) and f"step {at + 1};" in str(caught.value)


def test_a_validation_that_is_not_a_number_stops_training():
    with pytest.raises(train.DivergedError) as caught:
        fitted(validate=told(5.0, float("nan")))
    assert caught.value.step == 5


def test_chunks_cover_every_step_once_in_order():
    batches = corpus()
    for limit in (1, 2, 32):
        seen = []
        for first, stacked in train.chunks(batches, 3, 12, limit):
            assert len(stacked.tokens) <= limit
            for offset, tokens in enumerate(stacked.tokens):
                np.testing.assert_array_equal(tokens, batches.batch(first + offset).tokens)
                seen.append(first + offset)
        assert seen == list(range(3, 12))
    assert train.num_steps(batches, 4) == 20
