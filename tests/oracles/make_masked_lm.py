"""Freeze the masked-lm loss of transformers, and its gradients, on the tiny encoders.

Run with torch 2.13.0 (CPU), transformers 5.23.0 and numpy, after make_encoders.py:

    python tests/oracles/make_masked_lm.py

Writes tests/fixtures/encoders/masked_lm.npz. Of each family: tokens and labels (-100 where nothing
is predicted, as in transformers), the mean loss, and the gradient of the token table (which is the
output layer too) and of block 0's query weight.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForMaskedLM

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "encoders"
QUERY = {
    "bert": "bert.encoder.layer.0.attention.self.query.weight",
    "roberta": "roberta.encoder.layer.0.attention.self.query.weight",
    "distilbert": "distilbert.transformer.layer.0.attention.q_lin.weight",
}
PLACES = ((1, 4, 10), (2,), (0,))  # hidden places of rows with 12, 7 and 3 tokens


def main():
    """All three families in one file."""
    out = {}
    for family, query in QUERY.items():
        folder = FIXTURES / f"{family}_masked-lm"
        model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
        with np.load(folder / "oracle.npz") as stored:
            tokens, mask = stored["right_tokens"].copy(), stored["right_mask"]
        labels = np.full(tokens.shape, -100)
        for row, places in enumerate(PLACES):
            labels[row, list(places)] = tokens[row, list(places)]
            tokens[row, places[0]] = 3  # stands for the mask token; the others stay
        loss = model(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            labels=torch.tensor(labels).long(),
        ).loss
        loss.backward()
        arrays = {
            "tokens": tokens,
            "mask": mask,
            "labels": labels,
            "loss": loss.detach().numpy(),
            "table": model.get_input_embeddings().weight.grad.numpy(),
            "query": dict(model.named_parameters())[query].grad.numpy(),
        }
        out |= {f"{family}_{name}": value for name, value in arrays.items()}
    np.savez_compressed(FIXTURES / "masked_lm.npz", **out)


if __name__ == "__main__":
    main()
