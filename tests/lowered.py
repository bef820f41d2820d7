"""The arguments of `train.run_steps` as shapes: a step is traced or compiled, and never run."""

import jax
import jax.numpy as jnp

from jax_lowrank import memory, train
from jax_lowrank.study.training import bind_to


def shapes_of_a_step(model, method, rows, width, *, steps=1, remat="dots", mesh=None):
    """Of an abstract model on batches of rows x width tokens, as on one device of a mesh."""
    graphdef, trainable, frozen = memory.split(method, model)
    optimizer = train.make_optimizer(trainable, method, weight_decay=0.0, clip=1.0)
    return {
        "apply": bind_to(graphdef, mesh, remat=remat),
        "loss": train.LOSSES[model.head.kind],
        "optimizer": optimizer,
        "accumulate": 1,
        "trainable": trainable,
        "opt_state": jax.eval_shape(optimizer.init, trainable),
        "frozen": frozen,
        "batches": memory.batch_shapes(steps, rows, width, model.head.kind),
        "rates": jax.ShapeDtypeStruct((steps,), jnp.float32),
        "count": steps,
        "key": jax.random.key(0),
        "first": 0,
    }
