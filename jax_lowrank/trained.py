"""A finished run, a PEFT adapter or a bare checkpoint, loaded to generate or to measure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_lowrank import adapters, export, infer, models, results
from jax_lowrank.adapt.method import bind
from jax_lowrank.config import require
from jax_lowrank.config_run import EvaluateSpec, GenerateSpec, LoadSpec
from jax_lowrank.evaluation import classification, perplexity
from jax_lowrank.models.head import Head
from jax_lowrank.study.completions import decode
from jax_lowrank.study.parts import Text
from jax_lowrank.study.prepare import load_text, param_dtype
from jax_lowrank.tasks import TaskError, encode, readers, text


class Trained(NamedTuple):
    """A model that can be asked as apply(*states), and the record of its run or {}.

    seen: hashes of the rows that the run was trained on; None where nothing is known of them.
    """

    model: models.Model
    text: Text
    apply: Callable
    states: tuple
    record: Mapping
    seen: frozenset[str] | None


def load(target: str, spec: LoadSpec) -> Trained:
    """The model of a run's directory, of a PEFT adapter's, or of a Hugging Face one or hub id.

    spec: revision of a bare checkpoint, dtype of its or of an adapter's base. Raises ValueError or
    OSError, in one sentence.
    """
    place, seen = Path(target), None
    if (place / "record.json").is_file():
        run, seen = export.read_run(place), results.read_trained_on(place)
        loaded = export.load_run(run)
        model, directory, record = loaded.base, run.base, run.record
        graphdef, states = loaded.graphdef, (loaded.trainable, loaded.frozen)
    elif adapters.is_adapter(place):
        loaded = adapters.load(place, dtype=param_dtype(spec.dtype))
        model, directory, record = loaded.base, loaded.directory, {}
        graphdef, states = loaded.graphdef, (loaded.trainable, loaded.frozen)
    else:
        directory, record = models.weights.resolve(target, spec.revision), {}
        model = models.load(directory, param_dtype(spec.dtype))
        graphdef, states = model.graphdef, (model.params,)
    words = load_text(directory)._replace(vocab_size=model.config.vocab_size)
    return Trained(model, words, bind(graphdef), states, record, seen)


def read_prompts(spec: GenerateSpec) -> list:
    """Strings, or with --chat conversations, from the command line or a file."""
    require(bool(spec.prompt) != bool(spec.prompts), "give --prompt TEXT or --prompts FILE")
    if spec.prompt:
        found = [spec.prompt]
    elif readers.suffix_of(spec.prompts) == ".txt":
        found = list(readers.read_texts(spec.prompts))
    else:
        rows = readers.read_table(spec.prompts)
        column = "messages" if spec.chat and "messages" in rows[0] else "prompt"
        readers.require_column(spec.prompts, rows, column)
        found = [row[column] for row in rows]
    if spec.chat:
        return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in found]
    return found


def generate(trained: Trained, prompts: list, spec: GenerateSpec) -> list[list[str]]:
    """`spec.samples` continuations of each prompt, the prompt left out; see `prompt_tokens`."""
    words, encoded = trained.text, prompt_tokens(trained, prompts, spec)
    drawn = infer.sample(
        trained.apply,
        trained.states,
        encoded,
        num_samples=spec.samples,
        max_new_tokens=spec.max_new_tokens,
        sampling=infer.Sampling(spec.temperature, spec.top_k, spec.top_p),
        key=jax.random.key(spec.seed),
        batch_size=spec.batch_size,
        eos_id=words.eos_id,
        pad_id=words.pad_id,
    )
    return [decode(words, prompt, rows) for prompt, rows in zip(encoded, drawn)]


def prompt_tokens(trained: Trained, prompts: list, spec: GenerateSpec) -> list[list[int]]:
    """Token ids of the prompts.

    Raises ValueError for a model that predicts no tokens and for a prompt that does not fit.
    """
    head = trained.model.head.kind
    require(head == "causal-lm", f"the model has a {head} head, which continues no text")
    encoded = encode.encode_prompts(prompts, trained.text, chat=spec.chat)
    limit, longest = trained.model.config.max_positions, max(map(len, encoded))
    require(
        longest + spec.max_new_tokens <= limit,
        f"the longest prompt has {longest} tokens; with {spec.max_new_tokens} new ones that is"
        f" above the model's {limit} positions",
    )
    return encoded


class Rows(NamedTuple):
    """Examples to measure on, and their token ids."""

    kind: str
    examples: text.Examples
    encoded: encode.Encoded


def read_rows(trained: Trained, spec: EvaluateSpec) -> Rows:
    """The examples of a file; a run's own settings come in `spec`. Raises ValueError."""
    head, kind = trained.model.head, spec.data.kind
    only = head.kind if head.kind in ("classification", "masked-lm") else None
    usable = kind in ("auto", only) if only else kind not in ("classification", "masked-lm")
    usable = usable and head.kind != "embedding"
    require(usable, f"the model has a {head.kind} head, which cannot do {kind!r}")
    kind = only or kind
    require(bool(spec.data.path), "no data; give --data FILE")
    limit = trained.model.config.max_positions
    columns = text.Columns(**vars(spec.data.columns))
    kind, examples = text.read_examples(
        spec.data.path, kind, columns, head.labels, spec.data.split_column
    )
    if not spec.trained_rows:
        check_unseen(trained, examples)
    encoded = encode.encode(
        kind,
        examples.ids,
        examples.inputs,
        trained.text,
        max_length=min(spec.max_length, limit),
        mask_prompt=spec.data.mask_prompt,
    )
    return Rows(kind, examples, encoded)


def check_unseen(trained: Trained, examples: text.Examples) -> None:
    """Raise TaskError if a row is one that the run was trained on, whatever its id or file."""
    hashes = text.hashes(examples.inputs) if trained.seen else []
    both = [row for row, mark in zip(examples.ids, hashes) if mark in trained.seen]
    if both:
        raise TaskError(
            f"{len(both):,} of {len(hashes):,} rows to evaluate on were trained on, e.g. {both[0]}:"
            " leave them out, or measure them too with --trained-rows"
        )


def evaluate(trained: Trained, spec: EvaluateSpec) -> tuple[list[dict], dict]:
    """Metrics and per-example outputs on a file; raises what `read_rows` does."""
    kind, examples, encoded = read_rows(trained, spec)
    arrays = observe(
        kind,
        trained.apply,
        trained.states,
        encoded,
        examples.labels,
        spec.batch_size,
        trained.text.pad_id,
    )
    majority = trained.record.get("majority_class")
    metrics = measure(arrays, spec.level, trained.model.head, majority)
    metrics = [{**metric, "truncated": encoded.num_truncated} for metric in metrics]
    return metrics, {"ids": np.array(examples.ids), **arrays}


def observe(
    kind: str,
    apply: Callable,
    states,
    encoded: encode.Encoded,
    labels,
    batch_size: int,
    pad_id: int,
) -> dict[str, np.ndarray]:
    """What a model does on each example: logits (N, C) and labels (N,); or nll and tokens (N,)."""
    batch_size = min(batch_size, len(encoded.sequences))
    if kind == "classification":
        logits = infer.classify(
            apply, states, encoded.sequences, batch_size=batch_size, pad_id=pad_id
        )
        return {"logits": logits, "labels": labels}
    if kind == "masked-lm":
        scored = infer.masked_likelihood(
            apply, states, encoded.hidden, batch_size=batch_size, pad_id=pad_id
        )
        return {"nll": scored.nll, "tokens": scored.tokens}
    scored = infer.likelihood(
        apply,
        states,
        encoded.sequences,
        batch_size=batch_size,
        pad_id=pad_id,
        counted=encoded.counted,
    )
    return {"nll": scored.nll, "tokens": scored.tokens}


def mean_loss(arrays: Mapping[str, np.ndarray]) -> float:
    """Nats per token, or nats per row of a classification."""
    if "nll" in arrays:
        return float(arrays["nll"].sum() / arrays["tokens"].sum())
    rows = np.arange(len(arrays["labels"]))
    log_sum = np.logaddexp.reduce(arrays["logits"].astype(np.float64), axis=1)
    return float((log_sum - arrays["logits"][rows, arrays["labels"]]).mean())


def measure(arrays: Mapping[str, np.ndarray], level: float, head: Head, majority=None) -> list:
    """Metrics of one split's outputs: dicts with name, value, low, high, n and reason.

    majority: the most frequent class of the training rows. Undefined is None, with a reason.
    """
    if "nll" in arrays:
        found = perplexity.measure(arrays["nll"], arrays["tokens"], level=level)
        entries = {"perplexity": found.perplexity, "nats per token": found.nats_per_token}
        return [{**_entry(*e), "tokens": found.num_tokens} for e in entries.items()]
    number = head.labels.index(majority) if majority else None
    found = classification.measure(arrays["logits"], arrays["labels"], majority=number, level=level)
    entries = {
        "accuracy": found.accuracy,
        "accuracy of the majority class": found.majority_accuracy,
        "macro-F1": found.macro_f1,
        "nats per row": found.nll,
    }
    f1 = [
        {"name": f"F1 of {label}", "value": _finite(value), "n": int(rows)}
        for label, value, rows in zip(head.labels, found.f1, found.support)
    ]
    return [_entry(*e) for e in entries.items()] + f1


def _entry(name: str, found: Any) -> dict:
    """An interval as JSON can hold it."""
    limits = {"value": found.estimate, "low": found.low, "high": found.high}
    limits = {key: _finite(value) for key, value in limits.items()}
    return {"name": name, **limits, "n": int(found.n), "reason": found.reason}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def sentence(metrics: list[dict]) -> str:
    """The headline of `measure`, with counts and intervals."""
    m = {metric["name"]: metric for metric in metrics}
    if "perplexity" in m:
        return (
            f"perplexity {_shown(m['perplexity'])}, {_shown(m['nats per token'])} nats per token;"
            f" {m['perplexity']['tokens']:,} tokens, {m['perplexity']['n']:,} rows"
        )
    return (
        f"accuracy {_shown(m['accuracy'])}, of the majority class"
        f" {_number(m['accuracy of the majority class']['value'])}; macro-F1"
        f" {_shown(m['macro-F1'])}; {_shown(m['nats per row'])} nats per row;"
        f" {m['accuracy']['n']:,} rows"
    )


def _shown(metric: Mapping[str, Any]) -> str:
    limits = f"{_number(metric['low'])}, {_number(metric['high'])}"
    return f"{_number(metric['value'])} [{limits}]"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def check_new(out: str | None) -> None:
    """Raise ResultsError where `out` exists: nothing is overwritten."""
    if out and Path(out).exists():
        raise results.ResultsError(f"{out} is there already; choose another --out")


def write_evaluation(out: Path, metrics: list[dict], arrays: dict) -> None:
    """metrics.json and predictions.npz under `out`, which must be new."""
    check_new(str(out))

    def fill(partial: Path) -> None:
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=1))
        np.savez_compressed(partial / "predictions.npz", **arrays)

    results.write_directory(out, fill)
