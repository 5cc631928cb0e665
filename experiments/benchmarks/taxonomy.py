"""How long does it take to say what every head of a model is?

    python experiments/benchmarks/taxonomy.py            GPT-2-small shape, random weights: 12 x 12 heads, D 768
    python experiments/benchmarks/taxonomy.py --smoke    a small model: does it run?

One compiled program over all heads: evidence from weights with its null, then the same with activations on designed
inputs. Prints the time to compile, the median time of a run after that, and the peak memory of the process.
"""

import os

# Before jax is imported: the threads of OpenBLAS would spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console
from rich.table import Table

from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads.structure import structure
from circuits_jax.heads.taxonomy import evidence
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params, init_params
from circuits_jax.reports import run_folder


@dataclasses.dataclass(frozen=True)
class Settings:
    """The shape; the defaults are GPT-2 small without its MLPs, which are not looked at."""

    n_layers: int = 12
    """Layers."""
    n_heads: int = 12
    """Heads in each layer."""
    d_model: int = 768
    """Width of the residual stream."""
    n_vocab: int = 50257
    """Tokens in the vocabulary."""
    length: int = 32
    """Positions that heads are asked about."""
    repeats: int = 5
    """Timed runs."""
    smoke: bool = False
    """Two layers of two heads, one run."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where run folders are."""


def prepare(settings: Settings) -> tuple[Settings, TransformerConfig]:
    """Raises ValueError for settings that make no sense."""
    if settings.smoke:
        settings = dataclasses.replace(settings, n_layers=2, n_heads=2, d_model=32, n_vocab=64, repeats=1)
    if settings.repeats < 1:
        raise ValueError(f"--repeats must be at least 1; got {settings.repeats}")
    if settings.length < 8:
        raise ValueError(f"--length must be at least 8; got {settings.length}")
    config = TransformerConfig(
        n_vocab=settings.n_vocab, n_context=settings.length, n_layers=settings.n_layers, n_heads=settings.n_heads,
        d_model=settings.d_model, norm="layer", bias=True, tied=True,
    )  # fmt: skip
    return settings, config


def main(plan: tuple[Settings, TransformerConfig]) -> None:
    """Times both programs, prints the table and writes summary.json."""
    settings, config = plan
    params = jax.block_until_ready(jax.jit(lambda key: init_params(config, key))(jax.random.key(0)))
    queries = jnp.ones(settings.length, bool)

    def by_weights(params: Params, key: Array) -> Any:
        return structure(CircuitWeights.from_params(config, params), queries, key).evidence

    programs: dict[str, Callable[..., Any]] = {
        "weights": by_weights,
        "weights and activations": lambda params, key: evidence(config, params, queries, key),
    }
    folder = settings.runs_dir / ("taxonomy_benchmark" + "_smoke" * settings.smoke)
    kept = dataclasses.asdict(settings)
    del kept["runs_dir"]
    run_folder.open_run(folder, kept)
    table, figures = Table("evidence from", "compile, s", "run, s", "peak memory, GB"), {}
    for name, program in programs.items():
        start = time.perf_counter()
        compiled = jax.jit(program).lower(params, jax.random.key(0)).compile()
        compiling = time.perf_counter() - start
        times = []
        for number in range(settings.repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(params, jax.random.key(number)))
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        table.add_row(name, f"{compiling:.1f}", f"{np.median(times):.2f}", f"{peak:.1f}")
        figures[name.replace(" ", "_")] = run_folder.Figure(f"seconds for all heads, {name}", float(np.median(times)))
    run_folder.write_summary(folder, figures)
    Console().print(table)


if __name__ == "__main__":
    run_folder.run_command(lambda: prepare(tyro.cli(Settings, description=__doc__)), main)
