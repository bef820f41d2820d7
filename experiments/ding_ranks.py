"""arXiv 2405.17512's ranks: what they do to accuracy, gaps, calibration, and what is remembered.

    jax-lowrank study configs/ding_ranks.py
    python experiments/ding_ranks.py results/ding_ranks --out DIR

Reads finished classification studies and writes DIR/ranks.html, a figure a study with accuracy,
demographic parity difference, equalized odds difference, ECE and, where it was audited, the AUC of
LiRA against the rank, a line for each rule that alpha follows; and DIR/ranks.md, the numbers.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from jax_lowrank import results
from jax_lowrank.evaluation import membership as attacks
from jax_lowrank.report import grid as grids
from jax_lowrank.report import page
from jax_lowrank.report.classification import figures, membership, numbers
from jax_lowrank.report.classification.numbers import TITLES, Case
from jax_lowrank.report.figures import Figure
from jax_lowrank.report.tables import Estimate

AUC = "AUC of the membership attack"
METRICS = ("accuracy", "demographic_parity_difference", "equalized_odds_difference", "ece")
CAPTION = (
    "Rank on a log₂ axis; a rank below 1 is rank 1 in that share of the layers, rank 0 (head-only"
    " training) and full fine-tuning are levels. A line for each rule that alpha follows: methods"
    " that two rules give are on both. Bars are 95 % intervals over rows and seeds (calibration:"
    " over rows; the attack: over audited rows), small dots single seeds."
)


def measured(case: Case, result: results.StudyResult) -> dict[str, dict[str, Estimate]]:
    """Title -> label -> mean over seeds with limits, and each seed's."""
    summary = numbers.summary(case)
    found = {TITLES[name]: summary[name] for name in METRICS}
    return found | ({AUC: aucs} if (aucs := remembered(case, result)) else {})


def remembered(case: Case, result: results.StudyResult) -> dict[str, Estimate]:
    """Label -> AUC of LiRA (its main form in the protocol) of the audited methods."""
    audit, found = membership.audit(case, result), {}
    for each in audit.methods if audit else ():
        scores = membership.attacks(each, audit.protocol)[audit.main]
        settings = {name: case.settings[name] for name in ("level", "minimum")}
        tried = [attacks.attack(row, each.member, targets=(), **settings) for row in scores]
        values = np.array([(one.auc, one.low, one.high) for one in tried])
        facts = (each.member.size, each.member.size, tried[0].reason)
        found[each.label] = Estimate(*values.mean(0).tolist(), tuple(values[:, 0].tolist()), *facts)
    return found


def drawn(case: Case, found: dict[str, dict[str, Estimate]]) -> Figure:
    """A panel for each metric, against the rank."""
    panels = [figures.curve(case, title, values) for title, values in found.items()]
    return Figure("ranks", "By rank", CAPTION, panels, figures.curve_keys(case))


def table(case: Case, found: dict[str, dict[str, Estimate]]) -> str:
    """Markdown: a method a row, by rule and rank, with limits and the range of seeds."""
    rows = [["rule", "rank", *found], ["---"] * (2 + len(found))]
    places = [
        (rule, f"{rank:g}", label)
        for rule, pairs in grids.rank_series(case.grid).items()
        for rank, label in pairs
    ]
    others = [(label, "–", label) for label in case.outputs if label not in case.grid.lora]
    for rule, rank, label in places + others:
        rows.append([rule, rank, *(shown(values.get(label)) for values in found.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def shown(found: Estimate | None) -> str:
    """0.723 [0.700, 0.750], seeds 0.710 to 0.730."""
    if found is None or math.isnan(found.value):
        return "–" if found is None else f"undefined: {found.reason}"
    spread = f"seeds {min(found.per_seed):.3f} to {max(found.per_seed):.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}], {spread}"


def main() -> None:
    """Write ranks.md and ranks.html."""
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
        name, found = case.grid.study["name"], measured(case, result)
        sections.append(f"## {name}\n\n{table(case, found)}\n")
        pages.append((name, [drawn(case, found)]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ranks.md").write_text("\n".join(sections), encoding="utf-8")
    (arguments.out / "ranks.html").write_text(page.of_figures(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
