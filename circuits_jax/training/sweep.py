"""Many runs as one program: seeds and hyperparameters, on every device of every host, in resumable pieces."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params, init_params
from circuits_jax.training import checkpoints
from circuits_jax.training.layout import EVERYWHERE, SPLIT, filled, free_bytes, get, least, over_runs, pad, put
from circuits_jax.training.setting import Leaves, Setting, columns
from circuits_jax.training.train import Measure, Run, TrainState, advance, init_state

CHUNK = 10  # measurements between two checkpoints, where their measurements are not large
CHUNK_BYTES = 2**28  # that the measurements of one chunk may take, all runs of a group together


class OnMeasured(Protocol):
    """Takes what was measured: runs and steps as slices into those of the sweep, arrays [runs, steps, ...]."""

    def __call__(self, runs: slice, steps: slice, loss: np.ndarray, measurements: dict[str, np.ndarray]) -> None:
        """Called again with the same values where a sweep is resumed."""


class OnProgress(Protocol):
    """Takes how far a sweep is."""

    def __call__(self, n_finished: int, n_training: int, step: int, loaded: bool) -> None:
        """Runs that are finished, runs in the group that is being trained, updates that these have had.

        loaded: whether a checkpoint says so; otherwise it was trained just now.
        """


def sweep(
    config: TransformerConfig,
    settings: Sequence[Setting],
    steps: Sequence[int],
    measure: Measure,
    folder: Path | None = None,
    keep: Sequence[int] = (),
    runs_at_once: int | None = None,
    chunk: int | None = None,
    on_measured: OnMeasured = lambda runs, steps, loss, measurements: None,
    on_progress: OnProgress = lambda n_finished, n_training, step, loaded: None,
) -> Run:
    """Trains one run for each setting. Runs never see each other, so one that diverges leaves the others alone.

    What differs between the settings becomes an axis of one compiled program; what they share is not repeated. With
    jax.distributed every process calls this with the same arguments, trains a share of the runs and gets the whole
    result; folder is then one that all of them see.

    Args:
        config: of all runs; for the same config, measure and shapes the program is compiled once.
        settings: distinct, of one structure; see setting.grid.
        steps: rising numbers of updates after which to measure; the last ends the training.
        measure: as in train.train.
        folder: where to keep checkpoints. If it holds some of this sweep, training goes on from the last of them,
            also on another number of devices; the result is that of an uninterrupted sweep to float tolerance. One of
            another sweep is refused.
        keep: some of the steps, at which the parameters of all runs are kept for good: see kept_params.
        runs_at_once: runs in a group at most; groups are trained one after the other. As many as fit into memory when
            left out, usually all. A sweep that is gone on with keeps the groups it has.
        chunk: measurements between two checkpoints (and two calls of the callbacks); CHUNK when left out, or fewer
            where they are large.
        on_measured: gets the measurements as they come.
        on_progress: told how far the sweep is.

    Returns:
        Run with S in front of params, loss and measurements, as NumPy arrays.

    Raises:
        ValueError: bad settings or steps.
        checkpoints.CheckpointError: a checkpoint cannot be written or read.
    """
    own, common, structure = columns(settings)
    _check(steps, keep, folder, runs_at_once, chunk)
    initialise, train_on = _programs(config, measure, structure)
    first = {number: column[:1] for number, column in own.items()}
    record = _record_shapes(initialise, train_on, first, common)
    record_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(record))
    size = _group_size(folder)
    if size is None:
        at_once = runs_at_once or _runs_that_fit(initialise, train_on, own, common, chunk or CHUNK, record_bytes)
        n_groups = math.ceil(len(settings) / at_once)
        size = math.ceil(len(settings) / n_groups)
    plan = _Plan(
        initialise, train_on, common, record, [int(step) for step in steps], set(keep),
        chunk or int(np.clip(CHUNK_BYTES // max(1, size * record_bytes), 1, CHUNK)), filled(size),
        owner={
            "seeds": [int(setting.seed) for setting in settings], "steps": [int(step) for step in steps],
            "config": repr(config), "settings": _digest(own, common, structure),
            **({"keep": sorted({int(step) for step in keep})} if len(keep) else {}),
            "measurements": {name: list(x.shape) for name, x in sorted(record[1].items())},
        },
    )  # fmt: skip

    groups = [slice(start, min(start + size, len(settings))) for start in range(0, len(settings), size)]
    _refuse_other_groups(folder, groups)
    parts = []
    for runs in groups:

        def report(part: slice, records: Any, loaded: bool, runs: slice = runs) -> None:
            loss, measurements = jax.tree.map(lambda x: x[:, part], records)
            on_measured(runs, part, loss, measurements)
            finished = part.stop == len(plan.steps)
            n_training = 0 if finished else runs.stop - runs.start
            on_progress(runs.stop if finished else runs.start, n_training, plan.steps[part.stop - 1], loaded)

        of_group = {number: pad(column[runs], plan.size) for number, column in own.items()}
        place = None if folder is None else folder / _name(runs)
        parts.append(_train_group(plan, of_group, runs.stop - runs.start, place, report))
    params, (loss, measurements) = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return Run(params, np.asarray(plan.steps), loss, measurements)


def kept_params(config: TransformerConfig, folder: Path, step: int) -> Params:
    """The parameters of all runs at a step that a sweep into this folder was told to keep, with S in front.

    Raises:
        checkpoints.CheckpointError: there are none, or they cannot be read.
    """
    groups = _groups_in(folder)
    if not groups:
        raise checkpoints.CheckpointError(f"{folder} holds no checkpoints of a sweep")
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def of_group(runs: slice) -> Params:
        n_runs = runs.stop - runs.start
        like = {"params": jax.tree.map(lambda x: np.zeros((n_runs, *x.shape), x.dtype), shapes)}
        kept = checkpoints.load(folder / _name(runs) / "kept", int(step), like, {"config": repr(config)})
        return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(kept))

    return jax.tree.map(lambda *x: np.concatenate(x), *map(of_group, groups))


def kept_steps(folder: Path) -> list[int]:
    """The steps of which kept_params has parameters, rising."""
    of_groups = [set(checkpoints.steps(folder / _name(runs) / "kept")) for runs in _groups_in(folder)]
    return sorted(set.intersection(*of_groups)) if of_groups else []


def _name(runs: slice) -> str:
    """Of the folder of a group."""
    return f"runs_{runs.start}_to_{runs.stop - 1}"


def _groups_in(folder: Path | None) -> list[slice]:
    """The groups that have a folder, in order."""
    names = [] if folder is None else [path.name.split("_")[1::2] for path in folder.glob("runs_*_to_*")]
    return sorted((slice(int(first), int(last) + 1) for first, last in names), key=lambda runs: runs.start)


def _group_size(folder: Path | None) -> int | None:
    """Runs of a group of the sweep that is in the folder: whoever goes on with it keeps its groups."""
    there = _groups_in(folder)
    return there[0].stop if there and there[0].start == 0 else None


def _refuse_other_groups(folder: Path | None, groups: list[slice]) -> None:
    if strangers := [_name(runs) for runs in _groups_in(folder) if runs not in groups]:
        raise checkpoints.CheckpointError(
            f"{folder} holds another sweep ({', '.join(strangers)}): use another folder or delete it"
        )


def _check(
    steps: Sequence[int], keep: Sequence[int], folder: Path | None, runs_at_once: int | None, chunk: int | None
) -> None:
    if not len(steps) or steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"steps must be rising and not negative; got {list(steps)}")
    if not set(keep) <= set(steps):
        raise ValueError(f"keep must be some of the steps; {sorted(set(keep) - set(steps))} are not")
    if len(keep) and folder is None:
        raise ValueError("keep needs a folder to keep parameters in; got none")
    for name, value in (("runs_at_once", runs_at_once), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def _digest(own: Leaves, common: Leaves, structure: Any) -> str:
    """Tells one set of settings from another."""
    found = hashlib.sha256(str(structure).encode())
    for number, array in sorted((own | common).items()):
        found.update(f"{number} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def _record_shapes(initialise: Any, train_on: Any, own: Leaves, common: Leaves) -> Any:
    """Shapes of what is measured of one run at one step, (loss, measurements)."""
    own = {number: pad(column, filled(1)) for number, column in own.items()}
    states = jax.eval_shape(initialise, own, (common,))
    found = jax.eval_shape(train_on, (own, states), (common, np.int32(0), np.zeros(1, np.int32)))[1]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), found)


def _runs_that_fit(initialise: Any, train_on: Any, own: Leaves, common: Leaves, chunk: int, record_bytes: int) -> int:
    """Runs of one group, all if half of the memory that is free holds them; of several processes the smallest answer.

    A CPU takes runs in turn, so each needs its state and measurements (twice: before and after a chunk), and only one
    of them activations. Accelerators hold everything of all of them: what the compiled program says it takes.
    """
    n_runs = len(own[0])
    if jax.default_backend() == "cpu":
        states = jax.eval_shape(initialise, {k: pad(v[:1], filled(1)) for k, v in own.items()}, (common,))
        state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states)) // filled(1)
        needed = 2 * (state_bytes + chunk * record_bytes) * n_runs
    else:
        padded = {number: pad(column, filled(n_runs)) for number, column in own.items()}
        states = jax.eval_shape(initialise, padded, (common,))
        stops = np.zeros(chunk, np.int32)
        program = train_on.lower((padded, states), (common, np.int32(0), stops)).compile().memory_analysis()
        needed = program.temp_size_in_bytes + program.argument_size_in_bytes + program.output_size_in_bytes
    return least(max(1, min(n_runs, int(n_runs * free_bytes() / 2 / needed))))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What all groups of runs share.

    Attributes:
        initialise, train_on: the compiled programs, see _programs.
        common: the leaves of Setting that all runs share, by number.
        record: shapes of what is measured of one run at one step.
        steps, keep, chunk, owner: as in sweep.
        size: runs of a group, filled up to a multiple of the devices.
    """

    initialise: Any
    train_on: Any
    common: Leaves
    record: Any
    steps: list[int]
    keep: set[int]
    chunk: int
    size: int
    owner: dict[str, Any]

    def chunks(self, reached: int) -> Iterator[slice]:
        """What to measure in one call each, from measurement number `reached` on: a step to keep ends a chunk."""
        while reached < len(self.steps):
            stops = self.steps[reached : reached + self.chunk]
            kept = (i + 1 for i, stop in enumerate(stops) if stop in self.keep)
            part = slice(reached, reached + next(kept, len(stops)))
            yield part
            reached = part.stop


def _train_group(
    plan: _Plan, own: Leaves, n_runs: int, folder: Path | None, report: Callable[[slice, Any, bool], None]
) -> tuple[Params, Any]:
    """Trains or resumes the first n_runs of `own`: (params, (loss, measurements)) with these runs in front."""
    own, common = put(own, SPLIT), put(plan.common, EVERYWHERE)
    states = plan.initialise(own, (common,))
    records = jax.tree.map(lambda x: np.zeros((n_runs, len(plan.steps), *x.shape), x.dtype), plan.record)
    reached = 0
    if folder is not None and (saved := checkpoints.steps(folder / "resume")):
        like = {"states": get(states, n_runs), "records": records}
        loaded = checkpoints.load(folder / "resume", saved[-1], like, plan.owner)
        # A checkpoint returns its own kinds of nodes; the arrays come in the order of `like`.
        states, records = (
            jax.tree.unflatten(jax.tree.structure(whole), jax.tree.leaves(loaded[name]))
            for name, whole in (("states", states), ("records", records))
        )
        states = put(pad(states, plan.size), SPLIT)
        reached = plan.steps.index(saved[-1]) + 1
        report(slice(0, reached), records, True)

    for part in plan.chunks(reached):
        stops = plan.steps[part]
        start = plan.steps[part.start - 1] if part.start else 0
        of_chunk = np.asarray(stops + [-1] * (plan.chunk - len(stops)), np.int32)  # one shape, so one compilation
        states, new = plan.train_on((own, states), (common, np.int32(start), of_chunk))
        for whole, found in zip(jax.tree.leaves(records), jax.tree.leaves(get(new, n_runs)), strict=True):
            whole[:, part] = found[:, : len(stops)]
        if folder is not None:
            trimmed = get(states, n_runs)
            if stops[-1] in plan.keep:
                of_model = {"config": plan.owner["config"]}
                checkpoints.save(folder / "kept", stops[-1], {"params": trimmed.params}, of_model)
            state = {"states": trimmed, "records": records}
            checkpoints.save(folder / "resume", stops[-1], state, plan.owner, n_kept=2)
        report(part, records, False)
    return get(states.params, n_runs), records


@lru_cache(maxsize=8)
def _programs(config: TransformerConfig, measure: Measure, structure: Any) -> tuple[Any, Any]:
    """(initialise, train_on), both compiled once for each split of a setting's leaves into own and common ones."""

    def setting(own: Leaves, common: Leaves) -> Setting:
        leaves = own | common
        return jax.tree.unflatten(structure, [leaves[i] for i in range(len(leaves))])

    def initialise(own: Leaves, common: Leaves) -> TrainState:
        return init_state(config, setting(own, common))

    def train_on(run: tuple[Leaves, TrainState], common: Leaves, start: Array, stops: Array) -> Any:
        own, state = run
        return advance(config, measure, setting(own, common), state, start, stops)

    return over_runs(initialise), over_runs(train_on)
