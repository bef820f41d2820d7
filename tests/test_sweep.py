"""Cells of a sweep against their single runs, and what they must not do to each other."""

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FIXTURES, apply_of, folder_of, model_of, same_bytes

from jax_lowrank import infer, models, sweep, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import count
from jax_lowrank.checkpoint import Checkpoints, Interrupted
from jax_lowrank.data import LabelledBatches, make_batches
from jax_lowrank.models.head import Head
from jax_lowrank.sweep import score, step
from jax_lowrank.sweep.cells import stack

STEPS = 50
# f32: products of other shapes (packs, filled-up ranks) sum in another order, which is 1e-7 a step;
# 50 steps of Adam let it grow to 2e-6 here (loss curves) and 2e-6 (states, in norms). In packs of
# one, cells of the largest rank are the very same bits.
RTOL = 1e-5


class Want(NamedTuple):
    """A cell: LoRA's options, and how it is trained."""

    options: dict
    rate: float = 1e-2
    seed: int = 0
    steps: int = STEPS
    decay: float = 0.0
    clip: float = 1.0
    shape: str = "cosine"


MIXED = (
    Want({"rank": 2, "alpha": 4.0}),
    Want({"rank": 4, "alpha": 8.0, "rslora": True}, 3e-3, 1, decay=0.1, shape="linear"),
    Want({"rank": 1, "alpha": 1.0, "layer_fraction": 0.5}, 2e-2, 2, 35, 0.2, 0.05),
)


@functools.cache
def classifier():
    """The tiny GPT-2 with a fresh head of three classes."""
    base = model_of("gpt2")
    head = Head("classification", ("a", "b", "c"))
    return models.create("gpt2", base.config, jax.random.key(7), head=head)


@functools.cache
def corpus(seed=0, labelled=False):
    """Batches of one width, 10 steps an epoch."""
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, 97, n).tolist() for n in rng.integers(5, 9, 40)]
    batches = make_batches(sequences, batch_size=4, seed=seed, pad_id=0, least=1)
    assert batches.steps_per_epoch == 10 and len(batches.widths) == 1
    return (
        LabelledBatches(batches, rng.integers(0, 3, 40).astype(np.int32)) if labelled else batches
    )


def cell_of(want, model, **more):
    """The cell, split with its seed."""
    method = METHODS["lora"](**{"dropout": 0.1, **want.options, **more})
    parts = method.split(jax.random.key(want.seed), model)
    schedule = train.make_schedule(want.rate, want.steps, 0.1, want.shape)
    key = jax.random.key(100 + want.seed)
    return sweep.Cell(method, *parts, schedule, key, want.decay, want.clip)


def falling():
    """A validation that every state passes better than the one before: the last one is kept."""
    remaining = iter(range(1000, 0, -1))
    return lambda state: next(remaining)


def alone(cell, loss, batches):
    """The cell's single run, and its lines."""
    lines = []
    optimizer = train.make_optimizer(
        cell.trainable, cell.method, weight_decay=cell.weight_decay, clip=cell.clip
    )
    done = train.fit(
        apply=apply_of(cell.graphdef),
        loss=loss,
        optimizer=optimizer,
        trainable=jax.tree.map(lambda x: jnp.array(x, copy=True), cell.trainable),
        frozen=cell.frozen,
        batches=batches,
        schedule=cell.schedule,
        validate=falling(),
        log=lines.append,
        steps_per_call=1,
        key=cell.key,
    )
    return done, lines


@functools.cache
def program(loss):
    """One program for all sweeps of a loss."""
    model = model_of("gpt2") if loss is train.causal_lm_loss else classifier()
    return sweep.make_program(cell_of(MIXED[0], model), loss)


def together(cells, loss, batches, plan=None, validate=None, made=None):
    """The sweep of the cells: outcomes, and each cell's lines."""
    lines, fall = [[] for _ in cells], falling()
    out = sweep.fit(
        program=made or program(loss),
        cells=cells,
        batches=batches,
        validate=validate or (lambda state: [fall(state)] * len(cells)),
        log=lambda k, line: lines[k].append(line),
        steps_per_call=1,
        plan=step.Plan(*plan) if plan else None,
    )
    return out, lines


def curve(lines, name="loss"):
    return np.array([line[name] for line in lines if name in line])


def distance(state, other):
    """Largest |a - b| / |b| over the arrays, in norms."""
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def differences(single, got, lines):
    """How far a cell is from its single run: loss curve, gradient norms, last state (relative)."""
    wanted, single = single
    assert [line.keys() for line in lines] == [line.keys() for line in single]
    for name in ("step", "num_steps", "learning_rate"):
        np.testing.assert_array_equal(curve(lines, name), curve(single, name))
    assert (got.best_step, got.num_steps) == (wanted.best_step, wanted.num_steps)
    assert models.by_path(got.trainable).keys() == models.by_path(wanted.trainable).keys()
    apart = np.abs(curve(lines) / curve(single) - 1).max()
    norms = np.abs(curve(lines, "gradient_norm") / curve(single, "gradient_norm") - 1).max()
    return apart, norms, distance(got.trainable, wanted.trainable)


@functools.cache
def mixed():
    """The cells of MIXED, their single runs on the corpus, and these together in packs of two."""
    cells = [cell_of(want, model_of("gpt2")) for want in MIXED]
    singles = [alone(cell, train.causal_lm_loss, corpus()) for cell in cells]
    before = step.run_cells._cache_size()
    out = together(cells, train.causal_lm_loss, corpus(), (1, 2))
    assert step.run_cells._cache_size() == before + 1
    return cells, singles, out


def test_cells_of_a_causal_lm_equal_their_single_runs():
    _, singles, (out, lines) = mixed()
    apart = [differences(*each) for each in zip(singles, out, lines, strict=True)]
    assert np.max(apart) < RTOL, apart


def test_below_float32_a_cell_is_its_single_run_but_for_rounding():
    # Alone in its pack to the bit, filled-up rank or not. Beside others XLA rounds the products of
    # the base in another order: by 2^-9, of which 1e-3 is seen in the losses, 3e-2 in the states.
    base = models.load(folder_of("gpt2"), jnp.bfloat16)
    cells = [cell_of(want, base) for want in MIXED[:2]]
    made = sweep.make_program(cells[0], train.causal_lm_loss)
    singles = [alone(cell, train.causal_lm_loss, corpus()) for cell in cells]
    for size, limit in ((1, (0, 0, 0)), (2, (5e-3, 2e-2, 0.1))):
        out, lines = together(cells, train.causal_lm_loss, corpus(), (1, size), made=made)
        for cell in zip(singles, out, lines, strict=True):
            assert np.all(np.array(differences(*cell)) <= limit), (size, differences(*cell))


def test_what_fills_up_stays_zero_under_decay_clipping_and_dropout():
    cells, _, _ = mixed()
    seen = []

    def validate(state):
        seen.append(models.by_path(jax.device_get(state.trainable)))
        return [0.0] * 3

    short = [c._replace(schedule=c.schedule._replace(num_steps=12)) for c in cells]
    together(short, train.causal_lm_loss, corpus(), (1, 2), validate)
    first, last = seen[0], seen[-1]
    for path, after in last.items():
        before = first[path]
        rank = (lambda x: x) if path.endswith(".a") else (lambda x: x.swapaxes(-1, -2))
        for k, r in enumerate((2, 4, 1)):
            assert not rank(after[k])[..., r:].any(), path
            assert rank(before[k])[0, :, :r].any() == path.endswith(".a")
            assert np.all(rank(after[k])[0, :, :r] != rank(before[k])[0, :, :r]), path
        assert not after[2, 1].any(), f"{path}: a layer that is not adapted"


def test_a_cell_that_diverges_leaves_the_others_alone():
    cells, _, (out, lines) = mixed()
    wild = cells[0]._replace(schedule=cells[0].schedule._replace(peak=np.inf))
    found, told = together([wild, *cells[1:]], train.causal_lm_loss, corpus(), (1, 2))
    error = found[0]
    assert isinstance(error, train.DivergedError) and not np.isfinite(error.loss)
    assert error.step == 2 and told[0][-1]["step"] == 1
    for k in (1, 2):
        assert same_bytes(found[k].trainable, out[k].trainable)
        np.testing.assert_array_equal(curve(told[k]), curve(lines[k]))


def test_a_sweep_that_is_stopped_goes_on_with_other_lanes(tmp_path):
    short = [c._replace(schedule=c.schedule._replace(num_steps=12)) for c in mixed()[0]]
    whole, _ = together(short, train.causal_lm_loss, corpus(), (1, 2))
    fall, left, lines = falling(), [5], [[] for _ in short]

    class Stopped(Checkpoints):
        def due(self):
            left[0] -= 1
            self.asked = left[0] == 0
            return self.asked

    def session(plan):
        return sweep.fit(
            program=program(train.causal_lm_loss),
            cells=short,
            batches=corpus(),
            validate=lambda state: [fall(state)] * 3,
            log=lambda k, line: lines[k].append(line),
            steps_per_call=1,
            plan=step.Plan(*plan),
            checkpoints=Stopped(tmp_path, "f"),
        )

    with pytest.raises(Interrupted, match="after step 5 of 12"):
        session((1, 1))  # three cells; with packs of two there is a surplus one
    for one, other in zip(session((1, 2)), whole, strict=True):
        assert one.resumed_at == (5,) and one.best_step == other.best_step == 12
        assert distance(one.trainable, other.trainable) < RTOL


def test_every_cell_keeps_its_own_best_state():
    cells, _, _ = mixed()
    losses = iter([[5, 5, 5], [4, 6, np.nan], [6, 4, 3], [7, 7, 7], [8, 3, 7], [9, 9, 9]])
    seen = []

    def validate(state):
        seen.append(jax.device_get(state.trainable))
        return next(losses)

    out, _ = together(cells, train.causal_lm_loss, corpus(), (1, 2), validate)
    assert [(o.best_step, o.validation_loss) for o in out[:2]] == [(10, 4.0), (40, 3.0)]
    assert isinstance(out[2], train.DivergedError) and out[2].step == 10
    wanted = models.by_path(seen[1])["blocks.attn.qkv.adapter.a"][0, :, :, :2]
    np.testing.assert_array_equal(
        models.by_path(out[0].trainable)["blocks.attn.qkv.adapter.a"], wanted
    )


def test_cells_that_cannot_share_a_program_are_refused():
    cells, _, _ = mixed()
    other = cell_of(MIXED[0], model_of("gpt2"), targets="attention")
    with pytest.raises(sweep.SweepError, match="cell 1 does not fit"):
        together([cells[0], other], train.causal_lm_loss, corpus())
    base = models.load(FIXTURES / "gpt2")
    with pytest.raises(sweep.SweepError, match="cell 1 has another base"):
        together([cells[0], cell_of(MIXED[0], base)], train.causal_lm_loss, corpus())
    with pytest.raises(sweep.SweepError, match="epochs of 10 and of 20 steps"):
        longer = make_batches([[1, 2]] * 80, batch_size=4, seed=0, pad_id=0)
        sweep.OwnBatches([corpus(), longer])


def test_stacked_models_score_texts_as_each_does_alone():
    cells, _, (out, _) = mixed()
    trained = [cell._replace(trainable=got.trainable) for cell, got in zip(cells, out)]
    texts = [[5, 9, 2, 7], [3, 1], [8, 8, 4, 6, 2, 11]]
    states = stack(program(train.causal_lm_loss), trained).states
    asked = {"batch_size": 2, "pad_id": 0}
    found = score.likelihood(program(train.causal_lm_loss), states, texts, **asked)
    assert found.nll.shape == (3, 3) and found.tokens.tolist() == [3, 1, 5]
    for cell, nll in zip(trained, found.nll):
        alone = infer.likelihood(
            apply_of(cell.graphdef), (cell.trainable, cell.frozen), texts, **asked
        )
        np.testing.assert_allclose(nll, alone.nll, rtol=RTOL)


def test_a_state_that_is_cut_lies_in_one_piece():
    _, _, (out, _) = mixed()  # or safetensors would write what lies between
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves([got.trainable for got in out]))


TWO, FOUR = {"rank": 2, "alpha": 4.0}, {"rank": 4, "alpha": 4.0}
OTHERS = {
    "dora": ("lora", (TWO | {"dora": True}, FOUR | {"dora": True})),
    "pissa": ("lora", (TWO | {"init": "pissa"}, FOUR | {"init": "pissa"})),
    "olora": ("lora", (TWO | {"init": "olora"}, FOUR | {"init": "olora"})),
    "plus": ("lora", (TWO | {"plus_ratio": 4.0}, FOUR | {"plus_ratio": 2.0})),
    "full": ("full", ({}, {})),
    "head": ("head", ({}, {})),
    "bitfit": ("bitfit", ({}, {})),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_methods_and_options_equal_their_single_runs(case):
    row, options = OTHERS[case]
    cells, loss = [], train.classification_loss
    for number, chosen in enumerate(options):
        method = METHODS[row](**chosen)
        parts = method.split(jax.random.key(number), classifier())
        schedule = train.make_schedule((1 + number) * 3e-3, 10, 0.1, "linear")
        cells.append(sweep.Cell(method, *parts, schedule, jax.random.key(number), 0.1, 1.0))
    batches = corpus(0, labelled=True)
    seen, fall = [], falling()

    def validate(state):
        seen.append(models.by_path(jax.device_get(state.trainable)))
        return [fall(state)] * 2

    made = sweep.make_program(cells[0], loss)
    out, lines = together(cells, loss, batches, (1, 2), validate, made)
    for path, array in seen[-1].items():
        if path.endswith((".adapter.a", ".adapter.b")):  # what fills up the cell of rank 2
            ranks = array[0] if path.endswith("a") else array[0].swapaxes(-1, -2)
            assert ranks.shape[-1] == 4 and not ranks[..., 2:].any(), path
    singles = [alone(cell, loss, batches) for cell in cells]
    apart = [differences(*each)[:2] for each in zip(singles, out, lines, strict=True)]
    assert np.max(apart) < RTOL, apart
    for (single, _), got in zip(singles, out, strict=True):
        (rest, keys), (other, other_keys) = parted(single.trainable), parted(got.trainable)
        assert distance(other, rest) < RTOL
        assert not keys or distance(other_keys, keys) < 10 * RTOL


def parted(state):
    """Arrays by path, and apart from them the keys' columns of B, where gradients come near 0 and
    Adam makes a step of their rounding (one entry of DoRA's, 2e-5). The keys' biases are left out:
    softmax cancels them, so that nothing but rounding moves them (1.2e-4, full fine-tuning).
    """
    rest, keys = models.by_path(state), {}
    for path in ("blocks.attn.qkv.bias", "blocks.attn.qkv.adapter.b"):
        if path in rest:
            query, key, value = np.split(np.asarray(rest[path]), 3, axis=-1)
            rest[path] = np.concatenate([query, value], -1)
            if path.endswith(".b"):
                keys[path] = key
    return rest, keys


def test_lanes_get_equal_shares_in_order_and_a_thread_each():
    def run(state, beside):
        threads.append(threading.get_ident())
        return state * beside["factor"], state.sum(1)

    def inputs():
        return jnp.arange(12.0).reshape(6, 2), {"factor": jnp.arange(6.0)[:, None]}

    threads = []
    whole = run(*inputs())
    state, beside = inputs()
    found = step.run_lanes(3, run, state, beside)
    assert state.is_deleted()
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one, other)
    assert threads[0] == threads[1] and len(set(threads)) in (2, 3)  # 3: of two calls, by two
    assert threads[1] not in threads[2:]


def test_a_plan_uses_every_core_and_no_more_than_there_are_cells():
    plans = [step.plan(*sizes, 4) for sizes in ((1, 32), (3, 32), (8, 256), (40, 32), (9, 100))]
    assert plans == [(1, 1), (3, 1), (4, 1), (4, 5), (4, 2)]


def test_the_size_of_a_pack():
    sizes = [
        step.pack_size(k, tokens, 256)
        for k, tokens in ((1, 32), (8, 32), (16, 32), (9, 32), (16, 64), (16, 256), (4, 2048))
    ]
    assert sizes == [1, 8, 8, 5, 4, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("plan", [(1, 1), (2, 1), (2, 2)])
def test_in_packs_and_lanes_of_other_sizes_cells_equal_their_single_runs(plan):
    cells, singles, _ = mixed()
    out, lines = together(cells, train.causal_lm_loss, corpus(), plan)
    apart = [differences(*each) for each in zip(singles, out, lines, strict=True)]
    assert np.max(apart) < RTOL, apart


@pytest.mark.slow
def test_cells_with_a_head_and_rows_of_their_own_equal_their_single_runs():
    wants = [MIXED[1], Want({"rank": 3, "alpha": 6.0, "plus_ratio": 4.0}, 3e-3, 3)]
    cells = [cell_of(want, classifier()) for want in wants]
    each = [corpus(seed, labelled=True) for seed in range(2)]
    loss = train.classification_loss
    out, lines = together(cells, loss, sweep.OwnBatches(each), (2, 1))
    singles = [alone(cell, loss, batches) for cell, batches in zip(cells, each)]
    apart = [differences(*each) for each in zip(singles, out, lines, strict=True)]
    assert np.max(apart) < RTOL, apart


@pytest.mark.slow
def test_on_several_devices_each_holds_its_share_of_the_cells(tmp_path):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    here = Path(__file__).parent
    command = [sys.executable, str(here / "swept.py"), str(tmp_path / "out.json")]
    environment = {**os.environ, **devices, **cache, "PYTHONPATH": str(here.parent)}
    subprocess.run(command, env=environment, check=True, timeout=900)
    found = json.loads((tmp_path / "out.json").read_text())
    assert np.max(found["apart"]) < RTOL, found["apart"]
    assert found["compiled"] == 1
    assert len(set(found["scores"][0])) == 1 and len(set(found["scores"][-1][:6])) == 6
    # Stopped in the middle and gone on with on these devices, cells are the same bits.
    assert found["resumed_at"] == [[5]] * 6 and found["same"] == [True] * 6
    for again, once in zip(found["lines"][::2], found["lines"][1::2], strict=True):
        assert again == once
    assert found["compiled_again"] == 1
    for held in found["held"]:  # six cells and two copies
        assert all(part == [8, 1, 8] for part in held["trainable"] + held["own"])
        assert all(whole == here and num == 8 for whole, here, num in held["shared"])


def memory_of(num_cells):
    """Bytes of a sweep of cells of rank 4, two at once: arguments, results and what lies between,
    and of what each cell trains."""
    cells = [cell_of(MIXED[1]._replace(seed=k), model_of("gpt2")) for k in range(num_cells)]
    made = program(train.causal_lm_loss)
    trainable, own, shared = stack(made, cells, 2).states
    settings = stack(made, cells, 2).settings
    chunk = jax.tree.map(lambda x: x[None], corpus().batch(0))
    lowered = step.run_cells.lower(
        program=made,
        size=2,
        paired=True,
        trainable=trainable,
        opt=step.init(made, trainable, settings),
        own=own,
        shared=shared,
        settings=settings,
        batches=chunk,
        rates=np.zeros((num_cells, 1), np.float32),
        count=1,
        first=0,
    )
    found = lowered.compile().memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes, 4 * count(cells[0].trainable)


@pytest.mark.slow
def test_one_more_adapter_takes_its_state_adams_and_copies_of_two():
    # Where packs take turns, XLA holds two of the three arrays once more; see `Packing.room`.
    (few, each), (many, _) = memory_of(40), memory_of(80)
    assert (many - few) / 40 == pytest.approx(5 * each, rel=0.2)
