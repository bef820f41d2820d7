"""Two methods compared on the same test rows and seeds: accuracy, worst group, gaps, calibration.

Three ways: each method at its best on validation; LoRA where its accuracy (or F1) on validation
rows is full fine-tuning's, seed by seed; and both at one learning rate (tuning runs: one seed).
"""

from typing import NamedTuple

import numpy as np

from jax_lowrank.evaluation import comparisons, group_calibration, ranking, subgroups
from jax_lowrank.report.classification.numbers import (
    NO_SEED,
    Case,
    Outputs,
    of_rate,
    options,
)

METRICS = (
    "accuracy",
    "worst_accuracy",
    "demographic_parity_difference",
    "equalized_odds_difference",
    "ece",
)
ALONE = "one model without a seed, beside each seed of the other"
MATCHED = "LoRA at full fine-tuning's validation"  # ... accuracy, or F1


class Effects(NamedTuple):
    """Differences of `label` minus `other` by metric; note: what is special about the pair."""

    label: str
    other: str
    found: dict[str, comparisons.Difference]
    note: str = ""


class Nearest(NamedTuple):
    """A seed's LoRA run nearest to full fine-tuning's; apart: its validation utility minus that."""

    seed: int
    label: str
    apart: float

    def __str__(self) -> str:
        apart = "undefined" if np.isnan(self.apart) else f"{self.apart:+.3f}".replace("-", "−")
        return f"{apart} {self.label}"


def at_best(case: Case) -> list[Effects]:
    """Every method minus full fine-tuning, each with its own choice of rate and step."""
    full = case.grid.full
    if full not in case.outputs:
        return []
    found = [_paired(case, label, case.outputs[label]) for label in case.outputs if label != full]
    return [pair for pair in found if pair]


def matched(case: Case) -> Effects | None:
    """Of each seed the LoRA run, of any rank, whose validation utility is nearest to full's.

    Seeds without one within the study's margin are left out, and named; where none is left, every
    difference is NaN with the reason.
    """
    full = case.outputs.get(case.grid.full)
    near = [each for seed in full.seeds if (each := _nearest(case, seed))] if full else []
    if not near:
        return None
    margin, label = case.settings["margin"], f"{MATCHED} {case.utility}"
    kept = [each for each in near if abs(each.apart) <= margin]
    out = [f"seed {each.seed} ({each})" for each in near if each not in kept]
    few = f"no LoRA run within {margin:g} of full's validation {case.utility}: {', '.join(out)}"
    if not kept:
        return Effects(label, case.grid.full, dict.fromkeys(METRICS, _undefined(case, few)))
    parts = [case.outputs[each.label].take([each.seed]) for each in kept]
    seeds = tuple(each.seed for each in kept)
    joined = Outputs(seeds, *[np.concatenate(column) for column in list(zip(*parts))[1:]])
    pair = Effects(label, case.grid.full, between(case, joined, full.take(seeds)))
    note = f"validation {case.utility} minus full's, by seed: {', '.join(map(str, kept))}"
    return pair._replace(note=f"{note}; {few}" if out else note)


def at_one_rate(case: Case) -> list[Effects]:
    """LoRA minus full where both tried the same learning rate: tuning runs, one seed."""
    found, full = [], case.grid.full
    for (label, rate), each in case.tuning.items():
        other = case.tuning.get((full, rate))
        if label in case.grid.lora and other is not None:
            pair = between(case, each, other)
            found.append(Effects(f"{label} at {rate:g}", f"{full} at {rate:g}", pair))
    return found


def by_group(case: Case, label: str) -> dict[str, comparisons.Difference]:
    """group -> accuracy of a method minus that of full fine-tuning, on the group's rows."""
    a, b = _common(case, case.outputs[label])
    if a is None:
        return {}
    right = [of_rate(case, each.predictions, "accuracy")[0] for each in (a, b)]
    groups = {"all rows": np.ones(case.labels.size, bool)}
    groups |= {name: case.members[:, g] for g, name in enumerate(case.names) if case.enough[g]}
    return {name: _rows(case, *[r[:, inside] for r in right]) for name, inside in groups.items()}


def between(case: Case, a: Outputs, b: Outputs) -> dict[str, comparisons.Difference]:
    """metric -> a minus b, paired by row and seed."""
    right = [of_rate(case, each.predictions, "accuracy")[0] for each in (a, b)]
    found = {"accuracy": _rows(case, *right)}
    gaps = subgroups.compare(
        case.labels,
        a.predictions,
        b.predictions,
        case.members,
        num_classes=len(case.grid.study["classes"]),
        positive=case.positive,
        **options(case),
    )
    facts = (case.labels.size, case.labels.size, len(a.seeds), 0)
    for name in METRICS[1:4]:
        k = gaps.names.index(name)
        values = (gaps.estimate, gaps.low, gaps.high, gaps.p, gaps.p_new_seeds)
        rest = (gaps.reason[k], "", float(gaps.error[k]), float(gaps.freedom[k]))
        found[name] = comparisons.Difference(*[float(v[k]) for v in values], *facts, *rest)
    everyone = np.ones((case.labels.size, 1), bool)
    settings = {name: case.settings[name] for name in ("num_bins", "minimum", "level", "seed")}
    error = group_calibration.compare(
        a.chance, b.chance, (a.event, b.event), everyone, num_resamples=1000, **settings
    )
    values = [float(part[0]) for part in error[:6]]
    p_new = values[3] if len(a.seeds) > 1 else np.nan
    found["ece"] = comparisons.Difference(
        *values[:4], p_new, *facts, error.reason[0], "", *values[4:]
    )
    return found


def equivalent(case: Case, found: comparisons.Difference) -> float:
    """p of the test that the difference lies within the study's margin."""
    margin = case.settings["margin"]
    return comparisons.equivalence(found.estimate, found.error, margin, found.freedom).p


def p_of(found: comparisons.Difference | ranking.Difference) -> float:
    """p for new seeds; with one seed, for this one."""
    return found.p if np.isnan(found.p_new_seeds) else found.p_new_seeds


def _rows(case: Case, a: np.ndarray, b: np.ndarray) -> comparisons.Difference:
    settings = {name: case.settings[name] for name in ("level", "num_resamples", "seed")}
    return comparisons.paired_difference(a, b, method="t", **settings)


def _nearest(case: Case, seed: int) -> Nearest | None:
    """Of the LoRA runs of a seed; None without any. An F1 may be undefined: that is farthest."""

    def validation(label: str) -> float:
        each = case.outputs[label]
        return float(each.validation[each.seeds.index(seed)])

    target = validation(case.grid.full)
    labels = [label for label in case.grid.lora if seed in case.outputs[label].seeds]
    near = [Nearest(seed, label, validation(label) - target) for label in labels]
    return min(near, key=lambda each: np.nan_to_num(abs(each.apart), nan=np.inf), default=None)


def _undefined(case: Case, reason: str) -> comparisons.Difference:
    return comparisons.Difference(
        *[np.nan] * 5, case.labels.size, case.labels.size, 0, 0, reason, ""
    )


def _paired(case: Case, label: str, each: Outputs) -> Effects | None:
    a, b = _common(case, each)
    note = ALONE if each.seeds == NO_SEED else ""
    return None if a is None else Effects(label, case.grid.full, between(case, a, b), note)


def _common(case: Case, each: Outputs) -> tuple[Outputs | None, Outputs | None]:
    """A method and full fine-tuning under the seeds that both finished."""
    full = case.outputs[case.grid.full]
    seeds = [seed for seed in full.seeds if each.has(seed)]
    return (each.take(seeds), full.take(seeds)) if seeds else (None, None)
