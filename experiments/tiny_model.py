"""A tiny random GPT-2 and a file to fine-tune it on, to try the commands with; takes seconds.

    python experiments/tiny_model.py DIR

DIR/base is a Hugging Face directory (2 layers, width 64), DIR/pairs.jsonl and DIR/held-out.jsonl
hold questions with answers: where a thing is depends on the thing, whosever it is.
"""

import json
import sys
from pathlib import Path

import jax

from jax_lowrank import models
from jax_lowrank.models.gpt2 import GPT2Config

PLACES = {"key": "box", "cup": "kitchen", "coat": "hall", "book": "garden", "ball": "car"}
OWNERS = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana", "Ivo", "Jun", "Kim", "Leo")


def pairs(owners):
    """One question and its answer for each thing and owner."""
    return [
        {"prompt": f"Where is the {thing} of {owner}?", "completion": f" In the {place}."}
        for owner in owners
        for thing, place in PLACES.items()
    ]


def tokenizer(texts):
    """Byte-level BPE as GPT-2's, learnt from a few texts."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=end, eos_token=end)


def main(folder):
    """Write the model and the files."""
    base = folder / "base"
    base.mkdir(parents=True)
    files = {"pairs": pairs(OWNERS[:9]), "held-out": pairs(OWNERS[9:])}
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    words = tokenizer([row["prompt"] + row["completion"] for row in pairs(OWNERS)])
    config = GPT2Config(len(words), 2, 64, 4, mlp_width=256, max_positions=256)
    model = models.create("gpt2", config, jax.random.key(0))
    models.save(base, model, model.params)
    words.save_pretrained(base)
    print(f"{base}: {sum(x.size for x in jax.tree.leaves(model.params)):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
