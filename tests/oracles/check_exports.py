"""Load exports of ours in transformers and PEFT where the two do not share an environment.

First with the package (and pytest), then with torch, transformers and peft:

    python tests/oracles/check_exports.py write DIR
    python tests/oracles/check_exports.py check DIR

The first exports a LoRA run on each tiny model and head in both formats and stores our logits of
adapter and base; the second loads the directories and prints the largest differences. The tests
named `live` do the same where one environment holds both.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
LABELS = ("anger", "joy", "none")
MOST = 1e-5


def write(folder):
    """Runs, their exports and our logits, one folder a model and head."""
    sys.path.insert(0, str(TESTS))
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    from test_export import finetune_run, make_base
    from tiny import FIXTURES, NAMES, apply_of, folder_of, logits_of

    from jax_lowrank import export, models
    from jax_lowrank.models.head import Head

    encoders = [path.name for path in (FIXTURES.parent / "encoders").glob("*_masked-lm")]
    for name in (*NAMES, *sorted(encoders)):
        stored = np.load(folder_of(name) / "oracle.npz")
        tokens = np.maximum(stored["tokens" if "tokens" in stored else "right_tokens"], 2)
        mask = np.ones_like(tokens)
        mask[1, 8:], mask[2, 5:] = 0, 0
        config = models.weights.read_config(folder_of(name))
        pad = config.get("pad_token_id") or 0
        for kind in models.FAMILIES[config["model_type"]].module.HEADS:
            if kind == "embedding":  # no run trains one
                continue
            here = folder / f"{name}_{kind}"
            here.mkdir(parents=True)
            head = Head(kind, LABELS if kind == "classification" else ())
            run, trained = finetune_run(here, make_base(here, name), head=head)
            for format in export.FORMATS:
                export.export(run, format)
            states = (trained.trainable, trained.frozen)
            if kind == "classification":
                ids = np.where(mask > 0, tokens, pad)
                real, logits = mask, apply_of(trained.graphdef)(*states).classify(ids, mask > 0)
            else:
                ids, real = tokens, np.ones_like(tokens)
                logits = logits_of(trained.graphdef, states, ids)
            np.savez(here / "ours.npz", tokens=ids, mask=real, logits=logits, kind=kind)
            print(f"wrote {here}")


def check(folder):
    """Largest difference of every export; 1 when one is above MOST."""
    import torch
    import transformers
    from peft import PeftModel

    classes = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "masked-lm": transformers.AutoModelForMaskedLM,
    }
    transformers.logging.set_verbosity_error()
    worst = 0.0
    for here in sorted(folder.iterdir()):
        ours = dict(np.load(here / "ours.npz"))
        kind = str(ours["kind"])
        extra = {"num_labels": len(LABELS)} if kind == "classification" else {}
        auto = classes[kind]
        base = auto.from_pretrained(next(here.glob("base_*")), **extra)
        loaded = {
            "hf": auto.from_pretrained(here / "mine-hf"),
            "peft": PeftModel.from_pretrained(base, here / "mine-peft"),
        }
        ids, mask = (torch.tensor(ours[name]).long() for name in ("tokens", "mask"))
        gaps = {}
        for format, model in loaded.items():
            with torch.no_grad():
                logits = model.eval()(ids, attention_mask=mask).logits.numpy()
            gaps[format] = float(np.abs(logits - ours["logits"]).max())
        worst = max(worst, *gaps.values())
        print(f"{here.name}: " + ", ".join(f"{k} {v:.1e}" for k, v in gaps.items()))
    print(f"largest difference {worst:.1e}, allowed {MOST:.0e}")
    return int(worst > MOST)


if __name__ == "__main__":
    step, where = sys.argv[1:]
    sys.exit({"write": write, "check": check}[step](Path(where)))
