"""What a result depends on: hashes of code and weights, and the environment it was made in."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax_lowrank", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "tokenizers")
# Rooms that only read finished runs: a change in them makes no run stale.
READERS = ("report", "evaluation", "cli", "dry_run", "export", "model_card", "__main__", "progress")


def hash_files(directory: Path, config: str = "config.json") -> str:
    """SHA-256 over the configuration and the weight files of a directory: 64 hex characters."""
    digest = hashlib.sha256()
    for file in [directory / config, *sorted(directory.glob("*.safetensors"))]:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@functools.cache
def code_hash() -> str:
    """SHA-256 over the source of every room that a run's result can depend on, 16 characters."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not name.startswith(READERS):
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def environment() -> Mapping[str, Any]:
    """Versions, platform and devices, for records."""
    device = jax.devices()[0]
    return {
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": cpu_name() if device.platform == "cpu" else device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "num_cores": os.cpu_count(),
        "code": code_hash(),
    }


def peak_memory_mb() -> int:
    """The most memory that this process has held so far (resident set), in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_json(path: Path) -> Any:
    """The file's content, or None when there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None
