"""The command line: parse, call, print. Heavy packages are imported where they are used."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HELP = """\
jax-lowrank: what does low-rank fine-tuning leave behind, compared with full fine-tuning?

commands
  study CONFIG [--out DIR] [--FIELD VALUE ...]   run a study, or continue it, and report it
  report DIR                                     report a results directory again
  export RUN --format hf|peft [--out DIR]        a finished run for transformers or for PEFT

examples
  jax-lowrank study configs/demo.py
  jax-lowrank study configs/demo.py --out results/long --train.epochs 6 --seeds 1 2 3 4 5
  jax-lowrank study configs/stories_honest.py --help      every field of that study, and its value
  jax-lowrank report results/demo
  jax-lowrank export results/demo/runs/0390465ffc8e30e7 --format peft

CONFIG is a Python file with a function config() that returns a Study, or FILE.py:FUNCTION.
Results go to results/NAME; a run that is finished there is not run again.
Exit codes: 0 done, 1 a run failed, 2 the input is wrong, 130 interrupted.
"""


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
    commands = {"study": study_command, "report": report_command, "export": export_command}
    if args[0] not in commands:
        from jax_lowrank.config import nearest

        return fail(f"command {nearest(args[0], commands)}; see jax-lowrank --help")
    if len(args) < 2 or args[1] in ("-h", "--help"):
        print(HELP)
        return 0 if len(args) > 1 else fail(f"{args[0]} needs an argument")
    try:
        return commands[args[0]](args[1], args[2:])
    except KeyboardInterrupt:
        return fail("interrupted; the same command continues with the next unfinished run", 130)


def fail(message: str, code: int = 2) -> int:
    """Say what is wrong, and return the exit code."""
    print(f"jax-lowrank: {message}", file=sys.stderr)
    return code


def note(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def study_command(config: str, rest: list[str]) -> int:
    """Run the study of a config file, and write its report."""
    from jax_lowrank.config import ConfigError, Study, load_config

    try:
        study = load_config(config)
    except (ConfigError, OSError) as error:
        return fail(str(error))
    out, rest = take_option(rest, "--out")
    if rest:
        import tyro

        try:
            study = tyro.cli(
                Study, default=study, args=rest, prog=f"jax-lowrank study {config} [--out DIR]"
            )
        except ConfigError as error:
            return fail(str(error))
    use_fast_memory()
    set_up_jax()
    from jax_lowrank import results
    from jax_lowrank.study import execute, prepare
    from jax_lowrank.train import DivergedError

    directory = Path(out or f"results/{study.name}")
    try:
        prepared = prepare(study, directory, note)
    except (ValueError, OSError) as error:
        return fail(str(error))
    try:
        execute(prepared, note)
    except results.ResultsError as error:
        return fail(str(error))
    except (DivergedError, OSError) as error:
        return fail(str(error), 1)
    return write_report(directory)


def report_command(directory: str, rest: list[str]) -> int:
    """Make the report of finished runs again."""
    if rest:
        return fail(f"report takes one directory; {rest[0]!r} is too much")
    return write_report(Path(directory))


def export_command(run: str, rest: list[str]) -> int:
    """Write a finished run as a Hugging Face model or a PEFT adapter."""
    out, rest = take_option(rest, "--out")
    format, rest = take_option(rest, "--format")
    if rest or format is None:
        return fail(
            f"export takes one run; {rest[0]!r} is too much" if rest else "export needs --format"
        )
    set_up_jax()
    from jax_lowrank.export import export

    try:
        path = export(Path(run), format, Path(out) if out else None)
    except (ValueError, OSError) as error:
        return fail(str(error))
    print(f"exported: {path}")
    return 0


def write_report(directory: Path) -> int:
    """Write the page and the tables, and say what was found."""
    from jax_lowrank import results
    from jax_lowrank.report import claims, page

    try:
        result = results.read_study(directory)
        path = page.write(directory, result)
    except (results.ResultsError, OSError) as error:
        return fail(str(error))
    print(claims.as_text(result))
    print(f"report: {path}")
    return 0


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `name` in args (as `name VALUE` or `name=VALUE`), and the other arguments."""
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(f"{name}="):
            return arg.split("=", 1)[1], args[:i] + args[i + 1 :]
    return None, args


def use_fast_memory() -> None:
    """Start again with huge pages for malloc (Linux): 1.1 to 1.2 times faster steps on CPU.

    glibc reads the setting when a process starts. The same variable stops this from looping.
    """
    tunable = "glibc.malloc.hugetlb=1"
    known = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in known:
        os.environ["GLIBC_TUNABLES"] = f"{known}:{tunable}" if known else tunable
        os.execv(sys.executable, [sys.executable, "-m", "jax_lowrank", *sys.argv[1:]])


def set_up_jax() -> None:
    """Keep compiled programs between sessions, and transformers' notices out of the output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax

    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "jax_lowrank"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
