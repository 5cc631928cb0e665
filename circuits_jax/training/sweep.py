"""Many runs as one program: all seeds, on every device there is, in resumable chunks."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from circuits_jax.models.config import TransformerConfig
from circuits_jax.tasks.batch import Task
from circuits_jax.training import checkpoints
from circuits_jax.training.devices import quick_compilation
from circuits_jax.training.train import Measure, Optimization, Run, TrainState, advance, init_state


def sweep(
    config: TransformerConfig,
    optimization: Optimization,
    task: Task,
    seeds: Sequence[int],
    steps: Sequence[int],
    measure: Measure,
    folder: Path | None = None,
    chunk: int = 10,
    on_progress: Callable[[int], None] = lambda step: None,
) -> Run:
    """Trains one run for each seed. Runs never see each other, so one that diverges leaves the others alone.

    Args:
        config, optimization, measure: as in train.train; for the same three objects the program is compiled once.
        task: as in train.train; another task of the same static shape reuses the program.
        seeds: distinct integers in [0, 2^31).
        steps: rising numbers of updates after which to measure; the last ends the training.
        folder: where to keep checkpoints. If it holds some of this sweep, training goes on from the last of them;
            the result is that of an uninterrupted sweep to float tolerance. One of another sweep is refused.
        chunk: measurements between two checkpoints (and two calls of on_progress).
        on_progress: called with the number of updates done.

    Returns:
        Run with S in front of params, loss and measurements, as NumPy arrays.

    Raises:
        ValueError: bad seeds or steps.
        checkpoints.CheckpointError: a checkpoint cannot be written or read.
    """
    _check(seeds, steps)
    n_runs, steps = len(seeds), [int(step) for step in steps]
    initialise, train_on = _programs(config, optimization, measure)
    states: TrainState = initialise(_pad(np.asarray(seeds, np.int32)), ())
    of_chunk = train_on.eval_shape(states, (task, np.int32(0), np.zeros(chunk, np.int32)))[1]
    records = jax.tree.map(lambda x: np.zeros((n_runs, len(steps), *x.shape[2:]), x.dtype), of_chunk)

    owner: dict[str, Any] = {"seeds": [int(seed) for seed in seeds], "steps": steps}
    owner |= {"config": repr(config), "optimization": repr(optimization), "task": repr(task)}
    owner["measurements"] = {name: list(array.shape) for name, array in sorted(records[1].items())}

    reached = 0
    if folder is not None and (saved := checkpoints.steps(folder)):
        loaded = checkpoints.load(folder, saved[-1], {"states": _trim(states, n_runs), "records": records}, owner)
        states = jax.tree.unflatten(jax.tree.structure(states), jax.tree.leaves(_pad(loaded["states"])))
        records = jax.tree.unflatten(jax.tree.structure(records), jax.tree.leaves(loaded["records"]))
        reached = steps.index(saved[-1]) + 1
        on_progress(saved[-1])

    while reached < len(steps):
        stops = steps[reached : reached + chunk]
        start = steps[reached - 1] if reached else 0
        padded = np.asarray(stops + stops[-1:] * (chunk - len(stops)), np.int32)  # one shape, so one compilation
        states, new = train_on(states, (task, np.int32(start), padded))
        for whole, part in zip(jax.tree.leaves(records), jax.tree.leaves(new), strict=True):
            whole[:, reached : reached + len(stops)] = np.asarray(part)[:n_runs, : len(stops)]
        reached += len(stops)
        if folder is not None:
            checkpoints.save(folder, stops[-1], {"states": _trim(states, n_runs), "records": records}, owner)
        on_progress(stops[-1])

    loss, measurements = records
    return Run(_trim(states.params, n_runs), np.asarray(steps), loss, measurements)


def _check(seeds: Sequence[int], steps: Sequence[int]) -> None:
    if not len(seeds):
        raise ValueError("seeds must name at least one run; got none")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise ValueError(f"seeds must be distinct integers in [0, 2^31); got {list(seeds)}")
    if not len(steps) or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"steps must be rising and not negative; got {list(steps)}")


@lru_cache(maxsize=8)
def _programs(config: TransformerConfig, optimization: Optimization, measure: Measure) -> tuple[Any, Any]:
    def train_on(state: TrainState, task: Task, start: Array, stops: Array) -> Any:
        return advance(config, optimization, measure, task, state, start, stops)

    return over_runs(partial(init_state, config, optimization)), over_runs(train_on)


def over_runs(function: Callable[..., Any]) -> Any:
    """Jitted (runs, shared) -> function(run, *shared) for runs with S in front, a multiple of the device count.

    This is the one place that chooses the layout. Runs are split over the devices. An accelerator takes its runs as
    one batch (vmap). A CPU core is as busy with one run as with many, so it takes them in turn, and cores share the
    work as forced host devices; a run is then the same program alone and in any sweep.
    """
    mesh = jax.make_mesh((len(jax.devices()),), ("run",), axis_types=(AxisType.Auto,))

    def on_one_device(runs: Any, shared: tuple) -> Any:
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda run: function(run, *shared), runs)
        return jax.vmap(lambda run: function(run, *shared))(runs)

    split, everywhere = PartitionSpec("run"), PartitionSpec()
    return jax.jit(
        jax.shard_map(on_one_device, mesh=mesh, in_specs=(split, everywhere), out_specs=split, check_vma=False),
        compiler_options=quick_compilation(),
    )


def _pad(runs: Any) -> Any:
    """Repeats the last run until S is a multiple of the device count."""
    n_devices = len(jax.devices())
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], -len(x) % n_devices, axis=0)]), runs)


def _trim(runs: Any, n_runs: int) -> Any:
    """The first n_runs, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x)[:n_runs], runs)
