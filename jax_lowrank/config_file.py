"""A study from a Python file, by the function that returns it."""

from __future__ import annotations

import difflib
import inspect
import runpy
from pathlib import Path

from jax_lowrank.config import ConfigError, Study, nearest, require


def makes_study(value: object, file: Path) -> bool:
    """Whether it is a function of this very file that returns a Study and needs no argument."""
    return (
        inspect.isfunction(value)
        and value.__code__.co_filename == str(file)
        and value.__annotations__.get("return", Study) in (Study, "Study")
        and all(p.default is not p.empty for p in inspect.signature(value).parameters.values())
    )


def load_config(name: str) -> Study:
    """The Study that FILE.py (its function `config`) or FILE.py:FUNCTION returns.

    Raises ConfigError naming the configs that lie beside an unknown one.
    """
    path, _, function = name.partition(":")
    file, function = Path(path), function or "config"
    if not file.is_file() or file.suffix != ".py":
        folder = file.parent if file.parent.is_dir() else Path("configs")
        known = sorted(str(f) for f in folder.glob("*.py"))
        close = difflib.get_close_matches(path, known, n=1) or known
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ConfigError(f"no config file {path!r}{hint}")
    namespace = runpy.run_path(str(file))
    if not callable(namespace.get(function)):
        names = [name for name, value in namespace.items() if makes_study(value, file)]
        raise ConfigError(f"function in {file}: {nearest(function, names)}")
    study = namespace[function]()
    require(isinstance(study, Study), f"{name} returns {type(study).__name__}, not a Study")
    return study
