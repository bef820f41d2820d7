"""The audit in the report of a classification study: attacks on runs whose memory is known."""

import csv
import math

import numpy as np
import pytest
import report_classification
from scipy.special import ndtr
from test_report_page import _read

from jax_lowrank.report.classification import claims, membership, numbers, page

MEMORY = {4: 0.0, "full": 1.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(directory, results): rank 4 remembers nothing, full fine-tuning does; both are audited."""
    directory = tmp_path_factory.mktemp("audit")
    return directory, report_classification.write(directory, memory=MEMORY, seeds=(1, 2))


@pytest.fixture(scope="module")
def audit(study):
    return membership.audit(numbers.arrange(study[1]), study[1])


def test_what_remembers_is_found_and_what_does_not_is_not(audit):
    assert [each.label for each in audit.methods] == ["LoRA r=4", "full fine-tuning"]
    assert (audit.num_members, audit.num_others, audit.main) == (200, 200, "LiRA online")
    found = {(row.label, row.attack): row for row in audit.rows}
    attacks = (
        "loss threshold",
        "LiRA online",
        "LiRA offline, tail",
        "LiRA offline, density",
        "RMIA",
    )
    assert [name for label, name in found if label == "LoRA r=4"] == list(attacks)
    for name in attacks[:3]:
        none, much = found["LoRA r=4", name].auc, found["full fine-tuning", name].auc
        assert none.low < 0.5 < none.high
        assert much.low > 0.5
    # Margins of members lie 1 higher, by a noise of 0.3 * sqrt(2) on both sides.
    best = found["full fine-tuning", "LiRA online"]
    assert best.auc.value == pytest.approx(ndtr(1 / 0.6), abs=0.03)
    assert best.auc.value > found["full fine-tuning", "loss threshold"].auc.value + 0.1


def test_rates_below_the_resolution_are_not_given(audit):
    tenth, hundredth, thousandth = audit.rows[0].rates
    assert 0 < tenth.value < 1 and tenth.low < tenth.value < tenth.high
    assert not math.isnan(hundredth.value)
    assert math.isnan(thousandth.value) and "not resolvable: 200 non-members" in thousandth.reason


def test_groups_have_their_counts_and_gaps_their_chance(audit):
    groups = {group.name: group for group in audit.groups}
    small = groups["Small"]
    assert 10 < small.members < 60 and 10 < small.others < 60
    assert small.cells["full fine-tuning"].low > 0.5
    tiny = groups["Tiny"].cells["full fine-tuning"]
    assert math.isnan(tiny.value) and "fewer than 10" in tiny.reason
    assert [gap.label for gap in audit.gaps] == ["LoRA r=4", "full fine-tuning"]
    assert all(gap.found.gap < 0.2 and gap.found.null_mean > 0 for gap in audit.gaps)


def test_the_page_has_the_audit_and_shadows_are_no_reported_runs(study, audit):
    html = page.write(*study).read_text("utf-8")
    _read(html)
    assert "Can it be told which rows a run was trained on?" in html
    assert "8 shadow models of full fine-tuning" in html and "cannot be told with 200" in html
    case = numbers.arrange(study[1])
    assert case.outputs["full fine-tuning"].seeds == (1, 2)
    table = (study[0] / "report" / "results.csv").read_text()
    assert "1000000" not in table
    lines = list(csv.DictReader((study[0] / "report" / "membership.csv").read_text().splitlines()))
    auc = [line for line in lines if line["metric"] == "auc" and not line["group"]]
    assert len(auc) == len(audit.rows) and len(lines) == 5 * len(audit.rows) + 2 * 3 + 1
    assert float(auc[0]["value"]) == pytest.approx(audit.rows[0].auc.value)
    undefined = next(line for line in lines if line["metric"] == "tpr at 0.001")
    assert undefined["value"] == "" and "not resolvable" in undefined["reason"]


def test_low_rank_is_compared_with_full_by_row_and_seed(study, audit):
    (each,) = audit.distances
    assert (each.label, each.other, each.seeds) == ("LoRA r=4", "full fine-tuning", (1, 2))
    found = {(row.label, row.attack): row.auc.value for row in audit.rows}
    apart = found["LoRA r=4", audit.main] - found["full fine-tuning", audit.main]
    assert each.found.estimate == pytest.approx(apart)
    assert -1 < each.found.low < each.found.estimate < each.found.high < -0.2
    claims_of = claims.from_case(numbers.arrange(study[1]), audit)
    (claim,) = (one for one in claims_of if one.topic == "membership")
    assert (claim.verdict, claim.num_seeds, claim.num_prompts) == ("contradicted", 2, 400)
    assert claim.p_adjusted >= claim.p == claim.p_new_seeds and claim.p_these_seeds < 0.05
    assert f"{claim.difference:+.3f}" in claims.as_text(study[1])


def test_curves_are_drawn_for_groups_with_enough_rows(audit):
    overall, by_group = audit.figures
    assert [panel.title for panel in overall.panels] == [
        "LoRA r=4: 8 shadows",
        "full fine-tuning: 8 shadows",
    ]
    small = next(group for group in audit.groups if group.name == "Small")
    titles = [panel.title for panel in by_group.panels]
    assert titles[-1] == f"Small: {small.members} members, {small.others} others"
    assert not any(title.startswith("Tiny") for title in titles)
    auc = small.cells["full fine-tuning"].value
    shown = by_group.panels[-1].alt.split("full fine-tuning, AUC ")[1].split(", ")
    assert np.mean([float(one) for one in shown]) == pytest.approx(auc, abs=1e-3)


def test_a_study_without_shadows_has_no_audit(tmp_path):
    result = report_classification.write(tmp_path, seeds=(1,), ranks=(4,))
    assert membership.audit(numbers.arrange(result), result) is None


def test_published_shadows_know_no_audited_row(study):
    case = numbers.arrange(study[1])
    each = membership._audited(case, study[1], "full fine-tuning")
    outside = each._replace(inside=np.zeros_like(each.inside))
    assert list(membership.attacks(outside, "published"))[:2] == [
        "loss threshold",
        "LiRA offline, tail",
    ]
