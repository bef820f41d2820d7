"""The report of a classification study: numbers against direct ones, claims, page and files."""

import csv
import io
import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import report_classification
from scipy.special import stdtrit
from test_report_page import _read

from jax_lowrank import results
from jax_lowrank.config import EvalSpec
from jax_lowrank.evaluation import calibration
from jax_lowrank.evaluation.probabilities import smooth_calibration_error, softmax
from jax_lowrank.report import drawing, kinds
from jax_lowrank.report import figures as report_figures
from jax_lowrank.report import grid as grids
from jax_lowrank.report import page as report_page
from jax_lowrank.report.classification import (
    answer,
    claims,
    effects,
    figures,
    numbers,
    page,
    scores,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(directory, results): rank 1 does no better than chance on the group Small."""
    directory = tmp_path_factory.mktemp("study")
    return directory, report_classification.write(directory, unfair=(1,))


@pytest.fixture(scope="module")
def case(study):
    return numbers.arrange(study[1])


@pytest.fixture(scope="module")
def table(case):
    return numbers.summary(case)


@pytest.fixture(scope="module")
def html(study):
    report = kinds.report_of(study[1])
    assert report.write is page.write
    return report.write(study[0], study[1]).read_text("utf-8")


def test_methods_are_in_order_and_tuning_runs_apart(case):
    assert list(case.outputs) == ["head only", "LoRA r=1", "LoRA r=4", "full fine-tuning"]
    assert case.outputs["LoRA r=1"].seeds == (1, 2, 3)
    assert ("LoRA r=4", 1e-2) in case.tuning and ("full fine-tuning", 1e-3) in case.tuning
    assert case.enough.tolist() == [True, True, False]


def test_levels_equal_direct_ones(case, table):
    each = case.outputs["LoRA r=4"]
    right = each.predictions == case.labels
    assert table["accuracy"]["LoRA r=4"].value == pytest.approx(right.mean())
    assert table["accuracy"]["LoRA r=4"].per_seed == pytest.approx(tuple(right.mean(1)))
    worst = [min(row[inside].mean() for inside in case.members[:, :2].T) for row in right]
    assert table["worst_accuracy"]["LoRA r=4"].value == pytest.approx(np.mean(worst))
    bins = calibration.bins(each.chance, case.labels, np.ones((600, 1), bool))
    error = calibration.calibration_error(bins).mean()
    assert table["ece"]["LoRA r=4"].value == pytest.approx(error)
    for name in numbers.GAPS:
        found = table[name]["LoRA r=4"]
        assert found.low < found.value < found.high


def test_groups_with_too_few_rows_stay_with_their_reason(case):
    rows = {row.name: row for row in numbers.group_rows(case, "full fine-tuning")}
    assert list(rows) == ["all rows", "Large", "Small", "Tiny"]
    tiny = rows["Tiny"].cells
    assert all(math.isnan(cell.value) for cell in tiny.values())
    assert tiny["accuracy"].reason == "4 rows, fewer than 10"
    assert tiny["tpr"].reason.endswith("positives, fewer than 10")
    small, each = rows["Small"], case.outputs["full fine-tuning"]
    inside = case.members[:, 1]
    negatives = inside & (case.labels == 0)
    rate = (each.predictions[:, negatives] == 1).mean()
    assert small.cells["fpr"].value == pytest.approx(rate)
    assert small.cells["fpr"].n == negatives.sum() and small.size == inside.sum()
    positives = inside & (case.labels == 1)
    rate = (each.predictions[:, positives] == 1).mean()
    assert small.cells["tpr"].value == pytest.approx(rate)
    assert small.cells["tpr"].n == positives.sum()
    assert small.cells["ece"].expected > 0


def test_scores_of_groups_are_those_of_the_runs(case):
    each = case.outputs["LoRA r=1"]
    overall, large, small, tiny = scores.of_groups(case, each)
    assert list(small) == list(scores.TITLES)
    inside, positive = case.members[:, 1], case.labels == case.positive
    f1, auc, bpsn = [], [], []
    for predictions, chance in zip(each.predictions, each.chance):
        said = predictions == case.positive
        right = (said & positive)[inside].sum()
        f1.append(2 * right / (said[inside].sum() + positive[inside].sum()))
        pairs = chance[inside & positive][:, None] - chance[inside & ~positive][None]
        auc.append(((pairs > 0) + (pairs == 0) / 2).mean())
        pairs = chance[~inside & positive][:, None] - chance[inside & ~positive][None]
        bpsn.append(((pairs > 0) + (pairs == 0) / 2).mean())
    for name, values in {"f1": f1, "subgroup_auc": auc, "bpsn_auc": bpsn}.items():
        assert small[name].value == pytest.approx(np.mean(values))
        assert small[name].low < small[name].value < small[name].high
    smooth = smooth_calibration_error(each.chance, each.event, case.members[:, [1]]).mean()
    assert small["smooth_ece"].value == pytest.approx(smooth)
    bins = calibration.bins(each.chance, each.event, case.members[:, [1]])
    corrected = calibration.corrected_error(bins).mean()
    assert small["corrected_ece"].value == pytest.approx(corrected)
    assert small["subgroup_auc"].value < 0.6 < large["subgroup_auc"].value  # rank 1 fails Small
    assert all(math.isnan(cell.value) and "fewer than 10" in cell.reason for cell in tiny.values())
    assert overall["f1"].n == positive.sum()


def test_distances_find_the_group_that_is_served_worse(case):
    found = {(d.label, d.group): d for d in numbers.distances(case) if d.rate == "accuracy"}
    bad = found["LoRA r=1", "Small"]
    assert bad.found.estimate < -0.1 and bad.p_adjusted < 0.01
    assert math.isnan(found["full fine-tuning", "Tiny"].found.estimate)
    assert abs(found["full fine-tuning", "Large"].found.estimate) < 0.06


def test_gaps_stand_beside_what_chance_gives(case):
    found = {(gap.label, gap.rate): gap for gap in numbers.gaps(case)}
    fair, unfair = found["LoRA r=4", "accuracy"], found["LoRA r=1", "accuracy"]
    assert fair.found.num_defined == 2 and 0 < fair.found.null_mean < 0.1
    assert unfair.found.gap > 3 * unfair.found.null_mean and unfair.p_adjusted < 0.05
    levels, ding = numbers.summary(case), script("ding_classification")
    for name, rate in ding["CHANCE"].items():  # of the quantity that the level is
        for label in case.outputs:
            assert found[label, rate].found.gap == pytest.approx(levels[name][label].value)
    assert found["LoRA r=1", numbers.ODDS].p_adjusted < 0.05


def test_effects_are_the_differences_of_the_levels(case, table):
    pairs = {pair.label: pair for pair in effects.at_best(case)}
    assert list(pairs) == ["head only", "LoRA r=1", "LoRA r=4"]
    for name in effects.METRICS:
        values = table[name]
        expected = values["LoRA r=1"].value - values["full fine-tuning"].value
        assert pairs["LoRA r=1"].found[name].estimate == pytest.approx(expected), name
    worst = pairs["LoRA r=1"].found["worst_accuracy"]
    assert worst.high < 0 and worst.num_seeds == 3
    by_group = effects.by_group(case, "LoRA r=1")
    assert list(by_group) == ["all rows", "Large", "Small"]
    assert by_group["Small"].high < by_group["Large"].estimate


@pytest.mark.parametrize("match", ["accuracy", "f1"])
def test_equal_utility_takes_the_nearest_run_of_each_seed(study, match):
    settings = study[1].study["config"]["evaluate"] | {"match": match, "margin": 0.2}
    case = numbers.arrange(with_settings(study[1], settings))
    validation, near, right = study[1].rows["validation"].labels, [], []
    full, off = case.outputs["full fine-tuning"], []

    def worth(label, seed):
        said = case.grid.runs[label][seed].arrays["validation/logits"].argmax(1)
        if match == "accuracy":
            return np.mean(said == validation)
        ppv, tpr = np.mean(validation[said == 1] == 1), np.mean(said[validation == 1] == 1)
        return 2 * ppv * tpr / (ppv + tpr)

    for place, seed in enumerate((1, 2, 3)):
        apart = {name: worth(name, seed) - worth(case.grid.full, seed) for name in case.grid.lora}
        near.append(min(apart, key=lambda name: abs(apart[name])))
        off.append(f"{apart[near[-1]]:+.3f} {near[-1]}".replace("-", "−"))
        best = case.outputs[near[-1]].predictions[place]
        right.append((best == case.labels).mean() - (full.predictions[place] == case.labels).mean())
    pair = effects.matched(case)
    assert pair.found["accuracy"].estimate == pytest.approx(np.mean(right))
    said = {"accuracy": "accuracy", "f1": "F1 of “bad”"}[match]
    assert pair.label == f"LoRA at full fine-tuning's validation {said}"
    assert pair.note == f"validation {said} minus full's, by seed: {', '.join(off)}"


def with_settings(result, settings):
    config = result.study["config"] | {"evaluate": settings}
    return result._replace(study=result.study | {"config": config})


def test_what_cannot_be_matched_has_a_reason(case, table):
    full = case.outputs["full fine-tuning"]
    far = full._replace(validation=full.validation + np.array([0, 0, 0.3]))
    pair = effects.matched(case._replace(outputs={**case.outputs, "full fine-tuning": far}))
    assert pair.found["ece"].num_seeds == 2 and pair.note.count("LoRA r=4") == 3
    assert re.search(
        r"; no LoRA run within 0.05 of full's validation accuracy: seed 3 \(−0.\d{3} LoRA r=4\)$",
        pair.note,
    )
    outputs = {**case.outputs, "full fine-tuning": full._replace(validation=full.validation + 0.3)}
    far = case._replace(outputs=outputs)
    pair = effects.matched(far)
    assert all(math.isnan(each.estimate) for each in pair.found.values())
    found = claims.from_case(far)
    none = [claim for claim in found if claim.topic == "matched"]
    assert len(none) == 4 and all(math.isnan(claim.p_adjusted) for claim in none)
    said = " ".join(answer.answer(far, table, found, []))
    assert "matched on validation rows: not compared (no LoRA run within 0.05" in said
    assert "Whether it goes with utility is not known: no LoRA run within 0.05 of full's" in said
    assert {drawn.alt for drawn in figures.forest(far, [pair]).panels} == {"matched: undefined"}


def test_an_undefined_f1_is_not_matched():
    labels = np.array([0, 1, 0])
    assert numbers.utility(np.array([1, 1, 0]), labels, 1, "f1") == pytest.approx(2 / 3)
    assert numbers.utility(np.array([0, 0, 0]), labels, 1, "f1") == 0
    assert math.isnan(numbers.utility(np.array([0, 0, 0]), labels * 0, 1, "f1"))
    assert str(effects.Nearest(1, "LoRA r=1", math.nan)) == "undefined LoRA r=1"


def test_older_results_are_matched_in_accuracy(study, case):
    settings = dict(study[1].study["config"]["evaluate"])
    assert settings.pop("match") == "accuracy"
    old = numbers.arrange(with_settings(study[1], settings))
    assert old.match == "accuracy" and effects.matched(old).note == effects.matched(case).note
    with pytest.raises(ValueError, match=r"evaluate\.match: .*f1"):
        EvalSpec(match="f")


def test_a_difference_that_is_not_seen_at_matched_utility_says_so(case, table, html):
    text = " ".join(_read(html).text)
    start = "LoRA r=1 has, at its best, a lower accuracy on the worst group than full fine-tuning."
    assert f"{start} Once validation accuracy is matched (LoRA of any rank, " in text
    after = text.split(start)[1]
    assert after[:100].count("LoRA of any rank") == 1
    assert "]) it is not seen: what the interval leaves open is within ±0.05." in after[:200]
    found = claims.from_case(case)

    def said(**changes):
        changed = [
            claim._replace(**changes)
            if (claim.topic, claim.unit) == ("matched", "worst-group accuracy")
            else claim
            for claim in found
        ]
        return answer.answer(case, table, changed, [])

    told = {"difference": -0.2, "low": -0.3, "high": -0.1}
    still = said(verdict="supported", **told)
    assert any("(LoRA of any rank, −0.200 [−0.300, −0.100]) it is still seen." in s for s in still)
    other = said(verdict="contradicted", difference=0.2, low=0.1, high=0.3)
    assert any(s.startswith(start) and "it is the other way around" in s for s in other)
    wide = said(verdict="cannot tell", difference=0.0, low=-0.01, high=0.06)
    assert any("not seen; the interval says how much of it may be left." in s for s in wide)
    only = [c._replace(verdict="cannot tell") for c in found if c.topic != "matched"]
    only += [c._replace(verdict="supported", **told) for c in found if c.topic == "matched"]
    only = answer.answer(case, table, only, [])
    assert sum("once validation accuracy is matched LoRA has one (−0.200" in s for s in only) == 4


def test_one_learning_rate_is_compared_with_one_seed(case):
    found = effects.at_one_rate(case)
    assert [pair.label for pair in found] == ["LoRA r=1 at 0.001", "LoRA r=4 at 0.001"]
    each = found[0].found["worst_accuracy"]
    assert each.num_seeds == 1 and math.isnan(each.p_new_seeds) and 0 < each.p <= 1


def test_claims_say_what_was_built_in(case, study):
    found = {
        (claim.topic, claim.statement.split(" ")[1]): claim for claim in claims.from_case(case)
    }
    assert found["worst_accuracy", "r=1"].verdict == "supported"
    assert found["equalized_odds_difference", "r=1"].verdict == "supported"
    assert found["worst_accuracy", "r=4"].verdict == "cannot tell"
    assert all(claim.p_adjusted >= claim.p for claim in found.values() if claim.p == claim.p)
    text = kinds.report_of(study[1]).as_text(study[1])
    assert "Low rank is less accurate on the worst-served group (worst-group accuracy)" in text


@pytest.mark.slow
def test_a_base_model_that_answers_is_measured_beside_the_others(tmp_path):
    size = {"seeds": (1, 2), "ranks": (1,), "num_classes": 3}
    result = report_classification.write(tmp_path, answers=True, **size)
    case = numbers.arrange(result)
    assert list(case.outputs) == ["base", "LoRA r=1", "full fine-tuning"]
    run, full = case.grid.base.arrays["test/logits"], case.outputs["full fine-tuning"]
    right = run.argmax(1) == case.labels
    pair = next(pair for pair in effects.at_best(case) if pair.label == "base")
    assert pair.note == "one model without a seed, beside each seed of the other"
    apart = right.mean() - (full.predictions == case.labels).mean()
    assert pair.found["accuracy"].estimate == pytest.approx(apart)
    assert pair.found["ece"].num_seeds == 2
    assert len(numbers.summary(case)["ece"]["base"].per_seed) == 1
    report = page.write(tmp_path, result)
    text = " ".join(_read(report.read_text("utf-8")).text)
    assert "untrained head" not in text and "`base` answers by words" in text
    assert "of the probability of “bad”, which is told from all other classes: inside" in text
    assert f"base {100 * right.mean():.1f} % (worst group" in text.split("Largest gaps")[0]
    assert figures.keys_of(case)[0].text == figures.curve_keys(case)[-2].text == "base"
    rows = csv.DictReader(io.StringIO((report.parent / "results.csv").read_text("utf-8")))
    assert any(r["kind"] == "base" and r["name"] == "ece" and r["value"] for r in rows)
    lines = script("das_disparity")["disparities"](case)
    assert lines[0][0] == "base" and "p" in lines[0][-1]


def test_what_is_undefined_everywhere_is_said_and_not_drawn(case):
    found = numbers.summary(case)["ece"]
    drawn = figures.curve(case, "ECE", found)
    assert "undefined" not in drawn.svg and "undefined" not in drawn.alt
    nothing = {
        label: each._replace(value=np.nan, low=np.nan, high=np.nan, reason="no two groups")
        for label, each in found.items()
    }
    empty = figures.curve(case, "ECE", nothing)
    assert "no two groups" in empty.svg and ">rank<" in drawn.svg and ">rank<" not in empty.svg
    assert "full undefined" in empty.alt and "nan" not in empty.alt


def test_without_answers_the_base_model_says_nothing(case, html):
    assert "base" not in case.outputs and "the model under an untrained head" in html


def test_three_classes_have_a_top_label_calibration(tmp_path):
    result = report_classification.write(tmp_path, num_classes=3, seeds=(1,), ranks=(1,))
    case = numbers.arrange(result)
    each = case.outputs["full fine-tuning"]
    assert (each.chance >= 1 / 3).all() and set(np.unique(each.event)) == {0, 1}
    assert numbers.summary(case)["ece"]["full fine-tuning"].value > 0
    pair = effects.between(case, case.outputs["LoRA r=1"], each)
    assert np.isfinite([pair[name].estimate for name in effects.METRICS]).all()
    logits = case.grid.runs["full fine-tuning"][1].arrays["test/logits"]
    p, positive = softmax(logits)[:, case.positive], case.labels == case.positive
    pairs = p[positive][:, None] - p[~positive][None]
    found = scores.of_probabilities(case, each)
    auc = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert found[0]["subgroup_auc"].value == pytest.approx(auc)  # of all rows
    assert found[1]["bpsn_auc"].value > 0.5 and found[2]["bnsp_auc"].value > 0.5


def test_the_page_is_well_formed_and_says_what_is_missing(html):
    reader = _read(html)
    assert not reader.errors and not reader.open
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "img"}
    text = " ".join(reader.text)
    assert "too few" in text and "4 rows, fewer than 10" in text
    assert "fewer than 10 test rows: Tiny" in text
    assert "always saying “fine”" in text
    assert text.count("by chance") > 8
    links = [attrs.get("href", "") for _, attrs in reader.tags]
    targets = {attrs["id"] for _, attrs in reader.tags if "id" in attrs}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    anchors = ("by-rank", "forest", "forest-groups", "heat", "reliability", "size", "learning-rate")
    assert set(anchors) <= targets
    for word in ("unbiased", "debiased", "solved"):
        assert word not in text.lower()


def marks(drawn):
    """The texts of a panel's SVG."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)


def test_the_heat_map_masks_small_groups_and_stars_what_is_told(case):
    apart = numbers.distances(case)
    told = max(k for k, each in enumerate(apart) if each.p_adjusted < 0.05)
    apart[told] = apart[told]._replace(p_adjusted=0.2)  # not told once corrected
    panels = dict(zip(numbers.RATES, figures.heat_map(case, apart).panels, strict=True))
    for rate, drawn in panels.items():
        found = [each for each in apart if each.rate == rate]
        masked = [each for each in found if math.isnan(each.found.estimate)]
        starred = [each for each in found if each.p_adjusted < 0.05]
        assert {each.group for each in masked} == {"Tiny"} and len(masked) == 4
        assert marks(drawn).count("·") == len(masked) == drawn.alt.count("too few")
        values = [mark for mark in marks(drawn) if re.fullmatch(r"[+-]\d\.\d\d\*?", mark)]
        assert len(values) == len(found) - len(masked)
        assert sum(mark.endswith("*") for mark in values) == len(starred) == drawn.alt.count("*")
    bad = next(
        each
        for each in apart
        if (each.label, each.group, each.rate) == ("LoRA r=1", "Small", "accuracy")
    )
    said = f"{bad.found.estimate:+.2f}*"
    assert said in marks(panels["accuracy"])
    assert f"Small, LoRA r=1: {said};" in panels["accuracy"].alt


def test_the_forest_holds_every_comparison_and_its_limits(case):
    pairs = [*effects.at_best(case), effects.matched(case)]
    drawn = figures.forest(case, pairs).panels
    assert len(drawn) == len(effects.METRICS)
    for name, each in zip(effects.METRICS, drawn):
        parts = [pair.found[name] for pair in pairs]
        said = [f"{e.estimate:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" for e in parts]
        names = ["head only", "r=1", "r=4", "matched"]
        assert each.alt.split("; ") == [f"{n}: {text}" for n, text in zip(names, said)]
        assert set(names) <= set(marks(each))
    for role, each in zip(("low", "high"), figures.group_forest(case).panels, strict=True):
        found = effects.by_group(case, figures.roles(case)[role])
        assert [part.split(":")[0] for part in each.alt.split("; ")] == list(found)
        assert f"Small: {found['Small'].estimate:+.3f} [" in each.alt


def test_the_page_tests_equivalence_within_the_margin(case, html):
    pairs = [*effects.at_best(case), effects.matched(case), *effects.at_one_rate(case)]
    found = [pair.found[name] for pair in pairs for name in effects.METRICS]
    p = [effects.equivalent(case, each) for each in found]
    for each, value in zip(found, p):
        ends = each.error * stdtrit(each.freedom, 0.95)  # of the 90 % interval
        inside = each.estimate - ends > -0.05 and each.estimate + ends < 0.05
        assert inside == (value < 0.05)
    assert any(value < 0.05 for value in p) and any(value > 0.05 for value in p)
    said = re.findall(r"within ±0\.05: p ((?:&lt;)?\d\.\d+)", html)
    assert said == [report_page.p_value(value).replace("<", "&lt;") for value in p]


def test_reliability_and_group_size_say_what_they_draw(case):
    drawn = figures.reliability(case).panels
    assert [each.title.split(",")[0] for each in drawn] == ["all rows", "Large", "Small"]
    inside, full = case.members[:, 1], case.outputs["full fine-tuning"]
    p, event = full.chance[:, inside].ravel(), full.event[:, inside].ravel()
    last = p > 0.9
    said = dict(part.split(": ") for part in drawn[2].alt.split("; "))
    assert list(said) == ["head only", "LoRA r=1", "LoRA r=4", "full fine-tuning"]
    points = said["full fine-tuning"].split(", ")
    assert points[-1] == f"{p[last].mean():.2f} observed {event[last].mean():.2f}"
    assert len(points) == len(set(np.ceil(p * 10)))
    groups = {label: numbers.group_rows(case, label) for label in case.outputs}
    (size,) = figures.by_size(case, groups).panels
    large, small, tiny = size.alt.split("; ")
    right = (full.predictions == case.labels)[:, inside].mean()
    assert small.startswith(f"Small, {inside.sum()} rows: head only 0.")
    assert small.endswith(f"full fine-tuning {right:.2f}") and large.startswith("Large, ")
    assert tiny.startswith("Tiny, 4 rows: head only too few, ")


def test_a_study_that_has_just_begun_has_a_page(study):
    runs = study[1].runs
    begun = [run for run in runs if run.record["kind"] != "final"]
    case = numbers.arrange(study[1]._replace(runs=begun))
    assert "No run of a method has finished." in page.render(case, claims.from_case(case))
    head = [run for run in runs if run.record["label"] in ("base", "head only")]
    case = numbers.arrange(study[1]._replace(runs=head))
    assert list(case.outputs) == ["head only"] and not claims.from_case(case)
    assert figures.by_size(case, {"head only": numbers.group_rows(case, "head only")}).panels


def test_the_files_hold_every_run(study, html):
    directory, result = study
    report = directory / "report"
    rows = list(csv.DictReader(io.StringIO((report / "results.csv").read_text("utf-8"))))
    final = [r for r in rows if r["label"] == "full fine-tuning" and r["kind"] == "final"]
    seed = [r for r in final if r["seed"] == "1" and r["name"] == "accuracy" and not r["group"]]
    assert len(seed) == 1 and 0.5 < float(seed[0]["value"]) < 1
    tiny = next(r for r in final if r["group"] == "Tiny" and r["name"] == "tpr")
    assert tiny["value"] == "" and "fewer than 10" in tiny["reason"]
    for name in ("demographic_parity_difference", numbers.ODDS):
        gap = next(r for r in final if r["name"] == name)
        assert float(gap["null_mean"]) > 0 and 0 < float(gap["p"]) <= 1
    lines = [json.loads(line) for line in (report / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(result.runs)
    assert {line["kind"] for line in lines} == {"base", "tune", "final"}


def script(name):
    """The functions of a file of experiments/."""
    return runpy.run_path(str(Path(__file__).parents[1] / "experiments" / f"{name}.py"))


def test_dings_tables_hold_every_method_and_group(case, study):
    ding = script("ding_classification")
    said = ding["described"](case, study[1])
    for title in ding["TABLES"]:
        assert f"### {title}" in said
    assert "| Tiny (4) | too few: 4 rows, fewer than 10 |" in said
    assert "| LoRA r=1 − full fine-tuning | -0." in said
    assert "LoRA r=4 at 0.001 − full fine-tuning at 0.001" in said
    assert "− full fine-tuning (validation accuracy minus full's, by seed: " in said


@pytest.mark.slow
def test_das_disparity_over_classes_and_groups(case):
    das = script("das_disparity")
    said = das["section"](case)
    assert "Training rows: fine 6, bad 4, Large 5" in said
    each = case.outputs["LoRA r=1"]
    right = each.predictions == case.labels
    by_class = [1 - right[:, case.labels == k].mean() for k in (0, 1)]
    line = next(x for x in said.splitlines() if x.startswith("| bad ("))
    assert f"{by_class[1]:.3f} [" in line
    lines = das["disparities"](das["with_classes_as_groups"](case))
    rank_one = next(line for line in lines if line[0] == "LoRA r=1")
    assert float(rank_one[1]) == pytest.approx(abs(by_class[0] - by_class[1]), abs=6e-4)
    groups = {line[0]: line for line in das["disparities"](case)}
    assert float(groups["LoRA r=1"][3]) < 0.05 and groups["full fine-tuning"][-1] == "–"


def test_the_heat_map_has_room_for_many_long_names(case):
    def shape(labels):
        outputs = dict.fromkeys(labels, case.outputs["LoRA r=1"])
        many = case._replace(outputs=outputs)
        (panel, *_) = figures.heat_map(many, numbers.distances(many)).panels
        return [float(x) / 72 for x in re.search(r'viewBox="0 0 (\S+) (\S+)"', panel.svg).groups()]

    few = shape(["head only", "LoRA r=1", "full fine-tuning"])
    assert few[0] == pytest.approx(4.4)
    ranks = [f"LoRA r={r} alpha={2 * r} (first 0.25 of layers)" for r in range(100, 130)]
    long, many = shape(ranks[:2]), shape(ranks)  # constrained_layout would warn, an error here
    assert long[0] == few[0] and long[1] > few[1] + 1.5
    assert many[1] > 30 * 0.27 and many[0] < 6  # methods downwards


@pytest.mark.slow
def test_dings_ranks_are_drawn_by_rule_with_attacks_beside_them(tmp_path, monkeypatch):
    ranks = script("ding_ranks")
    memory = {1: 0.2, 4: 1.0, "full": 1.0}
    result = report_classification.write(tmp_path / "s", seeds=(1, 2), memory=memory)
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "s"), "--out", str(tmp_path / "out")])
    ranks["main"]()
    case = numbers.arrange(result)
    found = ranks["measured"](case, result)
    assert list(found) == [*(numbers.TITLES[name] for name in ranks["METRICS"]), ranks["AUC"]]
    low, high = (found[ranks["AUC"]][f"LoRA r={r}"] for r in (1, 4))
    assert low.value < 0.75 < 0.9 < high.value and low.low < low.value < low.high
    assert len(low.per_seed) == 2 and "head only" not in found[ranks["AUC"]]
    lines = (tmp_path / "out" / "ranks.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines[4:]] == [
        ["| LoRA", "1"],
        ["| LoRA", "4"],
        ["| head only", "–"],
        ["| full fine-tuning", "–"],
    ]
    assert f"| {high.value:.3f} [" in lines[5] and lines[6].endswith("| – |")
    page = (tmp_path / "out" / "ranks.html").read_text()
    assert page.count("<svg") == 5 and "AUC of the membership attack" in page


def test_rank_one_in_a_share_of_the_layers_is_a_rank_below_one():
    method = {"alpha": 16.0, "layers": "first", "layer_fraction": 0.25}
    record = {"label": "LoRA r=1 (qv, first 0.25 of layers)", "rank": 1, "method": method}
    assert grids.size(record) == 0.25
    assert grids.series(record) == "LoRA (qv, first layers)"
    whole = {**record, "label": "LoRA r=8 (qv)", "rank": 8}
    whole["method"] = {**method, "layer_fraction": 1.0}
    assert grids.size(whole) == 8 and grids.series(whole) == "LoRA (qv)"


def test_ticks_of_near_ranks_have_one_label():
    shown = report_figures.rank_labels([0.25, 0.5, 0.75, 1, 2, 4, 64, 128, 256, 384])
    assert shown == ["0.25", "0.5", "", "1", "2", "4", "64", "128", "", "384"]
    assert report_figures.rank_labels([1, 8, 64]) == ["1", "8", "64"]
    assert report_figures.rank_labels([4]) == ["4"]


def test_rounding_is_not_drawn_as_a_trend():
    shown = drawing.panel("flat", "flat", lambda axes: axes.plot([0, 1, 2], [1e-17, 0, -2e-17]))
    assert "1e" not in re.sub(r"<[^>]*>", "", shown.svg)


def test_a_method_that_gives_one_answer_is_named_in_front(case, table):
    label = case.grid.lora[0]
    assert "Whoever" not in " ".join(answer.answer(case, table, [], []))
    each = case.outputs[label]
    same = np.full_like(each.predictions, case.positive)
    same[:, :10] = 1 - case.positive
    outputs = {**case.outputs, label: each._replace(predictions=same)}
    said = " ".join(answer.answer(case._replace(outputs=outputs), table, [], []))
    share = 100 * (1 - 10 / case.labels.size)
    assert f"{label} says" in said and f"of {share:.1f} % of the rows" in said


def test_only_a_classification_study_is_read(study, tmp_path):
    result, case = numbers.read(study[0])
    assert len(result.runs) == len(study[1].runs) and "full fine-tuning" in case.outputs
    (tmp_path / "study.json").write_text("{}")
    (tmp_path / "prompts.json").write_text("{}")
    with pytest.raises(results.ResultsError, match="holds no"):
        numbers.read(tmp_path)
