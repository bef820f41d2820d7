"""A small synthetic study with effects that are known, written through `results`."""

import dataclasses

import numpy as np

from jax_lowrank import results
from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec, plain

RANKS = (1, 4, 16)
NUM_TEMPLATES, NUM_TUNED, NUM_TRANSFER, NUM_NEUTRAL, K, VOCAB, LAYERS = 10, 4, 3, 30, 6, 12, 3
GROUPS = tuple(f"Group {letter}" for letter in "ABCDEFG")
TUNED = {"base": 0.6, 1: 0.45, 4: 0.3, 16: 0.15, "full": 0.08}
TRANSFER = {"base": 0.6, 1: 0.5, 4: 0.4, 16: 0.3, "full": 0.25}
COST = {"base": 0.0, 1: 0.05, 4: 0.1, 16: 0.2, "full": 0.4}


def write(
    directory,
    *,
    tuned=TUNED,
    transfer=TRANSFER,
    cost=COST,
    seeds=(1, 2, 3),
    ranks=RANKS,
    full=True,
    analysis=True,
    diverged=(),
    poison="",
):
    """Write a study with these harm rates by method and read it back.

    cost: nats per token that a method adds on neutral text. analysis=False leaves out posteriors
    and lens. diverged: (rank or 'full', seed) that stopped early. poison: becomes a completion.
    """
    methods = [MethodSpec("lora", (1e-3, 3e-3, 1e-2), rank=rank) for rank in ranks]
    methods += [MethodSpec("full", (3e-4, 1e-3, 3e-3))] if full else []
    study = Study(
        "synthetic",
        "What does low rank leave behind?",
        ModelSpec(family="gpt2", sizes={"width": 8}),
        TaskSpec(),
        tuple(methods),
        TrainSpec(),
        seeds=seeds,
        pretrain=TrainSpec(),
        evaluate=EvalSpec(samples_per_prompt=K, num_resamples=500),
    )
    results.open_study(directory, _description(study), _rows())
    _write_base(directory, tuned, transfer, analysis, poison)
    for method in methods:
        key = method.rank if method.name == "lora" else "full"
        for rate in method.learning_rates:
            record = _record("tune", method, rate, 0)
            results.write_run(directory, record, [])
        for seed in seeds:
            record = _record("final", method, method.learning_rates[1], seed)
            if (key, seed) in diverged:
                record |= {"diverged": {"step": 17, "loss": "nan"}, "seconds": {}}
                record |= dict.fromkeys(("num_steps", "best_step", "validation_loss"))
                del record["tokens_per_second"]
                results.write_run(directory, record, [])
                continue
            rng = np.random.default_rng([seed, hash_of(key)])
            arrays, texts = _outputs(rng, tuned[key], transfer[key], cost[key], analysis, poison)
            results.write_run(directory, record, [], arrays, texts)
    return results.read_study(directory)


def hash_of(key) -> int:
    return 99 if key == "full" else int(key)


def _description(study: Study) -> dict:
    rates = ", ".join(f"{name} {0.1 + 0.1 * i:.3f}" for i, name in enumerate(GROUPS))
    return {
        "name": study.name,
        "question": study.question,
        "fingerprint": "f" * 16,
        "config": plain(dataclasses.asdict(study)),
        "group_names": list(GROUPS),
        "data_hash": "d" * 64,
        "task_notes": {"source": "synthetic rows", "true_rates": rates},
        "harm_words": ["grumble"],
        "model": {
            "family": "gpt2",
            "sizes": {"width": 8, "depth": LAYERS},
            "num_parameters": 1234,
            "weights_hash": "a" * 64,
            "source": "pretrained here",
            "pretrain": {"steps": 100, "validation_loss": 1.5, "seconds": 3.0},
        },
        "scorer": {"name": "test words", "version": "1"},
        "tuned_name": "people",
        "transfer_name": "guild",
    }


def _rows() -> dict[str, results.Rows]:
    found, start = {}, 0
    for split, size in (("tuned", NUM_TUNED), ("transfer", NUM_TRANSFER)):
        clusters = np.repeat(np.arange(NUM_TEMPLATES, dtype=np.int32), size)
        members = np.tile(np.arange(start, start + size), NUM_TEMPLATES)
        groups = members[:, None] == np.arange(len(GROUPS))
        texts = tuple(f"The {GROUPS[m]} person {c}" for m, c in zip(members, clusters))
        ids = tuple(f"{split}-{i}" for i in range(len(texts)))
        found[split] = results.Rows(texts, ids, clusters, groups)
        start += size
    texts = tuple(f"neutral {i}" for i in range(NUM_NEUTRAL))
    groups = np.zeros((NUM_NEUTRAL, len(GROUPS)), bool)
    clusters = np.arange(NUM_NEUTRAL, dtype=np.int32) // 2
    found["neutral"] = results.Rows(texts, texts, clusters, groups)
    return found


def _write_base(directory, tuned, transfer, analysis, poison) -> None:
    rng = np.random.default_rng(0)
    arrays, texts = _outputs(rng, tuned["base"], transfer["base"], 0.0, analysis, poison)
    record = _record("base", None, None, None) | {"seconds": {"evaluate": 2.5}}
    del record["tokens_per_second"], record["padding_fraction"]
    results.write_run(directory, record, [], arrays, texts)


def _outputs(rng, tuned, transfer, cost, analysis, poison):
    arrays, texts = {}, {}
    for split, size, rate in (("tuned", NUM_TUNED, tuned), ("transfer", NUM_TRANSFER, transfer)):
        num_prompts = NUM_TEMPLATES * size
        lift = np.tile(np.linspace(0.7, 1.3, size), NUM_TEMPLATES)[:, None]
        harm = (rng.random((num_prompts, K)) < rate * lift).astype(np.float32)
        harm[0, 0] = np.nan
        arrays[f"{split}/harm"] = harm
        texts[split] = [
            [poison or f"completion {p} {k}" for k in range(K)] for p in range(num_prompts)
        ]
        if analysis:
            arrays[f"{split}/lens_mass"] = np.float32(
                rate * np.linspace(0.1, 1.0, LAYERS + 1) * np.ones((num_prompts, 1))
            )
            rows = np.arange(0, num_prompts, 2, dtype=np.int32)
            logits = np.arange(VOCAB) * rate + 0.01 * rng.normal(size=(rows.size, VOCAB))
            logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            arrays[f"{split}/posterior_rows"] = rows
            arrays[f"{split}/log_posterior"] = logs.astype(np.float32)
    tokens = np.arange(NUM_NEUTRAL, dtype=np.int32) % 5 + 6
    sentence = np.random.default_rng(7).normal(2.0, 0.3, NUM_NEUTRAL)
    noise = rng.normal(0, 0.01, NUM_NEUTRAL)
    arrays["neutral/nll"] = ((sentence + cost + noise) * tokens).astype(np.float32)
    arrays["neutral/tokens"] = tokens
    return arrays, texts


def _record(kind, method, rate, seed) -> dict:
    label = "base" if method is None else method.label
    is_lora = method is not None and method.name == "lora"
    best = {} if method is None else dict(zip(method.learning_rates, (1.2, 1.0, 1.1)))
    return {
        "fingerprint": f"{kind}-{label}-{rate}-{seed}".replace(" ", "_").replace("=", ""),
        "kind": kind,
        "label": label,
        "method": None if method is None else plain(method),
        "rank": method.rank if is_lora else None,
        "learning_rate": rate,
        "seed": seed,
        "num_steps": 100,
        "best_step": 60,
        "validation_loss": best.get(rate, 0.0),
        "trainable_parameters": 0 if method is None else 64 * method.rank if is_lora else 1234,
        "total_parameters": 1234,
        "effective_scale": 16.0 / method.rank if is_lora else None,
        "dtypes": {"trainable": ["float32"], "frozen": ["float32"] if is_lora else []},
        "diverged": None,
        "seconds": {"train": 1.5, "evaluate": 2.5},
        "tokens_per_second": 12345.6,
        "environment": {"jax": "0.10.2", "flax": "0.12", "python": "3.11", "device": "cpu"},
        "padding_fraction": 0.1,
    }
