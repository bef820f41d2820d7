"""The house rules that a reader of ARCHITECTURE.md relies on, read from the source."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jax_lowrank"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES)

# Module -> the modules it may import; a name stands for itself and what lies below it. A package's
# __init__ is its table and may import its own room. `study`, `export` and `cli` import everything.
FLOOR_0 = ("config", "data", "sharding", "checkpoint", "results", "provenance", "progress")
FLOOR_0 += ("signals", "workers", "tracking", "masking", "mirror")
ALLOWED = {
    **dict.fromkeys((*FLOOR_0, "adapt.method"), ()),
    **dict.fromkeys(("models.splash", "models.output", "models.weights"), ()),
    **dict.fromkeys(("workers", "progress"), ("processes",)),
    "checkpoint": ("processes", "signals"),
    "models.attention": ("models.splash",),
    **dict.fromkeys(("model_card", "liveness", "processes"), ()),
    "models.layers": ("models.attention",),
    "models.head": ("models.layers", "models.weights"),
    "models.rotary": ("models.weights",),
    # the base files of the families
    "models.stack": ("models.attention", "models.layers"),
    **dict.fromkeys(
        ("models.decoder", "models.encoder"),
        ("models.attention", "models.head", "models.layers", "models.output", "models.stack"),
    ),
    "models": ("models",),
    "adapt": ("adapt",),
    "evaluation.intervals": (),
    "evaluation": ("evaluation.intervals",),
    # these put the parts together
    **dict.fromkeys(("evaluation.subgroups", "evaluation.group_calibration"), ("evaluation",)),
    "report": ("report", "evaluation", "results"),
    "tasks": ("tasks", "data", "masking"),
    "train": ("adapt.method", "sharding", "checkpoint", "data"),
    "infer": ("adapt.method", "sharding", "checkpoint", "data", "masking"),
    "sweep": ("sweep", "train", "infer", "adapt", "checkpoint", "sharding"),
    "trainable_file": ("processes", "results", "sharding"),
    "shadows": (),
    "config_file": ("config",),
    "config_run": ("config",),
    "study": ("",),
    "cli_help": (),
    "cli_arguments": ("config", "tracking"),
    "finetune": ("",),
    "starting": ("",),
    "dry_run": ("",),
    "memory": ("",),
    "trained": ("",),
    "cli": ("",),
    "export": ("",),
    "adapters": ("",),
    "__main__": ("cli",),
    "__init__": (),
}
FAMILY_BASE = tuple(
    f"models.{m}"
    for m in ("attention", "decoder", "encoder", "head", "layers", "rotary", "weights")
)


@functools.cache
def tree_of(file):
    """The syntax tree of a file of the package."""
    return ast.parse((PACKAGE / file).read_text())


def module_of(file):
    """`models/gpt2.py` -> models.gpt2, `models/__init__.py` -> models."""
    name = file.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__") if "." in name else name


MODULES = {module_of(file) for file in FILES}


def imports(tree):
    """Every module that a tree imports, inside functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(file):
    """The package's modules that a file imports, without the package's name."""
    for name in imports(tree_of(file)):
        if name.split(".")[0] == "jax_lowrank":
            inner = name.removeprefix("jax_lowrank").removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            if inner:
                yield inner


def lies_in(module, room):
    return not room or module == room or module.startswith(room + ".")


def allowed_for(module, is_table):
    """What the most specific row of ALLOWED says of a module."""
    rows = [room for room in ALLOWED if lies_in(module, room)]
    assert rows, f"{module}: a new room; give it a row in ALLOWED"
    room = max(rows, key=len)
    if room == "models" and not is_table:
        return FAMILY_BASE
    if room == "adapt" and not is_table:
        return ("adapt.method",)
    return ALLOWED[room]


@every_file
def test_who_imports_whom(file):
    module = module_of(file)
    rooms = allowed_for(module, file.endswith("__init__.py"))
    for name in own_imports(file):
        assert any(lies_in(name, room) for room in rooms), f"{module} may not import {name}"


def roots(tree):
    return {name.split(".")[0] for name in imports(tree)}


@every_file
def test_flax_and_oracles_stay_in_their_rooms(file):
    found = roots(tree_of(file))
    if not file.startswith(("models/", "adapt/")):
        assert "flax" not in found
    assert not found & {"torch", "peft", "fairlearn", "sklearn", "accelerate", "statsmodels"}
    assert not found & {"pickle", "dill", "joblib", "cloudpickle"}


def test_reference_libraries_stay_in_their_rooms():
    rooms = ("tests/oracles/", "experiments/benchmarks/")
    for folder in ("configs", "experiments", "tests", "tpu_scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(rooms):
                found = roots(ast.parse(path.read_text()))
                assert not found & {"torch", "peft", "fairlearn", "sklearn"}, name


@every_file
def test_only_the_composition_root_reads_a_study(file):
    if not file.startswith(("study/", "cli.py", "config.py", "config_file.py")):
        assert "jax_lowrank.config.Study" not in set(imports(tree_of(file)))
        names = {node.attr for node in ast.walk(tree_of(file)) if isinstance(node, ast.Attribute)}
        assert "Study" not in names


@every_file
def test_files_and_functions_fit(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= 400
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES, f"{node.name} has {length} lines"


MOST_LINES = 80  # "a function fits on a screen", its docstring included


def public(body):
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@every_file
def test_what_is_public_is_documented(file):
    tree = tree_of(file)
    assert ast.get_docstring(tree), "the file"
    for node in public(tree.body):
        assert ast.get_docstring(node), node.name
        if isinstance(node, ast.ClassDef):
            for method in public(node.body):
                assert ast.get_docstring(method), f"{node.name}.{method.name}"


FORBIDDEN = re.compile(
    r"\b(pjit|pmap|nnx\.jit|trust_remote_code|pickle\.|allow_pickle=True|torch\.load|TODO|FIXME)\b"
)


@every_file
def test_forbidden_names(file):
    found = FORBIDDEN.search((PACKAGE / file).read_text())
    assert not found, found


@every_file
def test_no_paths_of_one_machine(file):
    assert not re.search(r"/(work|home|root|tmp)/", (PACKAGE / file).read_text())
