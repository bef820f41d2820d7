"""The audit of a classification study: can it be told which rows a run was trained on?

Every attack reads one statistic of the target and its shadows on the audited rows. Numbers are
means over the targets (seeds) of each one's value and limits: limits cover the audited rows alone,
and all targets of a method share its shadows.
"""

import csv
import io
import math
from typing import NamedTuple

import numpy as np

from jax_lowrank.evaluation import membership, ranking
from jax_lowrank.report.classification.numbers import Case, Cell
from jax_lowrank.results import Rows, StudyResult

POOL = "audited"
RATES = (0.1, 0.01, 0.001)  # false positive rates
FEW = 64  # shadows below which all rows share one variance (Carlini et al. 2022, section VI.C)
MAIN = {"online": "LiRA online", "published": "LiRA offline, tail"}


class Audited(NamedTuple):
    """One method under S seeds: log p of the audited rows under S targets (S, A) and K shadows
    (K, A), their margins, and log p of V validation rows, which none was trained on; member (A,)
    and inside (A, K) bool: who was trained on what. trained_on: rows of a shadow, or None where
    results of earlier versions do not say it.
    """

    label: str
    seeds: tuple[int, ...]
    targets: np.ndarray
    shadows: np.ndarray
    target_margins: np.ndarray
    shadow_margins: np.ndarray
    target_others: np.ndarray
    shadow_others: np.ndarray
    member: np.ndarray
    inside: np.ndarray
    trained_on: int | None


class Row(NamedTuple):
    """One attack on one method: AUC, balanced accuracy, true positive rates at RATES."""

    label: str
    attack: str
    auc: Cell
    accuracy: Cell
    rates: tuple[Cell, ...]


class Group(NamedTuple):
    """The main attack inside a group, with its members and non-members."""

    name: str
    members: int
    others: int
    rows: dict[str, Row]  # by method

    @property
    def aucs(self) -> dict[str, Cell]:
        """By method."""
        return {label: row.auc for label, row in self.rows.items()}


class Distance(NamedTuple):
    """A method's AUC under the main attack minus that of full fine-tuning."""

    label: str
    other: str
    seeds: tuple[int, ...]
    found: ranking.Difference


class Gaps(NamedTuple):
    """Largest minus smallest number of a group, of the mean score over seeds, and chance's: of AUC,
    balanced accuracy, and true positive rates at RATES."""

    label: str
    found: tuple[membership.Gap, ...]


class Audit(NamedTuple):
    """All of it. scores: method -> attack -> (S, A); inside (A, G) bool: who is of which group.
    by_class: its members and others. resolution: the smallest false positive rate that the rows
    can tell."""

    protocol: str
    main: str
    methods: list[Audited]
    scores: dict[str, dict[str, np.ndarray]]
    inside: np.ndarray
    rows: list[Row]
    groups: list[Group]
    gaps: list[Gaps]
    distances: list[Distance]
    by_class: dict[str, tuple[int, int]]
    num_members: int
    num_others: int

    @property
    def resolution(self) -> float:
        """1 / non-members."""
        return 1 / max(self.num_others, 1)


def audit(case: Case, result: StudyResult) -> Audit | None:
    """The audit of a study's shadows; None where it has none, or no method has two that ended."""
    spec = case.grid.study["config"].get("membership")
    methods = [found for label in case.outputs if (found := _audited(case, result, label))]
    if not spec or not methods:
        return None
    protocol, rows = spec["protocol"], result.rows[POOL]
    main = MAIN[protocol]
    scores = {each.label: attacks(each, protocol) for each in methods}
    table = [
        _row(each.label, name, [_attack(case, row, each.member) for row in values])
        for each in methods
        for name, values in scores[each.label].items()
    ]
    member = methods[0].member
    groups = _groups(case, methods, scores, main, rows)
    settings = {"minimum": case.settings["minimum"], "targets": RATES}
    gaps = [
        Gaps(
            each.label,
            membership.gaps(scores[each.label][main].mean(0), member, rows.groups, **settings),
        )
        for each in methods
    ]
    apart = _distances(case, methods, scores, main)
    by_class = {
        name: tuple(int((rows.labels[part] == place).sum()) for part in (member, ~member))
        for place, name in enumerate(case.grid.study["classes"])
    }
    counts = (int(member.sum()), int((~member).sum()))
    facts = (methods, scores, rows.groups, table, groups, gaps, apart, by_class)
    return Audit(protocol, main, *facts, *counts)


def table_csv(found: Audit) -> str:
    """Every number of the audit, a line each; groups are of the main attack."""
    names = ["auc", "best balanced accuracy", *(f"tpr at {rate:g}" for rate in RATES)]
    counts = (found.num_members, found.num_others)
    rows = [("", *counts, row) for row in found.rows]
    rows += [
        (group.name, group.members, group.others, row)
        for group in found.groups
        for row in group.rows.values()
    ]
    lines = [
        (row.label, row.attack, group, name, *sizes, cell)
        for group, *sizes, row in rows
        for name, cell in zip(names, (row.auc, row.accuracy, *row.rates))
    ]
    lines += [
        (f"{each.label} - {each.other}", found.main, "", "auc difference", *counts, each.found)
        for each in found.distances
    ]
    out = io.StringIO()
    heads = ("label", "attack", "group", "metric", "members", "others")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*heads, "value", "low", "high", "reason"])
    for *facts, cell in lines:
        numbers = ["" if math.isnan(x) else x for x in cell[:3]]
        writer.writerow([*facts, *numbers, cell.reason])
    return out.getvalue()


def attacks(each: Audited, protocol: str) -> dict[str, np.ndarray]:
    """Attack -> scores (S, A), larger for rows that look like members."""
    variance = "row" if each.inside.shape[1] >= FEW else "global"
    known = (each.shadow_margins.T, each.inside)

    def lira(attack, **options) -> np.ndarray:
        return np.stack(
            [
                attack(target, *known, variance=variance, **options).score
                for target in each.target_margins
            ]
        )

    found = {"loss threshold": each.targets}
    if protocol == "online":
        found["LiRA online"] = lira(membership.lira_online)
    found["LiRA offline, tail"] = lira(membership.lira_offline, form="tail")
    found["LiRA offline, density"] = lira(membership.lira_offline, form="density")
    shadows = (each.shadows.T, each.inside)
    found["RMIA"] = np.stack(
        [
            membership.rmia(target, *shadows, others, each.shadow_others.T).score
            for target, others in zip(each.targets, each.target_others)
        ]
    )
    return found


def _audited(case: Case, result: StudyResult, label: str) -> Audited | None:
    runs = [run for run in result.runs if run.record["label"] == label and run.arrays]
    targets = [run for run in runs if run.record["kind"] == "final"]
    shadows = [run for run in runs if run.record["kind"] == "shadow"]
    key = f"{POOL}/logits"
    if len(shadows) < 2 or not targets or any(key not in run.arrays for run in targets):
        return None

    def stacked(of, runs, split: str = POOL) -> np.ndarray:
        labels = result.rows[split].labels
        return np.stack([of(run.arrays[f"{split}/logits"], labels) for run in runs])

    return Audited(
        label,
        tuple(run.record["seed"] for run in targets),
        stacked(membership.log_likelihood, targets),
        stacked(membership.log_likelihood, shadows),
        stacked(membership.margin, targets),
        stacked(membership.margin, shadows),
        stacked(membership.log_likelihood, targets, "validation"),
        stacked(membership.log_likelihood, shadows, "validation"),
        targets[0].arrays[f"{POOL}/inside"],
        np.stack([run.arrays[f"{POOL}/inside"] for run in shadows], 1),
        (shadows[0].record.get("audit") or {}).get("trained_on"),
    )


def _row(label: str, name: str, found: list[membership.Attack]) -> Row:
    """Means over seeds."""
    rates = tuple(
        _mean([(a.at[i].rate, a.at[i].low, a.at[i].high) for a in found], found[0].at[i].reason)
        for i in range(len(RATES))
    )
    return Row(
        label,
        name,
        _mean([(a.auc, a.low, a.high) for a in found], found[0].reason),
        _mean([(a.balanced_accuracy, np.nan, np.nan) for a in found], found[0].reason),
        rates,
    )


def _attack(case: Case, scores: np.ndarray, member: np.ndarray) -> membership.Attack:
    settings = {name: case.settings[name] for name in ("level", "minimum")}
    return membership.attack(scores, member, targets=RATES, **settings)


def _mean(values: list[tuple[float, float, float]], reason: str) -> Cell:
    return Cell(*(float(x) for x in np.mean(values, axis=0)), 0, reason)


def _groups(case: Case, methods: list[Audited], scores: dict, main: str, rows: Rows) -> list[Group]:
    """The main attack on each method inside every group."""
    member = methods[0].member
    settings = {name: case.settings[name] for name in ("level", "minimum")} | {"targets": RATES}
    by_seed = {
        each.label: [
            membership.by_group(row, member, rows.groups, **settings)
            for row in scores[each.label][main]
        ]
        for each in methods
    }
    found = []
    for g, name in enumerate(case.names):
        inside = rows.groups[:, g]
        counts = (int((inside & member).sum()), int((inside & ~member).sum()))
        table = {
            label: _row(label, main, [each[g] for each in seeds])
            for label, seeds in by_seed.items()
        }
        found.append(Group(name, *counts, table))
    return found


def _distances(case: Case, methods: list[Audited], scores: dict, main: str) -> list[Distance]:
    """Paired by row and by seed, over the seeds that both methods finished."""
    full = next((each for each in methods if each.label == case.grid.full), None)
    found = []
    for each in methods:
        if full is None or each is full:
            continue
        pairs = ((each, each.seeds), (full, full.seeds))
        common = [seed for seed in each.seeds if seed in full.seeds]
        parts = [
            scores[one.label][main][[seeds.index(seed) for seed in common]] for one, seeds in pairs
        ]
        if common:
            level = case.settings["level"]
            gap = ranking.compare(*parts, each.member, level=level)
            found.append(Distance(each.label, full.label, tuple(common), gap))
    return found
