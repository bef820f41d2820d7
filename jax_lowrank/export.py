"""Finished runs out, as Hugging Face models or PEFT adapters, each with a model card.

A run is read from a study's run directory or from a `finetune` run directory; the base model is
found where the record says, and its hash is checked before anything is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from jax_lowrank import adapters, model_card, models, provenance, results
from jax_lowrank.adapt import METHODS, peft_format
from jax_lowrank.adapt.method import Method
from jax_lowrank.config import MethodSpec, nearest
from jax_lowrank.models.head import Head

FORMATS = ("hf", "peft")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


class ExportError(ValueError):
    """A run cannot be exported; the message says why and what to do."""


class Run(NamedTuple):
    """A finished run as it lies on disk.

    base: directory of the base model. dtype: of the frozen base in training.
    options: of the method, without its name.
    weights_hash, data_hash: of the base model and of what the run was trained on.
    metrics: dicts as in `model_card.Card`.
    """

    directory: Path
    fingerprint: str
    record: dict[str, Any]
    base: Path
    dtype: str
    head: Head | None
    method: str
    options: dict[str, Any]
    seed: int
    weights_hash: str
    data_hash: str
    metrics: list[dict[str, Any]]


class Trained(NamedTuple):
    """A run's base model, and the split model with its trained arrays in place."""

    base: models.Model
    method: Method
    graphdef: Any
    trainable: Any
    frozen: Any


def export(run: Path, format: str, out: Path | None = None) -> Path:
    """Write a run as `hf` (merged weights) or `peft` (its adapter); the directory that appeared.

    Raises ExportError, PeftError or OSError with one sentence.
    """
    found, out = check(run, format, out)
    trained = load_run(found)

    def write(partial: Path) -> None:
        if format == "hf":
            write_hf(partial, found, trained)
        else:
            peft_format.write(partial, as_peft(found, trained))
        card = model_card.render(card_of(found, trained, format))
        (partial / "README.md").write_text(card, encoding="utf-8")

    return results.write_directory(out, write)


def check(run: Path, format: str, out: Path | None) -> tuple[Run, Path]:
    """The run to export and where to, or ExportError."""
    if format not in FORMATS:
        raise ExportError(f"format {nearest(format, FORMATS)}")
    found = read_run(run)
    if format == "peft" and found.method != "lora":
        raise ExportError(
            f"PEFT has no format for what method {found.method!r} trains; --format hf writes the"
            " whole model"
        )
    out = out or default_out(run, found, format)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists and is not empty; choose another --out")
    return found, out


def default_out(run: Path, found: Run, format: str) -> Path:
    """Beside a `finetune` run, or under STUDY/exports."""
    run = run.resolve()
    if is_study_run(run):
        return run.parents[1] / "exports" / f"{found.fingerprint}-{format}"
    return run.with_name(f"{run.name}-{format}")


# ----------------------------------------------------------------------------------- runs on disk


def is_study_run(run: Path) -> bool:
    """Whether a run directory is STUDY/runs/FINGERPRINT."""
    return run.parent.name == "runs" and (run.parents[1] / "study.json").is_file()


def read_run(run: Path) -> Run:
    """The run in a directory of either kind, its base model found and its hash checked."""
    run = run.resolve()
    record = provenance.read_json(run / "record.json")
    if record is None:
        raise ExportError(f"{run} is not a finished run: it has no record.json")
    if not (run / "trainable.safetensors").is_file():
        raise ExportError(
            f"{run} keeps no weights ({record.get('label') or record.get('kind')}): the base model,"
            " runs that only choose a learning rate and diverged runs cannot be exported"
        )
    if is_study_run(run):
        return _study_run(run, record)
    config = provenance.read_json(run / "config.json")
    if config is None:
        raise ExportError(f"{run} has neither config.json nor a study.json two levels above it")
    return _finetune_run(run, record, config)


def _study_run(run: Path, record: dict) -> Run:
    study = json.loads((run.parents[1] / "study.json").read_text(encoding="utf-8"))
    wanted, spec = study["model"]["weights_hash"], study["config"]["model"]
    if spec["path"]:
        base = find_base(spec["path"], spec["revision"], wanted)
    else:
        base = _pretrained(run.parents[1] / "base", wanted)
    rates = tuple(record["method"]["learning_rates"])
    method = MethodSpec(**{**record["method"], "learning_rates": rates})
    by_head = study.get("kind") == "classification" and not study.get("answers")
    return Run(
        run,
        record["fingerprint"],
        record,
        base,
        (record["dtypes"]["frozen"] or ["float32"])[0],
        Head("classification", tuple(study["classes"])) if by_head else None,
        method.name,
        method.options(),
        record["seed"],
        wanted,
        study["data_hash"],
        _study_metrics(run, record, "row" if study.get("kind") == "classification" else "token"),
    )


def _finetune_run(run: Path, record: dict, config: dict) -> Run:
    model, method = config["model"], dict(config["method"])
    head = Head(model["head"]["kind"], tuple(model["head"]["labels"]))
    wanted = record["model"]["weights_hash"]
    base = find_base(model["path"], model.get("revision", "main"), wanted)
    return Run(
        run,
        record["fingerprint"],
        record,
        base,
        model["dtype"],
        head,
        method.pop("name"),
        method,
        config["seed"],
        wanted,
        record["data_hash"],
        [{**m, "split": f"{m['split']}, {m['when']} training"} for m in record["metrics"]],
    )


def find_base(source: str, revision: str, wanted: str) -> Path:
    """The directory of the base model, whose hash must be the recorded one."""
    try:
        base = models.weights.resolve(source, revision)
    except FileNotFoundError as error:
        raise ExportError(f"the run's base model (hash {wanted[:16]}) is gone: {error}") from error
    found = provenance.hash_files(base)
    if found != wanted:
        raise ExportError(
            f"the model in {base} is not the run's base model: its hash is {found[:16]}, the run"
            f" was made from {wanted[:16]}"
        )
    return base


def _pretrained(folder: Path, wanted: str) -> Path:
    """The base model that a study made itself, by its hash."""
    for base in sorted(folder.glob("[!.]*/config.json")):
        if provenance.hash_files(base.parent) == wanted:
            return base.parent
    raise ExportError(f"the run's base model (hash {wanted[:16]}) is not under {folder}")


def _study_metrics(run: Path, record: dict, unit: str) -> list[dict]:
    """Metrics over all prompts, as the study's report wrote them; the validation loss without."""
    metrics = [{"name": f"validation loss (nats per {unit})", "value": record["validation_loss"]}]
    path = run.parents[1] / "report" / "results.jsonl"
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["fingerprint"] == record["fingerprint"]:
                metrics += [m for m in row["metrics"] if not m.get("group") and "n" in m]
    return [m for m in metrics if not m["name"].startswith("lens_mass")]


# ------------------------------------------------------------------------------------ the weights


def load_run(run: Run) -> Trained:
    """The run's base model, split by its method, with the trained arrays of the run."""
    key = jax.random.key(run.seed)
    base = models.load(run.base, jnp.dtype(run.dtype), head=run.head, key=key)
    method = METHODS[run.method](**run.options)
    graphdef, trainable, frozen = method.split(key, base)
    stored = load_file(run.directory / "trainable.safetensors")
    expected = models.by_path(trainable)
    wrong = sorted(
        set(stored) ^ set(expected)
        | {p for p in stored if p in expected and stored[p].shape != expected[p].shape}
    )
    if wrong:
        raise ExportError(
            f"{run.directory}/trainable.safetensors does not fit its method: {', '.join(wrong)}"
        )
    arrays = {path: jnp.asarray(value) for path, value in stored.items()}
    return Trained(base, method, graphdef, models.with_arrays(trainable, arrays), frozen)


def write_hf(directory: Path, run: Run, trained: Trained) -> None:
    """Merged weights, the base checkpoint's config.json with this head, its tokenizer."""
    params = trained.method.merge(trained.graphdef, trained.trainable, trained.frozen)
    models.save(directory, trained.base, params)
    config = base_config(run.base, json.loads((directory / "config.json").read_text()))
    dtypes = {str(value.dtype) for value in models.by_path(params).values()}
    config["dtype"] = "float32" if "float32" in dtypes else dtypes.pop()
    pad_id = missing_pad_id(run)
    if pad_id is not None:
        config["pad_token_id"] = pad_id
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in tokenizer_files(run.base):
        shutil.copyfile(run.base / name, directory / name)


def tokenizer_files(base: Path) -> list[str]:
    """What lies beside a checkpoint's weights and goes with them."""
    return [name for name in TOKENIZER_FILES if (base / name).is_file()]


def base_config(base: Path, ours: Mapping[str, Any]) -> dict[str, Any]:
    """The base checkpoint's config.json, with the head that the exported model has."""
    config = models.weights.read_config(base)
    for field in ("torch_dtype", "id2label", "label2id", "num_labels", "problem_type"):
        config.pop(field, None)
    head = {f: ours[f] for f in ("architectures", "id2label", "label2id") if f in ours}
    return {**config, **head}


def as_peft(run: Run, trained: Trained) -> peft_format.PeftFiles:
    """A LoRA run as PEFT's two files."""
    parts = (trained.graphdef, trained.trainable, trained.frozen)
    return adapters.to_files(trained.base, *parts, run.options, *public_name(run.base))


def public_name(base: Path) -> tuple[str, str | None]:
    """Where others find a base model: the hub id and commit of a snapshot as huggingface_hub keeps
    them (models--OWNER--NAME/snapshots/COMMIT), else the directory and None.
    """
    base = base.resolve()
    owner = base.parents[1].name
    if base.parent.name == "snapshots" and owner.startswith("models--"):
        return owner.removeprefix("models--").replace("--", "/"), base.name
    return str(base), None


def card_of(run: Run, trained: Trained, format: str) -> model_card.Card:
    """The model card of an export."""
    record, head = run.record, trained.base.head
    name, commit = public_name(run.base)
    facts = [
        ("run (fingerprint)", run.fingerprint),
        ("method", record.get("label") or run.method),
        ("rank", run.options.get("rank")),
        ("alpha", run.options.get("alpha")),
        ("effective scale", trained.method.scale),
        ("options of the method", run.options),
        ("learning rate", record.get("learning_rate")),
        ("seed", run.seed),
        ("steps", record.get("num_steps")),
        ("trained parameters", record.get("trainable_parameters")),
        ("base model", name),
        ("its commit on the hub", commit),
        ("SHA-256 of the base model", run.weights_hash),
        ("SHA-256 of the adapter that training went on from", _went_on_from(record)),
        ("SHA-256 of the data", run.data_hash),
        ("dtype of the base model in training", run.dtype),
        ("jax_lowrank", record.get("environment", {}).get("jax_lowrank")),
    ]
    return model_card.Card(
        title=f"{Path(name).name}, {record.get('label') or run.method}",
        format=format,
        base=name,
        commit=commit,
        kind=head.kind,
        labels=head.labels,
        method=run.method,
        facts=[(name, value) for name, value in facts if value is not None],
        metrics=run.metrics,
        pad_id=missing_pad_id(run),
    )


def _went_on_from(record: Mapping) -> str | None:
    model = record.get("model")  # of a study's run it is said in study.json
    return model.get("adapter_hash") if model else None


def missing_pad_id(run: Run) -> int | None:
    """The id that rows were padded with, where transformers' classifier has to be told it."""
    from transformers import AutoTokenizer

    known = models.weights.read_config(run.base).get("pad_token_id")
    if known is not None or not (run.head and run.head.kind == "classification"):
        return None
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id or 0
