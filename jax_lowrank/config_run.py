"""What one run is, and what a finished one is asked: frozen dataclasses, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, field

from jax_lowrank.config import (
    DTYPES,
    METHOD_NAMES,
    MeshSpec,
    MethodSpec,
    TrainSpec,
    nearest,
    require,
)

DATA_KINDS = ("auto", "text", "completion", "chat", "classification", "masked-lm")


@dataclass(frozen=True)
class ColumnSpec:
    """Which column of the data is what."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    """A conversation: a list of messages with role and content."""
    label: str = "label"


@dataclass(frozen=True)
class RowsSpec:
    """Examples in a file."""

    path: str = ""
    """.jsonl, .csv, .tsv or .txt (also .gz), a directory, hub:OWNER/NAME or hub:OWNER/NAME/FILE."""
    kind: str = "auto"
    """text, completion, chat, classification or masked-lm (text for an encoder, some of its tokens
    hidden); auto goes by the columns."""
    columns: ColumnSpec = ColumnSpec()
    split_column: str = ""
    """A column that says train, validation (dev) or test."""
    labels: tuple[str, ...] = ()
    """Class names in order. Empty: those of the training rows, sorted."""
    mask_prompt: bool = True
    """Only completions and the assistant's turns count, not what comes before them."""

    def __post_init__(self) -> None:
        require(self.kind in DATA_KINDS, f"data.kind: {nearest(self.kind, DATA_KINDS)}")
        require(len(self.labels) != 1, f"data.labels has one class, {self.labels}; give 2 or more")


@dataclass(frozen=True)
class DataSpec(RowsSpec):
    """The examples of one fine-tuning run."""

    validation: str = ""
    """Another such file. Empty: the data's own split, or a seeded share of the training rows."""
    test: str = ""
    """Measured at the end only. Empty: the data's own split, if it has one."""
    validation_fraction: float = 0.1
    """That share."""
    max_train: int = 0
    """At most so many training rows, a seeded choice; 0: all."""
    seed: int = 0
    """Of the validation share and of max_train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = 0 < self.validation_fraction < 1
        require(ok, f"data.validation_fraction {self.validation_fraction} is outside (0, 1)")
        require(self.max_train >= 0, f"data.max_train {self.max_train} is negative; 0 means all")


@dataclass(frozen=True)
class LoadSpec:
    """How a model is read; a run brings its own."""

    revision: str = "main"
    """Of a Hugging Face hub id."""
    dtype: str = "auto"
    """Of the frozen base: auto is bfloat16 on accelerators and float32 on CPU."""

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"model.dtype: {nearest(self.dtype, DTYPES)}")


@dataclass(frozen=True)
class CheckpointSpec(LoadSpec):
    """The base model."""

    path: str = ""
    """Hugging Face directory or hub id, or the directory of a PEFT adapter to go on from."""


@dataclass(frozen=True)
class FinetuneSpec:
    """One run: a checkpoint, data, a method and one learning rate."""

    model: CheckpointSpec = CheckpointSpec()
    data: DataSpec = DataSpec()
    method: MethodSpec = field(default_factory=lambda: default_method("lora"))
    train: TrainSpec = field(default_factory=lambda: TrainSpec(max_length=256))
    seed: int = 0
    """Of fresh parameters, the order of the rows, and dropout."""
    eval_batch_size: int = 64
    """Rows at once when the model is measured."""
    level: float = 0.95
    """Of every interval."""
    mesh: MeshSpec = field(default_factory=MeshSpec)

    def __post_init__(self) -> None:
        rates = self.method.learning_rates
        require(len(rates) == 1, f"a run has one learning rate, not {len(rates)}; a study compares")
        require(self.method.epochs == 0, "method.epochs is for studies; use --epochs")
        require(
            self.train.learning_rate == TrainSpec().learning_rate,
            "train.learning_rate is that of pretraining; use --learning-rate",
        )
        require(self.eval_batch_size >= 1, f"eval_batch_size {self.eval_batch_size} is below 1")
        require(0 < self.level < 1, f"level {self.level} is outside (0, 1)")


def default_method(name: str) -> MethodSpec:
    """A method with a common learning rate; full fine-tuning wants a tenth of the others'."""
    require(name in METHOD_NAMES, f"method: {nearest(name, METHOD_NAMES)}")
    rate = 2e-5 if name == "full" else 2e-4
    return MethodSpec(name, (rate,), rank=8 if name == "lora" else 0)


@dataclass(frozen=True)
class GenerateSpec:
    """Continue prompts."""

    prompt: str = ""
    """One prompt."""
    prompts: str = ""
    """Many: a .txt file of lines, or a table with a column prompt (with --chat also messages)."""
    chat: bool = False
    """Wrap a prompt as the user's message in the tokenizer's chat template."""
    max_new_tokens: int = 64
    samples: int = 1
    """Continuations of each prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    seed: int = 0
    batch_size: int = 16
    model: LoadSpec = LoadSpec()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} is below 1")
        require(self.temperature >= 0, f"temperature {self.temperature} is negative")
        require(self.top_k >= 0, f"top_k {self.top_k} is negative; 0 means all tokens")
        require(0 < self.top_p <= 1, f"top_p {self.top_p} is outside (0, 1]")


@dataclass(frozen=True)
class EvaluateSpec:
    """Measure on a file."""

    data: RowsSpec = RowsSpec()
    """A run brings its kind, columns and labels."""
    max_length: int = 256
    batch_size: int = 64
    level: float = 0.95
    """Of every interval."""
    trained_rows: bool = False
    """Measure rows that the run was trained on as well; else a file that has some is refused."""
    model: LoadSpec = LoadSpec()

    def __post_init__(self) -> None:
        require(self.max_length >= 2, f"max_length {self.max_length} is below 2")
        require(self.batch_size >= 1, f"batch_size {self.batch_size} is below 1")
        require(0 < self.level < 1, f"level {self.level} is outside (0, 1)")
