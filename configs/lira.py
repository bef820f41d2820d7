"""Does LoRA remember its training rows less than full fine-tuning? LiRA on a real encoder.

    jax-lowrank study configs/lira.py             (28 to 39 minutes on 2 CPU cores)
    jax-lowrank study configs/lira.py:smoke       (2 minutes)
    jax-lowrank study configs/lira.py:published   (offline, 16 shadows, as in arXiv 2405.17512,
                                                   but each on as many rows as its target: 160)

The membership part of arXiv 2405.17512, on HateXplain with all-MiniLM-L6-v2: LoRA r = 8 and full
fine-tuning of 160 rows, three targets each. The attacks are asked about these rows and 160 test
rows; every shadow trains on a random half of the 320, with its target's own method and learning
rate. Posts are cut at 32 tokens, or the 139 runs would take longer. Groups with 10 members and 10
others are shown: their intervals are wide.

Data and encoder: see hate_speech.py.
"""

import dataclasses
import runpy
from pathlib import Path

from jax_lowrank.config import MembershipSpec, MethodSpec, Study

HATE_SPEECH = runpy.run_path(str(Path(__file__).with_name("hate_speech.py")))
METHODS = (
    MethodSpec("lora", (1e-3, 3e-3), rank=8, alpha=16.0),
    MethodSpec("full", (1e-4, 3e-4)),
)


def config() -> Study:
    """64 LoRA shadows, 64 of full fine-tuning, online."""
    return audited("lira", 160, MembershipSpec(shadows=64))


def published() -> Study:
    """16 shadows of 160 rows each, none of them audited."""
    return audited("lira_published", 160, MembershipSpec(protocol="published"))


def smoke() -> Study:
    """Does it all run? Four shadows on 40 rows; finds nothing out."""
    whole = audited("lira_smoke", 40, MembershipSpec(shadows=4), max_rows=400)
    methods = (dataclasses.replace(METHODS[0], learning_rates=(3e-3,)),)
    train = dataclasses.replace(whole.train, epochs=1)
    return dataclasses.replace(whole, methods=methods, train=train, seeds=(1,))


def audited(name: str, rows: int, membership: MembershipSpec, max_rows: int = 0) -> Study:
    """The hate-speech study of `rows` training rows, with an audit; max_rows: 0, all."""
    study: Study = HATE_SPEECH["study"](
        name,
        methods=METHODS,
        seeds=(1, 2, 3),
        rows={
            "validation_fraction": 0.0125,
            "test_fraction": 0.5,
            "max_train": rows,
            "max_rows": max_rows,
        },
        epochs=3,
    )
    train = dataclasses.replace(study.train, max_length=32)
    evaluate = dataclasses.replace(study.evaluate, minimum=10)
    question = "Does LoRA remember its training rows less than full fine-tuning does?"
    return dataclasses.replace(
        study, question=question, train=train, evaluate=evaluate, membership=membership
    )
