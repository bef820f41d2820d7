"""arXiv 2405.18572, accuracy disparity: does low rank err more where little could be learnt?

    python experiments/das_disparity.py results/STUDY... --out FILE.md

Reads finished classification studies: one with the data as they are, others with a class or group
made rare in the training rows, such as

    jax-lowrank study configs/hate_speech.py:imbalanced

and writes for each the error of every class and group by method, the disparity
D = max_a err_a − min_a err_a over classes and over groups with its value by chance, and how LoRA's
differ from those of full fine-tuning. What the paper imposed, on which data, is not known to us:
a protocol inspired by it, not a replication.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from jax_lowrank import results
from jax_lowrank.evaluation import comparisons, subgroups
from jax_lowrank.report.classification import numbers
from jax_lowrank.report.classification.numbers import Case


def with_classes_as_groups(case: Case) -> Case:
    """The same rows, where a row's group is its class."""
    classes = case.grid.study["classes"]
    members = case.labels[:, None] == np.arange(len(classes))
    return case._replace(names=tuple(classes), members=members)


def errors(case: Case) -> list[list[str]]:
    """Per group: rows, and the error of every method with limits over rows and seeds."""
    found = {label: numbers.group_rows(case, label)[1:] for label in case.outputs}
    lines = []
    for place, row in enumerate(next(iter(found.values()))):
        cells = [found[label][place].cells["accuracy"] for label in found]
        lines.append([f"{row.name} ({row.size})", *map(error_of, cells)])
    return lines


def error_of(cell: numbers.Cell) -> str:
    """1 - accuracy [limits], or why there is none."""
    if math.isnan(cell.value):
        return f"too few: {cell.reason}"
    return f"{1 - cell.value:.3f} [{1 - cell.high:.3f}, {1 - cell.low:.3f}]"


def disparities(case: Case) -> list[list[str]]:
    """Per method: D, its mean by chance and p; and D minus that of full fine-tuning."""
    lines, full = [], case.outputs.get(case.grid.full)
    for label, each in case.outputs.items():
        right = each.predictions == case.labels
        gap = comparisons.gap_permutation(right, case.members[:, case.enough], seed=0)
        line = [label, f"{gap.gap:.3f}", f"{gap.null_mean:.3f}", f"{gap.p:.3f}"]
        lines.append([*line, difference(case, each, full) if label != case.grid.full else "–"])
    return lines


def difference(case: Case, each: numbers.Outputs, full: numbers.Outputs | None) -> str:
    """D of a method minus D of full fine-tuning, mean over common seeds, paired."""
    seeds = [seed for seed in (full.seeds if full else ()) if each.has(seed)]
    if not seeds:
        return "no full fine-tuning under these seeds"
    found = subgroups.compare(
        case.labels,
        each.take(seeds).predictions,
        full.take(seeds).predictions,
        case.members,
        num_classes=len(case.grid.study["classes"]),
        **numbers.options(case),
    )
    k = found.names.index("accuracy_difference")
    p = found.p_new_seeds[k] if len(seeds) > 1 else found.p[k]
    return f"{found.estimate[k]:+.3f} [{found.low[k]:+.3f}, {found.high[k]:+.3f}], p {p:.3f}"


def section(case: Case) -> str:
    """One study: training counts, errors and disparities by class and by group."""
    study = case.grid.study
    train = study["splits"]["train"]
    counts = dict(zip(study["classes"], train["by_class"]))
    counts |= dict(zip(study["group_names"], train["by_group"]))
    said = ", ".join(f"{name} {number}" for name, number in counts.items())
    parts = [f"## {study['name']}\n\nTraining rows: {said}.\n"]
    for title, each in (("classes", with_classes_as_groups(case)), ("groups", case)):
        heads = [f"{title[:-1]} (test rows)", *(f"error, {label}" for label in each.outputs)]
        parts.append(f"### Errors by {title}\n\n{table(heads, errors(each))}\n")
        heads = ["method", "D", "D by chance", "p", "D minus full fine-tuning's"]
        parts.append(f"### Disparity over {title}\n\n{table(heads, disparities(each))}\n")
    return "\n".join(parts)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(r) + " |" for r in (heads, ["---"] * len(heads), *rows))


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", type=Path, help="directories of finished studies")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        studies = [numbers.read(directory) for directory in arguments.studies]
    except results.ResultsError as error:
        parser.error(str(error))
    sections = [section(case) for _, case in studies]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
