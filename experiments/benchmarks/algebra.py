"""How fast, how lean and how exact is the algebra of circuits, against TransformerLens, PyTorch and NumPy?

    python experiments/benchmarks/algebra.py               the table, about 15 minutes on two CPU cores
    python experiments/benchmarks/algebra.py --no-memory   without the peak memory of each, about 6 minutes
    python experiments/benchmarks/algebra.py --llama       composition and spectra of a Llama-8B shape, 10 minutes
    python experiments/benchmarks/algebra.py --smoke       a quick check that everything runs

Random weights of GPT-2 small's shape (12 x 12 heads, D 768, K 64, V 50257), the same for all. PyTorch and
TransformerLens (4.3 or newer) are optional: pip install torch transformer-lens; a missing one is left out. In every
round each contender does the task once, in rotating order; medians over rounds, in one process. Each does it in the
fastest way that could be found: all ways of algebra_contenders.py are tried, the fastest is timed and named.
TransformerLens takes token space head by head, on a subset of heads (--token-space-heads); its time is scaled up to
all heads and marked with *.

Peak memory is taken in a process of its own: the peak of the resident set (on a GPU, of the device's allocator) minus
what was there when weights were made and programs compiled. Fraction of peak: useful operations, by the formulas of
algebra_tasks.py, over time and the fastest float32 matmul found in this process. Errors are against float64 NumPy: the
largest of a head, relative to its largest value, averaged over heads (the worst head is in summary.json). Intervals
are the smallest and largest of the rounds. Aims are for two CPU cores.

Expect on two shared CPU cores, against TransformerLens: composition 17 times faster in 1/200 of the memory at 0.67 of
peak, full-OV eigenvalues 44 times at 0.70, singular values 6 times, U, S, V 2 to 3 times. Eigenvalues of random heads
differ from its by up to 3e-5; its own float32 error is up to 2e-5. PyTorch and NumPy are faster where K x K
factorisations dominate, because these ways run them on both cores.

Writes runs/<name>/: config.json, measurements.json (every round, every way) and summary.json.
"""

import os

import numpy as np  # before the next line, so that NumPy's own OpenBLAS keeps all cores ...

# ... and SciPy's copy of it, through which jaxlib calls LAPACK, gets one: its threads would fight with those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others share the GPU

import contextlib
import ctypes
import dataclasses
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import algebra_accuracy as accuracy
import algebra_contenders as contenders
import algebra_tasks as tasks
import jax
import jax.numpy as jnp
import tyro
from algebra_contenders import Contender
from algebra_tasks import Shape
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import circuits_jax as cj
from circuits_jax.reports import run_folder
from circuits_jax.reports.run_folder import Figure

OURS, LENS = "circuits_jax", "transformer_lens"
PAUSE = 0.1  # seconds, in which the spinning threads of the contender before go to sleep
ORACLE_HEADS = 12  # where the oracle is slow; elsewhere all
LLAMA = (32, 32, 8, 4096, 128)  # L, H, G, D, K
TINY_LLAMA = (3, 4, 2, 32, 8)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    repeats: int = 5
    """Rounds of each task."""
    seed: int = 0
    """Of the weights."""
    memory: bool = True
    """Whether to measure peak memory, in one process for each task and contender."""
    token_space_heads: int = 6
    """Heads that TransformerLens does in token space, where it takes them one by one."""
    llama: bool = False
    """Instead of the table: composition and spectra of a Llama-8B shape in bfloat16, with time and peak memory."""
    smoke: bool = False
    """Tiny shapes, one round, in a folder of their own: does everything run?"""
    name: str = ""
    """Of the run folder; algebra_benchmark, with _llama and _smoke, when left out."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where run folders are."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one contender needed for one task, and what came out."""

    way: str
    seconds_of_ways: dict[str, float]
    seconds: list[float]  # of each round, for all heads
    heads: list[int]  # that were done
    outcome: contenders.Outcome
    memory: float = float("nan")  # bytes

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def prepare(settings: Settings) -> Settings:
    """Raises ValueError for settings that make no sense."""
    if settings.smoke:
        settings = dataclasses.replace(settings, repeats=1, token_space_heads=2)
    for field in ("repeats", "token_space_heads"):
        if getattr(settings, field) < 1:
            raise ValueError(f"{field} must be at least 1; got {getattr(settings, field)}")
    name = settings.name or "algebra_benchmark" + "_llama" * settings.llama + "_smoke" * settings.smoke
    if Path(name).name != name or name in (".", ".."):
        raise ValueError(f"--name must be a plain folder name; got {name!r}; --runs-dir says where it goes")
    return dataclasses.replace(settings, name=name)


def main(settings: Settings) -> None:
    """Measures, prints the table and writes the run folder."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    folder = settings.runs_dir / settings.name
    run_folder.open_run(folder, {k: v for k, v in dataclasses.asdict(settings).items() if k != "runs_dir"})
    columns = (SpinnerColumn(), TextColumn("{task.description:<48}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        figures = (llama if settings.llama else compare)(settings, folder, progress)
    run_folder.write_summary(folder, figures)
    table = Table("figure with an aim", "value", "aim", "met")
    for figure in figures.values():
        if figure.aim is not None:
            table.add_row(figure.text, f"{figure.value:.3g}", figure.aim_text, "yes" if figure.met else "no")
    console.print(table if table.row_count else "No aims at this shape or on this device.")
    console.print(f"summary: {folder / 'summary.json'}", soft_wrap=True)


def compare(settings: Settings, folder: Path, progress: Progress) -> dict[str, Figure]:
    """All tasks by all contenders; prints the table and writes measurements.json."""
    shape = tasks.TINY if settings.smoke else tasks.GPT2_SMALL
    weights = tasks.random_weights(shape, settings.seed)
    rivals = enter(weights, settings, progress.console)
    peaks = matmul_peaks(rivals, settings)
    bar = progress.add_task("", total=len(tasks.TASKS) * (settings.repeats + 2))
    measured: dict[str, dict[str, Measured]] = {}
    for task in tasks.TASKS:
        measured[task] = measure(task, settings, shape, rivals, progress, bar)
        if settings.memory and not (settings.smoke and task != "composition"):
            for name, result in measured[task].items():
                progress.update(bar, description=f"{task}: memory of {name}")
                memory = memory_of(settings, shape, task, name, result.way)
                measured[task][name] = dataclasses.replace(result, memory=memory)
        progress.advance(bar)
    peaks = {name: max(peak, peaks[name]) for name, peak in matmul_peaks(rivals, settings).items()}
    matmul_part = fastest(contenders.CircuitsJax(weights).matmul_part(), settings)
    figures = summarise(settings, shape, weights, measured, peaks, matmul_part)

    def plain(result: Measured) -> dict[str, Any]:
        return {field: value for field, value in vars(result).items() if field != "outcome"}

    run_folder.write_json(
        folder / "measurements.json",
        {
            "matmul_peaks": peaks,
            "full_ov_products_seconds": matmul_part,
            "tasks": {task: {name: plain(x) for name, x in results.items()} for task, results in measured.items()},
        },
    )
    progress.console.print(f"float32 matmul, GFLOP/s: {', '.join(f'{k} {v / 1e9:.0f}' for k, v in peaks.items())}")
    progress.console.print(main_table(measured, figures))
    return figures


MAKERS: dict[str, Callable[[cj.CircuitWeights, Settings], Contender]] = {
    OURS: lambda weights, _: contenders.CircuitsJax(weights),
    "numpy": lambda weights, _: contenders.Numpy(weights),
    "torch": lambda weights, _: contenders.Torch(weights),
    LENS: lambda weights, settings: contenders.TransformerLens(weights, settings.token_space_heads),
    "jnp.linalg.eigvals": lambda weights, _: contenders.JaxSolver(weights),
}


def enter(weights: cj.CircuitWeights, settings: Settings, console: Console) -> list[Contender]:
    """The contenders that can run here; a line on the console for each that cannot."""
    entrants = []
    for name, make in MAKERS.items():
        try:
            entrants.append(make(weights, settings))
        except (ImportError, RuntimeError, AssertionError) as error:  # not installed, too old, or built without CUDA
            console.print(f"{name} is left out: {error}", soft_wrap=True)
    return entrants


def timed(run: Callable[[], Any], settings: Settings) -> tuple[float, Any]:
    """Seconds, and what was returned."""
    time.sleep(0 if settings.smoke else PAUSE)
    start = time.perf_counter()
    value = run()
    return time.perf_counter() - start, value


def fastest(run: Callable[[], Any], settings: Settings) -> float:
    """Seconds: the best of three, after one to warm up."""
    run()
    return min(timed(run, settings)[0] for _ in range(1 if settings.smoke else 3))


def matmul_peaks(rivals: list[Contender], settings: Settings) -> dict[str, float]:
    """Float32 matmul, operations per second, at the best of a few sizes: of JAX, NumPy and, where it runs, PyTorch."""
    sizes = (256,) if settings.smoke else (1024, 2048, 4096) if jax.default_backend() == "cpu" else (4096, 8192)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest"))
    peaks: dict[str, float] = {}
    for size in sizes:
        a = jax.random.normal(jax.random.key(0), (size, size))
        b = np.asarray(a)
        runs: dict[str, Callable[[], Any]] = {
            "jax": lambda a=a: jax.block_until_ready(product(a)),  # type: ignore[misc]
            "numpy": partial(np.matmul, b, b),
        }
        for rival in rivals:
            if isinstance(rival, contenders.Torch):
                c = rival.xp.from_dlpack(a)
                runs["torch"] = partial(contenders.wait_for, rival.xp, partial(rival.xp.matmul, c, c))
        for name, run in runs.items():
            peaks[name] = max(peaks.get(name, 0.0), 2 * size**3 / fastest(run, settings))
    return peaks


def measure(
    task: str, settings: Settings, shape: Shape, rivals: list[Contender], progress: Progress, bar: Any
) -> dict[str, Measured]:
    """One task by all contenders: first which way is the fastest for each, then the rounds."""
    progress.update(bar, description=f"{task}: which way?")
    runs: dict[str, Callable[[], Any]] = {}
    chosen: dict[str, str] = {}
    seconds_of_ways: dict[str, dict[str, float]] = {}
    for rival in rivals:
        if ways := rival.formulations(task):
            try_out = fastest if len(ways) > 1 else lambda run, settings: timed(run, settings)[0]
            scale = shape.all_heads / len(rival.heads(task))
            seconds = {way: try_out(run, settings) * scale for way, run in ways.items()}
            chosen[rival.name] = way = min(seconds, key=seconds.__getitem__)
            runs[rival.name], seconds_of_ways[rival.name] = ways[way], seconds
    progress.advance(bar)

    here = [rival for rival in rivals if rival.name in runs]
    rounds: dict[str, list[float]] = {rival.name: [] for rival in here}
    outcomes: dict[str, contenders.Outcome] = {}
    for index in range(settings.repeats):
        progress.update(bar, description=f"{task}: round {index + 1}")
        for rival in here[index % len(here) :] + here[: index % len(here)]:
            spent, value = timed(runs[rival.name], settings)
            rounds[rival.name].append(spent * shape.all_heads / len(rival.heads(task)))
            outcomes[rival.name] = rival.outcome(task, value)
            del value
            gc.collect()
        progress.advance(bar)
    return {
        rival.name: Measured(chosen[rival.name], seconds_of_ways[rival.name], rounds[rival.name],
                             list(rival.heads(task)), outcomes[rival.name])
        for rival in here
    }  # fmt: skip


def memory_of(settings: Settings, shape: Shape, task: str, name: str, way: str) -> float:
    """Bytes that the task takes at its peak beyond the weights, in a process of its own; NaN if that dies."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(peak_memory, settings, shape, task, name, way).result()
        except BrokenProcessPool:
            return float("nan")


def peak_memory(settings: Settings, shape: Shape, task: str, name: str, way: str) -> float:
    """The same, in this process."""
    # First a small one, so that libraries have loaded what they load late.
    MAKERS[name](tasks.random_weights(tasks.TINY, settings.seed), settings).formulations(task)[way]()
    weights = tasks.random_weights(shape, settings.seed)
    run = MAKERS[name](weights, settings).formulations(task)[way]
    gc.collect()
    if jax.default_backend() == "gpu" and name in (OURS, "jnp.linalg.eigvals"):
        run()
        device = jax.devices()[0].memory_stats() or {}
        return float(device["peak_bytes_in_use"] - sum(x.nbytes for x in jax.tree.leaves(weights)))
    if jax.default_backend() == "gpu" and name != "numpy":
        run()
        return float(sys.modules["torch"].cuda.max_memory_allocated())  # where the weights, JAX's own, are not
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed when weights were made would hide a part
    before = resident("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    run()
    return max(resident("VmHWM") - before, float(resource.getpagesize()))


def resident(field: str) -> float:
    """Bytes of this process in memory: VmRSS now, VmHWM at the peak. Elsewhere than on Linux always at the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def summarise(
    settings: Settings, shape: Shape, weights: cj.CircuitWeights, measured: dict[str, dict[str, Measured]],
    peaks: dict[str, float], matmul_part: float,
) -> dict[str, Figure]:  # fmt: skip
    """All figures, with aims only where they were made for."""
    with_aims = not settings.smoke and jax.default_backend() == "cpu"
    figures: dict[str, Figure] = {}

    def note(name: str, value: float, sign: str = "", bound: float | None = None, rounds: Any = ()) -> None:
        interval = (min(rounds), max(rounds)) if rounds else None
        figures[name] = Figure(name, value, interval, (sign, bound) if with_aims and bound is not None else None)

    for name, peak in peaks.items():
        note(f"matmul_peak.{name}", peak)
    for task, results in measured.items():
        ours, flops = results[OURS], tasks.FLOPS[task](shape)
        heads = results[LENS].heads if LENS in results else ours.heads
        if task.startswith("full_") or task.endswith("svd") or task == "composition":
            heads = [heads[i] for i in np.unique(np.linspace(0, len(heads) - 1, ORACLE_HEADS).astype(int))]
        truth = accuracy.oracle(task, weights, heads)
        errors = {name: accuracy.errors(task, x.outcome, x.heads, truth, heads, weights) for name, x in results.items()}
        of_peak = [flops / seconds / peaks["jax"] for seconds in ours.seconds]
        note(f"{task}.fraction_of_peak", statistics.median(of_peak), ">=", tasks.FRACTION_OF_PEAK.get(task), of_peak)
        for name, result in results.items():
            note(f"{task}.seconds.{name}", result.median, rounds=result.seconds)
            note(f"{task}.memory_mib.{name}", result.memory / 2**20)
            note(f"{task}.error.{name}", errors[name].mean())
            note(f"{task}.worst_error.{name}", errors[name].max())
            if name == OURS:
                continue
            lens = name == LENS
            ratios = [theirs / mine for theirs, mine in zip(result.seconds, ours.seconds, strict=True)]
            bound: float | None = tasks.TIMES_FASTER_THAN_TRANSFORMER_LENS.get(task) if lens else None
            bound = tasks.TIME_OF_TORCH.get(task) if name == "torch" else bound
            note(f"{task}.time_ratio.{name}", result.median / ours.median, ">=", bound, ratios)
            bound = tasks.TIMES_LEANER_THAN_TRANSFORMER_LENS.get(task) if lens and settings.memory else None
            note(f"{task}.memory_ratio.{name}", result.memory / ours.memory, ">=", bound)
            gap = accuracy.difference(task, ours.outcome, result.outcome, result.heads)
            note(f"{task}.difference.{name}", gap, "<=", 1e-5 if lens else None)
            note(f"{task}.error_ratio.{name}", errors[OURS].mean() / errors[name].mean(), "<=", 1.0 if lens else None)
    note("full_ov_eigenvalues.fraction_of_peak_of_products", tasks.full_ov_products(shape) / matmul_part / peaks["jax"])
    return figures


def main_table(measured: dict[str, dict[str, Measured]], figures: dict[str, Figure]) -> Table:
    """One row a task: our time, memory and error, and each contender's time and memory as multiples of ours."""
    names = list(dict.fromkeys(name for results in measured.values() for name in results))
    title = "Time and memory of others over ours; *: scaled up from a subset of heads"
    table = Table("task", *names, title=title, title_justify="left", show_lines=True)
    for task, results in measured.items():
        cells = []
        for name in names:
            if name not in results:
                cells.append("")
                continue
            of = lambda what, task=task, name=name: figures[f"{task}.{what}.{name}"].value  # noqa: E731
            if name == OURS:
                share = figures[f"{task}.fraction_of_peak"].value
                time_, memory, way = (
                    f"{1e3 * of('seconds'):.1f} ms",
                    f"{of('memory_mib'):.0f} MiB",
                    f"{share:.0%} of peak",
                )
            else:
                scaled = "*" * (len(results[name].heads) < len(results[OURS].heads))
                time_, memory = f"{of('time_ratio'):.2f} x{scaled}", f"memory {of('memory_ratio'):.1f} x"
                way = results[name].way
            memory = "" if np.isnan(results[name].memory) else f", {memory}"
            cells.append(f"{time_}{memory}\n{f'{way}, ' * bool(way)}error {of('error'):.0e}")
        table.add_row(task, *cells)
    return table


def llama(settings: Settings, folder: Path, progress: Progress) -> dict[str, Figure]:
    """Grouped-query weights in bfloat16, made layer by layer: singular values of each layer, composition of all."""
    n_layers, n_heads, n_groups, d, k = TINY_LLAMA if settings.smoke else LLAMA
    shapes = {"W_Q": (n_heads, d, k), "W_K": (n_groups, d, k), "W_V": (n_groups, d, k), "W_O": (n_heads, k, d)}

    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        def of_layer(key: jax.Array) -> jax.Array:
            return (jax.random.normal(key, shape) / np.sqrt(d)).astype(jnp.bfloat16)

        return jax.jit(lambda key: jax.lax.map(of_layer, jax.random.split(key, n_layers)))(key)

    @jax.jit
    def spectra(weights: cj.CircuitWeights, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = {name: getattr(weights, name)[layer][None].astype(jnp.float32) for name in shapes}
        here = dataclasses.replace(weights, **one)
        return cj.ov(here).singular_values(), cj.qk(here).singular_values()

    bar = progress.add_task("weights", total=len(shapes))
    keys = jax.random.split(jax.random.key(settings.seed, impl="rbg"), len(shapes))
    arrays = {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True):
        arrays[name] = jax.block_until_ready(normal(key, shape))
        progress.advance(bar)
    none = jnp.zeros((1, d), jnp.bfloat16)
    weights = cj.CircuitWeights(W_E=none, W_U=none.T, n_context=8, positions="none", **arrays)

    found, seconds = [], {}
    bar, start = progress.add_task("singular values of OV and QK", total=n_layers), time.perf_counter()
    for layer in range(n_layers):
        found += jax.block_until_ready(spectra(weights, jnp.int32(layer)))
        progress.advance(bar)
    seconds["spectra"] = time.perf_counter() - start
    bar, start = progress.add_task("composition of all pairs", total=None), time.perf_counter()
    found += jax.tree.leaves(jax.block_until_ready(jax.jit(cj.composition_scores)(weights)))
    seconds["composition"] = time.perf_counter() - start
    progress.update(bar, total=1, completed=1)
    finite = float(all(bool(jnp.isfinite(x).all()) for x in found))
    return {
        "spectra_seconds": Figure("seconds of all singular values, with compilation", seconds["spectra"]),
        "composition_seconds": Figure("seconds of composition, with compilation", seconds["composition"]),
        "peak_gb": Figure("peak resident memory of the process, GB", resident("VmHWM") / 1e9, aim=("<=", 12.0)),
        "all_finite": Figure("all numbers are finite", finite, aim=(">=", 1.0)),
    }


if __name__ == "__main__":
    run_folder.run_command(lambda: prepare(tyro.cli(Settings, description=__doc__)), main)
