"""Studies of classification: logits of every validation and test row, class by class.

The head is drawn by each run's seed where the checkpoint has none, unless the language model itself
answers by a word for each class (`tasks.text_classification.Answers`). Learning rates and steps are
chosen by the validation rows' mean -log p of the right class; test rows choose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax

from jax_lowrank import data, infer, models, results, sharding, sweep, train
from jax_lowrank.config import Run, Study, nearest, require
from jax_lowrank.evaluation import probabilities
from jax_lowrank.study import membership
from jax_lowrank.study.membership import POOL
from jax_lowrank.study.parts import Examples, Kind, Prepared, Text
from jax_lowrank.study.training import bind_to
from jax_lowrank.sweep import score
from jax_lowrank.tasks import Classification, encode, text_classification

HELD_OUT = ("validation", "test")


def check(study: Study, task: Classification, text: Text, model: models.Model) -> None:
    """The rows fit the model, there is something to choose by, and no test row is trained on."""
    limit, spec = model.config.max_positions, study.evaluate
    require(
        study.train.max_length <= limit,
        f"train.max_length {study.train.max_length} is above the model's {limit} positions",
    )
    require(
        "validation" in task.splits,
        "validation_fraction 0 leaves no rows to choose learning rates by; 0.1 is common",
    )
    require(
        spec.positive in ("", *task.classes),
        f"evaluate.positive: {nearest(spec.positive, task.classes)}",
    )
    require(not study.task.scorer, "task.scorer judges completions; classification has labels")
    for split in task.splits:
        encoded(study, task, text, split)
    check_apart(task)


def with_answers(
    study: Study, task: Classification, text: Text, model: models.Model, mesh
) -> models.Model:
    """The model, told the classes' answer tokens and how probable each is after a blank text."""
    if task.answers is None:
        return model
    prompt, words, blank = task.answers
    tokens = encode.answer_tokens(words, text)
    asked = models.answering(model, tokens, [0.0] * len(words))
    if not blank:
        return asked
    question = encode.encode_questions(
        ["the blank"], [blank], text, prompt=prompt, max_length=study.train.max_length
    )
    states, apply = (sharding.put(model.params, mesh),), bind_to(asked.graphdef, mesh)
    logits = infer.classify(apply, states, question.sequences, batch_size=1, pad_id=text.pad_id)
    return models.answering(model, tokens, log_softmax(logits[0]).tolist())


def head(task: Classification) -> models.Head:
    """A head of the task's classes, or the language model's own where it is to answer."""
    return models.Head() if task.answers else models.Head("classification", task.classes)


def check_apart(task: Classification) -> None:
    """Raise TaskError when a row to evaluate on is one that was trained on."""
    for split in HELD_OUT:
        text_classification.check_unseen(task.splits["train"].ids, task.splits[split].ids)


def encoded(study: Study, task: Classification, text: Text, split: str) -> encode.Encoded:
    """Token ids of a split, as the tokenizer wraps a text or the prompt asks about it."""
    rows = task.splits[split]
    length = study.train.max_length
    if task.answers:
        asked = {"prompt": task.answers.prompt, "max_length": length}
        return encode.encode_questions(rows.ids, rows.texts, text, **asked)
    return encode.encode("classification", rows.ids, rows.texts, text, max_length=length)


def examples(p: Prepared, split: str) -> Examples:
    """Token ids and classes of a split."""
    found = encoded(p.study, p.task, p.text, split)
    return Examples(found.sequences, p.task.splits[split].labels)


def batches(p: Prepared, rows: Examples, seed: int) -> data.LabelledBatches:
    """Training batches; of each, the rows that this process's devices take."""
    spec = p.study.train
    made = data.make_batches(
        rows.sequences,
        batch_size=spec.batch_size,
        seed=seed,
        pad_id=p.text.pad_id,
        own=sharding.own_rows(spec.batch_size, p.mesh),
        max_width=spec.max_length,
        least=1,
    )
    return data.LabelledBatches(made, rows.labels)


def logits_of(p: Prepared, apply: Callable, states: tuple, rows: Examples) -> np.ndarray:
    """Class logits (N, C)."""
    size = min(p.study.evaluate.batch_size, len(rows.sequences))
    return infer.classify(apply, states, rows.sequences, batch_size=size, pad_id=p.text.pad_id)


def validate(p: Prepared, apply: Callable, states: tuple, rows: Examples) -> float:
    """Nats per row."""
    return float(probabilities.nll(logits_of(p, apply, states, rows), rows.labels).mean())


def validate_all(
    p: Prepared, program: sweep.Program, states: sweep.States, rows: Examples
) -> np.ndarray:
    """Nats per row of each model of a sweep (K,)."""
    size = min(p.study.evaluate.batch_size, len(rows.sequences))
    logits = score.classify(program, states, rows.sequences, batch_size=size, pad_id=p.text.pad_id)
    return np.array([probabilities.nll(each, rows.labels).mean() for each in logits])


def measure(p: Prepared, run: Run, apply: Callable, states: tuple) -> tuple[dict, dict]:
    """SPLIT/logits (N, C) float32 of the validation and test rows.

    Of runs that an audit compares, of the audited rows too (shadows: instead of the test rows), and
    audited/inside (N,) bool: those that the run was trained on.
    """
    check_apart(p.task)
    splits, found = list(HELD_OUT), {}
    if membership.is_audited(p.study, run):
        splits = ["validation", POOL] if run.kind == "shadow" else [*splits, POOL]
        found[f"{POOL}/inside"] = membership.known_to(p.task, p.study.membership, run)
    for split in splits:
        found[f"{split}/logits"] = logits_of(p, apply, states, examples(p, split))
    return found, {}


def summary(p: Prepared, record: dict, arrays: dict) -> str:
    """One line on a measured run."""
    test = p.task.splits["test"]
    right = arrays["test/logits"].argmax(1) == test.labels
    rates = [
        right[inside].mean() for inside in test.groups.T if inside.sum() >= p.study.evaluate.minimum
    ]
    worst = f", worst group {min(rates):.3f}" if rates else ""
    trained = record["trainable_parameters"]
    extra = f"; {trained:,} of {record['total_parameters']:,} trained" if trained else ""
    return f"test accuracy {right.mean():.3f}{worst}{extra}"


def measured(p: Prepared, run: Run) -> tuple:
    """What the outputs depend on besides model, data and training: the audit, if it is in one."""
    audit = p.study.membership
    if not membership.is_audited(p.study, run):
        return ()
    return (audit.protocol, audit.seed, audit.rows if run.kind == "shadow" else 0)


def describe(p: Prepared) -> dict:
    """Classes, and of each split its rows, classes, groups and hash of ids."""
    task = p.task
    return {
        "classes": list(task.classes),
        "positive": p.study.evaluate.positive or task.classes[-1],
        "answers": answered(p),
        "splits": {
            name: {
                "rows": len(rows.ids),
                "hash": task.hashes[name],
                "ids": list(rows.ids),
                "by_class": np.bincount(rows.labels, minlength=len(task.classes)).tolist(),
                "by_group": rows.groups.sum(0).tolist(),
                "truncated": encoded(p.study, task, p.text, name).num_truncated,
            }
            for name, rows in task.splits.items()
            if name in ("train", *HELD_OUT)
        },
    }


def answered(p: Prepared) -> dict | None:
    """The prompt, and of each class its word and the probability divided out."""
    if p.task.answers is None:
        return None
    prompt, words, blank = p.task.answers
    prior = [round(math.exp(offset), 6) for offset in p.model.answers.offsets]
    return {
        "prompt": prompt,
        "words": list(words),
        "blank": blank,
        "blank_probabilities": prior if blank else None,
    }


def rows(p: Prepared) -> dict[str, results.Rows]:
    """Ids, groups and classes of the held-out rows. Texts stay where the data are."""
    found = {}
    for split in (*HELD_OUT, *([POOL] if p.study.membership else [])):
        part = p.task.splits[split]
        alone = np.arange(len(part.ids), dtype=np.int32)
        found[split] = results.Rows((), part.ids, alone, part.groups, part.labels)
    return found


CLASSIFICATION = Kind(
    name="classification",
    data_hash=text_classification.data_hash,
    head=head,
    finish_model=with_answers,
    scorer=lambda study, task: None,
    check=check,
    examples=examples,
    batches=batches,
    loss=train.classification_loss,
    validate=validate,
    validate_all=validate_all,
    measure=measure,
    measures_tuning=True,
    summary=summary,
    measured=measured,
    describe=describe,
    rows=rows,
)
