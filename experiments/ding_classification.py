"""arXiv 2405.17512, first half: do subgroups fare worse under LoRA than under full fine-tuning?

    python experiments/ding_classification.py results/ding_* --out DIR

Reads finished classification studies, one a model and attribute (configs/ding_llama2.py,
configs/ding_mistral.py, configs/hate_speech.py or configs/ding_ranks.py), and writes DIR/tables.md:
every table of this part of the paper, and DIR/figures.html: every figure. No texts: logits, groups
and labels suffice.

| of the paper's scripts | here |
|---|---|
| accuracy, F1 and confusion by subgroup, over seeds | `accuracy_by_group`, report/results.csv |
| demographic parity and equalized odds | `gap_table`, beside their chance values |
| calibration by subgroup | `calibration_by_group`, `figures.reliability` |
| ranks, fractional ranks | `figures.by_rank`; beside attacks: ding_ranks.py |
| accuracy against subgroup size | `figures.by_size` |
| LoRA run whose F1 matches full fine-tuning | `difference_table`, "LoRA at ..."; `evaluate.match` |
| membership inference | `attack_table`, report/membership.csv, `Audit.figures` |
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from jax_lowrank import results
from jax_lowrank.report import page
from jax_lowrank.report.classification import (
    claims,
    effects,
    figures,
    membership,
    numbers,
    rocs,
)
from jax_lowrank.report.classification.numbers import GAPS, TITLES, Case

CHANCE = {  # gap -> the rate of `numbers.gaps` whose gap it is
    "demographic_parity_difference": "selection",
    "equalized_odds_difference": numbers.ODDS,
    "equal_opportunity_difference": "tpr",
}


def accuracy_by_group(case: Case) -> str:
    """Accuracy of every group and method, mean over seeds, with intervals."""
    return by_group(case, "accuracy")


def calibration_by_group(case: Case) -> str:
    """ECE of every group and method, with what perfect calibration would show."""
    return by_group(case, "ece")


def by_group(case: Case, metric: str) -> str:
    """A table of one metric: groups in rows, methods in columns."""
    found = {label: numbers.group_rows(case, label) for label in case.outputs}
    names = [f"{row.name} ({row.size})" for row in next(iter(found.values()))]
    rows = [
        [name, *(cell(found[label][place].cells[metric]) for label in found)]
        for place, name in enumerate(names)
    ]
    return table(["group (test rows)", *found], rows)


def gap_table(case: Case) -> str:
    """Gaps between groups, mean over seeds of each run's; what chance gives, and adjusted p."""
    summary = numbers.summary(case)
    chance = {(gap.label, gap.rate): gap for gap in numbers.gaps(case)}
    heads, rows = [TITLES[name] for name in ("accuracy", *GAPS)], []
    for label in case.outputs:
        levels = {name: estimate(summary[name][label]) for name in ("accuracy", *GAPS)}
        for name, rate in CHANCE.items():
            gap = chance[label, rate]
            levels[name] += f" (by chance {gap.found.null_mean:.3f}; {gap.p_adjusted:.3f})"
        rows.append([label, *levels.values()])
    return table(["method", *heads], rows)


def difference_table(case: Case) -> str:
    """Every method minus full fine-tuning: at its best, at equal utility, at one learning rate."""
    matched = effects.matched(case)
    pairs = [*effects.at_best(case), *([matched] if matched else []), *effects.at_one_rate(case)]
    rows = [
        [
            f"{pair.label} − {pair.other}{f' ({pair.note})' if pair.note else ''}",
            *(difference(pair.found[n]) for n in effects.METRICS),
        ]
        for pair in pairs
    ]
    return table(["comparison", *(TITLES[name] for name in effects.METRICS)], rows)


def attack_table(audit: membership.Audit) -> str:
    """Every attack on every method; the main one by group; LoRA minus full fine-tuning."""
    rates = [f"true positives at {100 * rate:g} % false" for rate in membership.RATES]
    rows = [
        [row.label, row.attack, *(cell(c) for c in (row.auc, *row.rates))] for row in audit.rows
    ]
    by_group = [
        [f"{group.name} ({group.members}, {group.others})", *map(cell, group.aucs.values())]
        for group in audit.groups
    ]
    apart = [f"{each.label} − {each.other}: {difference(each.found)}" for each in audit.distances]
    labels = [each.label for each in audit.methods]
    return (
        f"{audit.num_members} members, {audit.num_others} others;"
        f" {audit.methods[0].inside.shape[1]} shadows of each method.\n\n"
        f"{table(['method', 'attack', 'AUC', *rates], rows)}\n\n"
        f"AUC of {audit.main}, paired by row and seed: {'; '.join(apart)}.\n\n"
        f"{table([f'{audit.main}, group (members, others)', *labels], by_group)}"
    )


TABLES = {
    "Gaps between groups": gap_table,
    "Differences to full fine-tuning": difference_table,
    "Accuracy by group": accuracy_by_group,
    "Calibration error by group": calibration_by_group,
}


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def estimate(found) -> str:
    """0.123 [0.100, 0.150]."""
    limits = "" if math.isnan(found.low) else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.value:.3f}{limits}"


def difference(found) -> str:
    """+0.012 [-0.010, +0.031]."""
    if math.isnan(found.estimate):
        return f"undefined: {found.reason}"
    return f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def cell(found: numbers.Cell) -> str:
    """A group's number; why there is none; what chance alone gives."""
    if math.isnan(found.value):
        return f"too few: {found.reason}"
    expected = "" if found.expected is None else f" (by chance {found.expected:.3f})"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]{expected}"


def described(case: Case, result: results.StudyResult) -> str:
    """One study's section of tables.md."""
    study = case.grid.study
    head = (
        f"## {study['name']}\n\n{study['model']['family']},"
        f" {study['model']['num_parameters']:,} parameters; {case.labels.size} test rows,"
        f" seeds {', '.join(map(str, study['config']['seeds']))}; fingerprint"
        f" {study['fingerprint']}. Intervals: 95 %, over rows and seeds (calibration: rows).\n"
    )
    parts = [f"### {title}\n\n{make(case)}\n" for title, make in TABLES.items()]
    if audit := membership.audit(case, result):
        parts.append(f"### Membership inference\n\n{attack_table(audit)}\n")
    said = claims.as_text(result)
    return "\n".join([head, f"### Claims\n\n```\n{said}\n```\n", *parts])


def drawn(case: Case, result: results.StudyResult) -> list[figures.Figure]:
    """Every figure of one study."""
    groups = {label: numbers.group_rows(case, label) for label in case.outputs}
    pairs = effects.at_best(case)
    matched = effects.matched(case)
    pairs += [matched] if matched else []
    parts = (numbers.summary(case), numbers.distances(case), groups, pairs)
    audit = membership.audit(case, result)
    return [*figures.all_figures(case, *parts), *(rocs.all_figures(case, audit) if audit else [])]


def main() -> None:
    """Write tables.md and figures.html."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", type=Path, help="directories of finished studies")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sections, pages = [], []
    try:
        studies = [numbers.read(directory) for directory in arguments.studies]
    except results.ResultsError as error:
        parser.error(str(error))
    for result, case in studies:
        sections.append(described(case, result))
        pages.append((case.grid.study["name"], drawn(case, result)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tables.md").write_text("\n".join(sections), encoding="utf-8")
    (arguments.out / "figures.html").write_text(page.of_figures(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
