"""Freezes tests/fixtures/membership.json: what jax_privacy's auditor says of scores of an attack.

    python tests/oracles/make_membership.py

needs jax_privacy (1.0 or later).
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jax_privacy import auditing

FIXTURE = Path(__file__).parents[1] / "fixtures" / "membership.json"
RATES = [0.001, 0.01, 0.05, 0.1, 0.5]
# name -> members, others, how far members' scores are up, decimals that make ties
CASES = {"plain": (200, 300, 1.0, 12), "ties": (120, 80, 0.7, 1), "chance": (100, 100, 0.0, 2)}


def main() -> None:
    """Draw the scores, ask, write."""
    rng, cases = np.random.default_rng(8), {}
    for name, (ones, zeros, shift, decimals) in CASES.items():
        inside = np.round(rng.normal(shift, 1, ones), decimals)
        outside = np.round(rng.normal(0, 1, zeros), decimals)
        auditor = auditing.CanaryScoreAuditor(inside, outside)
        cases[name] = {
            "inside": inside.tolist(),
            "outside": outside.tolist(),
            "auroc": float(auditor.attack_auroc()),
            "rates": RATES,
            "at": [float(auditor.tpr_at_given_fpr(rate)) for rate in RATES],
        }
        if hasattr(auditor, "max_accuracy"):
            cases[name]["max_accuracy"] = float(auditor.max_accuracy(prevalence=0.5))
    versions = {"python": platform.python_version(), "jax_privacy": version("jax_privacy")}
    FIXTURE.write_text(json.dumps({"versions": versions, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
