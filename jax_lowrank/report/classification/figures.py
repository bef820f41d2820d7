"""Figures of a classification study: by rank, differences, groups, reliability, group size."""

import math
import textwrap

import numpy as np

from jax_lowrank.evaluation import calibration, intervals
from jax_lowrank.report import figures
from jax_lowrank.report import grid as grids
from jax_lowrank.report.classification import effects
from jax_lowrank.report.classification.numbers import (
    HEAD,
    RATES,
    TITLES,
    Case,
    Distance,
    GroupRow,
)
from jax_lowrank.report.drawing import COLORS, Key, Panel, panel
from jax_lowrank.report.figures import Figure, rank_axis, rank_line, series_keys
from jax_lowrank.report.grid import BASE
from jax_lowrank.report.tables import Estimate

CURVES = (*effects.METRICS, "nll")
LETTER = 0.075  # inches of a label, at most
NUM_BINS = 10  # of reliability diagrams: fewer than of the ECE, so that groups show something
ROLES = {"head": ("s", "■"), "low": ("o", "●"), "high": ("^", "▲"), "full": ("D", "◆")}
COLOR_OF = {"head": "base", "low": "low", "high": "high", "full": "full"}


def all_figures(
    case: Case,
    summary: dict[str, dict[str, Estimate]],
    apart: list[Distance],
    groups: dict[str, list[GroupRow]],
    pairs: list[effects.Effects],
) -> list[Figure]:
    """Every figure that the runs allow, in the order of the page."""
    if not case.outputs:
        return []
    made = (
        by_rank(case, summary),
        forest(case, pairs),
        group_forest(case),
        heat_map(case, apart),
        reliability(case),
        by_size(case, groups),
        figures.learning_rates(case.grid, "nats per row"),
    )
    return [figure for figure in made if figure is not None and figure.panels]


def roles(case: Case) -> dict[str, str]:
    """Colour role -> label of what is shown side by side: `untuned`, extreme ranks, full."""
    by_rank = sorted(case.grid.lora, key=lambda label: case.grid.record(label)["rank"])
    found = {"head": label} if (label := untuned(case)) else {}
    found |= dict(zip(("low", "high"), dict.fromkeys((*by_rank[:1], *by_rank[-1:]))))
    return found | ({"full": case.grid.full} if case.grid.full else {})


def untuned(case: Case) -> str:
    """What stands for no adaptation: head-only training, or the base model that answers by words.

    '' where there is neither.
    """
    return next((label for label in (HEAD, BASE) if label in case.outputs), "")


def keys_of(case: Case) -> list[Key]:
    """The legend of `roles`."""
    return [Key(COLOR_OF[r], ROLES[r][1], label) for r, label in roles(case).items()]


def by_rank(case: Case, summary: dict[str, dict[str, Estimate]]) -> Figure | None:
    """Every metric against the rank, with `untuned` and full fine-tuning as levels."""
    if not case.grid.lora:
        return None
    panels = [curve(case, TITLES[name], summary[name]) for name in CURVES if name in summary]
    dashed = f"“{untuned(case)}” (dashed) and " if untuned(case) else ""
    caption = (
        "Rank on a log₂ axis, alpha as configured. Lines join means over seeds; bars are intervals"
        " over rows and seeds (calibration: over rows); small dots are single seeds. Levels:"
        f" {dashed}full fine-tuning (solid, with the band of its seeds)."
        " Methods see the same rows, so differences are known better than bars suggest."
    )
    return Figure("by-rank", "By rank", caption, panels, curve_keys(case))


def curve_keys(case: Case) -> list[Key]:
    """The legend of `curve`."""
    keys = series_keys(case.grid)
    keys += [Key("base", "╌", untuned(case))] if untuned(case) else []
    return keys + ([Key("full", "━", "full fine-tuning")] if case.grid.full else [])


def forest(case: Case, pairs: list[effects.Effects]) -> Figure | None:
    """Differences to full fine-tuning with limits, a panel a metric."""
    if not pairs:
        return None
    panels = [
        _forest_panel(
            f"Difference of {TITLES[name][:1].lower() + TITLES[name][1:]}",
            {_short(pair.label): pair.found[name] for pair in pairs},
            case.settings["margin"],
        )
        for name in effects.METRICS
    ]
    caption = (
        "Differences to full fine-tuning on the same rows and seeds, with intervals over both. The"
        f" shaded band is the margin ±{case.settings['margin']:g} within which a difference would"
        " not matter; an interval that lies inside it says so, one that crosses 0 says only that"
        " the runs cannot tell the sign. “matched”: of each seed the LoRA run nearest to full"
        f" fine-tuning in validation {case.utility}, where one is within the margin."
    )
    return Figure("forest", "Differences to full fine-tuning", caption, panels, [])


def group_forest(case: Case) -> Figure | None:
    """Accuracy by group, the extreme ranks minus full fine-tuning."""
    if not case.grid.full:
        return None
    shown = [label for role, label in roles(case).items() if role in ("low", "high")]
    panels = [
        _forest_panel(f"Accuracy, {label} minus full", found, case.settings["margin"])
        for label in shown
        if (found := effects.by_group(case, label))
    ]
    caption = "The same by group, for groups with enough rows. Groups may overlap."
    return Figure("forest-groups", "Differences by group", caption, panels, [])


def heat_map(case: Case, apart: list[Distance]) -> Figure:
    """Group minus rest by method, a panel a rate; stars after correction, dots where too few."""
    panels = [_heat_panel(case, rate, [d for d in apart if d.rate == rate]) for rate in RATES]
    caption = (
        "A group's rate minus that of all other test rows. A star marks adjusted p < 0.05"
        " (Benjamini-Hochberg over groups × rates × methods; Welch, rows and seeds); a dot stands"
        " where a group has too few rows, positives or negatives. Groups differ in how hard their"
        " posts are and in how many are toxic: a difference to the rest is no verdict on a method."
    )
    keys = [Key("high", "■", "above the rest"), Key("low", "■", "below the rest")]
    return Figure("heat", "Groups against the rest", caption, panels, keys)


def reliability(case: Case) -> Figure | None:
    """Observed share against stated probability, by group; a band for calibrated full."""
    if not roles(case):
        return None
    wanted = [("all rows", np.ones(case.labels.size, bool))]
    wanted += [(n, case.members[:, g]) for g, n in enumerate(case.names) if case.enough[g]]
    panels = [_reliability_panel(case, name, inside) for name, inside in wanted]
    positive = case.grid.study["positive"]
    what = f"P({positive})" if len(case.grid.study["classes"]) == 2 else "the largest probability"
    caption = (
        f"Rows by {what} in {NUM_BINS} bins of equal width, runs of all seeds in one; larger marks"
        " hold more rows. The band is where 95 % of a calibrated method's marks lie at full"
        " fine-tuning's bin sizes in one run. Seeds share rows, so the marks move together."
    )
    return Figure("reliability", "Reliability by group", caption, panels, keys_of(case))


def by_size(case: Case, groups: dict[str, list[GroupRow]]) -> Figure | None:
    """Accuracy of every group against its number of test rows."""
    if not roles(case):
        return None

    def draw(axes) -> None:
        from matplotlib.ticker import FixedLocator, NullLocator

        for role, label in roles(case).items():
            rows = [row for row in groups[label][1:] if not np.isnan(row.cells["accuracy"].value)]
            x = np.array([row.size for row in rows], float)
            cells = [row.cells["accuracy"] for row in rows]
            y = np.array([cell.value for cell in cells])
            bars = np.array([[c.value - c.low, c.high - c.value] for c in cells]).reshape(-1, 2).T
            place = list(roles(case)).index(role) - 1.5
            axes.errorbar(
                x * 1.03**place,
                y,
                np.clip(np.nan_to_num(bars), 0, None),
                ls="",
                marker=ROLES[role][0],
                color=COLORS[COLOR_OF[role]],
                elinewidth=0.9,
                ms=4.5,
            )
        axes.set_xscale("log")
        ticks = [n * 10**k for k in range(1, 7) for n in (1, 2, 5)]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("test rows of the group")
        axes.set_ylabel("accuracy")

    alt = "; ".join(
        f"{rows[0].name}, {rows[0].size} rows: "
        + ", ".join(
            f"{label} {row.cells['accuracy'].value:.2f}"
            for label, row in zip(roles(case).values(), rows)
        ).replace("nan", "too few")
        for rows in list(zip(*(groups[label] for label in roles(case).values())))[1:]
    )
    caption = "One mark a group and method. Few rows widen the interval, whatever the method."
    made = panel("Accuracy against group size", alt, draw, height=3.0)
    return Figure("size", "Group size", caption, [made], keys_of(case))


def curve(case: Case, title: str, values: dict[str, Estimate]) -> Panel:
    """What LoRA methods have against the rank, a line a series; the others are levels."""
    lines = {
        name: [(rank, values[label]) for rank, label in pairs if label in values]
        for name, pairs in grids.rank_series(case.grid).items()
    }
    levels = {
        role: values[label]
        for role, label in (("base", untuned(case)), ("full", case.grid.full))
        if label in values
    }

    def draw(axes) -> None:
        undefined = [e.reason for e in values.values() if math.isnan(e.value)]
        if undefined and len(undefined) == len(values):
            said = "\n".join(["undefined:", *textwrap.wrap(undefined[0], 30)])
            axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center")
            axes.set_axis_off()
            return
        for place, pairs in enumerate(lines.values()):
            if pairs:
                rank_line(axes, place, pairs)
        for role, level in levels.items():
            dashes = (0, (4, 2)) if role == "base" else "-"
            axes.axhline(level.value, color=COLORS[role], ls=dashes, lw=1.6, zorder=1)
            if role == "full" and len(level.per_seed) > 1:
                band = (min(level.per_seed), max(level.per_seed))
                axes.axhspan(*band, color=COLORS[role], alpha=0.18, lw=0, zorder=0)
        rank_axis(axes, sorted({rank for pairs in lines.values() for rank, _ in pairs}))

    names = {"base": untuned(case), "full": "full"}
    parts = [f"{names[role]} {_stated(level)}" for role, level in levels.items()]
    parts += [
        f"{name} rank {rank:g}: {_stated(e)}" for name, pairs in lines.items() for rank, e in pairs
    ]
    return panel(title, "; ".join(parts), draw)


def _stated(value: Estimate) -> str:
    return "undefined" if math.isnan(value.value) else f"{value.value:.3g}"


def _forest_panel(title: str, found: dict, margin: float) -> Panel:
    names = list(found)[::-1]

    def draw(axes) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.axvspan(-margin, margin, color=COLORS["muted"], alpha=0.12, lw=0)
        axes.axvline(0, color=COLORS["muted"], lw=1)
        for place, name in enumerate(names):
            each = found[name]
            if np.isnan(each.estimate):
                continue
            axes.hlines(place, each.low, each.high, color=COLORS["lora"], lw=1.6)
            axes.plot(each.estimate, place, marker="o", color=COLORS["lora"], ms=5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")

    alt = "; ".join(
        f"{name}: {each.estimate:+.3f} [{each.low:+.3f}, {each.high:+.3f}]"
        if not np.isnan(each.estimate)
        else f"{name}: undefined"
        for name, each in found.items()
    )
    return panel(title, alt, draw, 4.2, 0.8 + 0.3 * len(names))


def _heat_panel(case: Case, rate: str, found: list[Distance]) -> Panel:
    groups, labels = list(case.names), list(case.outputs)
    by_cell = {(each.group, each.label): each for each in found}
    known = [abs(d.found.estimate) for d in found if not np.isnan(d.found.estimate)]
    largest = max(known, default=1.0) or 1.0
    down = len(labels) > len(groups)  # the longer list is read downwards, where a page has room
    rows, columns = (labels, groups) if down else (groups, labels)
    wide, high = (LETTER * max(len(_short(name)) for name in names) for names in (rows, columns))
    angle = 30 if high < 0.75 else 90
    width = max(4.4, 0.3 + wide + 0.44 * len(columns))
    height = 0.66 + 0.27 * len(rows) + high * np.sin(np.radians(angle))

    def draw(axes) -> None:
        from matplotlib.patches import Rectangle

        axes.grid(False)
        for y, row in enumerate(rows):
            for x, column in enumerate(columns):
                each = by_cell[(column, row) if down else (row, column)]
                value = each.found.estimate
                if np.isnan(value):
                    axes.text(x, y, "·", ha="center", va="center", color=COLORS["muted"])
                    continue
                role = "high" if value > 0 else "low"
                shade = 0.75 * abs(value) / largest
                box = Rectangle((x - 0.5, y - 0.5), 1, 1, color=COLORS[role], alpha=shade, lw=0)
                axes.add_patch(box)
                star = "*" if each.p_adjusted < 0.05 else ""
                axes.text(x, y, f"{value:+.2f}{star}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(columns)), [_short(name) for name in columns])
        axes.tick_params(axis="x", labelrotation=angle)
        axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)

    alt = "; ".join(
        f"{d.group}, {d.label}: too few"
        if np.isnan(d.found.estimate)
        else f"{d.group}, {d.label}: {d.found.estimate:+.2f}{'*' if d.p_adjusted < 0.05 else ''}"
        for d in found
    )
    return panel(f"{TITLES[rate]}, group minus rest", alt, draw, width, height)


def _reliability_panel(case: Case, name: str, inside: np.ndarray) -> Panel:
    curves = {}
    for role, label in roles(case).items():
        each = case.outputs[label]
        p, y = each.chance[:, inside], each.event[:, inside]
        one = np.ones((p.size, 1), bool)
        found = calibration.reliability(
            calibration.bins(p.ravel(), y.ravel(), one, num_bins=NUM_BINS)
        )
        curves[role] = found
    full = case.outputs.get(case.grid.full)

    def draw(axes) -> None:
        axes.plot([0, 1], [0, 1], color=COLORS["muted"], lw=0.8, ls=(0, (2, 2)))
        if full is not None:
            one = np.ones((int(inside.sum()), 1), bool)
            p, y = full.chance[0, inside], full.event[0, inside]
            band = calibration.reliability(calibration.bins(p, y, one, num_bins=NUM_BINS))
            seen = band.rows[0] > 0
            x = band.probability[0][seen]
            axes.vlines(
                x, band.low[0][seen], band.high[0][seen], color=COLORS["full"], alpha=0.25, lw=5
            )
        for role, found in curves.items():
            seen = found.rows[0] > 0
            x, y = np.transpose(_seen(found))
            sizes = 6 + 60 * intervals.divide(
                found.rows[0][seen], np.full(seen.sum(), found.rows.sum())
            )
            color = COLORS[COLOR_OF[role]]
            axes.plot(x, y, color=color, lw=0.9, alpha=0.8)
            axes.scatter(x, y, s=sizes, marker=ROLES[role][0], color=color, zorder=3)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("stated probability")
        axes.set_ylabel("observed share")

    alt = "; ".join(
        f"{roles(case)[role]}: " + ", ".join(f"{x:.2f} observed {y:.2f}" for x, y in _seen(found))
        for role, found in curves.items()
    )
    return panel(f"{name}, {int(inside.sum())} rows", alt, draw, 3.2, 2.6)


def _seen(found: calibration.Reliability) -> np.ndarray:
    """Stated probability and observed share of the bins that hold rows, (B, 2)."""
    pairs = np.stack([found.probability[0], found.observed[0]], 1)
    return pairs[found.rows[0] > 0]


def _short(label: str) -> str:
    if label.startswith(effects.MATCHED):
        return "matched"
    return "full" if label == "full fine-tuning" else label.replace("LoRA r=", "r=")
