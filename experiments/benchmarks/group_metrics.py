"""How long do all group and calibration metrics with their limits take, and how long fairlearn's?

    python experiments/benchmarks/group_metrics.py [--peer-python .venv-bench/bin/python]

100,000 rows, 34 overlapping groups, 20 runs, 1,000 resamples; and 10,000 replicates of every rate
for 10,000 rows and 8 groups. The peer is fairlearn's MetricFrame bootstrap of four of the rates in
a partition (it takes no overlapping groups) of the same 100,000 rows and of the 10,000, one run,
a few replicates, timed by itself with `--peer`. Ratios are seconds a replicate, of one run and
four rates against all of ours. Writes results/group-metrics-<processor>.json beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROWS, GROUPS, RUNS, RESAMPLES = 100_000, 34, 20, 1000
SMALL_ROWS, SMALL_GROUPS, SMALL_RESAMPLES = 10_000, 8, 10_000
PEER_REPLICATES = 10
LIMITS = {"all metrics": 10.0, "10,000 replicates": 0.2}  # seconds, two cores
TARGET_RATIO = 1000


def overlapping(rng) -> tuple[np.ndarray, ...]:
    """Labels (N,), logits (R, N) of P(y = 1) and groups (N, G) of 0.5 to 12 % of the rows."""
    shares = np.geomspace(0.005, 0.12, GROUPS)
    members = rng.random((ROWS, GROUPS)) < shares
    labels = (rng.random(ROWS) < 0.26).astype(int)
    difficulty = rng.normal(0, 1.2, ROWS)
    logits = 2.2 * labels - 1.8 + difficulty + rng.normal(0, 0.5, (RUNS, ROWS))
    return labels, logits, members


def partition(rng, rows: int, groups: int) -> tuple[np.ndarray, ...]:
    """Labels, predictions and group numbers (N,)."""
    group, labels = rng.integers(0, groups, rows), rng.integers(0, 2, rows)
    return labels, (rng.random(rows) < 0.3 + 0.4 * labels).astype(int), group


def ours() -> dict[str, float]:
    """Seconds of each part, once warm."""
    from jax_lowrank.evaluation import (
        calibration,
        cells,
        groups,
        probabilities,
        ranking,
        subgroups,
    )

    labels, logits, members = overlapping(np.random.default_rng(0))
    chance = 1 / (1 + np.exp(-logits))
    seconds: dict[str, float] = {}

    def timed(name: str, work) -> None:
        start, busy = time.perf_counter(), time.process_time()
        work()
        seconds[name] = round(time.perf_counter() - start, 3)
        print(f"{name}: {seconds[name]} s ({time.process_time() - busy:.1f} s of processor time)")

    predictions = (chance >= 0.5).astype(int)
    timed(
        "rates and gaps",
        lambda: subgroups.measure(labels, predictions, members, num_resamples=RESAMPLES),
    )
    timed("AUCs", lambda: ranking.bias_aucs(logits, labels, members))

    def entropies() -> None:
        counts = groups.count(labels, predictions, members)
        for alpha in (1.0, 2.0):
            groups.generalized_entropy(counts.by_group, alpha)

    timed("entropies", entropies)
    brier = probabilities.brier(chance, labels)

    def calibrated() -> None:
        for scheme in ("width", "mass"):
            found = calibration.bins(chance, labels, members, scheme=scheme)
            calibration.calibration_error(found)
            calibration.calibration_error(found, np.inf)
            calibration.corrected_error(found)
            calibration.perfect(found)
            calibration.limits(found)
            calibration.reliability(found)
            calibration.brier_decomposition(found, groups.group_means(brier, members).mean)
        both = np.stack([1 - chance, chance], -1)
        calibration.classwise_error(both, labels, members)
        probabilities.smooth_calibration_error(chance, labels, members)

    timed("calibration", calibrated)

    def means() -> None:
        nll = np.logaddexp(0, np.where(labels == 1, -logits, logits))
        for values in (brier, nll, np.abs(logits)):
            groups.group_means(values, members)

    timed("Brier, NLL, margins", means)
    seconds["all metrics"] = round(sum(seconds.values()), 3)
    labels, predicted, group = partition(np.random.default_rng(1), SMALL_ROWS, SMALL_GROUPS)
    members = np.eye(SMALL_GROUPS, dtype=bool)[group]

    def replicates() -> None:
        made = cells.make(labels, predicted[None], members, num_classes=2)
        cells.resample(made, lambda t: np.stack(groups.rates(t), 2), SMALL_RESAMPLES)

    replicates()
    timed("10,000 replicates", replicates)
    return seconds


def peer() -> dict:
    """Seconds a replicate of fairlearn's bootstrap: time with replicates less time without."""
    import fairlearn
    import fairlearn.metrics as fair
    import sklearn.metrics as sk

    metrics = {
        "selection": fair.selection_rate,
        "tpr": fair.true_positive_rate,
        "fpr": fair.false_positive_rate,
        "accuracy": sk.accuracy_score,
    }
    found = {"fairlearn": fairlearn.__version__}
    for name, rows, groups in (
        ("small", SMALL_ROWS, SMALL_GROUPS),
        ("large", ROWS, GROUPS),
    ):
        labels, predicted, group = partition(np.random.default_rng(1), rows, groups)
        seconds = []
        for replicates in (None, PEER_REPLICATES):
            options = {"n_boot": replicates, "ci_quantiles": [0.025, 0.975], "random_state": 0}
            start = time.perf_counter()
            fair.MetricFrame(
                metrics=metrics,
                y_true=labels,
                y_pred=predicted,
                sensitive_features=group,
                **(options if replicates else {}),
            )
            seconds.append(time.perf_counter() - start)
        found[name] = (seconds[1] - seconds[0]) / PEER_REPLICATES
    return found


def main() -> None:
    """Run, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default="", help="an interpreter that has fairlearn")
    parser.add_argument("--peer", action="store_true", help="print the peer's times and leave")
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(peer()))
        return
    from jax_lowrank import provenance

    seconds = ours()
    result = {
        "date": datetime.date.today().isoformat(),
        "rows": ROWS,
        "groups": GROUPS,
        "runs": RUNS,
        "resamples": RESAMPLES,
        "load_average": os.getloadavg()[0],  # of others too: above the cores, times are too long
        "seconds": seconds,
        "limits": LIMITS,
        "within_limits": {name: seconds[name] <= limit for name, limit in LIMITS.items()},
    }
    if arguments.peer_python:
        command = [arguments.peer_python, __file__, "--peer"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result["peer"] = json.loads(told.splitlines()[-1])
        small = seconds["10,000 replicates"] / SMALL_RESAMPLES
        large = seconds["rates and gaps"] / RESAMPLES / RUNS
        result["times_faster"] = {
            "small": round(result["peer"]["small"] / small),
            "large": round(result["peer"]["large"] / large),
            "target": TARGET_RATIO,
        }
    result["environment"] = dict(provenance.environment())
    machine = re.sub(r"[^a-z0-9]+", "-", provenance.cpu_name().lower()).strip("-")
    path = HERE / "results" / f"group-metrics-{machine}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
