"""The PEFT side of the sweep benchmark: peer_torch.py's LoRA step on other sizes and batches.

    python peer_sweep.py --task train --shape gpt2 --method lora --turns 6 -- small 1 32 50

After `--`: a row of SIZES, rows, tokens a row, steps of a turn. With a fifth number it trains that
many adapters, one after another, for so many steps each, and reports the seconds from the start of
the process, imports included.
"""

import time

BEGAN = time.time()

import json  # noqa: E402
import sys  # noqa: E402

import numpy as np  # noqa: E402
import peer_torch  # noqa: E402
import torch  # noqa: E402

SIZES = {"small": (2, 128, 4, 2048), "minilm": (6, 384, 6, 8192)}  # layers, width, heads, tokens


def whole(adapters, steps):
    """Seconds since the process began until all adapters are trained, eagerly."""
    rng = np.random.default_rng(0)
    shape = (peer_torch.BATCH, peer_torch.SEQUENCE)
    after_one = None
    for _ in range(adapters):
        model = peer_torch.with_lora(peer_torch.gpt2(), "gpt2").train()
        optimizer, trainable = peer_torch.optimizer_of(model, "fused")
        for _ in range(steps):
            batch = torch.from_numpy(rng.integers(0, peer_torch.VOCABULARY, shape))
            peer_torch.train_step(model, optimizer, trainable, batch)
        after_one = after_one or time.time() - BEGAN
    seconds = {"whole_seconds": time.time() - BEGAN, "first_seconds": after_one}
    print(json.dumps({**seconds, "adapters": adapters, "steps": steps}))


def main():
    """Set peer_torch's sizes and let it measure."""
    place = sys.argv.index("--")
    name, *numbers = sys.argv[place + 1 :]
    sys.argv = sys.argv[:place]
    rows, length, steps, *adapters = map(int, numbers)
    layers, width, heads, tokens = SIZES[name]
    peer_torch.LAYERS, peer_torch.WIDTH, peer_torch.HEADS = layers, width, heads
    peer_torch.VOCABULARY, peer_torch.BATCH, peer_torch.SEQUENCE = tokens, rows, length
    peer_torch.STEPS_PER_TURN = steps
    if adapters:
        torch.set_num_threads(2)
        whole(adapters[0], steps)
    else:
        peer_torch.main()


if __name__ == "__main__":
    main()
