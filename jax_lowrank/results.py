"""Results on disk: one directory a run, named by its fingerprint, complete or absent.

STUDY/study.json          the study's configuration, data, base model (`StudyResult.study`)
STUDY/prompts.json        the evaluation rows, the same for every run; labelled ones without texts
STUDY/trained_on.json     hashes of the training texts (`write_trained_on`)
STUDY/runs/FINGERPRINT/   record.json, log.jsonl; with outputs: outputs.npz, completions.json
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TRAINED_ON = "trained_on.json"


class ResultsError(ValueError):
    """A results directory cannot be used; the message says why and what to do."""


class Rows(NamedTuple):
    """The rows of one evaluation split; labels are classes (N,) int32, None without any."""

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    clusters: np.ndarray  # (N,) int32, rows of one template share a number
    groups: np.ndarray  # (N, G) bool
    labels: np.ndarray | None = None


class RunResult(NamedTuple):
    """One finished run. Arrays and completions are empty for runs that only chose a setting.

    arrays: for split in tuned, transfer:
      SPLIT/harm (P, K) float32 in [0, 1], NaN where scoring failed
      SPLIT/lens_mass (P, L+1) float32, probability of the harm words by layer; may be absent
      SPLIT/posterior_rows (Q,) int32, SPLIT/log_posterior (Q, V) float32, nats
    and neutral/nll (N,) float32 in nats, neutral/tokens (N,) int32.
      Of a classification: validation/logits, test/logits (N, C) float32; of tuning runs too. In an
      audit of membership audited/logits (A, C), and audited/inside (A,) bool, the rows trained on.
    completions: SPLIT -> P lists of K texts.
    """

    record: dict
    arrays: dict[str, np.ndarray]
    completions: dict[str, list[list[str]]]


class StudyResult(NamedTuple):
    """A study's description, its evaluation rows by split, and its finished runs."""

    study: dict
    rows: dict[str, Rows]
    runs: list[RunResult]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or the old one."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # other machines write as well
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def open_study(directory: Path, study: Mapping[str, Any], rows: Mapping[str, Rows]) -> None:
    """Make or reopen a study's directory.

    Raises ResultsError when it belongs to another study or cannot be written.
    """
    try:
        (directory / "runs").mkdir(parents=True, exist_ok=True)
        existing = directory / "study.json"
        if existing.is_file():
            _check_same(json.loads(existing.read_text(encoding="utf-8")), study, directory)
        write_whole(existing, json.dumps(study, indent=1))
        write_whole(
            directory / "prompts.json", json.dumps({k: _to_json(v) for k, v in rows.items()})
        )
    except OSError as error:
        raise ResultsError(f"cannot write results to {directory}: {error.strerror}") from error


def _check_same(old: Mapping, new: Mapping, directory: Path) -> None:
    if old["fingerprint"] != new["fingerprint"]:
        raise ResultsError(
            f"{directory} belongs to another study: {old['name']} ({old['fingerprint']}), not"
            f" {new['name']} ({new['fingerprint']}); choose another --out"
        )


def _to_json(rows: Rows) -> dict:
    labels = {} if rows.labels is None else {"labels": rows.labels.tolist()}
    return labels | {
        "texts": rows.texts,
        "ids": rows.ids,
        "clusters": rows.clusters.tolist(),
        "groups": rows.groups.astype(int).tolist(),
    }


def begin_directory(final: Path) -> Path:
    """An empty directory for `write_directory` to go on with."""
    final.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".partial-{final.name}-", dir=final.parent))


def write_directory(
    final: Path, write: Callable[[Path], None], partial: Path | None = None
) -> Path:
    """Have `write` fill a directory that appears at `final` whole or not at all.

    partial: one that was begun, with what is in it.
    """
    partial = begin_directory(final) if partial is None else partial
    try:
        write(partial)
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def write_run(
    directory: Path,
    record: Mapping[str, Any],
    log: list[dict],
    arrays: Mapping[str, np.ndarray] | None = None,
    completions: Mapping[str, list[list[str]]] | None = None,
    partial: Path | None = None,
) -> Path:
    """Write a run under STUDY/runs/FINGERPRINT, whole or not at all, and return that directory.

    partial: as in `write_directory`.
    """

    def write(folder: Path) -> None:
        (folder / "record.json").write_text(json.dumps(record, indent=1))
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        if arrays is not None:
            np.savez_compressed(folder / "outputs.npz", **arrays)
            (folder / "completions.json").write_text(json.dumps(completions))

    return write_directory(run_directory(directory, record), write, partial)


def run_directory(directory: Path, record: Mapping[str, Any]) -> Path:
    """Where a study in `directory` keeps the run of a record."""
    return directory / "runs" / record["fingerprint"]


def write_trained_on(directory: Path, hashes: list[str]) -> None:
    """Keep which rows were trained on, by hash: texts stay where the data are, and ids such as row
    numbers mean other rows in another file. Not for export: it tells who was in the data.
    """
    write_whole(directory / TRAINED_ON, json.dumps(sorted(set(hashes))))


def read_trained_on(run: Path) -> frozenset[str] | None:
    """What `write_trained_on` kept of a run, or of the study it is of; None: nothing is known."""
    for folder in (run, run.resolve().parent.parent):
        if (folder / TRAINED_ON).is_file():
            return frozenset(json.loads((folder / TRAINED_ON).read_text(encoding="utf-8")))
    return None


def clear_partial(final: Path) -> None:
    """Delete what a killed process left of `final`; only for who holds its claim."""
    for leftover in final.parent.glob(f".partial-{final.name}-*"):
        shutil.rmtree(leftover)


def read_run_config(directory: Path) -> dict:
    """config.json of a `finetune` run; {} for anything else, such as a model's directory."""
    path = directory / "config.json"
    if not (directory / "record.json").is_file() or not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def finished(directory: Path, fingerprint: str) -> dict | None:
    """The record of a finished run, or None."""
    path = directory / "runs" / fingerprint / "record.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_run(directory: Path) -> RunResult:
    """Read one run's directory."""
    record = json.loads((directory / "record.json").read_text(encoding="utf-8"))
    arrays, completions = {}, {}
    if (directory / "outputs.npz").is_file():
        with np.load(directory / "outputs.npz") as stored:
            arrays = {name: stored[name] for name in stored.files}
        completions = json.loads((directory / "completions.json").read_text(encoding="utf-8"))
    return RunResult(record, arrays, completions)


def set_runs(directory: Path, fingerprints: list[str]) -> None:
    """Say which runs are the study's grid now; runs of earlier settings or code may lie beside."""
    write_whole(directory / "runs.json", json.dumps(fingerprints, indent=1))


def read_study(directory: Path) -> StudyResult:
    """Read a study: the runs of its grid in order, or all finished ones before the grid is done."""
    if not (directory / "study.json").is_file():
        raise ResultsError(f"{directory} holds no study (no study.json)")
    study = json.loads((directory / "study.json").read_text(encoding="utf-8"))
    rows = {
        split: Rows(
            tuple(raw["texts"]),
            tuple(raw["ids"]),
            np.array(raw["clusters"], np.int32),
            np.array(raw["groups"], bool).reshape(len(raw["ids"]), len(study["group_names"])),
            np.array(raw["labels"], np.int32) if "labels" in raw else None,
        )
        for split, raw in json.loads(
            (directory / "prompts.json").read_text(encoding="utf-8")
        ).items()
    }
    found = sorted(path.parent.name for path in (directory / "runs").glob("[!.]*/record.json"))
    grid = directory / "runs.json"
    names = json.loads(grid.read_text(encoding="utf-8")) if grid.is_file() else found
    return StudyResult(study, rows, [read_run(directory / "runs" / name) for name in names])
