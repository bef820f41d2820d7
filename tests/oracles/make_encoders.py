"""Freeze tiny random encoders, one a family and head, and what PyTorch transformers computes.

Run with torch 2.13.0 (CPU), transformers 5.23.0 and numpy:

    python tests/oracles/make_encoders.py

Writes ``tests/fixtures/encoders/<family>_<head>/``: the checkpoint as `save_pretrained` leaves it,
and oracle.npz (see the README.md there). Every parameter is drawn away from its neutral value.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import BertConfig, DistilBertConfig, RobertaConfig

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "encoders"
LENGTHS = (12, 7, 3)  # real tokens of each row
LABELS = ("no", "maybe", "yes")
HEADS = {
    "embedding": "Model",
    "masked-lm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
}
CLASSES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "dtype": "float32",
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: i for i, label in enumerate(LABELS)},
}


def configs():
    """Family -> config. RoBERTa's blocks have relu, to see that its masked-lm head has gelu."""
    roberta = {"hidden_act": "relu", "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    distil = {k: v for k, v in SIZES.items() if not k.startswith(("hidden", "num_", "inter"))}
    distil |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    return {
        "bert": BertConfig(**SIZES, max_position_embeddings=20, type_vocab_size=2),
        "roberta": RobertaConfig(**SIZES, max_position_embeddings=22, **roberta),
        "distilbert": DistilBertConfig(**distil, max_position_embeddings=20),
    }


def random_model(config, family, head):
    """A model with every parameter random and outputs of deviation about 1."""
    cls = getattr(transformers, CLASSES[family] + HEADS[head])
    model = cls._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(family) + 100 * len(head))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = (1.0 if name.endswith("weight") else 0.0) + 0.3 * noise
        elif "embeddings" in name:
            value = 0.5 * noise
        else:
            value = 1.5 * noise / math.sqrt(parameter.shape[1])
        parameter.data.copy_(value)
    return model


def batches(config, seed):
    """Tokens with pads on the right and on the left, with masks, positions and token types."""
    rng = np.random.default_rng(seed)
    size = max(LENGTHS)
    texts = [rng.integers(3, config.vocab_size, n) for n in LENGTHS]
    out = {}
    for side in ("right", "left"):
        tokens = np.full((len(LENGTHS), size), config.pad_token_id, np.int32)
        mask, types = np.zeros_like(tokens), np.zeros_like(tokens)
        for row, text in enumerate(texts):
            place = slice(0, len(text)) if side == "right" else slice(size - len(text), size)
            tokens[row, place], mask[row, place] = text, 1
            types[row, place] = np.arange(len(text)) >= len(text) // 2
        out |= {f"{side}_tokens": tokens, f"{side}_mask": mask, f"{side}_types": types}
    return out


@torch.no_grad()
def run(model, family, arrays, side, types):
    """Outputs of one batch: embeddings, block 0's attention, states of the blocks, and the head's.

    Positions count real tokens: RoBERTa does so itself, the others are told.
    """
    inputs = {
        "input_ids": torch.tensor(arrays[f"{side}_tokens"]).long(),
        "attention_mask": torch.tensor(arrays[f"{side}_mask"]).long(),
    }
    if family != "roberta":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if types:
        inputs["token_type_ids"] = torch.tensor(arrays[f"{side}_types"]).long()
    body = getattr(model, family, model)
    layers = body.transformer.layer if family == "distilbert" else body.encoder.layer
    attention = layers[0].attention
    dense = attention.out_lin if family == "distilbert" else attention.output.dense
    kept = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
        for name, module in (("embeddings", body.embeddings), ("attention", dense))
    ]
    out = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    kept["states"] = torch.stack(out.hidden_states)
    if getattr(out, "pooler_output", None) is not None:
        kept["pooler"] = out.pooler_output
    if hasattr(out, "logits"):
        kept["logits"] = out.logits
    return {f"{side}_{name}": value.numpy() for name, value in kept.items()}


def oracle(model, family, head):
    """All arrays of one model. What is read from column 0 means nothing with pads on the left."""
    arrays = batches(model.config, len(family))
    out = {**arrays, **run(model, family, arrays, "right", False)}
    out |= run(model, family, arrays, "left", False)
    if head == "classification":
        del out["left_logits"]
    out.pop("left_pooler", None)
    if family == "bert":
        typed = run(model, family, arrays, "right", True)
        last = "logits" if "right_logits" in typed else "states"
        out["typed_" + last] = typed["right_" + last]
    return out


@torch.no_grad()
def check(model, family, arrays):
    """Refuse a fixture that would let a wrong implementation pass."""
    states, left = arrays["right_states"], arrays["left_states"]
    assert 0.5 < states.std() < 2.0, states.std()
    for row, n in enumerate(LENGTHS):
        gap = np.abs(states[:, row, :n] - left[:, row, max(LENGTHS) - n :]).max()
        assert gap < 1e-4, (family, row, gap)
    field = "activation" if family == "distilbert" else "hidden_act"
    changed = type(model.config)(**{**model.config.to_dict(), field: "gelu_new"})
    other = type(model)._from_config(changed, attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    gap = np.abs(run(other, family, arrays, "right", False)["right_states"] - states).max()
    assert gap > 3e-4, (family, gap)
    return gap


def main():
    torch.set_num_threads(1)
    for family, config in configs().items():
        for head in HEADS:
            model = random_model(config, family, head)
            arrays = oracle(model, family, head)
            gap = check(model, family, arrays)
            folder = FIXTURES / f"{family}_{head}"
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder)
            np.savez(folder / "oracle.npz", **arrays)
            std = arrays["right_states"].std()
            print(f"{folder.name}: states std {std:.2f}, effect of tanh in gelu {gap:.5f}")


if __name__ == "__main__":
    main()
