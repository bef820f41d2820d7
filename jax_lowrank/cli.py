"""The command line: parse, call, print. Heavy packages are imported where they are used."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from jax_lowrank.cli_arguments import (
    lengthen,
    parse,
    split_target,
    take_curves,
    take_flag,
    take_folder,
    take_option,
)
from jax_lowrank.cli_help import (
    AUDIT_HELP,
    EVALUATE_HELP,
    EXPORT_HELP,
    FINETUNE_HELP,
    GENERATE_HELP,
    HELP,
)
from jax_lowrank.processes import is_first, join, once, set_up_jax, use_fast_memory

SHORT = {
    "--model": "--model.path",
    "--data": "--data.path",
    "--task": "--data.kind",
    "--validation": "--data.validation",
    "--test": "--data.test",
    "--rank": "--method.rank",
    "--learning-rate": "--method.learning-rates",
    "--epochs": "--train.epochs",
    "--batch-size": "--train.batch-size",
    "--max-length": "--train.max-length",
}


STOPPED = 75  # EX_TEMPFAIL: the same command goes on


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if args[0] == "--version":
        from jax_lowrank import __version__

        print(__version__)
        return 0
    commands = {
        "study": study_command,
        "audit-topology": audit_command,
        "report": report_command,
        "finetune": finetune_command,
        "generate": generate_command,
        "evaluate": evaluate_command,
        "export": export_command,
    }
    if args[0] not in commands:
        from jax_lowrank.config import nearest

        return fail(f"command {nearest(args[0], commands)}; see jax-lowrank --help")
    if args[0] not in ("study", "finetune"):
        try:
            return commands[args[0]](args[1:])
        except KeyboardInterrupt:
            return fail("interrupted", 130)
    # What a scheduler sends before it kills is Ctrl-C here; training saves before it stops.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return commands[args[0]](args[1:])
    except KeyboardInterrupt as stop:
        return fail(f"{str(stop) or 'interrupted'}; the same command goes on from there", STOPPED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def fail(message: str, code: int = 2) -> int:
    """Say what is wrong, and return the exit code."""
    print(f"jax-lowrank: {message}", file=sys.stderr)
    return code


def note(text: str) -> None:
    """A line of progress; of several processes the first one speaks."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def study_command(args: list[str]) -> int:
    """Run the study of a config file, or a shard of it, and report it when all is finished."""
    from jax_lowrank.config import Study
    from jax_lowrank.config_file import load_config
    from jax_lowrank.workers import shard_of

    try:
        config, rest = split_target("study", "a config file", args)
        if not config:
            print(HELP)
            return 0
        out, rest = take_folder(rest, "--out")
        address, rest = take_option(rest, "--mirror")
        part, rest = take_option(rest, "--shard")
        curves, rest = take_curves(rest)
        shard = shard_of(part, os.environ)
        distributed, rest = take_flag(rest, "--distributed")
        alone, rest = take_flag(rest, "--no-sweep")
        study = load_config(config)
        if rest:
            flags = "[--out DIR] [--mirror URL] [--shard i/n] [--track DIR] [--distributed]"
            flags += " [--no-sweep]"
            study = parse(Study, study, rest, f"jax-lowrank study {config} {flags}")
    except (ValueError, OSError) as error:
        return fail(str(error))
    use_fast_memory()
    set_up_jax()
    from jax_lowrank import results
    from jax_lowrank.mirror import Mirror
    from jax_lowrank.study import execute, mirrored, prepare
    from jax_lowrank.train import DivergedError

    directory = Path(out or f"results/{study.name}")
    try:
        join(distributed, os.environ)
        mirror = Mirror(address, directory, note)
        prepared = prepare(study, directory, note, mirror=mirror)
    except (ValueError, OSError) as error:
        return fail(str(error))
    try:
        left = execute(prepared, note, shard, curves if is_first() else None, together=not alone)
    except results.ResultsError as error:
        return fail(str(error))
    except (DivergedError, OSError) as error:
        return fail(str(error), 1)
    if left:
        print(f"this shard is finished; {left} runs of other shards are not: no report yet")
        return 0
    code = once(lambda: write_report(directory))
    if code == 0:
        try:
            once(lambda: mirrored.end(mirror))
        except OSError as error:
            return fail(str(error), 1)
    return code


def audit_command(args: list[str]) -> int:
    """The same few steps of a study on several meshes, beside other seeds."""
    from jax_lowrank.config import ConfigError
    from jax_lowrank.config_file import load_config

    try:
        config, rest = split_target("audit-topology", "a config file", args)
        if not config:
            print(AUDIT_HELP)
            return 0
        out, rest = take_folder(rest, "--out")
        steps, rest = take_option(rest, "--steps")
        if rest or not (steps or "20").isdecimal():
            return fail(f"audit-topology does not take {(rest or [steps])[0]!r}; see its --help")
        study = load_config(config)
        use_fast_memory()
        set_up_jax()
        from jax_lowrank.study import audit

        directory = Path(out or f"results/{study.name}-topology")
        print(audit.run(study, directory, int(steps or 20), note))
    except (ConfigError, ValueError, OSError) as error:
        return fail(str(error))
    return 0


def report_command(args: list[str]) -> int:
    """Make the report of finished runs again."""
    try:
        directory, rest = split_target("report", "a results directory", args)
    except ValueError as error:
        return fail(str(error))
    if not directory:
        print(HELP)
        return 0
    if rest:
        return fail(f"report takes one directory; {rest[0]!r} is too much")
    return write_report(Path(directory))


def finetune_command(args: list[str]) -> int:
    """One run, or what it would be."""
    from jax_lowrank.config import require
    from jax_lowrank.config_run import FinetuneSpec, default_method

    prog = "jax-lowrank finetune [--out DIR] [--mirror URL] [--track DIR] [--dry-run [--devices N]]"
    prog += " [--distributed]"
    try:
        out, args = take_folder(args, "--out")
        address, args = take_option(args, "--mirror")
        name, args = take_option(lengthen(args, {"--method.name": "--method"}), "--method")
        dry, args = take_flag(args, "--dry-run")
        devices, args = take_option(args, "--devices")
        distributed, args = take_flag(args, "--distributed")
        curves, args = take_curves(args)
        default = FinetuneSpec(method=default_method(name or "lora"))
        spec = parse(FinetuneSpec, default, lengthen(args, SHORT), prog, FINETUNE_HELP)
        require(devices is None or dry, "--devices plans memory: it goes with --dry-run")
        require((devices or "1").isdecimal(), f"--devices {devices} is not a number of devices")
    except ValueError as error:
        return fail(str(error))
    use_fast_memory()
    set_up_jax()
    from jax_lowrank import finetune, results
    from jax_lowrank.mirror import Mirror, MirrorError
    from jax_lowrank.train import DivergedError

    try:
        join(distributed, os.environ)
        if devices:
            from jax_lowrank import memory

            print(memory.plan(spec, int(devices)))
            return 0
        job = finetune.prepare(spec, out or "", note)
        mirror = Mirror(address, job.out.absolute().parent, note)
        if dry:
            from jax_lowrank import dry_run

            print(dry_run.finetuning(job))
            return 0
        record = finetune.finished(job)
        tidy = once(lambda: not finetune.saves(job.out).exists())
    except (ValueError, OSError) as error:
        return fail(str(error))
    try:
        if record is not None:
            note(f"{job.out} is finished: this run was done before")
        if record is None or not tidy:  # it may have been killed while it deleted its checkpoints
            record = finetune.execute(job, note, mirror, curves if is_first() else None)
        else:
            once(lambda: mirror.push(job.out.name))
    except results.ResultsError as error:
        return fail(str(error))
    except MirrorError as error:
        return fail(str(error), 1)
    except (DivergedError, OSError) as error:
        return fail(f"{error}; nothing was written", 1)
    print("\n".join(finetune.summary(record)))
    print(f"run: {job.out}")
    return 0


def generate_command(args: list[str]) -> int:
    """Continuations of prompts, on stdout."""
    from jax_lowrank.config_run import GenerateSpec

    try:
        target, rest = split_target("generate", "a run or a model", args)
        dry, rest = take_flag(rest, "--dry-run")
        prog = "jax-lowrank generate RUN_OR_MODEL [--dry-run]"
        spec = parse(GenerateSpec, GenerateSpec(), rest, prog, GENERATE_HELP)
        set_up_jax()
        from jax_lowrank import dry_run, trained

        prompts = trained.read_prompts(spec)
        model = trained.load(target, spec.model)
        if dry:
            print(dry_run.generating(model, prompts, spec))
            return 0
        texts = trained.generate(model, prompts, spec)
    except (ValueError, OSError) as error:
        return fail(str(error))
    for prompt, continued in zip(prompts, texts):
        if spec.prompt:
            print("\n".join(continued))
        else:
            print(json.dumps({"prompt": prompt, "completions": continued}, ensure_ascii=False))
    return 0


def evaluate_command(args: list[str]) -> int:
    """Metrics on a file."""
    from jax_lowrank.config_run import EvaluateSpec

    try:
        target, rest = split_target("evaluate", "a run or a model", args)
        out, rest = take_folder(rest, "--out")
        dry, rest = take_flag(rest, "--dry-run")
        default = _evaluation_defaults(target) if target else EvaluateSpec()
        rest = lengthen(rest, {"--data": "--data.path"})
        prog = "jax-lowrank evaluate RUN_OR_MODEL [--out DIR] [--dry-run]"
        spec = parse(EvaluateSpec, default, rest, prog, EVALUATE_HELP)
        set_up_jax()
        from jax_lowrank import dry_run, trained

        trained.check_new(out)
        model = trained.load(target, spec.model)
        if model.record and model.seen is None:
            note(f"{target} keeps no trained_on.json: rows that it was trained on are not noticed")
        if dry:
            print(dry_run.evaluating(model, spec, out))
            return 0
        metrics, arrays = trained.evaluate(model, spec)
        if out:
            trained.write_evaluation(Path(out), metrics, arrays)
    except (ValueError, OSError) as error:
        return fail(str(error))
    print(trained.sentence(metrics))
    return 0


def _evaluation_defaults(target: str) -> Any:
    """What a run says of its data, for another file of the same kind."""
    from jax_lowrank.config_run import ColumnSpec, EvaluateSpec, RowsSpec
    from jax_lowrank.results import read_run_config

    config = read_run_config(Path(target))
    if "data" not in config:
        return EvaluateSpec()
    known = config["data"]
    data = RowsSpec(
        kind=known["kind"],
        columns=ColumnSpec(**known["columns"]),
        mask_prompt=known["mask_prompt"],
    )
    return EvaluateSpec(data, config["train"]["max_length"], level=config["level"])


def export_command(args: list[str]) -> int:
    """Write a finished run as a Hugging Face model or a PEFT adapter."""
    try:
        run, rest = split_target("export", "a run", args)
        if not run:
            print(EXPORT_HELP)
            return 0
        out, rest = take_folder(rest, "--out")
        format, rest = take_option(rest, "--format")
        dry, rest = take_flag(rest, "--dry-run")
        if rest or format is None:
            what = f"takes one run; {rest[0]!r} is too much" if rest else "needs --format"
            return fail(f"export {what}; see jax-lowrank export --help")
        set_up_jax()
        from jax_lowrank import dry_run
        from jax_lowrank.export import export

        place = Path(out) if out else None
        if dry:
            print(dry_run.exporting(Path(run), format, place))
            return 0
        path = export(Path(run), format, place)
    except (ValueError, OSError) as error:
        return fail(str(error))
    print(f"exported: {path}")
    return 0


def write_report(directory: Path) -> int:
    """Write the page and the tables, and say what was found."""
    from jax_lowrank import results
    from jax_lowrank.report.kinds import report_of

    try:
        result = results.read_study(directory)
        report = report_of(result)
        path = report.write(directory, result)
    except (results.ResultsError, OSError) as error:
        return fail(str(error))
    print(report.as_text(result))
    print(f"report: {path}")
    return 0
