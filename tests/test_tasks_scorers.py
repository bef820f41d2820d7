"""Lexicon and callable scorers: what matches, what is refused, what goes into the record."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from jax_lowrank.tasks import scorers

DATA = Path(__file__).parents[2] / "shared" / "data"


def hits(scorer, *texts):
    scores = scorer.score(texts)
    assert scores.dtype == np.float32
    return scores.tolist()


def test_lexicon_ignores_case_and_punctuation_and_matches_whole_words():
    scorer = scorers.lexicon(["Snorp", "big bad wolf", "can't", "so-so"])
    assert hits(scorer, "a SNORP!", "(snorp)", "snorps", "unsnorp", "snorp-like") == [1, 1, 0, 0, 1]
    assert hits(scorer, "the big, bad wolf", "big wolf bad", "a big bad", "") == [1, 0, 0, 0]
    assert hits(scorer, "you CAN'T", "can t", "so so", "so-so.", "so") == [1, 0, 1, 1, 0]
    assert scorer.score([]).shape == (0,)


def test_lexicon_entries_with_signs_match_whole_pieces_only():
    scorer = scorers.lexicon(["a$$", ":("])
    assert hits(scorer, "an A$$, yes", "a b", "sad :(", "sad :((", "f:(x)") == [1, 0, 1, 0, 0]


def test_lexicon_version_is_of_the_words_whatever_their_order():
    scorer = scorers.lexicon(["b", "A", "b "], name="two words")
    assert scorer.name == "two words"
    assert scorer.words == ("a", "b")
    assert scorer.version == hashlib.sha256(b"a\nb").hexdigest()[:12]
    assert scorers.lexicon(["a", "b"]).version == scorer.version != scorers.lexicon(["a"]).version


def test_word_list_file_with_comments(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# a comment\nsnorp\n\n  Big Bad  \n", encoding="utf-8")
    scorer = scorers.load(f"lexicon:{path}")
    assert scorer.words == ("big bad", "snorp")
    assert scorer.name == "lexicon words.txt"


def test_hurtlex_table(tmp_path):
    path = tmp_path / "hurtlex_EN.tsv"
    path.write_text(
        "id\tpos\tcategory\tstereotype\tlemma\tlevel\n"
        "EN1\tn\tan\tno\tsnorp\tconservative\n"
        "EN2\tn\tan\tno\tyurf\tinclusive\n",
        encoding="utf-8",
    )
    assert scorers.lexicon(path).words == ("snorp",)
    assert scorers.lexicon(path, levels=("conservative", "inclusive")).words == ("snorp", "yurf")
    with pytest.raises(ValueError, match="level 'loose' is not one of conservative, inclusive"):
        scorers.lexicon(path, levels=("loose",))


def test_vader_table_gzipped(tmp_path):
    path = tmp_path / "vader.txt.gz"
    rows = (
        "awful\t-2.0\t0.8\t[-2, -2]",
        "meh\t-1.4\t0.5\t[-1, -2]",
        "fine\t1.5\t0.1\t[1, 2]",
        "bad\t-1.5\t0\t[]",
    )
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    assert scorers.lexicon(path).words == ("awful", "bad")
    assert scorers.lexicon(path, threshold=-1.0).words == ("awful", "bad", "meh")


def test_no_words_and_no_file(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lexicon empty\.txt: no words in it"):
        scorers.lexicon(empty)
    with pytest.raises(ValueError, match="no words"):
        scorers.lexicon(["  "])
    with pytest.raises(ValueError, match=r"no file .*emty\.txt; did you mean .*empty\.txt\?"):
        scorers.load(f"lexicon:{tmp_path / 'emty.txt'}")


@pytest.fixture
def module(tmp_path, monkeypatch):
    code = """
def half(texts):
    return [0.5] * len(texts)
half.name, half.version = "half", "3"
def plain(texts):
    return [float("!" in text) for text in texts]
def two(texts):
    return [2.0 for _ in texts]
def below(texts):
    return [-0.1 for _ in texts]
def nan(texts):
    return [float("nan") for _ in texts]
def short(texts):
    return [0.0]
value = 3
"""
    (tmp_path / "scorer_module_for_test.py").write_text(code, encoding="utf-8")
    (tmp_path / "broken_module_for_test.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "scorer_module_for_test"


def test_callable(module):
    scorer = scorers.load(f"{module}:half")
    assert scorer[:2] == ("half", "3")
    assert scorer.words == ()
    assert hits(scorer, "a", "b") == [0.5, 0.5]
    plain = scorers.from_callable(f"{module}:plain")
    assert plain[:2] == (f"{module}:plain", "unknown")
    assert hits(plain, "a", "b!") == [0, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two", r"gave 2\.0; scores must lie in \[0, 1\]"),
        ("below", r"gave -0\.1"),
        ("nan", "gave nan; scores must lie"),
        ("short", r"gave shape \(1,\) for 2 texts, not \(2,\)"),
    ],
)
def test_bad_scores(module, name, message):
    scorer = scorers.from_callable(f"{module}:{name}")
    with pytest.raises(ValueError, match=message):
        scorer.score(["a", "b"])


def test_what_cannot_be_loaded(module):
    with pytest.raises(ValueError, match="cannot import no_such_module"):
        scorers.load("no_such_module:f")
    with pytest.raises(
        ValueError, match=r"cannot import broken_module_for_test .ZeroDivisionError"
    ):
        scorers.load("broken_module_for_test:f")
    for name in ("missing", "value"):
        with pytest.raises(ValueError, match=f"has no function '{name}'"):
            scorers.load(f"{module}:{name}")
    with pytest.raises(
        ValueError, match=r"'toxic' must be lexicon:PATH or package.module:function"
    ):
        scorers.load("toxic")


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not here")
def test_real_lexicons():
    listed = scorers.lexicon(DATA / "badwords" / "en.txt")
    assert len(listed.words) == 403
    rated = scorers.lexicon(DATA / "vader" / "vader_lexicon.txt.gz")
    assert len(rated.words) == 2291
    texts = ["She is a baker.", "What a moron!", "He reads books about a bridge."]
    assert hits(rated, *texts) == [0, 1, 0]
    assert hits(listed, "2 Girls, 1 cup?", *texts) == [1, 0, 0, 0]
