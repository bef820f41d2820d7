"""What the groups' scores are worth: precision, F1, the three AUCs, calibration without bins.

Means over seeds of each run's value and of its limits, which cover rows alone. With more than two
classes the AUCs are of the positive class's probability: that class against all others.
"""

import numpy as np

from jax_lowrank.evaluation import group_calibration, probabilities, ranking, subgroups
from jax_lowrank.evaluation.intervals import too_few_rows
from jax_lowrank.report.classification.numbers import Case, Cell, Outputs, options

TITLES = {
    "ppv": "Positive predictive value",
    "f1": "F1",
    "subgroup_auc": "AUC inside the group",
    "bpsn_auc": "AUC of its negatives and other positives (BPSN)",
    "bnsp_auc": "AUC of its positives and other negatives (BNSP)",
    "smooth_ece": "Smooth calibration error",
    "corrected_ece": "Calibration error of norm 2 without what chance adds",
}


def of_groups(case: Case, each: Outputs) -> list[dict[str, Cell]]:
    """A Cell by metric of TITLES for all rows, then of every group."""
    return [a | b for a, b in zip(_rates(case, each), of_probabilities(case, each))]


def of_probabilities(case: Case, each: Outputs) -> list[dict[str, Cell]]:
    """`of_groups` without what the predictions alone say."""
    everyone = case.everyone
    found = _aucs(case, each, everyone)
    found["smooth_ece"] = _smooth(case, each, everyone)
    found["corrected_ece"] = _corrected(case, each, everyone)
    return _by_group(found)


def _rates(case: Case, each: Outputs) -> list[dict[str, Cell]]:
    measured = subgroups.measure(
        case.labels,
        each.predictions,
        case.everyone,
        num_classes=len(case.grid.study["classes"]),
        positive=case.positive,
        num_permutations=0,
        **options(case),
    )
    rates = measured.rates
    found = {
        name: _cells(
            *(getattr(part, name) for part in (rates.by_group, measured.low, measured.high)),
            getattr(rates.support, name),
            getattr(rates.reason, name),
        )
        for name in ("ppv", "f1")
    }
    return _by_group(found)


def _aucs(case: Case, each: Outputs, everyone: np.ndarray) -> dict[str, list[Cell]]:
    settings = {name: case.settings[name] for name in ("minimum", "level")}
    is_positive = (case.labels == case.positive).astype(int)
    found = ranking.bias_aucs(each.score, is_positive, everyone, **settings)
    parts = {"subgroup_auc": found.subgroup, "bpsn_auc": found.bpsn, "bnsp_auc": found.bnsp}
    return {
        name: _cells(
            part.auc, part.low, part.high, np.minimum(part.positives, part.negatives), part.reason
        )
        for name, part in parts.items()
    }


def _smooth(case: Case, each: Outputs, everyone: np.ndarray) -> list[Cell]:
    values = probabilities.smooth_calibration_error(each.chance, each.event, everyone)
    sizes, minimum = everyone.sum(0), case.settings["minimum"]
    none = np.full_like(values, np.nan)
    few = np.where(sizes < minimum, np.nan, values)
    return _cells(few, none, none, sizes, too_few_rows(sizes, minimum))


def _corrected(case: Case, each: Outputs, everyone: np.ndarray) -> list[Cell]:
    settings = {name: case.settings[name] for name in ("num_bins", "minimum")}
    found = group_calibration.corrected(each.chance, each.event, everyone, **settings)
    none = np.full_like(found.error, np.nan)
    return _cells(found.error, none, none, found.rows, found.reason)


def _by_group(found: dict[str, list[Cell]]) -> list[dict[str, Cell]]:
    return [dict(zip(found, cells)) for cells in zip(*found.values())]


def _cells(values, low, high, support, reasons) -> list[Cell]:
    """Cells of arrays (S, G), whose last two may be (G,); NaN in a seed is NaN, with its reason."""
    support, reasons = (np.broadcast_to(part, values.shape) for part in (support, reasons))
    ends = [part.mean(0) for part in (values, low, high)]
    return [
        Cell(*(float(end[g]) for end in ends), int(support[:, g].min()), max(reasons[:, g]))
        for g in range(values.shape[1])
    ]
