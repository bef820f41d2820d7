"""The README.md of an exported model: what the Hub reads on top, then what was done and found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PIPELINES = {
    "causal-lm": "text-generation",
    "classification": "text-classification",
    "masked-lm": "fill-mask",
    "embedding": "feature-extraction",
}
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
}


class Card(NamedTuple):
    """What a card says.

    base: a hub id or a directory; commit: of the former, else None.
    kind, labels: of the head. facts: (name, value) in order. metrics: dicts with `name`, `value`
      and, where known, `split`, `low`, `high`, `n`, `reason`. pad_id: what the base has to be told.
    """

    title: str
    format: str
    base: str
    commit: str | None
    kind: str
    labels: tuple[str, ...]
    method: str
    facts: Sequence[tuple[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    pad_id: int | None = None


def render(card: Card) -> str:
    """The whole file."""
    parts = [front_matter(card), f"# {card.title}", _summary(card), "## How it was made"]
    parts += [_table(("", ""), [(name, _text(value)) for name, value in card.facts])]
    parts += ["## What was measured", _metrics(card.metrics), "## Use", _usage(card)]
    return "\n\n".join(parts) + "\n"


def front_matter(card: Card) -> str:
    """The YAML block that the Hub reads. JSON strings are YAML strings.

    base_model is for ids of the Hub alone, which refuses a path; a path stands in the text.
    """
    relation = "adapter" if card.format == "peft" else "finetune"
    tags = ["jax_lowrank", card.method]
    lines = [f"library_name: {'peft' if card.format == 'peft' else 'transformers'}"]
    if card.commit:
        tags.append(f"base_model:{relation}:{card.base}")
        lines += [f"base_model: {json.dumps(card.base)}", f"base_model_relation: {relation}"]
    lines += [f"pipeline_tag: {PIPELINES[card.kind]}", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join(["---", *lines, "---"])


def _summary(card: Card) -> str:
    made = (
        "The low-rank adapter (PEFT format)"
        if card.format == "peft"
        else "The fine-tuned model (transformers format)"
    )
    text = f"{made} of a run of jax_lowrank over the base model `{card.base}`."
    if card.labels:
        text += f" Classes: {', '.join(card.labels)}."
    return text + " The licence and the limits of the base model hold for this model too."


def _metrics(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return "Nothing was measured in this run."
    rows = [
        (m.get("split", ""), m["name"], _value(m), _interval(m), _text(m.get("n")), _reason(m))
        for m in metrics
    ]
    header = ("split", "metric", "value", "interval", "n", "note")
    note = (
        "Figures hold for this run, its data and its seed. Group gaps that were not measured are"
        " not known to be absent."
    )
    return _table(header, rows) + "\n\n" + note


def _value(metric: Mapping[str, Any]) -> str:
    value = metric.get("value")
    return "undefined" if value is None else _text(value)


def _interval(metric: Mapping[str, Any]) -> str:
    low, high = metric.get("low"), metric.get("high")
    return "" if low is None or high is None else f"{_text(low)} to {_text(high)}"


def _reason(metric: Mapping[str, Any]) -> str:
    return str(metric.get("reason") or "")


def _usage(card: Card) -> str:
    auto = AUTO_CLASSES[card.kind]
    extra = f", num_labels={len(card.labels)}" if card.labels else ""
    extra += "" if card.pad_id is None else f", pad_token_id={card.pad_id}"
    extra += f", revision={json.dumps(card.commit)}" if card.commit else ""
    if card.format == "hf":
        lines = [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            'model = AutoModelFor.from_pretrained("THIS_DIRECTORY")'.replace("AutoModelFor", auto),
            'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
        ]
    else:
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f"base = {auto}.from_pretrained({json.dumps(card.base)}{extra})",
            'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")',
        ]
    return "\n".join(["```python", *lines, "```"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _escape(cell: str) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else json.dumps(value)
