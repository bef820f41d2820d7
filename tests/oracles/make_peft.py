"""Freeze LoRA logits (PEFT) and three full fine-tuning steps (PyTorch) of the tiny models.

Run after make_models.py, with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2 and numpy:

    python tests/oracles/make_peft.py

Writes ``peft_gpt2.npz``, ``peft_llama_tied.npz`` and ``train_gpt2.npz`` into
``tests/fixtures/models/`` (see the README.md there).
"""

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
RANK, ALPHA = 4, 8
LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama_tied": [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")],
}
TRAIN_STEPS = 3
DECAY = 0.1
# One tensor of each kind: fused attention, norm scale, bias, tied embedding.
WATCHED = {
    "c_attn_weight": "transformer.h.0.attn.c_attn.weight",
    "ln_weight": "transformer.h.1.ln_1.weight",
    "c_fc_bias": "transformer.h.1.mlp.c_fc.bias",
    "wte_weight": "transformer.wte.weight",
}


def load(name):
    """The frozen model in f32 with eager attention, and its tokens (3, 24)."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, attn_implementation="eager")
    tokens = np.load(FIXTURES / name / "oracle.npz")["tokens"]
    return model.eval(), torch.tensor(tokens).long()


def adapted(name, rslora, seed):
    """The model with random LoRA pairs (A and B both drawn) and the adapter's tensors."""
    model, tokens = load(name)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=LINEAR[name],
        use_rslora=rslora,
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            noise = torch.randn(parameter.shape, generator=generator)
            # A: (r, in), B: (out, r); the product then has entries of deviation ~ 0.1 / sqrt(in).
            scale = parameter.shape[1] ** -0.5 if "lora_A" in key else 0.05
            parameter.data.copy_(scale * noise)
    return model, tokens, config


def adapter_config(config, name):
    """adapter_config.json as PEFT writes it, with the model's name in the place of a path."""
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    fields["base_model_name_or_path"] = name
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
    return json.dumps(fields, sort_keys=True, default=str)


@torch.no_grad()
def peft_arrays(name, seed):
    """Adapter tensors and the logits of plain LoRA, its merged weights and rank-stabilised LoRA."""
    model, tokens, config = adapted(name, False, seed)
    state = get_peft_model_state_dict(model)
    base = np.load(FIXTURES / name / "oracle.npz")["logits"]
    logits = model(tokens, use_cache=False).logits.numpy()
    text = adapter_config(config, name)
    adapters = {key: value.clone().numpy() for key, value in state.items()}
    merged = model.merge_and_unload()(tokens, use_cache=False).logits.numpy()
    rslora = adapted(name, True, seed)[0](tokens, use_cache=False).logits.numpy()
    assert np.abs(merged - logits).max() < 1e-4
    assert np.abs(logits - base).max() > 0.1
    assert np.abs(logits - rslora).max() > 0.1
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits,
        "merged_logits": merged,
        "rslora_logits": rslora,
        "adapter_config": np.str_(text),
        **adapters,
    }


def mean_loss(model, tokens):
    """Mean cross-entropy of every token but the first, given those before it."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train_arrays():
    """Three full fine-tuning steps of the tiny GPT-2 on its own tokens, always the same batch."""
    model, tokens = load("gpt2")
    parameters = dict(model.named_parameters())
    decayed = [value for value in parameters.values() if value.ndim >= 2]
    plain = [value for value in parameters.values() if value.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    losses, norms, first = [], [], {}
    for step in range(TRAIN_STEPS):
        loss = mean_loss(model, tokens)
        loss.backward()
        if step == 0:
            first = {f"gradient_{k}": parameters[v].grad.clone() for k, v in WATCHED.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(mean_loss(model, tokens).item())
    assert min(norms) > 1.0, "the clip must be in force"
    after = {f"after_{k}": parameters[v].detach() for k, v in WATCHED.items()}
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "losses": np.array(losses, np.float32),
        "gradient_norms": np.array(norms, np.float32),
        **{key: value.numpy() for key, value in (first | after).items()},
    }


def main():
    torch.set_num_threads(1)
    for seed, name in enumerate(LINEAR, start=1):
        arrays = peft_arrays(name, seed)
        np.savez(FIXTURES / f"peft_{name}.npz", **arrays)
        print(name, {key: value.shape for key, value in arrays.items()})
        print(str(arrays["adapter_config"]))
    arrays = train_arrays()
    np.savez(FIXTURES / "train_gpt2.npz", **arrays)
    print("train", arrays["losses"], arrays["gradient_norms"])


if __name__ == "__main__":
    main()
