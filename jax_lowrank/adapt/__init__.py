"""Fine-tuning methods: a table from name to the function that makes one from its options."""

from jax_lowrank.adapt import bitfit, full, head, lora

METHODS = {"full": full.make, "lora": lora.make, "bitfit": bitfit.make, "head": head.make}
