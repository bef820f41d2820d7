"""Freeze what PEFT computes with LoRA's options on the tiny Llama: logits and optimizer steps.

Run after make_models.py, with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2 and numpy:

    python tests/oracles/make_peft_options.py

Writes ``peft_options.npz`` into ``tests/fixtures/models/`` (see the README.md there).
"""

import zlib
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
NAME = "llama_tied"
LINEAR = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
STEPS, RATE, DECAY, RATIO = 3, 1e-2, 0.1, 4.0
PATTERNS = {
    "rank_pattern": {"up_proj": 6, "gate_proj": 6, r"mlp\.down_proj": 2},
    "alpha_pattern": {"o_proj": 3.0, "down_proj": 5.0},
}
# case -> options of LoraConfig, whether A and B are drawn (else they stay as initialised), LoRA+
CASES = {
    "patterns": ({**PATTERNS, "use_rslora": True}, True, False),
    "dora": ({"use_dora": True}, True, False),
    "dora_last": ({"use_dora": True, "layers_to_transform": [1]}, True, False),
    "dora_plus": ({"use_dora": True}, True, True),
    "plus": ({}, True, True),
    "pissa": ({"init_lora_weights": "pissa"}, False, False),
    "pissa_dora": ({"init_lora_weights": "pissa", "use_dora": True}, False, False),
    "olora": ({"init_lora_weights": "olora"}, False, False),
}
WATCHED = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of lora_A (r, in) or lora_B (out, r) that follow from the parameter's name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = shape[1] ** -0.5 if "lora_A" in name else 0.05
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def load():
    """The frozen model in f32 with eager attention, and its tokens (3, 24)."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / NAME, attn_implementation="eager")
    return model.eval(), torch.tensor(np.load(FIXTURES / NAME / "oracle.npz")["tokens"]).long()


def kernels(model):
    """Watched weights (out, in), by the end of their names."""
    state = model.state_dict()
    return {w: next(v for k, v in state.items() if k.endswith(f"{w}.weight")) for w in WATCHED}


def adapted(options, draw):
    """The model with its adapters; A and B drawn where asked."""
    model, tokens = load()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if draw and ("lora_A" in name or "lora_B" in name):
            name = name.removeprefix("base_model.model.").replace(".default", "")
            parameter.data.copy_(torch.tensor(drawn(name, parameter.shape)))
    return model, tokens


def mean_loss(model, tokens):
    """Mean cross-entropy of every token but the first, given those before it."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizer(model, plus):
    """AdamW with decay, LoRA+ where asked."""
    options = {"betas": (0.9, 0.999), "eps": 1e-8}
    if plus:
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=RATE,
            loraplus_lr_ratio=RATIO,
            loraplus_weight_decay=DECAY,
            **options,
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY, **options)


def case_arrays(options, draw, plus):
    """Logits before training, losses of the steps, merged logits and some of ΔW after them."""
    base = kernels(load()[0])
    model, tokens = adapted(options, draw)
    with torch.no_grad():
        logits = model(tokens[:1, :8], use_cache=False).logits.numpy()
    optimizer, losses = make_optimizer(model, plus), []
    for _ in range(STEPS):
        loss = mean_loss(model, tokens)
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        merged = model.merge_and_unload()
        losses.append(mean_loss(merged, tokens).item())
        after = kernels(merged)
        last = merged(tokens[:1, :8], use_cache=False).logits.numpy()
    changes = {f"change_{w}": (after[w] - base[w])[:8].numpy() for w in WATCHED}
    return {"logits": logits, "losses": np.array(losses), "merged_logits": last, **changes}


class FixedDropout(torch.nn.Module):
    """Dropout whose mask is given."""

    def __init__(self, keep, rate):
        super().__init__()
        self.keep, self.rate = keep, rate

    def forward(self, x):
        """x where it is kept, scaled up."""
        return x * self.keep / (1 - self.rate)


def dora_dropout_arrays():
    """One DoRA layer in training with a known dropout mask: what goes in and what comes out."""
    model, _ = adapted({"use_dora": True, "lora_dropout": 0.25}, True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.train()
    rng = np.random.default_rng(0)
    x, keep = rng.standard_normal((5, 24)).astype(np.float32), rng.random((5, 24)) > 0.25
    layer.lora_dropout["default"] = FixedDropout(torch.tensor(keep), 0.25)
    with torch.no_grad():
        return {"x": x, "keep": keep, "y": layer(torch.tensor(x)).numpy()}


def make():
    """Every array of the fixture."""
    torch.set_num_threads(1)
    arrays = {}
    for case, spec in CASES.items():
        arrays |= {f"{case}_{key}": value for key, value in case_arrays(*spec).items()}
    return arrays | {f"dropout_{key}": value for key, value in dora_dropout_arrays().items()}


if __name__ == "__main__":
    made = make()
    np.savez_compressed(FIXTURES / "peft_options.npz", **made)
    for key, value in made.items():
        print(key, value.shape, value if value.ndim == 1 else "")
