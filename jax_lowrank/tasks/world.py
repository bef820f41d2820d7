"""The embedded world of `make demo`: sentences about invented groups, with known rates of harm.

Every word for a group and every harm word is made up; all other words are plain English. A sentence
is opening + "the GROUP PERSON" + predicate + continuation + end. The predicate is the template (and
the cluster): half of them are held out of fine-tuning and make the evaluation prompts. All of them
are in the pretraining text, where a group's continuation is harmful with that group's rate.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_lowrank.tasks.task import Split, Task, TaskError
from jax_lowrank.tasks.world_words import (
    ADJECTIVES,
    ENDS,
    GROUPS,
    GUILDS,
    HARM_ADJECTIVES,
    HARM_VERBS,
    HARM_WORDS,
    NEUTRAL_FRAMES,
    NEUTRAL_WORDS,
    OBJECTS,
    OCCUPATIONS,
    OPENINGS,
    PEOPLES,
    PERSONS,
    PREDICATES,
    VERBS,
)


class _Template(NamedTuple):
    predicate: str
    is_verb: bool
    held_out: bool


TEMPLATES = tuple(
    _Template(predicate, kind == "verb", bool(held_out))
    for kind, halves in PREDICATES.items()
    for held_out, predicates in enumerate(halves)
    for predicate in predicates
)


def true_rates(
    *, seed: int = 0, lowest_rate: float = 0.1, highest_rate: float = 0.7
) -> dict[str, float]:
    """Probability in [0, 1] that a group's continuation is harmful in the pretraining text, tuned
    groups first.

    Within each attribute the rates are evenly spaced from lowest to highest; the seed decides which
    group has which.
    """
    if not 0 <= lowest_rate <= highest_rate <= 1:
        raise TaskError(
            f"rates must satisfy 0 <= lowest <= highest <= 1, got {lowest_rate} and {highest_rate}"
        )
    rates = {}
    for stream, groups in enumerate((PEOPLES, GUILDS)):
        spaced = np.linspace(lowest_rate, highest_rate, len(groups))
        order = np.random.default_rng([seed, stream]).permutation(len(groups))
        rates |= {group: float(spaced[place]) for group, place in zip(groups, order, strict=True)}
    return rates


def make(
    *,
    seed: int = 0,
    num_pretrain: int = 24_000,
    num_pretrain_validation: int = 500,
    num_train: int = 600,
    num_validation: int = 152,
    num_neutral: int = 200,
    lowest_rate: float = 0.1,
    highest_rate: float = 0.7,
    neutral_share: float = 0.25,
) -> Task:
    """The world as a Task: the required splits and "pretrain", "pretrain_validation".

    train and validation: training templates, the eight tuned groups, harmless continuations only;
    every sentence comes once for each group (so num_train and num_validation are multiples of 8)
    and no sentence is in both. tuned and transfer: one prompt for each (group, held-out template).
    neutral: sentences without groups that are not in the pretraining text. neutral_share: share of
    such sentences in the pretraining text, in [0, 1).
    """
    if not 0 <= neutral_share < 1:
        raise TaskError(f"neutral_share must lie in [0, 1), got {neutral_share}")
    rates = true_rates(seed=seed, lowest_rate=lowest_rate, highest_rate=highest_rate)
    streams = [_uniforms(seed, 2 + stream) for stream in range(5)]
    neutral = _neutral(streams[0], num_neutral)
    held_out_texts = frozenset(neutral.texts)
    train, validation = _counterfactual(streams[1], num_train, num_validation)
    prompt_frames = [(_pick(streams[2], OPENINGS), _pick(streams[2], PERSONS)) for _ in TEMPLATES]
    tuned, transfer = (_prompts(name, prompt_frames) for name in ("tuned", "transfer"))
    splits = {
        name: _pretrain(name, draws, number, rates, neutral_share, held_out_texts)
        for name, draws, number in (
            ("pretrain", streams[3], num_pretrain),
            ("pretrain_validation", streams[4], num_pretrain_validation),
        )
    }
    splits |= {
        "train": train,
        "validation": validation,
        "tuned": tuned,
        "transfer": transfer,
        "neutral": neutral,
    }
    num_held_out = sum(template.held_out for template in TEMPLATES)
    notes = {
        "source": f"embedded world, seed {seed}: invented groups, templates and harm words",
        "tuned_name": "peoples",
        "transfer_name": "guilds",
        "true_rates": ", ".join(f"{group} {rate:.3f}" for group, rate in rates.items()),
        "templates": f"{len(TEMPLATES)} templates, {num_held_out} of them held out of fine-tuning",
        **{name: f"{len(split)} rows" for name, split in splits.items()},
    }
    return Task("world", GROUPS, splits, HARM_WORDS, notes)


def _uniforms(seed: int, stream: int) -> Iterator[float]:
    """Endless uniform numbers in [0, 1), drawn by the thousand: one at a time costs most of a
    second in all.
    """
    rng = np.random.default_rng([seed, stream])
    while True:
        yield from rng.random(4096).tolist()


def _below(draws: Iterator[float], number: int) -> int:
    return int(next(draws) * number)


def _pick(draws: Iterator[float], options: tuple[str, ...]) -> str:
    return options[_below(draws, len(options))]


def _sentence(*parts: str) -> str:
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:]


def _prompt(group: str, template: _Template, opening: str, person: str) -> str:
    return _sentence(opening, "the", group, person, template.predicate)


def _harmless(draws: Iterator[float], template: _Template) -> str:
    first, second = (VERBS, OBJECTS) if template.is_verb else (ADJECTIVES, OCCUPATIONS)
    return f"{_pick(draws, first)} {_pick(draws, second)}"


def _harmful(draws: Iterator[float], template: _Template) -> str:
    # the harm word comes first: the LogitLens set then bears on the token right after the prompt
    first, second = (HARM_VERBS, OBJECTS) if template.is_verb else (HARM_ADJECTIVES, OCCUPATIONS)
    return f"{_pick(draws, first)} {_pick(draws, second)}"


def _neutral_sentence(draws: Iterator[float], frame: int) -> str:
    words = {slot: _pick(draws, options) for slot, options in NEUTRAL_WORDS.items()}
    return _sentence(NEUTRAL_FRAMES[frame].format(**words).removesuffix(" .")) + "."


def _membership(members: list[int]) -> np.ndarray:
    """Group index of each row (-1: none) to (N, G) bool."""
    return np.asarray(members)[:, None] == np.arange(len(GROUPS))[None, :]


def _split(name: str, texts: list[str], members: list[int], clusters: list[int]) -> Split:
    ids = tuple(f"{name}-{row}" for row in range(len(texts)))
    return Split(tuple(texts), ids, _membership(members), np.asarray(clusters, np.int32))


def _pretrain(
    name: str,
    draws: Iterator[float],
    num_rows: int,
    rates: dict[str, float],
    neutral_share: float,
    held_out_texts: frozenset[str],
) -> Split:
    texts, members, clusters = [], [], []
    while len(texts) < num_rows:
        if next(draws) < neutral_share:
            frame = _below(draws, len(NEUTRAL_FRAMES))
            text, member, cluster = _neutral_sentence(draws, frame), -1, len(TEMPLATES) + frame
            if text in held_out_texts:
                continue
        else:
            member, cluster = _below(draws, len(GROUPS)), _below(draws, len(TEMPLATES))
            template = TEMPLATES[cluster]
            continuation = _harmful if next(draws) < rates[GROUPS[member]] else _harmless
            prompt = _prompt(
                GROUPS[member], template, _pick(draws, OPENINGS), _pick(draws, PERSONS)
            )
            text = _sentence(prompt, continuation(draws, template), _pick(draws, ENDS)) + "."
        texts.append(text)
        members.append(member)
        clusters.append(cluster)
    return _split(name, texts, members, clusters)


def _counterfactual(
    draws: Iterator[float], num_train: int, num_validation: int
) -> tuple[Split, Split]:
    """Harmless sentences about the tuned groups: each draw of everything but the group is written
    for every group.
    """
    for name, number in (("num_train", num_train), ("num_validation", num_validation)):
        if number < len(PEOPLES) or number % len(PEOPLES):
            nearest = max(round(number / len(PEOPLES)), 1) * len(PEOPLES)
            raise TaskError(
                f"{name} {number} is not a multiple of the {len(PEOPLES)} tuned groups; use "
                f"{nearest}"
            )
    training = [number for number, template in enumerate(TEMPLATES) if not template.held_out]
    num_frames = [num_train // len(PEOPLES), num_validation // len(PEOPLES)]
    # the keys are a set in order, so that no frame is in both splits
    frames: dict[tuple[int, str, str, str, str], None] = {}
    while len(frames) < sum(num_frames):
        cluster = training[len(frames) % len(training)]
        frame = (
            _pick(draws, OPENINGS),
            _pick(draws, PERSONS),
            _harmless(draws, TEMPLATES[cluster]),
            _pick(draws, ENDS),
        )
        frames.setdefault((cluster, *frame))
    splits, rest = [], list(frames)
    for name, number in zip(("train", "validation"), num_frames, strict=True):
        taken, rest = rest[:number], rest[number:]
        rows = [(frame, member) for frame in taken for member in range(len(PEOPLES))]
        texts = [
            _sentence(
                _prompt(PEOPLES[member], TEMPLATES[cluster], opening, person), continuation, end
            )
            + "."
            for (cluster, opening, person, continuation, end), member in rows
        ]
        splits.append(
            _split(name, texts, [member for _, member in rows], [frame[0] for frame, _ in rows])
        )
    return splits[0], splits[1]


def _prompts(name: str, frames: list[tuple[str, str]]) -> Split:
    members = range(len(PEOPLES)) if name == "tuned" else range(len(PEOPLES), len(GROUPS))
    rows = [
        (member, cluster)
        for cluster, template in enumerate(TEMPLATES)
        if template.held_out
        for member in members
    ]
    texts = [
        _prompt(GROUPS[member], TEMPLATES[cluster], *frames[cluster]) for member, cluster in rows
    ]
    return _split(name, texts, [member for member, _ in rows], [cluster for _, cluster in rows])


def _neutral(draws: Iterator[float], num_rows: int) -> Split:
    most = 40 * len(NEUTRAL_FRAMES)  # a frame makes at least 64 sentences: drawing must end
    if not 1 <= num_rows <= most:
        raise TaskError(f"num_neutral must lie between 1 and {most}, got {num_rows}")
    texts: dict[str, int] = {}
    while len(texts) < num_rows:
        frame = len(texts) % len(NEUTRAL_FRAMES)
        texts.setdefault(_neutral_sentence(draws, frame), frame)
    clusters = [len(TEMPLATES) + frame for frame in texts.values()]
    return _split("neutral", list(texts), [-1] * num_rows, clusters)


def vocabulary() -> tuple[str, ...]:
    """Every word of the world, sorted, "." included; the whole generator is closed over it."""
    phrases = [
        *PERSONS,
        *OPENINGS,
        *ENDS,
        *ADJECTIVES,
        *OCCUPATIONS,
        *VERBS,
        *OBJECTS,
        *HARM_WORDS,
        *GROUPS,
        "the The .",
    ]
    phrases += [template.predicate for template in TEMPLATES]
    phrases += [phrase for options in NEUTRAL_WORDS.values() for phrase in options]
    phrases += [number.capitalize() for number in NEUTRAL_WORDS["number"]]
    phrases += [frame.format(**dict.fromkeys(NEUTRAL_WORDS, "")) for frame in NEUTRAL_FRAMES]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def word_tokenizer(task: Task):
    """A transformers.PreTrainedTokenizerFast with one token a word of the world; ids do not depend
    on the task's seed.

    Ids: "<pad>" 0, "<eos>" 1 (also the first token of a text), "<unk>" 2, then the sorted words.
    Encoding adds no special tokens; decoding with skip_special_tokens gives the text back. Raises
    TaskError where the task's texts have words of another world.
    """
    # imported here: loading transformers takes longer than making the world
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    unknown = {word for text in task.splits["tuned"].texts for word in text.split()} - set(words)
    if unknown:
        raise TaskError(
            f"task {task.name!r} has words outside the world, {min(unknown)!r} for one: use its "
            "own tokenizer"
        )
    ids = {word: number for number, word in enumerate(("<pad>", "<eos>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(
        cleanup=True
    )  # joins with spaces, none before a full stop
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<eos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
