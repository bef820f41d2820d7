"""FLOPs of an optimizer step, as a model needs them, and what a device can do.

Multiply-adds count two. What a program computes a second time to save memory does not count, nor do
norms, activations, softmax and the optimizer, nor looking up the embedding.
"""

from __future__ import annotations

import math
import re
from typing import Any

# Dense bf16 matrix products in TFLOP/s by the vendors' data sheets; the first that is found in the
# name counts.
PEAKS = (
    (r"B200", 2250.0),
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"H[12]00", 989.0),
    (r"A100", 312.0),
    (r"L40S", 362.0),
    (r"\bL4\b", 121.0),
    (r"RTX 4090", 165.0),
)
BACKWARD = {"full": 2, "lora": 1}  # passes over the weights; LoRA has no gradient of frozen ones


def step(
    method: str, tokens: int, weights: int, *, adapters: int = 0, attention: float = 0.0
) -> float:
    """FLOPs of one step: 6·P·T for `full`; 4·P·T + 6·A·T for `lora`; 3 times `attention` in both.

    Forward is 2·P·T, its derivative by activations as much again (LoRA stops there), and by weights
    once more. Adapters get all three. LoRA's derivative by the first layer's input is counted,
    though nothing below needs it: at most 2 of the 4·P·T of one layer.

    Args:
      method: `full` or `lora`.
      tokens: T, of the whole step.
      weights: P, of the matrices that every token is multiplied with; the head's among them, tied
        or not, and not the embedding's.
      adapters: A, parameters of the adapters.
      attention: FLOPs of the forward attention products of the step. Their derivative is twice that
        (four products for two), for LoRA too: queries, keys and values depend on what is trained.
    """
    return (2 + 2 * BACKWARD[method]) * weights * tokens + 6 * adapters * tokens + 3 * attention


def attention(layers: int, width: int, rows: int, length: int, causal: bool) -> float:
    """FLOPs of q·kᵀ and of weights·v in a forward pass: 4·L·D·S² a row, half of it when `causal`.

    width: heads times head width. Half, because a causal kernel leaves the other half out; the one
    position on the diagonal is neglected.
    """
    return 4.0 * layers * width * rows * length**2 / (2 if causal else 1)


def of_llama(method: str, config: Any, rows: int, length: int, rank: int) -> float:
    """FLOPs of one step of a `LlamaConfig`; LoRA of that rank is on all linear layers."""
    c = config
    heads, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
    linears = [(c.width, heads), (c.width, kv), (c.width, kv), (heads, c.width)]
    linears += [(c.width, c.mlp_width), (c.width, c.mlp_width), (c.mlp_width, c.width)]
    weights = c.num_layers * sum(a * b for a, b in linears) + c.vocab_size * c.width
    adapters = c.num_layers * rank * sum(a + b for a, b in linears) if method == "lora" else 0
    mixed = attention(c.num_layers, heads, rows, length, causal=True)
    return step(method, rows * length, weights, adapters=adapters, attention=mixed)


def peak(device: str, given: float | None = None) -> float:
    """FLOP/s of dense bf16 products: `given` (TFLOP/s), or by the device's name; NaN if unknown."""
    if given is not None:
        return given * 1e12
    return next((t * 1e12 for name, t in PEAKS if re.search(name, device)), math.nan)
