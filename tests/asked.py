"""What tests/test_infer.py runs in a process of its own: scores and text on several devices.

    python tests/asked.py OUT.json FIXTURE ...                 (8 virtual CPU devices by XLA_FLAGS)

Every fixture is asked about 11 texts, and about 3: neither divides over the devices of a mesh.
"""

import json
import re
import sys
from pathlib import Path

import conftest  # noqa: F401  (strict JAX, as in every test)
import jax
import numpy as np
from tiny import folder_of

from jax_lowrank import infer, masking, models, sharding
from jax_lowrank.study.training import bind_to

MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "mixed": (2, 2, 2)}
NUM_TEXTS, NUM_NEW, BLOCK = 11, 8, {"batch_size": 3, "pad_id": 0}
GREEDY = {"max_new_tokens": NUM_NEW, "sampling": infer.Sampling(temperature=0.0), "eos_id": None}


def answers(fixture, sizes):
    """What a model says of all texts and of the first three, on a mesh, as plain numbers."""
    mesh = sharding.make_mesh(*sizes)
    model = models.load(folder_of(fixture), where=sharding.where(mesh))
    asked = (bind_to(model.graphdef, mesh), (model.params,))
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 60, n).tolist() for n in (18, *rng.integers(2, 18, NUM_TEXTS - 1))]
    found = {}
    for number in (NUM_TEXTS, 3):
        found |= {f"{name} of {number}": x for name, x in ask(model, asked, texts[:number]).items()}
    if model.head.kind == "causal-lm":
        found["cache"] = cache_in_loop(*asked)
    return found


def ask(model, asked, texts):
    """Everything that can be asked of a model with its head."""
    if model.head.kind == "classification":
        return {"logits": infer.classify(*asked, texts, **BLOCK).tolist()}
    if model.head.kind == "masked-lm":
        masker = masking.Masker(mask_id=60, num_tokens=60)
        hidden = [masker.hide(text, [True] * len(text), (0, i)) for i, text in enumerate(texts)]
        return {"nll": infer.masked_likelihood(*asked, hidden, **BLOCK).nll.tolist()}
    scored = infer.likelihood(*asked, texts, **BLOCK)
    coming = infer.next_token(*asked, texts, [5, 9, 11], **BLOCK)
    text = infer.sample(*asked, texts, num_samples=1, key=jax.random.key(0), **GREEDY, **BLOCK)
    return {
        "nll": scored.nll.tolist(),
        "tokens": scored.tokens.tolist(),
        "log_posterior": coming.log_posterior.tolist(),
        "lens_mass": coming.lens_mass.tolist(),
        "text": text[:, 0].tolist(),
    }


def cache_in_loop(apply, states):
    """Shapes of the keys and values (L, B, K, T, N) that one device carries through the compiled
    loop over the tokens of 8 rows.
    """
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), 8)))
    host = (np.ones((8, 6), np.int32), np.ones((8, 6), bool), keys)
    tokens, mask, keys = sharding.put_rows(host, states)
    keys = jax.random.wrap_key_data(keys)
    lowered = infer.generate.lower(apply, states, tokens, mask, keys, **GREEDY, pad_id=0)
    loops = [line for line in lowered.compile().as_text().splitlines() if " while(" in line]
    shapes = {shape for line in loops for shape in re.findall(r"f32\[(\d+(?:,\d+){4})\]", line)}
    return sorted([int(n) for n in shape.split(",")] for shape in shapes)


def main(out, *fixtures):
    """Ask every fixture on every mesh."""
    found = {
        fixture: {name: answers(fixture, sizes) for name, sizes in MESHES.items()}
        for fixture in fixtures
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
