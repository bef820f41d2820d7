"""The report of a study: one HTML page, and its numbers as JSON lines, CSV and claims."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lowrank import results
from jax_lowrank.evaluation import comparisons
from jax_lowrank.report import answer, claims, drawing, figures, metrics, tables
from jax_lowrank.report import grid as grids
from jax_lowrank.report.grid import BASE, SPLITS, Grid
from jax_lowrank.results import StudyResult

NUM_PROMPTS, NUM_COMPLETIONS = 3, 4  # shown per split and method
MARKS = {"supported": "✔", "contradicted": "✘", "cannot tell": "?"}


class Sample(NamedTuple):
    """A shown completion; verdict is `harmful`, `not harmful` or `not scored`."""

    text: str
    verdict: str


def write(study_dir: Path, result: StudyResult) -> Path:
    """Write STUDY/report/{index.html, results.jsonl, results.csv, claims.json}; return index.html.

    Each file is replaced whole; the same results give the same bytes. Raises ResultsError when the
    base model has no finished run or the directory cannot be written.
    """
    grid = grids.arrange(result)
    found = claims.from_grid(grid)
    shifts = tables.shifts(grid)
    numbers = {
        run.record["fingerprint"]: metrics.run_metrics(grid, run, shifts) for run in result.runs
    }
    files = {
        "results.jsonl": metrics.jsonl(result, numbers),
        "results.csv": metrics.table_csv(result, numbers),
        "claims.json": claims_json(grid, found),
        "index.html": render(grid, found, tables.summary(grid, shifts)),
    }
    return put(study_dir, files)


def put(study_dir: Path, files: dict[str, str]) -> Path:
    """Write the files of STUDY/report, each whole; return index.html."""
    report = study_dir / "report"
    try:
        report.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            results.write_whole(report / name, text)
    except OSError as error:
        raise results.ResultsError(f"cannot write {report}: {error.strerror}") from error
    return report / "index.html"


def claims_json(grid: Grid, found: list[claims.Claim]) -> str:
    """The claims with the family they were adjusted in; NaN is null beside a reason."""
    tested = sum(not math.isnan(claim.p) for claim in found)
    content = {
        "study": grid.study["name"],
        "fingerprint": grid.study["fingerprint"],
        "adjustment": "Holm over all claims",
        "num_tests": tested,
        "alpha": claims.ALPHA,
        "claims": [_claim_object(claim) for claim in found],
    }
    return json.dumps(metrics.plain(content), indent=1, allow_nan=False) + "\n"


def render(grid: Grid, found: list[claims.Claim], summary: tables.Summary) -> str:
    """The page as one HTML text: no script, nothing loaded from elsewhere, every text escaped."""
    from markupsafe import Markup

    groups = {
        split: {label: tables.group_rates(grid, split, label) for label in (BASE, *grid.labels)}
        for split in SPLITS
    }
    return (
        environment()
        .get_template("completions.html")
        .render(
            study=grid.study,
            config=grid.study["config"],
            grid=grid,
            answer=answer.answer(grid, found, summary),
            limits=answer.limits(grid, found),
            topics=topics_of(found, claims.TOPICS),
            unit_names=("Prompts", "templates"),
            num_tests=sum(not math.isnan(claim.p) for claim in found),
            alpha=claims.ALPHA,
            figures=figures.all_figures(grid, summary, groups),
            markup=Markup,
            labels=(BASE, *grid.labels),
            extremes=grids.extremes(grid),
            outcomes=_outcomes(grid, summary),
            summary=summary,
            groups=groups,
            gaps=_gaps(grid),
            training=[training(grid, label) for label in (BASE, *grid.labels)],
            rates={each["label"]: each for each in tables.chosen_rates(grid)},
            environments=environments(grid),
            samples=_samples(grid),
            splits={split: grids.attribute(grid, split) for split in SPLITS},
            described={split: grids.described(grid, split) for split in SPLITS},
            num_completions=grid.base.arrays["tuned/harm"].shape[1],
            palette=drawing.NUM_RANK_COLORS,
        )
    )


def of_figures(parts: Sequence[tuple[str, list[figures.Figure]]]) -> str:
    """A page of figures alone, under their headings, as one HTML text."""
    from markupsafe import Markup, escape

    template = environment().get_template("figures.html")
    shown = [
        f"<h1>{escape(heading)}</h1>\n{template.render(figures=made, markup=Markup)}"
        for heading, made in parts
    ]
    style = environment().get_template("style.css").render()
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>Figures</title><style>{style}</style>'
        f"<body><main>{''.join(shown)}</main></body></html>\n"
    )


def environment():
    """The templates beside this file, with the filters that they use; every text is escaped."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "num": number,
        "signed": signed,
        "pvalue": p_value,
        "percent": percent,
        "remarks": remarks,
        "tally": tally,
        "units": claims.units,
        "mark": lambda verdict: MARKS[verdict],
        "capital": lambda text: text[:1].upper() + text[1:],
    }
    return made


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; '–' where it is undefined."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 3) -> str:
    """As `number`, with its sign."""
    return "–" if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def p_value(p: float) -> str:
    """Three decimals, '<0.001' below that."""
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def remarks(claim: claims.Claim) -> list[str]:
    """What a reader must know about one claim; notes that hold for every claim are elsewhere."""
    missing = f"{claim.num_missing} unscored (seed, prompt) pairs left out"
    said = [claim.reason, missing if claim.num_missing else ""]
    return [text for text in (*said, claim.note) if text]


def tally(chosen: list[claims.Claim]) -> str:
    """'5 supported, 1 cannot tell'."""
    counts = claims.count_verdicts(chosen)
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number)


def percent(value: float) -> str:
    """A share as a percentage with enough digits for small ones."""
    share = 100 * value
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %" if share >= 1 else f"{share:.2g} %"


def _claim_object(claim: claims.Claim) -> dict[str, Any]:
    content = claim._asdict()
    if math.isnan(claim.p_new_seeds) and not content["reason"]:
        content["reason"] = "p_new_seeds needs two seeds or more"
    return content


def topics_of(
    found: list[claims.Claim], topics: dict[str, str]
) -> list[tuple[str, list[claims.Claim]]]:
    """The titles of topics that have claims, with these."""
    grouped = [
        (title, [claim for claim in found if claim.topic == topic])
        for topic, title in topics.items()
    ]
    return [(title, chosen) for title, chosen in grouped if chosen]


def _outcomes(grid: Grid, summary: tables.Summary) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Title and columns (metric, heading, what it is of) of each table of outcomes."""
    names = {split: grids.attribute(grid, split) for split in SPLITS}
    k = grid.base.arrays["tuned/harm"].shape[1]

    def both(metric: str, heading: str, unit: str = "") -> list[tuple[str, str, str]]:
        return [(f"{metric}/{split}", heading, f"{names[split]}{unit}") for split in SPLITS]

    harm = [
        *both("harm", "Harm rate"),
        *both("retention", "Retention"),
        ("expected_max/tuned", "Expected maximum", f"{names['tuned']}, k = {k}"),
        ("harm_probability/tuned", "Harm probability", f"{names['tuned']}, k = {k}"),
        ("perplexity", "Perplexity", "neutral text"),
    ]
    shift = [
        *both("kl_full_method", "KL(full ‖ method)", ", nats"),
        *both("kl_method_base", "KL(method ‖ base)", ", nats"),
        ("js_full_method/tuned", "JS(full, method)", f"{names['tuned']}, nats"),
        *both("kl_retention", "KL retention"),
    ]
    shift = [column for column in shift if summary.get(column[0])]
    titled = [("Harm and utility", harm), ("Next-token distributions", shift)]
    return [(title, columns) for title, columns in titled if columns]


def _gaps(grid: Grid) -> list[tuple[str, list[tuple[str, comparisons.Gap, float]]]]:
    """Per split: (label, gap, adjusted p), Benjamini-Hochberg over the whole table."""
    keys = [(split, label) for split in SPLITS for label in (BASE, *grid.labels)]
    found = [tables.group_gap(grid, split, label) for split, label in keys]
    adjusted = comparisons.benjamini_hochberg([gap.p for gap in found])
    return [
        (
            split,
            [(k[1], gap, float(p)) for k, gap, p in zip(keys, found, adjusted) if k[0] == split],
        )
        for split in SPLITS
    ]


def training(grid: Grid, label: str) -> dict[str, Any]:
    """What training took: facts of the first seed, and means over seeds where they differ."""
    records = [run.record for run in grid.runs[label].values()]

    def mean(values) -> float:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else float("nan")

    return {
        "label": label,
        "record": records[0],
        "seeds": [record["seed"] for record in records if record["seed"] is not None],
        "best_steps": [record["best_step"] for record in records],
        "validation_loss": mean(record["validation_loss"] for record in records),
        "train_seconds": mean(record["seconds"].get("train") for record in records),
        "evaluate_seconds": mean(record["seconds"].get("evaluate") for record in records),
        "tokens_per_second": mean(record.get("tokens_per_second") for record in records),
    }


def environments(grid: Grid) -> dict[str, list[str]]:
    """Every version and device named by the runs, with all values where runs differ."""
    found: dict[str, list[str]] = {}
    for seeds in grid.runs.values():
        for run in seeds.values():
            for name, value in run.record["environment"].items():
                values = found.setdefault(name, [])
                if str(value) not in values:
                    values.append(str(value))
    return found


def _samples(grid: Grid) -> dict[str, list[tuple[str, list[tuple[str, list[Sample]]]]]]:
    """split -> [(prompt, [(label, its first completions)])] of a few prompts, evenly spaced."""
    found = {}
    for split in SPLITS:
        texts = grid.rows[split].texts
        places = np.unique(np.linspace(0, len(texts) - 1, NUM_PROMPTS + 2).astype(int)[1:-1])
        found[split] = [
            (texts[p], [(label, _completions(grid, split, label, p)) for label in _shown(grid)])
            for p in places
        ]
    return found


def _shown(grid: Grid) -> tuple[str, ...]:
    """Base, lowest rank, full fine-tuning."""
    return tuple(dict.fromkeys((*grids.extremes(grid)[:2], *filter(None, [grid.full]))))


def _completions(grid: Grid, split: str, label: str, place: int) -> list[Sample]:
    run = next(iter(grid.runs[label].values()))
    if split not in run.completions:
        return []
    texts = run.completions[split][place][:NUM_COMPLETIONS]
    scores = run.arrays[f"{split}/harm"][place][:NUM_COMPLETIONS]
    return [Sample(text, _harm_word(grid, score)) for text, score in zip(texts, scores)]


def _harm_word(grid: Grid, score: float) -> str:
    if np.isnan(score):
        return "not scored"
    return "harmful" if score >= grid.evaluate["threshold"] else "not harmful"
