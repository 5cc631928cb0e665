"""Settings of jax that a script makes before its first computation."""

import ctypes
import os
import warnings
from pathlib import Path
from typing import Any

import jax

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def use_all_cores(n_runs: int) -> None:
    """Makes each CPU core a device, at most one for each run, so that a sweep uses them all (see layout.over_runs).

    Does nothing on an accelerator, or where the number of host devices was already chosen by XLA_FLAGS.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    jax.config.update("jax_num_cpu_devices", max(1, min(cores, n_runs)))


def join_processes() -> None:
    """Makes the devices of several processes one set, on one host or many, where the environment asks for it.

    JAX_COORDINATOR_ADDRESS is host:port of the first process, JAX_NUM_PROCESSES their number and JAX_PROCESS_ID the
    number of this one. Clusters that jax knows (Slurm, Cloud TPU) say the last two themselves. Without an address
    nothing happens. Call it before the first computation.
    """
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        numbers = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        n_processes, process = (None if number is None else int(number) for number in numbers)
        jax.distributed.initialize(address, n_processes, process)


def keep_compilations() -> None:
    """Keeps compiled programs for the next run, under the user's cache folder unless JAX_COMPILATION_CACHE_DIR says."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(root) / "circuits_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # An entry that a kill or a full disk cut short is harmless: the program is compiled anew.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def return_freed_memory() -> None:
    """Makes glibc give arrays that were freed back to the system at once: else a third of the peak is what it keeps.

    Does nothing where the C library has no mallopt. Costs page faults; not for training.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def quick_compilation() -> dict[str, Any]:
    """Compiler options for jax.jit: on CPU, LLVM at -O1, which compiles in 0.5 to 0.75 of the time.

    The programs of the main job then run as fast as at the default -O3 (and 2.5 times as fast as at -O0). A level in
    XLA_FLAGS is left as it is: tests compile more than they run.
    """
    name = "xla_backend_optimization_level"
    return {name: 1} if jax.default_backend() == "cpu" and name not in os.environ.get("XLA_FLAGS", "") else {}
