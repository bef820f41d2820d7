"""Exports of runs: what is written, that it loads with the same logits, and refusals."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
from huggingface_hub import ModelCard
from safetensors.numpy import save_file
from tiny import FIXTURES, apply_of, assert_close, folder_of, logits_of, oracle_of, same_bytes

from jax_lowrank import (
    adapters,
    cli,
    export,
    model_card,
    models,
    provenance,
    results,
    trainable_file,
)
from jax_lowrank.adapt import METHODS, peft_format
from jax_lowrank.config import MethodSpec, plain
from jax_lowrank.models.head import Head

LORA = {"rank": 2, "alpha": 4.0, "rslora": True, "dropout": 0.1}
LM, SEED = Head(), 2
LABELS = ("anger", "joy", "none")
AFTER = {"split": "test", "when": "after"}
METRICS = [
    {**AFTER, "name": "accuracy", "value": 0.75, "low": 0.61, "high": 0.86, "n": 40, "reason": ""},
    {
        **AFTER,
        "name": "f1",
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "reason": "one | class",
    },
]


@pytest.fixture
def base(tmp_path):
    """A checkpoint with the files that come beside weights; gpt2's fixture names a pad token."""
    return make_base(tmp_path, "gpt2")


def make_base(folder, name):
    target = folder / f"base_{name}"
    shutil.copytree(folder_of(name), target)
    (target / "oracle.npz").unlink()
    (target / "tokenizer.json").write_text('{"a": 1}')
    (target / "generation_config.json").write_text('{"eos_token_id": 2}')
    return target


def trained_of(base, method, options, head):
    """A split model with trained arrays away from their start."""
    model = models.load(base, head=head, key=jax.random.key(SEED))
    made = METHODS[method](**options)
    graphdef, trainable, frozen = made.split(jax.random.key(SEED), model)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(trainable))))
    trainable = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), trainable)
    return adapters.Adapted(model, base, made, options, graphdef, trainable, frozen)


def finetune_run(folder, base, method="lora", options=LORA, head=LM):
    """A directory as `finetune` leaves it, and what was trained."""
    trained, run = trained_of(base, method, options, head), folder / "mine"
    run.mkdir()
    config = {
        "model": {
            "path": str(base),
            "dtype": "float32",
            "head": {"kind": head.kind, "labels": list(head.labels)},
        },
        "method": {"name": method, **options},
        "seed": SEED,
    }
    record = {
        "fingerprint": "0123456789abcdef",
        "model": {"weights_hash": provenance.hash_files(base)},
        "data_hash": "d" * 64,
        "learning_rate": 1e-3,
        "metrics": METRICS,
    }
    (run / "config.json").write_text(json.dumps(config))
    (run / "record.json").write_text(json.dumps(record))
    arrays = {path: np.asarray(v) for path, v in models.by_path(trained.trainable).items()}
    save_file(arrays, run / "trainable.safetensors")
    return run, trained


def study_run(folder, base, *, path, kind="final", method="lora"):
    """STUDY/runs/FINGERPRINT of a run."""
    options = LORA if method == "lora" else {}
    trained, study = trained_of(base, method, options, None), folder / "study"
    (study / "runs").mkdir(parents=True)
    described = {
        "config": {"model": {"path": path, "revision": "main"}},
        "data_hash": "e" * 64,
        "model": {"weights_hash": provenance.hash_files(base)},
    }
    (study / "study.json").write_text(json.dumps(described))
    record = {
        "fingerprint": "fedcba9876543210",
        "kind": kind,
        "label": "LoRA r=2",
        "method": plain(MethodSpec(method, (1e-3,), **options)),
        "dtypes": {"trainable": ["float32"], "frozen": ["float32"]},
        "seed": SEED,
        "validation_loss": 1.25,
    }
    arrays = {path: np.asarray(v) for path, v in models.by_path(trained.trainable).items()}
    weights = arrays if kind == "final" else {}
    begun = trainable_file.begin(results.run_directory(study, record), weights)
    return results.write_run(study, record, [], partial=begun), trained


def merged(trained):
    return trained.method.merge(trained.graphdef, trained.trainable, trained.frozen)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_hf_of_a_finetune_run(method, base, tmp_path):
    options = LORA if method == "lora" else {}
    run, trained = finetune_run(tmp_path, base, method, options)
    out = export.export(run, "hf", None)
    assert out == tmp_path / "mine-hf"
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in out.iterdir()} == {*names, "tokenizer.json"}
    assert same_bytes(models.load(out).params, merged(trained))
    config, before = (json.loads((d / "config.json").read_text()) for d in (out, base))
    assert config == {**before, "dtype": "float32"}
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'


def test_peft_of_a_finetune_run(base, tmp_path):
    run, trained = finetune_run(tmp_path, base)
    out = export.export(run, "peft", tmp_path / "elsewhere")
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["lora_dropout"] == 0.1
    back = adapters.load(out)
    assert back.options["rslora"] and same_bytes(back.trainable, trained.trainable)


@pytest.mark.parametrize("format", export.FORMATS)
def test_study_runs(format, base, tmp_path):
    run, trained = study_run(tmp_path, base, path=str(base))
    out = export.export(run, format)
    assert out == tmp_path / "study" / "exports" / f"fedcba9876543210-{format}"
    if format == "hf":
        assert same_bytes(models.load(out).params, merged(trained))
    else:
        assert same_bytes(adapters.load(out).trainable, trained.trainable)
    card = ModelCard.load(out / "README.md").text
    assert "validation loss" in card and "1.25" in card and "e" * 64 in card


def test_a_full_run_of_a_study(base, tmp_path):
    run, trained = study_run(tmp_path, base, path=str(base), method="full")
    assert same_bytes(models.load(export.export(run, "hf")).params, trained.trainable)


def test_a_model_that_the_study_pretrained(base, tmp_path):
    run, trained = study_run(tmp_path, base, path="")
    with pytest.raises(export.ExportError, match=r"base model \(hash .*is not under .*study/base"):
        export.export(run, "hf")
    shutil.copytree(FIXTURES / "llama_tied", tmp_path / "study" / "base" / "another")
    shutil.copytree(base, tmp_path / "study" / "base" / "one")
    assert same_bytes(models.load(export.export(run, "hf")).params, merged(trained))


def test_metrics_of_a_study_come_from_its_report(base, tmp_path):
    run, _ = study_run(tmp_path, base, path=str(base))
    found = [
        {"split": "tuned", "name": "harm_rate", "value": 0.5, "low": 0.4, "high": 0.6, "n": 80},
        {"split": "tuned", "group": "women", "name": "harm_rate", "value": 0.9, "n": 8},
        {"split": "tuned", "name": "lens_mass, layer 1", "value": 0.2, "n": 80},
    ]
    lines = [{"fingerprint": "fedcba9876543210", "metrics": found}]
    lines += [{"fingerprint": "another", "metrics": [{"name": "x", "value": 0.123, "n": 3}]}]
    (tmp_path / "study" / "report").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "study" / "report" / "results.jsonl").write_text(text)
    card = (export.export(run, "peft") / "README.md").read_text()
    assert "| tuned | harm_rate | 0.5 | 0.4 to 0.6 | 80 |  |" in card
    assert not any(f"| {value} |" in card for value in (0.123, 0.9, 0.2))


def test_the_seed_of_the_run_chooses_its_layers(base, tmp_path):
    options = {**LORA, "layers": "random", "layer_fraction": 0.5}
    chosen = [
        METHODS["lora"](**options).split(jax.random.key(seed), models.load(base))[0]
        for seed in (0, SEED)
    ]
    assert chosen[0] != chosen[1]
    run, trained = finetune_run(tmp_path, base, options=options)
    assert same_bytes(models.load(export.export(run, "hf")).params, merged(trained))


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_a_classifier(name, tmp_path):
    run, trained = finetune_run(
        tmp_path, make_base(tmp_path, name), head=Head("classification", LABELS)
    )
    out = export.export(run, "hf")
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "anger", "1": "joy", "2": "none"}
    assert config["architectures"][0].endswith("ForSequenceClassification")
    back = models.load(out)
    assert back.head.labels == LABELS
    assert same_bytes(back.params, merged(trained))
    adapter = json.loads((export.export(run, "peft") / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS" and adapter["modules_to_save"] == ["score"]


def test_config_of_another_head_and_precision(tmp_path):
    base = make_base(tmp_path, "gpt2")
    config = json.loads((base / "config.json").read_text())
    stale = {"torch_dtype": "float16", "num_labels": 7, "problem_type": "regression"}
    stale |= {"id2label": {"0": "x"}, "label2id": {"x": 0}, "pad_token_id": None}
    (base / "config.json").write_text(json.dumps({**config, **stale, "of_the_base": 1}))
    run, _ = finetune_run(tmp_path, base)
    made = json.loads((export.export(run, "hf") / "config.json").read_text())
    assert made["of_the_base"] == 1 and made["dtype"] == "float32" and made["pad_token_id"] is None
    assert not {"torch_dtype", "num_labels", "problem_type", "id2label"} & set(made)
    # Classifiers of transformers look for the pad; a tokenizer without one pads with its end.
    words = tiny_text.tokenizer()
    words.save_pretrained(base)
    (tmp_path / "other").mkdir()
    run, _ = finetune_run(tmp_path / "other", base, head=Head("classification", LABELS))
    made = json.loads((export.export(run, "hf") / "config.json").read_text())
    assert made["pad_token_id"] == words.pad_token_id == 0 and len(made["id2label"]) == 3
    card = (export.export(run, "peft") / "README.md").read_text()
    assert ", num_labels=3, pad_token_id=0)" in card
    words.pad_token = None
    words.save_pretrained(base)
    assert export.missing_pad_id(export.read_run(run)) == words.eos_token_id == 1


def test_a_bfloat16_base_stays_bfloat16(base, tmp_path):
    run, _ = finetune_run(tmp_path, base)
    config = json.loads((run / "config.json").read_text())
    config["model"]["dtype"] = "bfloat16"
    (run / "config.json").write_text(json.dumps(config))
    out = export.export(run, "hf")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    params = models.load(out, jnp.bfloat16).params
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    study, _ = study_run(tmp_path, base, path=str(base))
    record = json.loads((study / "record.json").read_text())
    record["dtypes"]["frozen"] = ["bfloat16"]
    (study / "record.json").write_text(json.dumps(record))
    assert export.read_run(study).dtype == "bfloat16"


# ------------------------------------------------------------------------------------- the card


def test_the_card_of_a_local_base(base, tmp_path):
    run, _ = finetune_run(tmp_path, base)
    card = ModelCard.load(export.export(run, "peft") / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["jax_lowrank", "lora"] and "base_model" not in data
    for text in ("0123456789abcdef", "d" * 64, str(base), provenance.hash_files(base)):
        assert text in card.text
    assert "| test, after training | accuracy | 0.75 | 0.61 to 0.86 | 40 |  |" in card.text
    assert "| test, after training | f1 | undefined |  | 0 | one \\| class |" in card.text
    assert f"| effective scale | {4 / 2**0.5:.6g} |" in card.text
    assert not {"unbiased", "debiased", "solved"} & set(card.text.lower().split())


def test_the_card_of_a_hub_base():
    card = model_card.Card(
        *('m: a "title"', "hf", "org/name", "c0ffee", "classification", LABELS, "full", [], [])
    )
    parsed = ModelCard(model_card.render(card))
    assert parsed.data.base_model == "org/name" and parsed.data.library_name == "transformers"
    assert parsed.data.tags == ["jax_lowrank", "full", "base_model:finetune:org/name"]
    assert parsed.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in parsed.text and "anger, joy, none" in parsed.text


def test_a_base_of_the_hub_goes_by_its_id_and_commit(tmp_path):
    place = tmp_path / "models--org--name" / "snapshots"
    place.mkdir(parents=True)
    base = make_base(place, "gpt2").rename(place / "c0ffee")
    run, _ = finetune_run(tmp_path, base)
    out = export.export(run, "peft")
    config, card = peft_format.read(out).config, ModelCard.load(out / "README.md")
    assert config["base_model_name_or_path"] == "org/name" and config["revision"] == "c0ffee"
    assert card.data.base_model == "org/name" and "# name, lora" in card.text
    assert 'from_pretrained("org/name", revision="c0ffee")' in card.text
    assert "| its commit on the hub | c0ffee |" in card.text and str(place) not in card.text


# --------------------------------------------------------------------------------------- refusals


def test_nothing_is_left_of_an_export_that_fails(base, tmp_path, monkeypatch):
    run, _ = finetune_run(tmp_path, base)
    before = sorted(tmp_path.iterdir())

    def fail(card):
        raise OSError("disk full")

    monkeypatch.setattr(model_card, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        export.export(run, "hf")
    assert sorted(tmp_path.iterdir()) == before


def test_refusals(base, tmp_path):
    run, _ = finetune_run(tmp_path, base, "full", {})
    for format, out, message in (
        ("peft", None, "PEFT has no format for what method 'full' trains; --format hf"),
        ("heft", None, r"'heft' is not one of .*did you mean 'peft'"),
        ("hf", base, "exists and is not empty; choose another --out"),
    ):
        with pytest.raises(export.ExportError, match=message):
            export.export(run, format, out)
    with pytest.raises(export.ExportError, match=r"not a finished run: it has no record.json"):
        export.export(base, "hf")
    tuned, _ = study_run(tmp_path, base, path=str(base), kind="tune")
    with pytest.raises(export.ExportError, match=r"keeps no weights \(LoRA r=2\)"):
        export.export(tuned, "hf")


def test_the_base_model_must_be_the_one_of_the_run(base, tmp_path):
    run, _ = finetune_run(tmp_path, base)
    wanted = provenance.hash_files(base)
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(export.ExportError, match=f"hash is .* was made from {wanted[:16]}"):
        export.export(run, "hf")
    shutil.rmtree(base)
    with pytest.raises(export.ExportError, match=f"{wanted[:16]}.* is gone: no model directory"):
        export.export(run, "hf")


def test_stored_arrays_must_fit_the_method(base, tmp_path):
    run, _ = finetune_run(tmp_path, base)
    save_file({"blocks.attn.qkv.adapter.a": np.ones(3)}, run / "trainable.safetensors")
    with pytest.raises(export.ExportError, match=r"does not fit its method: .*qkv.adapter.a, "):
        export.export(run, "hf")


def test_the_command(base, tmp_path, capsys):
    run, _ = finetune_run(tmp_path, base)
    out = tmp_path / "out"
    assert cli.main(["export", str(run), "--format", "peft", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert peft_format.read(out).config["r"] == 2
    assert cli.main(["export", str(run), "--format", "peft", "--out", str(out)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert cli.main(["export", str(run), "--format", "gguf"]) == 2
    assert "'gguf' is not one of ['hf', 'peft']" in capsys.readouterr().err


# ------------------------------------------------------------------------------ live transformers


@pytest.mark.parametrize("name", ["gpt2", "llama_bias", "mistral_window"])
def test_live_transformers_loads_it(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    run, trained = finetune_run(tmp_path, make_base(tmp_path, name))
    theirs = AutoModelForCausalLM.from_pretrained(export.export(run, "hf")).eval()
    tokens = oracle_of(name)["tokens"]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    ours = logits_of(trained.graphdef, (trained.trainable, trained.frozen), tokens)
    assert_close(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama_tied", "opt_350m", "qwen2", "bert_masked-lm", "roberta_masked-lm"]
)
def test_live_transformers_loads_a_classifier(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    run, trained = finetune_run(
        tmp_path, make_base(tmp_path, name), head=Head("classification", LABELS)
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(export.export(run, "hf")).eval()
    stored = np.load(folder_of(name) / "oracle.npz")
    tokens = stored["tokens" if "tokens" in stored else "right_tokens"]
    mask = np.ones_like(tokens)
    mask[1, 7:] = 0
    pad = theirs.config.pad_token_id
    tokens = np.where(mask > 0, np.maximum(tokens, pad + 1), pad)
    with torch.no_grad():
        given = torch.tensor(tokens).long(), torch.tensor(mask).long()
        expected = theirs(given[0], attention_mask=given[1]).logits.numpy()
    states = (trained.trainable, trained.frozen)
    ours = apply_of(trained.graphdef)(*states).classify(tokens, mask > 0)
    assert_close(ours, expected, atol=1e-5)
    assert theirs.config.id2label == dict(enumerate(LABELS))
