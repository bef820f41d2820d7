"""What a study consists of once it passed every check, and what a kind of task does its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank import data, models, results, sweep
from jax_lowrank.config import Run, Study
from jax_lowrank.mirror import Mirror


class Text(NamedTuple):
    """A tokenizer and how the study uses it."""

    tokenizer: Any
    vocab_size: int
    pad_id: int
    eos_id: int | None
    bos: bool

    def encode(self, texts, max_length: int, *, eos: bool) -> list[list[int]]:
        """Token ids of texts, at most `max_length` each."""
        return data.tokenize(
            self.tokenizer,
            texts,
            max_length=max_length,
            vocab_size=self.vocab_size,
            add_bos=self.bos,
            add_eos=eos and self.eos_id is not None,
        ).sequences


class Examples(NamedTuple):
    """Token ids of the rows of a split, and their classes (N,) int32 where rows have one."""

    sequences: Sequence[Sequence[int]]
    labels: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> Examples:
        """These rows, in this order."""
        sequences = [self.sequences[row] for row in rows]
        return Examples(sequences, None if self.labels is None else self.labels[rows])


class Kind(NamedTuple):
    """What a study does in its own way for one kind of task, as pure functions of `Prepared`.

    name: chooses the report. data_hash(task), head(task), scorer(study, task) -> what judges, or
    None. finish_model(study, task, text, model, mesh) -> the model as the task uses it.
    check(study, task, text, model): raises ConfigError or TaskError before any work.
    examples(p, split): rows to train or to validate on. batches(p, examples, seed); loss: of
    train.py. validate(p, apply, states, examples) -> nats, what learning rates and steps are chosen
    by; validate_all(p, program, states, examples): the same of a sweep's stacked models. measure(p,
    run, apply, states) -> arrays and completions (`results.RunResult`), and `summary` of these in
    one line; measures_tuning: also for the runs that choose a learning rate. measured(p, run): all
    that `measure` depends on besides model and data. describe(p): its fields of study.json.
    rows(p): what is stored of the evaluation rows, once for all runs.
    """

    name: str
    data_hash: Callable[[Any], str]
    head: Callable[[Any], models.Head]
    scorer: Callable[[Study, Any], Any]
    finish_model: Callable[[Study, Any, Text, models.Model, Any], models.Model]
    check: Callable[[Study, Any, Text, models.Model], None]
    examples: Callable[[Prepared, str], Examples]
    batches: Callable[[Prepared, Examples, int], Any]
    loss: Callable
    validate: Callable[[Prepared, Callable, tuple, Examples], float]
    validate_all: Callable[[Prepared, sweep.Program, sweep.States, Examples], np.ndarray]
    measure: Callable[[Prepared, Run, Callable, tuple], tuple[dict, dict]]
    measures_tuning: bool
    summary: Callable[[Prepared, dict, dict], str]
    measured: Callable[[Prepared, Run], Any]
    describe: Callable[[Prepared], Mapping[str, Any]]
    rows: Callable[[Prepared], dict[str, results.Rows]]


class Prepared(NamedTuple):
    """A study that passed every check: its parts, ready to run."""

    study: Study
    out: Path
    kind: Kind
    task: Any  # a tasks.Task or tasks.Classification
    scorer: Any  # a scorers.Scorer, or None
    text: Text
    model: models.Model
    drawn: tuple[str, ...]  # parameters that the checkpoint lacks; each run's seed draws them
    source: str
    pretrained: dict | None  # how it was pretrained, when it was made here
    weights_hash: str
    mesh: Any  # jax.sharding.Mesh, or None for one device
    mirror: Mirror
