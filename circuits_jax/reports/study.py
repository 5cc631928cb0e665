"""What experiments that train have in common: their settings, arms, sweeps, and what they write."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console

from circuits_jax.models.config import TransformerConfig
from circuits_jax.reports import page, results, run_folder
from circuits_jax.reports.console import SweepProgress, print_table, sweep_bar
from circuits_jax.reports.run_folder import Figure, figure_table
from circuits_jax.training import devices
from circuits_jax.training.setting import Setting, columns
from circuits_jax.training.sweep import sweep
from circuits_jax.training.train import Measure, Run

EVALUATION_SEED = 2**31 - 1  # data of a run never comes from this key, nor from the next: seeds of runs are smaller
TASK_SEED = 2**31 - 2  # of what tasks themselves draw: graphs, bigrams, classes; fold_in the seed of a run


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """What every study asks; its own settings are a subclass with other defaults and more fields."""

    seeds: int = 32
    """Number of runs of each arm."""
    first_seed: int = 0
    """The runs are first_seed, first_seed + 1, ... A seed gives the same run in every sweep."""
    steps: int = 500
    """Updates of each run."""
    measure_every: int = 10
    """Updates between two measurements."""
    smoke: bool = False
    """A few runs and updates, in a folder of their own: does everything run?"""
    name: str = ""
    """Of the run folder; that of the experiment, with _smoke for --smoke, when left out."""
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where run folders are."""

    @property
    def seed_range(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def measured(self) -> list[int]:
        """The steps after which to measure."""
        return [*range(0, self.steps, self.measure_every), self.steps]


def prepare(settings: StudySettings, experiment: str, cells: int = 1) -> Path:
    """Checks what every study asks, sets jax up for it, and gives its run folder.

    Args:
        settings: of the study.
        experiment: names the folder where the settings do not.
        cells: settings of an arm that are trained with every seed.

    Raises:
        ValueError: settings that make no sense.
    """
    for name in ("seeds", "steps", "measure_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(settings, name)}")
    if settings.first_seed < 0 or settings.first_seed + settings.seeds > TASK_SEED:
        raise ValueError(
            f"--first-seed and the seeds after it must be in [0, 2^31 - 2); got {settings.seeds} seeds from "
            f"{settings.first_seed}"
        )
    name = settings.name or experiment + "_smoke" * settings.smoke
    run_folder.check_name(name)
    devices.join_processes()
    devices.use_all_cores(settings.seeds * cells)
    devices.keep_compilations()
    return settings.runs_dir / name


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs of one model on which the same is measured.

    Attributes:
        name: of the arm, and of its files.
        config: of its models.
        settings: of its runs.
        steps: after which to measure.
        measure: what is followed.
        dims: axes of the measurements that are not single numbers, such as {"attention": ("layer", "head")}.
        labels: {name: [S]} of what differs between its runs besides the seed.
        keep: steps at which to keep parameters, besides the last.

    Raises:
        ValueError: settings that no sweep can have.
    """

    name: str
    config: TransformerConfig
    settings: Sequence[Setting]
    steps: Sequence[int]
    measure: Measure
    dims: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keep: Sequence[int] = ()

    def __post_init__(self) -> None:
        columns(self.settings)


def recorded(settings: Any) -> dict[str, Any]:
    """The settings (a dataclass) that decide the results, as JSON values."""
    values = dataclasses.asdict(settings)
    for name in ("runs_dir", "name", "runs_at_once"):
        values.pop(name, None)

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return list(map(str, value))
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in values.items()}


def train_arms(
    console: Console,
    folder: Path,
    arms: Sequence[Arm],
    settings: StudySettings,
    runs_at_once: int | None = None,
) -> dict[str, Run]:
    """Trains or resumes every arm, with a progress bar; trajectories go to folder/trajectories/<arm>.zarr as they come.

    Args:
        console: to draw on.
        folder: of the study.
        arms: of different names.
        settings: of the study, kept beside the results; a folder with others is refused.
        runs_at_once: as in training.sweep.
    """
    if writes():
        run_folder.open_run(folder, recorded(settings))
    runs = {}
    with sweep_bar(console) as bar:
        for arm in arms:
            of_runs = {"seed": [int(setting.seed) for setting in arm.settings], **arm.labels}
            made_of = recorded(settings) | {"model": dataclasses.asdict(arm.config)}
            store = results.open_sweep(
                folder / "trajectories" / f"{arm.name}.zarr", arm.steps, of_runs, made_of, arm.dims
            )
            runs[arm.name] = sweep(
                arm.config, arm.settings, arm.steps, arm.measure,
                folder=folder / "checkpoints" / arm.name, keep=sorted({*arm.keep, arm.steps[-1]}),
                runs_at_once=runs_at_once,
                on_measured=store.write if writes() else lambda runs, steps, loss, measurements: None,
                on_progress=SweepProgress(bar, arm.name, len(arm.settings), arm.steps[-1]),
            )  # fmt: skip
            if writes():
                store.add({"diverged": runs[arm.name].diverged}, {"diverged": ("run",)})
    return runs


def finish(
    console: Console,
    folder: Path,
    title: str,
    figures: Mapping[str, Figure],
    sections: Sequence[tuple[str, Sequence[str]]],
    notes: Sequence[str] = (),
) -> None:
    """Writes summary.json and report.html, and prints the figures against their aims, the verdict and the notes.

    Args:
        console: to print on.
        folder: of the study.
        title: of the page.
        figures: the numbers.
        sections: of the page, after the figures.
        notes: what was asked, what came out, what a reader has to know besides.
    """
    if not writes():
        return
    run_folder.write_summary(folder, dict(figures))
    header, rows = figure_table(figures)
    missed = [figure.text for figure in figures.values() if figure.met is False]
    n_aims = sum(figure.aim is not None for figure in figures.values())
    verdict = f"{n_aims - len(missed)} of {n_aims} aims met" + (f"; missed: {'; '.join(missed)}" if missed else "")
    first = ("Figures", [*map(page.paragraph, notes), page.paragraph(verdict), page.table(header, rows)])
    run_folder.write_text(folder / "report.html", page.page(title, [first, *sections]))
    print_table(console, title, header, rows)
    for note in (verdict, *notes):
        console.print(note, soft_wrap=True)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def writes() -> bool:
    """Whether this process is the one of jax.distributed that writes and prints."""
    return jax.process_index() == 0


def sound(run: Run) -> np.ndarray:
    """Runs that can be judged: bool [S]."""
    return ~run.diverged
