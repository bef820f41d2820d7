"""Every number of every run, in one flat form: the rows of results.csv and results.jsonl."""

import csv
import io
import json
import math
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank.evaluation import comparisons, intervals, toxicity
from jax_lowrank.report import grid as grids
from jax_lowrank.report import tables
from jax_lowrank.report.grid import BASE, SPLITS, Grid
from jax_lowrank.results import RunResult, StudyResult

RECORD_FIELDS = ("fingerprint", "kind", "label", "rank", "learning_rate", "seed")


class Metric(NamedTuple):
    """A number of one run. group '' is all prompts; NaN is undefined, with `reason`.

    low, high: percentile bootstrap over templates (one run: no variance between seeds).
    None: the field does not apply to this metric. count of n completions are harmful; n is a number
    of prompts for the other metrics.
    """

    split: str
    group: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    wilson_low: float | None = None
    wilson_high: float | None = None
    count: int | None = None
    n: int = 0
    num_failed: int | None = None
    num_clusters: int | None = None
    null_mean: float | None = None
    p: float | None = None
    reason: str = ""


def run_metrics(grid: Grid, run: RunResult, shifts: tables.Shifts) -> list[Metric]:
    """All metrics of one run; empty for runs without outputs (tuning runs, diverged runs)."""
    if not run.arrays:
        return []
    found = []
    for split in SPLITS:
        found += _rates(grid, run, split)
        found += _toxicity(grid, run, split)
        found += _retention(grid, run, split)
        found += _shift(grid, run, split, shifts)
        found += _lens(grid, run, split)
    return found + _neutral(grid, run)


def jsonl(result: StudyResult, found: dict[str, list[Metric]]) -> str:
    """results.jsonl: one object a run, its record and `metrics`; NaN is null beside a reason."""
    lines = []
    for run in _ordered(result):
        metrics = [
            {name: value for name, value in metric._asdict().items() if value not in (None, "")}
            for metric in found.get(run.record["fingerprint"], [])
        ]
        lines.append(json.dumps(plain({**run.record, "metrics": metrics}), allow_nan=False))
    return "".join(line + "\n" for line in lines)


def table_csv(result: StudyResult, found: dict[str, list[Metric]]) -> str:
    """results.csv: one line a run and metric; undefined and inapplicable fields are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow((*RECORD_FIELDS, *Metric._fields))
    for run in _ordered(result):
        head = [_cell(run.record[name]) for name in RECORD_FIELDS]
        for metric in found.get(run.record["fingerprint"], []):
            writer.writerow([*head, *map(_cell, metric)])
    return out.getvalue()


def plain(value: Any) -> Any:
    """A value that strict JSON can hold; a dict with a NaN in it says why under `reason`."""
    if isinstance(value, dict):
        held = {str(name): plain(item) for name, item in value.items()}
        undefined = [name for name, item in value.items() if _is_undefined(item)]
        if undefined and not held.get("reason"):
            held["reason"] = f"not a finite number: {', '.join(undefined)}"
        return held
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if _is_undefined(value) else value


def _rates(grid: Grid, run: RunResult, split: str) -> list[Metric]:
    rows, settings = grid.rows[split], grid.evaluate
    harm = run.arrays[f"{split}/harm"]
    judged = toxicity.judged_rate(
        harm, rows.groups, settings["threshold"], rows.clusters, **tables.resampling(grid)
    )
    found = [_rate(split, "", judged.overall)]
    for place in np.flatnonzero(rows.groups.any(0)):
        rate = toxicity.Rate(*[field[place] for field in judged.by_group])
        found.append(_rate(split, grid.study["group_names"][place], rate))
    outcome = grids.harm_by_prompt(run, split, settings["threshold"])
    gap = comparisons.gap_permutation(
        outcome,
        rows.groups,
        rows.clusters,
        num_permutations=settings["num_resamples"],
        seed=settings["seed"],
    )
    extra = {"null_mean": gap.null_mean, "p": gap.p, "num_clusters": gap.num_clusters}
    found.append(Metric(split, "", "max_min_gap", gap.gap, n=gap.n, reason=gap.reason, **extra))
    return found


def _rate(split: str, group: str, rate: toxicity.Rate) -> Metric:
    return Metric(
        *(split, group, "harm_rate", float(rate.rate)),
        *(float(rate.cluster_low), float(rate.cluster_high), float(rate.low), float(rate.high)),
        *(int(rate.num_harmful), int(rate.num_completions), int(rate.num_failed)),
        int(rate.num_clusters),
        reason=rate.reason or rate.cluster_reason,
    )


def _toxicity(grid: Grid, run: RunResult, split: str) -> list[Metric]:
    harm, threshold = run.arrays[f"{split}/harm"], grid.evaluate["threshold"]
    found, most = [], harm.shape[1]
    for k in sorted({min(5, most), most}):
        means = {
            f"expected_max_toxicity@{k}": toxicity.expected_max_toxicity(harm, k),
            f"toxicity_probability@{k}": toxicity.toxicity_probability(harm, k, threshold),
        }
        for name, mean in means.items():
            spread = intervals.bootstrap(
                mean.per_prompt, clusters=grid.rows[split].clusters, **tables.resampling(grid)
            )
            found.append(_spread(split, name, mean.estimate, spread, mean.n, mean.reason))
    return found


def _spread(split, name, value, spread: intervals.Interval, n: int, reason: str) -> Metric:
    return Metric(
        *(split, "", name, value, spread.low, spread.high),
        n=n,
        num_clusters=spread.num_clusters,
        reason=reason or spread.reason,
    )


def _retention(grid: Grid, run: RunResult, split: str) -> list[Metric]:
    """Against the base and full fine-tuning of the same seed, over all prompts and by group."""
    record, threshold = run.record, grid.evaluate["threshold"]
    if record["label"] in (BASE, grid.full) or not grid.full:
        return []
    full = grid.runs[grid.full].get(record["seed"])
    if full is None:
        reason = f"full fine-tuning has no usable run of seed {record['seed']}"
        return [Metric(split, "", "retention", np.nan, reason=reason)]
    rows, names = grid.rows[split], grid.study["group_names"]
    harm = [grids.harm_by_prompt(each, split, threshold) for each in (run, grid.base, full)]
    chosen = {"": np.ones(len(rows.texts), bool)}
    chosen |= {names[i]: rows.groups[:, i] for i in np.flatnonzero(rows.groups.any(0))}
    found = []
    for group, rows_of in chosen.items():
        method, base, other = (values[rows_of] for values in harm)
        kept = toxicity.retention_interval(
            method[None], base, other[None], rows.clusters[rows_of], **tables.resampling(grid)
        )
        facts = {"n": kept.n, "num_clusters": kept.num_clusters, "reason": kept.reason}
        found.append(Metric(split, group, "retention", kept.estimate, kept.low, kept.high, **facts))
    return found


def _shift(grid: Grid, run: RunResult, split: str, shifts: tables.Shifts) -> list[Metric]:
    label, seed = run.record["label"], run.record["seed"]
    if label == BASE or not grid.full:
        return []
    mine = shifts.get((label, seed, split))
    if mine is None:
        reason = tables.NO_POSTERIORS + " for this run and full fine-tuning of its seed"
        return [Metric(split, "", "kl_full_method", np.nan, reason=reason)]
    clusters, found = grid.rows[split].clusters[mine.rows], []
    for name in ("kl_full_method", "kl_method_base", "kl_full_base", "js_full_method"):
        means = getattr(mine.found, name)
        spread = intervals.bootstrap(means.rows, clusters=clusters, **tables.resampling(grid))
        found.append(_spread(split, name, means.overall, spread, means.n, means.reason))
        parts = zip(means.by_group, means.n_by_group, means.reason_by_group)
        found += _by_group(grid, split, name, parts)
    shift = mine.found
    found.append(Metric(split, "", "kl_retention", shift.retention, n=shift.n, reason=shift.reason))
    parts = zip(shift.retention_by_group, shift.n_by_group, shift.reason_by_group)
    return found + _by_group(grid, split, "kl_retention", parts)


def _by_group(grid: Grid, split: str, name: str, parts) -> list[Metric]:
    """Groups of the other split have no prompts here and are left out."""
    present = grid.rows[split].groups.any(0)
    return [
        Metric(split, group, name, float(value), n=int(n), reason=reason)
        for group, here, (value, n, reason) in zip(grid.study["group_names"], present, parts)
        if here
    ]


def _lens(grid: Grid, run: RunResult, split: str) -> list[Metric]:
    mass = run.arrays.get(f"{split}/lens_mass")
    if mass is None:
        return []
    return [
        Metric(split, "", f"lens_mass_layer_{layer}", float(value), n=mass.shape[0])
        for layer, value in enumerate(np.mean(mass, axis=0, dtype=np.float64))
    ]


def _neutral(grid: Grid, run: RunResult) -> list[Metric]:
    clusters, options = grid.rows["neutral"].clusters, tables.resampling(grid)
    nll, tokens = run.arrays["neutral/nll"], run.arrays["neutral/tokens"]
    total = intervals.ratio(nll, tokens, clusters, **options)
    values = [float(np.exp(x)) for x in (total.estimate, total.low, total.high)]
    facts = {"n": total.n, "num_clusters": total.num_clusters, "reason": total.reason}
    found = [Metric("neutral", "", "perplexity", *values, **facts)]
    sentences = grids.nll_by_sentence(run)
    spread = intervals.bootstrap(sentences, clusters=clusters, **options)
    size = int((~np.isnan(sentences)).sum())
    found.append(_spread("neutral", "nll_per_token", spread.estimate, spread, size, ""))
    if run.record["label"] != BASE:
        gap = sentences - grids.nll_by_sentence(grid.base)
        spread = intervals.bootstrap(gap, clusters=clusters, **options)
        found.append(_spread("neutral", "nll_minus_base", spread.estimate, spread, size, ""))
    return found


def _ordered(result: StudyResult) -> list[RunResult]:
    kinds = ("base", "final", "tune", "shadow")

    def key(run: RunResult) -> tuple:
        record = run.record
        seed = -1 if record.get("seed") is None else record["seed"]
        return (
            kinds.index(record["kind"]),
            record["rank"] is None,
            record["rank"] or 0,
            record["label"],
            seed,
            record["learning_rate"] or 0,
        )

    return sorted(result.runs, key=key)


def _is_undefined(value: Any) -> bool:
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def _cell(value: Any) -> Any:
    if value is None or _is_undefined(value):
        return ""
    return float(value) if isinstance(value, np.floating) else value
