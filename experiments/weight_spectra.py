"""Does the circuit match the claim? Indirect object identification and subject-verb agreement.

    python experiments/weight_spectra.py                                   16 seeds, minutes on two CPU cores
    python experiments/weight_spectra.py --tasks sva --seeds 32            one task
    python experiments/weight_spectra.py --model gpt2                      the published IOI heads of GPT-2 small: a
                                                                           folder of a checkpoint, or a hub name
    python experiments/weight_spectra.py --model <folder> --claim mine.json   a claim of one's own (heads/claims.py)
    python experiments/weight_spectra.py --smoke                           a quick check that everything runs

A claim says of heads where they look, what decides that, what they move and to whom. For every claimed head and the
other heads of its layer: leading singular values and eigenvalues of W_QK and W_OV, their directions as tokens and as
task variables; symmetry and whether it tells positional heads; alignment (A) to (F) with the task's causal variables
against directions of the rows' covariance, permuted labels, the same head turned at random and the rest of the layer;
attention on task prompts; the effect of swapping the directions. Verdicts are supported, not supported or undetermined
(what each needs stands in heads/claim_verdicts.py); none is supported by weights alone.

Without --model small word-level models are trained: IOI in one layer of two heads on the sentence "S IO S to" (the
setting of arXiv 2510.25013), in two layers on all 15 sentences, agreement with attractors in two layers; the same on
answers drawn at random (shuffled), and untrained. Every head is asked about every role, and verdicts are held against
the causal truth, which is measured by other means on other prompts. Limits were fixed on seeds 1000 to 1015 and 2000 to
2015.

Aims, for each task: precision of "supported" >= .95, recall >= .9; shuffled and untrained models <= 5 % supported.

Expected with --model gpt2, from Wang et al. 2022 (arXiv 2211.00593); it could not be run where this was written, which
has no network: copy scores above .95 for the name movers 9.9, 9.6, 10.0 and below .2 for the average head, .98 with -OV
for the negative heads 10.7 and 11.10; attention scores on repeated random tokens of at least .4 for previous-token
heads 2.2 and 4.11, duplicate-token heads 0.1 and 3.0, induction heads 5.5 and 6.9; logit difference 3.56 and IO
preferred to S on 99.3 % of their prompts (ours are other sentences). Backup heads act when name movers are gone, and
should come out undetermined or not supported. No claim about agreement heads of pretrained models is shipped, because
none that we know was found again by others, head by head, in the same model; give one with --claim.

Writes runs/<name>/: config.json, results.json, summary.json, report.html; trajectories/ and checkpoints/ of what was
trained. The same command resumes a run that was stopped.
"""

import os

# Before jax is imported: the threads of OpenBLAS would spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console

from circuits_jax.heads.claims import Claim, load_claim, places_in
from circuits_jax.heads.role_rows import Prompts
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params, forward
from circuits_jax.reports import claim_page, run_folder, study
from circuits_jax.reports.claim_analysis import Judged, analysis, instrument, judged, plain
from circuits_jax.reports.claim_prompts import Task, claim_prompts
from circuits_jax.reports.console import parts_bar
from circuits_jax.reports.run_folder import Figure, provenance
from circuits_jax.reports.studied_model import StudiedModel, open_model
from circuits_jax.tasks.agreement import agreement_tokenized, agreement_words
from circuits_jax.tasks.batch import next_token_loss, sample_batch
from circuits_jax.tasks.ioi import NAMES, OBJECTS, PLACES, ioi_tokenized, ioi_words
from circuits_jax.tasks.wording import Wording
from circuits_jax.training.setting import Optimization, Setting
from circuits_jax.training.train import init_state

TaskName = Literal["ioi", "sva"]
SYMBOLIC = "[S][IO][S] to[IO]"
WORD_CLAIMS = {"ioi": "ioi_words", "sva": "agreement_words"}
PUBLISHED = {"ioi": "ioi_gpt2_small"}
GPT2_SMALL = (12, 12, 768)  # layers, heads, D
KINDS = ("trained", "shuffled", "untrained")
NO_CLAIM = (
    "No claim about agreement heads of pretrained models is shipped: none that we know was found again by others, head "
    "by head, in the same model. Give one with --claim."
)


@dataclasses.dataclass(frozen=True)
class Settings(study.StudySettings):
    """What to analyse; the defaults are those of the report."""

    tasks: tuple[TaskName, ...] = ("ioi", "sva")
    """ioi: indirect object identification; sva: subject-verb agreement."""
    model: str = ""
    """A folder of a Hugging Face checkpoint or a hub name, with its tokenizer; small models are trained without one."""
    claim: tuple[str, ...] = ()
    """Claims: JSON files, or names of shipped ones; for --model, of the shipped ones by default."""
    seeds: int = 16
    """Number of models of each arm and kind."""
    steps: int = 400
    """Updates of two-layer IOI models; one-layer ones get four times as many, those of agreement a quarter more."""
    measure_every: int = 100
    """Updates between two measurements of the loss."""
    prompts: int | None = None
    """Judged prompts; 512, or 128 with --model, when left out."""
    estimation: int | None = None
    """Prompts, and pairs, from which directions come; 256, or 128 with --model, when left out."""
    draws: int = 999
    """Of each null."""
    key: int = 0
    """Seed of prompts and nulls."""
    n_names: int = 20
    """Names in the word-level vocabulary."""

    @property
    def n_judged(self) -> int:
        """How many prompts are judged."""
        return (128 if self.model else 512) if self.prompts is None else self.prompts

    @property
    def n_known(self) -> int:
        """From how many prompts directions come."""
        return (128 if self.model else 256) if self.estimation is None else self.estimation


class ArmPlan(NamedTuple):
    """Models of one kind: task, claim, and how they are trained."""

    name: str
    claim: Claim
    task: Any
    wording: Wording
    config: TransformerConfig
    optimization: Optimization
    steps: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Checked settings, and what follows from them: arms to train, or a model with its claims and tasks."""

    settings: Settings
    folder: Path
    arms: list[ArmPlan]
    model: StudiedModel | None
    claims: list[tuple[Claim, Any, Wording]]
    notes: list[str]


def prepare(settings: Settings) -> Plan:
    """Raises ValueError for settings that make no sense, and for models and claims that do not fit."""
    settings = dataclasses.replace(settings, prompts=settings.n_judged, estimation=settings.n_known)
    for name, least in (("prompts", 8), ("estimation", 8), ("draws", 19), ("key", 0), ("n_names", 12)):
        if getattr(settings, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(settings, name)}")
    if settings.n_names > len(NAMES):
        raise ValueError(f"--n-names must be at most {len(NAMES)}; got {settings.n_names}")
    if not settings.tasks or len(set(settings.tasks)) < len(settings.tasks):
        raise ValueError(f"--tasks must name ioi, sva or both, once; got {' '.join(settings.tasks) or 'none'}")
    if settings.smoke:
        settings = dataclasses.replace(
            settings, seeds=min(settings.seeds, 2), steps=min(settings.steps, 20), measure_every=20,
            prompts=min(settings.n_judged, 64), estimation=min(settings.n_known, 64), draws=min(settings.draws, 49),
        )  # fmt: skip
    folder = study.prepare(settings, "weight_spectra")
    if settings.model:
        return _plan_of_model(settings, folder)
    claims = _claims(settings)
    return Plan(
        settings, folder, [arm for task in settings.tasks for arm in _arms(settings, task, claims)], None, [], []
    )


def _claims(settings: Settings) -> dict[str, Claim]:
    """Claims by task; an extra one for a task that is not analysed is an error."""
    found: dict[str, Claim] = {}
    for where in settings.claim:
        claim = load_claim(where)
        if claim.task not in settings.tasks or claim.task in found:
            raise ValueError(f"--claim must hold at most one claim for each of --tasks; got another for {claim.task}")
        found[claim.task] = claim
    return found


def _check_claim(claim: Claim, task: Task, config: TransformerConfig) -> None:
    """Raises ValueError for a claim that does not fit the model or the task, before anything is computed."""
    for role in claim.roles:
        claim.places(role, config.n_layers, config.n_heads)
    for published in claim.published:
        places_in(f"the published {published.score} score names", published.heads, config.n_layers, config.n_heads)
    claim_prompts(task, claim, jax.random.key(0), 64, 8)  # enough for every kind of sentence to come


# --- models that are trained here ---


def _arms(settings: Settings, task: TaskName, claims: Mapping[str, Claim]) -> list[ArmPlan]:
    claim = claims.get(task) or load_claim(WORD_CLAIMS[task])
    words = NAMES[: settings.n_names], PLACES[:8], OBJECTS[:8]

    def arm(
        name: str, made: tuple[Any, Wording], layers: int, width: int, d_head: int, rate: float, steps: int
    ) -> ArmPlan:
        config = TransformerConfig(
            n_vocab=made[0].n_vocab, n_context=made[0].n_context, n_layers=layers, n_heads=2, d_model=width,
            d_head=d_head, positions="learned", norm="rms",
        )  # fmt: skip
        optimization = Optimization(batch_size=64, learning_rate=rate)
        _check_claim(claim, made[0], config)
        return ArmPlan(name, claim, *made, config, optimization, steps)

    if task == "sva":
        return [arm("agreement", agreement_words(), 2, 64, 16, 3e-3, settings.steps * 5 // 4)]
    return [
        arm("ioi_one_layer", ioi_words(*words, (SYMBOLIC,)), 1, 32, 32, 5e-3, settings.steps * 4),
        arm("ioi_two_layers", ioi_words(*words), 2, 64, 32, 4e-3, settings.steps),
    ]


def _study_arms(settings: Settings, arm: ArmPlan) -> dict[str, study.Arm]:
    batch = sample_batch(arm.task, jax.random.key(study.EVALUATION_SEED), 0, 256)

    def measure(params: Params, setting: Setting) -> dict[str, Array]:
        with jax.default_matmul_precision("highest"):
            logits = forward(arm.config, params, batch.tokens)[0]
        rows = jnp.arange(len(batch.tokens))
        asked = logits[rows, batch.positions["at"]]
        right = asked[rows, batch.positions["right"]] > asked[rows, batch.positions["wrong"]]
        return {"right": right.mean(), "evaluation_loss": next_token_loss(logits, batch)}

    steps = sorted({*range(0, arm.steps, settings.measure_every), arm.steps})
    return {
        kind: study.Arm(
            f"{arm.name}_{kind}", arm.config,
            [
                Setting(seed, dataclasses.replace(arm.task, noise=noise), arm.optimization)
                for seed in settings.seed_range
            ],
            steps, measure,
        )
        for kind, noise in (("trained", 0.0), ("shuffled", 1.0))
    }  # fmt: skip


def untrained(arm: ArmPlan, settings: Settings) -> Params:
    """The models of an arm before training, S in front."""
    start = lambda seed: init_state(arm.config, Setting(seed, arm.task, arm.optimization)).params  # noqa: E731
    return jax.jit(jax.vmap(start))(jnp.asarray(settings.seed_range))


def train_and_judge(console: Console, plan: Plan) -> dict[str, Any]:
    """Trains every arm, judges every model of every kind, and analyses the first one of each arm in full."""
    settings = plan.settings
    arms = {arm.name: _study_arms(settings, arm) for arm in plan.arms}
    runs = study.train_arms(console, plan.folder, [arm for of in arms.values() for arm in of.values()], settings)
    analyses, instruments = [], []
    judged_by: dict[tuple[str, str], list[Judged]] = {}
    with parts_bar(console) as bar:
        for arm in plan.arms:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(study.TASK_SEED), settings.key), 4)
            prompts, apart = (
                claim_prompts(arm.task, arm.claim, key, settings.n_judged, settings.n_known) for key in keys[:2]
            )
            for kind in KINDS:
                if kind == "untrained":
                    models = untrained(arm, settings)
                    sound = np.ones(settings.seeds, bool)
                else:
                    run = runs[f"{arm.name}_{kind}"]
                    models, sound = run.params, study.sound(run)
                found = []
                for seed in bar.track(np.flatnonzero(sound), description=f"{arm.name}, {kind}"):
                    params = jax.tree.map(lambda x, seed=seed: jnp.asarray(x[seed]), models)
                    found.append(judged(arm.config, params, arm.claim, prompts, keys[2], settings.draws, apart))
                    if kind == "trained" and len(found) == 1:
                        name = f"{arm.name}, seed {settings.first_seed + int(seed)}"
                        words = _word_names(arm.wording)
                        analyses.append(
                            analysis(
                                name,
                                arm.config,
                                params,
                                arm.claim,
                                arm.task,
                                prompts,
                                found[0],
                                words,
                                keys[3],
                                settings.draws,
                                None,
                            )
                        )
                instruments.append(instrument(arm.name, kind, found))
                judged_by.setdefault((arm.claim.task, kind), []).extend(found)
    by_task = [instrument(task, kind, models) for (task, kind), models in judged_by.items()]
    return {"analyses": analyses, "instrument": instruments, "by_task": by_task}


def _word_names(wording: Wording) -> Callable[[int], str]:
    vocabulary = wording.vocabulary or ()
    return lambda token: vocabulary[token]


def instrument_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Precision and recall of each task, and what controls are said to be."""
    figures = {}
    for entry in results["by_task"]:
        task, kind = entry["arm"], entry["kind"]
        share = entry["supported"] / entry["candidates"] if entry["candidates"] else float("nan")
        if kind != "trained":
            text = f"{task}: {kind} models, share of heads and roles supported"
            figures[f"{task}_{kind}_supported"] = Figure(text, share, None, ("<=", 0.05))
            text = f"{task}: {kind} models, share with both halves by weights alone"
            figures[f"{task}_{kind}_structural"] = Figure(text, entry["structural"] / max(entry["candidates"], 1))
            continue
        for name, aim in (("precision", 0.95), ("recall", 0.9)):
            text = f"{task}: {name} of 'supported' ({entry['models']} models, {entry['true']} true roles)"
            figures[f"{task}_{name}"] = Figure(text, entry[name], entry[f"{name}_interval"], (">=", aim))
            text = f"{task}: {name} of weights alone"
            figures[f"{task}_structural_{name}"] = Figure(
                text, entry[f"structural_{name}"], entry[f"structural_{name}_interval"]
            )
    return figures


# --- a model that is given ---


def _plan_of_model(settings: Settings, folder: Path) -> Plan:
    claims = _claims(settings)
    try:
        model = open_model(settings.model)
    except OSError as error:
        raise ValueError(f"--model {settings.model} cannot be opened: {error}") from error
    config = model.config
    notes: list[str] = []
    if config.norm_position != "pre" or not config.causal:
        raise ValueError(f"{model.name} is no decoder with pre-norm: no answer follows from what its heads add up to")
    tasks = []
    for task in settings.tasks:
        claim = claims.get(task)
        if claim is None and task in PUBLISHED and (config.n_layers, config.n_heads, config.d_model) == GPT2_SMALL:
            claim = load_claim(PUBLISHED[task])
        if claim is None and not settings.claim:
            if task == "sva":
                notes.append(NO_CLAIM)
                continue
            raise ValueError(f"no claim is shipped for {task} in {model.name}: give one with --claim")
        if claim is None:
            continue
        made = _tokenized(task, model)
        if made[0].n_context > config.n_context:
            raise ValueError(f"{model.name} holds {config.n_context} tokens; the sentences have {made[0].n_context}")
        _check_claim(claim, made[0], config)
        notes += [f"left out of {task}: {what} ({why})" for what, why in made[1].dropped]
        tasks.append((claim, *made))
    if not tasks:
        raise ValueError(" ".join(notes))
    return Plan(settings, folder, [], model, tasks, [*model.notes, *notes])


def _tokenized(task: TaskName, model: StudiedModel) -> tuple[Any, Wording]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        words = ioi_words(NAMES[: Settings.n_names], PLACES[:8], OBJECTS[:8]) if task == "ioi" else agreement_words()
        if words[0].n_vocab != model.config.n_vocab:
            raise ValueError(f"{model.name} has no tokenizer: there is no telling how it would read a sentence")
        return words
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    make = ioi_tokenized if task == "ioi" else agreement_tokenized
    return make(encode, model.config.n_vocab, model.bos)


def judge_model(console: Console, plan: Plan) -> dict[str, Any]:
    """Judges the claims about a given model."""
    model, settings = plan.model, plan.settings
    assert model is not None
    params = model.states[-1][1]()
    keys = jax.random.split(jax.random.fold_in(jax.random.key(study.TASK_SEED), settings.key), 3)
    analyses = []
    with console.status("evidence") as status:
        for claim, task, wording in plan.claims:
            status.update(f"{claim.name}: evidence")
            prompts: Prompts = claim_prompts(task, claim, keys[0], settings.n_judged, settings.n_known)
            found = judged(model.config, params, claim, prompts, keys[1], settings.draws)
            status.update(f"{claim.name}: spectra")
            words = _word_names(wording) if model.tokenizer is None else lambda token: model.tokenizer.decode([token])
            analyses.append(
                analysis(
                    model.name,
                    model.config,
                    params,
                    claim,
                    task,
                    prompts,
                    found,
                    words,
                    keys[2],
                    settings.draws,
                    model.bos,
                )
            )
    return {"analyses": analyses, "instrument": [], "by_task": []}


def model_figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """How many claimed heads came out how, and what had been published."""
    figures = {}
    for found in results["analyses"]:
        outcomes = [head["outcome"] for head in found["heads"]]
        for outcome in ("supported", "undetermined", "not supported"):
            text = f"{found['task']}: claimed heads {outcome} ({len(outcomes)} roles of heads)"
            figures[f"{found['task']}_{outcome.replace(' ', '_')}"] = Figure(
                text, outcomes.count(outcome) / len(outcomes)
            )
        text = f"{found['task']}: right answer preferred"
        figures[f"{found['task']}_does_task"] = Figure(text, found["does_task"])
        for row in found["published"]:
            heads = " ".join(row["heads"])
            sign, bound = row["expected"].split()
            name = f"published_{row['score'].replace(' ', '_')}_{heads.replace(' ', '_')}"
            figures[name] = Figure(f"published: {row['score']} of {heads}", row["value"], None, (sign, float(bound)))
    return figures


def main(plan: Plan) -> None:
    """Collects evidence, judges, prints the verdicts and writes the run folder."""
    console = Console()
    if plan.model is not None:
        run_folder.open_run(plan.folder, study.recorded(plan.settings))
        results = judge_model(console, plan)
        figures = model_figures(results)
    else:
        results = train_and_judge(console, plan)
        figures = instrument_figures(results)
    results = plain({"provenance": {"settings": study.recorded(plan.settings), **provenance()}, **results})
    if study.writes():
        run_folder.write_json(plan.folder / "results.json", results)
        claim_page.terminal(console, results)
    study.finish(
        console, plan.folder, "Does the circuit match the claim?", figures, claim_page.sections(results), plan.notes
    )


if __name__ == "__main__":
    run_folder.run_command(lambda: prepare(tyro.cli(Settings, description=__doc__)), main)
