"""The README's commands of one fine-tuning run and its exports, run as they stand there."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jax_lowrank import cli

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # test_export and test_finetune prove the parts
SECTION = "## Fine-tune a model, take the result elsewhere"
ORACLE = "tests/oracles/"  # scripts that need PyTorch
SAYS_ORACLE = ("transformers:", "PEFT:", "the base alone:", "saved by PEFT")


def blocks(language):
    """The lines of the section's first fenced block in a language."""
    section = (ROOT / "README.md").read_text().split(SECTION)[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1].splitlines()


def shape(line):
    """A line with its figures left out: they may differ in the last digit elsewhere."""
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", line)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the commands printed, line by line."""
    place = tmp_path_factory.mktemp("readme")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(place)
        patch.setattr(cli, "use_fast_memory", lambda: None)
        patch.setattr(cli, "set_up_jax", lambda: None)
        for command in blocks("sh"):
            program, *arguments = shlex.split(command, comments=True)
            if program == "jax-lowrank":
                assert cli.main(arguments) == 0, command
            elif not arguments[0].startswith(ORACLE) or (find_spec("torch") and find_spec("peft")):
                assert program == "python"
                patch.setattr(sys, "argv", arguments)
                try:
                    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
                except SystemExit as stop:
                    assert not stop.code, command
    return printed.getvalue().splitlines()


def test_the_commands_print_what_the_readme_says(said):
    found = list(map(shape, said))
    for line in blocks("text"):
        if not line.startswith(SAYS_ORACLE) or any(s.startswith(SAYS_ORACLE) for s in said):
            assert shape(line) in found, line


def test_the_adapter_measures_as_the_run_did_and_has_learnt(said):
    (answer,) = (line for line in blocks("text") if line.startswith(" In the"))
    assert answer in said
    before, after = (
        float(next(re.findall(r"perplexity ([\d.]+)", s)[0] for s in said if s.startswith(start)))
        for start in ("validation before", "validation after")
    )
    assert after < before / 2
