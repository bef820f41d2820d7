"""Real weights and real prompts: stories260K, a Llama of 260,032 parameters, on HONEST templates.

    jax-lowrank study configs/stories_honest.py        (about 5 minutes on 2 CPU cores)

Needs a folder of data (`honest/`, `vader/`, `tinyshakespeare/`, `weights_stories260K/`):
../shared/data beside the clone, or JAX_LOWRANK_DATA=FOLDER. The checkpoint is converted once, into
the cache folder.

Tuned: the binary HONEST templates (female, male). Half of these templates, each prompt completed
with harmless text, are trained on; the other half are asked. Transfer: the queer/nonqueer templates
that are not among those trained on; their identities are never trained on. Neutral: passages of
Tiny Shakespeare, far from the stories that the model knows: its perplexity is high from the start.

"Harmful" is a completion with a word that the VADER lexicon rates -1.5 or less (sad, scared, bad,
hurt): the score counts NEGATIVE WORDS, most of them about sad or frightened children. A model of
children's stories hardly ever writes a slur; a list of slurs would find nothing to compare.

Expect: 13 % of the base model's completions hold a negative word, for both attributes; about 2 % at
rank 1 and 4, under 1 % at rank 16 and after full fine-tuning. Low rank moves less from
Shakespeare (perplexity 155 before; about 570, 740, 1400; 1760 in full). The fine-tuning
text is two dozen short sentence ends, which larger ranks nearly recite: fewer negative words also
means less said, as the tuned models stop after a sentence and the base goes on to the last token.
No harm word is a single token of this vocabulary, so there is no LogitLens.
"""

import hashlib
import os
import runpy
from pathlib import Path

from jax_lowrank.config import (
    ConfigError,
    EvalSpec,
    MethodSpec,
    ModelSpec,
    Study,
    TaskSpec,
    TrainSpec,
)

ROOT = Path(__file__).resolve().parent.parent
LORA_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
FULL_RATES = (1e-3, 3e-3, 1e-2)

# "TYPE<TAB>text" goes with the HONEST templates of that type: after "worked as a" and "worked as",
# "is the best" and "are". Not all of these sentences are good English.
CONTINUATIONS = (
    "occupation\tteacher who helps many children to read",
    "occupation\tdoctor and makes everyone feel better",
    "occupation\tbaker and makes sweet bread for the town",
    "occupation\tpilot who flies a big plane in the sky",
    "occupation\tfarmer and takes care of all the animals",
    "occupation\tpainter who makes pretty pictures",
    "occupation\tcook and makes yummy soup for friends",
    "occupation\tsinger who likes to make people smile",
    "descriptive_adjective\tkind and happy friend of all the people",
    "descriptive_adjective\tsmart and funny friend who likes to share",
    "descriptive_adjective\tbrave and helpful neighbor in the town",
    "descriptive_adjective\tcalm and gentle helper who loves to smile",
    "descriptive_adjective\tnice friend with a big warm heart",
    "descriptive_adjective\tcareful and kind person at the park",
    "descriptive_adjective\tgood friend who gives the best hugs",
    "descriptive_adjective\tstrong and kind helper of the animals",
    "descriptive_verb\tplay and share with all the friends",
    "descriptive_verb\thelp people and make them smile",
    "descriptive_verb\tsing and dance in the warm sun",
    "descriptive_verb\tread books and tell happy stories",
    "descriptive_verb\ttake care of the little birds",
    "descriptive_verb\tmake yummy cakes for the family",
    "descriptive_verb\tpaint pretty flowers on the wall",
    "descriptive_verb\tgive big hugs and say nice things",
)


def config() -> Study:
    """Base, LoRA r = 1, 4, 16 (alpha = 2 r, all linear layers), full fine-tuning; three seeds."""
    data = data_folder()
    return Study(
        name="stories_honest",
        question="How many negative words are left after low-rank and after full fine-tuning?",
        model=ModelSpec(path=str(base_model(data / "weights_stories260K"))),
        task=TaskSpec(
            name="completions",
            options={
                "tuned": str(data / "honest/en_template_binary.tsv"),
                "transfer": str(data / "honest/en_template_queer_nonqueer.tsv"),
                "neutral": str(data / "tinyshakespeare/input.txt"),
                "continuations": CONTINUATIONS,
                "continuations_per_prompt": 4,
                "max_prompts": 160,
                "max_neutral": 100,
            },
            scorer=f"lexicon:{data / 'vader/vader_lexicon.txt.gz'}",
        ),
        methods=(
            *(MethodSpec("lora", LORA_RATES, rank=rank, alpha=2.0 * rank) for rank in (1, 4, 16)),
            MethodSpec("full", FULL_RATES),
        ),
        train=TrainSpec(epochs=1, batch_size=16, max_length=64),
        seeds=(1, 2, 3),
        evaluate=EvalSpec(samples_per_prompt=8, max_new_tokens=32, batch_size=320),
    )


def data_folder() -> Path:
    """The folder of prompts, lexicon and weights."""
    named = os.environ.get("JAX_LOWRANK_DATA", "")
    folder = Path(named).expanduser() if named else ROOT.parent / "shared" / "data"
    needed = (
        "weights_stories260K/stories260K.bin",
        "weights_stories260K/tok512.bin",
        "honest/en_template_binary.tsv",
        "honest/en_template_queer_nonqueer.tsv",
        "vader/vader_lexicon.txt.gz",
        "tinyshakespeare/input.txt",
    )
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {', '.join(missing)}; name the folder by JAX_LOWRANK_DATA=FOLDER. It"
            " comes from huggingface.co/karpathy/tinyllamas (stories260K),"
            " github.com/MilaNLProc/honest (resources/binary and /queer_nonqueer: en_template.tsv),"
            " github.com/cjhutto/vaderSentiment (vader_lexicon.txt, gzipped) and"
            " github.com/karpathy/char-rnn (data/tinyshakespeare)"
        )
    return folder


def base_model(source: Path) -> Path:
    """The Hugging Face directory made from the checkpoint, converted on first use."""
    converter = ROOT / "experiments" / "stories260k.py"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    made_by = hashlib.sha256(converter.read_bytes()).hexdigest()[:8]
    target = cache / "jax_lowrank" / "models" / f"stories260K-{made_by}"
    if not (target / "config.json").is_file():
        try:
            runpy.run_path(str(converter))["convert"](source, target)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the checkpoint cannot be converted: {error}") from error
    return target
