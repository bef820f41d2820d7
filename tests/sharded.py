"""What tests/test_sharding.py runs in processes of their own: training steps on several devices.

    python tests/sharded.py OUT.json CASE ...                 (8 virtual CPU devices by XLA_FLAGS)
    python tests/sharded.py OUT.json CASE ADDRESS COUNT NUMBER             (one of COUNT processes)

CASE: FIXTURE:METHOD[:DTYPE[:MESH+MESH...]]. Each takes 5 optimizer steps, in two calls, on every
mesh of MESHES or on those; losses, parameters and bytes go to OUT.json.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import conftest  # noqa: F401  (strict JAX, as in every test)
import jax
import jax.numpy as jnp
import numpy as np
from tiny import FIXTURES, folder_of

from jax_lowrank import data, masking, models, sharding, starting, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.config import TrainSpec
from jax_lowrank.config_run import FinetuneSpec
from jax_lowrank.models.head import Head
from jax_lowrank.study.training import make_program

MESHES = {
    "one": (1, 1, 1),
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "mixed": (2, 2, 2),
}
STEPS, ROWS, WIDTH = 5, 16, 24
LORA = {"rank": 2, "alpha": 4}
OPTIONS = {  # of LoRA, by the name that a case has for it; other methods have none
    "lora": LORA,
    "qv": LORA | {"targets": "qv"},
    "dropout": LORA | {"dropout": 0.1},
    "dora": LORA | {"dropout": 0.1, "dora": True, "init": "pissa"},
}


def batches(number_of_rows, kind, mesh):
    """16 rows a step of texts of unlike lengths; the last step of an epoch is filled up.

    One width for all, so that the second call could reuse the first one's program.
    """
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 60, rng.integers(8, WIDTH)) for _ in range(number_of_rows - 1)]
    texts.append(rng.integers(3, 60, WIDTH))
    rows = data.make_batches(
        texts,
        batch_size=ROWS,
        seed=0,
        pad_id=0,
        max_waste=0.9,
        counted=[np.ones(len(text), bool) for text in texts],
        own=sharding.own_rows(ROWS, mesh),
    )
    if kind == "masked-lm":
        return masking.MaskedBatches(rows, masking.Masker(mask_id=60, num_tokens=60))
    if kind == "classification":
        return data.LabelledBatches(rows, rng.integers(0, 2, number_of_rows).astype(np.int32))
    return rows


class Slices:
    """A tensor of a safetensors file; how many elements each part has that is read goes to `read`.

    There is no other way in: who asks for the whole tensor reads it as one part.
    """

    def __init__(self, inner, read):
        self.inner, self.read, self.get_shape = inner, read, inner.get_shape

    def __getitem__(self, index):
        part = self.inner[index]
        self.read.append(part.size)
        return part


@contextlib.contextmanager
def watched(read):
    """Weights that are read within it are noted: name of a tensor -> sizes of the parts."""
    opened = models.weights._open

    @contextlib.contextmanager
    def watch(file):
        with opened(file) as handle:

            def get_slice(name):
                return Slices(handle.get_slice(name), read.setdefault(name, []))

            yield SimpleNamespace(keys=handle.keys, get_slice=get_slice)

    with mock.patch.object(models.weights, "_open", watch):
        yield
    for name in [name for name, sizes in read.items() if not sizes]:  # only its shape was read
        del read[name]


def trained(fixture, method_name, sizes, dtype="float32", accumulate=1):
    """What 5 steps on a mesh give, as plain numbers."""
    mesh = sharding.make_mesh(*sizes)
    labelled = method_name == "head" or fixture.endswith("classification")
    head = Head("classification", ("no", "yes")) if labelled else None  # else the checkpoint's own
    folder, parts = folder_of(fixture.replace("classification", "embedding")), {}
    with watched(parts):
        model = models.load(
            folder, jnp.dtype(dtype), head, jax.random.key(1), where=sharding.where(mesh)
        )
    name = "lora" if method_name in OPTIONS else method_name
    method = METHODS[name](**OPTIONS.get(method_name, {}))
    graphdef, trainable, frozen = method.split(jax.random.key(0), model)
    trainable, frozen = sharding.put((trainable, frozen), mesh)
    spec = TrainSpec(weight_decay=0.1, accumulate=accumulate)
    program = make_program(spec, method, graphdef, trainable)
    opt_state = sharding.put(program.optimizer.init(trainable), mesh)
    made, losses, read = batches(40, model.head.kind, mesh), [], 0
    before = placement((trainable, opt_state))
    compiled = train.run_steps._cache_size()
    for first, count in ((0, 3), (3, 2)):
        ((_, stacked),) = train.chunks(made, first, first + count, 3)
        read += sum(x.nbytes for x in stacked)
        stacked = sharding.put_own_rows(train.fill(stacked, 3), trainable, axis=1)
        trainable, opt_state, values, _ = train.run_steps(
            apply=program.apply,
            loss=train.LOSSES[model.head.kind],
            optimizer=program.optimizer,
            accumulate=spec.accumulate,
            trainable=trainable,
            opt_state=opt_state,
            frozen=frozen,
            batches=stacked,
            rates=np.full(3, 1e-2, np.float32),
            count=count,
            key=jax.random.key(2),
            first=first,
            keep=sharding.keeper(mesh),
        )
        trainable, opt_state = sharding.settle((trainable, opt_state))
        losses += sharding.fetch(values)[:count].tolist()
    merged = sharding.fetch(models.by_path(program.merge(trainable, frozen)))
    return {
        "losses": losses,
        "compilations": train.run_steps._cache_size() - compiled,
        "optimizer_bytes": device_bytes(opt_state),
        "all_optimizer_bytes": sum(x.nbytes for x in jax.tree.leaves(opt_state)),
        "parameter_bytes": device_bytes((trainable, frozen)),
        "all_parameter_bytes": sum(x.nbytes for x in jax.tree.leaves((trainable, frozen))),
        "bytes_read": read,
        "weights_read": parts,
        "moved": [
            f"{path}: {before[path]} -> {after}"
            for path, after in placement((trainable, opt_state)).items()
            if after != before[path]
        ],
        "merged": {path: float(np.abs(x).astype(np.float64).mean()) for path, x in merged.items()},
    }


def going_on(folder, mesh):
    """Training that begins with a PEFT adapter: how its base is read and where it lies."""
    shutil.copytree(FIXTURES.parent / "adapters" / "gpt2_patterns", folder)
    file, parts = folder / "adapter_config.json", {}
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(folder_of("gpt2"))}
    file.write_text(json.dumps(config))
    with watched(parts):
        spec, head, key = FinetuneSpec(), Head("causal-lm"), jax.random.key(0)
        _, started = starting.start(spec, folder, head, key, mesh)
    return {
        "weights_read": parts,
        "parameter_bytes": device_bytes((started.trainable, started.frozen)),
        "all_parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(started.parts[1:])),
    }


def placement(tree):
    """Path -> where an array lies."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_of(keys): str(leaf.sharding) for keys, leaf in leaves}


def device_bytes(tree):
    """The most bytes that one device of this process holds of a pytree."""
    held = dict.fromkeys(jax.local_devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def main(out, *arguments):
    """Run the cases that the command line names."""
    cases = [case for case in arguments if ":" in case and "." not in case]  # not the address
    meshes = MESHES
    if len(cases) < len(arguments):
        address, count, number = arguments[len(cases) :]
        jax.distributed.initialize(address, int(count), int(number))
        meshes = {"fsdp": (1, 2, 1), "data": (2, 1, 1)}
    found = {}
    if jax.process_count() > 1:
        mesh = sharding.make_mesh(*meshes["fsdp"])
        found["adapter"] = going_on(Path(out).with_suffix(".adapter"), mesh)
    for case in cases:
        fixture, method, *rest = case.split(":")
        dtype, names = [*rest, *("float32", "+".join(meshes))[len(rest) :]]
        found[case] = {
            name: trained(fixture, method, meshes[name], dtype) for name in names.split("+")
        }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
