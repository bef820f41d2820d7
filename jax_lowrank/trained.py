"""A finished run, or a bare checkpoint, loaded again: to generate, to measure, to export."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

from jax_lowrank import infer, models, provenance, results
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import Method, bind
from jax_lowrank.config import ModelSpec, require
from jax_lowrank.config_run import EvaluateSpec, GenerateSpec
from jax_lowrank.evaluation import classification, perplexity
from jax_lowrank.models.head import Head
from jax_lowrank.study.measure import decode
from jax_lowrank.study.prepare import Text, load_text, param_dtype
from jax_lowrank.tasks import encode, readers, text


class Trained(NamedTuple):
    """A model that can be asked: apply(*states), its tokenizer, and the run that made it.

    config, record: of the run; empty for a bare checkpoint, whose method is None.
    """

    model: models.Model
    text: Text
    apply: Callable
    states: tuple
    method: Method | None
    graphdef: Any
    config: Mapping
    record: Mapping


def load(target: str, spec: ModelSpec, head: Head | None = None) -> Trained:
    """The model of a run's directory, or of a Hugging Face directory or hub id.

    spec: revision and dtype of a bare checkpoint. head: what it must have. Raises ValueError or
    OSError, in one sentence.
    """
    if results.read_run_config(Path(target)):
        return load_run(Path(target))
    directory = models.weights.resolve(target, spec.revision)
    model = models.load(directory, param_dtype(spec.dtype), head=head)
    words = load_text(directory)._replace(vocab_size=model.config.vocab_size)
    return Trained(
        model, words, bind(model.graphdef), (model.params,), None, model.graphdef, {}, {}
    )


def load_run(run: Path) -> Trained:
    """The model of a run: its base, its head, its method, and the arrays that it trained."""
    config, record = results.read_run_config(run), provenance.read_json(run / "record.json")
    base, key = config["model"], jax.random.key(config["seed"])
    directory = models.weights.resolve(base["path"], base.get("revision", "main"))
    wanted = record.get("model", {}).get("weights_hash")
    if wanted and wanted != provenance.hash_files(directory):
        raise results.ResultsError(f"{directory} no longer holds the weights that {run} began with")
    head = Head(base["head"]["kind"], tuple(base["head"]["labels"]))
    model = models.load(
        directory, param_dtype(base["dtype"]), head=head, key=jax.random.fold_in(key, 1)
    )
    options = dict(config["method"])
    method = METHODS[options.pop("name")](**options)
    graphdef, trainable, frozen = method.split(key, model)
    arrays = load_file(run / "trainable.safetensors")
    if {k: v.shape for k, v in arrays.items()} != {
        k: v.shape for k, v in models.by_path(trainable).items()
    }:
        raise results.ResultsError(f"{run}: trainable.safetensors does not fit its config.json")
    trainable = models.with_arrays(trainable, {k: jax.numpy.asarray(v) for k, v in arrays.items()})
    words = load_text(directory)._replace(vocab_size=model.config.vocab_size)
    return Trained(
        model, words, bind(graphdef), (trainable, frozen), method, graphdef, config, record
    )


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
    """`spec.samples` continuations of each prompt, the prompt left out.

    Raises ValueError for a model that predicts no tokens and for a prompt that does not fit.
    """
    head, words = trained.model.head.kind, trained.text
    require(head == "causal-lm", f"the model has a {head} head, which continues no text")
    encoded = encode.encode_prompts(prompts, words, chat=spec.chat)
    limit, longest = trained.model.config.max_positions, max(map(len, encoded))
    require(
        longest + spec.max_new_tokens <= limit,
        f"the longest prompt has {longest} tokens; with {spec.max_new_tokens} new ones that is"
        f" above the model's {limit} positions",
    )
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


def evaluate(trained: Trained, spec: EvaluateSpec) -> tuple[dict, dict]:
    """Metrics and per-example outputs on a file; a run's own settings come in `spec`."""
    head, kind = trained.model.head, spec.data.kind
    if head.kind == "classification":
        require(kind in ("auto", head.kind), f"the model classifies, but data.kind is {kind!r}")
        kind = head.kind
    else:
        usable = head.kind == "causal-lm" and kind != "classification"
        require(usable, f"the model has a {head.kind} head, which cannot do {kind!r}")
    require(bool(spec.data.path), "no data; give --data FILE")
    limit = trained.model.config.max_positions
    columns = text.Columns(**vars(spec.data.columns))
    kind, examples = text.read_examples(
        spec.data.path, kind, columns, head.labels, spec.data.split_column
    )
    encoded = encode.encode(
        kind,
        examples.ids,
        examples.inputs,
        trained.text,
        max_length=min(spec.max_length, limit),
        mask_prompt=spec.data.mask_prompt,
    )
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
    number = head.labels.index(majority) if majority in head.labels else None
    metrics = {
        "rows": len(encoded.sequences),
        "truncated": encoded.num_truncated,
        **measure(arrays, spec.level, number),
    }
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


def measure(arrays: Mapping[str, np.ndarray], level: float, majority: int | None = None) -> dict:
    """Metrics of one split's outputs, as JSON can hold them; undefined is null."""
    if "nll" in arrays:
        found = perplexity.measure(arrays["nll"], arrays["tokens"], level=level)
    else:
        found = classification.measure(
            arrays["logits"], arrays["labels"], majority=majority, level=level
        )
    return to_json(found)


def to_json(value: Any) -> Any:
    """Metrics as plain JSON: named tuples by name, NaN as null."""
    if hasattr(value, "_asdict"):
        return {name: to_json(part) for name, part in value._asdict().items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [to_json(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sentence(metrics: Mapping[str, Any]) -> str:
    """The headline of `measure`, with counts and intervals."""
    if "perplexity" in metrics:
        return (
            f"perplexity {_shown(metrics['perplexity'])},"
            f" {_shown(metrics['nats_per_token'])} nats per token,"
            f" {metrics['num_tokens']:,} tokens of {metrics['nats_per_token']['n']:,} rows"
        )
    return (
        f"accuracy {_shown(metrics['accuracy'])} of {metrics['accuracy']['n']:,} rows"
        f" (majority class {_number(metrics['majority_accuracy']['estimate'])}),"
        f" macro-F1 {_shown(metrics['macro_f1'])}, {_shown(metrics['nll'])} nats per row"
    )


def _shown(interval: Mapping[str, Any]) -> str:
    limits = f"{_number(interval['low'])}, {_number(interval['high'])}"
    return f"{_number(interval['estimate'])} [{limits}]"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def write_evaluation(out: Path, metrics: dict, arrays: dict) -> None:
    """metrics.json and predictions.npz under `out`, which must be new."""
    if out.exists():
        raise results.ResultsError(f"{out} is there already; choose another --out")

    def fill(partial: Path) -> None:
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=1))
        np.savez_compressed(partial / "predictions.npz", **arrays)

    results.write_directory(out, fill)
