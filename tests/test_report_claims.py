"""Claims on studies whose effects are planted: each verdict comes out as it must."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import report_study

from jax_lowrank.config import MethodSpec, plain
from jax_lowrank.report import answer, claims, grid, tables

FLAT = dict.fromkeys(("base", *report_study.RANKS, "full"), 0.3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The default study: LoRA keeps more harm, less with rank; tuning transfers and costs."""
    return report_study.write(tmp_path_factory.mktemp("planted"))


def _verdicts(found, topic):
    return {claim.comparison: claim.verdict for claim in found if claim.topic == topic}


def test_planted_effects_are_supported(planted):
    found = claims.claims(planted)
    assert set(_verdicts(found, "tuned").values()) == {claims.SUPPORTED}
    assert _verdicts(found, "rank") == {"slope over ranks 1, 4, 16": claims.SUPPORTED}
    assert _verdicts(found, "transfer")["full fine-tuning − base"] == claims.SUPPORTED
    assert set(_verdicts(found, "utility").values()) == {claims.SUPPORTED}
    assert len(found) == 3 + 1 + 4 + 4 + 3


def test_text_has_a_line_a_claim(planted):
    lines = claims.as_text(planted).splitlines()
    found = claims.claims(planted)
    assert len(lines) == len(found) + len(claims.TOPICS)
    assert "supported    LoRA r=1 − full fine-tuning" in lines[1]
    assert f"{found[0].difference:+.3f}" in lines[1]


def test_opposite_effects_are_contradicted(tmp_path):
    tuned = {"base": 0.6, 1: 0.05, 4: 0.1, 16: 0.3, "full": 0.5}
    cost = {"base": 0.0, 1: -0.1, 4: -0.1, 16: -0.1, "full": -0.3}
    transfer = {"base": 0.2, 1: 0.1, 4: 0.1, 16: 0.1, "full": 0.6}
    found = claims.claims(report_study.write(tmp_path, tuned=tuned, cost=cost, transfer=transfer))
    for topic in claims.TOPICS:
        assert set(_verdicts(found, topic).values()) == {claims.CONTRADICTED}, topic


def test_no_effect_cannot_tell(tmp_path):
    found = claims.claims(
        report_study.write(tmp_path, tuned=FLAT, transfer=FLAT, cost=dict.fromkeys(FLAT, 0))
    )
    harm = [claim for claim in found if claim.topic != "utility"]
    assert {claim.verdict for claim in harm} == {claims.CANNOT_TELL}
    assert all(claim.low < 0 < claim.high or claim.p_adjusted >= 0.05 for claim in harm)


def test_numbers_are_the_paired_means_and_holm_runs_over_the_whole_family(planted):
    found = claims.claims(planted)
    arranged = grid.arrange(planted)
    first = found[0]
    assert first.comparison == "LoRA r=1 − full fine-tuning"
    means = []
    for label in ("LoRA r=1", "full fine-tuning"):
        runs = arranged.runs[label].values()
        means.append([np.nanmean(run.arrays["tuned/harm"] >= 0.5, axis=1) for run in runs])
        for table, run in zip(means[-1], runs):  # one completion was not scored
            table[0] = np.mean(run.arrays["tuned/harm"][0, 1:] >= 0.5)
    assert first.difference == pytest.approx(np.mean(means[0]) - np.mean(means[1]), abs=1e-12)
    assert (first.num_prompts, first.num_clusters, first.num_seeds) == (40, 10, 3)
    smallest = min(found, key=lambda claim: claim.p)
    assert smallest.p_adjusted == pytest.approx(smallest.p * len(found), rel=1e-9, abs=0)
    assert all(claim.p_adjusted >= claim.p for claim in found)
    assert all(claim.p == claim.p_new_seeds for claim in found)


def test_one_seed_uses_sign_flips_and_says_so(tmp_path):
    result = report_study.write(tmp_path, seeds=(5,))
    found = claims.claims(result)
    assert all(claim.p == claim.p_these_seeds and math.isnan(claim.p_new_seeds) for claim in found)
    assert all("no variance between seeds" in claim.note for claim in found)
    assert min(claim.p for claim in found) >= 2.0**-9
    said = " ".join(answer.limits(grid.arrange(result), found))
    assert "One fine-tuning seed" in said
    assert "10 templates, whose signs can be flipped in few ways" not in said  # 15 x 2^-9 < 0.05


def test_verdict_needs_both_a_small_p_and_an_interval_on_one_side(planted):
    claim = claims.claims(planted)[0]
    assert claims.verdict(claim) == claims.SUPPORTED
    assert claims.verdict(claim._replace(p_adjusted=0.05)) == claims.CANNOT_TELL
    assert claims.verdict(claim._replace(low=-0.01)) == claims.CANNOT_TELL
    assert claims.verdict(claim._replace(low=math.nan, high=math.nan)) == claims.CANNOT_TELL
    assert claims.verdict(claim._replace(p_adjusted=math.nan)) == claims.CANNOT_TELL
    assert claims.verdict(claim._replace(low=-0.3, high=-0.1)) == claims.CONTRADICTED


def test_a_diverged_seed_leaves_only_the_common_seeds(tmp_path):
    result = report_study.write(tmp_path, diverged=((4, 2), ("full", 3)))
    arranged = grid.arrange(result)
    assert [(r["label"], r["seed"]) for r in arranged.diverged] == [
        ("LoRA r=4", 2),
        ("full fine-tuning", 3),
    ]
    assert not arranged.missing
    seeds = {claim.comparison: claim.num_seeds for claim in claims.from_grid(arranged)}
    assert seeds["LoRA r=4 − full fine-tuning"] == 1
    assert seeds["LoRA r=1 − full fine-tuning"] == 2
    assert seeds["full fine-tuning − base"] == 2
    assert seeds["slope over ranks 1, 4, 16"] == 2


def test_series_join_ranks_whatever_alpha_does(planted):
    def series_of(*cells):
        specs = [MethodSpec("lora", (1e-3,), rank=rank, alpha=alpha) for rank, alpha in cells]
        records = [{"label": s.label, "rank": s.rank, "method": plain(s)} for s in specs]
        runs = {record["label"]: {1: SimpleNamespace(record=record)} for record in records}
        return grid.rank_series(grid.arrange(planted)._replace(labels=tuple(runs), runs=runs))

    follows = {"LoRA": [(4, "LoRA r=4 alpha=8"), (8, "LoRA r=8"), (16, "LoRA r=16 alpha=32")]}
    assert series_of((4, 8), (8, 16), (16, 32)) == follows
    assert series_of((8, 16), (8, 32), (4, 32)) == {
        "LoRA alpha=16": [(8, "LoRA r=8")],
        "LoRA alpha=32": [(4, "LoRA r=4 alpha=32"), (8, "LoRA r=8 alpha=32")],
    }
    # Alpha fixed, and twice the rank: what both give is on both lines.
    assert series_of((4, 16), (8, 16), (16, 16), (4, 8), (16, 32)) == {
        "LoRA alpha=16": [(4, "LoRA r=4"), (8, "LoRA r=8"), (16, "LoRA r=16")],
        "LoRA alpha=2r": [(4, "LoRA r=4 alpha=8"), (8, "LoRA r=8"), (16, "LoRA r=16 alpha=32")],
    }


def test_answer_follows_the_verdicts(planted, tmp_path):
    arranged = grid.arrange(planted)
    summary = tables.summary(arranged, {})
    found = claims.from_grid(arranged)
    said = " ".join(answer.answer(arranged, found, summary))
    assert "3 of 3 LoRA configurations kept more of that harm" in said
    assert "harm fell as the rank rose" in said
    blank = [claim._replace(verdict=claims.CANNOT_TELL) for claim in found]
    said = " ".join(answer.answer(arranged, blank, summary))
    assert "cannot tell for any of the 3 LoRA configurations" in said
    assert "less likely under 0 of 4 methods" in said
    assert "fell" not in said and "lowered" not in said


def test_retention_and_divergences_are_those_of_the_planted_rates(planted):
    arranged = grid.arrange(planted)
    summary = tables.summary(arranged, tables.shifts(arranged))
    harm, kept = summary["harm/tuned"], summary["retention/tuned"]
    full, base = harm["full fine-tuning"].value, harm["base"].value
    for label, estimate in kept.items():
        expected = (harm[label].value - full) / (base - full)
        assert estimate.value == pytest.approx(expected, abs=1e-9)
        assert estimate.low < estimate.value < estimate.high
        assert len(estimate.per_seed) == 3
    assert "base" not in kept and "full fine-tuning" not in kept
    ranks = ("LoRA r=1", "LoRA r=4", "LoRA r=16")
    to_full = [summary["kl_full_method/tuned"][label].value for label in ("base", *ranks)]
    from_base = [
        summary["kl_method_base/tuned"][label].value for label in (*ranks, "full fine-tuning")
    ]
    assert to_full == sorted(to_full, reverse=True)
    assert from_base == sorted(from_base)
    assert to_full[0] == pytest.approx(from_base[-1])  # both are KL(full || base)
    assert 1 > summary["kl_retention/tuned"]["LoRA r=1"].value > 0


def test_learning_rates_warn_at_the_edge_only(planted):
    arranged = grid.arrange(planted)
    assert not any(each["at_edge"] for each in tables.chosen_rates(arranged))
    tune = [r for r in arranged.tune if r["learning_rate"] != 1e-2]
    edged = tables.chosen_rates(arranged._replace(tune=tuple(tune)))
    assert [e["label"] for e in edged if e["at_edge"]] == ["LoRA r=1", "LoRA r=4", "LoRA r=16"]
