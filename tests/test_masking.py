"""Masked-lm training: what is hidden, the loss against PyTorch, and runs of the command."""

import json

import jax
import numpy as np
import pytest
import tiny_text
from scipy.special import log_softmax
from scipy.stats import chisquare
from test_finetune import record_of, run
from test_models_bert import ENCODERS, FAMILIES, encoder, ran
from tiny import apply_of, assert_close

from jax_lowrank import data, infer, masking, models, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.masking import MaskedBatch, Masker
from jax_lowrank.study.prepare import load_text
from jax_lowrank.tasks import encode
from jax_lowrank.tasks.task import TaskError

MASKER = Masker(mask_id=99, num_tokens=60)


# --------------------------------------------------------------------------------- what is hidden


def test_counts_and_shares_are_those_of_bert():
    rng, shown, random = np.random.default_rng(0), {"mask": 0, "same": 0, "other": 0}, []
    for number in range(4000):
        tokens = rng.integers(0, 60, rng.integers(3, 40))
        usable = rng.random(len(tokens)) < 0.8
        usable[rng.integers(len(tokens))] = True
        hidden = MASKER.hide(tokens, usable, (number,))
        assert len(hidden.places) == max(1, round(0.15 * usable.sum()))
        assert usable[hidden.places].all() and (np.diff(hidden.places) > 0).all()
        assert (hidden.targets == tokens[hidden.places]).all()
        kept = np.ones(len(tokens), bool)
        kept[hidden.places] = False
        assert (hidden.tokens[kept] == tokens[kept]).all()
        for token, target in zip(hidden.tokens[hidden.places], hidden.targets):
            kind = "mask" if token == 99 else "same" if token == target else "other"
            shown[kind] += 1
            if kind == "other":
                random.append(token)
    total = sum(shown.values())
    # A random token is the old one once in 60 times.
    expected = {"mask": 0.8 * total, "same": (0.1 + 0.1 / 60) * total}
    expected["other"] = total - sum(expected.values())
    assert chisquare(list(shown.values()), list(expected.values())).pvalue > 1e-3
    assert chisquare(np.bincount(random, minlength=60)).pvalue > 1e-3


def between_ends(tokens):
    return [False, *[True] * (len(tokens) - 2), False]


def batches(own=None):
    rng = np.random.default_rng(1)
    sequences = [rng.integers(5, 60, n).tolist() for n in rng.integers(3, 30, 22)]
    usable = [between_ends(s) for s in sequences]
    rows = data.make_batches(
        sequences, batch_size=8, seed=3, pad_id=0, counted=usable, least=1, own=own
    )
    return sequences, masking.MaskedBatches(rows, MASKER)


def test_a_batch_is_a_function_of_seed_and_step():
    sequences, made = batches()
    _, half = batches(own=np.arange(4, 8))
    steps = range(made.steps_per_epoch)
    for t in steps:
        batch, numbers = made.batch(t), made.rows.rows(t)
        for one, other in zip(batch, batches()[1].batch(t), strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(batch, half.batch(t), strict=True):
            np.testing.assert_array_equal(one[4:], other)
        assert batch.places.shape[1] == masking.num_hidden(made.width(t))
        for row, number in enumerate(numbers):
            length, many = batch.mask[row].sum(), int(batch.weights[row].sum())
            if number < 0:
                assert (length, many) == (1, 0)
                continue
            places = batch.places[row, :many]
            found = batch.tokens[row, :length].copy()
            assert 0 not in places and length - 1 not in places
            drawn = MASKER.hide(sequences[number], between_ends(found), (3, t, number))
            np.testing.assert_array_equal(drawn.tokens, found)
            found[places] = batch.targets[row, :many]
            assert found.tolist() == sequences[number] and not batch.weights[row, many:].any()
    assert {n for t in steps for n in made.rows.rows(t) if n >= 0} == set(range(22))
    later = [t + made.steps_per_epoch for t in steps]
    drawn = [
        {(n, *made.batch(t).places[row]) for t in ts for row, n in enumerate(made.rows.rows(t))}
        for ts in (steps, later)
    ]
    assert len(drawn[0] & drawn[1]) < 15  # another epoch hides others


# ------------------------------------------------------------------------------------- the loss


@pytest.fixture(scope="module")
def frozen():
    with np.load(ENCODERS / "masked_lm.npz") as stored:
        return dict(stored)


def loss_and_gradient(family, batch):
    model = encoder(f"{family}_masked-lm")
    graphdef, trainable, frozen = METHODS["full"]().split(jax.random.key(0), model)

    def mean(trainable):
        total, weight = train.masked_lm_loss(apply_of(graphdef), trainable, frozen, batch, None)
        return total.sum() / weight.sum()

    value, gradient = jax.jit(jax.value_and_grad(mean))(trainable)
    return float(value), models.by_path(gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_those_of_transformers(family, frozen):
    o = {name: frozen[f"{family}_{name}"] for name in ("tokens", "mask", "labels", "loss")}
    rows = [
        masking.Hidden(tokens, places, labels[places])
        for tokens, labels in zip(o["tokens"], o["labels"])
        for places in [np.flatnonzero(labels != -100)]
    ]
    spots = masking.spots(rows, 4, 20)  # K = 3, and a row that only fills up
    tokens, mask = np.zeros((2, 4, 12), np.int32)
    tokens[:3], mask[:3] = o["tokens"], o["mask"]
    mask[3, 0] = 1
    batch = MaskedBatch(tokens, mask.astype(bool), *spots)
    assert batch.weights.sum() == 5 == (o["labels"] != -100).sum()
    value, gradient = loss_and_gradient(family, batch)
    assert value == pytest.approx(float(o["loss"]), rel=1e-5)
    assert_close(gradient["embed.table"], frozen[f"{family}_table"])
    assert_close(gradient["blocks.attn.q.kernel"][0].T, frozen[f"{family}_query"])


def test_measuring_is_the_loss_of_each_row():
    model = encoder("bert_masked-lm")
    apply = apply_of(model.graphdef)
    rng = np.random.default_rng(0)
    texts = [
        Masker(3, 61).hide(rng.integers(3, 61, n), np.ones(n, bool), (n,)) for n in (14, 5, 9, 3, 8)
    ]
    found = infer.masked_likelihood(apply, (model.params,), texts, batch_size=2, pad_id=7)
    assert found.tokens.tolist() == [2, 1, 1, 1, 1]
    tokens, mask = np.zeros((2, 5, 14), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text.tokens)], mask[row, : len(text.tokens)] = text.tokens, 1
    log_probs = log_softmax(ran(model, "__call__", tokens, mask.astype(bool)), axis=-1)
    by_hand = [-log_probs[i, t.places, t.targets].sum() for i, t in enumerate(texts)]
    assert_close(found.nll, by_hand)


def test_a_model_without_the_head_is_refused():
    model = encoder("bert_classification")
    with pytest.raises(ValueError, match="no masked-lm head"):
        infer.masked_likelihood(
            apply_of(model.graphdef),
            (model.params,),
            [MASKER.hide([4, 5], [True, True], (0,))],
            batch_size=1,
            pad_id=0,
        )


# ---------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("masking")
    tiny_text.encoder(place / "model")
    animals, answers = ("cat", "dog", "bird"), ("red", "blue", "big")
    tiny_text.jsonl(
        place / "texts.jsonl",
        [
            {"text": f"the {animals[i % 3]} is {answers[i % 3]} {tiny_text.WORDS[10 + i % 20]} ."}
            for i in range(60)
        ],
    )
    return place


def line(folder, out, *more):
    start = ["finetune", "--model", folder / "model", "--data", folder / "texts.jsonl"]
    sizes = ["--task", "masked-lm", "--max-length", 16, "--batch-size", 8]
    return [*start, *sizes, "--learning-rate", 0.02, "--out", out, *more]


def test_a_run_learns_and_is_measured_again(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    asked = line(folder, out, "--epochs", 15, "--method", "full")
    code, said, err = run(asked, monkeypatch, capsys)
    assert code == 0 and "masked-lm: train 54 rows" in err and "validation after: perp" in said, err
    record = record_of(out)
    nats = [m["value"] for m in record["metrics"] if m["name"] == "nats per token"]
    assert nats[1] < 0.75 * nats[0] and record["model"]["head"] == "masked-lm"
    with np.load(out / "predictions.npz") as stored:
        assert stored["validation/tokens"].tolist() == [1] * 6
    assert json.loads((out / "config.json").read_text())["data"]["kind"] == "masked-lm"
    asked = ["evaluate", out, "--data", folder / "texts.jsonl", "--out", tmp_path / "again"]
    asked += ["--trained-rows"]
    assert run(asked, monkeypatch, capsys)[0] == 0
    merged = tmp_path / "merged"
    asked = ["export", out, "--format", "hf", "--out", merged]
    assert run(asked, monkeypatch, capsys)[0] == 0
    asked = ["evaluate", merged, "--data", folder / "texts.jsonl", "--out", tmp_path / "merged-out"]
    assert run([*asked, "--max-length", 16], monkeypatch, capsys)[0] == 0
    files = [
        json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("again", "merged-out")
    ]
    assert files[0][1]["value"] == pytest.approx(files[1][1]["value"], rel=1e-5)
    assert files[0][1]["n"] == 60


def test_special_tokens_are_never_hidden(folder):
    words = load_text(folder / "model")
    texts = ["the cat", "what is unheard of ?"]
    encoded = encode.encode("masked-lm", ("a", "b"), texts, words, max_length=16)
    begin = words.tokenizer.bos_token_id
    assert [s[0] == s[-1] == begin for s in encoded.sequences] == [True, True]
    assert encoded.counted[0] == [False, True, True, False]
    assert encoded.counted[1] == [False, True, True, False, False, True, False]  # two are unknown
    for sequence, hidden in zip(encoded.sequences, encoded.hidden, strict=True):
        assert sequence[hidden.places[0]] == hidden.targets[0] != begin
    with pytest.raises(TaskError, match="b: all of its 4 tokens are special"):
        encode.encode("masked-lm", ("a", "b"), ["the", "un known"], words, max_length=16)


def test_what_cannot_be_masked_is_refused(folder, tmp_path, monkeypatch, capsys):
    tiny_text.checkpoint(tmp_path / "gpt2")
    asked = line(folder, tmp_path / "out", "--model", tmp_path / "gpt2")
    code, _, err = run(asked, monkeypatch, capsys)
    assert code == 2 and "gpt2 has no head 'masked-lm'" in err
    asked = line(folder, tmp_path / "out", "--task", "masked")
    code, _, err = run(asked, monkeypatch, capsys)
    assert code == 2 and "did you mean 'masked-lm'" in err
    asked = ["evaluate", folder / "model", "--data", folder / "texts.jsonl", "--data.kind", "text"]
    code, _, err = run(asked, monkeypatch, capsys)
    assert code == 2 and "the model has a masked-lm head, which cannot do 'text'" in err
    words = tiny_text.tokenizer()
    words.save_pretrained(folder / "model")  # last: without a mask token
    code, _, err = run(line(folder, tmp_path / "out"), monkeypatch, capsys)
    assert code == 2 and "the tokenizer has no mask token" in err


def test_a_dry_run_knows_the_memory(folder, tmp_path, monkeypatch, capsys):
    tiny_text.encoder(tmp_path / "model")
    asked = line(folder, "out", "--model", tmp_path / "model", "--dry-run", "--devices", 4)
    code, said, err = run([*asked, "--mesh.data", 4], monkeypatch, capsys)
    assert code == 0 and "GB on each device" in said, err
