"""The report of weights_versus_effects: which weight-only score says which causal effect, and why where it does not."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray

from circuits_jax.heads import calibration, verdicts
from circuits_jax.heads.calibration import bootstrap_interval, proportion_interval
from circuits_jax.reports import page, plots, results
from circuits_jax.reports.compared import (
    ESTIMATES,
    FAMILIES,
    LEAST_EFFECT,
    N_RESAMPLES,
    REASONS,
    UNITS,
    Compared,
    Pair,
    Table,
    spearman,
    why_edges,
    why_heads,
)
from circuits_jax.reports.run_folder import Figure, figure_table

READING = f"""
An effect counts as there above a number set before: {verdicts.THRESHOLD} of attention (a fall of the receiver's
induction attention, a total variation distance) or of what a head writes, {LEAST_EFFECT["loss"]} nats of loss,
{LEAST_EFFECT["direct"]} logits of the target. The threshold of a score is one number for all models, trained and
planted, of all kinds of positions: the best F1 on one half of the models; precision and recall are those on the other
half. Intervals are 95 % over models. AUROC below .5 says that a score speaks against an effect. Planted models are
asked the same question (repeats), for which many of their heads were not made: what they are made for is in
recover_planted.
"""


K_SCORES = ("predicted fall", "gap x previous token", "diagonal gap", "Frobenius composition", "Frobenius z")
HEAD_QUESTIONS = (
    ("type: previous token", "induction attention of another head"),
    ("type: induction", "all k cut: own induction attention"),
    ("predicted fall, all K-edges cut", "all k cut: own induction attention"),
    ("type: copying", "direct logit of the target"),
    ("eigenvalues: copying", "direct logit of the target"),
)


def figures(compared: Compared) -> dict[str, Figure]:
    """The numbers that matter most."""
    out = {}
    for family in FAMILIES:
        table = compared.tables["k"][family]
        out[f"{family}_models"] = Figure(
            f"{family} models", len(table.fits), None, (">=", 32) if family == "trained" else None
        )
        pair = compared.pair("k", "predicted fall", "own induction attention", family)
        aims = (0.995, 0.95, 0.95) if family == "trained" else (None, None, None)
        for name, value, interval, aim in (
            ("AUROC", pair.auroc, pair.auroc_interval, aims[0]),
            ("precision, other half", pair.precision, None, aims[1]),
            ("recall, other half", pair.recall, None, aims[2]),
            ("rank correlation", pair.correlation, pair.correlation_interval, None),
        ):
            key = f"{family}_k_predicted_{name.split(',')[0].lower().replace(' ', '_')}"
            text = f"{family}: K-edges, predicted fall and measured own induction attention: {name}"
            out[key] = Figure(text, value, interval, None if aim is None else (">=", aim))
        says, there = table.scores["predicted fall"] > verdicts.THRESHOLD, table.effects["own induction attention"]
        there = there > verdicts.THRESHOLD
        for name, statistic in (("precision", calibration.precision), ("recall", calibration.recall)):
            out[f"{family}_k_unfitted_{name}"] = Figure(
                f"{family}: K-edges, predicted fall above {verdicts.THRESHOLD}, nothing fitted: {name}",
                statistic(says, there), bootstrap_interval(statistic, says, there, n_resamples=N_RESAMPLES),
                (">=", 0.95) if family == "trained" else None,
            )  # fmt: skip
        for score in K_SCORES[1:]:
            pair = compared.pair("k", score, "own induction attention", family)
            key = score.lower().replace(" ", "_")
            out[f"{family}_k_{key}_auroc"] = Figure(
                f"{family}: K-edges, {score}: AUROC", pair.auroc, pair.auroc_interval
            )
        for score, effect in HEAD_QUESTIONS:
            pair = compared.pair("heads", score, effect, family)
            out[f"{family}_{score}: {effect}"] = Figure(
                f"{family}: heads, {score} for {effect}: AUROC", pair.auroc, pair.auroc_interval
            )
        for estimate in ESTIMATES:
            values, interval = _estimate(compared.tables, family, estimate)
            out[f"{family}_{estimate}"] = Figure(
                f"{family}: {estimate} and exact loss of all head edges, rank correlation", values, interval
            )
    reasons = disagreements(compared)
    told = [count for row in reasons for reason, count in row[3].items() if reason != "not explained"]
    n = sum(sum(row[3].values()) for row in reasons)
    out["explained"] = Figure(
        f"disagreements of the tables below with a measured reason, of {n}", sum(told) / n if n else float("nan"),
        proportion_interval(sum(told), n),
    )  # fmt: skip
    return out


def _estimate(
    tables: Mapping[str, Mapping[str, Table]], family: str, estimate: str
) -> tuple[float, tuple[float, float]]:
    x, y = (np.concatenate([tables[unit][family].effects[name] for unit in "qkv"], 1) for name in (estimate, "loss"))
    return spearman(x, y), bootstrap_interval(spearman, x, y, n_resamples=N_RESAMPLES)


def disagreements(compared: Compared) -> list[tuple[str, str, str, dict[str, int]]]:
    """(family, question, direction, {reason: count}) on the models that did not choose the thresholds."""
    out = []
    for family in FAMILIES:
        edges, heads = compared.tables["k"][family], compared.tables["heads"][family]
        for score in K_SCORES:
            threshold = compared.pair("k", score, "own induction attention", family).threshold
            for direction, counts in why_edges(edges, score, threshold, ~edges.fits).items():
                out.append((family, f"K-edges: {score}", direction, counts))
        for score, effect in HEAD_QUESTIONS:
            threshold = compared.pair("heads", score, effect, family).threshold
            for direction, counts in why_heads(heads, score, threshold, effect, ~heads.fits).items():
                out.append((family, f"heads: {score} for {effect}", direction, counts))
    return out


def reason_table(compared: Compared) -> tuple[list[str], list[list[str]]]:
    """Header and rows of disagreements."""
    header = ["models", "score", "direction", "all", *REASONS]
    rows = [
        [family, question, direction, str(sum(counts.values())), *(str(counts.get(r, "")) for r in REASONS)]
        for family, question, direction, counts in disagreements(compared)
    ]
    return header, rows


def best_table(compared: Compared) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for every effect the score that says it best, by AUROC."""
    header = ["of", "effect", "models", "there", "best score", "AUROC", "rank correlation"]
    header += ["precision", "recall", "next best"]
    rows = []
    for unit in UNITS:
        for effect in dict.fromkeys(p.effect for p in compared.pairs if p.unit == unit):
            for family in FAMILIES:
                of = [p for p in compared.pairs if (p.unit, p.effect, p.family) == (unit, effect, family)]
                ranked = sorted((p for p in of if np.isfinite(p.auroc)), key=lambda p: -p.auroc)
                if not ranked:
                    continue
                best = ranked[0]
                row = [UNITS[unit], effect, family, f"{best.n_true} of {best.n}", best.score]
                row += [_ranged(best.auroc, best.auroc_interval), _ranged(best.correlation, best.correlation_interval)]
                row += [f"{best.precision:.2f}", f"{best.recall:.2f}"]
                rows.append([*row, ", ".join(f"{p.score} {p.auroc:.2f}" for p in ranked[1:3])])
    return header, rows


def _ranged(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} ({interval[0]:.2f} to {interval[1]:.2f})"


def tables(compared: Compared, found: Mapping[str, Figure]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """All tables by title."""
    return {
        "Figures": figure_table(found),
        "Which score says which effect": best_table(compared),
        "Why they disagree": reason_table(compared),
    }


def datasets(compared: Compared, settings: Mapping[str, Any]) -> dict[str, xarray.Dataset]:
    """Every head and edge with all scores and effects, and every pair of score and effect, labelled."""
    out = {}
    for unit, families in compared.tables.items():
        for family, table in families.items():
            arrays: dict[str, Any] = {"part": table.part, "fits": table.fits, "planted": table.planted}
            dims: dict[str, tuple[str, ...]] = {"part": ("model",), "fits": ("model",), "planted": ("model", "unit")}
            for kind in ("scores", "effects", "conditions"):
                of_kind = getattr(table, kind)
                arrays[kind] = np.stack(list(of_kind.values()), -1)
                dims[kind] = ("model", "unit", kind[:-1])
            names = {kind[:-1]: list(getattr(table, kind)) for kind in ("scores", "effects", "conditions")}
            out[f"{unit}_{family}"] = results.dataset(arrays, dims, names, settings)
    fields = [field.name for field in dataclasses.fields(Pair)]
    columns = {name: np.asarray([getattr(pair, name) for pair in compared.pairs]) for name in fields}
    dims = {name: ("pair", "bound") if name.endswith("interval") else ("pair",) for name in fields}
    out["pairs"] = results.dataset(columns, dims, {"bound": ["low", "high"]}, settings)
    return out


def sections(compared: Compared, found: Mapping[str, Figure]) -> list:
    """Sections of the page."""
    parts = [(title, [page.table(*table)]) for title, table in tables(compared, found).items()]
    parts[0][1].append(page.paragraph(READING))
    pictures = [("K-edges: predicted and measured", [page.figure(_scatter(compared))])]
    pictures.append(("Scores against effects", [page.figure(x) for x in _scatters(compared)]))
    pictures += [
        (
            f"Every score, every effect: {UNITS[unit]}",
            [page.figure(_map(compared, unit, family)) for family in FAMILIES],
        )
        for unit in UNITS
    ]
    return [parts[0], *pictures[:2], *parts[1:], *pictures[2:]]


def _scatter(compared: Compared) -> Any:
    groups = {}
    for family, table in compared.tables["k"].items():
        groups[family] = (table.scores["predicted fall"].ravel(), table.effects["own induction attention"].ravel())
    title = "The fall of the receiver's induction attention when a K-edge is cut"
    return plots.scatter(groups, title, "predicted from weights", "measured")


def _scatters(compared: Compared) -> list[Any]:
    """The other scores, each against the effect that it is meant to say."""
    asked = [("k", score, "own induction attention") for score in K_SCORES[1:4]]
    asked += [("heads", *question) for question in HEAD_QUESTIONS[:1] + HEAD_QUESTIONS[3:]]
    panels = {}
    for unit, score, effect in asked:
        of = compared.tables[unit]
        panels[score, effect] = {f: (t.scores[score].ravel(), t.effects[effect].ravel()) for f, t in of.items()}
    return [plots.scatters(dict(list(panels.items())[i : i + 3]), "") for i in (0, 3)]


def _map(compared: Compared, unit: str, family: str) -> Any:
    """AUROC of every score for every effect."""
    of = [p for p in compared.pairs if (p.unit, p.family) == (unit, family)]
    scores, effects = (list(dict.fromkeys(getattr(p, name) for p in of)) for name in ("score", "effect"))
    values = np.full((len(scores), len(effects)), np.nan)
    for pair in of:
        values[scores.index(pair.score), effects.index(pair.effect)] = pair.auroc
    return plots.tables({family: (values, effects, scores)}, f"AUROC, {UNITS[unit]}, {family} models")
