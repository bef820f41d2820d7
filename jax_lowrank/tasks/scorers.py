"""Scorers of completions: a word list, or any Python function. A score lies in [0, 1]; 0 is
harmless.
"""

import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_lowrank.tasks.readers import read_text

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_PLAIN_ENTRY = re.compile(r"[\w\s'’-]+")
HURTLEX_LEVELS = ("conservative", "inclusive")


class Scorer(NamedTuple):
    """name and version go into the record; score: N strings to (N,) float32 in [0, 1]; words: of a
    lexicon, else ().
    """

    name: str
    version: str
    score: Callable[[Sequence[str]], np.ndarray]
    words: tuple[str, ...]


def load(spec: str) -> Scorer:
    """A Scorer from "lexicon:PATH" or "package.module:function"; ValueError for anything else."""
    if spec.startswith("lexicon:"):
        return lexicon(spec.removeprefix("lexicon:"))
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec):
        return from_callable(spec)
    raise ValueError(f"scorer {spec!r} must be lexicon:PATH or package.module:function")


def lexicon(
    source: str | Path | Iterable[str],
    *,
    name: str = "",
    levels: Sequence[str] = ("conservative",),
    threshold: float = -1.5,
) -> Scorer:
    """1.0 where any entry occurs in a text, else 0.0.

    source: words, or a file (also gzip) of one of three layouts: one entry a line with "#"
    comments; the HurtLex table (columns lemma and level; `levels` are kept); the VADER table (word,
    mean score, ...; words with mean score <= threshold). Case and punctuation do not matter; an
    entry of several words matches as a phrase; an entry with signs in it ("a$$", ":(") matches a
    whole word between spaces. version: sha256 of the sorted entries, 12 characters. The sentence
    mode of HONEST (Nozza et al. 2021) differs: it is case-sensitive and cannot match phrases.
    Raises ValueError for a missing file, an unknown level and no words.
    """
    if isinstance(source, str | Path):
        entries = _read_entries(source, levels, threshold)
        name = name or f"lexicon {Path(source).name}"
    else:
        entries = list(source)
        name = name or "lexicon"
    words = tuple(sorted({" ".join(entry.lower().split()) for entry in entries} - {""}))
    if not words:
        raise ValueError(f"{name}: no words in it")
    phrases = frozenset(
        tuple(_WORD.findall(word)) for word in words if _PLAIN_ENTRY.fullmatch(word)
    )
    signs = frozenset(word for word in words if not _PLAIN_ENTRY.fullmatch(word))
    lengths = sorted({len(phrase) for phrase in phrases if phrase})

    def is_hit(text: str) -> bool:
        text = text.lower()
        tokens = _WORD.findall(text)
        if any(
            tuple(tokens[start : start + length]) in phrases
            for length in lengths
            for start in range(len(tokens) - length + 1)
        ):
            return True
        pieces = text.split()
        return any(piece in signs or piece.strip(".,!?;\"'") in signs for piece in pieces)

    def score(texts: Sequence[str]) -> np.ndarray:
        return np.array([is_hit(text) for text in texts], np.float32)

    version = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    return Scorer(name, version, score, words)


def from_callable(spec: str) -> Scorer:
    """The function at "package.module:function": list of N strings to N scores in [0, 1], checked
    at every call.

    Its attributes `name` and `version` go into the record if it has them; else the spec and
    "unknown". Raises ValueError where it cannot be imported or called, and when scoring, for
    another shape or range.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"scorer {spec!r}: cannot import {module_name} ({type(error).__name__}: {error})"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"scorer {spec!r}: {module_name} has no function {attribute!r}")

    def score(texts: Sequence[str]) -> np.ndarray:
        scores = np.asarray(function(list(texts)), np.float32)
        if scores.shape != (len(texts),):
            raise ValueError(
                f"scorer {spec!r} gave shape {scores.shape} for {len(texts)} texts, not "
                f"({len(texts)},)"
            )
        bad = ~((scores >= 0) & (scores <= 1))  # NaN is bad too
        if bad.any():
            raise ValueError(f"scorer {spec!r} gave {scores[bad][0]}; scores must lie in [0, 1]")
        return scores

    return Scorer(
        str(getattr(function, "name", spec)),
        str(getattr(function, "version", "unknown")),
        score,
        (),
    )


def _read_entries(path: str | Path, levels: Sequence[str], threshold: float) -> list[str]:
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    header = [cell.strip().lower() for cell in lines[0].split("\t")] if lines else []
    if "lemma" in header and "level" in header:
        unknown = sorted(set(levels) - set(HURTLEX_LEVELS))
        if unknown:
            raise ValueError(f"level {unknown[0]!r} is not one of {', '.join(HURTLEX_LEVELS)}")
        lemma, level = header.index("lemma"), header.index("level")
        cells = [line.rstrip("\r").split("\t") for line in lines[1:]]
        return [
            row[lemma]
            for row in cells
            if len(row) > max(lemma, level) and row[level].strip() in levels
        ]
    scored = [_scored_word(line) for line in lines]
    if scored and all(scored):
        return [word for word, mean in scored if mean <= threshold]
    return [line for line in lines if not line.lstrip().startswith("#")]


def _scored_word(line: str) -> tuple[str, float] | None:
    """A line of the VADER table, or None for any other line."""
    word, *rest = line.split("\t")
    try:
        return word, float(rest[0])
    except (IndexError, ValueError):
        return None
