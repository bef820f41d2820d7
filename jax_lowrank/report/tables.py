"""Numbers of a method over its seeds: levels with intervals, harm by group, gaps, KL, LogitLens.

Intervals of levels: percentile bootstrap that draws templates and seeds (`intervals.bootstrap`).
"""

from typing import NamedTuple

import numpy as np

from jax_lowrank.evaluation import comparisons, intervals, shift, toxicity
from jax_lowrank.report import grid as grids
from jax_lowrank.report.grid import BASE, SPLITS, Grid
from jax_lowrank.results import RunResult

NO_POSTERIORS = "no posteriors were stored"


class Estimate(NamedTuple):
    """A mean over seeds with its limits; per_seed holds each seed's value (one for the base)."""

    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    n: int
    num_clusters: int
    reason: str
    note: str = ""


class GroupRate(NamedTuple):
    """Harm rate of one group: num_harmful / num_completions, pooled over seeds, as are the Wilson
    limits.

    low, high: bootstrap over templates and seeds, NaN with `reason` where they cannot be had (no
    harmful completion at all, one template).
    """

    group: str
    rate: float
    low: float
    high: float
    wilson_low: float
    wilson_high: float
    num_harmful: int
    num_completions: int
    num_prompts: int
    reason: str


class Shift(NamedTuple):
    """`evaluation.shift.posterior_shift` of one run on one split; rows (Q,) are prompt numbers."""

    rows: np.ndarray
    found: shift.PosteriorShift


Shifts = dict[tuple[str, int, str], Shift]
Summary = dict[str, dict[str, Estimate]]


def shifts(grid: Grid) -> Shifts:
    """(label, seed, split) -> posterior shift, each run beside the same seed of full fine-tuning.

    The base stands under each seed of full fine-tuning (its retention is 1). Runs without stored
    posteriors, or stored for other prompts, are absent.
    """
    if not grid.full:
        return {}
    found = {}
    for split in SPLITS:
        name, groups = f"{split}/posterior_rows", grid.rows[split].groups
        for seed, full in grid.runs[grid.full].items():
            for label in (BASE, *grid.labels):
                run = grid.base if label == BASE else grid.runs[label].get(seed)
                trio = (full, run, grid.base)
                if not _comparable(trio, name):
                    continue
                rows = run.arrays[name]
                logs = (each.arrays[f"{split}/log_posterior"] for each in trio)
                found[label, seed, split] = Shift(rows, shift.posterior_shift(*logs, groups[rows]))
    return found


def summary(grid: Grid, found: Shifts) -> Summary:
    """metric -> label -> Estimate, base included where it has a value.

    harm/SPLIT, retention/SPLIT (1 = the base's harm, 0 = full's), perplexity, expected_max/SPLIT
    and harm_probability/SPLIT (of K completions), kl_full_method/SPLIT, kl_method_base/SPLIT,
    js_full_method/SPLIT (nats), kl_retention/SPLIT (1 = nothing of full's shift).
    """
    threshold = grid.evaluate["threshold"]
    table: Summary = {}
    for split in SPLITS:
        k = grid.base.arrays[f"{split}/harm"].shape[1]
        levels = {
            f"harm/{split}": lambda run, s=split: grids.harm_by_prompt(run, s, threshold),
            f"expected_max/{split}": lambda run, s=split, k=k: (
                toxicity.expected_max_toxicity(run.arrays[f"{s}/harm"], k).per_prompt
            ),
            f"harm_probability/{split}": lambda run, s=split, k=k: (
                toxicity.toxicity_probability(run.arrays[f"{s}/harm"], k, threshold).per_prompt
            ),
        }
        for name, values in levels.items():
            table[name] = {
                label: _level(grid, label, split, values) for label in (BASE, *grid.labels)
            }
        table[f"retention/{split}"] = _retentions(grid, split)
        table |= _divergences(grid, split, found)
    table["perplexity"] = {label: _perplexity(grid, label) for label in (BASE, *grid.labels)}
    return table


def group_rates(grid: Grid, split: str, label: str) -> list[GroupRate]:
    """Harm rate of every group that has prompts in the split, in the order of the group names."""
    rows, names, settings = grid.rows[split], grid.study["group_names"], grid.evaluate
    runs = list(grid.runs[label].values())
    harm = np.stack([run.arrays[f"{split}/harm"] for run in runs]).astype(np.float64)  # (S, P, K)
    rates = np.stack([grids.harm_by_prompt(run, split, settings["threshold"]) for run in runs])
    found = []
    for place in np.flatnonzero(rows.groups.any(0)):
        chosen = rows.groups[:, place]
        scored = ~np.isnan(harm[:, chosen])
        hits = scored & (harm[:, chosen] >= settings["threshold"])
        count, harmful = int(scored.sum()), int(hits.sum())
        wilson = intervals.wilson(harmful, count, settings["level"])
        spread = intervals.bootstrap(
            rates[:, chosen], clusters=rows.clusters[chosen], **resampling(grid)
        )
        limits = (spread.low, spread.high, wilson.low, wilson.high)
        reason = wilson.reason or spread.reason
        found.append(
            GroupRate(
                names[place], wilson.estimate, *limits, harmful, count, int(chosen.sum()), reason
            )
        )
    return found


def group_gap(grid: Grid, split: str, label: str) -> comparisons.Gap:
    """Largest minus smallest group rate (mean over seeds), with what chance alone would give."""
    rows, threshold = grid.rows[split], grid.evaluate["threshold"]
    runs = grid.runs[label].values()
    rates = np.stack([grids.harm_by_prompt(run, split, threshold) for run in runs])
    kept = ~np.isnan(rates)
    mean = intervals.divide(np.where(kept, rates, 0.0).sum(0), kept.sum(0))
    options = {"num_permutations": grid.evaluate["num_resamples"], "seed": grid.evaluate["seed"]}
    return comparisons.gap_permutation(mean, rows.groups, rows.clusters, **options)


def lens(grid: Grid, split: str, label: str) -> np.ndarray | None:
    """Mean probability of the harm words after each layer (L + 1,), over prompts and seeds."""
    name = f"{split}/lens_mass"
    masses = [run.arrays[name] for run in grid.runs[label].values() if name in run.arrays]
    if not masses:
        return None
    groups = grid.rows[split].groups
    return np.mean([shift.lens_by_layer(mass, groups).overall for mass in masses], axis=0)


def chosen_rates(grid: Grid) -> list[dict]:
    """Per method: the learning rates tried (validation loss, None where diverged) and the one used.

    at_edge is True when the rate used is the smallest or largest of several tried.
    """
    found = []
    names = {record["label"] for record in grid.tune}
    for label in (*filter(names.__contains__, grid.labels), *sorted(names - set(grid.labels))):
        tried = [
            {"learning_rate": r["learning_rate"], "loss": _finite(r["validation_loss"])}
            for r in grid.tune
            if r["label"] == label
        ]
        for point in tried:
            diverged = [r for r in grid.tune if r["label"] == label and r["diverged"]]
            if any(r["learning_rate"] == point["learning_rate"] for r in diverged):
                point["loss"] = None
        used = grid.record(label)["learning_rate"] if label in grid.runs else None
        rates = [point["learning_rate"] for point in tried]
        at_edge = len(rates) > 1 and used in (min(rates), max(rates))
        found.append({"label": label, "tried": tried, "used": used, "at_edge": at_edge})
    return found


def resampling(grid: Grid) -> dict:
    """The study's level, num_resamples and seed, as evaluation takes them."""
    return {name: grid.evaluate[name] for name in ("level", "num_resamples", "seed")}


def comparable_rows(run: RunResult, other: RunResult, name: str) -> bool:
    """Whether both runs stored array `name` (prompt numbers) and stored the same."""
    return (
        name in run.arrays
        and name in other.arrays
        and np.array_equal(run.arrays[name], other.arrays[name])
    )


def _comparable(trio: tuple[RunResult | None, ...], name: str) -> bool:
    return all(run is not None and comparable_rows(run, trio[0], name) for run in trio)


def _level(grid: Grid, label: str, split: str, values) -> Estimate:
    table = np.stack([values(run) for run in grid.runs[label].values()])
    return _estimate(grid, table, grid.rows[split].clusters)


def _estimate(grid: Grid, table: np.ndarray, clusters: np.ndarray) -> Estimate:
    found = intervals.bootstrap(table, clusters=clusters, **resampling(grid))
    kept = ~np.isnan(table)
    per_seed = intervals.divide(np.where(kept, table, 0.0).sum(1), kept.sum(1))
    size = int(kept.any(0).sum())
    return Estimate(
        *(found.estimate, found.low, found.high, tuple(per_seed.tolist())),
        *(size, found.num_clusters, found.reason, intervals.seed_note(table.shape[0])),
    )


def _retentions(grid: Grid, split: str) -> dict[str, Estimate]:
    found, threshold = {}, grid.evaluate["threshold"]
    base = grids.harm_by_prompt(grid.base, split, threshold)
    for label in grid.lora if grid.full else ():
        seeds = grids.common_seeds(grid, (label, grid.full))
        if not seeds:
            continue
        method, full = (
            grids.stack(grid, name, seeds, lambda run: grids.harm_by_prompt(run, split, threshold))
            for name in (label, grid.full)
        )
        clusters = grid.rows[split].clusters
        kept = toxicity.retention_interval(method, base, full, clusters, **resampling(grid))
        each = zip(method, full) if not kept.reason else ()
        per_seed = tuple(
            toxicity.retention(np.nanmean(m), np.nanmean(base), np.nanmean(f)).estimate
            for m, f in each
        )
        found[label] = Estimate(
            *(kept.estimate, kept.low, kept.high, per_seed),
            *(kept.n, kept.num_clusters, kept.reason, kept.note),
        )
    return found


def _perplexity(grid: Grid, label: str) -> Estimate:
    """exp(total nll / total tokens) over the neutral sentences; 1 is the ideal."""
    runs = list(grid.runs[label].values())
    nll = np.stack([run.arrays["neutral/nll"] for run in runs]).astype(np.float64)
    tokens = np.stack([run.arrays["neutral/tokens"] for run in runs]).astype(np.float64)
    found = intervals.ratio(nll, tokens, grid.rows["neutral"].clusters, **resampling(grid))
    values = np.exp([found.estimate, found.low, found.high])
    per_seed = np.exp(intervals.divide(nll.sum(1), tokens.sum(1)))
    return Estimate(
        *map(float, values), tuple(per_seed.tolist()), *(found.n, found.num_clusters, found.reason)
    )


def _divergences(grid: Grid, split: str, found: Shifts) -> Summary:
    """KL and JS tables of one split; labels without stored posteriors are absent."""
    names = ("kl_full_method", "kl_method_base", "js_full_method", "kl_retention")
    table: Summary = {f"{name}/{split}": {} for name in names}
    for label in (BASE, *grid.labels):
        mine = [each for (name, _, part), each in found.items() if (name, part) == (label, split)]
        if not mine:
            continue
        clusters = grid.rows[split].clusters[mine[0].rows]
        for name in names[:3]:
            trivial = label == (BASE if name == "kl_method_base" else grid.full)
            if trivial:  # 0 by definition
                continue
            table[f"{name}/{split}"][label] = _estimate(grid, _stacked(mine, name), clusters)
        if label in (BASE, grid.full):
            continue
        kept = intervals.ratio(
            _stacked(mine, "kl_full_method"),
            _stacked(mine, "kl_full_base"),
            clusters,
            **resampling(grid),
        )
        per_seed = tuple(each.found.retention for each in mine)
        table[f"kl_retention/{split}"][label] = Estimate(
            *(kept.estimate, kept.low, kept.high, per_seed),
            *(kept.n, kept.num_clusters, kept.reason, kept.note),
        )
    return table


def _stacked(found: list[Shift], name: str) -> np.ndarray:
    return np.stack([getattr(each.found, name).rows for each in found])


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
