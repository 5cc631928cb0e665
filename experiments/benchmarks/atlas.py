"""How long does the head atlas of a model of GPT-2 small's shape take from weights alone, and how much memory?

    python experiments/benchmarks/atlas.py            12 x 12 heads, D 768, MLPs, V 50257, random weights
    python experiments/benchmarks/atlas.py --smoke    a small model: does it run?

The model is examined once. Compiled programs are kept for the next run, so the first run shows the time and the memory
with compilation, the second one without. Prints the time of each part, and the peak memory of the process as a multiple
of the parameters (float32), Python and jax included.

AIM, in the second run: at most 60 s on two CPU cores, memory at most 3 times the parameters.
"""

import os

# Before jax is imported: the threads of OpenBLAS would spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import resource
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import init_params
from circuits_jax.reports import run_folder
from circuits_jax.reports.console import print_table
from circuits_jax.reports.head_evidence import examine
from circuits_jax.reports.run_folder import Figure, figure_table
from circuits_jax.training import devices

GPT2 = TransformerConfig(
    n_vocab=50257, n_context=1024, n_layers=12, n_heads=12, d_model=768, d_mlp=3072, norm="layer", bias=True, tied=True
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to time."""

    smoke: bool = False
    """A small model."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where run folders are."""


def main(settings: Settings) -> None:
    """Times the parts, prints the table and writes summary.json."""
    console = Console()
    devices.keep_compilations()
    devices.return_freed_memory()
    config = GPT2
    if settings.smoke:
        config = dataclasses.replace(
            GPT2, n_vocab=64, n_context=16, n_layers=2, n_heads=2, d_model=32, d_mlp=64, d_head=16
        )
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    # The list hands the parameters over: as in the atlas, nobody else keeps them.
    held = [jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), shapes)]
    size = 4 * sum(x.size for x in jax.tree.leaves(shapes))
    parts: list[tuple[str, float]] = []
    begin = time.perf_counter()
    examine(config, held.pop(), jax.random.key(1), on_part=lambda part: parts.append((part, time.perf_counter())))
    seconds = time.perf_counter() - begin
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends = [then for _, then in parts[1:]] + [begin + seconds]
    print_table(
        console, "Parts", ["part", "s"],
        [[part, f"{end - then:.1f}"] for (part, then), end in zip(parts, ends, strict=True)],
    )  # fmt: skip
    aims = not settings.smoke
    found = {
        "seconds": Figure("seconds", seconds, aim=("<=", 60.0) if aims else None),
        "memory": Figure(
            "peak memory of the process over the parameters", peak / size, aim=("<=", 3.0) if aims else None
        ),
    }
    print_table(console, f"Head atlas of {config.n_layers} x {config.n_heads} heads", *figure_table(found))
    folder = settings.runs_dir / ("benchmark_atlas" + "_smoke" * settings.smoke)
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_summary(folder, found)


if __name__ == "__main__":
    run_folder.run_command(lambda: tyro.cli(Settings, description=__doc__), main)
