"""XLA's own account of a training step beside the estimate, in a process of its own.

    python tests/estimated.py OUT.json CASE ...                (8 virtual CPU devices by XLA_FLAGS)

CASE: MODEL:METHOD:REMAT:DTYPE:MESH, of SIZES, METHODS, memory.PLANNED and MESHES. Seen with jaxlib
0.10.2 and not within a tenth (estimate over XLA): a bfloat16 base (0.45 to 0.48), which XLA
computes with in float32 on CPU.
"""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  (strict JAX, as in every test)
import jax
import jax.numpy as jnp
from lowered import shapes_of_a_step

from jax_lowrank import memory, models, sharding, train
from jax_lowrank.adapt import METHODS
from jax_lowrank.config import TrainSpec
from jax_lowrank.models.head import Head

ROWS, WIDTH = 8, 128
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "mixed": (2, 2, 2)}
MESHES |= {"pair": (1, 1, 2)}
COMMON = {"vocab_size": 512, "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4}
SIZES = {
    "llama": {
        "model_type": "llama",
        **COMMON,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "max_position_embeddings": 128,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_layer": 4,
        "n_embd": 128,
        "n_head": 4,
        "n_positions": 128,
    },
    # As all-MiniLM-L6-v2: four times as wide inside, two token types.
    "bert": {
        "model_type": "bert",
        **COMMON,
        "intermediate_size": 512,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
    },
}
OPTIONS = {"lora": {"rank": 8, "alpha": 16.0}}


def made(name, dtype):
    """An abstract model; an encoder classifies."""
    head = Head("classification", ("no", "yes")) if name == "bert" else None
    return models.abstract(SIZES[name], jnp.dtype(dtype), head)


def analysed(model, method, spec, mesh=None, rows=ROWS):
    """XLA's analysis of a compiled call, optimised as for a real run, on one device of a mesh."""
    options = {"steps": spec.steps_per_call, "remat": spec.remat, "mesh": mesh}
    shapes = shapes_of_a_step(model, method, rows, WIDTH, **options)
    if mesh is not None:
        for name in ("trainable", "opt_state", "frozen"):
            where = sharding.tree_shardings(shapes[name], mesh)
            shapes[name] = jax.tree.map(placed, shapes[name], where)
        cut = sharding.rows_sharding(mesh, axis=1)
        shapes["batches"] = jax.tree.map(lambda shape: placed(shape, cut), shapes["batches"])
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        lowered = train.run_steps.lower(**shapes, keep=sharding.keeper(mesh))
        return lowered.compile().memory_analysis()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def placed(shape, where):
    """A shape that lies somewhere."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def both(name, method, remat, dtype, mesh):
    """Bytes of one device: [state and step as estimated], [arguments and temporaries of XLA]."""
    model, method = made(name, dtype), METHODS[method](**OPTIONS.get(method, {}))
    spec, sizes = TrainSpec(remat=remat, steps_per_call=2), dict(zip(sharding.AXES, MESHES[mesh]))
    # As many rows on each device, however the batch is cut.
    rows = ROWS * sizes["data"] * sizes["fsdp"]
    ours = memory.estimate(model, method, spec, rows, WIDTH, memory.Sizes(sizes))
    xla = analysed(model, method, spec, sharding.make_mesh(*MESHES[mesh]), rows)
    return [ours.total - ours.step, ours.step], [
        xla.argument_size_in_bytes,
        xla.temp_size_in_bytes,
    ]


def main(out, *cases):
    """Both accounts of every case."""
    found = {}
    for case in cases:
        found[case] = (state, step), (given, temporary) = both(*case.split(":"))
        print(
            f"{case:36} state {state / 1e6:7.2f} {given / 1e6:7.2f}  step {step / 1e6:7.2f}"
            f" {temporary / 1e6:7.2f}  ratio {(state + step) / (given + temporary):.3f}",
            flush=True,
        )
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
