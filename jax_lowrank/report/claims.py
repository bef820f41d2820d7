"""What the runs show, claim by claim: paired differences, adjusted p-values, verdicts.

The claims are those of arXiv 2405.18572 (low-rank fine-tuning keeps more of the base model's harm),
stated before the runs and tested in one family. A verdict speaks of this model and these data.
"""

from typing import Any, NamedTuple

import numpy as np

from jax_lowrank.evaluation import comparisons
from jax_lowrank.report import grid as grids
from jax_lowrank.report.grid import BASE, Grid
from jax_lowrank.results import StudyResult

ALPHA = 0.05
SUPPORTED, CONTRADICTED, CANNOT_TELL = "supported", "contradicted", "cannot tell"
RATE, NATS, SLOPE = "harm rate", "nats per token", "harm rate per doubling of rank"
TOPICS = {
    "tuned": "Low rank keeps more harm than full fine-tuning, on the tuned attribute",
    "rank": "Harm falls as the rank rises, on the tuned attribute",
    "transfer": "What reaches the attribute that was never tuned",
    "utility": "What it costs on neutral text",
}


class Claim(NamedTuple):
    """One tested claim.

    difference, low, high: the first named minus the second (or a slope), with the 't' interval of
    `comparisons.paired_difference`: it counts prompts, templates and seeds. expected: the sign that
    the statement claims. p: with two seeds or more p_new_seeds, the p-value of that interval; with
    one seed p_these_seeds, sign flips of whole templates. p_adjusted: Holm over all claims.
    verdict: `supported` when p_adjusted < 0.05 and the interval excludes 0 on the claimed side,
    `contradicted` when on the other side, otherwise `cannot tell`.
    """

    topic: str
    statement: str
    comparison: str
    split: str
    unit: str
    expected: int
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    p_these_seeds: float
    p_new_seeds: float
    num_prompts: int
    num_clusters: int
    num_seeds: int
    num_missing: int
    verdict: str
    reason: str
    note: str


def claims(result: StudyResult) -> list[Claim]:
    """Every claim the runs can speak to, in the order of the page; empty without a tuned run."""
    return from_grid(grids.arrange(result))


def from_grid(grid: Grid) -> list[Claim]:
    """As `claims`, from runs that are arranged already."""
    return judged([*_tuned(grid), *_rank(grid), *_transfer(grid), *_utility(grid)])


def judged(found: list[Claim]) -> list[Claim]:
    """The claims with p adjusted over all of them (Holm), and their verdicts."""
    adjusted = comparisons.holm([claim.p for claim in found])
    return [_judged(claim, float(p)) for claim, p in zip(found, adjusted)]


def as_text(result: StudyResult) -> str:
    """The claims as lines for a terminal."""
    return lines(claims(result), TOPICS)


def lines(found: list[Claim], topics: dict[str, str]) -> str:
    """Claims by topic, one a line."""
    said = []
    for topic, title in topics.items():
        chosen = [claim for claim in found if claim.topic == topic]
        said += [f"{title} ({units(chosen)})"] if chosen else []
        for claim in chosen:
            size = "undefined" if np.isnan(claim.difference) else f"{claim.difference:+.3f}"
            found_out = f"  {claim.verdict:<12} {claim.comparison:<32} {size} "
            if np.isnan(claim.low):
                said.append(found_out + f"no interval: {claim.reason or claim.note}")
            else:
                limits = f"[{claim.low:+.3f}, {claim.high:+.3f}]"
                said.append(found_out + f"{limits}  adjusted p {claim.p_adjusted:.2g}")
    return "\n".join(said) or "no fine-tuned runs to compare"


def units(chosen: list[Claim]) -> str:
    """What the differences of these claims are in."""
    return ", ".join(dict.fromkeys(claim.unit for claim in chosen))


def verdict(claim: Claim) -> str:
    """`supported`, `contradicted` or `cannot tell`, from the adjusted p and the interval."""
    if not claim.p_adjusted < ALPHA or not (claim.low > 0 or claim.high < 0):
        return CANNOT_TELL
    return SUPPORTED if np.sign(claim.low) == claim.expected else CONTRADICTED


def count_verdicts(chosen: list[Claim]) -> dict[str, int]:
    """How many of these claims have each verdict."""
    verdicts = [claim.verdict for claim in chosen]
    return {name: verdicts.count(name) for name in (SUPPORTED, CONTRADICTED, CANNOT_TELL)}


def _tuned(grid: Grid) -> list[Claim]:
    if not grid.full:
        return []
    name = grids.attribute(grid, "tuned")
    found = []
    for label in grid.lora:
        statement = f"{label} keeps more harm than full fine-tuning on {name}"
        found += _harm(grid, "tuned", statement, "tuned", label, grid.full, +1)
    return found


def _rank(grid: Grid) -> list[Claim]:
    """The slope of the harm rate against log2(rank); one claim a series with two ranks or more."""
    found, options = [], _options(grid)
    rows = grid.rows["tuned"]
    for name, pairs in grids.rank_series(grid).items():
        labels = [label for _, label in pairs]
        seeds = grids.common_seeds(grid, labels)
        if len(pairs) < 2 or not seeds:
            continue
        harm = [grids.stack(grid, label, seeds, _harm_of(grid, "tuned")) for label in labels]
        x = np.log2([rank for rank, _ in pairs])
        effect = comparisons.slope(np.stack(harm, axis=1), x, rows.clusters, **options)
        ranks = ", ".join(str(rank) for rank, _ in pairs)
        attribute = grids.attribute(grid, "tuned")
        statement = f"{name} keeps less harm on {attribute} the higher its rank"
        comparison = f"slope over ranks {ranks}"
        found.append(_claim("rank", statement, comparison, "tuned", SLOPE, -1, effect))
    return found


def _transfer(grid: Grid) -> list[Claim]:
    if not grid.full:
        return []
    name = grids.attribute(grid, "transfer")
    described = grids.described(grid, "transfer")
    statement = f"Full fine-tuning lowers harm on {described}"
    found = _harm(grid, "transfer", statement, "transfer", grid.full, BASE, -1)
    for label in grid.lora:
        statement = f"{label} keeps more harm than full fine-tuning on {name}"
        found += _harm(grid, "transfer", statement, "transfer", label, grid.full, +1)
    return found


def _utility(grid: Grid) -> list[Claim]:
    found = []
    for label in (*filter(None, [grid.full]), *grid.lora):
        statement = f"{_capital(label)} makes neutral text less likely than the base model does"
        found += _paired(
            grid, "utility", statement, "neutral", NATS, label, BASE, +1, grids.nll_by_sentence
        )
    for label in grid.lora if grid.full else ():
        statement = f"{label} costs less on neutral text than full fine-tuning does"
        found += _paired(
            grid, "utility", statement, "neutral", NATS, label, grid.full, -1, grids.nll_by_sentence
        )
    return found


def _harm(grid: Grid, topic, statement, split, label, other, expected) -> list[Claim]:
    values = _harm_of(grid, split)
    return _paired(grid, topic, statement, split, RATE, label, other, expected, values)


def _harm_of(grid: Grid, split: str):
    threshold = grid.evaluate["threshold"]
    return lambda run: grids.harm_by_prompt(run, split, threshold)


def _paired(grid, topic, statement, split, unit, label, other, expected, values) -> list[Claim]:
    seeds = grids.common_seeds(grid, (label, other))
    if not seeds:
        return []
    a, b = (grids.stack(grid, name, seeds, values) for name in (label, other))
    rows = grid.rows[split]
    effect = comparisons.paired_difference(a, b, rows.clusters, **_options(grid))
    comparison = f"{label} − {other}"
    return [_claim(topic, statement, comparison, split, unit, expected, effect)]


def _options(grid: Grid) -> dict[str, Any]:
    settings = grid.evaluate
    names = ("level", "num_resamples", "seed")
    return {name: settings[name] for name in names} | {"method": "t"}


def _claim(
    topic: str,
    statement: str,
    comparison: str,
    split: str,
    unit: str,
    expected: int,
    effect: comparisons.Difference,
) -> Claim:
    p = effect.p if np.isnan(effect.p_new_seeds) else effect.p_new_seeds
    return Claim(
        *(topic, statement, comparison, split, unit, expected),
        *(effect.estimate, effect.low, effect.high),
        *(p, np.nan, effect.p, effect.p_new_seeds),
        *(effect.n, effect.num_clusters, effect.num_seeds, effect.num_missing),
        *(CANNOT_TELL, effect.reason, effect.note),
    )


def _judged(claim: Claim, p_adjusted: float) -> Claim:
    claim = claim._replace(p_adjusted=p_adjusted)
    return claim._replace(verdict=verdict(claim))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
