"""The report of a classification study: one HTML page, and its numbers as JSON lines and CSV."""

import math
from pathlib import Path
from typing import Any

from jax_lowrank.evaluation import subgroups
from jax_lowrank.report import claims as claiming
from jax_lowrank.report import drawing, metrics, page, tables
from jax_lowrank.report.claims import Claim
from jax_lowrank.report.classification import (
    answer,
    claims,
    effects,
    figures,
    membership,
    numbers,
    rocs,
    scores,
)
from jax_lowrank.report.classification.numbers import RATES, TITLES, Case
from jax_lowrank.report.metrics import Metric
from jax_lowrank.results import RunResult, StudyResult


def write(study_dir: Path, result: StudyResult) -> Path:
    """Write STUDY/report/{index.html, results.jsonl, results.csv, claims.json}; return index.html.

    As `report.page.write` does.
    """
    case = numbers.arrange(result)
    audit = membership.audit(case, result)
    found = claims.from_case(case, audit)
    by_run = {run.record["fingerprint"]: run_metrics(case, run) for run in result.runs}
    files = {
        "results.jsonl": metrics.jsonl(result, by_run),
        "results.csv": metrics.table_csv(result, by_run),
        "claims.json": page.claims_json(case.grid, found),
        "index.html": render(case, found, audit),
    }
    if audit:
        files["membership.csv"] = membership.table_csv(audit)
    return page.put(study_dir, files)


def render(case: Case, found: list[Claim], audit: membership.Audit | None = None) -> str:
    """The page as one HTML text."""
    from markupsafe import Markup

    grid = case.grid
    summary, apart = numbers.summary(case), numbers.distances(case)
    groups = {label: numbers.group_rows(case, label) for label in case.outputs}
    worth = {label: scores.of_groups(case, each) for label, each in case.outputs.items()}
    pairs = effects.at_best(case)
    matched = effects.matched(case)
    shown = [*pairs, *([matched] if matched else [])]
    gaps = numbers.gaps(case)
    return (
        page.environment()
        .get_template("classification.html")
        .render(
            study=grid.study,
            config=grid.study["config"],
            grid=grid,
            case=case,
            answer=answer.answer(case, summary, found, gaps),
            limits=answer.limits(case, found),
            topics=page.topics_of(found, claims.TOPICS),
            unit_names=("Test rows", "rows"),
            num_tests=sum(not math.isnan(claim.p) for claim in found),
            alpha=claiming.ALPHA,
            figures=figures.all_figures(case, summary, apart, groups, shown),
            markup=Markup,
            summary=summary,
            titles=TITLES,
            rates_shown=RATES,
            gaps_shown=(*RATES, numbers.ODDS),
            groups=groups,
            worth=worth,
            audit=audit,
            audit_figures=rocs.all_figures(case, audit) if audit else [],
            false_positive_rates=membership.RATES,
            score_titles=scores.TITLES,
            roles=figures.roles(case),
            gaps={label: [gap for gap in gaps if gap.label == label] for label in case.outputs},
            effects=[*shown, *effects.at_one_rate(case)],
            metrics=effects.METRICS,
            equivalent=lambda each: effects.equivalent(case, each),
            p_of=effects.p_of,
            training=[page.training(grid, label) for label in case.outputs],
            rates={each["label"]: each for each in tables.chosen_rates(grid)},
            environments=page.environments(grid),
            palette=drawing.NUM_RANK_COLORS,
        )
    )


def run_metrics(case: Case, run: RunResult) -> list[Metric]:
    """Rates by group and gaps of one run, with limits over rows; empty without outputs."""
    if "test/logits" not in run.arrays:
        return []
    predictions = run.arrays["test/logits"].argmax(1)
    found = subgroups.measure(
        case.labels,
        predictions,
        case.members,
        num_classes=len(case.grid.study["classes"]),
        positive=case.positive,
        num_permutations=min(case.settings["num_resamples"], 1000),
        **numbers.options(case),
    )
    rates, said = found.rates, []
    for name in rates.by_group._fields:
        said.append(
            Metric("test", "", name, float(getattr(rates.overall, name)[0]), n=case.labels.size)
        )
        parts = (getattr(part, name)[0] for part in (rates.by_group, found.low, found.high))
        support, reasons = getattr(rates.support, name)[0], getattr(rates.reason, name)[0]
        for group, value, low, high, n, reason in zip(case.names, *parts, support, reasons):
            ends = (float(value), float(low), float(high))
            said.append(Metric("test", group, name, *ends, n=int(n), reason=reason))
    for k, name in enumerate(found.gap_names):
        ends = (float(part[0, k]) for part in (found.gaps, found.gap_low, found.gap_high))
        extra: dict[str, Any] = {}
        if name in subgroups.NULL_OF:
            null = found.nulls[subgroups.NULL_OF[name]]
            extra = {"null_mean": float(null.null_mean[0]), "p": float(null.p[0])}
        reason = found.gap_reason[0, k]
        said.append(Metric("test", "", name, *ends, n=case.labels.size, reason=reason, **extra))
    return said + _of_probabilities(case, run)


def _of_probabilities(case: Case, run: RunResult) -> list[Metric]:
    """What a reported run's probabilities say, overall and by group: calibration errors, AUCs."""
    if run.record["kind"] not in ("final", "base") or run.record["label"] not in case.outputs:
        return []
    one = case.outputs[run.record["label"]].take([run.record["seed"]])
    errors, _ = numbers.calibrated(case, one.chance, one.event, case.everyone)
    return [
        Metric("test", group, name, *c[:3], n=c.n, null_mean=c.expected, reason=c.reason)
        for group, error, cells in zip(
            ("", *case.names), errors, scores.of_probabilities(case, one)
        )
        for name, c in {"ece": error, **cells}.items()
    ]
