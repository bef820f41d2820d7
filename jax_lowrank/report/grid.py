"""A study's runs arranged by method and seed, and the arrays that comparisons need.

Prompts are the last axis and seeds the first, as in `evaluation`. Two methods are compared over the
seeds that both of them finished.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jax_lowrank.results import ResultsError, Rows, RunResult, StudyResult

SPLITS = ("tuned", "transfer")
BASE = "base"


class Grid(NamedTuple):
    """The reported runs of a study; `diverged` ones stopped early and are listed, not averaged.

    labels: LoRA methods by series and rank, then the others by name; only those with a usable run.
    runs: label -> seed -> run, `base` under seed -1. missing: (label, seed) the configuration asks
    for and the results do not hold.
    """

    study: dict
    rows: dict[str, Rows]
    labels: tuple[str, ...]
    runs: dict[str, dict[int, RunResult]]
    diverged: tuple[dict, ...]
    tune: tuple[dict, ...]
    missing: tuple[tuple[str, int], ...]

    @property
    def base(self) -> RunResult:
        """The run of the base model."""
        return self.runs[BASE][-1]

    @property
    def full(self) -> str:
        """Label of full fine-tuning, '' when the study has none."""
        return next(
            (name for name in self.labels if self.record(name)["method"]["name"] == "full"), ""
        )

    @property
    def lora(self) -> tuple[str, ...]:
        """Labels of the LoRA methods."""
        return tuple(n for n in self.labels if self.record(n)["method"]["name"] == "lora")

    @property
    def evaluate(self) -> dict:
        """The evaluation settings: threshold, level, num_resamples, seed, ..."""
        return self.study["config"]["evaluate"]

    def record(self, label: str) -> dict:
        """The record of a method's first seed."""
        return next(iter(self.runs[label].values())).record


def arrange(result: StudyResult) -> Grid:
    """Sort the runs into a Grid.

    Raises ResultsError when the base model was not evaluated, or when two runs are the same cell.
    """
    _check_unique(result)
    runs, diverged, tune = {}, [], []
    for run in result.runs:
        record = run.record
        if record["kind"] == "shadow":
            continue
        if record["kind"] == "tune":
            tune.append(record)
        elif record["kind"] == "base":
            runs[BASE] = {-1: run}
        elif record["diverged"]:
            diverged.append(record)
        else:
            runs.setdefault(record["label"], {})[record["seed"]] = run
    if BASE not in runs or not runs[BASE][-1].arrays:
        raise ResultsError(
            f"study {result.study['name']} has no finished run of its base model; run the study"
            " again, finished runs are skipped"
        )
    runs = {label: dict(sorted(seeds.items())) for label, seeds in runs.items()}
    labels = sorted((name for name in runs if name != BASE), key=lambda name: _order(name, runs))
    wanted = {record["label"] for record in (*diverged, *tune)} | set(labels)
    done = {(record["label"], record["seed"]) for record in diverged}
    missing = [
        (label, seed)
        for label in sorted(wanted)
        for seed in result.study["config"]["seeds"]
        if seed not in runs.get(label, {}) and (label, seed) not in done
    ]
    order = {"key": lambda record: (record["label"], record["seed"], record["learning_rate"])}
    return Grid(
        result.study,
        result.rows,
        tuple(labels),
        runs,
        tuple(sorted(diverged, **order)),
        tuple(sorted(tune, **order)),
        tuple(missing),
    )


def series(record: dict) -> str:
    """The LoRA configuration apart from rank, alpha (which often follows it), share of layers."""
    method, name = record["method"], record["label"].replace(f" r={record['rank']}", "", 1)
    share = f"{method['layers']} {method['layer_fraction']:g} of layers"
    name = name.replace(f" alpha={method['alpha']:g}", "", 1)
    return name.replace(share, f"{method['layers']} layers", 1)


def size(record: dict) -> float:
    """The rank times the share of layers that have it: 0.25 is rank 1 in a quarter of them."""
    rank = record["rank"] * record["method"]["layer_fraction"]
    return int(rank) if rank == int(rank) else rank


def rank_series(grid: Grid) -> dict[str, list[tuple[float, str]]]:
    """series -> its (size, label), by size: what one line of a figure joins.

    Where a rank occurs with several alphas, each rule for alpha is a series of its own.
    """
    found: dict[str, dict[str, float]] = {}
    for label in grid.lora:
        record = grid.record(label)
        found.setdefault(series(record), {})[label] = size(record)
    lines = {}
    for name, sizes in found.items():
        rules = {"": list(sizes)}
        if len(set(sizes.values())) < len(sizes):
            rules = _alpha_rules({label: grid.record(label) for label in sizes})
        for rule, labels in rules.items():
            lines[name + rule] = sorted((sizes[label], label) for label in labels)
    return lines


def _alpha_rules(records: dict[str, dict]) -> dict[str, list[str]]:
    """Rule -> labels: alpha fixed, or so many times the rank; few rules that cover all labels.

    A method that two rules give is in both.
    """
    fixed, following = {}, {}
    for label, record in records.items():
        alpha = record["method"]["alpha"]
        fixed.setdefault(f" alpha={alpha:g}", []).append(label)
        following.setdefault(f" alpha={alpha / record['rank']:g}r", []).append(label)
    rules, kept, left = fixed | following, {}, set(records)
    while left:
        rule = max(rules, key=lambda name: len(left.intersection(rules[name])))
        kept[rule] = rules[rule]
        left -= set(rules[rule])
    return kept


def common_seeds(grid: Grid, labels: Sequence[str]) -> tuple[int, ...]:
    """Seeds that every one of `labels` finished; the base has no seed and takes no part."""
    sets = [set(grid.runs[label]) for label in labels if label != BASE]
    return tuple(sorted(set.intersection(*sets))) if sets else (-1,)


def stack(grid: Grid, label: str, seeds: Sequence[int], values) -> np.ndarray:
    """values(run) -> (N,) of a method's runs: (S, N) in the order of `seeds`; base (1, N)."""
    runs = grid.runs[label]
    return np.stack([values(runs[seed]) for seed in (tuple(runs) if label == BASE else seeds)])


def harm_by_prompt(run: RunResult, split: str, threshold: float) -> np.ndarray:
    """Share of a prompt's scored completions with harm >= threshold (P,); NaN without any."""
    harm = np.asarray(run.arrays[f"{split}/harm"], np.float64)
    scored = ~np.isnan(harm)
    hits = np.sum(scored & (harm >= threshold), axis=1)
    counts = scored.sum(1)
    return np.divide(hits, counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def nll_by_sentence(run: RunResult) -> np.ndarray:
    """Negative log-likelihood per token of each neutral sentence (N,), nats; NaN without tokens."""
    nll = np.asarray(run.arrays["neutral/nll"], np.float64)
    tokens = np.asarray(run.arrays["neutral/tokens"], np.float64)
    return np.divide(nll, tokens, out=np.full(nll.shape, np.nan), where=tokens > 0)


def extremes(grid: Grid) -> tuple[str, ...]:
    """Base, lowest rank, highest rank, full fine-tuning, without repeats: shown side by side."""
    by_rank = sorted(grid.lora, key=lambda label: grid.record(label)["rank"])
    shown = [BASE, *by_rank[:1], *by_rank[-1:], *filter(None, [grid.full])]
    return tuple(dict.fromkeys(shown))


def attribute(grid: Grid, split: str) -> str:
    """What a sentence calls the attribute of a split: 'people', or 'the tuned attribute'."""
    name = grid.study[f"{split}_name"]
    return f"the {name}" if "tuned" in name else name


def described(grid: Grid, split: str) -> str:
    """The attribute with its role: 'people (tuned)'; a name that says its role stays as it is."""
    name = attribute(grid, split)
    role = "tuned" if split == "tuned" else "never tuned"
    return name if "tuned" in name else f"{name} ({role})"


def _check_unique(result: StudyResult) -> None:
    """Two runs of one cell come from different code or settings: averaging them would mix those."""
    seen = {}
    for run in result.runs:
        record = run.record
        rate = record["learning_rate"] if record["kind"] == "tune" else None
        cell = (record["kind"], record["label"], record["seed"], rate)
        if cell in seen:
            raise ResultsError(
                f"{record['label']}, seed {record['seed']} ({record['kind']}) is there twice:"
                f" {seen[cell]} and {record['fingerprint']}. They were made by different code or"
                " settings; `jax-lowrank study CONFIG` reports the ones that belong together"
            )
        seen[cell] = record["fingerprint"]


def _order(label: str, runs: dict) -> tuple:
    record = next(iter(runs[label].values())).record
    if record["rank"] is None:
        return (1, label, 0)
    return (0, series(record), record["rank"])
