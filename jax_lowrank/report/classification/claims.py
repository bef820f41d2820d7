"""What the runs of a classification study show, claim by claim.

Stated before any run, in the direction of arXiv 2405.18572 (low rank serves groups worse than full
fine-tuning does); arXiv 2405.17512 found no consistent pattern. One family of tests.
"""

import math

from jax_lowrank.evaluation import comparisons
from jax_lowrank.report.claims import Claim, judged, lines
from jax_lowrank.report.classification import effects, membership
from jax_lowrank.report.classification.membership import Audit
from jax_lowrank.report.classification.numbers import TITLES, Case, arrange
from jax_lowrank.results import StudyResult

TOPICS = {
    "accuracy": "Low rank is less accurate than full fine-tuning",
    "worst_accuracy": "Low rank is less accurate on the worst-served group",
    "demographic_parity_difference": "Low rank has larger gaps in how often groups are flagged",
    "equalized_odds_difference": "Low rank has larger gaps in error rates",
    "ece": "Low rank is worse calibrated",
    "membership": "Low rank gives away more of which rows it was trained on",
    "matched": "Where LoRA does as well on validation rows as full fine-tuning",
}
WORSE = {name: -1 if "accuracy" in name else +1 for name in effects.METRICS}
SAYS = {
    "accuracy": "is less accurate than full fine-tuning",
    "worst_accuracy": "has a lower accuracy on its worst group than full fine-tuning",
    "demographic_parity_difference": "has a larger demographic parity difference",
    "equalized_odds_difference": "has a larger equalized odds difference",
    "ece": "has a larger calibration error",
}


def from_case(case: Case, audit: Audit | None = None) -> list[Claim]:
    """Every claim about LoRA against full fine-tuning, judged in one family."""
    best = {pair.label: pair for pair in effects.at_best(case)}
    found = [
        _claim(topic, best[label].found[topic], topic, label, case.grid.full)
        for topic in effects.METRICS
        for label in case.grid.lora
        if label in best
    ]
    found += [_leak(audit, each) for each in audit.distances] if audit else []
    pair = effects.matched(case)
    if pair:
        found += [
            _claim("matched", pair.found[name], name, "LoRA", pair.other)._replace(
                statement=f"LoRA {SAYS[name]} where their validation {case.utility} is matched",
                note=pair.note,
            )
            for name in effects.METRICS[1:]
        ]
    return judged(found)


def as_text(result: StudyResult) -> str:
    """The claims as lines for a terminal."""
    case = arrange(result)
    return lines(from_case(case, membership.audit(case, result)), TOPICS)


def _leak(audit: Audit, each: membership.Distance) -> Claim:
    """That a method's rows are told from others better than full fine-tuning's."""
    gap, seeds = each.found, len(each.seeds)
    rows = audit.num_members + audit.num_others
    return Claim(
        *("membership", f"{each.label} gives its training rows away more than full fine-tuning"),
        *(f"{each.label} − {each.other}", membership.POOL, f"AUC of {audit.main}", +1),
        *(gap.estimate, gap.low, gap.high, effects.p_of(gap), math.nan, gap.p, gap.p_new_seeds),
        *(rows, rows, seeds, 0),
        *("cannot tell", gap.reason, "" if seeds > 1 else "one seed"),
    )


def _claim(topic: str, effect: comparisons.Difference, metric: str, label: str, full: str) -> Claim:
    return Claim(
        *(topic, f"{label} {SAYS[metric]}", f"{label} − {full}", "test"),
        *(TITLES[metric].lower() if metric != "ece" else "ECE", WORSE[metric]),
        *(effect.estimate, effect.low, effect.high, effects.p_of(effect), math.nan),
        *(effect.p, effect.p_new_seeds),
        *(effect.n, effect.num_clusters, effect.num_seeds, effect.num_missing),
        *("cannot tell", effect.reason, effect.note if effect.num_seeds > 1 else "one seed"),
    )
