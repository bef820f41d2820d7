"""What of a study goes into its mirror, and comes from there (see jax_lowrank/mirror.py).

Claims are local: workers that share nothing but the mirror share the runs by --shard. A run that
another machine has finished is taken from the mirror sooner than done again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jax_lowrank import provenance, results, trainable_file
from jax_lowrank.checkpoint import Checkpoints
from jax_lowrank.mirror import Mirror
from jax_lowrank.processes import once
from jax_lowrank.study.packs import begun
from jax_lowrank.study.parts import Prepared

DESCRIPTION = ("study.json", "prompts.json")


def begin(p: Prepared) -> None:
    """Bring the mirror up to what is finished here, and learn which packs were begun elsewhere.

    Raises ResultsError where it belongs to another study.
    """
    mirror = p.mirror
    if mirror.url is None:
        return
    there, here = mirror.json_of("study.json"), provenance.read_json(p.out / "study.json")
    if there and there["fingerprint"] != here["fingerprint"]:
        raise results.ResultsError(
            f"{mirror.url} belongs to another study: {there['name']} ({there['fingerprint']}), not"
            f" {here['name']} ({here['fingerprint']}); choose another --mirror"
        )
    for name in DESCRIPTION:
        mirror.push(name, replace=True)
    for group in ("base", "runs"):
        finished = {path.name for path in (p.out / group).glob("[!.]*")}
        for name in sorted(finished.difference(mirror.units(group))):
            mirror.push(f"{group}/{name}")
    mirror.fetch_all("checkpoints")


def checkpoints_of(
    mirror: Mirror, group: str, fingerprint: str, seconds: float, note: Callable[[str], None]
) -> Checkpoints:
    """Those of a run, a pack or a base model, in the folder `group` here and in the mirror."""
    once(lambda: mirror.fetch_all(group))
    return Checkpoints(
        mirror.folder / group,
        fingerprint,
        seconds=seconds,
        note=note,
        copy=partial(mirror.keep, group),
    )


def write_run(
    p: Prepared,
    record: Mapping,
    log: list[dict],
    measured: Sequence = (),
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Write a run, here and then in the mirror. measured: arrays and completions, if any."""
    begun = trainable_file.begin(results.run_directory(p.out, record), weights or {})
    once(lambda: results.write_run(p.out, record, log, *measured, partial=begun))
    once(lambda: p.mirror.push(f"runs/{record['fingerprint']}"))


def tidy(p: Prepared, packs: Sequence[str]) -> None:
    """Delete from the mirror what a killed session left of finished runs, and of these packs."""
    for name in p.mirror.groups("checkpoints"):
        over = name in packs and name not in begun(p.out)
        if over or results.finished(p.out, name):
            p.mirror.keep(f"checkpoints/{name}")


def end(mirror: Mirror) -> None:
    """Copy what the report was made from, and the report."""
    for name in (*DESCRIPTION, "runs.json", "report"):
        mirror.push(name, replace=True)
