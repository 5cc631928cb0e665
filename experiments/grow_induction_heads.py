"""Do two-layer transformers grow induction heads, and do weights alone say which heads they are?

    python experiments/grow_induction_heads.py              8 seeds, under a minute on two CPU cores
    python experiments/grow_induction_heads.py --seeds 32   the figures of the README, one and a half minutes
    python experiments/grow_induction_heads.py --smoke      a quick check that everything runs

Trains small attention-only models on random-period repeats, over many seeds, with two controls: one-layer models, and
two-layer models trained on i.i.d. tokens. Then asks of every head whether it is a previous-token head or an induction
head, three times: by weights alone, by attention, and by causal effect (cut edges). No threshold sees the runs it
judges: by weights and attention the taxonomy says what a head is, with thresholds calibrated on planted heads; an edge
is causal when its cut lowers the receiver's own induction attention by more than 0.2, fixed before on other runs, and
the fall that weights predict is held against the same number.

Writes runs/<name>/: config.json, results.zarr, checkpoints/, summary.json and report.html, one page with the curves,
patterns, spectra, composition maps and verdicts. The same command resumes a run that was stopped.
"""

import os

# Before jax is imported: the threads of OpenBLAS would spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from jax import Array
from rich.console import Console

from circuits_jax.heads import evidence as head_evidence
from circuits_jax.heads import verdicts
from circuits_jax.models.config import Norm, TransformerConfig
from circuits_jax.models.transformer import Params, forward, init_params
from circuits_jax.reports import induction, page, results, run_folder, study
from circuits_jax.reports.console import parts_bar, print_table
from circuits_jax.tasks.batch import Batch, accuracy, next_token_loss, sample_batch
from circuits_jax.tasks.repeated_tokens import RepeatedTokens
from circuits_jax.training import devices
from circuits_jax.training.setting import Optimization, Setting
from circuits_jax.training.steps import dense_around, nearest
from circuits_jax.training.train import Run

DIMS = {
    f"{name}_{evidence}": ("layer", "head")
    for name in ("previous_token", "induction")
    for evidence in ("attention", "weights")
}


@dataclasses.dataclass(frozen=True)
class Settings(study.StudySettings):
    """What to train; the defaults are the main setting."""

    seeds: int = 8
    """Number of runs of each kind."""
    positions: Literal["shortformer", "learned", "rotary", "none"] = "shortformer"
    """How positions enter: shortformer adds them to the inputs of q and k only."""
    n_heads: int = 4
    """Heads in each layer."""
    d_model: int = 64
    """Width of the residual stream; a multiple of n_heads, unless d_head is given."""
    d_head: int = 0
    """Width of a head; 0 for d_model / n_heads."""
    d_mlp: int = 0
    """Width of the MLPs; 0 for attention-only models."""
    norm: Norm = "none"
    """Norm in front of each layer."""
    n_vocab: int = 32
    """Tokens in the vocabulary."""
    n_context: int = 24
    """Length of a sequence."""
    min_period: int = 6
    """Shortest period of the repeats."""
    max_period: int = 12
    """Longest period of the repeats."""
    batch_size: int = 32
    """Sequences of an update."""
    learning_rate: float = 1e-2
    """Of AdamW, after the warm-up."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    warmup: int = 50
    """Updates over which the learning rate rises."""
    n_evaluation: int = 128
    """Sequences on which accuracy, attention and causal effects are measured."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Checked settings, and everything that follows from them."""

    settings: Settings
    folder: Path
    evaluation: Batch
    looks_back: np.ndarray
    n_distractors: float
    arms: list[study.Arm]


def prepare(settings: Settings) -> Plan:
    """Raises ValueError for settings that make no sense."""
    if settings.smoke:
        settings = dataclasses.replace(settings, seeds=min(settings.seeds, 2), steps=min(settings.steps, 200))
    if settings.n_evaluation < 1:
        raise ValueError(f"--n-evaluation must be at least 1; got {settings.n_evaluation}")
    folder = study.prepare(settings, "grow_induction_heads")
    config = TransformerConfig(
        n_vocab=settings.n_vocab, n_context=settings.n_context, n_heads=settings.n_heads, d_model=settings.d_model,
        d_head=settings.d_head, d_mlp=settings.d_mlp, norm=settings.norm, positions=settings.positions,
    )  # fmt: skip
    optimization = Optimization(
        batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, n_warmup=settings.warmup,
    )  # fmt: skip
    repeats = RepeatedTokens(
        min_period=settings.min_period, max_period=settings.max_period,
        n_vocab=settings.n_vocab, n_context=settings.n_context,
    )  # fmt: skip
    repeats.validate()
    evaluation = jax.jit(
        lambda: sample_batch(repeats, jax.random.key(study.EVALUATION_SEED), 0, settings.n_evaluation)
    )()
    looks_back = np.arange(settings.n_context) < settings.max_period
    n_distractors = (settings.min_period + settings.max_period) / 2 - 1
    one_layer = dataclasses.replace(config, n_layers=1)
    measure = partial(measure_model, evaluation=evaluation, looks_back=looks_back, n_distractors=n_distractors)

    n = settings.steps  # heads form from a tenth to two fifths of the way on; head_atlas.py shows these steps
    keep = nearest(settings.measured, dense_around(n, n // 10, max(1, 2 * n // 5), n_dense=7, n=5))

    def arm(name: str, config: TransformerConfig, task: RepeatedTokens) -> study.Arm:
        runs = [Setting(seed, task, optimization) for seed in settings.seed_range]
        return study.Arm(name, config, runs, settings.measured, partial(measure, config), DIMS, keep=keep)

    return Plan(
        settings=settings,
        folder=folder,
        evaluation=evaluation,
        looks_back=looks_back,
        n_distractors=n_distractors,
        arms=[
            arm("repeats", config, repeats),
            arm("iid", config, dataclasses.replace(repeats, noise=1.0)),
            arm("one_layer", one_layer, repeats),
        ],
    )


def measure_model(
    config: TransformerConfig,
    params: Params,
    setting: Setting,
    evaluation: Batch,
    looks_back: np.ndarray,
    n_distractors: float,
) -> dict[str, Array]:
    """What is followed through training: how well the task is done, and how far the heads have come."""
    with jax.default_matmul_precision("highest"):
        logits, _ = forward(config, params, evaluation.tokens)
    attention = head_evidence.from_attention(config, params, evaluation, looks_back)
    weights = head_evidence.from_weights(config, params, looks_back, n_distractors)
    names = ("previous_token", "induction")
    return {
        "evaluation_loss": next_token_loss(logits, evaluation),
        "accuracy": accuracy(logits, evaluation),
        **{f"{name}_attention": attention[f"{name}_attention"] for name in names},
        **{f"{name}_weights": weights[f"{name}_weights"] for name in names},
    }


def main(plan: Plan) -> None:
    """Trains or resumes every kind of run, analyses the final models, prints the tables and writes the run folder."""
    console = Console()
    settings = study.recorded(plan.settings)
    evidence = {}
    with ThreadPoolExecutor(1) as background:
        # The analysis is compiled on one core while training is compiled and begun on the other.
        configs = dict.fromkeys(arm.config for arm in plan.arms)
        analyses = {config: background.submit(compile_analysis, plan, config) for config in configs}
        runs = study.train_arms(console, plan.folder, plan.arms, plan.settings)
        with parts_bar(console) as bar:
            analysed = bar.add_task("analyse", total=len(plan.arms))
            for arm in plan.arms:
                evidence[arm.name] = analyse(analyses[arm.config].result(), runs[arm.name])
                bar.advance(analysed)

    outcomes = {
        name: induction.Outcome(
            np.asarray(plan.settings.seed_range), run, evidence[name], verdicts.judge(evidence[name])
        )
        for name, run in runs.items()
    }
    figures = induction.figures(outcomes)
    results.save(plan.folder / "results.zarr", induction.datasets(outcomes, settings))
    run_folder.write_summary(plan.folder, figures)
    sections = induction.sections(outcomes, figures, np.asarray(plan.evaluation.tokens[0]))
    run_folder.write_text(plan.folder / "report.html", page.page("Grow induction heads and recover them", sections))
    for title, (header, rows) in (
        ("Which heads, by which evidence (repeats, 2 layers)", induction.verdict_table(outcomes["repeats"])),
        ("Figures", run_folder.figure_table(figures)),
    ):
        print_table(console, title, header, rows)
    for note in induction.notes(outcomes):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"report: {plan.folder / 'report.html'}", soft_wrap=True)


Analysis = Callable[[Params], dict[str, Array]]


def compile_analysis(plan: Plan, config: TransformerConfig) -> Analysis:
    """All evidence on models stacked along S, one after the other, as one compiled program."""

    def one(params: Params) -> dict[str, Array]:
        key = jax.random.key(0)  # of the taxonomy's inputs and nulls
        return head_evidence.everything(config, params, plan.evaluation, plan.looks_back, plan.n_distractors, key)

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((plan.settings.seeds, *x.shape), x.dtype), shapes)
    return jax.jit(lambda params: jax.lax.map(one, params)).lower(stacked).compile(devices.quick_compilation())


def analyse(analysis: Analysis, run: Run) -> dict[str, np.ndarray]:
    """All evidence on the final model of every run; NaN throughout for a run that diverged."""

    def where_sound(values: np.ndarray, otherwise: float) -> np.ndarray:
        return np.where(run.diverged.reshape(-1, *[1] * (values.ndim - 1)), otherwise, values)

    # LAPACK may never return from a NaN matrix, so a diverged run is analysed as zeros and then blanked out.
    values = analysis(jax.tree.map(lambda x: where_sound(x, 0.0), run.params))
    return {name: where_sound(np.asarray(value), np.nan) for name, value in values.items()}


if __name__ == "__main__":
    run_folder.run_command(lambda: prepare(tyro.cli(Settings, description=__doc__)), main)
