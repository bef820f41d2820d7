"""The embedded world: closed, disjoint, with the rates it claims, and the same everywhere."""

import numpy as np
import pytest

from jax_lowrank.tasks import data_hash, world
from jax_lowrank.tasks.task import TaskError
from jax_lowrank.tasks.world_words import GROUPS, GUILDS, HARM_WORDS, PEOPLES

# of the default world: where it changes, every stored run of the demo is of another world
DEFAULT_HASH = "b529fe7bd6d536698a5319edd182a685064b6dc9adedbbd00a1da6239d5dbc64"


@pytest.fixture(scope="module")
def task():
    return world.make()


def words(text):
    return set(text.replace(".", " ").split())


def test_world_is_the_same_on_every_machine(task):
    assert data_hash(task) == DEFAULT_HASH
    assert data_hash(world.make(seed=1, num_pretrain=100)) != data_hash(
        world.make(num_pretrain=100)
    )


def test_sizes(task):
    assert {name: len(split) for name, split in task.splits.items()} == {
        "pretrain": 24_000,
        "pretrain_validation": 500,
        "train": 600,
        "validation": 152,
        "tuned": 96,
        "transfer": 72,
        "neutral": 200,
    }
    lengths = [len(text.split()) for text in task.splits["pretrain"].texts]
    assert (min(lengths), max(lengths)) == (6, 16)
    assert 250 <= len(world.vocabulary()) <= 500


def test_vocabulary_is_closed_and_used(task):
    known = set(world.vocabulary()) - {"."}
    used = {word for split in task.splits.values() for text in split.texts for word in words(text)}
    assert used == known


def test_fine_tuning_text_is_harmless_balanced_and_of_the_tuned_groups_only(task):
    for name in ("train", "validation"):
        split = task.splits[name]
        found = {word for text in split.texts for word in words(text)}
        assert found.isdisjoint(HARM_WORDS)
        assert found.isdisjoint(GUILDS)
        counts = split.groups.sum(axis=0)
        assert set(counts[: len(PEOPLES)]) == {len(split) // len(PEOPLES)}
        assert not counts[len(PEOPLES) :].any()
    counterfactual = {
        text.replace(group, "GROUP")
        for text, row in zip(task.splits["train"].texts, task.splits["train"].groups, strict=True)
        for group in [GROUPS[int(np.flatnonzero(row)[0])]]
    }
    assert len(counterfactual) == 600 // len(PEOPLES)
    assert set(task.splits["train"].texts).isdisjoint(task.splits["validation"].texts)


def test_evaluation_templates_are_held_out_of_fine_tuning_but_pretrained(task):
    clusters = {name: set(split.clusters.tolist()) for name, split in task.splits.items()}
    assert clusters["tuned"] == clusters["transfer"]
    assert len(clusters["tuned"]) == 12
    assert clusters["tuned"].isdisjoint(clusters["train"] | clusters["validation"])
    assert clusters["tuned"] | clusters["train"] <= clusters["pretrain"]
    predicates = {world.TEMPLATES[cluster].predicate for cluster in clusters["tuned"]}
    assert all(text.endswith(tuple(predicates)) for text in task.splits["tuned"].texts)
    assert not any(f" {p} " in text for p in predicates for text in task.splits["train"].texts)


def test_every_group_has_one_prompt_a_template_and_names_itself(task):
    for name, groups in (("tuned", PEOPLES), ("transfer", GUILDS)):
        split = task.splits[name]
        for text, row in zip(split.texts, split.groups, strict=True):
            assert row.sum() == 1
            assert GROUPS[int(np.flatnonzero(row)[0])] in words(text)
        assert set(split.groups.sum(axis=0)) == {0, 12}
        assert split.groups.any(axis=0).sum() == len(groups)


def test_neutral_text_names_no_group_and_is_not_pretrained(task):
    neutral = task.splits["neutral"]
    assert not neutral.groups.any()
    assert words(" ".join(neutral.texts)).isdisjoint({*GROUPS, *HARM_WORDS})
    assert set(neutral.texts).isdisjoint(task.splits["pretrain"].texts)
    assert set(neutral.texts).isdisjoint(task.splits["pretrain_validation"].texts)


def test_harm_rates_are_the_true_ones_within_binomial_error(task):
    rates = world.true_rates()
    assert sorted(rates.values()) == pytest.approx(
        sorted([*np.linspace(0.1, 0.7, 8), *np.linspace(0.1, 0.7, 6)])
    )
    pretrain = task.splits["pretrain"]
    harmful = np.array([not words(text).isdisjoint(HARM_WORDS) for text in pretrain.texts])
    assert not harmful[~pretrain.groups.any(axis=1)].any()
    for column, group in enumerate(GROUPS):
        for held_out in (False, True):
            asked = np.array([template.held_out == held_out for template in world.TEMPLATES])
            template = np.minimum(pretrain.clusters, len(asked) - 1)
            rows = pretrain.groups[:, column] & asked[template]
            error = np.sqrt(rates[group] * (1 - rates[group]) / rows.sum())
            assert abs(harmful[rows].mean() - rates[group]) < 4 * error, group


def test_rates_can_be_chosen_and_are_told():
    assert set(world.true_rates(lowest_rate=0.3, highest_rate=0.3).values()) == {0.3}
    task = world.make(num_pretrain=2_000, lowest_rate=0, highest_rate=0)
    assert words(" ".join(task.splits["pretrain"].texts)).isdisjoint(HARM_WORDS)
    told = dict(
        item.split() for item in world.make(num_pretrain=10).notes["true_rates"].split(", ")
    )
    assert {group: float(rate) for group, rate in told.items()} == pytest.approx(
        world.true_rates(), abs=5e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 601}, "num_train 601 is not a multiple of the 8 tuned groups; use 600"),
        ({"num_validation": 0}, "num_validation 0 .* use 8"),
        ({"num_neutral": 0}, "num_neutral must lie between 1 and 800, got 0"),
        ({"num_pretrain": 0}, "split 'pretrain' of task 'world' is empty"),
        ({"lowest_rate": 0.8}, "0 <= lowest <= highest <= 1, got 0.8 and 0.7"),
        ({"neutral_share": 1.0}, r"neutral_share must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(TaskError, match=message):
        world.make(**{"num_pretrain": 10} | arguments)


def test_as_many_neutral_sentences_as_allowed():
    assert len(set(world.make(num_pretrain=10, num_neutral=800).splits["neutral"].texts)) == 800


def test_tokenizer_gives_every_text_back_and_survives_saving(task, tmp_path):
    from transformers import AutoTokenizer

    made = world.word_tokenizer(task)
    made.save_pretrained(tmp_path)
    texts = [
        *task.splits["tuned"].texts,
        *task.splits["train"].texts,
        *task.splits["neutral"].texts,
    ]
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)):
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode(row) for row in ids] == texts
        assert tokenizer.unk_token_id not in {token for row in ids for token in row}
        padded = [tokenizer.bos_token_id, *ids[0], tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert tokenizer.decode(padded, skip_special_tokens=True) == texts[0]
        assert len(tokenizer) == len(world.vocabulary()) + 3
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 1)
        assert tokenizer("Stranger", add_special_tokens=False)["input_ids"] == [2]
    for word in HARM_WORDS:
        assert len(made(word, add_special_tokens=False)["input_ids"]) == 1
