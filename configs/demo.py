"""The toxicity-mitigation study in miniature, on an embedded world of invented groups.

    jax-lowrank study configs/demo.py          (about 4 minutes on 2 CPU cores; `make demo` runs it)

A GPT-2 of about one million parameters is pretrained on sentences in which invented groups meet
invented harm words at rates between 10 % and 70 %. It is then fine-tuned on counterfactual
sentences about the invented peoples, by LoRA at ranks 1 to 32 and by full fine-tuning. Harm is
counted on held-out templates, for those peoples and for invented guilds that the fine-tuning text
never names.
"""

from jax_lowrank.config import EvalSpec, MethodSpec, ModelSpec, Study, TaskSpec, TrainSpec

LORA_RATES = (1e-3, 3e-3, 9e-3)
FULL_RATES = (1e-4, 3e-4, 9e-4)


def config() -> Study:
    """Base, LoRA r = 1 ... 32 (alpha = 16, all linear layers), full fine-tuning; three seeds."""
    return Study(
        name="demo",
        question="What harm of the base model is left after low-rank and after full fine-tuning?",
        model=ModelSpec(
            family="gpt2",
            sizes={
                "num_layers": 4,
                "width": 128,
                "num_heads": 4,
                "mlp_width": 512,
                "max_positions": 48,
            },
        ),
        pretrain=TrainSpec(epochs=1, batch_size=64, max_length=40, learning_rate=3e-3),
        task=TaskSpec(
            name="world", options={"num_pretrain": 20_000, "num_train": 400, "num_validation": 200}
        ),
        methods=(
            *(
                MethodSpec("lora", LORA_RATES, rank=rank, alpha=16.0)
                for rank in (1, 2, 4, 8, 16, 32)
            ),
            MethodSpec("full", FULL_RATES),
        ),
        train=TrainSpec(epochs=3, batch_size=32, max_length=40),
        seeds=(1, 2, 3),
        evaluate=EvalSpec(samples_per_prompt=8, max_new_tokens=6, batch_size=240),
    )
