"""Freeze adapters that PEFT itself made and saved, and the logits that it computes with them.

Run after make_models.py, with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2 and numpy:

    python tests/oracles/make_adapters.py [CASE ...]

Writes ``tests/fixtures/adapters/<case>/``: adapter_config.json and adapter_model.safetensors as
``save_pretrained`` writes them (the base model's path is made its fixture's name), and oracle.npz
with `tokens`, `logits` and, where there are pads, `mask`. All factors, magnitudes and heads are
random.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
ENCODERS = ("bert", "roberta", "distilbert")
CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "FEATURE_EXTRACTION": AutoModel,
    None: AutoModelForMaskedLM,
}
NUM_LABELS = 3
# Less would not show that the adapter is there.
LEAST_EFFECT = 0.05
# case -> (base fixture, fields of LoraConfig)
CASES = {
    "gpt2_patterns": (
        "gpt2",
        {
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "target_modules": ["c_attn", "mlp.c_proj"],
            "rank_pattern": {"c_attn": 2},
            "alpha_pattern": {r"h\.\d+\.mlp\.c_proj": 3},
            "fan_in_fan_out": True,
        },
    ),
    "llama_layers": (
        "llama_tied",
        {
            "task_type": "CAUSAL_LM",
            "r": 3,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "mistral_regex": (
        "mistral_window",
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 5,
            "target_modules": r".*\.(gate|up)_proj",
            "init_lora_weights": "gaussian",
        },
    ),
    "gpt2_classifier": (
        "gpt2",
        {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "target_modules": ["attn.c_proj"]},
    ),
    "llama_dora": (
        "llama_bias",
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "down_proj"],
            "use_dora": True,
        },
    ),
    # Its pooler is a linear layer outside the blocks.
    "bert_all_linear": (
        "bert_classification",
        {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    ),
    "bert_masked": (
        "bert_masked-lm",
        {"r": 2, "lora_alpha": 4, "target_modules": ["query", "output.dense"]},
    ),
    "bert_features": (
        "bert_embedding",
        {"task_type": "FEATURE_EXTRACTION", "r": 2, "lora_alpha": 4, "target_modules": ["value"]},
    ),
    "roberta_classifier": (
        "roberta_masked-lm",
        {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "target_modules": ["key", "value"]},
    ),
    "distilbert_classifier": (
        "distilbert_masked-lm",
        {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 4, "target_modules": ["q_lin", "lin2"]},
    ),
    # Its projections in and out are linear layers outside the blocks.
    "opt_all_linear": (
        "opt_350m",
        {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    ),
    "qwen2_classifier": (
        "qwen2",
        {
            "task_type": "SEQ_CLS",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj", "gate_proj"],
            "use_rslora": True,
            "rank_pattern": {"gate_proj": 3},
        },
    ),
    "qwen2_dora_last": (
        "qwen2_window",
        {
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["k_proj", "up_proj"],
            "use_dora": True,
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
}


def folder_of(name):
    """Where a base fixture is."""
    return FIXTURES / ("encoders" if name.startswith(ENCODERS) else "models") / name


def load_base(name, task_type):
    """The frozen model with the head of a task."""
    extra = {"num_labels": NUM_LABELS} if task_type == "SEQ_CLS" else {}
    torch.manual_seed(0)
    return CLASSES[task_type].from_pretrained(folder_of(name), attn_implementation="eager", **extra)


def randomise(model, seed):
    """Draw every tensor that PEFT would save, magnitudes near where they are."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in key:
            parameter.data.mul_(1 + 0.2 * noise)
        elif "lora_A" in key:
            parameter.data.copy_(noise * parameter.shape[1] ** -0.5)
        elif "lora_B" in key:
            parameter.data.copy_(0.2 * noise)
        elif "modules_to_save" in key:
            parameter.data.copy_(0.3 * noise)


def inputs_of(name, task_type):
    """Tokens (3, S) of the fixture and their mask; an encoder's and a classifier's have pads."""
    oracle = np.load(folder_of(name) / "oracle.npz")
    if name.startswith(ENCODERS):
        return oracle["right_tokens"], oracle["right_mask"]
    tokens = oracle["tokens"]
    mask = np.ones_like(tokens)
    if task_type == "SEQ_CLS":
        for row, pads in enumerate((0, 5, 11)):
            mask[row, tokens.shape[1] - pads :] = 0
        tokens = tokens * mask  # the pad is token 0, which the fixtures' tokens never are
    return tokens, mask


@torch.no_grad()
def logits_of(model, tokens, mask):
    """Logits in f32, or of a body alone its last states."""
    tokens, mask = torch.tensor(tokens).long(), torch.tensor(mask).long()
    return model(tokens, attention_mask=mask)[0].numpy()


def make(case, seed):
    """Write one fixture folder."""
    name, fields = CASES[case]
    task_type = fields.get("task_type")
    base = load_base(name, task_type)
    tokens, mask = inputs_of(name, task_type)
    before = logits_of(base.eval(), tokens, mask)
    model = get_peft_model(base, LoraConfig(**fields)).eval()
    randomise(model, seed)
    logits = logits_of(model, tokens, mask)
    effect = np.abs(logits - before).max()
    assert effect > LEAST_EFFECT, (case, effect)
    folder = FIXTURES / "adapters" / case
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written)
        again = PeftModel.from_pretrained(load_base(name, task_type), written).eval()
        assert np.array_equal(logits_of(again, tokens, mask), logits), case
        folder.mkdir(parents=True)
        config = json.loads((Path(written) / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = name
        config = {
            k: sorted(v) if k == "target_modules" and v == list(v) else v for k, v in config.items()
        }
        (folder / "adapter_config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n"
        )
        shutil.copyfile(
            Path(written) / "adapter_model.safetensors", folder / "adapter_model.safetensors"
        )
    arrays = {"tokens": tokens, "logits": logits}
    if not mask.all():
        arrays["mask"] = mask
    np.savez_compressed(folder / "oracle.npz", **arrays)
    print(f"{case}: logits {logits.shape}, largest effect of the adapter {effect:.2f}")


def main():
    torch.set_num_threads(1)
    for seed, case in enumerate(CASES, start=1):
        if not sys.argv[1:] or case in sys.argv[1:]:
            make(case, seed)


if __name__ == "__main__":
    main()
