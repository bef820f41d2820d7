"""Curves of an audit's attacks on log axes, where low false positive rates can be read.

Every target (seed) is a line. What lies left of one false positive among the non-members cannot be
told; curves, which are 0 there, are drawn along the axes' ends.
"""

from typing import NamedTuple

import numpy as np

from jax_lowrank.evaluation import membership
from jax_lowrank.report.classification.figures import COLOR_OF, roles
from jax_lowrank.report.classification.membership import Audit
from jax_lowrank.report.classification.numbers import Case
from jax_lowrank.report.drawing import COLORS, Key, Panel, panel
from jax_lowrank.report.figures import Figure

LOSS = "loss threshold"


class Line(NamedTuple):
    """One attack on a method's targets: scores (S, A)."""

    name: str
    scores: np.ndarray
    color: str
    width: float


class Rocs(NamedTuple):
    """One panel: attacks on the same rows, of which member (A,) bool says who was trained on."""

    title: str
    member: np.ndarray
    lines: tuple[Line, ...]

    @property
    def resolution(self) -> float:
        """One false positive: 1 / non-members."""
        return 1 / int((~self.member).sum())


def all_figures(case: Case, audit: Audit) -> list[Figure]:
    """The attacks on every method, and the main one inside groups."""
    return [overall(case, audit), *by_group(case, audit)]


def overall(case: Case, audit: Audit) -> Figure:
    """The main attack and the loss threshold, a panel a method."""
    colors, made = _colors(case), []
    for each in audit.methods:
        scores = audit.scores[each.label]
        lines = (
            Line(LOSS, scores[LOSS], COLORS["muted"], 0.6),
            Line(audit.main, scores[audit.main], colors[each.label], 1.3),
        )
        title = f"{each.label}: {each.inside.shape[1]} shadows"
        made.append(drawn(Rocs(title, each.member, lines)))
    caption = (
        "True against false positive rate, both on log axes, every target a line; the dashed"
        " diagonal is guessing. Left of the vertical line a false positive rate cannot be told:"
        " it is one non-member. Thick: the main attack; thin: the loss threshold."
    )
    keys = [Key("low", "━", audit.main), Key("muted", "━", LOSS)]
    return Figure("audit-curves", "Attacks at low false positive rates", caption, made, keys)


def by_group(case: Case, audit: Audit) -> list[Figure]:
    """The main attack inside every group with enough members and others, largest group first."""
    panels = [drawn(each) for each in of_groups(case, audit)]
    if not panels:
        return []
    caption = (
        f"{audit.main} inside each group with {case.settings['minimum']} members and others, as"
        " above: every target a line. Left of a panel's vertical line is less than one of its"
        " non-members."
    )
    roles_of = {label: COLOR_OF[role] for role, label in roles(case).items()}
    keys = [Key(roles_of.get(each.label, "low"), "━", each.label) for each in audit.methods]
    return [Figure("audit-groups", "Attacks by group", caption, panels, keys)]


def of_groups(case: Case, audit: Audit) -> list[Rocs]:
    """What `by_group` draws."""
    colors, found = _colors(case), []
    sizes = [min(group.members, group.others) for group in audit.groups]
    for g in np.argsort(-np.array(sizes), kind="stable"):
        group, inside = audit.groups[g], audit.inside[:, g]
        if sizes[g] < case.settings["minimum"]:
            continue
        lines = tuple(
            Line(
                each.label,
                audit.scores[each.label][audit.main][:, inside],
                colors[each.label],
                1.0,
            )
            for each in audit.methods
        )
        title = f"{group.name}: {group.members} members, {group.others} others"
        found.append(Rocs(title, audit.methods[0].member[inside], lines))
    return found


def drawn(rocs: Rocs) -> Panel:
    """The panel; its description has every target's AUC."""
    said = [
        f"{line.name}, AUC {', '.join(f'{_auc(row, rocs.member):.3f}' for row in line.scores)}"
        for line in rocs.lines
    ]
    said.append(f"resolution {rocs.resolution:.2g}")
    return panel(rocs.title, "; ".join(said), lambda axes: draw(axes, rocs), 3.2, 2.8)


def draw(axes, rocs: Rocs) -> None:
    """Curves, guessing and the resolution limit on a matplotlib Axes."""
    least = rocs.resolution
    floor = least / 2
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([floor, 1], [floor, 1], color=COLORS["muted"], lw=0.8, ls=(0, (2, 2)))
    axes.axvline(least, color=COLORS["muted"], lw=0.8)
    for line in rocs.lines:
        for row in line.scores:
            kept = ~np.isnan(row)
            curve = membership.roc(row[kept], rocs.member[kept])
            x, y = (
                np.maximum(part, floor)
                for part in (curve.false_positive_rate, curve.true_positive_rate)
            )
            axes.step(x, y, where="post", color=line.color, lw=line.width, alpha=0.8)
    axes.set_xlim(floor, 1.1)
    axes.set_ylim(floor, 1.1)
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")


def _colors(case: Case) -> dict[str, str]:
    """Of every method: that of its role, if it has one."""
    shown = {label: role for role, label in roles(case).items()}
    return {label: COLORS[COLOR_OF.get(shown.get(label), "low")] for label in case.outputs}


def _auc(scores: np.ndarray, member: np.ndarray) -> float:
    return membership.attack(scores, member, targets=()).auc
