"""A tiny checkpoint with a tokenizer, and files to fine-tune it on; made in seconds."""

import json

import jax

from jax_lowrank import models

TEXT = """
the a cat dog bird key box is was in on good bad red blue big small where what who i you we see
hear like not yes no . ? user assistant : very here there now
"""
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(*, chat=False, bos=True):
    """One token a word; <eos> also begins a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<end>"]
    ids = {word: number for number, word in enumerate((*special, *WORDS))}
    inner = Tokenizer(kinds.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(cleanup=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>" if bos else None,
        unk_token="<unk>",
        additional_special_tokens=special[3:],
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def checkpoint(directory, *, chat=False, family="gpt2", seed=0):
    """A Hugging Face directory of a decoder with 2 layers of width 16 and 48 positions."""
    words = tokenizer(chat=chat)
    sizes = {"vocab_size": len(words), "num_layers": 2, "width": 16, "num_heads": 2}
    sizes |= {"mlp_width": 32, "max_positions": 48}
    config = models.family_of(family).config(**sizes)
    model = models.create(family, config, jax.random.key(seed))
    models.save(directory, model, model.params)
    words.save_pretrained(directory)
    return directory


def encoder(directory, family="bert", seed=0):
    """The same of an encoder, whose tokenizer begins and ends a text and has a mask token."""
    from tokenizers.processors import TemplateProcessing

    words = tokenizer()
    words.add_special_tokens({"mask_token": "<mask>"})
    ends = [("<eos>", words.eos_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=ends
    )
    sizes = {"vocab_size": len(words), "num_layers": 2, "width": 16, "num_heads": 2}
    sizes |= {"mlp_width": 32, "max_positions": 24, "pad_id": words.pad_token_id}
    config = models.family_of(family).config(**sizes, model_type=family)
    model = models.create(family, config, jax.random.key(seed), head=models.Head("masked-lm"))
    models.save(directory, model, model.params)
    words.save_pretrained(directory)
    return directory


def jsonl(path, rows):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(number=24):
    """Prompts with completions that can be learnt."""
    animals, answers = ("cat", "dog", "bird"), (" box .", " key .", " very good .")
    return [
        {
            "prompt": f"where is the {animals[i % 3]} {WORDS[10 + i % 14]}",
            "completion": answers[i % 3],
        }
        for i in range(number)
    ]


def labelled(number=40):
    """Different texts of one length, with a class that their last word tells."""
    return [
        {
            "text": f"the {WORDS[i % 20]} {WORDS[20 + i // 20]} is {'good' if i % 2 else 'bad'}",
            "label": "pos" if i % 2 else "neg",
        }
        for i in range(number)
    ]


def chats(number=12):
    """Two turns each."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"where is the {WORDS[2 + i % 4]} ?"},
                {"role": "assistant", "content": "in the box ."},
                {"role": "user", "content": f"what {WORDS[20 + i % 5]}"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(number)
    ]
