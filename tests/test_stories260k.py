"""A real pretrained model, read from llama2.c's format: its tokenizer, its documented story, and a
small study on it. Needs the data of ../shared."""

import importlib.util
import struct
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_lowrank import infer, models, results
from jax_lowrank.adapt.method import bind
from jax_lowrank.config import ConfigError
from jax_lowrank.config_file import load_config
from jax_lowrank.study import execute, prepare

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
SOURCE = DATA / "weights_stories260K"
needs_weights = pytest.mark.skipif(
    not SOURCE.is_dir(), reason="../shared/data/weights_stories260K, the real weights, is absent"
)

spec = importlib.util.spec_from_file_location("stories260k", ROOT / "experiments/stories260k.py")
stories260k = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stories260k)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return stories260k.convert(SOURCE, tmp_path_factory.mktemp("stories") / "hf")


@pytest.fixture(scope="module")
def tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def read_documented_story() -> str:
    """The text that SOURCE/stories260K.md documents for temperature 0."""
    document = (SOURCE / "stories260K.md").read_text()
    return document.split("-t 0.0\n", 1)[1].split("\n```", 1)[0]


def reference_encode(text: str) -> list[int]:
    """run.c's `encode` without BOS: merge the neighbours of the best score until none merges."""
    content, start, vocab, scores = (SOURCE / "tok512.bin").read_bytes(), 4, [], []
    while start < len(content):
        score, length = struct.unpack_from("<fi", content, start)
        vocab.append(content[start + 8 : start + 8 + length])
        scores.append(score)
        start += 8 + length
    ids = {piece: number for number, piece in enumerate(vocab)}
    tokens = []
    for character in (" " + text if text else "").encode().decode():
        piece = character.encode()
        tokens += [ids[piece]] if piece in ids else [byte + 3 for byte in piece]
    while True:
        best, place = -1e10, -1
        for i in range(len(tokens) - 1):
            merged = ids.get(vocab[tokens[i]] + vocab[tokens[i + 1]])
            if merged is not None and scores[merged] > best:
                best, place = scores[merged], i
        if place < 0:
            return tokens
        tokens[place : place + 2] = [ids[vocab[tokens[place]] + vocab[tokens[place + 1]]]]


@needs_weights
def test_greedy_story_is_reproduced_character_for_character(directory, tokenizer):
    model = models.load(directory)
    drawn = infer.generate(
        bind(model.graphdef),
        (model.params,),
        jnp.array([[tokenizer.bos_token_id]]),
        jnp.ones((1, 1), bool),
        jax.random.split(jax.random.key(0), 1),
        max_new_tokens=256,  # run.c's default
        sampling=infer.Sampling(temperature=0.0),
        eos_id=None,
        pad_id=0,
    )
    story = read_documented_story()
    assert len(story) == 565
    assert tokenizer.decode(np.asarray(drawn)[0].tolist()) == story


@needs_weights
def test_sizes_are_those_documented(directory):
    model = models.load(directory)
    assert sum(array.size for array in models.by_path(model.params).values()) == 260_032
    c = model.config
    assert (c.width, c.num_layers, c.num_heads, c.num_kv_heads) == (64, 5, 8, 4)
    assert (c.vocab_size, c.max_positions, c.tied) == (512, 512, True)


@needs_weights
@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(alphabet="abcdehinorstuw  LTO.,'\"!\n", max_size=60),
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12),
    )
)
@example("")
@example(" two  spaces ")
@example("the woman should work as a")
@example("café ß 日本 🙂\n")
@example("aaaaaaaa llllll ......")
def test_tokenizer_encodes_as_llama2c_and_decodes_to_the_text(tokenizer, text):
    if any(name in text for name in stories260k.SPECIAL):
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == reference_encode(text)
    assert tokenizer.decode(ids) == text


@needs_weights
def test_tokenizer_encodes_prompts_and_the_story_as_llama2c(tokenizer):
    lines = (DATA / "honest/en_template_binary.tsv").read_text().splitlines()[1::20]
    texts = [*(line.split("[M]")[0].rstrip() for line in lines), read_documented_story()]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference_encode(text)
    assert tokenizer("a b")["input_ids"] == [1, *reference_encode("a b")]
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 1)  # a story ends where the next one begins


def test_rotary_pairs_are_halved():
    rows = np.arange(8)[:, None]  # two heads of width 4
    halved = stories260k.halve_pairs(rows, 2)[:, 0]
    assert halved.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@needs_weights
def test_wrong_files_are_refused(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match=r"no stories260K\.bin in"):
        stories260k.convert(tmp_path, tmp_path / "new")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        stories260k.convert(SOURCE, directory)
    short = tmp_path / "stories260K.bin"
    short.write_bytes((SOURCE / "stories260K.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"has 1056536 bytes, its header .* asks for 1056540"):
        stories260k.read_checkpoint(short)
    cut = tmp_path / "tok512.bin"
    cut.write_bytes((SOURCE / "tok512.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends within token 511"):
        stories260k.read_pieces(cut)
    assert not (tmp_path / "new").exists()


def test_config_says_where_to_get_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LOWRANK_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"lacks .*JAX_LOWRANK_DATA=FOLDER.*tinyllamas"):
        load_config(str(ROOT / "configs/stories_honest.py"))


@pytest.mark.slow
@needs_weights
def test_small_study_on_real_weights_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    study = load_config(str(ROOT / "configs/stories_honest.py"))
    options = study.task.options | {"max_prompts": 24, "max_neutral": 8, "train_templates": 0.1}
    study = replace(
        study,
        task=replace(study.task, options=options),
        methods=(
            replace(study.methods[0], learning_rates=(3e-3,)),
            replace(study.methods[-1], learning_rates=(1e-3,)),
        ),
        train=replace(study.train, epochs=1),
        seeds=(1,),
        evaluate=replace(study.evaluate, samples_per_prompt=4, batch_size=48),
    )
    out = tmp_path / "out"
    fingerprints = execute(prepare(study, out, print), print)
    result = results.read_study(out)
    runs = {run.record["label"]: run for run in result.runs if run.arrays}
    assert set(runs) == {"base", "LoRA r=1 alpha=2", "full fine-tuning"}
    for run in runs.values():
        assert run.arrays["tuned/harm"].shape == (24, 4)
        assert 0 <= run.arrays["tuned/harm"].mean() < 1
        # a completion goes on after the prompt's last word, with its space
        texts = [text for row in run.completions["tuned"] for text in row]
        assert np.mean([text.startswith(" ") for text in texts]) > 0.5
    assert 0 < runs["base"].arrays["transfer/harm"].mean() < 1
    losses = {label: run.record["validation_loss"] for label, run in runs.items()}
    assert losses["full fine-tuning"] < losses["LoRA r=1 alpha=2"] < 4.5
    assert execute(prepare(study, out, print), print) == fingerprints
