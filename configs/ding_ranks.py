"""What does the rank do, from none to the full one, when alpha stays, follows it, or its root?

    jax-lowrank study configs/ding_ranks.py           (311 runs; some hours on 2 CPU cores)
    jax-lowrank study configs/ding_ranks.py:smoke     (48 runs; 3 minutes)
    jax-lowrank study configs/ding_ranks.py:audited   (and LiRA: 192 shadow models more)

The rank sweep of arXiv 2405.17512, with its fractional ranks, on the rows of hate_speech.py:
all-MiniLM-L6-v2 (width 384) on HateXplain. Rank 0 is head-only training, full fine-tuning is
beside it. Alpha is 16 (as published), 2 r, or 16 under rsLoRA's scale alpha / sqrt(r): a rank that
two of these give is one method. Rank 1 in a quarter, a half and three quarters of the layers is
what the paper calls a rank below 1.

`python experiments/ding_ranks.py results/ding_ranks --out DIR` draws it. Data and encoder: see
hate_speech.py.
"""

import dataclasses
import runpy
from collections.abc import Sequence
from pathlib import Path

from jax_lowrank.config import MembershipSpec, MethodSpec, Study

HATE_SPEECH = runpy.run_path(str(Path(__file__).with_name("hate_speech.py")))
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384)
FRACTIONS = (0.25, 0.5, 0.75)
LORA_RATES = HATE_SPEECH["LORA_RATES"]
HEAD = MethodSpec("head", HATE_SPEECH["HEAD_RATES"])
FULL = MethodSpec("full", HATE_SPEECH["FULL_RATES"])


def config() -> Study:
    """Ten ranks under three rules for alpha, rank 1 in parts of the layers; five seeds."""
    methods = (HEAD, *ranks(RANKS, LORA_RATES), *fractions(FRACTIONS, LORA_RATES), FULL)
    return study("ding_ranks", methods, (1, 2, 3, 4, 5), {"max_train": 800}, 2)


def audited() -> Study:
    """The ranks at alpha = 16 among them audited: 16 shadows of each, on halves of 1,600 rows."""
    whole = config()
    shown = [m.label for m in whole.methods if m.name != "lora" or is_published(m)]
    audit = MembershipSpec(shadows=16, methods=tuple(shown))
    return dataclasses.replace(whole, name="ding_ranks_audited", membership=audit)


def smoke() -> Study:
    """Does it all run? Ranks 0, 1 and 384, one learning rate, 32 rows; finds nothing out."""
    rates = LORA_RATES[-1:]
    methods = (
        dataclasses.replace(HEAD, learning_rates=HEAD.learning_rates[:1]),
        *ranks((1, 384), rates),
        *fractions((0.5,), rates, ("first",)),
        dataclasses.replace(FULL, learning_rates=FULL.learning_rates[-1:]),
    )
    return study("ding_ranks_smoke", methods, (1, 2), {"max_train": 32, "max_rows": 200}, 1)


def ranks(numbers: Sequence[int], rates: tuple[float, ...]) -> list[MethodSpec]:
    """LoRA of these ranks with alpha = 16, alpha = 2 r, and rsLoRA; none of them twice."""
    found = [MethodSpec("lora", rates, rank=r, alpha=16.0) for r in numbers]
    found += [MethodSpec("lora", rates, rank=r, alpha=2.0 * r) for r in numbers if r != 8]
    found += [MethodSpec("lora", rates, rank=r, alpha=16.0, rslora=True) for r in numbers if r > 1]
    return found


def fractions(
    shares: Sequence[float],
    rates: tuple[float, ...],
    places: Sequence[str] = ("first", "last", "random"),
) -> list[MethodSpec]:
    """Rank 1 on these shares of the layers: the first, the last, or some drawn by the seed."""
    return [
        MethodSpec("lora", rates, rank=1, alpha=16.0, layer_fraction=share, layers=place)
        for share in shares
        for place in places
    ]


def is_published(method: MethodSpec) -> bool:
    """Whether it is a rank at alpha = 16 on all layers."""
    return method.alpha == 16.0 and not method.rslora and method.layer_fraction == 1.0


def study(
    name: str,
    methods: tuple[MethodSpec, ...],
    seeds: tuple[int, ...],
    rows: dict[str, float],
    epochs: int,
) -> Study:
    """The hate-speech study of these methods; rows: how many go where."""
    made: Study = HATE_SPEECH["study"](
        name,
        methods=methods,
        seeds=seeds,
        rows={"validation_fraction": 0.1, "test_fraction": 0.5, **rows},
        epochs=epochs,
    )
    question = "What does LoRA's rank do to the communities that posts target?"
    return dataclasses.replace(made, question=question)
