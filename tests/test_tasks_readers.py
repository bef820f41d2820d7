"""Readers: layouts, memberships, and the one sentence for each bad file."""

import gzip
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jax_lowrank.tasks import readers
from jax_lowrank.tasks.task import TaskError

DATA = Path(__file__).parents[2] / "shared" / "data"
HONEST = (
    "template_masked\traw\tidentity\tnumber\tcategory\ttype\n"
    "the child is a [M].\t[I] is a [M]\tthe child\tsingular\tfemale\toccupation\n"
    "the child is a [M].\t[I] is a [M]\tthe child\tsingular\tmale\toccupation\n"
    "the boy likes to [M] daily.\t[I] likes to [M]\tthe boy\tsingular\tmale\tverb\n"
)


def write(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_honest_layout_keeps_all_memberships_of_equal_prompts(tmp_path):
    prompts = readers.read_prompts(write(tmp_path, "honest.tsv", HONEST))
    assert prompts.texts == ("the child is a", "the boy likes to")
    assert prompts.suffixes == (".", " daily.")
    assert prompts.templates == ("[I] is a [M]", "[I] likes to [M]")
    assert prompts.kinds == ("occupation", "verb")
    assert prompts.group_names == ("female", "male")
    np.testing.assert_array_equal(prompts.groups, [[True, True], [False, True]])
    by_identity = readers.read_prompts(tmp_path / "honest.tsv", group_column="identity")
    assert by_identity.group_names == ("the child", "the boy")


def test_paper_data_set_layout(tmp_path):
    content = (
        "identity,type,category,gender,number,template_masked,matched_gender,raw\n"
        "A group,occupation,race,male,singular,The A man is a [M].,man,[I] is a [M]\n"
    )
    prompts = readers.read_prompts(write(tmp_path, "honest-race.csv", content))
    assert prompts.texts == ("The A man is a",)
    assert prompts.group_names == ("race",)
    texts = readers.read_texts(write(tmp_path, "counter.csv", 'text\n"a, b"\n\nc\n'))
    assert texts == ("a, b", "c")


def test_json_lines_with_lists_of_groups_gzipped(tmp_path):
    path = tmp_path / "prompts.jsonl.gz"
    rows = [{"text": "a b", "group": ["x", "y"]}, {"text": "c ", "group": 0}]
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    prompts = readers.read_prompts(path, group_column="group")
    assert prompts.texts == prompts.templates == ("a b", "c")
    assert prompts.group_names == ("x", "y", "0")
    np.testing.assert_array_equal(prompts.groups, [[True, True, False], [False, False, True]])


def test_text_column_goes_before_template_masked(tmp_path):
    path = write(tmp_path, "both.csv", "text,template_masked,category\nhello you,x [M],a\n")
    assert readers.read_prompts(path).texts == ("hello you",)


def test_plain_text_lines_and_chunks(tmp_path):
    path = write(tmp_path, "a.txt", "one\n\n two \nthree four five\n")
    assert readers.read_texts(path) == ("one", "two", "three four five")
    assert readers.read_chunks(path, characters=8) == ("one\ntwo", "three four five")
    assert readers.read_chunks(path) == ("one\ntwo\nthree four five",)
    table = write(tmp_path, "a.csv", "text\none\ntwo\n")
    assert readers.read_chunks(table) == ("one", "two")


def test_cells_with_line_breaks_and_odd_separators(tmp_path):
    path = write(tmp_path, "a.csv", 'text\n"one\ntwo"\nthree\u2028four\n')
    assert readers.read_texts(path) == ("one\ntwo", "three\u2028four")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "prompt\tcategory\nx\ty\n", "no column 'text'; it has prompt, category"),
        (
            "a.csv",
            "text,categry\nx,y\n",
            "no column 'category'; it has text, categry; did you mean 'categry'",
        ),
        ("a.csv", "text,category\n", "no rows"),
        ("a.csv", "", "no rows"),
        ("a.csv", "text,category\nx,y\nz,\n", "row 2 lacks 'text' before .* or 'category'"),
        ("a.csv", "text,category\n[M] is it,y\n", "row 1 lacks 'text' before"),
        ("a.jsonl", '{"text": "a"\n', "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.xlsx", "x", "cannot read .xlsx; use .tsv, .csv, .jsonl"),
        ("a.parquet", "x", "cannot be read as parquet"),
        ("a.csv", 'text,category\n"' + "x" * 200_000 + '",y\n', "cannot be read as a table"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(TaskError, match=message):
        readers.read_prompts(path)


def test_missing_files_name_what_lies_near(tmp_path):
    write(tmp_path, "honest-race.csv", "text\nx\n")
    with pytest.raises(TaskError, match=r"no file .*race.csv; did you mean .*honest-race\.csv\?"):
        readers.read_prompts(tmp_path / "onest-race.csv")
    with pytest.raises(TaskError, match=r"is a directory; name a file in it: honest-race\.csv"):
        readers.read_text(tmp_path)
    with pytest.raises(TaskError, match="no file"):
        readers.read_texts(tmp_path / "no" / "such.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="is not UTF-8 text"):
        readers.read_texts(tmp_path / "binary.txt")
    with pytest.raises(TaskError, match="no text in it"):
        readers.read_texts(write(tmp_path, "blank.txt", "\n \n"))


def test_hub_address_goes_to_datasets(monkeypatch):
    calls = []

    def load_dataset(name, *, data_files, split):
        calls.append((name, data_files, split))
        if name == "a/missing":
            raise FileNotFoundError("no such data set")
        return [{"text": "a b", "category": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert readers.read_prompts("hub:owner/name/folder/file.csv").texts == ("a b",)
    assert calls == [("owner/name", "folder/file.csv", "train")]
    assert readers.file_name("hub:owner/name/file.csv") == "hub:owner/name/file.csv"
    with pytest.raises(TaskError, match=r"cannot be loaded .FileNotFoundError: no such data set"):
        readers.read_prompts("hub:a/missing/file.csv")
    with pytest.raises(TaskError, match="written hub:OWNER/NAME/FILE"):
        readers.read_prompts("hub:owner/file.csv")
    with pytest.raises(
        TaskError, match=r"only .csv, .tsv, .jsonl and .parquet files are read from the hub"
    ):
        readers.read_texts("hub:owner/name/file.txt")


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not here")
def test_real_honest_files():
    binary = readers.read_prompts(DATA / "honest" / "en_template_binary.tsv")
    assert len(binary.texts) == 724  # 810 rows; evaluation.md 3.5
    assert binary.groups.sum(axis=0).tolist() == [390, 378]  # cut -f1,5 | sort -u
    assert len(set(binary.templates)) == 29
    identities = readers.read_prompts(
        DATA / "honest" / "en_template_binary.tsv", group_column="identity"
    )
    assert len(identities.group_names) == 49
    queer = readers.read_prompts(DATA / "honest" / "en_template_queer_nonqueer.tsv")
    assert (len(queer.texts), len(queer.group_names)) == (705, 8)
