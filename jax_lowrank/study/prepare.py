"""Everything before the first run: check the study, read its data, make or load the base model."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_lowrank import models, provenance, results, sharding, tasks, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.adapt.method import count
from jax_lowrank.checkpoint import Checkpoints
from jax_lowrank.config import ConfigError, Study, fingerprint, nearest, require
from jax_lowrank.mirror import Mirror
from jax_lowrank.processes import once
from jax_lowrank.progress import Progress, clock
from jax_lowrank.study import membership
from jax_lowrank.study.kinds import kind_of
from jax_lowrank.study.mirrored import checkpoints_of
from jax_lowrank.study.parts import Prepared, Text
from jax_lowrank.study.training import fit, make_program, mean_nll, progress_log, train_batches
from jax_lowrank.workers import has_locks, turn

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def prepare(
    study: Study,
    out: Path,
    note: Callable[[str], None],
    devices: list | None = None,
    mirror: Mirror | None = None,
) -> Prepared:
    """Check everything that can be checked before work starts, and make the base model.

    devices: of the mesh, in their order; None: all. mirror: of `out`.

    Raises ValueError (ConfigError, TaskError, WeightsError, ...) or OSError, in one sentence.
    """
    check_writable(out)
    mirror = mirror or Mirror(None, out)
    if not has_locks(out / "claims"):
        note(f"{out} has no file locks: run one worker at a time there")
    mesh = sharding.make_mesh(*vars(study.mesh).values(), devices)
    check_devices(study, mesh)
    task = make_task(study)
    kind = kind_of(task)
    if study.membership is not None:
        require(kind.name == "classification", "membership: only classification can be audited")
        task = membership.with_pool(task, study.membership)
    scorer = kind.scorer(study, task)
    dtype = param_dtype(study.model.dtype)
    if study.pretrain is None:
        source = study.model.path
        directory = models.weights.resolve(source, study.model.revision)
    else:
        text = world_text(task)
        check_methods(study, new_model(study, text.vocab_size))
        directory = pretrain(study, task, text, mirror, note, mesh)
        source = "pretrained here"
    text = load_text(directory)
    model, drawn = load_model(directory, dtype, kind.head(task), study.tune_seed, mesh)
    note_uncut(model, mesh, note)
    check_methods(study, model)
    text = text._replace(vocab_size=model.config.vocab_size)
    model = kind.finish_model(study, task, text, model, mesh)
    kind.check(study, task, text, model)
    pretrained = provenance.read_json(directory / "pretrain.json")
    weights_hash = provenance.hash_files(directory)
    parts = (kind, task, scorer, text, model, drawn, source, pretrained, weights_hash, mesh)
    return Prepared(study, out, *parts, mirror)


def load_model(
    directory: Path, dtype, head: models.Head, seed: int, mesh
) -> tuple[models.Model, tuple[str, ...]]:
    """The base model with the head that the task asks for, and the paths of what was drawn."""
    stored = head if head.kind == "causal-lm" else models.head_of(directory)
    lacking = stored is None or stored.kind != head.kind
    key = jax.random.key(seed) if lacking else None
    model = models.load(directory, dtype, head, key, sharding.where(mesh))
    return model, model.head_paths if lacking else ()


def check_devices(study: Study, mesh) -> None:
    """Raise MeshError where the devices cannot take the steps that are asked for."""
    for name, spec in (("train", study.train), ("pretrain", study.pretrain)):
        if spec is not None:
            sharding.check_rows(f"{name}.batch_size", spec.batch_size, spec.accumulate, mesh)
            sharding.check_remat(f"{name}.remat", spec.remat)


def note_uncut(model: models.Model, mesh, note: Callable[[str], None]) -> None:
    """Say which dimensions no axis cuts because it does not divide them."""
    shapes = {path: array.shape for path, array in models.by_path(model.params).items()}
    lines = sharding.uncut(shapes, mesh)
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        note(f"whole on every device: {'; '.join(lines[:3])}{more}")


def check_writable(out: Path) -> None:
    """Raise ResultsError unless files can be made under `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # another worker's may have been the same file
    except OSError as error:
        raise results.ResultsError(f"cannot write to {out}: {error.strerror}") from error


def make_task(study: Study) -> tasks.Task | tasks.Classification:
    """The study's task, from TASKS and its options."""
    require(study.task.name in tasks.TASKS, f"task: {nearest(study.task.name, tasks.TASKS)}")
    make = tasks.TASKS[study.task.name]
    known = inspect.signature(make).parameters
    for option in study.task.options:
        require(option in known, f"option of task {study.task.name}: {nearest(option, known)}")
    for name, parameter in known.items():
        missing = parameter.default is parameter.empty and name not in study.task.options
        require(not missing, f"task {study.task.name} needs the option {name!r}")
    return make(**study.task.options)


def param_dtype(name: str):
    """The dtype of the frozen base: `auto` is bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_text(directory: Path) -> Text:
    """The tokenizer in a Hugging Face directory."""
    from transformers import AutoTokenizer

    # Without them transformers makes an empty tokenizer and says nothing.
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{directory} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{directory} holds no tokenizer that can be read: {reason}") from error
    return text_of(tokenizer)


def world_text(task: tasks.Task) -> Text:
    """A word-level tokenizer for a task whose vocabulary is closed."""
    require(task.name == "world", f"only the task 'world' can be pretrained on, not {task.name!r}")
    return text_of(tasks.world.word_tokenizer(task))


def text_of(tokenizer: Any) -> Text:
    """How the study uses a tokenizer. The pad is any id: nothing ever looks at it."""
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos or 0)
    return Text(tokenizer, len(tokenizer), pad, eos, tokenizer.bos_token_id is not None)


def new_model(study: Study, vocab_size: int) -> models.Model:
    """The model that the study pretrains, with random weights."""
    config_class = models.family_of(study.model.family).config
    sizes = {"vocab_size": vocab_size, **study.model.sizes}
    known = inspect.signature(config_class).parameters
    for name in sizes:
        require(name in known, f"size of {study.model.family}: {nearest(name, known)}")
    key = jax.random.key(study.tune_seed)
    return models.create(study.model.family, config_class(**sizes), key)


def check_methods(study: Study, model: models.Model) -> None:
    """Split the model by every method: wrong targets and ranks are found before any training."""
    for spec in study.methods:
        if spec.name != "full":  # which fits any model, and would copy it
            METHODS[spec.name](**spec.options()).split(jax.random.key(0), model)


def pretrain(study: Study, task, text: Text, mirror: Mirror, note: Callable, mesh) -> Path:
    """Make the base model, or find the one made before; a Hugging Face directory."""
    spec, out = study.pretrain, mirror.folder
    name = fingerprint(
        study.model, spec, tasks.data_hash(task), provenance.code_hash(), study.tune_seed
    )
    final, group = out / "base" / name, f"checkpoints/base-{name}"
    waiting = f"base model: another worker makes {final}"
    with turn(out / "claims" / f"base-{name}", lambda: note(waiting)):
        once(lambda: mirror.fetch(f"base/{name}"))
        if once(lambda: (final / "config.json").is_file()):
            note(f"base model: found {final}")
            once(lambda: shutil.rmtree(out / group, ignore_errors=True))  # of one killed at its end
        else:
            once(lambda: results.clear_partial(final))
            checkpoints = checkpoints_of(mirror, group, name, spec.checkpoint_seconds, note)
            make_base(study, task, text, final, checkpoints, note, mesh)
        once(lambda: mirror.push(f"base/{name}"))
        once(lambda: mirror.keep(group))
    return final


def make_base(
    study: Study, task, text: Text, final: Path, checkpoints: Checkpoints, note: Callable, mesh
) -> None:
    """Pretrain the base model, and write it to `final`."""
    spec = study.pretrain
    model = new_model(study, text.vocab_size)
    method = METHODS["full"]()
    graphdef, trainable, frozen = method.split(jax.random.key(study.tune_seed), model)
    trainable = sharding.put(trainable, mesh)
    encode = functools.partial(text.encode, max_length=spec.max_length, eos=True)
    held_out = encode(task.splits["pretrain_validation"].texts)
    batches = train_batches(
        encode(task.splits["pretrain"].texts), spec, study.tune_seed, text.pad_id, mesh
    )
    program = make_program(spec, method, graphdef, trainable)
    note(f"pretraining {model.family}, {count(trainable):,} parameters")
    with Progress(train.num_steps(batches, spec.epochs)) as progress:
        fitted = fit(
            spec,
            program,
            trainable=trainable,
            frozen=frozen,
            batches=batches,
            peak=spec.learning_rate,
            validate=lambda trainable: mean_nll(
                program.apply,
                (trainable, frozen),
                held_out,
                batch_size=study.evaluate.batch_size,
                pad_id=text.pad_id,
            ),
            log=progress_log(progress, "pretraining"),
            key=jax.random.key(study.tune_seed),
            checkpoints=checkpoints,
        )
    note(f"pretrained in {clock(fitted.seconds)}: {fitted.validation_loss:.3f} nats per token")
    weights = sharding.fetch(fitted.trainable)

    def write(directory: Path) -> None:
        tokens = {name: getattr(text.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        models.save(directory, model, weights, tokens=tokens)
        text.tokenizer.save_pretrained(directory)
        summary = {
            "steps": fitted.num_steps,
            "validation_loss": fitted.validation_loss,
            "seconds": round(fitted.seconds, 2),
        }
        (directory / "pretrain.json").write_text(json.dumps(summary))

    once(lambda: results.write_directory(final, write))
    checkpoints.remove()
