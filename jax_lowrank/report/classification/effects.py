"""Two methods compared on the same test rows and seeds: accuracy, worst group, gaps, calibration.

Three ways: each method at its best on validation; LoRA where it is as accurate on validation rows
as full fine-tuning, seed by seed; and both at one learning rate (the tuning runs: one seed).
"""

from typing import NamedTuple

import numpy as np

from jax_lowrank.evaluation import calibration, comparisons, ranking, subgroups
from jax_lowrank.report.classification.numbers import Case, Outputs, of_rate, options

METRICS = (
    "accuracy",
    "worst_accuracy",
    "demographic_parity_difference",
    "equalized_odds_difference",
    "ece",
)
MATCHED = "LoRA at full fine-tuning's validation accuracy"


class Effects(NamedTuple):
    """Differences of `label` minus `other` by metric; note: what is special about the pair."""

    label: str
    other: str
    found: dict[str, comparisons.Difference]
    note: str = ""


def at_best(case: Case) -> list[Effects]:
    """Every method minus full fine-tuning, each with its own choice of rate and step."""
    full = case.grid.full
    if full not in case.outputs:
        return []
    pairs = [(label, case.outputs[label]) for label in case.outputs if label != full]
    return [pair for label, each in pairs if (pair := _paired(case, label, each))]


def matched(case: Case) -> Effects | None:
    """Of each seed the LoRA run, of any rank, whose validation accuracy is nearest to full's."""
    full = case.grid.full
    loras = [case.outputs[label] for label in case.grid.lora]
    if full not in case.outputs or not loras:
        return None
    parts, distances = [], []
    for place, seed in enumerate(case.outputs[full].seeds):
        usable = [each.take([seed]) for each in loras if seed in each.seeds]
        if not usable:
            continue
        target = case.outputs[full].validation[place]
        nearest = min(usable, key=lambda each: abs(each.validation[0] - target))
        parts.append(nearest)
        distances.append(float(nearest.validation[0] - target))
    if not parts:
        return None
    seeds = tuple(part.seeds[0] for part in parts)
    joined = Outputs(seeds, *[np.concatenate(column) for column in list(zip(*parts))[1:]])
    apart = ", ".join(f"{x:+.3f}" for x in distances).replace("-", "−")
    note = f"validation accuracy minus full's, by seed: {apart}"
    pair = _paired(case, MATCHED, joined)
    return pair and pair._replace(note=note)


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
    settings = {name: case.settings[name] for name in ("num_bins", "level", "seed")}
    error = calibration.compare(
        a.chance, b.chance, (a.event, b.event), everyone, num_resamples=1000, **settings
    )
    values = [float(part[0]) for part in error]
    p_new = values[3] if len(a.seeds) > 1 else np.nan
    found["ece"] = comparisons.Difference(*values[:4], p_new, *facts, "", "", values[4], values[5])
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


def _paired(case: Case, label: str, each: Outputs) -> Effects | None:
    a, b = _common(case, each)
    return None if a is None else Effects(label, case.grid.full, between(case, a, b))


def _common(case: Case, each: Outputs) -> tuple[Outputs | None, Outputs | None]:
    """A method and full fine-tuning under the seeds that both finished."""
    full = case.outputs[case.grid.full]
    seeds = [seed for seed in each.seeds if seed in full.seeds]
    return (each.take(seeds), full.take(seeds)) if seeds else (None, None)
