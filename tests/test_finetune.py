"""Single runs end to end on a tiny checkpoint: what they learn, store, repeat and refuse."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
from safetensors.numpy import load_file
from test_tracking import curves
from tiny_text import jsonl

from jax_lowrank import cli, data, finetune, infer, models, results, train, trained
from jax_lowrank.adapt.method import bind, count
from jax_lowrank.config import MethodSpec, TrainSpec
from jax_lowrank.config_run import CheckpointSpec, DataSpec, FinetuneSpec
from jax_lowrank.models.head import Head
from jax_lowrank.tasks import encode

SMALL = ["--max-length", "32", "--epochs", "3", "--batch-size", "8", "--learning-rate", "0.01"]


def run(arguments, monkeypatch, capsys):
    """(exit code, stdout, stderr) of one command in this process."""
    monkeypatch.setattr(cli, "use_fast_memory", lambda: None)
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, files of every kind, and one finished run of each."""
    place = tmp_path_factory.mktemp("finetune")
    tiny_text.checkpoint(place / "model", chat=True)
    jsonl(place / "completion.jsonl", tiny_text.pairs())
    jsonl(place / "classification.jsonl", tiny_text.labelled())
    jsonl(place / "chat.jsonl", tiny_text.chats())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "use_fast_memory", lambda: None)
        patch.setattr(cli, "set_up_jax", lambda: None)
        for kind, method in METHOD.items():
            file = place / f"{kind}.jsonl"
            out = ["--out", str(place / "runs" / kind), "--method", method]
            line = ["finetune", "--model", str(place / "model"), "--data", str(file), *out, *SMALL]
            more = ["--epochs", "20"] if kind == "chat" else ["--track", str(place / "curves")]
            assert cli.main([*line, "--test", str(file), *more]) == 0
    return place


def test_training_is_tracked_where_asked(folder):
    (place,) = (folder / "curves").iterdir()  # both of a method
    lines = [
        json.loads(line)
        for kind in ("completion", "classification")
        for line in (folder / "runs" / kind / "log.jsonl").read_text().splitlines()
    ]
    found = curves(place)
    wanted = {line["step"] for line in lines if "loss" in line}
    assert set(found["loss"]) == wanted and len(wanted) >= 3
    assert set(found["validation_loss"]) == {x["step"] for x in lines if "validation_loss" in x}


METHOD = {"completion": "lora", "classification": "lora", "chat": "full"}


def metrics_of(record, split, when="after"):
    """Name -> metric."""
    found = [m for m in record["metrics"] if (m["split"], m["when"]) == (split, when)]
    return {m["name"]: m for m in found}


def record_of(run):
    return json.loads((run / "record.json").read_text())


@pytest.mark.parametrize("kind", METHOD)
def test_a_run_learns_and_says_what_it_did(folder, kind):
    run = folder / "runs" / kind
    record = record_of(run)
    assert record["kind"] == kind and record["label"] in ("LoRA r=8", "full fine-tuning")
    rows = {name: split["rows"] for name, split in record["splits"].items()}
    assert (
        rows["train"] + rows["validation"]
        == rows["test"]
        == record["splits"]["test"]["also_trained_on"] + rows["validation"]
    )
    name = "nats per row" if kind == "classification" else "nats per token"
    before, after = (metrics_of(record, "test", when)[name] for when in ("before", "after"))
    assert after["value"] < before["value"] and after["low"] < after["value"] < after["high"]
    held_out = metrics_of(record, "validation")[name]["value"]
    assert held_out == pytest.approx(record["validation_loss"])
    assert record["environment"]["jax"] and record["peak_memory_mb"] > 50
    kept = [] if METHOD[kind] == "full" else ["float32"]
    assert record["dtypes"] == {"trainable": ["float32"], "frozen": kept}
    assert record["effective_scale"] == (2.0 if METHOD[kind] == "lora" else None)
    assert set(record["effective_scales"].values()) == ({2.0} if METHOD[kind] == "lora" else set())
    splits = json.loads((run / "splits.json").read_text())
    assert not set(splits["train"]) & set(splits["validation"])
    lines = (run / "log.jsonl").read_text().splitlines()
    assert len(lines) >= 3 + 4  # a line a call, and one a validation


@pytest.mark.parametrize("kind", METHOD)
def test_the_metrics_come_from_the_stored_predictions(folder, kind):
    run = folder / "runs" / kind
    with np.load(run / "predictions.npz") as stored:
        arrays = {k.removeprefix("test/"): v for k, v in stored.items() if k.startswith("test/")}
    record = record_of(run)
    assert arrays.pop("ids").tolist() == json.loads((run / "splits.json").read_text())["test"]
    head = Head(record["model"]["head"], tuple(record["model"]["labels"]))
    found = trained.measure(arrays, 0.95, head, record["majority_class"])
    assert {m["name"]: {"split": "test", "when": "after", **m} for m in found} == metrics_of(
        record, "test"
    )


@pytest.mark.parametrize("kind", METHOD)
def test_a_run_is_rebuilt_from_its_directory(folder, kind, monkeypatch, capsys):
    run_directory = folder / "runs" / kind
    file = folder / f"{kind}.jsonl"
    out = folder / f"again-{kind}"
    line = ["evaluate", run_directory, "--data", file, "--out", out, "--trained-rows"]
    code, said, err = run(line, monkeypatch, capsys)
    assert code == 0 and "not noticed" not in err, err
    found = json.loads((out / "metrics.json").read_text())
    record = record_of(run_directory)
    name = "accuracy" if kind == "classification" else "perplexity"
    again, after = found[0], metrics_of(record, "test")[name]
    assert again["name"] == name and again["value"] == pytest.approx(after["value"], rel=1e-5)
    assert again["n"] == record["splits"]["test"]["rows"] and name in said
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 2 and "is there already" in err


@pytest.mark.parametrize("kind", METHOD)
def test_rows_that_were_trained_on_are_refused(folder, kind, tmp_path, monkeypatch, capsys):
    """By what they say: in another file, under other ids; and those held out are not."""
    directory = folder / "runs" / kind
    rows = [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]
    ids = json.loads((directory / "splits.json").read_text())
    numbers = {name: [int(i.rpartition(":")[2]) - 1 for i in ids[name]] for name in ids}
    held_out = [rows[i] for i in numbers["validation"]]
    line = ["evaluate", directory, "--data", jsonl(tmp_path / "held-out.jsonl", held_out)]
    code, said, err = run(line, monkeypatch, capsys)
    assert code == 0 and f"{len(held_out)} rows" in said, err
    line[-1] = jsonl(tmp_path / "mixed.jsonl", [*held_out, rows[numbers["train"][-1]]])
    for more in ([], ["--dry-run"], ["--out", tmp_path / "out"]):
        code, said, err = run([*line, *more], monkeypatch, capsys)
        wanted = f"1 of {len(held_out) + 1} rows to evaluate on were trained on, e.g. mixed.jsonl:"
        assert code == 2 and not said and f"{wanted}{len(held_out) + 1}: leave them out" in err
        assert "--trained-rows" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run([*line, "--trained-rows"], monkeypatch, capsys)[0] == 0


def test_a_run_that_kept_no_hashes_is_measured_and_says_so(folder, tmp_path, monkeypatch, capsys):
    old = tmp_path / "old"
    shutil.copytree(folder / "runs" / "completion", old)
    (old / results.TRAINED_ON).unlink()
    line = ["evaluate", old, "--data", folder / "completion.jsonl"]
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 0 and "old keeps no trained_on.json: rows that it was trained on are not" in err


def test_classes_are_learnt(folder):
    record = record_of(folder / "runs" / "classification")
    test = metrics_of(record, "test")
    assert test["accuracy"]["value"] == 1.0 > test["accuracy of the majority class"]["value"]
    assert test["accuracy"]["n"] == 40 and test["F1 of pos"]["n"] == 20
    trained_arrays = load_file(folder / "runs" / "classification" / "trainable.safetensors")
    assert trained_arrays["classifier.out.kernel"].shape == (16, 2)  # beside the factors
    assert record["trainable_parameters"] == 3072 + 16 * 2
    assert record["model"]["labels"] == ["neg", "pos"] and record["majority_class"] in (
        "neg",
        "pos",
    )


def spec_of(folder, kind="completion", **changed):
    fields = {
        "model": CheckpointSpec(path=str(folder / "model")),
        "data": DataSpec(str(folder / f"{kind}.jsonl")),
        "method": MethodSpec("lora", (1e-2,), rank=2),
        "train": TrainSpec(epochs=1, batch_size=8, max_length=32),
    }
    return FinetuneSpec(**{**fields, **changed})


def prepared(folder, **changed):
    return finetune.prepare(spec_of(folder, **changed), str(folder / "nowhere"), lambda text: None)


def test_the_prompt_gets_no_gradient(folder):
    """The loss's gradient is that of the completion's log-probabilities, written out by hand."""
    job = prepared(folder, method=MethodSpec("full", (1e-2,)))
    graphdef, trainable, frozen = job.start.parts
    batches, encoded = finetune.make_batches(job), job.encoded["train"]
    full = next(t for t in range(batches.steps_per_epoch) if batches.rows(t).min() >= 0)
    batch, rows = batches.batch(full), batches.rows(full)
    begins = [encoded.counted[row].index(True) for row in rows]
    assert min(begins) >= 5  # <eos> and a prompt of four words or more

    def by_hand(trainable):
        log_probs = jax.nn.log_softmax(bind(graphdef)(trainable, frozen)(batch.tokens))
        total = jnp.float32(0)
        for place, (row, begin) in enumerate(zip(rows, begins)):
            for t in range(begin, len(encoded.sequences[row])):
                total -= log_probs[place, t - 1, batch.tokens[place, t]]
        return total

    def ours(trainable, batch):
        return train.causal_lm_loss(bind(graphdef), trainable, frozen, batch, None)[0].sum()

    expected = jax.jit(jax.grad(by_hand))(trainable)
    found = jax.jit(jax.grad(ours))(trainable, batch)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    unmasked = data.make_batches(encoded.sequences, batch_size=8, seed=0, pad_id=job.text.pad_id)
    whole = jax.jit(jax.grad(ours))(trainable, unmasked.batch(full))
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected, whole)
    assert max(jax.tree.leaves(gaps)) > 0.1


def test_without_masking_every_token_counts(folder):
    masked = prepared(folder)
    whole = prepared(folder, data=DataSpec(str(folder / "completion.jsonl"), mask_prompt=False))
    assert masked.fingerprint != whole.fingerprint
    weights = [finetune.make_batches(job).batch(0).weights.sum() for job in (masked, whole)]
    assert weights[0] < weights[1]
    graphdef, *states = masked.start.parts
    scored = infer.likelihood(
        bind(graphdef),
        states,
        masked.encoded["train"].sequences,
        batch_size=8,
        pad_id=0,
        counted=masked.encoded["train"].counted,
    )
    assert scored.tokens.sum() == sum(sum(c) for c in masked.encoded["train"].counted)


def test_a_frozen_output_row_of_zeros_is_said(folder, tmp_path):
    """The end token of a base model that was never trained on it."""
    model = models.load(folder / "model")
    arrays = models.by_path(model.params)
    arrays["embed.table"] = arrays["embed.table"].at[jnp.array([1, 0])].set(0)  # <eos>, <pad>
    models.save(tmp_path, model, models.with_arrays(model.params, arrays))
    tiny_text.tokenizer().save_pretrained(tmp_path)
    said = {}
    for place, name in ((folder / "model", "lora"), (tmp_path, "lora"), (tmp_path, "full")):
        method = MethodSpec(name, (1e-2,), rank=2 if name == "lora" else 0)
        spec = spec_of(folder, model=CheckpointSpec(path=str(place)), method=method)
        lines = said[place == tmp_path, name] = []
        finetune.prepare(spec, str(folder / "nowhere"), lines.append)
    (line,) = (line for line in said[True, "lora"] if "zeros" in line)
    assert line.startswith("1 of the tokens to be learnt have an output row of zeros (<eos>), ")
    assert not any("zeros" in line for line in said[False, "lora"] + said[True, "full"])


def test_padding_does_not_change_a_class(folder):
    job = prepared(folder, data=DataSpec(str(folder / "classification.jsonl")))
    sequences = [s[: 2 + i % 4] for i, s in enumerate(job.encoded["train"].sequences)]
    job = job._replace(encoded={"train": encode.Encoded(sequences, None, 0)})
    graphdef, *states = job.start.parts
    model = (bind(graphdef), states)
    one = infer.classify(*model, sequences, batch_size=8, pad_id=job.text.pad_id)
    other = infer.classify(*model, sequences, batch_size=36, pad_id=7)
    np.testing.assert_allclose(one, other, atol=1e-6)
    alone = infer.classify(*model, sequences[3:4], batch_size=1, pad_id=0)
    np.testing.assert_allclose(alone[0], one[3], atol=1e-6)
    batches = finetune.make_batches(job)
    steps = [batches.batch(t) for t in range(batches.steps_per_epoch)]
    assert sum(b.weights.sum() for b in steps) == len(sequences) == 36
    loss = jax.jit(partial(train.classification_loss, bind(graphdef), key=None))
    total = [loss(*states, b) for b in steps]
    # The 4 rows that fill up the last batch count neither above nor below the line.
    assert [len(b.tokens) for b in steps] == [8] * 5 and sum(t[1].sum() for t in total) == 36
    by_hand = finetune.mean_loss({"logits": one, "labels": job.data.splits["train"].labels})
    assert sum(t[0].sum() for t in total) / 36 == pytest.approx(by_hand, rel=1e-5)


def test_the_start_is_kept_where_every_epoch_is_worse(folder, tmp_path, monkeypatch, capsys):
    """Weights, outputs and metrics are those of the best validation, not of the last epoch."""
    line = arguments(folder, tmp_path / "out", "--test", folder / "completion.jsonl")
    line += ["--method", "full", "--learning-rate", 1, "--epochs", 2]
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 0, err
    record = record_of(tmp_path / "out")
    log = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert len(losses) == 3 and min(losses[1:]) > losses[0] + 1
    assert record["best_step"] == 0 and record["validation_loss"] == losses[0]
    for split in ("validation", "test"):
        assert metrics_of(record, split) == {
            name: {**metric, "when": "after"}
            for name, metric in metrics_of(record, split, "before").items()
        }
    stored = load_file(tmp_path / "out" / "trainable.safetensors")
    base = models.by_path(models.load(folder / "model").params)
    assert stored.keys() == base.keys()
    assert all(np.array_equal(stored[path], base[path]) for path in base)
    with np.load(tmp_path / "out" / "predictions.npz") as outputs:
        nll, tokens = outputs["validation/nll"], outputs["validation/tokens"]
    assert nll.sum() / tokens.sum() == pytest.approx(losses[0])


def arguments(folder, out, *more, kind="completion"):
    file = folder / f"{kind}.jsonl"
    return ["finetune", "--model", folder / "model", "--data", file, "--out", out, *SMALL, *more]


def test_a_dry_run_writes_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said, _ = run([*arguments(folder, "out")[:5], *SMALL, "--dry-run"], monkeypatch, capsys)
    assert code == 0 and list(tmp_path.iterdir()) == []
    config, _, rest = said.partition("\n}\n")
    assert json.loads(config + "}")["train"]["epochs"] == 3
    # Per layer qkv 16x48, out 16x16, up 16x32, down 32x16, at rank 8; optimizer: two moments.
    assert "trains 3,072 of" in rest and "at scale 2" in rest
    assert "trainable 12.3 kB, optimizer 24.6 kB" in rest and "gradients and activations" in rest
    assert "would write results/completion-lora-" in rest


def test_dry_runs_of_the_other_commands_write_nothing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    completion = folder / "runs" / "completion"
    chosen = ["--prompt", "the cat", "--samples", 3, "--max-new-tokens", 6, "--dry-run"]
    code, said, err = run(["generate", completion, *chosen], monkeypatch, capsys)
    assert code == 0 and '"max_new_tokens": 6' in said, err
    assert "model: gpt2, causal-lm head; " in said and "of at most 3 tokens; 3 continu" in said
    assert "write nothing" in said and "the parameters" not in said and "memory: param" in said
    line = ["evaluate", completion, "--data", folder / "completion.jsonl", "--dry-run"]
    line += ["--trained-rows"]
    code, said, err = run([*line, "--out", "kept"], monkeypatch, capsys)
    assert code == 0 and "completion: 24 rows, 0 cut; at most 24 x " in said, err
    assert "would write kept: metrics.json, predictions.npz" in said
    parameters = 3072 + record_of(completion)["total_parameters"]
    assert f"{parameters:,} parameters" in said
    for format, files in {"hf": "model.safetensors", "peft": "adapter_model.safetensors"}.items():
        line = ["export", completion, "--format", format, "--out", "new", "--dry-run"]
        code, said, err = run(line, monkeypatch, capsys)
        assert code == 0 and f"would write new: {files} (" in said and "README.md" in said, err
        code, _, err = run([*line[:-2], folder, "--dry-run"], monkeypatch, capsys)
        assert code == 2 and "is not empty; choose another --out" in err
    line = ["export", folder / "runs" / "chat", "--format", "peft", "--dry-run"]
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 2 and "PEFT has no format for what method 'full' trains" in err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_measured_and_trained_on(folder, tmp_path, monkeypatch, capsys):
    """What was exported for PEFT goes in again: the same figures, and training from there."""
    first, adapter = folder / "runs" / "completion", tmp_path / "adapter"
    assert run(["export", first, "--format", "peft", "--out", adapter], monkeypatch, capsys)[0] == 0
    file = folder / "completion.jsonl"
    line = ["--data", file, "--max-length", 32]
    code, said, err = run(["evaluate", adapter, *line], monkeypatch, capsys)
    after = metrics_of(record_of(first), "test")
    assert code == 0 and f"perplexity {after['perplexity']['value']:.3f} [" in said, err
    line = ["finetune", "--model", adapter, *line, "--test", file, "--out", tmp_path / "second"]
    line += ["--epochs", 12, "--batch-size", 8, "--learning-rate", 3e-3]
    for wrong in (["--rank", 4], ["--method", "full"], ["--method.dora"]):
        code, _, err = run([*line, *wrong], monkeypatch, capsys)
        assert code == 2 and "is an adapter, which brings rank, alpha, targets" in err, err
    code, said, err = run(line, monkeypatch, capsys)
    assert code == 0, err
    record = record_of(tmp_path / "second")
    before = metrics_of(record, "test", "before")
    for name, metric in after.items():
        assert before[name]["value"] == pytest.approx(metric["value"], rel=1e-5)
    assert metrics_of(record, "test")["perplexity"]["value"] < before["perplexity"]["value"]
    assert record["method"]["rank"] == 8 and len(record["model"]["adapter_hash"]) == 64
    again = tmp_path / "again"
    code, _, err = run(
        ["export", tmp_path / "second", "--format", "peft", "--out", again], monkeypatch, capsys
    )
    config, other = (
        json.loads((place / "adapter_config.json").read_text()) for place in (adapter, again)
    )
    assert code == 0 and config == other
    assert record["model"]["adapter_hash"] in (again / "README.md").read_text()


def test_an_adapter_for_another_head_is_refused(folder, tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "adapter"
    line = ["export", folder / "runs" / "classification", "--format", "peft", "--out", adapter]
    assert run(line, monkeypatch, capsys)[0] == 0
    line = ["finetune", "--model", adapter, "--max-length", 32, "--out", tmp_path / "out"]
    code, _, err = run([*line, "--data", folder / "completion.jsonl"], monkeypatch, capsys)
    assert code == 2 and "is an adapter for classification with 2 classes, but the data are" in err
    data = ["--data", folder / "classification.jsonl", "--epochs", 1, "--batch-size", 8]
    code, said, err = run([*line, *data], monkeypatch, capsys)
    assert code == 0 and "validation before: accuracy 1.000" in said, err
    assert record_of(tmp_path / "out")["model"]["labels"] == ["neg", "pos"]


def test_the_same_run_is_not_done_again(folder, tmp_path, monkeypatch, capsys):
    out = folder / "runs" / "completion"
    line = arguments(folder, out, "--test", folder / "completion.jsonl")
    stamp = (out / "record.json").stat().st_mtime_ns
    monkeypatch.setattr(finetune, "train_and_write", None)  # would fail
    left = finetune.saves(out) / record_of(out)["fingerprint"] / "00000001"
    left.mkdir(parents=True)  # killed while it deleted them
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 0 and "this run was done before" in err and not finetune.saves(out).exists()
    monkeypatch.setattr(finetune, "execute", None)  # would fail
    code, said, err = run(line, monkeypatch, capsys)
    assert code == 0 and "this run was done before" in err and "test after: perplexity" in said
    assert (out / "record.json").stat().st_mtime_ns == stamp
    other = tiny_text.checkpoint(tmp_path / "model", chat=True, seed=1)
    for change in (("--seed", "1"), ("--model", other)):
        code, _, err = run([*line, *change], monkeypatch, capsys)
        assert code == 2 and "holds a run of other settings, data or code" in err


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_is_stopped_leaves_nothing(folder, tmp_path, stop, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise stop

    monkeypatch.setattr(np, "savez_compressed", fail)
    code, _, err = run(arguments(folder, tmp_path / "out"), monkeypatch, capsys)
    assert code == (75 if isinstance(stop, KeyboardInterrupt) else 1), err
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / ".partial-out-abc").mkdir()
    (tmp_path / ".partial-other-abc").mkdir()
    code, _, err = run(arguments(folder, tmp_path / "out", "--epochs", 1), monkeypatch, capsys)
    assert code == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == [".partial-other-abc", "out"]


def test_the_guards_are_said_before_training(folder, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise train.DivergedError(3, float("nan"))

    monkeypatch.setattr(finetune, "fit", stop)
    line = arguments(folder, tmp_path / "out", "--model.dtype", "bfloat16")
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 1 and "loss is nan at step 3" in err and "nothing was written" in err
    assert "completion: train 22 rows; validation 2 rows" in err
    total = count(models.load(folder / "model").params)
    assert f"LoRA r=8: trains 3,072 of {total:,} parameters at scale 2;" in err
    assert "trainable float32, frozen bfloat16; learning rate 0.01" in err


def test_generation(folder, monkeypatch, capsys):
    chosen = ["--temperature", "0", "--max-new-tokens", "6"]
    completion = folder / "runs" / "completion"
    code, said, err = run(
        ["generate", completion, "--prompt", "where is the cat red", *chosen], monkeypatch, capsys
    )
    assert code == 0, err
    rows = tiny_text.pairs(3)
    jsonl(folder / "prompts.jsonl", rows)
    code, many, err = run(
        ["generate", completion, "--prompts", folder / "prompts.jsonl", *chosen, "--samples", 2],
        monkeypatch,
        capsys,
    )
    found = [json.loads(line) for line in many.splitlines()]
    assert [f["prompt"] for f in found] == [r["prompt"] for r in rows]
    assert all(len(f["completions"]) == 2 and len(set(f["completions"])) == 1 for f in found)
    code, said, err = run(
        ["generate", folder / "runs" / "chat", "--chat", "--prompt", "where is the cat ?", *chosen],
        monkeypatch,
        capsys,
    )
    assert code == 0 and said.split()[:3] == ["in", "the", "box"], said + err
    code, said, err = run(
        [
            "generate",
            folder / "model",
            "--prompt",
            "the cat",
            "--max-new-tokens",
            3,
            "--samples",
            8,
        ],
        monkeypatch,
        capsys,
    )
    assert code == 0 and said.strip(), err


def test_a_changed_base_or_damaged_arrays_are_noticed(folder, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "run"
    shutil.copytree(folder / "runs" / "completion", copy)
    line = ["generate", copy, "--prompt", "the cat"]
    config = json.loads((copy / "config.json").read_text())
    config["method"]["rank"] = 4
    (copy / "config.json").write_text(json.dumps(config))
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 2 and "trainable.safetensors does not fit its method" in err
    config["model"]["path"] = str(tiny_text.checkpoint(tmp_path / "other", seed=1))
    (copy / "config.json").write_text(json.dumps(config))
    code, _, err = run(line, monkeypatch, capsys)
    assert code == 2 and "is not the run's base model" in err


@pytest.mark.parametrize("kind", METHOD)
def test_a_run_can_be_exported(folder, kind, tmp_path, monkeypatch, capsys):
    """What another program reads gives the run's own outputs; its card has the test figures."""
    out = tmp_path / "out"
    code, said, err = run(
        ["export", folder / "runs" / kind, "--format", "hf", "--out", out], monkeypatch, capsys
    )
    assert code == 0 and str(out) in said, err
    arguments = ["evaluate", out, "--data", folder / f"{kind}.jsonl", "--max-length", 32]
    code, again, err = run(arguments, monkeypatch, capsys)
    record = record_of(folder / "runs" / kind)
    name = "accuracy" if kind == "classification" else "perplexity"
    value = metrics_of(record, "test")[name]["value"]
    assert code == 0 and f"{name} {value:.3f} [" in again, err
    card = (out / "README.md").read_text()
    assert f"| test, after training | {name} | {value:.6g} |" in card
