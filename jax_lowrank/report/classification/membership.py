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
from jax_lowrank.report.classification.figures import COLOR_OF, roles
from jax_lowrank.report.classification.numbers import Case, Cell
from jax_lowrank.report.drawing import COLORS, Key, Panel, panel
from jax_lowrank.report.figures import Figure
from jax_lowrank.results import StudyResult

POOL = "audited"
RATES = (0.1, 0.01, 0.001)  # false positive rates
FEW = 64  # shadows below which all rows share one variance (Carlini et al. 2022, section VI.C)
MAIN = {"online": "LiRA online", "published": "LiRA offline, tail"}


class Audited(NamedTuple):
    """One method under S seeds: log p of the audited rows under S targets (S, A) and K shadows
    (K, A), their margins, and log p of V validation rows, which none was trained on; member (A,)
    and inside (A, K) bool: who was trained on what.
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


class Row(NamedTuple):
    """One attack on one method: AUC, balanced accuracy, true positive rates at RATES."""

    label: str
    attack: str
    auc: Cell
    accuracy: Cell
    rates: tuple[Cell, ...]


class GroupAuc(NamedTuple):
    """AUC of the main attack inside a group, with its members and non-members."""

    name: str
    members: int
    others: int
    cells: dict[str, Cell]  # by method


class Distance(NamedTuple):
    """A method's AUC under the main attack minus that of full fine-tuning."""

    label: str
    other: str
    seeds: tuple[int, ...]
    found: ranking.Difference


class Gap(NamedTuple):
    """Largest minus smallest group AUC of the mean score over seeds, and chance's."""

    label: str
    found: membership.AucGap


class Audit(NamedTuple):
    """All of it. resolution: the smallest false positive rate that the rows can tell."""

    protocol: str
    main: str
    methods: list[Audited]
    rows: list[Row]
    groups: list[GroupAuc]
    gaps: list[Gap]
    distances: list[Distance]
    figures: list[Figure]
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
        _row(case, each, name, values)
        for each in methods
        for name, values in scores[each.label].items()
    ]
    member = methods[0].member
    groups = [
        _group(case, methods, scores, main, rows.groups[:, g], name)
        for g, name in enumerate(case.names)
    ]
    settings = {"minimum": case.settings["minimum"]}
    gaps = [
        Gap(
            each.label,
            membership.auc_gap(scores[each.label][main].mean(0), member, rows.groups, **settings),
        )
        for each in methods
    ]
    counts = (int(member.sum()), int((~member).sum()))
    drawn = [_curves(case, methods, scores, main)]
    drawn += _curves_by_group(case, methods, scores, main, rows.groups)
    apart = _distances(case, methods, scores, main)
    return Audit(protocol, main, methods, table, groups, gaps, apart, drawn, *counts)


def table_csv(found: Audit) -> str:
    """Every number of the audit, a line each; groups are of the main attack."""
    names = ["auc", "best balanced accuracy", *(f"tpr at {rate:g}" for rate in RATES)]
    counts = (found.num_members, found.num_others)
    lines = [
        (row.label, row.attack, "", name, *counts, cell)
        for row in found.rows
        for name, cell in zip(names, (row.auc, row.accuracy, *row.rates))
    ]
    lines += [
        (label, found.main, group.name, "auc", group.members, group.others, cell)
        for group in found.groups
        for label, cell in group.cells.items()
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
    )


def _row(case: Case, each: Audited, name: str, scores: np.ndarray) -> Row:
    found = [_attack(case, row, each.member) for row in scores]
    rates = tuple(
        _mean([(a.at[i].rate, a.at[i].low, a.at[i].high) for a in found], found[0].at[i].reason)
        for i in range(len(RATES))
    )
    return Row(
        each.label,
        name,
        _mean([(a.auc, a.low, a.high) for a in found], found[0].reason),
        _mean([(a.balanced_accuracy, np.nan, np.nan) for a in found], found[0].reason),
        rates,
    )


def _attack(case: Case, scores: np.ndarray, member: np.ndarray) -> membership.Attack:
    settings = {name: case.settings[name] for name in ("level", "minimum")}
    return membership.attack(scores, member, targets=RATES, **settings)


def _mean(values: list[tuple[float, float, float]], reason: str, n: int = 0) -> Cell:
    return Cell(*(float(x) for x in np.mean(values, axis=0)), n, reason)


def _group(case: Case, methods, scores, main: str, inside: np.ndarray, name: str) -> GroupAuc:
    member, cells = methods[0].member, {}
    for each in methods:
        found = [_attack(case, row[inside], member[inside]) for row in scores[each.label][main]]
        values = [(a.auc, a.low, a.high) for a in found]
        cells[each.label] = _mean(values, found[0].reason, int(inside.sum()))
    return GroupAuc(name, int((inside & member).sum()), int((inside & ~member).sum()), cells)


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


def _curves(case: Case, methods: list[Audited], scores: dict, main: str) -> Figure:
    colors = _colors(case)
    panels = [
        _roc_panel(
            f"{each.label}: {each.inside.shape[1]} shadows",
            each.member,
            {
                "loss threshold": (scores[each.label]["loss threshold"], COLORS["muted"], 0.6),
                main: (scores[each.label][main], colors[each.label], 1.3),
            },
        )
        for each in methods
    ]
    caption = (
        "True against false positive rate, both on log axes, every target a line; the dashed"
        " diagonal is guessing. Left of the vertical line a false positive rate cannot be told:"
        " it is one non-member. Thick: the main attack; thin: the loss threshold."
    )
    keys = [Key("low", "━", main), Key("muted", "━", "loss threshold")]
    return Figure("audit-curves", "Attacks at low false positive rates", caption, panels, keys)


def _curves_by_group(
    case: Case, methods: list[Audited], scores: dict, main: str, groups: np.ndarray
) -> list[Figure]:
    """The main attack inside every group with enough members and others, largest group first."""
    member, minimum, colors = methods[0].member, case.settings["minimum"], _colors(case)
    counts = np.stack([groups[part].sum(0) for part in (member, ~member)])
    order = np.argsort(-counts.min(0), kind="stable")
    panels = []
    for g in order[counts.min(0)[order] >= minimum]:
        inside = groups[:, g]
        lines = {
            each.label: (scores[each.label][main][:, inside], colors[each.label], 1.0)
            for each in methods
        }
        title = f"{case.names[g]}: {counts[0, g]} members, {counts[1, g]} others"
        panels.append(_roc_panel(title, member[inside], lines))
    if not panels:
        return []
    caption = (
        f"{main} inside each group with {minimum} members and others, as above: every target a"
        " line. Left of a panel's vertical line is less than one of its non-members."
    )
    roles_of = {label: COLOR_OF[role] for role, label in roles(case).items()}
    keys = [Key(roles_of.get(each.label, "low"), "━", each.label) for each in methods]
    return [Figure("audit-groups", "Attacks by group", caption, panels, keys)]


def _colors(case: Case) -> dict[str, str]:
    """Of every method: that of its role, if it has one."""
    shown = {label: role for role, label in roles(case).items()}
    return {label: COLORS[COLOR_OF.get(shown.get(label), "low")] for label in case.outputs}


def _roc_panel(title: str, member: np.ndarray, lines: dict) -> Panel:
    """lines: name -> scores (S, A), colour, line width."""
    least = 1 / (~member).sum()
    floor = least / 2

    def draw(axes) -> None:
        axes.plot([floor, 1], [floor, 1], color=COLORS["muted"], lw=0.8, ls=(0, (2, 2)))
        axes.axvline(least, color=COLORS["muted"], lw=0.8)
        for scores, color, width in lines.values():
            for row in scores:
                kept = ~np.isnan(row)
                curve = membership.roc(row[kept], member[kept])
                x, y = (
                    np.maximum(part, floor)
                    for part in (curve.false_positive_rate, curve.true_positive_rate)
                )
                axes.step(x, y, where="post", color=color, lw=width, alpha=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(floor, 1.1)
        axes.set_ylim(floor, 1.1)
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")

    said = [
        f"{name}, AUC {', '.join(f'{_auc(row, member):.3f}' for row in scores)}"
        for name, (scores, _, _) in lines.items()
    ]
    return panel(title, "; ".join(said), draw, 3.2, 2.8)


def _auc(scores: np.ndarray, member: np.ndarray) -> float:
    return membership.attack(scores, member, targets=()).auc
