"""What a model is for: a head over the last hidden states, and how a checkpoint says which.

Shape letters as in layers.py; C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from jax_lowrank.models.layers import Array, Linear
from jax_lowrank.models.weights import UnsupportedModelError, WeightsError

# The end of a class name in `architectures` -> kind. The first of a kind is what we write.
ENDINGS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "masked-lm",
    "ForSequenceClassification": "classification",
}


class Head(NamedTuple):
    """The kind of a head (causal-lm, masked-lm, classification) and a classifier's class names."""

    kind: str = "causal-lm"
    labels: tuple[str, ...] = ()

    def check(self, kinds: Sequence[str], family: str) -> Head:
        """This head. Raises ValueError unless the family has it and labels fit its kind."""
        if self.kind not in kinds:
            raise ValueError(f"{family} has no head {self.kind!r}; it has {', '.join(kinds)}")
        if (self.kind == "classification") != bool(self.labels):
            raise ValueError(
                "a classification head needs the names of its classes, other heads have none;"
                f" got kind {self.kind!r} with labels {self.labels}"
            )
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels are not distinct: {self.labels}")
        return self

    def to_hf(self, architecture: str) -> dict:
        """Its fields of config.json."""
        fields: dict = {"architectures": [architecture]}
        if self.labels:
            fields["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            fields["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return fields


class Classifier(nnx.Module):
    """Class logits (B, C) in float32 of one vector a row (B, D).

    Linear; with `between`, a dense layer and that function come first.
    """

    def __init__(
        self,
        keys,
        width: int,
        num_labels: int,
        *,
        bias: bool = False,
        between: Callable | None = None,
        dtype,
    ):
        self.dense = Linear(next(keys), width, width, dtype=dtype) if between else None
        self.out = Linear(next(keys), width, num_labels, bias=bias, dtype=dtype)
        self.between = between

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        x = x.astype(jnp.float32)
        if self.dense is not None:
            x = self.between(self.dense(x, key))
        return self.out(x, key)


def stored_head(config: Mapping, kinds: Sequence[str]) -> Head | None:
    """The head that a config.json says its checkpoint has; None for a base model without one.

    Raises UnsupportedModelError for a head that none of `kinds` stands for.
    """
    names = config.get("architectures") or ["Model"]
    kind = next((kind for end, kind in ENDINGS.items() if names[0].endswith(end)), None)
    if kind == "classification":
        return Head(kind, stored_labels(config))
    if kind in kinds:
        return Head(kind)
    if kind is None and names[0].endswith("Model"):
        return None
    raise UnsupportedModelError(f"architectures {names} is not supported; only {', '.join(kinds)}")


def stored_labels(config: Mapping) -> tuple[str, ...]:
    """Class names in the order of their ids; two of them when nothing is said (transformers)."""
    names = config.get("id2label")
    if not names:
        return tuple(f"LABEL_{i}" for i in range(config.get("num_labels", 2)))
    return tuple(names[key] for key in sorted(names, key=int))


def check_labels(wanted: Head, stored: Head | None) -> None:
    """Raise WeightsError when a stored classification head does not stand for the wanted classes.

    Other names for as many classes are a renaming; the same names in another order are not.
    """
    if stored is None or not (wanted.labels and stored.labels) or wanted.labels == stored.labels:
        return
    if len(wanted.labels) != len(stored.labels) or set(wanted.labels) == set(stored.labels):
        raise WeightsError(
            f"the checkpoint's classification head has the {len(stored.labels)} classes"
            f" {stored.labels}, which do not fit the {len(wanted.labels)} wanted {wanted.labels}"
        )
