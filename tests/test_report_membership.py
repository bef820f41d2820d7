"""The audit in the report of a classification study: attacks on runs whose memory is known."""

import csv
import html as markup
import math
import re

import numpy as np
import pytest
import report_classification
from matplotlib.figure import Figure
from scipy.special import ndtr
from test_report_page import _read

from jax_lowrank.evaluation import membership as attacks
from jax_lowrank.report.classification import claims, membership, numbers, page, rocs

MEMORY = {4: 0.0, "full": 1.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(directory, results): rank 4 remembers nothing, full fine-tuning does; both are audited."""
    directory = tmp_path_factory.mktemp("audit")
    return directory, report_classification.write(directory, memory=MEMORY, seeds=(1, 2))


@pytest.fixture(scope="module")
def case(study):
    return numbers.arrange(study[1])


@pytest.fixture(scope="module")
def audit(case, study):
    return membership.audit(case, study[1])


@pytest.fixture(scope="module")
def html(study):
    return page.write(*study).read_text("utf-8")


def rows_of(html, label):
    """First cell -> the other cells' words, of the table with this aria-label."""
    table = html.split(f'aria-label="{label}"')[1].split("</table>")[0]
    found = {}
    for line in table.split("<tr>")[1:]:
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)
        words = [" ".join(re.sub(r"<[^>]*>", " ", markup.unescape(c)).split()) for c in cells]
        found[words[0]] = words[1:]
    return found


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
    assert small.aucs["full fine-tuning"].low > 0.5
    tiny = groups["Tiny"].aucs["full fine-tuning"]
    assert math.isnan(tiny.value) and "fewer than 10" in tiny.reason
    assert [gaps.label for gaps in audit.gaps] == ["LoRA r=4", "full fine-tuning"]
    for gaps in audit.gaps:
        assert [gap.measure for gap in gaps.found[:2]] == ["auc", "best balanced accuracy"]
        assert all(gap.gap < 0.4 and gap.null_mean > 0 and gap.p > 0.01 for gap in gaps.found[:3])
        assert "1 of 3 groups have 10 members and others" in gaps.found[3].reason


def test_the_page_shows_what_groups_give_away_with_counts_limits_and_chance(case, audit, html):
    """Every number of a group stands on the page, as the attacks on its rows alone give it."""
    label, g = "full fine-tuning", case.names.index("Small")
    (scores,) = (each for each in [audit.scores[label][audit.main]])
    inside, member = audit.inside[:, g], audit.methods[0].member
    alone = [attacks.attack(row[inside], member[inside]) for row in scores]
    shown = rows_of(html, f"Attacks on {label} by group")
    assert list(shown) == ["Group", "Large", "Small", "largest gap"]  # Tiny has too few rows
    counts, accuracy, tenth, hundredth, thousandth = shown["Small"]
    assert counts == f"{alone[0].num_members} {alone[0].num_others}"
    assert accuracy == f"{np.mean([one.balanced_accuracy for one in alone]):.3f}"
    rate, low, high = (
        np.mean([getattr(a.at[0], x) for a in alone]) for x in ("rate", "low", "high")
    )
    assert tenth == f"{rate:.3f} [{low:.2f}, {high:.2f}]"
    few = f"{alone[0].num_others} non-members resolve rates of {1 / alone[0].num_others:.2g}"
    for cell in (hundredth, thousandth):
        assert "not resolvable" in cell and few in cell
    large = rows_of(html, f"Attacks on {label} by group")["Large"]
    assert re.fullmatch(r"0\.\d{3} \[0\.\d\d, 0\.\d\d\]", large[2])  # its 1 % can be told
    gap, by_chance = (audit.gaps[1].found[n] for n in (1, 2))
    assert shown["largest gap"][1].startswith(f"{gap.gap:.3f} by chance {gap.null_mean:.3f}; p ")
    assert shown["largest gap"][2].startswith(f"{by_chance.gap:.3f} by chance ")
    assert "1 of 3 groups have 10 members and others and resolve a rate" in shown["largest gap"][3]
    aucs = rows_of(html, "Membership inference by group")
    assert "fewer than 10" in aucs["Tiny"][1] and "by chance" in aucs["largest gap"][1]
    assert "of the members and" in html


def test_every_number_of_a_group_is_in_the_table_for_machines(study, html):
    lines = csv.DictReader((study[0] / "report" / "membership.csv").read_text().splitlines())
    lines = [row for row in lines if row["group"] == "Small" and row["label"] == "LoRA r=4"]
    assert [row["metric"] for row in lines] == [
        *("auc", "best balanced accuracy"),
        *(f"tpr at {rate:g}" for rate in membership.RATES),
    ]
    assert lines[-1]["value"] == "" and "not resolvable" in lines[-1]["reason"]


def test_the_page_has_the_audit_and_shadows_are_no_reported_runs(study, audit, html):
    _read(html)
    assert "Can it be told which rows a run was trained on?" in html
    assert "8 shadow models of full fine-tuning" in html and "cannot be told with 200" in html
    case = numbers.arrange(study[1])
    assert case.outputs["full fine-tuning"].seeds == (1, 2)
    table = (study[0] / "report" / "results.csv").read_text()
    assert "1000000" not in table
    lines = list(csv.DictReader((study[0] / "report" / "membership.csv").read_text().splitlines()))
    auc = [line for line in lines if line["metric"] == "auc" and not line["group"]]
    assert len(auc) == len(audit.rows) and len(lines) == 5 * (len(audit.rows) + 2 * 3) + 1
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


def test_curves_are_drawn_for_groups_with_enough_rows(case, audit):
    overall, by_group = rocs.all_figures(case, audit)
    assert [panel.title for panel in overall.panels] == [
        "LoRA r=4: 8 shadows",
        "full fine-tuning: 8 shadows",
    ]
    small = next(group for group in audit.groups if group.name == "Small")
    titles = [panel.title for panel in by_group.panels]
    assert titles[-1] == f"Small: {small.members} members, {small.others} others"
    assert not any(title.startswith("Tiny") for title in titles)
    auc = small.aucs["full fine-tuning"].value
    shown = by_group.panels[-1].alt.split("full fine-tuning, AUC ")[1].split("; ")[0].split(", ")
    assert np.mean([float(one) for one in shown]) == pytest.approx(auc, abs=1e-3)


def test_curves_are_on_log_axes_with_the_resolution_limit(case, audit):
    """What is drawn, overall and by group: the exact curves, and a line at one false positive."""
    each = audit.methods[1]
    whole = rocs.Rocs(
        "all", each.member, (rocs.Line("x", audit.scores[each.label][audit.main], "k", 1),)
    )
    groups = rocs.of_groups(case, audit)
    assert len(groups) == 2
    for shown in (whole, *groups):
        axes = Figure().add_subplot()
        rocs.draw(axes, shown)
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        limit = 1 / (~shown.member).sum()
        diagonal, vertical, *curves = axes.lines
        assert list(vertical.get_xdata()) == [limit, limit] and shown.resolution == limit
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [limit / 2, 1]
        assert axes.get_xlim()[0] == limit / 2 == axes.get_ylim()[0]
        scores = [row for line in shown.lines for row in line.scores]
        assert len(curves) == len(scores) > 1
        for line, row in zip(curves, scores):
            exact = attacks.roc(row, shown.member)
            known = exact.false_positive_rate > 0
            np.testing.assert_array_equal(line.get_xdata()[known], exact.false_positive_rate[known])
            assert line.get_xdata()[known].min() == limit  # nothing between it and the left end
            assert (line.get_xdata()[~known] == limit / 2).all()
            high = exact.true_positive_rate >= limit / 2
            np.testing.assert_array_equal(line.get_ydata()[high], exact.true_positive_rate[high])


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
