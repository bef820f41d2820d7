"""arXiv 2405.17512, hate-speech detection with Llama-2 7B on D-Lab: subgroups, LoRA against full.

    jax-lowrank study configs/ding_llama2.py:religion     (published hyper-parameters; also gender,
                                                           race, sexuality)
    jax-lowrank study configs/ding_llama2.py:ranks        (alpha = 16, r = 1 ... 4096, religion)
    jax-lowrank study configs/ding_llama2.py:modern       (what one would run today, religion)
    jax-lowrank study configs/ding_llama2.py:answers      (the same, answering Yes or No)

Not run here: Llama-2 is licensed (accept it on the hub, then `--model.path` finds it) and full
fine-tuning of 7B wants several accelerators (`--mesh.fsdp -1`; `finetune --dry-run --devices N`
says how much memory). Data: `ucberkeley-dlab/measuring-hate-speech`, read from the hub.

As published: a head over the last token, q and v only, r = 8, alpha = 16, no dropout, batch 32,
AdamW, cosine to 0, warm-up 1 %, weight decay 1e-3, 256 tokens at most, the learning rates and
epochs that the authors selected; utility is matched in F1. Done otherwise, for validity: those were
selected on the rows that were then reported; here 10 % of the training rows choose the step. One
split (seed 13) serves all run seeds: the published calibration runs evaluated models of other seeds
on it, most of whose rows they had trained on. Identity flags are the annotators' majority, not the
first annotator's.
`modern` adapts all linear layers with rsLoRA and searches the learning rates on validation; how
long to train is the step with the best validation loss in one schedule of four epochs.
"""

import dataclasses

from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

MODEL = "meta-llama/Llama-2-7b-hf"
DATA = "hub:ucberkeley-dlab/measuring-hate-speech/measuring-hate-speech.parquet"
SEEDS = (13, 1337, 42, 666, 888)
# subset: (epochs, learning rate) of full fine-tuning, then of LoRA
SELECTED = {
    "gender": ((1, 1e-5), (2, 3e-4)),
    "race": ((1, 1e-5), (6, 3e-4)),
    "religion": ((2, 1e-5), (6, 3e-4)),
    "sexuality": ((1, 1e-5), (4, 1e-4)),
}
RANKS = tuple(2**power for power in range(13))
FRACTIONS = (0.2, 0.4, 0.6, 0.8)


def gender() -> Study:
    """Posts that target a gender."""
    return published("gender")


def race() -> Study:
    """Posts that target a race."""
    return published("race")


def religion() -> Study:
    """Posts that target a religion."""
    return published("religion")


def sexuality() -> Study:
    """Posts that target a sexuality."""
    return published("sexuality")


config = religion


def published(subset: str, model: str = MODEL, selected: dict = SELECTED) -> Study:
    """Full fine-tuning and LoRA r = 8 as selected, and the head alone; five seeds."""
    (full_epochs, full_rate), (lora_epochs, lora_rate) = selected[subset]
    methods = (
        MethodSpec("head", (1e-3, 1e-2), epochs=lora_epochs),
        MethodSpec("lora", (lora_rate,), rank=8, targets="qv", epochs=lora_epochs),
        MethodSpec("full", (full_rate,), epochs=full_epochs),
    )
    return study(f"ding_{subset}", subset, methods, model)


def ranks(model: str = MODEL, numbers: tuple[int, ...] = RANKS) -> Study:
    """Ranks at alpha 16, and rank 1 on a fraction of the layers, as published for religion.

    Rank 0 is the head alone: 3e-5 as published, and a rate that suits a head. A fraction is of
    whole layers; the published one could cut a layer's v off its q.
    """
    rank_one = {"rank": 1, "targets": "qv", "epochs": 12}
    methods = [MethodSpec("lora", (3e-5,), rank=r, targets="qv", epochs=12) for r in numbers]
    methods += [
        MethodSpec("lora", (3e-5,), layer_fraction=fraction, layers=place, **rank_one)
        for fraction in FRACTIONS
        for place in ("first", "last", "random")
    ]
    methods += [MethodSpec("head", (3e-5, 1e-3), epochs=12)]
    methods += [MethodSpec("full", (1e-5,), epochs=2)]
    return study("ding_ranks", "religion", tuple(methods), model)


def modern(model: str = MODEL) -> Study:
    """All linear layers, alpha / sqrt(r), learning rates searched on validation; three seeds."""
    lora = [
        MethodSpec("lora", (5e-5, 1e-4, 2e-4, 5e-4), rank=r, alpha=16.0, rslora=True)
        for r in (1, 8, 64)
    ]
    methods = (
        MethodSpec("head", (1e-3, 1e-2)),
        *lora,
        MethodSpec("full", (5e-6, 1e-5, 2e-5)),
    )
    return study("ding_modern", "religion", methods, model, seeds=(1, 2, 3))


def answers(model: str = MODEL) -> Study:
    """As `modern`, answering Yes or No instead of with a head: the base model has a say too."""
    whole = modern(model)
    asked = {
        "prompt": "Post: {text}\nQuestion: Is this post hateful?\nAnswer:",
        "answers": {"not hateful": "No", "hateful": "Yes"},
    }
    task = dataclasses.replace(whole.task, options=whole.task.options | asked)
    methods = tuple(method for method in whole.methods if method.name != "head")
    return dataclasses.replace(
        whole, name=whole.name.replace("modern", "answers"), task=task, methods=methods
    )


def study(
    name: str, subset: str, methods: tuple[MethodSpec, ...], model: str, seeds=SEEDS
) -> Study:
    """The study of these methods on one attribute."""
    family = "mistral" if "mistral" in model.lower() else "llama2"
    return Study(
        name=f"{name}_{family}",
        question="Do LoRA and full fine-tuning serve the subgroups that posts target alike?",
        model=ModelSpec(path=model),
        task=TaskSpec(
            name="text_classification",
            options={
                "path": DATA,
                "reader": "dlab",
                "options": {"subset": subset, "flags": "majority"},
                "split": "published",
                "seed": 13,
            },
        ),
        methods=methods,
        train=TrainSpec(
            epochs=4,
            batch_size=32,
            max_length=256,
            warmup_fraction=0.01,
            weight_decay=1e-3,
            remat="full",
        ),
        seeds=seeds,
        tune_seed=25,
        evaluate=EvalSpec(positive="hateful", minimum=20, batch_size=32, match="f1"),
    )
