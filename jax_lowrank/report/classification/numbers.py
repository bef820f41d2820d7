"""Numbers of a classification study: levels by method and by group, gaps and their chance values.

Seeds are axis 0 and test rows the last axis. A rate is a mean over some of the rows (positives for
the true positive rate), so that intervals draw those rows and the seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank import results
from jax_lowrank.evaluation import (
    comparisons,
    group_calibration,
    groups,
    intervals,
    probabilities,
    subgroups,
)
from jax_lowrank.report import grid as grids
from jax_lowrank.report.grid import BASE, Grid
from jax_lowrank.report.tables import Estimate
from jax_lowrank.results import RunResult, StudyResult

HEAD = "head only"
NO_SEED = (-1,)  # of the base model, which is drawn by none
RATES = {"accuracy": "rows", "selection": "rows", "tpr": "positives", "fpr": "negatives"}
TITLES = {
    "accuracy": "Accuracy",
    "selection": "Selection rate",
    "tpr": "True positive rate",
    "fpr": "False positive rate",
    "worst_accuracy": "Worst-group accuracy",
    "demographic_parity_difference": "Demographic parity difference",
    "equalized_odds_difference": "Equalized odds difference",
    "equal_opportunity_difference": "Equal opportunity difference",
    "ece": "Calibration error (ECE)",
    "scaled_ece": "ECE after temperature scaling",
    "nll": "−log p of the class, nats",
}
ODDS = "equalized_odds_difference"
GAPS = tuple(list(TITLES)[4:8])
UTILITIES = {"accuracy": "accuracy", "f1": "F1 of “{}”"}


class Outputs(NamedTuple):
    """What a method's runs say of the N test rows, under S seeds.

    chance (S, N): P(positive) and event (S, N) the label, with two classes; with more, the largest
    probability and whether it was right. scaled: chance after temperature scaling on validation
    rows. score (S, N): P(positive), whatever the number of classes. validation: `utility` there,
    (S,).
    """

    seeds: tuple[int, ...]
    predictions: np.ndarray
    chance: np.ndarray
    event: np.ndarray
    scaled: np.ndarray
    nll: np.ndarray
    score: np.ndarray
    validation: np.ndarray
    temperature: np.ndarray

    def has(self, seed: int) -> bool:
        """Whether there are outputs to set beside others of this seed."""
        return seed in self.seeds or self.seeds == NO_SEED

    def take(self, seeds: Sequence[int]) -> "Outputs":
        """The runs of these seeds, in this order; the base model's only run under each of them."""
        alone = self.seeds == NO_SEED
        rows = [0 if alone else self.seeds.index(seed) for seed in seeds]
        return Outputs(tuple(seeds), *[part[rows] for part in self[1:]])


class Case(NamedTuple):
    """The test rows of a study, its settings, and the outputs of every method that was reported.

    `base` is among them where it answers by words; under an untrained head it says nothing.
    labels (N,), members (N, G) bool over `names`; positive: the class that rates speak of. tuning:
    (label, learning rate) -> outputs of the run that tried it.
    """

    grid: Grid
    labels: np.ndarray
    members: np.ndarray
    names: tuple[str, ...]
    positive: int
    outputs: dict[str, Outputs]
    tuning: dict[tuple[str, float], Outputs]

    @property
    def settings(self) -> dict[str, Any]:
        """The evaluation settings."""
        return self.grid.evaluate

    @property
    def match(self) -> str:
        """What methods are matched in: accuracy or f1 (older results do not say)."""
        return self.settings.get("match", "accuracy")

    @property
    def utility(self) -> str:
        """What a sentence calls `match`."""
        return UTILITIES[self.match].format(self.grid.study["positive"])

    @property
    def sizes(self) -> np.ndarray:
        """Test rows of every group, (G,)."""
        return self.members.sum(0)

    @property
    def everyone(self) -> np.ndarray:
        """Membership (N, 1 + G) with a first group of all rows."""
        return np.column_stack([np.ones(self.labels.size, bool), self.members])

    @property
    def enough(self) -> np.ndarray:
        """Groups with `minimum` rows, (G,) bool."""
        return self.sizes >= self.settings["minimum"]


class Cell(NamedTuple):
    """A number with limits and the rows behind it; expected: what chance alone gives, or None."""

    value: float
    low: float
    high: float
    n: int
    reason: str
    expected: float | None = None


class GroupRow(NamedTuple):
    """One group under one method: its rows, positives, and a Cell by metric."""

    name: str
    size: int
    positives: int
    cells: dict[str, Cell]


class Gap(NamedTuple):
    """Largest minus smallest rate over groups, mean over seeds, against chance.

    rate: one of RATES, or ODDS for the larger of the gaps of tpr and fpr.
    """

    label: str
    rate: str
    found: comparisons.Gap
    p_adjusted: float


class Distance(NamedTuple):
    """A rate of a group minus that of all other rows; star: p_adjusted < 0.05."""

    label: str
    group: str
    rate: str
    found: comparisons.Difference
    p_adjusted: float


def read(directory: Path) -> tuple[StudyResult, Case]:
    """A finished classification study. Raises ResultsError where the directory holds none."""
    result = results.read_study(directory)
    if "classes" not in result.study:
        raise results.ResultsError(f"{directory} holds no classification study")
    return result, arrange(result)


def arrange(result: StudyResult) -> Case:
    """The case of a study's results. Raises ResultsError as `grid.arrange` does."""
    grid = grids.arrange(result)
    rows, validation = result.rows["test"], result.rows["validation"]
    positive = grid.study["classes"].index(grid.study["positive"])

    match = grid.evaluate.get("match", "accuracy")

    def outputs(runs: Sequence[RunResult]) -> Outputs:
        return _outputs(runs, rows.labels, validation.labels, positive, match)

    order = {BASE: -1, HEAD: 0, grid.full: 2}
    labels = [*([BASE] if grid.study.get("answers") else []), *grid.labels]
    labels.sort(key=lambda label: order.get(label, 1))
    found = {label: outputs(list(grid.runs[label].values())) for label in labels}
    tuning = {
        (run.record["label"], run.record["learning_rate"]): outputs([run])
        for run in result.runs
        if run.record["kind"] == "tune" and run.arrays
    }
    names = tuple(grid.study["group_names"])
    return Case(grid, rows.labels, rows.groups, names, positive, found, tuning)


def of_rate(case: Case, predictions: np.ndarray, rate: str) -> tuple[np.ndarray, np.ndarray]:
    """Values (S, N) whose mean is a rate, and the rows (N,) that it is a mean of."""
    is_positive = case.labels == case.positive
    everyone = np.ones(case.labels.size, bool)
    if rate == "accuracy":
        return (predictions == case.labels).astype(float), everyone
    where = {"selection": everyone, "tpr": is_positive, "fpr": ~is_positive}[rate]
    return (predictions == case.positive).astype(float), where


def summary(case: Case) -> dict[str, dict[str, Estimate]]:
    """metric -> label -> mean over seeds with limits (accuracy, nll, GAPS, ece, scaled_ece)."""
    table: dict[str, dict[str, Estimate]] = {name: {} for name in TITLES}
    everyone = np.ones((case.labels.size, 1), bool)
    for label, each in case.outputs.items():
        correct = of_rate(case, each.predictions, "accuracy")[0]
        for name, values in (("accuracy", correct), ("nll", each.nll)):
            found = intervals.bootstrap(values, **_resampling(case))
            table[name][label] = _estimate(case, found, values.mean(1))
        gaps = subgroups.levels(
            case.labels, each.predictions, case.members, **options(case), **_classes(case)
        )
        for name in GAPS:
            k = gaps.names.index(name)
            ends = (float(end[k]) for end in (gaps.estimate, gaps.low, gaps.high))
            per_seed = tuple(gaps.by_seed[:, k].tolist())
            few = "fewer than two groups have enough rows"
            reason = few if np.isnan(gaps.estimate[k]) else ""
            facts = (per_seed, case.labels.size, case.labels.size, reason)
            table[name][label] = Estimate(*ends, *facts)
        for name, chance in (("ece", each.chance), ("scaled_ece", each.scaled)):
            cell, per_seed = calibrated(case, chance, each.event, everyone)
            facts = (tuple(per_seed[:, 0].tolist()), case.labels.size, case.labels.size, "")
            table[name][label] = Estimate(*cell[0][:3], *facts)
    return {name: found for name, found in table.items() if found}


def calibrated(
    case: Case, chance: np.ndarray, event: np.ndarray, members: np.ndarray
) -> tuple[list[Cell], np.ndarray]:
    """ECE of groups (N, G), mean over seeds of values, limits and chance values; and (S, G)."""
    settings = {name: case.settings[name] for name in ("num_bins", "minimum", "level")}
    found = group_calibration.measure(chance, event, members, **settings)
    cells = []
    for g, (size, reason) in enumerate(zip(found.rows, found.reason[0])):
        *values, expected = (float(part[:, g].mean()) for part in found[:4])
        cells.append(Cell(*values, int(size), reason, None if reason else expected))
    return cells, found.error


def group_rows(case: Case, label: str) -> list[GroupRow]:
    """All rows, then every group: rates and ECE with limits; too few rows leave NaN and why."""
    each = case.outputs[label]
    everyone = case.everyone
    errors = calibrated(case, each.chance, each.event, everyone)[0]
    found = []
    for g, name in enumerate(("all rows", *case.names)):
        inside = everyone[:, g]
        cells = {}
        for rate, what in RATES.items():
            values, where = of_rate(case, each.predictions, rate)
            chosen = values[:, inside & where]
            size = chosen.shape[1]
            if size < case.settings["minimum"]:
                cells[rate] = Cell(np.nan, np.nan, np.nan, size, _few(case, size, what))
                continue
            limits = intervals.bootstrap(chosen, **_resampling(case))
            cells[rate] = Cell(*limits[:3], size, limits.reason)
        cells["ece"] = errors[g]
        positives = int((inside & (case.labels == case.positive)).sum())
        found.append(GroupRow(name, int(inside.sum()), positives, cells))
    return found


def gaps(case: Case) -> list[Gap]:
    """Gap of every rate and of the odds, by method, beside its mean under permuted membership.

    The gaps are means over seeds of each run's gap, as in `summary`, and so are those of a
    permutation, which is the same for all runs. Exploratory: p adjusted over the whole table
    (Benjamini-Hochberg).
    """
    found = []
    settings = {"num_permutations": min(case.settings["num_resamples"], 1000)}
    for label, each in case.outputs.items():
        for rate in RATES:
            values, where = of_rate(case, each.predictions, rate)
            members = case.members[where]
            members = members[:, members.sum(0) >= case.settings["minimum"]]
            gap = comparisons.gap_permutation(values[:, where], members, seed=0, **settings)
            found.append(Gap(label, rate, gap, np.nan))
        odds = comparisons.odds_gap_permutation(
            each.predictions == case.positive,
            case.members,
            case.labels == case.positive,
            minimum=case.settings["minimum"],
            **settings,
        )
        found.append(Gap(label, ODDS, odds, np.nan))
    adjusted = comparisons.benjamini_hochberg([gap.found.p for gap in found])
    return [gap._replace(p_adjusted=float(p)) for gap, p in zip(found, adjusted)]


def distances(case: Case) -> list[Distance]:
    """Every group against all other rows, by rate and method; BH over the whole family."""
    found = []
    for label, each in case.outputs.items():
        for rate, what in RATES.items():
            values, where = of_rate(case, each.predictions, rate)
            for g, name in enumerate(case.names):
                inside = case.members[where, g]
                gap = comparisons.versus_rest(values[:, where], inside, case.settings["level"])
                if inside.sum() < case.settings["minimum"]:
                    few = _few(case, inside.sum(), what)
                    gap = gap._replace(**dict.fromkeys(gap._fields[:5], np.nan), reason=few)
                found.append(Distance(label, name, rate, gap, np.nan))
    p = [
        each.found.p if np.isnan(each.found.p_new_seeds) else each.found.p_new_seeds
        for each in found
    ]
    adjusted = comparisons.benjamini_hochberg(p)
    return [each._replace(p_adjusted=float(p)) for each, p in zip(found, adjusted)]


def utility(predictions: np.ndarray, labels: np.ndarray, positive: int, match: str) -> float:
    """Accuracy of predictions (N,), or F1 of the positive class: NaN where none is, or is said."""
    if match == "accuracy":
        return float((predictions == labels).mean())
    true, said = ((classes == positive).astype(int) for classes in (labels, predictions))
    table = groups.count(true, said, np.ones((true.size, 1), bool)).overall
    return float(groups.rates(table).f1)


def options(case: Case) -> dict[str, Any]:
    """minimum, level, num_resamples and seed, as `subgroups` takes them."""
    names = ("minimum", "level", "num_resamples", "seed")
    return {name: case.settings[name] for name in names}


def _classes(case: Case) -> dict[str, int]:
    return {"num_classes": len(case.grid.study["classes"]), "positive": case.positive}


def _resampling(case: Case) -> dict[str, Any]:
    return {name: case.settings[name] for name in ("level", "num_resamples", "seed")}


def _few(case: Case, size: int, what: str) -> str:
    return f"{size} {what}, fewer than {case.settings['minimum']}"


def _estimate(case: Case, found: intervals.Interval, per_seed: np.ndarray) -> Estimate:
    note = intervals.seed_note(per_seed.size)
    size = case.labels.size
    ends = (found.estimate, found.low, found.high)
    return Estimate(*ends, tuple(per_seed.tolist()), size, size, found.reason, note)


def _outputs(runs, labels, validation_labels, positive: int, match: str) -> Outputs:
    parts = []
    for run in runs:
        logits, held_out = run.arrays["test/logits"], run.arrays["validation/logits"]
        temperature = probabilities.fit_temperature(held_out, validation_labels).temperature
        chance, event = _event(logits, labels, positive)
        parts.append(
            (
                logits.argmax(1),
                chance,
                event,
                _event(logits / temperature, labels, positive)[0],
                probabilities.nll(logits, labels),
                probabilities.softmax(logits)[:, positive],
                utility(held_out.argmax(1), validation_labels, positive, match),
                temperature,
            )
        )
    seeds = tuple(run.record["seed"] for run in runs)
    seeds = NO_SEED if runs[0].record["kind"] == "base" else seeds
    return Outputs(seeds, *[np.stack(column) for column in zip(*parts)])


def _event(logits, labels, positive: int) -> tuple[np.ndarray, np.ndarray]:
    found = probabilities.softmax(logits)
    if found.shape[1] == 2:
        return found[:, positive], (labels == positive).astype(int)
    return probabilities.top_label(found, labels)
