"""Which report a study gets: a table by the kind of its task."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jax_lowrank.report import claims, page
from jax_lowrank.report.classification import claims as classification_claims
from jax_lowrank.report.classification import page as classification_page
from jax_lowrank.results import StudyResult


class Report(NamedTuple):
    """write(directory, result) -> index.html; as_text(result) -> the claims for a terminal."""

    write: Callable[[Path, StudyResult], Path]
    as_text: Callable[[StudyResult], str]


REPORTS = {
    "completions": Report(page.write, claims.as_text),
    "classification": Report(classification_page.write, classification_claims.as_text),
}


def report_of(result: StudyResult) -> Report:
    """The report of a study; results of earlier versions name no kind and are of completions."""
    return REPORTS[result.study.get("kind", "completions")]
