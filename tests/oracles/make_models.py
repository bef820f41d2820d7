"""Freeze tiny random models and what PyTorch transformers computes with them.

Run with torch 2.13.0 (CPU), transformers 5.23.0 and numpy:

    python tests/oracles/make_models.py

Writes ``tests/fixtures/models/<name>/`` (see the README.md there). Every parameter, norms and
biases included, is drawn away from its neutral value, so that a forgotten bias or a scale of one
cannot go unnoticed. Seeds are fixed: a second run on the same versions gives the same bytes.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
SEQUENCE = 24
PADDING = (0, 5, 11)
NEW_TOKENS = 16
# A greedy choice closer than this could flip with another order of summation.
LEAST_GREEDY_MARGIN = 2e-3
# A model that repeats itself would hide a wrong cache.
LEAST_GREEDY_TOKENS = 8
# Half of one per cent of a typical logit: less would not show that a config field is in force.
LEAST_EFFECT = 5e-3

COMMON = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"}
LLAMA = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    **COMMON,
)
GQA = dict(LLAMA, num_key_value_heads=2)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# With 3 frequencies (head_dim 6) and theta 20 the wavelengths are 6.3, 17.1 and 46.3: one is kept,
# one is blended and one is divided by the factor (the bounds are 32/4 = 8 and 32/1 = 32).
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 20.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def configs():
    """Name -> config of every frozen model."""
    gpt2 = GPT2Config(
        vocab_size=97,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **COMMON,
    )
    opt = dict(
        vocab_size=71,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
        dropout=0.0,
        **COMMON,
    )
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    return {
        "gpt2": gpt2,
        "llama_mha": LlamaConfig(**LLAMA, num_key_value_heads=4, tie_word_embeddings=False),
        "llama_llama3": LlamaConfig(**GQA, rope_parameters=LLAMA3_ROPE),
        "llama_tied": LlamaConfig(**GQA, head_dim=8, tie_word_embeddings=True),
        "llama_linear": LlamaConfig(**GQA, rope_parameters=linear),
        "llama_bias": LlamaConfig(**GQA, attention_bias=True, mlp_bias=True),
        "mistral_window": MistralConfig(**GQA, sliding_window=8, rope_parameters=PLAIN_ROPE),
        "mistral_full": MistralConfig(**GQA, sliding_window=None, rope_parameters=PLAIN_ROPE),
        "opt": OPTConfig(**opt),
        "opt_350m": OPTConfig(**opt, word_embed_proj_dim=24, do_layer_norm_before=False),
        "opt_bare": OPTConfig(
            **opt,
            enable_bias=False,
            _remove_final_layer_norm=True,
            activation_function="gelu",
            tie_word_embeddings=False,
        ),
        "qwen2": Qwen2Config(**GQA, tie_word_embeddings=True),
        "qwen2_window": Qwen2Config(
            **GQA, use_sliding_window=True, sliding_window=8, max_window_layers=0
        ),
    }


def random_model(config, seed):
    """The config's causal LM in f32 with every parameter random and logits of deviation ~1."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    # No end of sequence: the greedy tokens are to fill their whole array.
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(seed)
    width = config.hidden_size
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            neutral = 1.0 if name.endswith("weight") else 0.0
            value = neutral + 0.3 * noise
        elif "wpe" in name or "embed_positions" in name:
            value = 0.5 * noise / math.sqrt(width)
        elif any(part in name for part in ("wte", "embed_tokens", "lm_head")):
            value = noise / math.sqrt(parameter.shape[1])
            if "lm_head" in name and getattr(config, "_remove_final_layer_norm", False):
                value = 0.25 * value  # what it reads has not been normed
        else:
            # GPT-2's Conv1D stores (in, out), nn.Linear (out, in).
            fan_in = parameter.shape[0 if config.model_type == "gpt2" else 1]
            value = 1.5 * noise / math.sqrt(fan_in)
        parameter.data.copy_(value)
    return model


def left_batch(tokens):
    """Tokens moved right behind 0, 5 and 11 pads, their mask and their positions."""
    left = np.zeros_like(tokens)
    mask = np.zeros_like(tokens)
    for row, pads in enumerate(PADDING):
        left[row, pads:] = tokens[row, : SEQUENCE - pads]
        mask[row, pads:] = 1
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    return left, mask, positions


@torch.no_grad()
def oracle(model, seed):
    """Arrays of one model: forward, left-padded forward, hidden states and greedy tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, model.config.vocab_size, (3, SEQUENCE)).astype(np.int32)
    left, mask, positions = left_batch(tokens)
    full = model(torch.tensor(tokens).long(), output_hidden_states=True, use_cache=False)
    padded = model(
        torch.tensor(left).long(),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(positions).long(),
        use_cache=False,
    )
    grown = model.generate(
        torch.tensor(left).long(),
        attention_mask=torch.tensor(mask).long(),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(grown.logits).topk(2, dim=-1).values
    states = full.hidden_states
    # What OPT 350M projects out is narrower than what is between its blocks.
    narrow = states[-1].shape != states[0].shape
    return {
        "tokens": tokens,
        "logits": full.logits.numpy(),
        "left_tokens": left,
        "left_mask": mask,
        "left_positions": positions,
        "left_logits": padded.logits.numpy(),
        "hidden": torch.stack(states[:-1] if narrow else states).numpy(),
        **({"final": states[-1].numpy()} if narrow else {}),
        "greedy": grown.sequences[:, SEQUENCE:].numpy().astype(np.int32),
        "greedy_margin": np.float32((best[..., 0] - best[..., 1]).min()),
    }


@torch.no_grad()
def effect(model, tokens, **changed):
    """Largest logit difference when the config has `changed` instead."""
    config = type(model.config)(**{**model.config.to_dict(), **changed})
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict(), strict=False)
    ids = torch.tensor(tokens).long()
    return float((model(ids).logits - other(ids).logits).abs().max())


@torch.no_grad()
def uncached_greedy(model, arrays):
    """The greedy tokens again from one forward pass over the whole rows, without a cache."""
    ids = torch.tensor(np.concatenate([arrays["left_tokens"], arrays["greedy"]], axis=1)).long()
    mask = torch.tensor(arrays["left_mask"]).long()
    mask = torch.cat([mask, torch.ones(3, NEW_TOKENS, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits.argmax(-1)[:, SEQUENCE - 1 : -1].numpy()


def check(name, model, arrays):
    """Refuse a fixture that would let a wrong implementation pass."""
    assert np.array_equal(uncached_greedy(model, arrays), arrays["greedy"]), name
    logits, left = arrays["logits"], arrays["left_logits"]
    assert 0.5 < logits.std() < 2.0, (name, logits.std())
    assert arrays["greedy"].shape == (3, NEW_TOKENS), name
    for row, pads in enumerate(PADDING):
        gap = np.abs(left[row, pads:] - logits[row, : SEQUENCE - pads]).max()
        assert gap < 1e-4, (name, row, gap)
    changes = {
        "llama_llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
        "llama_linear": {"rope_parameters": PLAIN_ROPE},
        "mistral_window": {"sliding_window": None},
        "opt": {"_remove_final_layer_norm": True},
        "opt_350m": {"do_layer_norm_before": True, "_remove_final_layer_norm": True},
        "qwen2_window": {"use_sliding_window": False, "sliding_window": None, "layer_types": None},
    }
    if name in changes:
        difference = effect(model, arrays["tokens"], **changes[name])
        assert difference > LEAST_EFFECT, (name, difference)
        return difference
    return float("nan")


def settled(config, first_seed):
    """Model and arrays of the first seed with varied greedy tokens, none of them a near tie."""
    for seed in range(first_seed, first_seed + 50):
        model = random_model(config, seed)
        arrays = oracle(model, seed)
        varied = np.unique(arrays["greedy"]).size >= LEAST_GREEDY_TOKENS
        if varied and arrays["greedy_margin"] > LEAST_GREEDY_MARGIN:
            return model, arrays
    raise RuntimeError(
        f"no seed in {first_seed}..{first_seed + 49} with varied tokens and no near tie"
    )


def save(model, folder, **options):
    """save_pretrained without the generation config, which nothing reads."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)


@torch.no_grad()
def save_v4_config(folder, arrays):
    """The same config as transformers 4 wrote it; checked by loading the model through it."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["transformers_version"] = "4.45.0"
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config_v4.json").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=LlamaConfig.from_dict(json.loads(text)), attn_implementation="eager"
    )
    logits = model(torch.tensor(arrays["tokens"]).long()).logits.numpy()
    assert np.array_equal(logits, arrays["logits"])


def main():
    torch.set_num_threads(1)
    for index, (name, config) in enumerate(configs().items()):
        model, arrays = settled(config, 100 * (index + 1))
        difference = check(name, model, arrays)
        folder = FIXTURES / name
        save(model, folder)
        np.savez(folder / "oracle.npz", **arrays)
        if name == "llama_llama3":
            save_v4_config(folder, arrays)
        if name in ("llama_llama3", "llama_tied"):
            save(model, FIXTURES / f"{name}_sharded", max_shard_size="20KB")
        print(
            f"{name}: logits std {arrays['logits'].std():.2f}, least greedy margin "
            f"{arrays['greedy_margin']:.4f}, effect of its special field {difference:.3f}"
        )


if __name__ == "__main__":
    main()
