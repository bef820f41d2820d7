"""Environments in which the PyTorch side of a benchmark is compared fairly. Imports no torch.

On an AMD processor MKL takes its AVX2 path unless a function it asks, `mkl_serv_intel_cpu_true`,
answers 1; PyTorch's f32 products then run about twice as fast. Both environments are worth
reporting: 'stock' is what a user has, 'unlocked' what PyTorch can do. On an Intel processor the
two are the same.
"""

import os
import subprocess
from pathlib import Path

UNLOCK_SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
PEER = Path(__file__).with_name("peer_torch.py")


def cpu_vendor() -> str:
    """The processor's vendor and model as the kernel names them; 'unknown' when it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    fields = dict(part.split(":", 1) for part in lines if ":" in part)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    found = [fields[key] for key in ("vendor_id", "model name") if key in fields]
    return " ".join(found) or "unknown"


def build_unlock(folder: Path) -> Path:
    """Compile the one-function library that unlocks MKL on AMD into `folder`; its path.

    Raises subprocess.CalledProcessError when gcc refuses, FileNotFoundError when there is no gcc.
    """
    source, library = Path(folder) / "mkl_unlock.c", Path(folder) / "mkl_unlock.so"
    source.write_text(UNLOCK_SOURCE)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def peer_environment(
    threads: int,
    unlock: Path | None = None,
    huge_pages: bool = False,
    compile_cache: Path | None = None,
) -> dict[str, str]:
    """Environment variables of a PyTorch subprocess.

    `unlock` is what `build_unlock` returned, or None for the stock library. `huge_pages` asks glibc
    to back large allocations by huge pages (it must be set before the process starts, for either
    library). `compile_cache` is a folder for torch.compile's products: an empty one makes the first
    step cold.
    """
    # The caller's own packages must not reach the other interpreter.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD", "GLIBC_TUNABLES")
    }
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if unlock is not None:
        environment["LD_PRELOAD"] = str(unlock)
    if huge_pages:
        environment["GLIBC_TUNABLES"] = HUGE_PAGES
    if compile_cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(compile_cache)
    return environment
