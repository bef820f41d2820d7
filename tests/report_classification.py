"""A small synthetic classification study with effects that are known, written through `results`."""

import numpy as np
from report_study import _record as record_of

from jax_lowrank import results, shadows
from jax_lowrank.config import (
    EvalSpec,
    MembershipSpec,
    MethodSpec,
    ModelSpec,
    Study,
    TaskSpec,
    TrainSpec,
    plain,
)

RANKS = (1, 4)
GROUPS = ("Large", "Small", "Tiny")
NUM_TEST, NUM_VALIDATION = 600, 200
NUM_AUDITED, NUM_SHADOWS = 400, 8
MEMBER = np.arange(NUM_AUDITED) < NUM_AUDITED // 2
# How far the logits of the right class lie above the other, on average, by method.
SKILL = {"head": 0.6, 1: 0.9, 4: 1.2, "full": 1.3}
WORDS = {"prompt": "Is this {text}?", "words": ["No", "Yes", "Very"], "blank": ""}
FULL_RATES, LORA_RATES = (1e-4, 1e-3), (1e-3, 1e-2)


def write(
    directory,
    *,
    skill=SKILL,
    unfair=(),
    seeds=(1, 2, 3),
    ranks=RANKS,
    num_classes=2,
    memory=None,
    answers=False,
):
    """Write a study with this skill by method and read it back.

    unfair: methods that do no better than chance on the group Small. memory: method -> how far the
    logits of rows that a run was trained on lie above those of others; these methods are audited.
    answers: the classes are answered by words; the base model is as skilled as head-only training,
    which there is not then.
    """
    methods = [] if answers else [MethodSpec("head", (1e-2,))]
    methods += [MethodSpec("lora", LORA_RATES, rank=rank) for rank in ranks]
    methods += [MethodSpec("full", FULL_RATES)]
    study = Study(
        "synthetic",
        "Are groups served alike?",
        ModelSpec(path="somewhere"),
        TaskSpec("text_classification"),
        tuple(methods),
        TrainSpec(),
        seeds=seeds,
        evaluate=EvalSpec(num_resamples=200, minimum=10),
        membership=MembershipSpec(NUM_SHADOWS) if memory else None,
    )
    rows = {
        "validation": _rows(NUM_VALIDATION, 1, num_classes),
        "test": _rows(NUM_TEST, 2, num_classes),
    }
    if memory:
        rows["audited"] = _rows(NUM_AUDITED, 3, num_classes)
    results.open_study(directory, _description(study, num_classes, answers), rows)
    low = skill["head"] if answers else 0.0
    base = _record("base", None, None, None) | {"seconds": {"evaluate": 1.0}}
    results.write_run(directory, base, [], _logits(rows, low, (0, 0), False, num_classes), {})
    for method in methods:
        key = method.rank if method.name == "lora" else method.name
        best = method.learning_rates[0]
        for rate in method.learning_rates:
            record = _record("tune", method, rate, 0)
            arrays = _logits(rows, skill[key], (0, key), key in unfair, num_classes)
            results.write_run(directory, record, [], arrays, {})
        for seed in seeds:
            record = _record("final", method, best, seed)
            arrays = _logits(rows, skill[key], (seed, key), key in unfair, num_classes)
            if key in (memory or {}):
                arrays |= _audited(rows["audited"], memory[key], MEMBER, (seed, key))
            results.write_run(directory, record, [], arrays, {})
        for k in range(NUM_SHADOWS if key in (memory or {}) else 0):
            inside = shadows.halves(NUM_AUDITED, NUM_SHADOWS, 0)[:, k]
            arrays = _logits(rows, skill[key], (100 + k, key), False, num_classes)
            arrays = {"validation/logits": arrays["validation/logits"]}
            arrays |= _audited(rows["audited"], memory[key], inside, (100 + k, key))
            record = _record("shadow", method, best, 1_000_000 + k)
            results.write_run(directory, record, [], arrays, {})
    return results.read_study(directory)


def _audited(rows, memory, inside, seeds):
    rng = np.random.default_rng([seeds[0], sum(map(ord, str(seeds[1])))])
    easy = np.random.default_rng(9).normal(0, 1, inside.size)
    logits = rng.normal(0, 0.3, (inside.size, 2))
    logits[np.arange(inside.size), rows.labels] += easy + memory * inside
    return {"audited/logits": logits.astype(np.float32), "audited/inside": inside}


def _record(kind, method, rate, seed):
    return record_of(kind, method, rate, seed)


def _rows(number, seed, num_classes):
    rng = np.random.default_rng(seed)
    groups = rng.random((number, len(GROUPS))) < (0.5, 0.15, 0.0)
    groups[:4, 2] = True  # too few for anything
    labels = rng.integers(0, num_classes, number).astype(np.int32)
    ids = tuple(f"row-{seed}-{i}" for i in range(number))
    return results.Rows((), ids, np.arange(number, dtype=np.int32), groups, labels)


def _logits(rows, skill, seeds, unfair, num_classes):
    place = sum(map(ord, str(seeds[1])))
    found = {}
    for number, (split, part) in enumerate(rows.items()):
        rng = np.random.default_rng([seeds[0], place, number])
        easy = np.random.default_rng(number).normal(0, 1, part.labels.size)  # shared by methods
        ability = np.where(part.groups[:, 1] & unfair, 0.0, skill)
        logits = rng.normal(0, 0.3, (part.labels.size, num_classes))
        logits[np.arange(part.labels.size), part.labels] += ability + easy
        found[f"{split}/logits"] = logits.astype(np.float32)
    return found


def _description(study, num_classes, answers):
    classes = ["fine", "bad", "worse"][:num_classes]
    sizes = {"rows": 10, "hash": "h" * 64, "ids": [], "by_group": [5, 2, 1], "truncated": 0}
    by_class = [6, 4, 0][:num_classes]
    return {
        "kind": "classification",
        "name": study.name,
        "question": study.question,
        "fingerprint": "f" * 16,
        "config": plain(study),
        "group_names": list(GROUPS),
        "classes": classes,
        "positive": classes[1],
        "answers": WORDS | {"words": WORDS["words"][:num_classes]} if answers else None,
        "data_hash": "d" * 64,
        "task_notes": {"source": "synthetic rows"},
        "splits": {n: sizes | {"by_class": by_class} for n in ("train", "validation", "test")},
        "model": {
            "family": "bert",
            "sizes": {"width": 8},
            "num_parameters": 1234,
            "weights_hash": "a" * 64,
            "source": "somewhere",
            "pretrain": None,
        },
    }
