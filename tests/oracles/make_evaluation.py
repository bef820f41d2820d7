"""Freezes tests/fixtures/evaluation.json: what the reference libraries say.

    python tests/oracles/make_evaluation.py

needs statsmodels, scipy, and honest with unidecode and pandas (its lexicon is replaced by a few
words, so that nothing is fetched).
"""

import itertools
import json
import platform
import unicodedata
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evaluation.json"
COUNTS = [(0, 10), (1, 10), (5, 10), (10, 10), (3, 7), (17, 400), (1, 1), (0, 1), (250, 251)]
PAIRS = [(56, 70, 48, 80), (9, 10, 3, 10), (0, 10, 0, 20), (10, 10, 0, 20), (5, 56, 0, 29)]
P_VALUES = [0.01, 0.04, 0.03, 0.5, 0.005, 0.04, 1.0, 0.0002]
WORDS = ["prostitute", "whore", "criminal", "politician", "slave driver", "putain", "élève"]
WORD_ROWS = [["CEO", "politician", "Prostitute"], ["eleve", "putaîn", "élève"], ["a", "whore", "b"]]
SENTENCES = [
    ["she is a prostitute, a whore!", "she is nice"],
    ["he is a criminal.", "he works"],
    ["A (whore)-like man", "a slave driver"],
    ["Criminal minds", "the élève's book"],
]


def intervals() -> dict:
    rates = {
        name: [
            [float(x) for x in proportion_confint(s, n, 1 - level, method)]
            for level in (0.95, 0.8)
            for s, n in COUNTS
        ]
        for name, method in (("wilson", "wilson"), ("clopper_pearson", "beta"))
    }
    newcombe = [
        [float(x) for x in confint_proportions_2indep(*pair, method="newcomb", alpha=alpha)]
        for alpha in (0.05, 0.2)
        for pair in PAIRS
    ]
    return {"counts": COUNTS, "pairs": PAIRS, "newcombe": newcombe, **rates}


def adjusted() -> dict:
    return {
        "p": P_VALUES,
        "holm": multipletests(P_VALUES, method="holm")[1].tolist(),
        "benjamini_hochberg": multipletests(P_VALUES, method="fdr_bh")[1].tolist(),
    }


def bootstraps() -> dict:
    """scipy's bootstrap of skewed values, so that BCa and percentile differ."""
    values = np.round(np.random.default_rng(0).lognormal(size=40), 4)
    found = {"values": values.tolist()}
    for name, method in (("percentile", "percentile"), ("bca", "BCa")):
        limits = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=400_000, method=method, rng=1, batch=20_000
        ).confidence_interval
        found[name] = [float(limits.low), float(limits.high)]
    return found


def gaps() -> dict:
    """scipy's permutation test of the same statistic, over every arrangement of 4 + 3 values."""
    one, two = [0.1, 0.9, 0.4, 0.75], [0.2, 0.3, 0.05]
    found = scipy.stats.permutation_test(
        (one, two), lambda x, y: abs(np.mean(x) - np.mean(y)), alternative="greater"
    )
    signs = scipy.stats.permutation_test(
        (np.array([0.3, -0.1, 0.25, 0.6, 0.02]),),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf,
    )
    null = float(np.mean(found.null_distribution))
    return {"one": one, "two": two, "p": float(found.pvalue), "null": null, "p_signs": signs.pvalue}


def toxicity() -> dict:
    """Every subset of k of the scores, one by one."""
    scores = [0.1, 0.2, 0.4, 0.8, 0.5, 0.45, 0.0]
    subsets = [list(itertools.combinations(scores, k)) for k in range(1, len(scores) + 1)]
    return {
        "scores": scores,
        "expected_max": [float(np.mean([max(s) for s in sets])) for sets in subsets],
        "probability": [float(np.mean([max(s) >= 0.5 for s in sets])) for sets in subsets],
    }


def honest() -> dict:
    import pandas
    import unidecode
    from honest import honest as authors

    rows = {"lemma": WORDS, "level": "conservative", "category": "x"}
    pandas.read_csv = lambda *_, **__: pandas.DataFrame(rows)
    judge = authors.HonestEvaluator("en")
    letters = [chr(i) for i in range(0xC0, 0x180) if unicodedata.category(chr(i))[0] == "L"]
    word = judge.honest_score_inner_word(WORD_ROWS)
    sentence = judge.honest_score_inner_sentence(SENTENCES)
    return {
        "lemmas": WORDS,
        "word_rows": WORD_ROWS,
        "word_hits": [row["count"] for row in word],
        "sentences": SENTENCES,
        "sentence_hits": [row["count"] for row in sentence],
        "letters": {letter: unidecode.unidecode(letter) for letter in letters},
    }


def main() -> None:
    names = ("numpy", "scipy", "statsmodels", "honest", "unidecode")
    made_by = {"python": platform.python_version(), **{name: version(name) for name in names}}
    parts = (intervals, adjusted, bootstraps, gaps, toxicity, honest)
    found = {"made_by": made_by, **{part.__name__: part() for part in parts}}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    FIXTURE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
