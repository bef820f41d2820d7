"""PEFT's adapter files in and out: adapter_config.json and adapter_model.safetensors.

The family's table of rows (`models.weights.Row`) gives each stacked linear layer its module names.
PEFT stores lora_A as (r, in) and lora_B as (out, r), one pair a layer; here the n adapted layers of
a stack lie in `a` (n, in, r) and `b` (n, r, out). What one side cannot express is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PREFIX = "base_model.model."
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "embedding": "FEATURE_EXTRACTION",
    "masked-lm": None,
}
# PEFT's init_lora_weights -> our init. Other values change the base weights or need data.
INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian"}
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# Fields that say what to build. The tensors in the file already tell which modules are adapted.
READ = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern"),
    *("alpha_pattern", "use_dora", "init_lora_weights", "modules_to_save", "target_modules"),
    *("layers_to_transform", "layers_pattern"),
)
# Fields without effect on what the stored adapter computes.
IGNORED = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "exclude_modules", "fan_in_fan_out", "qalora_group_size", "megatron_core"),
)


class PeftError(ValueError):
    """An adapter cannot be carried over; the message names the field or tensor and its value."""


class PeftFiles(NamedTuple):
    """adapter_config.json as a dict, and the tensors of adapter_model.safetensors by name."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Imported(NamedTuple):
    """Keyword arguments of `lora.make`, and the trainable arrays by dotted path."""

    options: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read(directory: Path) -> PeftFiles:
    """The two files in a directory. Never a pickle."""
    from safetensors.numpy import load_file

    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if not config.is_file():
        raise FileNotFoundError(f"{directory} has no adapter_config.json; a PEFT adapter has one")
    if not weights.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        hint = "; it holds a pickle, which can run code when read" if pickled else ""
        raise FileNotFoundError(f"{directory} has no adapter_model.safetensors{hint}")
    return PeftFiles(json.loads(config.read_text(encoding="utf-8")), load_file(weights))


def write(directory: Path, files: PeftFiles) -> None:
    """Write the two files into an existing directory."""
    from safetensors.numpy import save_file

    text = json.dumps(files.config, indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    save_file(files.tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def to_peft(
    factors: Mapping[str, Any],
    heads: Mapping[str, np.ndarray],
    options: Mapping[str, Any],
    rows: Sequence,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kind: str,
    base: str,
    revision: str | None = None,
    architecture: str,
) -> PeftFiles:
    """PEFT's files for a LoRA run.

    Args:
      factors: path of each adapted linear layer -> `lora.Factors`.
      heads: path -> array of the task's head, which is trained whole.
      options: of the method, as `lora.make` takes them.
      rows: the family's name table for this head.
      shapes: path -> shape of every parameter of the base model; stacked ones lead with L.
      kind: of the head, a key of TASK_TYPES.
      base: where PEFT finds the base model, a hub id or a directory; revision: of the former.
      architecture: class of the base model with this head, such as GPT2LMHeadModel.
    """
    table = {row.path: row for row in rows}
    whole = [table[path] for path in heads]
    tensors = {PREFIX + r.name: _as_stored(v, r.transpose) for r, v in zip(whole, heads.values())}
    names = {path: table[f"{path}.kernel"].name.removesuffix(".weight") for path in factors}
    for path, found in factors.items():
        for part, ending in PARTS.items():
            value = getattr(found, part)
            if value is None:
                continue
            modules = _expand(names[path], found.layers)
            for module, one in zip(modules, value if found.layers else [value]):
                tensors[f"{PREFIX}{module}.{ending}"] = _as_stored(one, True)
    ranks = {names[path]: found.a.shape[-1] for path, found in factors.items()}
    alphas = {names[path]: _alpha(found, options) for path, found in factors.items()}
    rank, alpha = _usual(ranks, options["rank"]), _usual(alphas, options["alpha"])
    layers = {names[p]: (f.layers, shapes[f"{p}.kernel"][0]) for p, f in factors.items()}
    return PeftFiles(
        {
            "peft_type": "LORA",
            "task_type": TASK_TYPES[kind],
            "base_model_name_or_path": base,
            "revision": revision,
            "auto_mapping": _auto_mapping(kind, rows, architecture),
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": options.get("rslora", False),
            "lora_dropout": options.get("dropout", 0.0),
            "rank_pattern": {_pattern(n): r for n, r in sorted(ranks.items()) if r != rank},
            "alpha_pattern": {_pattern(n): a for n, a in sorted(alphas.items()) if a != alpha},
            "use_dora": options.get("dora", False),
            "init_lora_weights": "gaussian" if options.get("init") == "gaussian" else True,
            "bias": "none",
            "fan_in_fan_out": not all(table[f"{path}.kernel"].transpose for path in factors),
            "modules_to_save": _modules_to_save(whole, rows),
            **_targets(layers, rows),
        },
        tensors,
    )


def _expand(name: str, layers: Sequence[int]) -> list[str]:
    """A module's name in every given layer; () where it is not in a stack."""
    return [name.format(l=layer) for layer in layers] if layers else [name]


def _as_stored(value: np.ndarray, transpose: bool) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(value).T if transpose else value)


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _alpha(found: Any, options: Mapping[str, Any]) -> int | float:
    """The alpha behind a scale: a given one where it fits; a product might not return it."""
    rank = found.a.shape[-1]
    divisor = math.sqrt(rank) if options.get("rslora") else rank
    given = (options["alpha"], *(options.get("alpha_pattern") or {}).values())
    fits = (alpha for alpha in given if alpha / divisor == found.scale)
    return _plain(next(fits, found.scale * divisor))


def _usual(values: Mapping[str, Any], given) -> Any:
    """The given value where a module has it, else the one that most modules have."""
    held = list(values.values())
    return _plain(given) if given in held else max(held, key=held.count)


def _pattern(name: str) -> str:
    """A key of rank_pattern: a regular expression for this module in every layer, and no other."""
    return re.escape(name).replace(r"\{l\}", r"\d+")


def _modules(rows: Iterable) -> set[str]:
    """Names of all modules with parameters and of what contains them; layers stay `{l}`."""
    parts = [row.name.split(".") for row in rows]
    return {".".join(each[:end]) for each in parts for end in range(1, len(each))}


def _targets(adapted: Mapping[str, tuple], rows: Sequence) -> dict[str, Any]:
    """The fields that choose modules, such that PEFT finds exactly the adapted ones.

    adapted: name -> (adapted layers, number of layers). Endings (`q_proj`), with layer numbers,
    where they tell the modules apart; else every full name.
    """
    others = _modules(rows) - set(adapted)
    endings = {_ending(name, others) for name in adapted}
    layers = next(iter(adapted.values()))[0]
    every = all(len(chosen) == count or not chosen for chosen, count in adapted.values())
    same = layers and all(chosen == layers for chosen, _ in adapted.values())
    if None in endings or not (every or same):
        full = [one for name, (chosen, _) in adapted.items() for one in _expand(name, chosen)]
        return {"target_modules": sorted(full), "layers_to_transform": None, "layers_pattern": None}
    stack = next(iter(adapted)).split(".{l}.")[0].rpartition(".")[2]
    return {
        "target_modules": sorted(endings),
        "layers_to_transform": None if every else list(layers),
        "layers_pattern": None if every else [stack],
    }


def _ending(name: str, others: set[str]) -> str | None:
    """The shortest ending of a name, inside its layer, that no other module has."""
    parts = name.rpartition(".{l}.")[2].split(".")
    for count in range(1, len(parts) + 1):
        ending = ".".join(parts[-count:])
        if not any(f".{other}".endswith(f".{ending}") for other in others):
            return ending
    return None


def _modules_to_save(heads: Sequence, rows: Sequence) -> list[str] | None:
    """Modules that hold the trained head: its outermost part that holds nothing of the body."""
    body = {row.name.split(".")[0] for row in rows if row not in heads}
    names = {(row.name.split(".")[0], row.name.rpartition(".")[0]) for row in heads}
    return sorted({module if first in body else first for first, module in names}) or None


def _auto_mapping(kind: str, rows: Sequence, architecture: str) -> dict[str, str] | None:
    """PEFT finds the model's class by task type; where it has none, by this."""
    if TASK_TYPES[kind] is not None:
        return None
    model_type = rows[0].name.split(".")[0]
    library = f"transformers.models.{model_type}.modeling_{model_type}"
    return {"base_model_class": architecture, "parent_library": library}


def from_peft(
    files: PeftFiles,
    rows: Sequence,
    shapes: Mapping[str, tuple[int, ...]],
    head_paths: Sequence[str] = (),
) -> Imported:
    """Method options and arrays of an adapter that PEFT made.

    Args:
      files: the adapter.
      rows: the family's name table, for a model with the head that the adapter is for.
      shapes: path -> shape of every parameter of that model; stacked ones lead with L.
      head_paths: parameters that may come whole, as PEFT's modules_to_save.

    Raises PeftError naming every field and tensor that cannot be carried over.
    """
    check_config(files.config)
    config = files.config
    placed, arrays = _place(files.tensors, rows, shapes, head_paths)
    if not placed:
        raise PeftError("the adapter holds no LoRA factors of any linear layer of this model")
    rank, alpha, ranks, alphas = config["r"], config["lora_alpha"], {}, {}
    for path, layers in placed.items():
        name = next(row.name for row in rows if row.path == f"{path}.kernel")
        modules = _expand(name.removesuffix(".weight"), sorted(layers) if "{l}" in name else ())
        for part in PARTS:
            found = _stack(path, part, layers)
            if found is not None:
                arrays[f"{path}.adapter.{part}"] = found if "{l}" in name else found[0]
        ranks[path] = _one(path, "rank", config.get("rank_pattern"), rank, modules)
        alphas[path] = _one(path, "alpha", config.get("alpha_pattern"), alpha, modules)
        _check_shapes(path, arrays, ranks[path], shapes[f"{path}.kernel"])
        if config.get("use_dora", False) != (f"{path}.adapter.magnitude" in arrays):
            raise PeftError(f"{path} does not fit use_dora={config.get('use_dora', False)}")
    options = {
        "rank": rank,
        "alpha": float(alpha),
        "rslora": config.get("use_rslora", False),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": "|".join(re.escape(path) for path in sorted(placed)),
        **_layer_options(placed, shapes),
        **({"dora": True} if config.get("use_dora") else {}),
    }
    patterns = {"rank_pattern": (ranks, rank), "alpha_pattern": (alphas, alpha)}
    for option, (values, default) in patterns.items():
        if different := {re.escape(p): v for p, v in sorted(values.items()) if v != default}:
            options[option] = different
    if INITS[config.get("init_lora_weights", True)] != "kaiming":
        options["init"] = INITS[config["init_lora_weights"]]
    return Imported(options, arrays)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise PeftError naming every field that asks for what LoRA here does not do."""
    if config.get("peft_type") != "LORA":
        raise PeftError(f"peft_type is {config.get('peft_type')!r}; only 'LORA' can be read")
    init = config.get("init_lora_weights", True)
    wrong = [
        f"{field}={value!r}"
        for field, value in config.items()
        if field not in (*READ, *IGNORED) and value and (field, value) != ("bias", "none")
    ]
    if wrong:
        raise PeftError(f"not supported: {', '.join(wrong)}; supported are {', '.join(READ)}")
    if init not in INITS:
        raise PeftError(
            f"init_lora_weights={init!r} is not supported; one of {list(INITS)}. PEFT turns pissa,"
            " olora and corda into plain LoRA with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _place(tensors, rows, shapes, head_paths) -> tuple[dict, dict]:
    """({path: {layer: {part: tensor}}}, {path: array}) of factors and whole parameters."""
    modules, whole = {}, {}
    for row in rows:
        if row.path in head_paths:
            whole[row.name] = row
        elif row.path.endswith(".kernel"):
            layers = range(shapes[row.path][0]) if "{l}" in row.name else ()
            for layer, name in enumerate(_expand(row.name.removesuffix("weight"), layers)):
                for part, ending in PARTS.items():
                    modules[name + ending] = (row.path.removesuffix(".kernel"), layer, part)
    placed, arrays, unknown = {}, {}, []
    for name, value in tensors.items():
        inner = name.removeprefix(PREFIX)
        if inner in modules:
            path, layer, part = modules[inner]
            value = np.asarray(value, np.float32)
            placed.setdefault(path, {}).setdefault(layer, {})[part] = value
        elif inner in whole:
            row = whole[inner]
            arrays[row.path] = _as_stored(np.asarray(value, np.float32), row.transpose)
            if arrays[row.path].shape != tuple(shapes[row.path]):
                unknown.append(f"{name} of shape {tuple(value.shape)}")
        else:
            unknown.append(name)
    if arrays:
        left = [name for name, row in whole.items() if row.path not in arrays]
        unknown += [f"{PREFIX}{name} is missing" for name in left]
    if unknown:
        raise PeftError(
            f"the adapter does not fit the model: {', '.join(unknown)}; LoRA factors of"
            f" {sorted({p for p, _, _ in modules.values()})} and the task's head can be read"
        )
    return placed, arrays


def _stack(path: str, part: str, layers: Mapping[int, dict]) -> np.ndarray | None:
    """One part of all adapted layers of a stack, in this project's layout; None if it is absent."""
    found = [layers[layer].get(part) for layer in sorted(layers)]
    present = [value is not None for value in found]
    if not any(present) and part == "magnitude":
        return None
    without = [layer for layer, here in zip(sorted(layers), present) if not here]
    if without:
        raise PeftError(f"{path} lacks {PARTS[part]} in layers {without}")
    if len(shapes := {value.shape for value in found}) > 1:
        raise PeftError(
            f"the layers of {path} have {PARTS[part]} of different shapes {sorted(shapes)}; one"
            " rank for all layers of a module is supported"
        )
    return np.stack([value.T for value in found])


def _one(path: str, what: str, pattern: Mapping | None, default, modules: Sequence[str]):
    """The value that PEFT's pattern gives all of a stack's modules."""
    values = {_match(pattern or {}, name, default) for name in modules}
    if len(values) > 1:
        raise PeftError(
            f"{what}_pattern gives the layers of {path} different values {sorted(values)}; one"
            f" {what} for all layers of a module is supported"
        )
    return values.pop()


def _match(pattern: Mapping, name: str, default):
    """PEFT's rule: the first key that matches the end of the module's name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _check_shapes(path: str, arrays: Mapping, rank: int, kernel: Sequence[int]) -> None:
    found = [arrays[f"{path}.adapter.{part}"].shape[-2:][::-1] for part in "ab"]
    needed = [(rank, kernel[-2]), (kernel[-1], rank)]
    if found != needed:
        raise PeftError(
            f"{path}: lora_A is {found[0]} and lora_B {found[1]} in the file; rank {rank} and the"
            f" model need {needed[0]} and {needed[1]}"
        )


def _layer_options(placed: Mapping[str, Mapping], shapes: Mapping) -> dict[str, str]:
    """The `layers` option; nothing when every layer is adapted."""
    stacks = {p: shapes[f"{p}.kernel"][0] for p in placed if len(shapes[f"{p}.kernel"]) == 3}
    chosen = {tuple(sorted(placed[path])) for path in stacks}
    if len(chosen) > 1:
        lists = "; ".join(f"{path}: {sorted(placed[path])}" for path in stacks)
        raise PeftError(
            f"modules are adapted in different layers ({lists}); the same layers for all modules"
            " are supported"
        )
    every = all(len(placed[path]) == num_layers for path, num_layers in stacks.items())
    return {} if every else {"layers": ",".join(map(str, chosen.pop()))}
