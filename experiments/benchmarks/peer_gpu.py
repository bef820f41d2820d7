"""The PEFT side of gpu.py: one setting per process, one JSON object on the last line.

    python peer_gpu.py '{...}'

What to measure is a JSON object, see `gpu.work_of`. As transformers' Trainer does it with
`bf16=True`: forward under autocast to bfloat16, adapters (or, without them, all weights) and their
optimizer state in float32, SDPA attention, fused AdamW. Runs on a CPU where there is no GPU.
"""

import json
import sys
import time

import numpy as np
import peer_torch
import torch
import transformers


def model_of(work, device):
    """A Llama with random weights, made on the device; bfloat16 below adapters, else float32."""
    config = transformers.LlamaConfig.from_dict(work["config"])
    config._attn_implementation = "sdpa"
    lora = work["method"] == "lora"
    torch.set_default_dtype(getattr(torch, work["dtype"]) if lora else torch.float32)
    with device:
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if work["checkpointing"]:
        # The name changes with transformers 6.
        turn_on = getattr(model, "activation_checkpointing_enable", None)
        (turn_on or model.gradient_checkpointing_enable)()
    if lora:
        if work["checkpointing"]:
            model.enable_input_require_grads()
        peer_torch.RANK, peer_torch.ALPHA = work["rank"], work["alpha"]
        model = peer_torch.with_lora(model, "llama")
    return model.train()


def measure(work, device):
    """Seconds per step of every turn; the device is waited for at the turn's end."""
    torch.manual_seed(0)
    model = model_of(work, device)
    peer_torch.LEARNING_RATE = work["rate"]
    optimizer, trainable = peer_torch.optimizer_of(model, "fused")
    stepped = torch.compile(model, dynamic=False) if work["compile"] else model
    rng, shape, losses = np.random.default_rng(0), (work["rows"], work["length"]), []

    def step():
        ids = rng.integers(0, work["config"]["vocab_size"], shape)
        ids = torch.from_numpy(ids).to(device)
        with torch.autocast(device.type, dtype=getattr(torch, work["dtype"])):
            loss = stepped(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, peer_torch.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    def turn():
        for _ in range(work["steps"]):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    turn()
    first = time.perf_counter() - began
    for _ in range(work["warmup"] - 1):
        turn()
    seconds = []
    for _ in range(work["turns"]):
        began = time.perf_counter()
        turn()
        seconds.append((time.perf_counter() - began) / work["steps"])
    return {
        "seconds": seconds,
        "compile_seconds": first - work["steps"] * seconds[0],  # about: the first turn's rest
        "parameters": sum(value.numel() for value in model.parameters()),
        "trainable_parameters": sum(value.numel() for value in trainable),
        "attention": model.config._attn_implementation,
        "losses": torch.stack(losses).float().tolist(),
    }


def main():
    """Measure, print."""
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = measure(json.loads(sys.argv[1]), device)
    peak = round(peer_torch.peak_mb() * 2**20)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
        result["device"] = torch.cuda.get_device_name()
    surroundings = peer_torch.surroundings(torch.get_num_threads())
    print(json.dumps({**result, "peak_bytes": peak, "environment": surroundings}))


if __name__ == "__main__":
    main()
