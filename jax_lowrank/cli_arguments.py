"""Arguments of the command line: flags of a command's own, and fields of a configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def parse(kind: type, default: Any, args: list[str], prog: str, description: str = "") -> Any:
    """`default` with the fields that args set. A rule that a value breaks is raised as ConfigError;
    tyro itself says what is wrong with a flag, and ends the program.
    """
    import contextlib
    import io

    import tyro

    from jax_lowrank.config import ConfigError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[kind],
                default=default,
                args=args,
                prog=prog,
                description=description,
            )
    except SystemExit as stop:
        cause = stop.__context__
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        if cause is None:
            sys.stderr.write(said.getvalue())
            raise
        raise ConfigError(str(cause)) from None


def split_target(command: str, what: str, args: list[str]) -> tuple[str, list[str]]:
    """The first argument and the others; ("", ["--help"]) where help is wanted instead."""
    from jax_lowrank.config import ConfigError

    if args and args[0] in ("-h", "--help"):
        return "", ["--help"]
    if not args or args[0].startswith("-"):
        raise ConfigError(f"{command} needs {what} first; see jax-lowrank {command} --help")
    return args[0], args[1:]


def lengthen(args: list[str], short: dict[str, str]) -> list[str]:
    """args with short flags written out."""
    split = [arg.partition("=") for arg in args]
    return ["".join((short.get(name, name), equals, value)) for name, equals, value in split]


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `name` in args (as `name VALUE` or `name=VALUE`), and the other arguments."""
    from jax_lowrank.config import require

    for i, arg in enumerate(args):
        if arg == name:
            require(i + 1 < len(args), f"{name} needs a value")
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith(f"{name}="):
            return arg.split("=", 1)[1], args[:i] + args[i + 1 :]
    return None, args


def take_folder(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """As `take_option`, of a folder to write to. Raises ConfigError for an address of a store."""
    from jax_lowrank.config import require

    folder, args = take_option(args, name)
    require(
        folder is None or "://" not in folder,
        f"{name} {folder} is the address of a store, which can neither rename nor lock; give a"
        f" local folder, and to study and finetune, for a copy in the store, --mirror URL",
    )
    return folder, args


def take_flag(args: list[str], name: str) -> tuple[bool, list[str]]:
    """Whether `name` is in args, and the other arguments."""
    return name in args, [arg for arg in args if arg != name]


def take_curves(args: list[str]) -> tuple[Path | None, list[str]]:
    """The directory of --track, and the other arguments."""
    from jax_lowrank.tracking import require_tensorboard

    directory, args = take_folder(args, "--track")
    if directory is None:
        return None, args
    require_tensorboard()
    return Path(directory), args
