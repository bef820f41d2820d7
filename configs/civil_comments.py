"""Toxic comments by nine identities (Borkan et al. 2019), a real encoder: LoRA against full.

    jax-lowrank study configs/civil_comments.py

Not run here: tensorflow-datasets downloads `civil_comments/CivilCommentsIdentities` (about 400,000
training rows) into $TFDS_DATA_DIR at the first run. A comment is toxic, and speaks of an identity,
where at least half of its annotators say so. 20,000 training rows are drawn; the source's own
validation and test rows are used. The report's subgroup, BPSN and BNSP AUCs are that paper's.

The encoder is all-MiniLM-L6-v2 from the hub; `--model.path DIRECTORY` names another.
"""

from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

IDENTITIES = (
    "male",
    "female",
    "homosexual_gay_or_lesbian",
    "christian",
    "jewish",
    "muslim",
    "black",
    "white",
    "psychiatric_or_mental_illness",
)


def config() -> Study:
    """Head-only, LoRA r = 1, 8, 64 (alpha = 16, all linear layers) and full; five seeds."""
    lora = [MethodSpec("lora", (3e-4, 1e-3), rank=rank, alpha=16.0) for rank in (1, 8, 64)]
    return Study(
        name="civil_comments",
        question="Are comments on some identities judged worse under LoRA than under full tuning?",
        model=ModelSpec(path="sentence-transformers/all-MiniLM-L6-v2"),
        task=TaskSpec(
            name="text_classification",
            options={
                "path": "tfds:civil_comments/CivilCommentsIdentities",
                "options": {
                    "label": "toxicity",
                    "positive_above": 0.5,
                    "groups": IDENTITIES,
                    "split": "tfds_split",
                },
                "split": "source",
                "max_train": 20_000,
            },
        ),
        methods=(
            MethodSpec("head", (1e-3, 1e-2)),
            *lora,
            MethodSpec("full", (3e-5, 1e-4)),
        ),
        train=TrainSpec(epochs=2, batch_size=32, max_length=128, weight_decay=1e-3),
        seeds=(1, 2, 3, 4, 5),
        evaluate=EvalSpec(positive="positive", minimum=50, batch_size=128),
    )
