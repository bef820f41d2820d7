"""Results on disk: whole or absent, one study a directory, what is written is read back."""

import json

import numpy as np
import pytest

from jax_lowrank import results
from jax_lowrank.results import ResultsError, Rows

STUDY = {"fingerprint": "a" * 16, "name": "demo", "group_names": ["x", "y"]}
ROWS = {
    "tuned": Rows(
        ("One.", "Two."), ("0", "1"), np.array([0, 0], np.int32), np.array([[1, 0], [1, 1]], bool)
    ),
    "neutral": Rows((), (), np.zeros(0, np.int32), np.zeros((0, 2), bool)),
}
RECORD = {"fingerprint": "f" * 16, "kind": "final"}
ARRAYS = {
    "tuned/harm": np.array([[0.5, np.nan]], np.float32),
    "neutral/tokens": np.array([3, 4], np.int32),
}
COMPLETIONS = {"tuned": [["a “quoted” text", "</script>"]]}


def test_round_trip(tmp_path):
    results.open_study(tmp_path, STUDY, ROWS)
    log = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    begun = results.begin_directory(results.run_directory(tmp_path, RECORD))
    (begun / "more.bin").write_bytes(b"more")
    folder = results.write_run(tmp_path, RECORD, log, ARRAYS, COMPLETIONS, begun)
    results.write_run(tmp_path, {**RECORD, "fingerprint": "0" * 16}, [])
    assert folder == tmp_path / "runs" / RECORD["fingerprint"]
    study = results.read_study(tmp_path)
    assert study.study == STUDY
    assert study.rows["tuned"].texts == ROWS["tuned"].texts
    for split, rows in ROWS.items():
        for got, wanted in zip(study.rows[split], rows, strict=True):
            np.testing.assert_array_equal(got, wanted)
        assert study.rows[split].groups.dtype == bool and study.rows[split].groups.shape[1] == 2
    tuning, final = study.runs
    assert (tuning.arrays, tuning.completions) == ({}, {})
    assert final.record == RECORD and final.completions == COMPLETIONS
    assert final.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert final.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(final.arrays[name], array)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == log
    assert (folder / "more.bin").read_bytes() == b"more" and not begun.exists()
    assert results.finished(tmp_path, RECORD["fingerprint"]) == RECORD
    assert results.finished(tmp_path, "1" * 16) is None
    results.set_runs(tmp_path, [RECORD["fingerprint"]])
    named = results.read_study(tmp_path).runs
    assert [run.record for run in named] == [RECORD]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_is_whole_or_absent(tmp_path, error):
    def write(partial):
        (partial / "record.json").write_text("{}")
        raise error

    with pytest.raises(error):
        results.write_directory(tmp_path / "runs" / "x", write)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_run(tmp_path):
    results.open_study(tmp_path, STUDY, ROWS)
    results.write_run(tmp_path, RECORD, [], ARRAYS, COMPLETIONS)
    with pytest.raises(TypeError):
        results.write_run(tmp_path, {**RECORD, "bad": object()}, [])
    assert results.read_study(tmp_path).runs[0].completions == COMPLETIONS
    results.write_run(tmp_path, {**RECORD, "kind": "tune"}, [])
    (run,) = results.read_study(tmp_path).runs
    assert run.record["kind"] == "tune" and run.arrays == {}


def test_leftovers_of_a_killed_run_are_neither_read_nor_kept(tmp_path):
    results.open_study(tmp_path, STUDY, ROWS)
    leftover = tmp_path / "runs" / f".partial-{RECORD['fingerprint']}-abc"
    other = tmp_path / "runs" / f".partial-{'0' * 16}-abc"  # of a worker that is alive
    for folder in (leftover, other):
        folder.mkdir()
        (folder / "record.json").write_text("{}")
    assert results.read_study(tmp_path).runs == []
    results.write_run(tmp_path, RECORD, [])
    results.open_study(tmp_path, STUDY, ROWS)
    assert leftover.exists() and len(results.read_study(tmp_path).runs) == 1
    results.clear_partial(tmp_path / "runs" / RECORD["fingerprint"])
    assert not leftover.exists() and other.exists()


def test_the_directory_of_another_study_is_refused(tmp_path):
    results.open_study(tmp_path, STUDY, ROWS)
    other = {**STUDY, "fingerprint": "b" * 16, "name": "mine"}
    with pytest.raises(ResultsError) as caught:
        results.open_study(tmp_path, other, ROWS)
    for part in (str(tmp_path), "demo", "a" * 16, "mine", "b" * 16, "choose another --out"):
        assert part in str(caught.value)
    assert results.read_study(tmp_path).study == STUDY


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResultsError, match=r"cannot write results to .*file"):
        results.open_study(tmp_path / "file" / "out", STUDY, ROWS)


def test_a_directory_without_a_study(tmp_path):
    with pytest.raises(ResultsError, match="holds no study"):
        results.read_study(tmp_path)


def test_write_whole_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.txt"
    results.write_whole(path, "old")
    results.write_whole(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
