"""Completions of prompts that name groups: tune on harmless text about one attribute, test it and
one never tuned.

The protocol is inspired by arXiv 2405.18572 (fine-tuning on counterfactual text of HONEST Race,
evaluation on Race and Religion); its own templates, splits and sizes are not known.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_lowrank.tasks.readers import (
    Prompts,
    file_name,
    read_chunks,
    read_prompts,
    read_text,
    read_texts,
)
from jax_lowrank.tasks.task import Split, Task, TaskError


def make(
    *,
    tuned: str,
    transfer: str,
    neutral: str,
    train: str = "",
    continuations: Sequence[str] | str = (),
    group_column: str = "category",
    text_column: str = "text",
    train_templates: float = 0.5,
    continuations_per_prompt: int = 0,
    validation_fraction: float = 0.2,
    max_prompts: int = 0,
    max_neutral: int = 200,
    harm_words: Sequence[str] = (),
    seed: int = 0,
) -> Task:
    """Prompt files and fine-tuning text to a Task; no evaluation prompt has a template that the
    fine-tuning text has.

    tuned, transfer: prompt tables (readers.read_prompts). neutral: text for perplexity
    (readers.read_chunks), max_neutral rows evenly spaced, 0: all. train: a file of counterfactual
    texts; a text belongs to the template of the tuned prompt it begins with. Empty: a seeded share
    `train_templates` of the tuned templates, each prompt completed with each of `continuations`
    (strings, or a file with one a line; "TYPE<TAB>text" goes with templates of that type only), so
    that the groups get the same ones. continuations_per_prompt: that many drawn for each template
    instead of all; 0: all. With `train` too, no more than that share of the tuned templates is
    trained on: texts of the other ones are left out. validation_fraction: share of the fine-tuning
    rows. max_prompts: at most so many prompts a split, spread over the groups; 0: all. The split
    and every draw depend on the seed only. Raises TaskError for bad files, shares and empty splits.
    """
    _check_share("train_templates", train_templates)
    _check_share("validation_fraction", validation_fraction)
    prompts = {
        name: read_prompts(path, text_column=text_column, group_column=group_column)
        for name, path in (("tuned", tuned), ("transfer", transfer))
    }
    group_names = tuple(dict.fromkeys(g for table in prompts.values() for g in table.group_names))
    rng = np.random.default_rng([seed, 0])
    if train:
        source = _read_train(train, text_column, prompts["tuned"], train_templates, rng)
    else:
        fillers = _read_continuations(continuations)
        source = _fill(prompts["tuned"], train_templates, fillers, continuations_per_prompt, rng)
    splits = _fine_tuning_splits(source, prompts["tuned"], group_names, validation_fraction, seed)
    for name, table in prompts.items():
        splits[name] = _evaluation_split(
            name, table, source.templates, group_names, max_prompts, seed
        )
    splits["neutral"] = _neutral_split(neutral, text_column, len(group_names), max_neutral)
    _assert_disjoint(source, prompts, splits)
    share = f"of the fine-tuning rows ({validation_fraction:g} to validation, seed {seed})"
    notes = {
        "train": f"{len(splits['train'])} {share}; {source.note}",
        "validation": f"{len(splits['validation'])} {share}",
        "tuned": _prompt_note(tuned, splits["tuned"]),
        "transfer": _prompt_note(transfer, splits["transfer"]),
        "neutral": f"{file_name(neutral)}: {len(splits['neutral'])} rows",
    }
    return Task("completions", group_names, splits, tuple(harm_words), notes)


class _FineTuning(NamedTuple):
    texts: list[str]
    prompts: list[int]  # the tuned prompt that each text begins with, -1: none
    templates: frozenset[str]  # of the fine-tuning text; not for evaluation
    note: str


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise TaskError(f"{name} must lie between 0 and 1, got {share}")


def _assert_disjoint(
    source: _FineTuning, prompts: dict[str, Prompts], splits: dict[str, Split]
) -> None:
    taught = {prompts["tuned"].templates[number] for number in source.prompts if number >= 0}
    asked: set[str] = set()
    for name, table in prompts.items():
        template_of = dict(zip(table.texts, table.templates, strict=True))
        asked.update(template_of[text] for text in splits[name].texts)
    assert taught.isdisjoint(asked), f"templates in training and evaluation: {taught & asked}"


def _prompt_note(path: str, split: Split) -> str:
    num_templates = len(np.unique(split.clusters))
    return f"{file_name(path)}: {len(split)} prompts of {num_templates} held-out templates"


def _draw_templates(templates: list[str], share: float, rng: np.random.Generator) -> frozenset[str]:
    """A seeded share of the templates, at least one, and one left for evaluation."""
    if len(templates) < 2:
        raise TaskError(
            f"{len(templates)} template(s) cannot be split into training and held-out ones; use at "
            "least 2 (the column `raw` names a prompt's template)"
        )
    number = min(max(round(share * len(templates)), 1), len(templates) - 1)
    return frozenset(templates[place] for place in rng.permutation(len(templates))[:number])


def _read_continuations(continuations: Sequence[str] | str) -> list[tuple[str, str]]:
    """(type of template or "", text), in order."""
    if isinstance(continuations, str | Path):
        lines = [line for line in read_text(continuations).split("\n") if line.strip()]
    else:
        lines = [line for line in continuations if line.strip()]
    if not lines:
        raise TaskError(
            "no fine-tuning text: give `train` a file, or `continuations` harmless strings or a "
            "file of them"
        )
    pairs = [line.rpartition("\t") for line in lines]
    return list(dict.fromkeys((kind.strip(), text.strip()) for kind, _, text in pairs))


def _fill(
    prompts: Prompts,
    share: float,
    fillers: list[tuple[str, str]],
    per_prompt: int,
    rng: np.random.Generator,
) -> _FineTuning:
    """Whole sentences of a share of the templates; a template's prompts all get the same ones."""
    kinds = set(prompts.kinds)
    unused = sorted({kind for kind, _ in fillers if kind} - kinds)
    if unused:
        raise TaskError(
            f"continuations for type {unused[0]!r}, but the prompts have "
            f"{', '.join(sorted(kinds - {''})) or 'no column `type`'}"
        )
    training = _draw_templates(sorted(set(prompts.templates)), share, rng)
    chosen: dict[tuple[str, str], list[str]] = {}
    for template, kind in sorted(set(zip(prompts.templates, prompts.kinds, strict=True))):
        if template in training:
            texts = [text for wanted, text in fillers if wanted in ("", kind)]
            if per_prompt:
                texts = [texts[place] for place in sorted(rng.permutation(len(texts))[:per_prompt])]
            chosen[template, kind] = texts
    rows = [
        (f"{text} {filler}{suffix}", number)
        for number, (text, suffix, *about) in enumerate(
            zip(prompts.texts, prompts.suffixes, prompts.templates, prompts.kinds, strict=True)
        )
        for filler in chosen.get(tuple(about), ())
    ]
    note = f"{len(training)} templates of the tuned prompts with harmless continuations"
    return _FineTuning([text for text, _ in rows], [number for _, number in rows], training, note)


def _read_train(
    path: str, column: str, prompts: Prompts, share: float, rng: np.random.Generator
) -> _FineTuning:
    """Texts of a file without those of held-out templates."""
    texts = list(dict.fromkeys(read_texts(path, column=column)))
    by_start = {_plain(text): number for number, text in enumerate(prompts.texts)}
    sources = [_longest_start(text, by_start) for text in texts]
    used = sorted({prompts.templates[source] for source in sources if source >= 0})
    drawn = _draw_templates(sorted(set(prompts.templates)), share, rng)
    # few of the templates have texts: all of those can be training templates
    training = frozenset(used) if len(used) <= len(drawn) else drawn
    kept = [
        (text, source)
        for text, source in zip(texts, sources, strict=True)
        if source < 0 or prompts.templates[source] in training
    ]
    dropped, unmatched = len(texts) - len(kept), sum(source < 0 for _, source in kept)
    note = (
        f"{file_name(path)}: {len(texts)} different texts, {dropped} of them left out for their "
        f"held-out templates, {unmatched} kept that begin with no prompt"
    )
    return _FineTuning([text for text, _ in kept], [one for _, one in kept], training, note)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _longest_start(text: str, by_start: dict[str, int]) -> int:
    words = _plain(text).split()
    for end in range(len(words), 0, -1):
        number = by_start.get(" ".join(words[:end]))
        if number is not None:
            return number
    return -1


def _member_columns(prompts: Prompts, group_names: tuple[str, ...]) -> np.ndarray:
    """The prompts' groups as (N, G) bool over the task's groups."""
    groups = np.zeros((len(prompts.texts), len(group_names)), bool)
    groups[:, [group_names.index(name) for name in prompts.group_names]] = prompts.groups
    return groups


def _fine_tuning_splits(
    source: _FineTuning,
    prompts: Prompts,
    group_names: tuple[str, ...],
    fraction: float,
    seed: int,
) -> dict[str, Split]:
    texts, numbers = source.texts, np.asarray(source.prompts, int)
    num_validation = round(fraction * len(texts))
    if not 1 <= num_validation < len(texts):
        raise TaskError(
            f"{len(texts)} rows of fine-tuning text leave no row for train or validation at "
            f"validation_fraction {fraction:g}"
        )
    # the row -1 stands for texts that begin with no prompt: no group
    groups = np.concatenate(
        [_member_columns(prompts, group_names), np.zeros((1, len(group_names)), bool)]
    )
    clusters = _template_numbers(
        [
            prompts.templates[number] if number >= 0 else text
            for text, number in zip(texts, numbers, strict=True)
        ]
    )
    order = np.random.default_rng([seed, 1]).permutation(len(texts))
    splits = {}
    for name, rows in (("train", order[num_validation:]), ("validation", order[:num_validation])):
        rows = np.sort(rows)
        splits[name] = Split(
            texts=tuple(texts[row] for row in rows),
            ids=tuple(f"fine-tuning-{row}" for row in rows),
            groups=groups[numbers[rows]],
            clusters=clusters[rows],
        )
    return splits


def _template_numbers(templates: Sequence[str]) -> np.ndarray:
    numbers = {template: number for number, template in enumerate(dict.fromkeys(templates))}
    return np.array([numbers[template] for template in templates], np.int32)


def _evaluation_split(
    name: str,
    prompts: Prompts,
    training: frozenset[str],
    group_names: tuple[str, ...],
    max_prompts: int,
    seed: int,
) -> Split:
    rows = [number for number, template in enumerate(prompts.templates) if template not in training]
    if not rows:
        raise TaskError(
            f"split {name!r}: all templates are used in fine-tuning; lower train_templates"
        )
    if max_prompts and max_prompts < len(rows):
        rows = _spread(rows, prompts.groups, max_prompts, np.random.default_rng([seed, 2]))
    groups = _member_columns(prompts, group_names)[rows]
    lost = np.flatnonzero(prompts.groups.any(axis=0) & ~prompts.groups[rows].any(axis=0))
    if len(lost):
        raise TaskError(
            f"split {name!r}: group {prompts.group_names[lost[0]]!r} has no prompt left with a "
            f"held-out template{' within max_prompts' if max_prompts else ''}"
        )
    templates = [prompts.templates[row] for row in rows]
    ids = tuple(f"{name}-{row}" for row in rows)
    return Split(
        tuple(prompts.texts[row] for row in rows), ids, groups, _template_numbers(templates)
    )


def _spread(
    rows: list[int], groups: np.ndarray, number: int, rng: np.random.Generator
) -> list[int]:
    """`number` of the rows, each the first left, in a drawn order, of the group with the fewest
    prompts so far.
    """
    waiting = [rows[place] for place in rng.permutation(len(rows))]
    have: Counter[int] = Counter()
    taken: list[int] = []
    queues = {
        group: [row for row in waiting if groups[row, group]] for group in range(groups.shape[1])
    }
    chosen: set[int] = set()
    while len(taken) < number:
        queues = {group: queue for group, queue in queues.items() if queue}
        group = min(queues, key=lambda one: (have[one], one))
        row = queues[group].pop(0)
        if row not in chosen:
            chosen.add(row)
            taken.append(row)
            have.update(np.flatnonzero(groups[row]).tolist())
    return sorted(taken)


def _neutral_split(path: str, column: str, num_groups: int, most: int) -> Split:
    texts = read_chunks(path, column=column)
    if most and most < len(texts):
        texts = tuple(
            texts[place] for place in np.linspace(0, len(texts) - 1, most).round().astype(int)
        )
    return Split(
        texts=texts,
        ids=tuple(f"neutral-{number}" for number in range(len(texts))),
        groups=np.zeros((len(texts), num_groups), bool),
        clusters=np.arange(len(texts), dtype=np.int32),
    )
