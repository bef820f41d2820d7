"""What the commands say of themselves."""

HELP = """\
jax-lowrank: what does low-rank fine-tuning leave behind, compared with full fine-tuning?

commands
  study CONFIG [--out DIR] [--FIELD VALUE ...]   run a study, or continue it, and report it;
        [--shard i/n]                            several workers may share one DIR
        [--mirror URL]                           a copy of DIR in a store: gs://, s3://, file://
        [--track DIR]                            training curves for TensorBoard
        [--no-sweep]                             one run after the other, each in its own program
        [--distributed]                          one of several processes, see tpu_scripts/README.md
  report DIR                                     report a results directory again
  audit-topology CONFIG [--steps N] [--out DIR]  the same steps on several meshes, and seeds
  finetune --model PATH --data FILE [...]        one run: LoRA, full fine-tuning and others
  generate RUN_OR_MODEL --prompt TEXT [...]      continue prompts; also with a PEFT adapter
  evaluate RUN_OR_MODEL --data FILE [...]        measure on a file; also a PEFT adapter
  export RUN --format hf|peft [--out DIR]        a finished run for transformers or for PEFT

examples
  jax-lowrank study configs/demo.py
  jax-lowrank study configs/demo.py --out results/long --train.epochs 6 --seeds 1 2 3 4 5
  jax-lowrank report results/demo
  jax-lowrank finetune --model ./llama --data chats.jsonl --out results/chat
  jax-lowrank COMMAND --help                              examples and every field of a command
  jax-lowrank study configs/stories_honest.py --help      every field of that study, and its value

CONFIG is a Python file with a function config() that returns a Study, or FILE.py:FUNCTION.
Results go to results/NAME; a run that is finished there is not run again.
--shard i/n does every n-th run from i (0 to n-1) on, and what these need; without it,
SLURM_ARRAY_TASK_ID/_COUNT or JOB_COMPLETION_INDEX/JOB_COMPLETIONS say it, or all is done.
--mirror URL copies what is finished or saved, and first takes from there what DIR
lacks. Machines that share nothing else share the runs by --shard.
SIGTERM and Ctrl-C save a checkpoint and stop, a second one stops at once; the same command goes on.
Exit codes: 0 done, 1 a run failed, 2 the input is wrong, 75 stopped by a signal (study, finetune),
130 interrupted (other commands).
"""

AUDIT_HELP = """\
Train a study's methods for a few steps on several meshes of the devices, and for every seed on one:
how far does the order of sums move a result, beside what a seed moves?

examples
  jax-lowrank audit-topology configs/stories_honest.py --steps 50
  XLA_FLAGS=--xla_force_host_platform_device_count=8 jax-lowrank audit-topology configs/demo.py

--steps N optimizer steps of each (20), at the method's first learning rate. --out DIR is where
audit.json goes; default: results/NAME-topology.
"""

FINETUNE_HELP = """\
Fine-tune a checkpoint on a file: text, prompts with completions, chats, texts with classes, or (an
encoder) text with hidden tokens.

examples
  jax-lowrank finetune --model ./llama --data pairs.jsonl --rank 16 --learning-rate 1e-4
  jax-lowrank finetune --model ./bert --data reviews.csv --method full --test held-out.csv --dry-run

what to know
  --method NAME   lora, full, bitfit or head, each with its usual learning rate
  --task KIND     text, completion, chat or classification, by the columns of the data if not given;
                  masked-lm hides 15 % of a text's tokens, others in every epoch
  --out DIR       where the run goes; default: under results/. The best epoch by validation is kept
  --mirror URL    a copy of the run in a store (gs://, s3://, file://), at URL/NAME of its folder
  --track DIR     where training curves for TensorBoard go
  --dry-run       checks everything, prints configuration, sizes and memory, and writes no result;
                  with --devices N the memory on each of N accelerators, from config.json alone
  --distributed   this is one of several processes that do it; see tpu_scripts/README.md
  --model DIR     may hold a PEFT adapter: training goes on from it, beside its base model
  short for dotted fields: --model, --data, --task, --validation, --test, --rank,
  --learning-rate, --epochs, --batch-size, --max-length
"""

GENERATE_HELP = """\
Continue prompts with a finished run, a PEFT adapter or a checkpoint.

examples
  jax-lowrank generate results/chat --prompt "Where is the key?" --chat
  jax-lowrank generate ./llama --prompts prompts.jsonl --temperature 0 --max-new-tokens 32

what to know
  --prompt prints its continuations, --prompts one JSON object a prompt
  --dry-run       checks everything, prints configuration, sizes and memory, and continues nothing
"""

EVALUATE_HELP = """\
Measure a finished run, a PEFT adapter or a checkpoint on a file.

examples
  jax-lowrank evaluate results/chat --data held-out.jsonl
  jax-lowrank evaluate results/reviews --data other.csv --data.columns.text body --out results/other

what to know
  --data FILE     short for --data.path; a run brings its columns, classes and length
  --trained-rows  measures rows that the run was trained on too; else a file with some is refused
  --out DIR       keeps metrics.json and predictions.npz
  --dry-run       checks everything, prints configuration, sizes and memory, and measures nothing
"""

EXPORT_HELP = """\
Write a finished run, of finetune or of a study, for other tools.

examples
  jax-lowrank export results/chat --format hf --out exported     merged weights, for transformers
  jax-lowrank export results/demo/runs/0390465ffc8e30e7 --format peft     the adapter, for PEFT

what to know
  --format        hf: a whole model; peft: the adapter of a LoRA run. What PEFT cannot express is an
                  error
  --out DIR       where it goes; default: beside the run
  --dry-run       checks everything, prints sizes, memory and the files, and writes nothing
"""
