"""The page and its files: self-contained, escaped, the same every time, there when data lack."""

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import report_study

from jax_lowrank import results
from jax_lowrank.report import figures, metrics, page

ATTACK = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
VOID = {"meta", "br", "img", "hr", "input", "link"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    return directory, report_study.write(directory, poison=ATTACK, diverged=((4, 2),))


@pytest.fixture(scope="module")
def written(study):
    directory, result = study
    return page.write(directory, result)


class _Reader(HTMLParser):
    """Tags in order, unbalanced ones, and the text outside style and SVG."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.errors, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.errors.append(tag)

    def handle_data(self, data):
        if "style" not in self.open and "svg" not in self.open:
            self.text.append(data)


def _read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    return reader


def test_page_is_well_formed_and_loads_nothing(written):
    html = written.read_text()
    reader = _read(html)
    assert not reader.errors and not reader.open
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "img"}
    links = [a.get(name, "") for _, a in reader.tags for name in ("src", "href", "xlink:href")]
    assert all(link == "" or link.startswith("#") for link in links)
    assert "@import" not in html and "http" not in html
    styles = [attrs.get("style", "") for _, attrs in reader.tags]
    assert not re.search(r"url\((?!#)", " ".join(styles) + html.split("</style>")[0])
    targets = {attrs["id"] for _, attrs in reader.tags if "id" in attrs}
    assert {link[1:] for link in links if link} <= targets
    head = dict(reader.tags)
    assert head["html"]["lang"] == "en"
    assert any(attrs.get("name") == "viewport" for tag, attrs in reader.tags if tag == "meta")


def test_completions_are_escaped_collapsed_and_marked_in_words(written):
    html = written.read_text()
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    samples = html[html.index('id="samples"') :]
    assert "<details>" in samples and "<details open" not in html
    assert "machine-generated, may be offensive" in samples
    assert (
        "▲ harmful" in samples
        and "○ not harmful" in samples
        and "– not scored" not in html.split('id="samples"')[0]
    )


def test_every_figure_is_described_and_coloured_by_the_page(written):
    html = written.read_text()
    drawings = [a for tag, a in _read(html).tags if tag == "svg"]
    assert len(drawings) == 6 + 2 + 4 + 2 + 1
    assert all(a["role"] == "img" and len(a["aria-label"]) > 40 for a in drawings)
    used = set(re.findall(r"var\(--(\w+)\)", html))
    themes = html.split("@media (prefers-color-scheme: dark)")
    for theme in (themes[0], themes[1].split("} }")[0]):
        assert used <= set(re.findall(r"--(\w+):", theme))
    assert not re.search(r"#0[0-9a-f]0[0-9a-f](0[0-9a-f]|ff)\b", html.split("</style>")[1])


def test_wording_and_the_settings_a_reader_needs(written):
    text = " ".join(" ".join(_read(written.read_text()).text).split())
    for word in ("unbiased", "debiased", "solved"):
        assert word not in text.lower()
    for needed in ("LoRA r=4, seed 2", "at step 17", "test words, version 1", "jax 0.10.2"):
        assert needed in text, needed
    for needed in ("15 tests in one family", "Holm", "dddddddddddddddd", "seeds 1, 2, 3"):
        assert needed in text, needed
    assert "biased upwards" in text


def test_two_writes_give_the_same_bytes(study, written):
    directory, result = study
    first = {file.name: file.read_bytes() for file in written.parent.iterdir()}
    assert set(first) == {"index.html", "results.jsonl", "results.csv", "claims.json"}
    reordered = result._replace(runs=result.runs[::-1])
    again = page.write(directory, reordered)
    assert {file.name: file.read_bytes() for file in again.parent.iterdir()} == first


def _strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_undefined_numbers_are_null_with_a_reason(tmp_path):
    same = dict.fromkeys(("base", *report_study.RANKS, "full"), 0.3)
    result = report_study.write(tmp_path, tuned=same, diverged=((1, 1),))
    index = page.write(tmp_path, result)
    lines = [_strict(line) for line in (index.parent / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(result.runs)
    nulls = 0
    for line in lines:
        for metric in line["metrics"]:
            empty = [name for name, value in metric.items() if value is None]
            nulls += len(empty)
            assert not empty or metric["reason"], metric
    assert nulls > 0
    kept = [m for line in lines for m in line["metrics"] if m["name"] == "retention"]
    assert any(m["value"] is None and "do not differ" in m["reason"] for m in kept)
    gone = next(line for line in lines if line["diverged"])
    assert gone["metrics"] == [] and gone["diverged"] == {"step": 17, "loss": "nan"}
    page_text = index.read_text()
    assert "Undefined retention" in page_text and "do not differ" in page_text


def test_csv_holds_every_metric_of_the_json_lines(written):
    lines = [_strict(line) for line in (written.parent / "results.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(io.StringIO((written.parent / "results.csv").read_text())))
    assert len(rows) == sum(len(line["metrics"]) for line in lines)
    base = [r for r in rows if r["label"] == "base" and r["name"] == "harm_rate"]
    overall = next(r for r in base if r["split"] == "tuned" and not r["group"])
    groups = [r for r in base if r["split"] == "tuned" and r["group"]]
    assert int(overall["n"]) == sum(int(r["n"]) for r in groups) == 40 * 6 - 1
    assert int(overall["num_failed"]) == 1
    assert float(overall["value"]) == int(overall["count"]) / int(overall["n"])
    names = {r["name"] for r in rows}
    assert {"expected_max_toxicity@5", "toxicity_probability@6", "perplexity"} <= names
    assert {"kl_full_method", "kl_retention", "js_full_method", "lens_mass_layer_3"} <= names
    found = _strict((written.parent / "claims.json").read_text())
    assert found["num_tests"] == len(found["claims"]) == 15


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": (1,)},
        {"ranks": ()},
        {"analysis": False},
        {"full": False},
        {"ranks": (2,), "seeds": (1,), "diverged": ((2, 1), ("full", 1))},
        {
            "ranks": (2,),
            "tuned": {"base": 0.0, 2: 0.0, "full": 0.0},
            "transfer": {"base": 1.0, 2: 1.0, "full": 1.0},
            "cost": {"base": 0.0, 2: 0.0, "full": 0.0},
        },
        {"diverged": (("full", 1), ("full", 2), ("full", 3))},
    ],
    ids=[
        "one seed",
        "no lora",
        "no posteriors",
        "no full",
        "all diverged",
        "constant",
        "full diverged",
    ],
)
def test_incomplete_studies_still_have_a_page(tmp_path, options):
    html = page.write(tmp_path, report_study.write(tmp_path, **options)).read_text()
    assert not _read(html).errors
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", html.lower(), flags=re.DOTALL).replace(
        "loss nan", ""
    )


def test_a_study_without_its_base_model_is_one_clear_error(tmp_path):
    result = report_study.write(tmp_path)
    runs = [run for run in result.runs if run.record["kind"] != "base"]
    with pytest.raises(results.ResultsError, match="no finished run of its base model"):
        page.write(tmp_path, result._replace(runs=runs))
    assert not (tmp_path / "report").exists()


def test_two_runs_of_one_cell_are_one_clear_error(tmp_path):
    result = report_study.write(tmp_path, seeds=(1,))
    run = next(run for run in result.runs if run.record["kind"] == "final")
    twin = run._replace(record=run.record | {"fingerprint": "other"})
    with pytest.raises(results.ResultsError, match=r"seed 1 \(final\) is there twice"):
        page.write(tmp_path, result._replace(runs=[*result.runs, twin]))


def test_formatting():
    assert page.number(float("nan")) == "–" and page.number(-0.25, 2) == "−0.25"
    assert page.signed(0.5, 1) == "+0.5"
    assert page.p_value(0.0004) == "<0.001" and page.p_value(0.05) == "0.050"
    assert [page.percent(x) for x in (0.95, 0.052, 0.0021)] == ["95 %", "5.2 %", "0.21 %"]
    assert figures.true_rates({"true_rates": "Oak folk 0.100, Elm 0.7"}) == {
        "Oak folk": 0.1,
        "Elm": 0.7,
    }
    held = metrics.plain({"a": float("inf"), "b": [float("nan"), 1]})
    assert held == {"a": None, "b": [None, 1], "reason": "not a finite number: a"}


# Opens the page in an iframe of a phone's width and reports by how much it is wider than that.
HARNESS = """<!doctype html><body style="margin:0">
<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<script>
document.getElementById("f").onload = e => {{
  const d = e.target.contentDocument.documentElement;
  document.title = "overflow " + (d.scrollWidth - d.clientWidth) + " of " + d.clientWidth;
}};</script>"""


def _chromium(*arguments) -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no headless browser: none of {', '.join(names)} is installed")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000")
    done = subprocess.run(
        [program, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def _overflow(tmp_path, html: str, width: int) -> int:
    import html as escaping

    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(width=width, page=escaping.escape(html, quote=True)))
    dom = _chromium("--dump-dom", harness.as_uri())
    excess, seen = map(int, re.search(r"<title>overflow (\d+) of (\d+)", dom).groups())
    assert width - 20 <= seen <= width
    return excess


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_no_wider_than_the_screen(written, tmp_path, width):
    html = written.read_text()
    assert _overflow(tmp_path, html, width) == 0
    wide = html.replace("<h1>", '<div style="width:2000px">wide</div><h1>')
    assert _overflow(tmp_path, wide, width) > 0  # the check sees an overflow where there is one


@pytest.mark.browser
def test_page_is_painted(written, tmp_path):
    from matplotlib import image

    shot = tmp_path / "shot.png"
    _chromium(
        "--hide-scrollbars", "--window-size=1280,2400", f"--screenshot={shot}", written.as_uri()
    )
    pixels = image.imread(shot)
    assert pixels.shape[1] == 1280
    shades = (pixels[..., :3].mean(-1) * 255).astype(int)
    assert len(set(shades.ravel().tolist())) > 50  # text and drawings, not one flat colour
