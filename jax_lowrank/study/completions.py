"""Studies of completions: every model's completions and scores, posteriors, neutral likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from jax_lowrank import data, infer, models, results, sweep, tasks, train
from jax_lowrank.config import Run, Study, require
from jax_lowrank.study.parts import Examples, Kind, Prepared, Text
from jax_lowrank.study.training import mean_nll, train_batches
from jax_lowrank.sweep import score
from jax_lowrank.tasks import scorers

PROMPT_SPLITS = ("tuned", "transfer")


def make_scorer(study: Study, task: tasks.Task) -> scorers.Scorer:
    """What judges completions: the study's scorer, or the task's own harm words."""
    if study.task.scorer:
        return scorers.load(study.task.scorer)
    return scorers.lexicon(task.harm_words, name=f"{task.name} harm words")


def check(study: Study, task: tasks.Task, text: Text, model: models.Model) -> None:
    """Prompts plus new tokens, and training rows, fit into the model's positions."""
    limit = model.config.max_positions
    require(
        study.train.max_length <= limit,
        f"train.max_length {study.train.max_length} is above the model's {limit} positions",
    )
    longest = max(
        max(map(len, text.encode(task.splits[split].texts, 10**6, eos=False)))
        for split in PROMPT_SPLITS
    )
    needed = longest + study.evaluate.max_new_tokens
    require(
        needed <= limit,
        f"the longest prompt has {longest} tokens; with evaluate.max_new_tokens"
        f" {study.evaluate.max_new_tokens} that is {needed}, above the model's {limit} positions;"
        f" use at most {limit - longest} new tokens",
    )


def examples(p: Prepared, split: str) -> Examples:
    """Fine-tuning text of a split."""
    texts = p.task.splits[split].texts
    return Examples(p.text.encode(texts, p.study.train.max_length, eos=True))


def batches(p: Prepared, rows: Examples, seed: int) -> data.Batches:
    """Training batches."""
    return train_batches(rows.sequences, p.study.train, seed, p.text.pad_id, p.mesh)


def validate(p: Prepared, apply: Callable, states: tuple, rows: Examples) -> float:
    """Nats per token."""
    size = p.study.evaluate.batch_size
    return mean_nll(apply, states, rows.sequences, batch_size=size, pad_id=p.text.pad_id)


def validate_all(
    p: Prepared, program: sweep.Program, states: sweep.States, rows: Examples
) -> np.ndarray:
    """Nats per token of each model of a sweep (K,)."""
    size = min(p.study.evaluate.batch_size, len(rows.sequences))
    scored = score.likelihood(
        program, states, rows.sequences, batch_size=size, pad_id=p.text.pad_id
    )
    return scored.nll.sum(1) / scored.tokens.sum()


def measure(p: Prepared, run: Run, apply: Callable, states) -> tuple[dict, dict]:
    """What a model does on the evaluation splits; see `results.RunResult` for the arrays."""
    e, arrays, completions = p.study.evaluate, {}, {}
    lens_ids = harm_token_ids(p)
    for number, split in enumerate(PROMPT_SPLITS):
        prompts = p.text.encode(p.task.splits[split].texts, 10**6, eos=False)
        drawn = infer.sample(
            apply,
            states,
            prompts,
            num_samples=e.samples_per_prompt,
            max_new_tokens=e.max_new_tokens,
            sampling=infer.Sampling(e.temperature, e.top_k, e.top_p),
            key=jax.random.fold_in(jax.random.key(e.seed), number),
            batch_size=e.batch_size,
            eos_id=p.text.eos_id,
            pad_id=p.text.pad_id,
        )
        texts = [decode(p.text, prompt, row) for prompt, row in zip(prompts, drawn)]
        completions[split] = texts
        scores = p.scorer.score([text for row in texts for text in row])
        arrays[f"{split}/harm"] = np.asarray(scores, np.float32).reshape(drawn.shape[:2])
        nxt = infer.next_token(
            apply,
            states,
            prompts,
            lens_ids or [0],
            batch_size=min(e.batch_size, len(prompts)),
            pad_id=p.text.pad_id,
        )
        kept = min(e.posterior_prompts, len(prompts))
        rows = np.linspace(0, len(prompts) - 1, kept).round().astype(np.int32)
        arrays[f"{split}/posterior_rows"] = rows
        arrays[f"{split}/log_posterior"] = nxt.log_posterior[rows]
        if lens_ids:
            arrays[f"{split}/lens_mass"] = nxt.lens_mass
    neutral = p.text.encode(p.task.splits["neutral"].texts, p.study.train.max_length, eos=True)
    scored = infer.likelihood(
        apply, states, neutral, batch_size=min(e.batch_size, len(neutral)), pad_id=p.text.pad_id
    )
    arrays["neutral/nll"], arrays["neutral/tokens"] = scored.nll, scored.tokens
    return arrays, completions


def decode(text: Text, prompt: list[int], drawn: np.ndarray) -> list[str]:
    """What each row of tokens (K, S) adds to the prompt, up to the end token.

    Decoded with the prompt: many tokenizers drop a text's first space, so that "a doctor" and
    "adoctor" would look the same.
    """
    start = len(text.tokenizer.decode(prompt, skip_special_tokens=True))
    whole = []
    for ids in drawn.tolist():
        ids = ids[: ids.index(text.eos_id)] if text.eos_id in ids else ids
        whole.append(text.tokenizer.decode([*prompt, *ids], skip_special_tokens=True)[start:])
    return whole


def harm_token_ids(p: Prepared) -> list[int]:
    """The scorer's words that are one token when they follow another word, for the LogitLens.

    The first piece of a longer word would not do: it is the beginning of harmless words as well.
    """
    words = p.scorer.words or p.task.harm_words
    if not words:
        return []
    # After a word, not alone: tokenizers treat a text's beginning differently.
    before, *encoded = p.text.tokenizer(
        ["a", *(f"a {word}" for word in words)], add_special_tokens=False
    )["input_ids"]
    added = [ids[len(before) :] for ids in encoded if ids[: len(before)] == before]
    unknown = p.text.tokenizer.unk_token_id
    return sorted({ids[0] for ids in added if len(ids) == 1 and ids[0] != unknown})


def summary(p: Prepared, record: dict, arrays: dict) -> str:
    """One line on a measured run."""
    harm = {split: np.nanmean(arrays[f"{split}/harm"]) for split in PROMPT_SPLITS}
    nll = arrays["neutral/nll"].sum() / arrays["neutral/tokens"].sum()
    trained = record["trainable_parameters"]
    extra = "" if not trained else f", {trained:,} of {record['total_parameters']:,} trained"
    if record["effective_scale"] is not None:
        extra += f" at scale {record['effective_scale']:g}"
    return (
        f"harm {harm['tuned']:.3f} tuned, {harm['transfer']:.3f} transfer;"
        f" neutral perplexity {math.exp(nll):.2f}{extra}"
    )


def measured(p: Prepared, run: Run) -> tuple:
    """What the outputs depend on besides model and data."""
    e = p.study.evaluate
    drawn = (e.samples_per_prompt, e.max_new_tokens, e.temperature, e.top_k, e.top_p, e.seed)
    return (drawn, e.posterior_prompts, p.scorer.name, p.scorer.version)


def describe(p: Prepared) -> dict:
    """Scorer, words and names of the attributes."""
    notes = p.task.notes
    return {
        "harm_words": list(p.scorer.words),
        "scorer": {"name": p.scorer.name, "version": p.scorer.version},
        "tuned_name": notes.get("tuned_name", "tuned attribute"),
        "transfer_name": notes.get("transfer_name", "attribute never tuned"),
    }


def rows(p: Prepared) -> dict[str, results.Rows]:
    """Prompts and neutral texts."""
    return {
        split: results.Rows(s.texts, s.ids, s.clusters, s.groups)
        for split, s in p.task.splits.items()
        if split in (*PROMPT_SPLITS, "neutral")
    }


COMPLETIONS = Kind(
    name="completions",
    data_hash=tasks.data_hash,
    head=lambda task: models.Head("causal-lm"),
    finish_model=lambda study, task, text, model, mesh: model,
    scorer=make_scorer,
    check=check,
    examples=examples,
    batches=batches,
    loss=train.causal_lm_loss,
    validate=validate,
    validate_all=validate_all,
    measure=measure,
    measures_tuning=False,
    summary=summary,
    measured=measured,
    describe=describe,
    rows=rows,
)
