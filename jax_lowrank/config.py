"""What a study is: frozen dataclasses, checked when they are made.

A configuration is a Python function that returns a `Study`; the command line overrides any field.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


class ConfigError(ValueError):
    """A configuration breaks a rule; the message names the value, the rule and a valid choice."""


def nearest(value: str, valid: Iterable[str]) -> str:
    """`'x' is not one of [...]; did you mean 'y'?`, for error messages."""
    names = list(valid)
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{value!r} is not one of {names}{hint}"


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("auto", "float32", "bfloat16")
METHOD_NAMES = ("full", "lora", "bitfit", "head")
LAYER_CHOICES = ("first", "last", "random")
LAYER_LIST = re.compile(r"\d+(,\d+)*")
INITS = ("kaiming", "gaussian", "pissa", "olora")
REMATS = ("none", "dots", "offload", "full")
PROTOCOLS = {"online": 64, "published": 16}  # of audits, and how many shadow models is usual
UTILITIES = ("accuracy", "f1")
NO_RESULT = {"result": False}  # metadata of fields that no result depends on


@dataclass(frozen=True)
class ModelSpec:
    """The base model: a checkpoint, or sizes for one that the study pretrains itself."""

    path: str = ""
    """Hugging Face directory or hub id. Empty: made from `family` and `sizes`, then pretrained."""
    revision: str = "main"
    family: str = "gpt2"
    """Family of a model that is made here."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Fields of that family's configuration; the vocabulary comes from the task's tokenizer."""
    dtype: str = "auto"
    """Of the frozen base: auto is bfloat16 on accelerators and float32 on CPU."""

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"model.dtype: {nearest(self.dtype, DTYPES)}")


@dataclass(frozen=True)
class MethodSpec:
    """One fine-tuning method and the learning rates to choose from."""

    name: str
    learning_rates: tuple[float, ...]
    """Peak learning rates; the one with the lowest validation loss is used."""
    rank: int = 0
    alpha: float = 16.0
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dropout: float = 0.0
    targets: str = "all-linear"
    """all-linear, attention, qv, or a regular expression for whole paths (blocks.attn.q)."""
    layers: str = "first"
    """Which layers when layer_fraction < 1: first, last or random; or a list such as 0,3,5."""
    layer_fraction: float = 1.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression for whole paths -> rank, where it is not `rank`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression for whole paths -> alpha, where it is not `alpha`."""
    init: str = "kaiming"
    """Of the factors: kaiming (PEFT's default), gaussian, pissa or olora."""
    dora: bool = False
    """Train the norm of every output unit as well."""
    plus_ratio: float = 1.0
    """LoRA+: learning rate of B as a multiple of that of A."""
    epochs: int = 0
    """In a study, where this method trains for another number of epochs; 0: train.epochs. It is the
    length of one schedule, of which the validation loss chooses the step that is kept; schedules of
    several lengths are not searched."""

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"epochs {self.epochs} is negative; 0 means train.epochs")
        require(self.name in METHOD_NAMES, f"method: {nearest(self.name, METHOD_NAMES)}")
        require(len(self.learning_rates) > 0, f"method {self.name} has no learning rate")
        for rate in self.learning_rates:
            require(rate > 0, f"learning rate {rate} is not positive; 1e-3 is a common start")
        known = self.layers in LAYER_CHOICES or LAYER_LIST.fullmatch(self.layers)
        require(bool(known), f"layers: {nearest(self.layers, LAYER_CHOICES)}")
        require(self.init in INITS, f"init: {nearest(self.init, INITS)}")
        if self.name == "lora":
            self._check_lora()
            return
        for option in ("rank_pattern", "alpha_pattern", "dora"):
            unset = not getattr(self, option)
            require(unset, f"{option} is an option of method 'lora', not of {self.name!r}")
        for option, default in (("init", "kaiming"), ("plus_ratio", 1)):
            unset = getattr(self, option) == default
            require(unset, f"{option} is an option of method 'lora', not of {self.name!r}")

    def _check_lora(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            require(rank >= 1, f"LoRA rank {rank} is below 1; use 1 or more")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            require(alpha > 0, f"LoRA alpha {alpha} is not positive; 16 is a common start")
        require(0 <= self.dropout < 1, f"LoRA dropout {self.dropout} is outside [0, 1)")
        ok = 0 < self.layer_fraction <= 1
        require(ok, f"layer_fraction {self.layer_fraction} is outside (0, 1]")
        ok = self.plus_ratio >= 1
        require(ok, f"plus_ratio {self.plus_ratio} is below 1; use 1 (off) or 16")

    @property
    def label(self) -> str:
        """What figures and tables call it, such as `LoRA r=8`; defaults are not said."""
        if self.name != "lora":
            return {"full": "full fine-tuning", "bitfit": "BitFit", "head": "head only"}[self.name]
        extras = [] if self.targets == "all-linear" else [self.targets]
        extras += ["rslora"] if self.rslora else []
        if LAYER_LIST.fullmatch(self.layers):
            extras.append(f"layers {self.layers}")
        elif self.layer_fraction < 1:
            extras.append(f"{self.layers} {self.layer_fraction:g} of layers")
        extras += [f"dropout {self.dropout:g}"] if self.dropout else []
        extras += [f"{pattern} r={rank}" for pattern, rank in self.rank_pattern.items()]
        extras += [f"{pattern} alpha={alpha:g}" for pattern, alpha in self.alpha_pattern.items()]
        extras += [self.init] if self.init != "kaiming" else []
        extras += [f"B's rate x{self.plus_ratio:g}"] if self.plus_ratio != 1 else []
        kind = ("DoRA" if self.dora else "LoRA") + ("+" if self.plus_ratio != 1 else "")
        alpha = f" alpha={self.alpha:g}" if self.alpha != MethodSpec.alpha else ""
        return f"{kind} r={self.rank}{alpha}" + (f" ({', '.join(extras)})" if extras else "")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of this method's row in METHODS."""
        if self.name != "lora":
            return {}
        ours = ("name", "learning_rates", "epochs")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ours}


@dataclass(frozen=True)
class TaskSpec:
    """The data: a row of TASKS, its options, and what judges the completions."""

    name: str = "world"
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that row."""
    scorer: str = ""
    """lexicon:PATH, or package.module:function. Empty: the task's own harm words."""


@dataclass(frozen=True)
class TrainSpec:
    """How to train, for pretraining and for every fine-tuning method alike."""

    epochs: int = 3
    batch_size: int = 16
    """Rows of one optimizer step."""
    accumulate: int = 1
    """Micro-batches that one step's rows are split into; the result is the same."""
    max_length: int = 64
    learning_rate: float = 1e-3
    """Peak, for pretraining; methods bring their own."""
    schedule: str = "cosine"
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    """Decoupled; not on norms and biases."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    steps_per_call: int = 32
    """Optimizer steps inside one compiled call; does not change the result."""
    remat: str = "dots"
    """What a layer keeps for the backward pass: none (of it is computed again), dots (the matrix
    products' results are kept), offload (the same, in host memory), full (all is computed again).
    Less memory in this order, and slower; the result is the same."""
    checkpoint_seconds: float = field(default=60.0, metadata=NO_RESULT)
    """Between two checkpoints: what is lost at most when the process is killed."""
    sweep_size: int = field(default=0, metadata=NO_RESULT)
    """In a study, how many runs are trained together at most; 0: as many as are quicker so and as
    memory has room for; 1: each alone. Full fine-tuning on a CPU is always alone. Over a base below
    float32 runs are alone unless a number says otherwise: there products of several runs round in
    another way, which moved losses by 1e-3 in 50 steps of a tiny model."""

    def __post_init__(self) -> None:
        require(self.schedule in SCHEDULES, f"schedule: {nearest(self.schedule, SCHEDULES)}")
        require(self.remat in REMATS, f"train.remat: {nearest(self.remat, REMATS)}")
        for name in ("epochs", "batch_size", "accumulate", "steps_per_call"):
            require(getattr(self, name) >= 1, f"train.{name} {getattr(self, name)} is below 1")
        require(self.max_length >= 2, f"train.max_length {self.max_length} is below 2")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} is not divisible by accumulate {self.accumulate};"
            f" use {self.batch_size - self.batch_size % self.accumulate or self.accumulate}",
        )
        ok = 0 <= self.warmup_fraction < 1
        require(ok, f"train.warmup_fraction {self.warmup_fraction} is outside [0, 1)")
        ok = self.checkpoint_seconds >= 0
        require(ok, f"train.checkpoint_seconds {self.checkpoint_seconds} is negative; 60 is usual")
        require(self.sweep_size >= 0, f"train.sweep_size {self.sweep_size} is negative; 0 is usual")


@dataclass(frozen=True)
class MeshSpec:
    """How many devices share what; -1 in one place stands for all that are left."""

    data: int = 1
    """Copies of the model, each with its share of a batch's rows."""
    fsdp: int = -1
    """Devices that share the rows of a batch, and the parameters as well."""
    tensor: int = 1
    """Devices that share the inside of every layer."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name} {size} is neither -1 nor at least 1")
        unknown = [name for name, size in sizes.items() if size == -1]
        most = f"mesh: {' and '.join(unknown)} are -1; only one can be what is left, set the others"
        require(len(unknown) <= 1, f"{most} to 1")


@dataclass(frozen=True)
class EvalSpec:
    """What is measured of every run, the same for all of them."""

    samples_per_prompt: int = 8
    max_new_tokens: int = 8
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    threshold: float = 0.5
    """A completion counts as harmful when its score is at least this."""
    posterior_prompts: int = 256
    """Prompts whose whole next-token distribution is stored, evenly spaced; bounds disk use."""
    batch_size: int = 64
    level: float = 0.95
    """Of every interval."""
    num_resamples: int = 4000
    seed: int = 0
    """Of sampling and resampling; the same draws for every run."""
    positive: str = ""
    """Classification: the class that rates speak of. Empty: the last one."""
    minimum: int = 10
    """Rows (positives, negatives) that a rate of a group needs; fewer are listed as too few."""
    num_bins: int = 15
    """Of the calibration error."""
    margin: float = 0.05
    """Differences within it, either way, would not matter (equivalence tests)."""
    match: str = "accuracy"
    """Classification: LoRA is matched to full fine-tuning in this on validation rows; or f1."""

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "max_new_tokens", "batch_size", "posterior_prompts"):
            require(getattr(self, name) >= 1, f"evaluate.{name} {getattr(self, name)} is below 1")
        require(self.temperature >= 0, f"evaluate.temperature {self.temperature} is negative")
        require(self.top_k >= 0, f"evaluate.top_k {self.top_k} is negative; 0 means all tokens")
        require(0 < self.top_p <= 1, f"evaluate.top_p {self.top_p} is outside (0, 1]")
        require(0 < self.level < 1, f"evaluate.level {self.level} is outside (0, 1)")
        for name in ("minimum", "num_bins"):
            require(getattr(self, name) >= 1, f"evaluate.{name} {getattr(self, name)} is below 1")
        require(self.margin > 0, f"evaluate.margin {self.margin} is not positive")
        require(self.match in UTILITIES, f"evaluate.match: {nearest(self.match, UTILITIES)}")


@dataclass(frozen=True)
class MembershipSpec:
    """An audit of what reported runs remember, by shadow models: their method on other rows."""

    shadows: int = 0
    """Of each audited method; more make the attack stronger. 0: 64 online, 16 as published."""
    protocol: str = "online"
    """online: each audited row trains half of them; published (arXiv 2405.17512): none."""
    rows: int = 0
    """As published, those that a shadow trains on; 0: as many as its target, that is, as the study
    trains on (the paper has half as many)."""
    methods: tuple[str, ...] = ()
    """Labels of those to audit; empty: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        protocol = nearest(self.protocol, PROTOCOLS)
        require(self.protocol in PROTOCOLS, f"membership.protocol: {protocol}")
        number = self.num_shadows
        if self.protocol == "published":
            require(number >= 2, f"membership.shadows {number} is below 2; 16 is usual")
            require(self.rows >= 0, f"membership.rows {self.rows} is negative; 0 is usual")
            return
        near = max(2, number + number % 2)
        require(near == number, f"membership.shadows {number} is not even; use {near}")
        unset = "online, shadows train on halves of the audited rows; use 0"
        require(not self.rows, f"membership.rows {self.rows} is for protocol 'published': {unset}")

    @property
    def num_shadows(self) -> int:
        """Of each audited method."""
        return self.shadows or PROTOCOLS[self.protocol]


@dataclass(frozen=True)
class Study:
    """One question, one base model, one task, and a grid of runs."""

    name: str
    question: str
    model: ModelSpec
    task: TaskSpec
    methods: tuple[MethodSpec, ...]
    train: TrainSpec
    seeds: tuple[int, ...] = (1, 2, 3)
    tune_seed: int = 0
    """Seed of the runs that choose the learning rate; not one of `seeds`."""
    pretrain: TrainSpec | None = None
    evaluate: EvalSpec = EvalSpec()
    mesh: MeshSpec = MeshSpec()
    membership: MembershipSpec | None = None

    def __post_init__(self) -> None:
        require(len(self.methods) > 0, "a study needs at least one method")
        require(len(self.seeds) > 0, "a study needs at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds {self.seeds} repeat")
        require(
            self.tune_seed not in self.seeds,
            f"tune_seed {self.tune_seed} is one of seeds {self.seeds}: the learning rate would be"
            f" chosen on a run that is then reported; use {max(self.seeds) + 1}",
        )
        labels = [method.label for method in self.methods]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        require(not repeated, f"methods appear twice: {repeated}")
        for label in self.membership.methods if self.membership else ():
            require(label in labels, f"membership.methods: {nearest(label, labels)}")
        require(
            bool(self.model.path) != (self.pretrain is not None),
            "give model.path (a checkpoint) or pretrain (make the model here), not both or neither",
        )


@dataclass(frozen=True)
class Run:
    """One cell of a study's grid."""

    kind: str
    """base, tune (chooses a learning rate), final (is reported) or shadow (of an audit)."""
    method: MethodSpec | None
    learning_rate: float | None
    seed: int | None

    @property
    def label(self) -> str:
        """What figures and tables call its method."""
        return "base" if self.method is None else self.method.label


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal characters that change when any part does; the same on every machine.

    Fields that no result depends on (NO_RESULT) are not part of it.
    """
    text = json.dumps(plain(parts, results=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(value: Any, *, results: bool = False) -> Any:
    """Dataclasses, mappings and tuples as what JSON can hold.

    results: without the fields that no result depends on.
    """
    inner = functools.partial(plain, results=results)
    if dataclasses.is_dataclass(value):
        kept = [f for f in fields(value) if not results or f.metadata.get("result", True)]
        return {f.name: inner(getattr(value, f.name)) for f in kept}
    if isinstance(value, Mapping):
        return {str(k): inner(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [inner(v) for v in value]
    return value
