"""Freezes tests/fixtures/groups.json: what the reference libraries say of groups and calibration.

    python tests/oracles/make_groups.py

needs fairlearn, scikit-learn, aif360, torchmetrics, uncertainty-calibration and statsmodels.
"""

import json
import platform
import warnings
from importlib.metadata import version
from pathlib import Path

import calibration as uncertainty
import fairlearn.metrics as fair
import numpy as np
import pandas as pd
import sklearn.metrics as sk
import torch
import torchmetrics.functional.classification as tm
from aif360.datasets import BinaryLabelDataset
from aif360.metrics import ClassificationMetric
from aif360.sklearn import metrics as aif
from statsmodels.stats.weightstats import ttost_paired

warnings.simplefilter("ignore")
FIXTURE = Path(__file__).parents[1] / "fixtures" / "groups.json"
RATES = {
    "selection": fair.selection_rate,
    "tpr": fair.true_positive_rate,
    "fpr": fair.false_positive_rate,
    "ppv": lambda y, p, sample_weight=None: sk.precision_score(
        y, p, sample_weight=sample_weight, zero_division=0
    ),
    "accuracy": sk.accuracy_score,
    "f1": lambda y, p, sample_weight=None: sk.f1_score(
        y, p, sample_weight=sample_weight, zero_division=0
    ),
    "macro_f1": lambda y, p, sample_weight=None: sk.f1_score(
        y, p, sample_weight=sample_weight, average="macro", zero_division=np.nan
    ),
}


def rows(seed: int, n: int) -> dict:
    """Labels, predictions, a partition into 4 and weights; the groups differ."""
    rng = np.random.default_rng(seed)
    group = rng.choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
    label = (rng.random(n) < 0.2 + 0.1 * group).astype(int)
    predicted = (rng.random(n) < 0.15 + 0.5 * label + 0.05 * group).astype(int)
    weight = np.round(rng.gamma(2.0, 1.0, n), 3)
    found = {"label": label, "predicted": predicted, "group": group, "weight": weight}
    return {name: values.tolist() for name, values in found.items()}


def fairlearn_of(label, predicted, group, weight) -> dict:
    label, predicted, group = np.array(label), np.array(predicted), np.array(group)
    found = {}
    for name, weights in (("plain", None), ("weighted", np.array(weight))):
        params = None if weights is None else {r: {"sample_weight": weights} for r in RATES}
        frame = fair.MetricFrame(
            metrics=RATES,
            y_true=label,
            y_pred=predicted,
            sensitive_features=group,
            sample_params=params,
        )
        options = {"sensitive_features": group, "sample_weight": weights}
        gaps = {
            f"{metric}_{kind}_{method}": getattr(fair, f"{metric}_{kind}")(
                label, predicted, method=method, **options
            )
            for metric in ("demographic_parity", "equalized_odds", "equal_opportunity")
            for kind in ("difference", "ratio")
            for method in ("between_groups", "to_overall")
        }
        for kind in ("difference", "ratio"):
            gaps[f"equalized_odds_{kind}_mean"] = getattr(fair, f"equalized_odds_{kind}")(
                label, predicted, agg="mean", **options
            )
        found[name] = {
            "by_group": {rate: frame.by_group[rate].tolist() for rate in RATES},
            "overall": {rate: float(frame.overall[rate]) for rate in RATES},
            "gaps": {gap: float(value) for gap, value in gaps.items()},
        }
    return found


def aif360_of(label, predicted, group, **_) -> dict:
    """Group 0 is privileged against all the others, as these metrics are defined."""
    label, predicted = np.array(label), np.array(predicted)
    privileged = (np.array(group) == 0).astype(float)
    index = pd.Index(privileged, name="g")
    true, guess = pd.Series(label, index=index), pd.Series(predicted, index=index)
    frame = pd.DataFrame({"g": privileged, "y": label.astype(float)})
    sets = [
        BinaryLabelDataset(
            df=frame.assign(y=values.astype(float)),
            label_names=["y"],
            protected_attribute_names=["g"],
        )
        for values in (label, predicted)
    ]
    classic = ClassificationMetric(
        *sets, unprivileged_groups=[{"g": 0.0}], privileged_groups=[{"g": 1.0}]
    )
    odds = {"prot_attr": "g", "priv_group": 1.0}
    return {
        "statistical_parity_difference": classic.statistical_parity_difference(),
        "disparate_impact": classic.disparate_impact(),
        "average_odds_difference": classic.average_odds_difference(),
        "average_abs_odds_difference": classic.average_abs_odds_difference(),
        "sklearn_average_odds_difference": aif.average_odds_difference(true, guess, **odds),
        "sklearn_average_odds_error": aif.average_odds_error(true, guess, **odds),
        "generalized_entropy": {
            str(alpha): classic.generalized_entropy_index(alpha) for alpha in (0.5, 1, 2, 3)
        },
        "theil": classic.theil_index(),
        "between": {
            str(alpha): classic.between_group_generalized_entropy_index(alpha)
            for alpha in (0.5, 1, 2)
        },
    }


def undefined() -> dict:
    """Group C has no positives: evaluation.md, section 5.2."""
    label = [0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0]
    predicted = [0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    group = np.repeat(["A", "B", "C"], 4)
    frame = fair.MetricFrame(
        metrics=fair.true_positive_rate, y_true=label, y_pred=predicted, sensitive_features=group
    )
    ratio = tm.binary_fairness(
        torch.tensor(predicted), torch.tensor(label), torch.tensor(np.repeat([0, 1, 2], 4))
    )
    options = {"sensitive_features": group}
    return {
        "label": label,
        "predicted": predicted,
        "tpr": frame.by_group.tolist(),
        "equalized_odds_difference": fair.equalized_odds_difference(label, predicted, **options),
        "torchmetrics": {name.split("_")[0]: float(value) for name, value in ratio.items()},
        "one_group_difference": fair.demographic_parity_difference(
            label, predicted, sensitive_features=["A"] * 12
        ),
    }


def aucs() -> dict:
    rng = np.random.default_rng(3)
    label = rng.integers(0, 2, 60)
    score = np.round(rng.normal(label, 1.5), 1)  # with ties
    member = rng.random((60, 2)) < 0.4
    weight = np.round(rng.gamma(2.0, 1.0, 60), 3)
    found = {"subgroup": [], "bpsn": [], "bnsp": [], "weighted": []}
    for column in member.T:
        kept = {
            "subgroup": column,
            "bpsn": np.where(column, label == 0, label == 1),
            "bnsp": np.where(column, label == 1, label == 0),
        }
        for name, chosen in kept.items():
            found[name].append(sk.roc_auc_score(label[chosen], score[chosen]))
        chosen = (label[column], score[column])
        found["weighted"].append(sk.roc_auc_score(*chosen, sample_weight=weight[column]))
    data = {"label": label, "score": score, "member": member.astype(int), "weight": weight}
    return {
        **{name: values.tolist() for name, values in data.items()},
        "overall": sk.roc_auc_score(label, score),
        **found,
    }


def calibrations() -> dict:
    rng = np.random.default_rng(4)
    p = np.round(rng.beta(0.7, 0.9, 300), 3).astype(np.float32)
    y = (rng.random(300) < np.clip(p * 1.2 - 0.05, 0, 1)).astype(int)
    edges = {"p": np.append(np.arange(1, 11) / 10, 0.0), "y": [0, 0, 1, 0, 1, 0, 1, 1, 1, 1, 0]}
    ends = {"p": [0.95, 1.0], "y": [1, 0]}
    logits = np.round(rng.normal(size=(200, 3)), 3)
    labels = rng.integers(0, 3, 200)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = {"p": p.tolist(), "y": y.tolist(), "logits": logits.tolist(), "labels": labels.tolist()}

    def torch_error(p, y, bins, norm) -> float:
        p = torch.tensor(np.asarray(p, np.float32))
        return float(tm.binary_calibration_error(p, torch.tensor(y), n_bins=bins, norm=norm))

    found["torchmetrics"] = {
        norm: torch_error(p, y.tolist(), 10, norm) for norm in ("l1", "l2", "max")
    }
    found["torchmetrics_edges"] = [torch_error(d["p"], d["y"], 10, "l1") for d in (edges, ends)]
    schemes = {"width": uncertainty.get_equal_prob_bins, "mass": uncertainty.get_equal_bins}
    for name, scheme in schemes.items():
        for power, debias in ((1, False), (2, False), (2, True)):
            error = uncertainty.lower_bound_scaling_ce(
                p.astype(float), y, power, debias, num_bins=15, binning_scheme=scheme
            )
            found[f"{name}_{power}" + "_corrected" * debias] = float(error)
    for power in (1, 2):
        found[f"classwise_{power}"] = float(
            uncertainty.lower_bound_scaling_ce(
                probabilities, labels, power, False, 10, uncertainty.get_equal_prob_bins
            )
        )
    found["top_label"] = float(
        uncertainty.lower_bound_scaling_ce(
            probabilities, labels, 1, False, 10, uncertainty.get_equal_prob_bins, mode="top-label"
        )
    )
    found["brier"] = float(sk.brier_score_loss(y, p))
    found["nll"] = float(sk.log_loss(labels, probabilities))
    return found


def equivalence() -> dict:
    rng = np.random.default_rng(5)
    a = np.round(rng.normal(0.02, 0.3, 40), 3)
    b = np.round(rng.normal(0.0, 0.3, 40), 3)
    symmetric = ttost_paired(a, b, -0.12, 0.12)
    return {
        "a": a.tolist(),
        "b": b.tolist(),
        "p": float(symmetric[0]),
        "p_low": float(symmetric[1][1]),
        "p_high": float(symmetric[2][1]),
    }


def main() -> None:
    names = (
        "numpy",
        "fairlearn",
        "scikit-learn",
        "aif360",
        "torchmetrics",
        "uncertainty-calibration",
        "statsmodels",
    )
    data = rows(0, 400)
    found = {
        "made_by": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "rows": data,
        "fairlearn": fairlearn_of(**data),
        "aif360": aif360_of(**data),
        "undefined": undefined(),
        "aucs": aucs(),
        "calibration": calibrations(),
        "equivalence": equivalence(),
    }
    text = json.dumps(found, indent=None, separators=(",", ":"))
    FIXTURE.write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
