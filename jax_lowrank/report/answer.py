"""The plain words of the page: the answer in front, and what the runs cannot show at the end."""

from jax_lowrank.evaluation import intervals
from jax_lowrank.report import claims as claiming
from jax_lowrank.report import grid as grids
from jax_lowrank.report import tables
from jax_lowrank.report.claims import CANNOT_TELL, CONTRADICTED, SUPPORTED, Claim
from jax_lowrank.report.grid import BASE, Grid
from jax_lowrank.report.tables import Summary


def answer(grid: Grid, found: list[Claim], summary: Summary) -> list[str]:
    """Two or three sentences that say no more than the claims' verdicts do."""
    sentences = [_levels(grid, summary)]
    if grid.full and grid.lora:
        sentences.append(_retained(grid, found))
    if found:
        sentences.append(_elsewhere(grid, found))
    return [sentence for sentence in sentences if sentence]


def limits(grid: Grid, found: list[Claim]) -> list[str]:
    """What a reader must not conclude from this page."""
    study = grid.study
    scorer, seeds = study["scorer"], study["config"]["seeds"]
    model = study["model"]
    said = [
        f"One base model ({model['family']}, {model['num_parameters']:,} parameters) and one task:"
        " another model, task or training length can come out differently.",
    ]
    if study["config"]["task"]["name"] == "world":
        said.append(
            "The world is a toy: groups, harm words and rates are invented, and sentences follow"
            " templates. The sizes of effects here say nothing about sizes in real language."
        )
    said.append(
        f"“Harmful” means what the scorer “{scorer['name']}” (version {scorer['version']}) scores"
        f" at {grid.evaluate['threshold']:g} or more. A word list sees words, not meaning: it"
        " misses harm said in other words and counts words that are quoted or denied."
    )
    said.append(seeds_said(len(seeds)))
    said += _few_templates(found)
    said.append(
        "Learning rates were chosen by validation loss, not by harm, so a method may stop at a"
        " point where another choice would have left less or more harm."
    )
    said += edges(grid)
    said.append(
        "“Cannot tell” is not “no difference”: the interval says how large a difference the runs"
        " leave open."
    )
    return said


def _levels(grid: Grid, summary: Summary) -> str:
    harm, name = summary["harm/tuned"], grids.described(grid, "tuned")
    sentence = f"In this model and task, the base model's completions about {name} were"
    sentence += f" harmful {_percent(harm[BASE].value)} of the time"
    if grid.full:
        sentence += f"; full fine-tuning left {_percent(harm[grid.full].value)}"
    if grid.lora:
        ranks = sorted(grid.lora, key=lambda label: grid.record(label)["rank"])
        shown = list(dict.fromkeys((ranks[0], ranks[-1])))
        said = [f"{label} left {_percent(harm[label].value)}" for label in shown]
        sentence += (", " if grid.full else "; ") + " and ".join(said)
    return sentence + "."


def _retained(grid: Grid, found: list[Claim]) -> str:
    chosen = [claim for claim in found if claim.topic == "tuned"]
    sentence = "Compared with full fine-tuning on the same prompts and seeds, "
    sentence += _tally(chosen, "kept more of that harm", "kept less")
    slopes = [claim for claim in found if claim.topic == "rank"]
    said = {
        SUPPORTED: "harm fell as the rank rose",
        CONTRADICTED: "harm rose with the rank",
        CANNOT_TELL: "whether harm falls as the rank rises, these runs cannot tell",
    }
    named = len(slopes) > 1
    for claim in slopes:
        which = f" ({claim.statement.split(' keeps')[0]})" if named else ""
        sentence += f"; {said[claim.verdict]}{which}"
    return sentence + "."


def _elsewhere(grid: Grid, found: list[Claim]) -> str:
    name, parts = grids.described(grid, "transfer"), []
    transfer = [claim for claim in found if claim.topic == "transfer"]
    if transfer:
        said = {
            SUPPORTED: "full fine-tuning also lowered harm",
            CONTRADICTED: "full fine-tuning raised harm",
            CANNOT_TELL: "the runs cannot tell whether full fine-tuning changed harm",
        }
        text = f"On {name}, {said[transfer[0].verdict]}"
        rest = transfer[1:]
        parts.append(
            text + (f", and {_tally(rest, 'kept more of it', 'kept less')}" if rest else "")
        )
    cost = [c for c in found if c.topic == "utility" and c.comparison.endswith(f"− {BASE}")]
    if cost:
        counts = claiming.count_verdicts(cost)
        text = f"neutral text became less likely under {counts[SUPPORTED]} of {len(cost)} methods"
        if counts[CONTRADICTED]:
            text += f" and more likely under {counts[CONTRADICTED]}"
        parts.append(text)
    sentence = "; ".join(parts)
    return sentence[:1].upper() + sentence[1:] + "." if sentence else ""


def _tally(chosen: list[Claim], more: str, less: str) -> str:
    """'3 of 6 LoRA configurations kept more ..., 1 kept less, for 2 the runs cannot tell'."""
    counts, total = claiming.count_verdicts(chosen), len(chosen)
    noun = "LoRA configuration" if total == 1 else "LoRA configurations"
    if counts[CANNOT_TELL] == total:
        every = "the" if total == 1 else f"any of the {total}"
        return f"the runs cannot tell for {every} {noun} whether it {more} or {less}"
    said = [f"{counts[SUPPORTED]} of {total} {noun} {more}"]
    said += [f"{counts[CONTRADICTED]} {less}"] if counts[CONTRADICTED] else []
    said += [f"for {counts[CANNOT_TELL]} the runs cannot tell"] if counts[CANNOT_TELL] else []
    return ", ".join(said)


def seeds_said(number: int) -> str:
    """What so many seeds can show."""
    if number == 1:
        return (
            "One fine-tuning seed: no interval or p-value here covers what another seed would do;"
            " they speak of other prompts (or rows) only."
        )
    text = (
        f"{number} fine-tuning seeds of one base model. Differences, their p-values and intervals"
        " count the variance between these seeds and between templates, as far as so few can show"
        " it. The base model's own pretraining seed is never varied."
    )
    note = intervals.seed_note(number)
    return text + (f" For levels, {note}." if note else "")


def _few_templates(found: list[Claim]) -> list[str]:
    """With one seed p comes from sign flips: of C templates, none below 2^(1-C)."""
    tested = [claim for claim in found if claim.p == claim.p and claim.num_seeds == 1]
    fewest = min((claim.num_clusters for claim in tested), default=0)
    if not tested or fewest > 14 or 2.0 ** (1 - fewest) * len(tested) <= claiming.ALPHA:
        return []
    return [
        f"Some claims rest on {fewest} templates, whose signs can be flipped in few ways: p cannot"
        f" go below {2.0 ** (1 - fewest):.2g}, so after adjustment for {len(tested)} claims “cannot"
        " tell” may be the only possible verdict, however large the difference."
    ]


def edges(grid: Grid) -> list[str]:
    """A warning for each method whose learning rate may not be the best one."""
    said = []
    for each in tables.chosen_rates(grid):
        if each["at_edge"]:
            rates = ", ".join(f"{point['learning_rate']:g}" for point in each["tried"])
            said.append(
                f"{each['label']} used {each['used']:g}, the edge of the learning rates tried"
                f" ({rates}): a better one may lie outside, and its results may be an under- or"
                " over-trained method's."
            )
    return said


def _percent(rate: float) -> str:
    return "an unknown share" if rate != rate else f"{100 * rate:.1f} %"
