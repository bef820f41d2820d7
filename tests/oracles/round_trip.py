"""A finished run beside its exports, as transformers and PEFT load them.

    pip install -e '.[oracle]'
    python tests/oracles/round_trip.py RUN MERGED ADAPTER

RUN is of a causal language model; MERGED and ADAPTER are its exports, `--format hf` and `peft`.
Prints the largest logit differences, and whether an adapter that PEFT saved again comes back with
the same bits. The exit code is 1 where a difference is above MOST or a bit has changed.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from peft import PeftModel

from jax_lowrank import adapters, models, trained
from jax_lowrank.config_run import LoadSpec

MOST = 1e-4  # of logits in float32


def logits_of(model, tokens):
    """What a PyTorch model says, (B, S, V)."""
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens).long()).logits.numpy()


def main(run, merged, adapter):
    """Compare, print, and return the exit code."""
    transformers.logging.set_verbosity_error()
    ours = trained.load(run, LoadSpec())
    size = ours.model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, size, (8, 32)).astype(np.int32)
    expected = np.asarray(jax.jit(lambda states: ours.apply(*states)(tokens))(ours.states))
    auto = transformers.AutoModelForCausalLM
    base = json.loads((Path(adapter) / "adapter_config.json").read_text())
    base = auto.from_pretrained(base["base_model_name_or_path"])
    worst = 0.0
    with tempfile.TemporaryDirectory() as again:
        plain = logits_of(base, tokens)
        beside = PeftModel.from_pretrained(base, adapter)
        beside.save_pretrained(again)
        loaded = adapters.load(Path(again))
    print(f"the base alone: largest logit difference {np.abs(plain - expected).max():.1e}")
    for name, model in {"transformers": auto.from_pretrained(merged), "PEFT": beside}.items():
        gap = np.abs(logits_of(model, tokens) - expected).max()
        worst = max(worst, gap)
        print(f"{name}: largest logit difference {gap:.1e}")
    one, other = (models.by_path(state) for state in (ours.states[0], loaded.trainable))
    same = one.keys() == other.keys() and all(np.array_equal(one[p], other[p]) for p in one)
    print(f"saved by PEFT and read again: {'the same bits' if same else 'NOT the same bits'}")
    return int(worst > MOST or not same)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
