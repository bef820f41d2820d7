"""The page's figures, each a few panels with a caption; see `drawing` for how they are drawn."""

from typing import NamedTuple

import numpy as np

from jax_lowrank.report import grid as grids
from jax_lowrank.report import tables
from jax_lowrank.report.drawing import (
    COLORS,
    GLYPHS,
    HEIGHT,
    MARKERS,
    Key,
    Panel,
    panel,
    rank_color,
)
from jax_lowrank.report.grid import BASE, SPLITS, Grid
from jax_lowrank.report.tables import Estimate, GroupRate, Summary

SHOWN = {"base": ("s", "■"), "low": ("o", "●"), "high": ("^", "▲"), "full": ("D", "◆")}


class Figure(NamedTuple):
    """Panels of one figure, their legend, and what a reader needs to read them."""

    anchor: str
    title: str
    caption: str
    panels: list[Panel]
    keys: list[Key]


def all_figures(
    grid: Grid, summary: Summary, groups: dict[str, dict[str, list[GroupRate]]]
) -> list[Figure]:
    """Every figure that the runs allow, in the order of the page."""
    made = (
        by_rank(grid, summary),
        by_group(grid, groups),
        divergences(grid, summary),
        lens(grid),
        learning_rates(grid),
    )
    return [figure for figure in made if figure is not None and figure.panels]


def by_rank(grid: Grid, summary: Summary) -> Figure | None:
    """Harm, retention, perplexity and KL retention against the rank; None without LoRA runs."""
    if not grid.lora:
        return None
    tuned, transfer = (grids.described(grid, split) for split in SPLITS)
    one = {BASE: 1.0, grid.full: 0.0}
    wanted = [
        ("harm/tuned", f"Harm rate, {tuned}", {}),
        ("harm/transfer", f"Harm rate, {transfer}", {}),
        ("retention/tuned", f"Retention, {tuned}", one),
        ("retention/transfer", f"Retention, {transfer}", one),
        ("perplexity", "Perplexity of neutral text", {}),
        ("kl_retention/tuned", f"KL retention, {tuned}", one),
    ]
    panels = [_rank_panel(grid, title, summary[name], fixed) for name, title, fixed in wanted]
    caption = (
        "Rank on a log₂ axis. Lines join means over seeds, bars are intervals of the level over"
        " templates and seeds, small dots are single seeds. The base model and full fine-tuning are"
        " horizontal lines; the band spans full fine-tuning's seeds. Methods answer the same"
        " prompts, so differences are known more precisely than these bars suggest: read the table"
        " above for them. A missing point is undefined; the method table says why."
    )
    keys = [*series_keys(grid), Key("base", "╌", "base")]
    keys += [Key("full", "━", "full fine-tuning")] if grid.full else []
    return Figure("by-rank", "What survives, by rank", caption, [p for p in panels if p], keys)


def by_group(grid: Grid, groups: dict[str, dict[str, list[GroupRate]]]) -> Figure:
    """Harm rate of every group: base, lowest rank, highest rank, full fine-tuning."""
    roles = _roles(grid)
    truth = true_rates(grid.study["task_notes"])
    panels = []
    for split in SPLITS:
        rates = {role: groups[split][label] for role, label in roles.items()}
        if rates[BASE]:
            title = f"Harm rate by group, {grids.described(grid, split)}"
            panels.append(_group_panel(title, roles, rates, truth))
    keys = [Key(role, SHOWN[role][1], label) for role, label in roles.items()]
    caption = (
        "Groups by the base model's rate. Bars are intervals over templates and seeds; where no"
        " resampling interval exists (no harmful completion), Wilson limits of the pooled counts."
    )
    if truth:
        keys.append(Key("ink", "|", "rate in the pretraining text"))
    return Figure("by-group", "Harm by group", caption, panels, keys)


def divergences(grid: Grid, summary: Summary) -> Figure | None:
    """KL(full || method) and KL(method || base) against the rank; None without posteriors."""
    panels = []
    for split in SPLITS if grid.lora else ():
        name = grids.described(grid, split)
        titles = {
            f"kl_full_method/{split}": f"KL(full ‖ method), {name}",
            f"kl_method_base/{split}": f"KL(method ‖ base), {name}",
        }
        panels += [
            _rank_panel(grid, title, summary.get(metric, {}), {})
            for metric, title in titles.items()
        ]
    caption = (
        "Kullback-Leibler divergence of next-token distributions after the same prompts, in nats:"
        " how far a method still is from full fine-tuning (the dashed line is the base model's"
        " distance), and how far it moved from the base (the solid line is full fine-tuning's)."
    )
    keys = [*series_keys(grid), Key("base", "╌", "base"), Key("full", "━", "full fine-tuning")]
    return Figure("kl", "How far the posteriors moved", caption, [p for p in panels if p], keys)


def lens(grid: Grid) -> Figure | None:
    """Probability of the harm words read off after each layer; None where it was not stored."""
    panels, styles = [], _line_styles(grid)
    for split in SPLITS:
        curves = {label: tables.lens(grid, split, label) for label in styles}
        curves = {label: curve for label, curve in curves.items() if curve is not None}
        if curves:
            title = f"Harm words by layer, {grids.described(grid, split)}"
            panels.append(_lens_panel(title, curves, styles))
    caption = (
        "LogitLens: the residual stream after each layer is read through the final norm and the"
        " output matrix; the curve is the probability of the first tokens of the harm words as"
        " next token (LoRA merged first), mean over prompts and seeds. Layer 0 is the embedding."
    )
    keys = [Key(color, glyph, label) for label, (color, _, glyph) in styles.items()]
    return Figure("lens", "Where harm words arise", caption, panels, keys)


def learning_rates(grid: Grid, unit: str = "nats per token") -> Figure | None:
    """Validation loss against the learning rate by method; None where nothing was chosen."""
    chosen = tables.chosen_rates(grid)
    if not any(len(each["tried"]) > 1 for each in chosen):
        return None
    styles = _line_styles(grid)

    def draw(axes) -> None:
        for each in chosen:
            color, marker, _ = styles.get(each["label"], ("muted", ".", ""))
            points = [p for p in each["tried"] if p["loss"] is not None]
            rates, losses = ([p[name] for p in points] for name in ("learning_rate", "loss"))
            axes.plot(rates, losses, color=COLORS[color], marker=marker, ms=4, lw=1.2)
            for point in points:
                if point["learning_rate"] == each["used"]:
                    ring = {"s": 90, "facecolors": "none", "edgecolors": COLORS[color]}
                    axes.scatter(point["learning_rate"], point["loss"], linewidths=1.4, **ring)
        axes.set_xscale("log")
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel(f"validation loss ({unit})")

    alt = "; ".join(f"{each['label']}: used {each['used']:g}" for each in chosen if each["used"])
    title = "Validation loss by learning rate"
    caption = (
        "One run per point, with a seed that is not reported elsewhere. A ring marks the rate used"
        " in the reported runs; runs that diverged are left out here and listed in the tables."
    )
    keys = []
    for each in chosen:
        color, _, glyph = styles.get(each["label"], ("muted", ".", "•"))
        remark = "" if each["used"] else " (no reported run)"
        keys.append(Key(color, glyph, each["label"] + remark))
    figure = panel(title, alt, draw, height=3.0)
    return Figure("learning-rate", "How the learning rates were chosen", caption, [figure], keys)


def true_rates(notes: dict[str, str]) -> dict[str, float]:
    """group -> rate from a task's note ('Zibblean 0.100, ...'); empty when there is none."""
    rates = {}
    for part in filter(None, notes.get("true_rates", "").split(", ")):
        group, _, rate = part.rpartition(" ")
        rates[group] = float(rate)
    return rates


def _rank_panel(
    grid: Grid, title: str, values: dict[str, Estimate], fixed: dict[str, float]
) -> Panel | None:
    lines = {
        name: [(rank, values[label]) for rank, label in pairs if label in values]
        for name, pairs in grids.rank_series(grid).items()
    }
    defined = [e.value for pairs in lines.values() for _, e in pairs if not np.isnan(e.value)]
    if not defined:
        return None
    levels = {label: (fixed.get(label), values.get(label)) for label in (BASE, grid.full) if label}
    levels = {
        k: (v if v is not None else e.value, e)
        for k, (v, e) in levels.items()
        if v is not None or e
    }

    def draw(axes) -> None:
        for place, pairs in enumerate(lines.values()):
            rank_line(axes, place, pairs)
        for label, (value, estimate) in levels.items():
            role = "base" if label == BASE else "full"
            dashes = (0, (4, 2)) if role == "base" else "-"
            axes.axhline(value, color=COLORS[role], ls=dashes, lw=1.6, zorder=1)
            if estimate and len(estimate.per_seed) > 1:
                band = (min(estimate.per_seed), max(estimate.per_seed))
                axes.axhspan(*band, color=COLORS[role], alpha=0.18, lw=0, zorder=0)
        rank_axis(axes, sorted({rank for pairs in lines.values() for rank, _ in pairs}))
        if title.startswith(("Harm", "KL(")):
            axes.set_ylim(bottom=0)
        _label_levels(axes, {k: v for k, (v, _) in levels.items()})

    parts = [f"{'base' if k == BASE else 'full'} {v:.3g}" for k, (v, _) in levels.items()]
    parts += [
        f"{name} rank {rank}: {e.value:.3g}" for name, pairs in lines.items() for rank, e in pairs
    ]
    return panel(title, "; ".join(parts), draw)


def rank_line(axes, place: int, pairs: list[tuple[int, Estimate]]) -> None:
    """One series: estimates with limits joined over ranks, and single seeds beside them."""
    color = COLORS[_series_color(place)]
    ranks = np.array([rank for rank, _ in pairs], float)
    middle = np.array([e.value for _, e in pairs])
    limits = np.array([[e.low, e.high] for _, e in pairs])
    bars = np.clip(np.stack([middle - limits[:, 0], limits[:, 1] - middle]), 0, None)
    axes.errorbar(
        ranks,
        middle,
        np.nan_to_num(bars),
        color=color,
        marker=MARKERS[place % len(MARKERS)],
        lw=1.6,
        elinewidth=1.1,
        capsize=2.5,
        zorder=3,
    )
    for rank, (_, estimate) in zip(ranks, pairs):
        number = len(estimate.per_seed)
        spread = rank * 2.0 ** (0.16 + 0.09 * np.arange(number))
        axes.plot(spread, estimate.per_seed, ls="", marker=".", ms=4, color=color, alpha=0.75)


def rank_axis(axes, ranks: list[int]) -> None:
    """Ranks on a log2 axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(rank_labels(ranks))
    axes.set_xlim(ranks[0] / 1.4, ranks[-1] * 1.75)
    axes.set_xlabel("rank")


def rank_labels(ranks: list[float]) -> list[str]:
    """What stands below the ticks; "" where a label would run into that of the next larger rank."""
    least, free, found = np.log2(ranks[-1] / ranks[0]) / 11, np.inf, []
    for rank in reversed(ranks):
        has_room = np.log2(rank) <= free
        free = np.log2(rank) - least if has_room else free
        found.append(f"{rank:g}" if has_room else "")
    return found[::-1]


def _label_levels(axes, levels: dict[str, float]) -> None:
    """Names at the right end of the horizontal lines, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(levels.items(), key=lambda pair: pair[1])
    close = len(ordered) == 2 and ordered[1][1] - ordered[0][1] < 0.09 * (high - low)
    for place, (label, value) in enumerate(ordered):
        shift = (place * 10 - 5) if close else 0
        role = "base" if label == BASE else "full"
        axes.annotate(
            role,
            (1, value),
            (4, shift),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=COLORS[role],
            fontweight="bold",
        )


def _group_panel(title, roles, rates: dict[str, list[GroupRate]], truth) -> Panel:
    order = np.argsort([each.rate for each in rates[BASE]])
    names = [rates[BASE][i].group for i in order]
    step = 0.8 / len(roles)

    def draw(axes) -> None:
        for place, (role, found) in enumerate(rates.items()):
            chosen = [found[i] for i in order]
            y = np.arange(len(names)) + 0.4 - step * (place + 0.5)
            low = [each.wilson_low if np.isnan(each.low) else each.low for each in chosen]
            high = [each.wilson_high if np.isnan(each.high) else each.high for each in chosen]
            axes.hlines(y, low, high, color=COLORS[role], lw=1.2)
            x = [each.rate for each in chosen]
            axes.plot(x, y, ls="", marker=SHOWN[role][0], color=COLORS[role], ms=4.5)
        known = [(truth[name], i) for i, name in enumerate(names) if name in truth]
        if known:
            x, y = zip(*known)
            top = np.array(y) + 0.4 - step / 2
            axes.vlines(x, top - 0.1, top + 0.1, color=COLORS["ink"], lw=1.6, zorder=4)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(left=-0.01)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        for edge in np.arange(len(names) - 1) + 0.5:
            axes.axhline(edge, color=COLORS["grid"], lw=0.6)
        axes.set_xlabel("harm rate")

    parts = []
    for i in reversed(order):
        values = ", ".join(f"{roles[role]} {rates[role][i].rate:.2f}" for role in rates)
        parts.append(f"{rates[BASE][i].group}: {values}")
    return panel(title, "; ".join(parts), draw, 4.2, max(HEIGHT, 0.7 + 0.42 * len(names)))


def _lens_panel(title: str, curves: dict[str, np.ndarray], styles: dict) -> Panel:
    def draw(axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for label, curve in curves.items():
            color, marker, _ = styles[label]
            dashes = (0, (4, 2)) if label == BASE else "-"
            axes.plot(curve, color=COLORS[color], marker=marker, ls=dashes, lw=1.5, ms=4.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("probability of harm words")

    alt = "; ".join(
        f"{label}: {curve[-1]:.3g} after the last layer" for label, curve in curves.items()
    )
    return panel(title, alt, draw, height=2.9)


def _roles(grid: Grid) -> dict[str, str]:
    """Colour role -> label of what `extremes` shows side by side."""
    shown = [label for label in grids.extremes(grid) if label in grid.lora]
    roles = {"base": BASE} | dict(zip(("low", "high"), shown))
    return roles | ({"full": grid.full} if grid.full else {})


def _line_styles(grid: Grid) -> dict[str, tuple[str, str, str]]:
    """label -> (colour role, marker, glyph) where every method has a line of its own."""
    styles = {BASE: ("base", "s", "╌■╌")}
    for place, label in enumerate(grid.lora):
        mark = place % len(MARKERS)
        styles[label] = (rank_color(place, len(grid.lora)), MARKERS[mark], GLYPHS[mark])
    return styles | ({grid.full: ("full", "D", "━◆━")} if grid.full else {})


def series_keys(grid: Grid) -> list[Key]:
    """The legend of figures with a line a series."""
    names = grids.rank_series(grid)
    return [
        Key(_series_color(place), GLYPHS[place % len(GLYPHS)], name)
        for place, name in enumerate(names)
    ]


def _series_color(place: int) -> str:
    return "lora" if place == 0 else rank_color(place % 8, 8)
