"""The report of the main job: which heads were grown, whether weights, attention and effects agree, and the figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray

from circuits_jax.heads import calibration, taxonomy, verdicts
from circuits_jax.heads.calibration import bootstrap_interval, proportion_interval
from circuits_jax.heads.verdicts import K_INPUT, KINDS, TYPES, Verdicts
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.reports import page, plots, results
from circuits_jax.reports.run_folder import Figure, figure_table
from circuits_jax.training.formation import formation_step
from circuits_jax.training.train import Run

LEARNED, LEARNED_BY = 0.98, 300
FORMED = 0.5  # accuracy or attention at which something counts as formed
READING = f"""
Heads are named layer.head@step, the step at which the head's own attention first reached {FORMED}; one list where
weights, attention and effect agree. Reached: the step at which accuracy did. By effect, an edge is one whose cut
lowers the receiver's own induction attention by more than {verdicts.THRESHOLD}, a number fixed before on other
runs; by weights, one whose predicted fall is larger than the same number. What a head is by weights and by attention
the taxonomy says, with thresholds calibrated on planted heads (heads/thresholds.py); by effect, what its edges do.
Where the three disagree, the usual reason is redundancy: of several previous-token heads none is needed alone. What
weights establish is what inputs of the right kind would make a head do; only the effect says what it does on the task.
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One kind of run: what was trained, what was found on the final models, and the verdicts."""

    seeds: np.ndarray
    run: Run
    evidence: verdicts.Evidence
    verdicts: Verdicts


def strongest_pair(evidence: verdicts.Evidence) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """(run, sender, receiver) of the K-edge with the largest effect."""
    effect = np.nan_to_num(evidence["edge_effect"][:, K_INPUT], nan=-np.inf)
    run, *edge = (int(i) for i in np.unravel_index(effect.argmax(), effect.shape))
    return run, (edge[0], edge[1]), (edge[2], edge[3])


def formation(run: Run) -> dict[str, np.ndarray]:
    """Measured step at which accuracy [S], and the attention of every head by type [S,L,H], first reach FORMED."""
    by_head = {name: np.moveaxis(run.measurements[f"{name}_attention"], 1, -1) for name in TYPES}
    values = {"accuracy": run.measurements["accuracy"], **by_head}
    return {name: formation_step(run.steps, value, FORMED) for name, value in values.items()}


def first_formed(run: Run) -> dict[str, np.ndarray]:
    """The same with the earliest head of each type, [S]; NaN where none formed."""
    formed = {name: steps.reshape(len(steps), -1) for name, steps in formation(run).items()}
    earliest = {name: np.where(np.isnan(steps), np.inf, steps).min(-1) for name, steps in formed.items()}
    return {name: np.where(np.isinf(steps), np.nan, steps) for name, steps in earliest.items()}


def figures(outcomes: Mapping[str, Outcome]) -> dict[str, Figure]:
    """The numbers of the run against their aims; outcomes are those of "repeats", "iid" and "one_layer"."""
    main, iid, one_layer = outcomes["repeats"], outcomes["iid"], outcomes["one_layer"]
    ok = verdicts.sound(main.evidence)
    found = {name: value[ok] for name, value in main.evidence.items()}
    pairs = verdicts.earlier(found["edge_weights"])
    truth = verdicts.edge_truth(found)[:, pairs]
    labels = main.verdicts.edges["weights"][ok][:, pairs]
    edges = {name: found[name][:, pairs] for name in ("edge_weights", "k_gap", "k_frobenius")}
    effect = found["edge_effect"][:, K_INPUT][:, pairs]
    right = verdicts.partners_right(found)

    early = main.run.measurements["accuracy"][:, (main.run.steps > 0) & (main.run.steps <= LEARNED_BY)]
    by_then = (early >= LEARNED).any(-1) & ok if early.size else np.zeros(0, bool)
    control_ok = verdicts.sound(one_layer.evidence)
    best_control = one_layer.run.measurements["accuracy"][control_ok, -1].max() if control_ok.any() else np.nan
    formed = {name: steps[ok] for name, steps in first_formed(main.run).items()}
    kinds = ", ".join(KINDS)

    def over_runs(text: str, statistic: Any, *arrays: np.ndarray, aim: tuple[str, float] | None = None) -> Figure:
        return Figure(text, statistic(*arrays), bootstrap_interval(statistic, *arrays), aim)

    out = {
        "learned_by_step_300": Figure(
            f"runs at {LEARNED:.0%} accuracy on repeats by step {LEARNED_BY}",
            _mean(by_then),
            proportion_interval(int(by_then.sum()), by_then.size),
            (">=", 1.0),
        ),
        "one_layer_accuracy": Figure("one-layer control: best final accuracy", best_control, None, ("<=", 0.45)),
        "one_layer_induction_heads": Figure(
            "one-layer control: induction heads (by attention: it has no edges)", _any_kind(one_layer), None, ("<=", 0)
        ),
        "iid_induction_heads": Figure(
            f"i.i.d. control: induction heads by any of {kinds}", _any_kind(iid), None, ("<=", 0)
        ),
        "edge_auroc": over_runs(
            "edges by weights against causal truth: AUROC", calibration.auroc, edges["edge_weights"], truth,
            aim=(">=", 0.995),
        ),
        "edge_precision": over_runs(
            f"edges by weights: precision at {verdicts.THRESHOLD}", calibration.precision, labels, truth,
            aim=(">=", 0.95),
        ),
        "edge_recall": over_runs(
            f"edges by weights: recall at {verdicts.THRESHOLD}", calibration.recall, labels, truth,
            aim=(">=", 0.95),
        ),
        "best_partner": over_runs(
            "strongest sender of an induction head right by weights", _nanmean, right, aim=(">=", 0.97)
        ),
        "edge_correlation": over_runs(
            "predicted against measured effect of an edge: correlation", _correlation, edges["edge_weights"], effect
        ),
        "edge_auroc_gap": over_runs(
            "for comparison, diagonal gap alone: AUROC", calibration.auroc, edges["k_gap"], truth
        ),
        "edge_auroc_frobenius": over_runs(
            "for comparison, Frobenius K-composition alone: AUROC", calibration.auroc, edges["k_frobenius"], truth
        ),
    }  # fmt: skip
    for head_type in TYPES:
        name = head_type.replace("_", "-")
        heads = main.verdicts.heads[head_type]
        same = (heads["weights"] == heads["effect"]) & (heads["attention"] == heads["effect"])
        out[f"{head_type}_agreement"] = over_runs(f"{name} verdicts on which {kinds} agree", _mean, same[ok])
        per_run = main.verdicts.agreed(head_type).sum((-2, -1))[ok].astype(float)
        out[f"{head_type}_heads"] = over_runs(f"{name} heads a run, by all of {kinds}", _mean, per_run)
    for name, steps in formed.items():
        what = name if name == "accuracy" else f"{name.replace('_', '-')} attention"
        text = f"step at which {what} first reaches {FORMED}, median"
        out[f"{name}_formed"] = over_runs(text, _nanmedian, steps)
    out["diverged"] = Figure("diverged runs, all kinds", sum(int(o.run.diverged.sum()) for o in outcomes.values()))
    return out


def _any_kind(outcome: Outcome) -> float:
    if not verdicts.sound(outcome.evidence).any():
        return float("nan")
    return float(np.logical_or.reduce([outcome.verdicts.heads["induction"][kind] for kind in KINDS]).sum())


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if x.size else float("nan")


def _nanmean(x: np.ndarray) -> float:
    return _mean(x[np.isfinite(x)])


def _nanmedian(x: np.ndarray) -> float:
    x = x[np.isfinite(x)]
    return float(np.median(x)) if x.size else float("nan")


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.ravel(), y.ravel()
    return float(np.corrcoef(x, y)[0, 1]) if x.size and x.std() and y.std() else float("nan")


def notes(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What a reader of the tables has to know about these runs in particular."""
    said = [
        f"{name}: seeds {', '.join(map(str, outcome.seeds[outcome.run.diverged]))} diverged and are left out"
        for name, outcome in outcomes.items()
        if outcome.run.diverged.any()
    ]
    return said


def verdict_table(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each run: the heads of each type, when they formed, whether all evidence agrees."""
    header = ["seed", "accuracy", "reached", *(f"{name.replace('_', '-')} heads" for name in TYPES), "all agree"]
    formed = formation(outcome.run)
    rows = []
    for i, seed in enumerate(outcome.seeds):
        if outcome.run.diverged[i]:
            rows.append([str(seed), "diverged", "", "", "", ""])
            continue
        heads = {name: {kind: outcome.verdicts.heads[name][kind][i] for kind in KINDS} for name in TYPES}
        agree = all((by_kind[kind] == by_kind["effect"]).all() for by_kind in heads.values() for kind in KINDS)
        rows.append(
            [str(seed), f"{outcome.run.measurements['accuracy'][i, -1]:.3f}", _step(formed["accuracy"][i])]
            + [_by_kind(heads[name], formed[name][i]) for name in TYPES]
            + ["yes" if agree else "no"]
        )
    return header, rows


def head_table(outcome: Outcome, run: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each head of one run: what the taxonomy says that it is."""
    types = outcome.verdicts.types
    n_layers, n_heads = types["diffuse"]["weights"].shape[1:]

    def said(names: Sequence[str], at: tuple[int, int, int]) -> str:
        return " + ".join(label for name in names if (label := _said(types[name], name, at))) or "undetermined"

    places = [(run, layer, head) for layer in range(n_layers) for head in range(n_heads)]
    rows = [[f"{at[1]}.{at[2]}", said(QK_TYPES, at), said(OV_TYPES, at)] for at in places]
    return ["head", "where it looks", "what it moves"], rows


def _said(by_kind: Mapping[str, np.ndarray], name: str, at: tuple[int, int, int]) -> str:
    weights, attention = (bool(by_kind[kind][at]) for kind in ("weights", "attention"))
    if weights and attention:
        return name
    return f"{name} [{'weights' if weights else 'attention'} only]" if weights or attention else ""


def _step(step: float) -> str:
    return f"{step:.0f}" if np.isfinite(step) else "never"


def _by_kind(heads: Mapping[str, np.ndarray], formed: np.ndarray) -> str:
    """The heads, each with the step at which it formed, if all evidence names the same; else by each kind."""
    names = {
        kind: " ".join(f"{layer}.{head}@{_step(formed[layer, head])}" for layer, head in np.argwhere(found)) or "none"
        for kind, found in heads.items()
    }
    if len(set(names.values())) == 1:
        return names["effect"]
    return ", ".join(f"{kind} {found}" for kind, found in names.items())


def datasets(outcomes: Mapping[str, Outcome], settings: Mapping[str, Any]) -> dict[str, xarray.Dataset]:
    """Everything measured, labelled, one data set for each kind of run."""
    heads, edges = ("run", "layer", "head"), ("run", "sender_layer", "sender_head", "layer", "head")
    shapes = {
        **dict.fromkeys(("type_scores", "type_z"), ("run", "kind", "type", "layer", "head")),
        "ov_eigenvalues": (*heads, "rank"),
        "example_patterns": (*heads, "query", "key"),
        **dict.fromkeys(("edge_weights", "k_gap", "k_frobenius", "ablation_effect"), edges),
        **dict.fromkeys(("edge_loss", "edge_effect"), ("run", "input", *edges[1:])),
        **dict.fromkeys(("joint_loss", "joint_effect"), ("run", "input", "layer", "head")),
    }
    out = {}
    for name, outcome in outcomes.items():
        arrays: dict[str, Any] = {"training_loss": outcome.run.loss, "diverged": outcome.run.diverged}
        dims: dict[str, tuple[str, ...]] = {"training_loss": ("run", "step"), "diverged": ("run",)}
        for key, value in outcome.run.measurements.items():
            arrays[f"{key}_over_training"] = value
            dims[f"{key}_over_training"] = ("run", "step", "layer", "head")[: value.ndim]
        for key, value in outcome.evidence.items():
            arrays[key], dims[key] = value, shapes.get(key, heads)
        for key, value in formation(outcome.run).items():
            arrays[f"{key}_formed"], dims[f"{key}_formed"] = value, heads[: value.ndim]
        for head_type, by_kind in outcome.verdicts.heads.items():
            for kind, value in by_kind.items():
                arrays[f"{head_type}_verdict_{kind}"], dims[f"{head_type}_verdict_{kind}"] = value, heads
        kinds = ("weights", "attention")
        arrays["type_verdict"] = np.stack(
            [np.stack([outcome.verdicts.types[name][kind] for name in taxonomy.TYPES], 1) for kind in kinds], 1
        )
        dims["type_verdict"] = shapes["type_scores"]
        for kind, value in outcome.verdicts.edges.items():
            arrays[f"edge_verdict_{kind}"], dims[f"edge_verdict_{kind}"] = value, edges
        coords = {"run": outcome.seeds, "step": outcome.run.steps, "kind": list(kinds), "type": list(taxonomy.TYPES)}
        out[name] = results.dataset(arrays, dims, coords, settings)
    return out


def sections(outcomes: Mapping[str, Outcome], found: Mapping[str, Figure], tokens: np.ndarray) -> list:
    """Sections of the page; tokens [T] are those of the example patterns."""
    main = outcomes["repeats"]
    labels = [f"seed {seed}" for seed in main.seeds]
    best = lambda name: main.run.measurements[name].max((-2, -1))  # noqa: E731
    names = {"repeats": "2 layers, repeats", "iid": "control: i.i.d. data", "one_layer": "control: 1 layer"}
    learning = plots.curves(
        main.run.steps,
        {
            "training loss (nats)": {names[key]: o.run.loss for key, o in outcomes.items()},
            "accuracy on repeats": {names[key]: o.run.measurements["accuracy"] for key, o in outcomes.items()},
        },
        "Learning, one thin line for each seed",
        labels,
    )
    forming = plots.curves(
        main.run.steps,
        {
            "by attention": {name.replace("_", "-"): best(f"{name}_attention") for name in TYPES},
            "by weights alone": {name.replace("_", "-"): best(f"{name}_weights") for name in TYPES},
        },
        "Best head of each type through training",
        labels,
    )
    pairs = verdicts.earlier(main.evidence["edge_weights"])
    scored = plots.scatter(
        {
            names[key]: (
                outcomes[key].evidence["edge_weights"][:, pairs].ravel(),
                outcomes[key].evidence["edge_effect"][:, K_INPUT][:, pairs].ravel(),
            )
            for key in ("repeats", "iid")
        },
        "Every K-edge: what weights predict and what cutting it does",
        "predicted fall of the receiver's induction attention, from weights alone",
        "measured fall when the edge is cut",
    )
    parts = [
        ("Figures", [page.table(*figure_table(found))]),
        (
            "Verdicts",
            [
                page.paragraph(READING),
                *map(page.paragraph, notes(outcomes)),
                page.table(*verdict_table(main)),
            ],
        ),
        ("Learning and formation", [page.figure(learning), page.figure(forming)]),
        ("Weights against causal effects", [page.figure(scored)]),
    ]
    return [*parts, _pair(main, tokens)] if verdicts.sound(main.evidence).any() else parts


def _pair(main: Outcome, tokens: np.ndarray) -> tuple[str, list[str]]:
    """The K-edge with the largest effect: heading and figures."""
    run, (layer, sender), (to_layer, receiver) = strongest_pair(main.evidence)
    names = [str(token) for token in tokens]
    n_heads = main.evidence["edge_weights"].shape[-1]
    head_names = lambda layer: [f"{layer}.{head}" for head in range(n_heads)]  # noqa: E731
    pick = lambda name, *at: main.evidence[name][(run, *at, layer, slice(None), to_layer)]  # noqa: E731
    composition = plots.heat_maps(
        {"predicted from weights": pick("edge_weights"), "measured": pick("edge_effect", K_INPUT)},
        "K-composition: fall of the receiver's induction attention when the edge is cut",
        "receiving head", "sending head", head_names(to_layer), head_names(layer), show_values=True,
    )  # fmt: skip
    pair = {
        f"previous-token head {layer}.{sender}": (run, layer, sender),
        f"induction head {to_layer}.{receiver}": (run, to_layer, receiver),
    }
    patterns = plots.heat_maps(
        {name: main.evidence["example_patterns"][head] for name, head in pair.items()},
        "Attention on one sequence (tokens as ids)", "key", "query", names, names,
    )  # fmt: skip
    spectrum = plots.complex_plane(
        {name: main.evidence["ov_eigenvalues"][head] for name, head in pair.items()},
        "Eigenvalues of W_E W_OV W_U: to the right is copying",
    )
    labels = page.table(*head_table(main, run))
    heading = f"A recovered pair: {layer}.{sender} to {to_layer}.{receiver} of seed {main.seeds[run]}"
    return heading, [*(page.figure(drawn) for drawn in (composition, patterns, spectrum)), labels]
