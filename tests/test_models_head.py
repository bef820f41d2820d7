"""Heads: decoders that classify, against PyTorch, and what is made, ignored or refused on load."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import FIXTURES, assert_close, model_of, same_bytes

from jax_lowrank import models
from jax_lowrank.models.head import Head
from jax_lowrank.models.weights import UnsupportedModelError, WeightsError

NAMES = ("gpt2", "llama_mha", "llama_tied", "mistral_window", "opt", "opt_350m", "qwen2")
LABELS = ("no", "maybe", "yes")
CLASSES = Head("classification", LABELS)
NEW = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "opt": "OPT", "qwen2": "Qwen2"}


def head_oracle(name):
    with np.load(FIXTURES.parent / "heads" / f"{name}.npz") as stored:
        return dict(stored)


def written(folder, name, tensors, **fields):
    """A checkpoint of `tensors` with the config of a fixture and `fields` of it replaced."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def classifier(tmp_path):
    """Writes a fixture's body under PyTorch's classification head; gives its directory."""

    def write(name, **fields):
        tensors = load_file(FIXTURES / name / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = head_oracle(name)["score.weight"]
        kind = NEW[model_of(name).family] + "ForSequenceClassification"
        id2label = {str(i): label for i, label in enumerate(LABELS)}
        fields = {"architectures": [kind], "id2label": id2label, **fields}
        return written(tmp_path, name, tensors, **fields)

    return write


@functools.partial(jax.jit, static_argnames="graphdef")
def classes(graphdef, params, tokens, mask=None):
    return nnx.merge(graphdef, params).classify(tokens, mask)


@pytest.mark.parametrize("name", NAMES)
def test_classes_with_pads_on_either_side(classifier, name):
    model, oracle = models.load(classifier(name)), head_oracle(name)
    assert model.head == CLASSES and model.head_paths == ("classifier.out.kernel",)
    for mask in (oracle["mask"], oracle["mask"].astype(bool)):
        logits = classes(model.graphdef, model.params, oracle["tokens"], mask)
        assert logits.dtype == jnp.float32
        assert_close(logits, oracle["logits"])
    assert oracle["mask"][3].all()
    whole = classes(model.graphdef, model.params, oracle["tokens"][3:])
    assert_close(whole, oracle["logits"][3:])


def test_a_row_of_pads_has_finite_classes(classifier):
    model, oracle = models.load(classifier("gpt2")), head_oracle("gpt2")
    mask = oracle["mask"].copy()
    mask[1] = 0
    logits = np.asarray(classes(model.graphdef, model.params, oracle["tokens"], mask))
    assert np.isfinite(logits).all()
    assert_close(logits[[0, 2, 3]], oracle["logits"][[0, 2, 3]])


@pytest.mark.parametrize("name", NAMES)
def test_export_of_a_classifier_gives_the_same_tensors(classifier, name, tmp_path):
    folder = classifier(name)
    model = models.load(folder)
    models.save(tmp_path / "out", model, model.params)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
    again = models.load(tmp_path / "out")
    assert (again.head, again.head_paths) == (model.head, model.head_paths)
    assert again.config == model.config and same_bytes(again.params, model.params)


@pytest.mark.parametrize("name", ["gpt2", "llama_mha"])
def test_a_new_head_on_a_language_model(name):
    folder = FIXTURES / name
    with pytest.raises(WeightsError, match=r"\(1 tensors\):\n  missing: score.weight"):
        models.load(folder, head=CLASSES)
    model = models.load(folder, head=CLASSES, key=jax.random.key(0))
    arrays, base = models.by_path(model.params), models.by_path(model_of(name).params)
    kernel = arrays.pop("classifier.out.kernel")
    assert kernel.shape == (model.config.width, 3)
    assert np.asarray(kernel).std() == pytest.approx(0.02, rel=0.35)
    assert model.head_paths == ("classifier.out.kernel",)
    base.pop("head.table", None)
    assert arrays.keys() == base.keys()
    assert all(np.array_equal(arrays[path], base[path]) for path in base)
    other = models.load(folder, head=CLASSES, key=jax.random.key(1))
    assert not np.array_equal(models.by_path(other.params)["classifier.out.kernel"], kernel)
    made = models.create(model.family, model.config, jax.random.key(0), head=CLASSES)
    assert_close(models.by_path(made.params)["classifier.out.kernel"], kernel, atol=1e-8)


def test_a_language_model_from_a_classifier(classifier):
    causal = Head("causal-lm")
    tied = models.load(classifier("gpt2"), head=causal)
    assert same_bytes(tied.params, model_of("gpt2").params) and tied.head_paths == ()
    folder = classifier("llama_mha")
    with pytest.raises(WeightsError, match=r"missing: lm_head.weight"):
        models.load(folder, head=causal)
    untied = models.load(folder, head=causal, key=jax.random.key(0))
    assert untied.head_paths == ("head.table",)


def test_a_head_that_should_be_there_is_never_made(classifier):
    folder = classifier("gpt2")
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"], tensors["transformer.ln_f.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: score.weight") as caught:
        models.load(folder, head=CLASSES, key=jax.random.key(0))
    assert "missing: transformer.ln_f.bias" in str(caught.value)


def test_labels_of_a_checkpoint(classifier):
    folder = classifier("gpt2")
    for labels in (("a", "b"), ("yes", "maybe", "no")):
        with pytest.raises(WeightsError, match=r"3 classes \('no', 'maybe', 'yes'\), which do not"):
            models.load(folder, head=Head("classification", labels))
    renamed = Head("classification", ("a", "b", "c"))
    assert models.load(folder, head=renamed).head == renamed
    # Two classes are what transformers means by saying nothing.
    with pytest.raises(WeightsError, match=r"mis-shaped: score.weight is \(3, 32\).* \(2, 32\)"):
        models.load(classifier("gpt2", id2label=None))
    eleven = {str(i): f"c{i}" for i in range(11)}
    config = json.loads((classifier("gpt2", id2label=eleven) / "config.json").read_text())
    assert models.head.stored_labels(config) == tuple(f"c{i}" for i in range(11))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head("masked-lm"), "gpt2 has no head 'masked-lm'; it has causal-lm, classification"),
        (Head("classification"), "needs the names of its classes"),
        (Head("causal-lm", ("a", "b")), "other heads have none"),
        (Head("classification", ("a", "a")), "labels are not distinct"),
    ],
)
def test_heads_that_make_no_sense(head, message):
    with pytest.raises(ValueError, match=message):
        models.load(FIXTURES / "gpt2", head=head)
    with pytest.raises(ValueError, match=message):
        models.create("gpt2", model_of("gpt2").config, jax.random.key(0), head=head)


def test_another_task_of_transformers_is_refused(classifier):
    with pytest.raises(UnsupportedModelError, match=r"\['GPT2ForQuestionAnswering'\].*only causal"):
        models.load(classifier("gpt2", architectures=["GPT2ForQuestionAnswering"]))


def test_calls_that_the_head_cannot_answer(classifier):
    model, tokens = model_of("gpt2"), np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match="no classification head"):
        classes(model.graphdef, model.params, tokens)
    model = models.load(classifier("llama_mha"))
    net = nnx.merge(model.graphdef, model.params)
    for call in (net, net.nll, net.lens):
        with pytest.raises(ValueError, match="predicts no tokens"):
            call(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_live_pytorch(name, classifier, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    model, oracle = models.load(classifier(name, pad_token_id=0)), head_oracle(name)
    noise = jax.tree.map(lambda x: x * 1.2 + 0.05, model.params)
    models.save(tmp_path / "out", model, noise)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager", pad_token_id=0, output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.config.id2label == dict(enumerate(LABELS))
    mask = torch.tensor(oracle["mask"]).long()
    with torch.no_grad():
        expected = theirs.eval()(
            torch.tensor(oracle["tokens"]).long(),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        )
    ours = classes(model.graphdef, noise, oracle["tokens"], oracle["mask"])
    assert_close(ours, expected.logits.numpy(), atol=2e-4)
