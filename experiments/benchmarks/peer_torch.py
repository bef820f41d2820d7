"""The PyTorch side of the benchmarks: transformers and PEFT models on a CPU, f32.

A stand-alone script (it needs torch, transformers, peft and numpy, nothing of this package), to be
run by another interpreter through peer_env.run_peer. Prints one JSON object as the last line of
its standard output. Models have random weights; nothing is downloaded.

    python peer_torch.py --task train --shape gpt2 --method lora --compile --turns 6 --warmup 3
    python peer_torch.py --task generate --method lora --cache static --turns 5
    python peer_torch.py --task matmul

With --paced it waits for a line on standard input before every measured turn and prints the turn's
seconds, so that finetune.py can let several settings work in turns.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.generation import CompileConfig

LAYERS, WIDTH, HEADS, VOCABULARY, POSITIONS = 6, 384, 6, 8192, 128
BATCH, SEQUENCE = 16, 128
RANK, ALPHA = 8, 16
LEARNING_RATE, DECAY, CLIP = 1e-3, 0.1, 1.0
GENERATE_BATCH, PROMPT, NEW_TOKENS = 32, 16, 32
STEPS_PER_TURN = 4  # of training; one compiled call on our side
PRODUCTS = ((2048, 384, 1536), (2048, 2048, 2048))
MIB = 2**20

# Every linear layer but the head. BERT's head has a linear layer of its own (cls...dense): left.
ADAPTED = {
    "gpt2": r".*\.h\.\d+\..*\.(c_attn|c_proj|c_fc)",
    "llama": r".*\.layers\.\d+\..*_proj",
    "bert": r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)",
}


def gpt2():
    """GPT-2 shape: learned positions, LayerNorm, gelu_new, 4D feed-forward, tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def llama():
    """Llama shape: RoPE, RMSNorm, SwiGLU of 1024, 6 key/value heads, tied head."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def bert():
    """BERT shape: post-norm encoder, exact gelu, masked-LM head with a tied decoder."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return BertForMaskedLM(config)


NOTES = {
    "gpt2": "fused query/key/value projection; head tied to the embedding, no adapter on either",
    "llama": "separate projections; head tied to the embedding, no adapter on either",
    "bert": "masked-LM head (384 x 384 layer, gelu, LayerNorm, tied decoder), no adapters there; "
    "loss on every token, the labels being the tokens themselves",
}
SHAPES = {"gpt2": gpt2, "llama": llama, "bert": bert}


def with_lora(model, shape):
    """The model frozen but for rank-8 adapters, alpha 16, no dropout; A and B both random."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=ADAPTED[shape],
        fan_in_fan_out=shape == "gpt2",
    )
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def resident_mb():
    """Resident memory of this process now, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


def peak_mb():
    """Largest resident memory of this process so far, in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def huge_page_mb():
    """Anonymous memory backed by huge pages now, in MiB; shows whether the tunable took effect."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"AnonHugePages:\s+(\d+)", text).group(1)) / 1024


def cpu_name():
    """The processor's vendor and model as the kernel names them."""
    text = Path("/proc/cpuinfo").read_text()
    found = [re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("vendor_id", "model name")]
    return " ".join(match.group(1) for match in found if match) or platform.processor()


def surroundings(threads):
    """Versions, processor and switches that the numbers depend on."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    preload = os.environ.get("LD_PRELOAD", "")
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "numpy": np.__version__,
        },
        "blas": blas.group(1) if blas else "unknown",
        "torch_config": torch.__config__.show(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "preload": [Path(part).name for part in preload.replace(":", " ").split()],
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
    }


def optimizer_of(model, kind):
    """AdamW over the trainable parameters, decay on tensors of 2 or more dimensions only."""
    trainable = [value for value in model.parameters() if value.requires_grad]
    groups = [
        {"params": [v for v in trainable if v.ndim >= 2], "weight_decay": DECAY},
        {"params": [v for v in trainable if v.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, **{kind: True}), trainable


def train_step(model, optimizer, trainable, ids):
    """One step; returns the loss as a number, so that nothing is left pending."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def measure(work, options, steps):
    """Seconds per step of every turn, each of `steps` calls of `work`; the first call's are apart.

    `warmup` calls come before; the first one compiles.
    """
    warm = []
    for _ in range(max(options.warmup, 1)):
        start = time.perf_counter()
        work()
        warm.append(time.perf_counter() - start)
    turns = []
    for _ in range(options.turns):
        if options.paced:
            print("ready", flush=True)
            sys.stdin.readline()
        start = time.perf_counter()
        for _ in range(steps):
            work()
        turns.append((time.perf_counter() - start) / steps)
    return {
        "seconds": turns,
        "seconds_min": min(turns),
        "seconds_median": statistics.median(turns),
        "first_call_seconds": warm[0],
    }


def train(options):
    """Seconds of a training step. The batches are default_rng(0).integers(0, V, (16, 128)).

    One draw per step, warm-up steps first; labels are the tokens themselves (shifted by the causal
    models, at every position for BERT).
    """
    before = resident_mb()
    torch.manual_seed(0)
    model = SHAPES[options.shape]()
    model.config.use_cache = False
    if options.method == "lora":
        model = with_lora(model, options.shape)
    model.train()
    optimizer, trainable = optimizer_of(model, options.optimizer)
    total = sum(value.numel() for value in model.parameters())
    stepped = torch.compile(model, dynamic=False) if options.compile else model
    rng = np.random.default_rng(0)
    losses = []

    def work():
        batch = rng.integers(0, VOCABULARY, (BATCH, SEQUENCE))
        losses.append(train_step(stepped, optimizer, trainable, torch.from_numpy(batch)))

    timed = measure(work, options, STEPS_PER_TURN)
    return {
        "method": options.method,
        "batch": BATCH,
        "sequence": SEQUENCE,
        "parameters": total,
        "trainable_parameters": sum(value.numel() for value in trainable),
        "tied_embeddings": True,
        "notes": NOTES[options.shape],
        "attention": model.config._attn_implementation,
        "optimizer": f"AdamW {options.optimizer}",
        "learning_rate": LEARNING_RATE,
        "weight_decay": DECAY,
        "clip_norm": CLIP,
        "lora": {"r": RANK, "alpha": ALPHA} if options.method == "lora" else None,
        **timed,
        "tokens": BATCH * SEQUENCE,
        "rss_before_model_mb": before,
        "losses": losses,
    }


def generate_options(cache, compiled):
    """Plain categorical sampling: no warper, no end of sequence, a fixed number of new tokens."""
    chosen = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": None,
        "max_new_tokens": NEW_TOKENS,
        "eos_token_id": None,
        "pad_token_id": 0,
        "use_cache": True,
    }
    if cache == "static":
        chosen["cache_implementation"] = "static"
    chosen["disable_compile"] = not compiled
    if compiled:
        # transformers compiles by itself on accelerators only, unless asked this way.
        chosen["compile_config"] = CompileConfig(mode="default", fullgraph=False)
        chosen["compile_config"]._compile_all_devices = True
    return chosen


@torch.no_grad()
def generate(options):
    """Seconds of one call of `generate`: plain sampling after a prompt of random tokens."""
    before = resident_mb()
    torch.manual_seed(0)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (options.batch, PROMPT))
    prompt = torch.from_numpy(prompt)
    model = SHAPES[options.shape]().eval()
    if options.method == "lora":
        model = with_lora(model, options.shape).eval()
    chosen = generate_options(options.cache, options.compile)
    mask = torch.ones_like(prompt)

    def work():
        output = model.generate(input_ids=prompt, attention_mask=mask, **chosen)
        assert output.shape == (prompt.shape[0], PROMPT + NEW_TOKENS), output.shape

    timed = measure(work, options, 1)
    return {
        "method": options.method,
        "cache": options.cache,
        "batch": options.batch,
        "prompt": PROMPT,
        "new_tokens": NEW_TOKENS,
        "sampling": "temperature 1, no top_k, no top_p, no end of sequence",
        **timed,
        "tokens": options.batch * NEW_TOKENS,
        "rss_before_model_mb": before,
    }


def matmul(options):
    """Best GFLOP/s of f32 products over `turns` rounds of at least 0.1 s each."""
    rows = []
    for m, k, n in PRODUCTS:
        left, right = torch.randn(m, k), torch.randn(k, n)
        out = torch.empty(m, n)
        torch.mm(left, right, out=out)
        best = float("inf")
        for _ in range(options.turns):
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < 0.1:
                torch.mm(left, right, out=out)
                count += 1
            best = min(best, (time.perf_counter() - start) / count)
        rows.append({"m": m, "k": k, "n": n, "gflops": 2e-9 * m * k * n / best})
    return {"rows": rows}


TASKS = {"train": train, "generate": generate, "matmul": matmul}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="train")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--turns", type=int, default=6, help="measured turns")
    parser.add_argument("--warmup", type=int, default=3, help="steps or calls not measured")
    parser.add_argument("--paced", action="store_true", help="wait for a line before every turn")
    parser.add_argument("--batch", type=int, default=GENERATE_BATCH, help="rows generated at once")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.turns < 1 or options.warmup < 0:
        parser.error("--turns must be at least 1 and --warmup at least 0")
    if options.task == "generate" and options.shape == "bert":
        parser.error("--task generate needs --shape gpt2 or llama")
    return options


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    result = TASKS[options.task](options)
    asked = {"task": options.task}
    if options.task != "matmul":
        asked |= {"shape": options.shape, "compile": options.compile}
    report = {
        **asked,
        "dtype": "float32",
        **result,
        "peak_mb": peak_mb(),
        "huge_pages_mb": huge_page_mb(),
        "bytes_per_mb": MIB,
        **surroundings(options.threads),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
