"""The plain words of a classification page: the answer in front, the limits at the end."""

import numpy as np

from jax_lowrank.report.answer import edges, seeds_said
from jax_lowrank.report.claims import CANNOT_TELL, CONTRADICTED, SUPPORTED, Claim, count_verdicts
from jax_lowrank.report.classification import effects
from jax_lowrank.report.classification.numbers import HEAD, TITLES, Case, Gap
from jax_lowrank.report.grid import BASE
from jax_lowrank.report.tables import Estimate

ONE_ANSWER = 0.95  # share of one answer from which a method hardly tells rows apart
WORDS = {
    "accuracy": ("accuracy", "lower", "higher"),
    "worst_accuracy": ("accuracy on the worst group", "lower", "higher"),
    "demographic_parity_difference": ("demographic parity difference", "larger", "smaller"),
    "equalized_odds_difference": ("equalized odds difference", "larger", "smaller"),
    "ece": ("calibration error", "larger", "smaller"),
    "membership": ("success of telling its training rows", "larger", "smaller"),
    "matched": ("gaps and calibration where matched on validation rows", "worse", "better"),
}


def answer(
    case: Case, summary: dict[str, dict[str, Estimate]], found: list[Claim], gaps: list[Gap]
) -> list[str]:
    """A few sentences that say no more than the claims' verdicts do."""
    if not case.outputs:
        return ["No run of a method has finished."]
    said = [_levels(case, summary)]
    if found:
        said.append("LoRA against full fine-tuning on the same rows and seeds: " + _tallies(found))
    said += _where_matched(case, found)
    said += _one_answer(case)
    said += _by_chance(case, gaps)
    return said


def limits(case: Case, found: list[Claim]) -> list[str]:
    """What a reader must not conclude from this page."""
    grid, model = case.grid, case.grid.study["model"]
    few = [name for name, enough in zip(case.names, case.enough) if not enough]
    said = [
        f"One base model ({model['family']}, {model['num_parameters']:,} parameters), one data set,"
        " one split: another can come out differently. The intervals cover other rows of this kind"
        " and, as far as a few can show it, other seeds; not other annotators or other data.",
        "Groups are the communities that annotators say a post targets, not its authors. Labels are"
        " annotators' majorities: an error may be theirs.",
        "A largest-minus-smallest gap is above 0 by chance alone, the more the smaller the groups:"
        " read it beside its mean under permuted membership.",
        seeds_said(len(grid.study["config"]["seeds"])),
    ]
    if few:
        said.append(
            f"Left out of gaps and of the worst group for having fewer than"
            f" {case.settings['minimum']} test rows: {', '.join(few)}. Nothing is known of them."
        )
    said.append(
        "Learning rates were chosen by validation loss with one seed, steps (and so epochs) by the"
        " same loss within every run. Equal learning rates say little by themselves: LoRA wants"
        " larger ones."
    )
    said.append(
        "`base` answers by words without any training. It has no seed: the same answers stand"
        " beside every seed of another method, whose seeds alone vary in their difference."
        if BASE in case.outputs
        else "`base` is the model under an untrained head and is left out here; `results.csv` has"
        " it."
    )
    said += edges(grid)
    said.append(
        "“Cannot tell” is not “no difference”: the interval says how large a difference the runs"
        f" leave open, and the equivalence test whether it is within ±{case.settings['margin']:g}."
    )
    return said


def _levels(case: Case, summary: dict[str, dict[str, Estimate]]) -> str:
    study, accuracy, worst = case.grid.study, summary["accuracy"], summary["worst_accuracy"]
    majority = int(np.argmax(study["splits"]["train"]["by_class"]))
    share = float((case.labels == majority).mean())
    by_rank = sorted(case.grid.lora, key=lambda label: case.grid.record(label)["rank"])
    shown = [case.grid.full, *dict.fromkeys((*by_rank[:1], *by_rank[-1:])), HEAD, BASE]
    parts = [
        f"{label} {_percent(accuracy[label].value)} (worst group {_percent(worst[label].value)})"
        for label in shown
        if label in accuracy
    ]
    return (
        f"Of {case.labels.size:,} test rows these were right on: {', '.join(parts)}; always saying"
        f" “{study['classes'][majority]}” on {_percent(share)}."
    )


def _one_answer(case: Case) -> list[str]:
    """Methods whose gaps are small because they give nearly every row the same class."""
    said, classes = [], case.grid.study["classes"]
    for label, each in case.outputs.items():
        shares = [float((each.predictions == k).mean()) for k in range(len(classes))]
        most = int(np.argmax(shares))
        if shares[most] >= ONE_ANSWER:
            said.append(
                f"{label} says “{classes[most]}” of {_percent(shares[most])} of the rows. Whoever"
                " hardly tells rows apart has small gaps and is right on groups with that label:"
                " its gaps and worst group say nothing of how it would serve groups."
            )
    return said


def _tallies(found: list[Claim]) -> str:
    parts = []
    for topic, (what, worse, better) in WORDS.items():
        chosen = [claim for claim in found if claim.topic == topic]
        if not chosen:
            continue
        if all(np.isnan(claim.difference) for claim in chosen):
            parts.append(f"{what}: not compared ({chosen[0].reason})")
            continue
        counts, total = count_verdicts(chosen), len(chosen)
        if counts[CANNOT_TELL] == total:
            parts.append(f"{what}: the runs cannot tell ({total} of {total})")
            continue
        said = [f"{worse} in {counts[SUPPORTED]}"] if counts[SUPPORTED] else []
        said += [f"{better} in {counts[CONTRADICTED]}"] if counts[CONTRADICTED] else []
        said += [f"cannot tell in {counts[CANNOT_TELL]}"] if counts[CANNOT_TELL] else []
        parts.append(f"{what}: {', '.join(said)} of {total}")
    return "; ".join(parts) + "."


def _where_matched(case: Case, found: list[Claim]) -> list[str]:
    """Of gaps told at the methods' best, whether they are seen once utility is matched."""
    matched, said = {claim.unit: claim for claim in found if claim.topic == "matched"}, []
    for topic in effects.METRICS[1:]:
        chosen = [claim for claim in found if claim.topic == topic and claim.unit in matched]
        for verdict in (SUPPORTED, CONTRADICTED):
            told = [claim for claim in chosen if claim.verdict == verdict]
            if told:
                labels = ", ".join(claim.comparison.split(" − ")[0] for claim in told)
                have = "has, at its best," if len(told) == 1 else "have, at their best,"
                head = f"{labels} {have} a {_worded(topic, verdict)} than full fine-tuning"
                said.append(f"{head}. {_once_matched(case, verdict, matched[told[0].unit])}")
        then = matched[chosen[0].unit].verdict if chosen else CANNOT_TELL
        if then not in (CANNOT_TELL, *(claim.verdict for claim in chosen)):
            said.append(
                f"No method has, at its best, a {_worded(topic, then)} than full fine-tuning that"
                f" these runs can tell; once validation {case.utility} is matched LoRA has one"
                f" ({_limits(matched[chosen[0].unit])})."
            )
    return said


def _worded(topic: str, verdict: str) -> str:
    what, worse, better = WORDS[topic]
    return f"{worse if verdict == SUPPORTED else better} {what}"


def _once_matched(case: Case, verdict: str, then: Claim) -> str:
    """What becomes of a difference with this verdict; no more than the interval says."""
    matched = f"Once validation {case.utility} is matched (LoRA of any rank"
    if np.isnan(then.difference):
        return f"Whether it goes with utility is not known: {then.reason}."
    matched += f", {_limits(then)})"
    if then.verdict == verdict:
        return f"{matched} it is still seen."
    if then.verdict != CANNOT_TELL:
        return f"{matched} it is the other way around."
    margin = case.settings["margin"]
    if -margin < then.low and then.high < margin:
        return f"{matched} it is not seen: what the interval leaves open is within ±{margin:g}."
    return f"{matched} it is not seen; the interval says how much of it may be left."


def _limits(claim: Claim) -> str:
    text = f"{claim.difference:+.3f} [{claim.low:+.3f}, {claim.high:+.3f}]"
    return text.replace("-", "−")


def _by_chance(case: Case, gaps: list[Gap]) -> list[str]:
    chosen = [gap for gap in gaps if gap.label == case.grid.full and not np.isnan(gap.found.p)]
    if not chosen:
        return []
    parts = [
        f"{TITLES[gap.rate].lower()} {gap.found.gap:.2f} (by chance {gap.found.null_mean:.2f})"
        for gap in chosen
    ]
    return [f"Largest gaps between groups under full fine-tuning: {', '.join(parts)}."]


def _percent(rate: float) -> str:
    return "an unknown share" if rate != rate else f"{100 * rate:.1f} %"
