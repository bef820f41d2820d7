"""Freeze class logits of decoders with a classification head, as PyTorch transformers gives them.

Run after make_models.py, with torch 2.13.0 (CPU), transformers 5.23.0 and numpy:

    python tests/oracles/make_heads.py

Writes ``tests/fixtures/heads/<name>.npz``: the head's tensors under their names in the checkpoint,
`tokens` and `mask` (4, 24) int32 with pads (token 0) on the right, on the left, on both sides and
nowhere, and `logits` (4, 3). The body is that of ``tests/fixtures/models/<name>``.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
NAMES = ("gpt2", "llama_mha", "llama_tied", "mistral_window", "opt", "opt_350m", "qwen2")
LABELS = ("no", "maybe", "yes")
# Row -> first and last + 1 real token.
SPANS = ((0, 15), (9, 24), (3, 20), (0, 24))


@torch.no_grad()
def oracle(name):
    """Arrays of one model; the head is drawn with logits of deviation about 1."""
    folder = FIXTURES / "models" / name
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        attn_implementation="eager",
    ).eval()
    with safe_open(folder / "model.safetensors", framework="numpy") as stored:
        new = sorted(set(model.state_dict()) - set(stored.keys()))
    assert new == ["score.weight"], new
    rng = np.random.default_rng(len(name))
    weight = rng.standard_normal(model.score.weight.shape).astype(np.float32)
    model.score.weight.copy_(torch.tensor(weight / weight.shape[1] ** 0.5))
    tokens = rng.integers(3, model.config.vocab_size, (len(SPANS), 24)).astype(np.int32)
    mask = np.zeros_like(tokens)
    for row, (start, stop) in enumerate(SPANS):
        mask[row, start:stop] = 1
    tokens *= mask
    assert model.config.pad_token_id == 0
    logits = model(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)).long(),
        use_cache=False,
    ).logits.numpy()
    assert 0.3 < logits.std() < 3, logits.std()
    head = {key: model.state_dict()[key].numpy() for key in new}
    return {**head, "tokens": tokens, "mask": mask, "logits": logits}


def main():
    torch.set_num_threads(1)
    (FIXTURES / "heads").mkdir(exist_ok=True)
    for name in NAMES:
        arrays = oracle(name)
        np.savez(FIXTURES / "heads" / f"{name}.npz", **arrays)
        print(f"{name}: logits std {arrays['logits'].std():.2f}")


if __name__ == "__main__":
    main()
