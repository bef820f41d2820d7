"""arXiv 2405.17512, hate-speech detection with Mistral 7B on D-Lab: subgroups, LoRA against full.

    jax-lowrank study configs/ding_mistral.py:religion    (published hyper-parameters; also age,
                                                           gender, race, sexuality)
    jax-lowrank study configs/ding_mistral.py:ranks       (alpha = 16, r = 1 ... 1024, religion)
    jax-lowrank study configs/ding_mistral.py:modern      (what one would run today, religion)

See ding_llama2.py for what is as published and what is not. In the released code the fractional
ranks of Mistral were plain rank 1 (the chosen layers were overwritten); here they are fractions.
Its value projection has 1,024 outputs: higher ranks, which were published, add nothing there.
"""

import runpy
from pathlib import Path

from jax_lowrank.config import Study

MODEL = "mistralai/Mistral-7B-v0.1"
# subset: (epochs, learning rate) of full fine-tuning, then of LoRA
SELECTED = {
    "age": ((8, 1e-4), (8, 3e-4)),
    "gender": ((4, 1e-5), (2, 3e-4)),
    "race": ((4, 5e-5), (4, 1e-4)),
    "religion": ((2, 1e-5), (4, 3e-4)),
    "sexuality": ((3, 1e-5), (12, 1e-4)),
}
LLAMA = runpy.run_path(str(Path(__file__).with_name("ding_llama2.py")))


def age() -> Study:
    """Posts that target an age."""
    return LLAMA["published"]("age", MODEL, SELECTED)


def gender() -> Study:
    """Posts that target a gender."""
    return LLAMA["published"]("gender", MODEL, SELECTED)


def race() -> Study:
    """Posts that target a race."""
    return LLAMA["published"]("race", MODEL, SELECTED)


def religion() -> Study:
    """Posts that target a religion."""
    return LLAMA["published"]("religion", MODEL, SELECTED)


def sexuality() -> Study:
    """Posts that target a sexuality."""
    return LLAMA["published"]("sexuality", MODEL, SELECTED)


config = religion


def ranks() -> Study:
    """Ranks at alpha 16, and rank 1 on a fraction of the layers."""
    return LLAMA["ranks"](MODEL, tuple(rank for rank in LLAMA["RANKS"] if rank <= 1024))


def modern() -> Study:
    """All linear layers, alpha / sqrt(r), learning rates searched on validation."""
    return LLAMA["modern"](MODEL)
