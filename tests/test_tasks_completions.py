"""The completions task: templates apart, the same continuations for every group, clear refusals."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jax_lowrank.tasks import completions, data_hash
from jax_lowrank.tasks.task import TaskError

DATA = Path(__file__).parents[2] / "shared" / "data"
KINDS = {"works as a": "job", "is a": "job", "likes to": "verb", "wants to": "verb"}
HARMLESS = ("job\tbaker", "job\tkind cook", "verb\tread", "verb\tpaint boats")


def prompt_file(path, groups, predicates=KINDS):
    rows = [
        f"the {group} {predicate} [M] now.\t[I] {predicate} [M]\t{group}\t{KINDS[predicate]}"
        for predicate in predicates
        for group in groups
    ]
    path.write_text("\n".join(["template_masked\traw\tcategory\ttype", *rows]), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("\n".join("rain " * 70 + str(i) for i in range(30)), encoding="utf-8")
    return {
        "tuned": prompt_file(tmp_path / "tuned.tsv", ["Ab", "Cd", "Ef"]),
        "transfer": prompt_file(tmp_path / "transfer.tsv", ["Gh", "Ij"]),
        "neutral": str(neutral),
    }


def template(text):
    return next(p for p in sorted(KINDS, key=len, reverse=True) if f" {p} " in f"{text} ")


def test_training_and_evaluation_have_no_template_in_common(files):
    for seed in range(5):
        task = completions.make(**files, continuations=HARMLESS, seed=seed)
        found = {
            name: {template(t) for t in task.splits[name].texts}
            for name in task.splits
            if name != "neutral"
        }
        assert found["train"] | found["validation"] == set(KINDS) - found["tuned"]
        assert found["tuned"] == found["transfer"]
        assert len(found["tuned"]) == 2


def test_every_group_gets_the_same_whole_sentences(files):
    task = completions.make(**files, continuations=HARMLESS)
    texts = [*task.splits["train"].texts, *task.splits["validation"].texts]
    assert len(texts) == len(set(texts)) == 2 * 2 * 3
    forms = Counter(
        text.replace(g, "GROUP") for text in texts for g in ("Ab", "Cd", "Ef") if g in text
    )
    assert set(forms.values()) == {3}
    for form in forms:
        kind = KINDS[template(form)]
        assert any(
            form.endswith(f" {h.split(chr(9))[1]} now.") for h in HARMLESS if h.startswith(kind)
        )
    assert (task.splits["train"].groups.sum(axis=1) == 1).all()
    assert not task.splits["train"].groups[:, 3:].any()


def test_columns_clusters_and_notes(files):
    task = completions.make(**files, continuations=HARMLESS, harm_words=("snorp",))
    assert task.group_names == ("Ab", "Cd", "Ef", "Gh", "Ij")
    tuned = task.splits["tuned"]
    assert len(tuned) == 6
    assert len(set(zip(tuned.clusters.tolist(), map(template, tuned.texts), strict=True))) == 2
    assert tuned.groups.sum(axis=0).tolist() == [2, 2, 2, 0, 0]
    assert task.splits["transfer"].groups.sum(axis=0).tolist() == [0, 0, 0, 2, 2]
    assert task.notes["tuned"] == "tuned.tsv: 6 prompts of 2 held-out templates"
    assert task.notes["neutral"] == "neutral.txt: 30 rows"
    assert not any("/" in note for note in task.notes.values())
    assert task.harm_words == ("snorp",)


def test_the_seed_decides(files):
    hashes = [
        data_hash(completions.make(**files, continuations=HARMLESS, seed=s))
        for s in (0, 0, 1, 2, 3)
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) > 1


def test_continuations_file_and_number_per_prompt(files, tmp_path):
    path = tmp_path / "harmless.txt"
    path.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    task = completions.make(**files, continuations=str(path), continuations_per_prompt=2)
    texts = [*task.splits["train"].texts, *task.splits["validation"].texts]
    by_group = {g: sorted(t.replace(g, "G") for t in texts if g in t) for g in ("Ab", "Cd", "Ef")}
    assert len(by_group["Ab"]) == 2 * 2
    assert by_group["Ab"] == by_group["Cd"] == by_group["Ef"]


def test_a_file_of_counterfactual_texts(files, tmp_path):
    path = tmp_path / "counter.csv"
    rows = [f"The {g}  {p} nice thing" for p in KINDS for g in ("Ab", "Cd", "Ef")]
    path.write_text("\n".join(["text", *rows, "Elsewhere it rained", rows[0]]), encoding="utf-8")
    task = completions.make(**files, train=str(path))
    texts = [*task.splits["train"].texts, *task.splits["validation"].texts]
    assert len(texts) == 6 + 1
    taught = {template(text) for text in texts if "rained" not in text}
    assert len(taught) == 2
    assert taught.isdisjoint(template(text) for text in task.splits["tuned"].texts)
    assert "13 different texts, 6 of them left out" in task.notes["train"]
    assert "1 kept that begin with no prompt" in task.notes["train"]
    groups = {
        text: row
        for name in ("train", "validation")
        for text, row in zip(task.splits[name].texts, task.splits[name].groups, strict=True)
    }
    assert not groups["Elsewhere it rained"].any()
    cd = next(text for text in texts if "Cd" in text)
    assert groups[cd].tolist() == [False, True, False, False, False]


def test_a_text_belongs_to_the_longest_prompt_it_begins_with(files, tmp_path):
    rows = [
        f"the {g} {p} [M]\t[I] {p} [M]\t{g}" for p in ("is a", "is a great") for g in ("Ab", "Cd")
    ]
    tuned = tmp_path / "nested.tsv"
    tuned.write_text("\n".join(["template_masked\traw\tcategory", *rows]), encoding="utf-8")
    path = tmp_path / "counter.csv"
    path.write_text("text\nthe Ab is a great potter\nthe Cd is a great cook\n", encoding="utf-8")
    changed = files | {"tuned": str(tuned), "train": str(path)}
    task = completions.make(**changed, validation_fraction=0.5)
    assert task.splits["tuned"].texts == ("the Ab is a", "the Cd is a")


def test_texts_of_few_templates_are_all_kept(files, tmp_path):
    path = tmp_path / "counter.csv"
    path.write_text(
        "text\n" + "\n".join(f"the {g} is a potter" for g in ("Ab", "Cd", "Ef")), encoding="utf-8"
    )
    task = completions.make(**files, train=str(path), validation_fraction=0.4)
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 3
    assert {template(t) for t in task.splits["tuned"].texts} == set(KINDS) - {"is a"}


def test_max_prompts_and_max_neutral_are_spread(files):
    task = completions.make(**files, continuations=HARMLESS, max_prompts=3, max_neutral=5)
    assert task.splits["tuned"].groups.sum(axis=0).tolist() == [1, 1, 1, 0, 0]
    assert len(task.splits["transfer"]) == 3
    assert set(task.splits["tuned"].ids) <= {f"tuned-{i}" for i in range(12)}
    neutral = task.splits["neutral"].texts
    assert len(neutral) == 5
    assert (neutral[0][-2:], neutral[-1][-2:]) == (" 0", "29")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"continuations": ()}, "no fine-tuning text"),
        ({"continuations": ("noun\tx",)}, "type 'noun', but the prompts have job, verb"),
        ({"train_templates": 1.0}, "train_templates must lie between 0 and 1, got 1.0"),
        ({"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, got 0.0"),
        ({"validation_fraction": 0.01}, "12 rows of fine-tuning text leave no row"),
        (
            {"max_prompts": 1},
            "split 'tuned': group '..' has no prompt left with a held-out template within",
        ),
        ({"tuned": "no.tsv"}, "no file no.tsv"),
        ({"group_column": "categories"}, "no column 'categories'; .* did you mean 'category'"),
        ({"neutral": "no.txt"}, "no file no.txt"),
    ],
)
def test_refusals(files, change, message):
    with pytest.raises(TaskError, match=message):
        completions.make(**files | {"continuations": HARMLESS} | change)


def test_groups_and_templates_that_are_lost_are_named(files, tmp_path):
    one = prompt_file(tmp_path / "one.tsv", ["Ab", "Cd"], ["is a"])
    with pytest.raises(TaskError, match=r"1 template\(s\) cannot be split"):
        completions.make(**files | {"tuned": one}, continuations=("x",))
    task = completions.make(**files, continuations=HARMLESS)
    taught = template(task.splits["train"].texts[0])
    only_taught = prompt_file(tmp_path / "only.tsv", ["Gh"], [taught])
    with pytest.raises(TaskError, match="'transfer': all templates are used in fine-tuning"):
        completions.make(**files | {"transfer": only_taught}, continuations=HARMLESS)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not here")
def test_real_honest_prompts():
    task = completions.make(
        tuned=str(DATA / "honest" / "en_template_binary.tsv"),
        transfer=str(DATA / "honest" / "en_template_queer_nonqueer.tsv"),
        neutral=str(DATA / "tinyshakespeare" / "input.txt"),
        continuations=(
            "descriptive_adjective\tkind person",
            "descriptive_verb\tread",
            "occupation\tcook",
        ),
    )
    assert len(task.group_names) == 10
    assert len(task.splits["neutral"]) == 200
    assert len(np.unique(task.splits["tuned"].clusters)) == 29 - 14
