"""A claim analysed: evidence, verdicts, spectra of claimed heads and their controls, as plain values for JSON."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import claim_verdicts, role_rows
from circuits_jax.heads.alignment import Aligned
from circuits_jax.heads.calibration import precision, proportion_interval, recall
from circuits_jax.heads.claim_verdicts import Verdict, half_evidence, of_role
from circuits_jax.heads.claims import Claim
from circuits_jax.heads.outcomes import run
from circuits_jax.heads.published import compared, published_scores
from circuits_jax.heads.role_edges import edge_evidence
from circuits_jax.heads.role_evidence import Behaviour, Structures, role_behaviours, role_structures
from circuits_jax.heads.role_rows import Prompts
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params
from circuits_jax.reports.claim_prompts import Task
from circuits_jax.reports.head_spectra import spectra_of_heads, symmetries, symmetry_rule
from circuits_jax.reports.reading_table import Claimed
from circuits_jax.tasks.ioi import IOI

STATISTICS = {"preference": "preference", "C matching": "matching", "F moves": "moves"}
SHARES = {"A gain": "gain", "B overlap": "overlap", "D top share": "top_share"}
ESTABLISHES = {
    "QK": "its QK circuit prefers the claimed key by its weights, on the kind of inputs that prompts give",
    "OV": "its OV circuit writes what is claimed by its weights, wherever it looks",
    "attends": "on these prompts it looks there more than elsewhere",
    "uses QK": "it finds the key by the direction that sets it apart: without it attention and answer go",
    "uses OV": "it moves the variable: with another class put for it the answer changes as claimed",
}
OPEN = {
    "QK": "that its weights prefer the claimed key",
    "OV": "that its weights write what is claimed",
    "attends": "that inputs make it look there",
    "uses QK": "that it looks there because of the claimed direction",
    "uses OV": "that what it moves reaches the answer",
}
ALWAYS_OPEN = (
    "that no other head does the same, that it does so in other texts, or that nothing else in the model helps"
)
CLEAR = 0.1  # below the least accuracy by this much, a model does not do the task on other prompts either


@dataclasses.dataclass(frozen=True)
class Judged:
    """One model and one claim.

    Attributes:
        verdicts: on every claimed head.
        truth: of each, or None where it was not asked for.
        structures, behaviours: the evidence, as NumPy arrays with roles in front.
    """

    verdicts: list[Verdict]
    truth: list[bool] | None
    structures: Structures
    behaviours: Behaviour


def judged(
    config: TransformerConfig, params: Params, claim: Claim, prompts: Prompts, key: Array, n_draws: int,
    apart: Prompts | None = None,
) -> Judged:  # fmt: skip
    """Evidence and verdicts; with prompts drawn apart also the causal truth, which the verdicts do not see."""
    n_layers, n_heads = config.n_layers, config.n_heads
    places = np.array(sorted({place for role in claim.roles for place in claim.places(role, n_layers, n_heads)}))
    index = {tuple(place): i for i, place in enumerate(places.tolist())}
    structures = jax.tree.map(np.asarray, role_structures(config, params, prompts, key, n_draws))
    behaviours = claimed_behaviours(config, params, claim, prompts, places)
    verdicts = claim_verdicts.judge(claim, structures, behaviours, places)
    truth = None
    does_task = float((behaviours.difference[0] > 0).mean())
    if apart is not None and does_task < claim_verdicts.LIMITS["task"] - CLEAR:
        truth = [False] * len(verdicts)  # as claim_verdicts.truth says of a model that does not do the task
    elif apart is not None:
        others = claimed_behaviours(config, params, claim, apart, places)
        number = {role: r for r, role in enumerate(claim.roles)}
        truth = [
            claim_verdicts.truth(
                claim.roles[v.role], of_role(others, number[v.role]), (v.layer, v.head), index[v.layer, v.head]
            )
            for v in verdicts
        ]
    return Judged(verdicts, truth, structures, behaviours)


def claimed_behaviours(
    config: TransformerConfig, params: Params, claim: Claim, prompts: Prompts, places: np.ndarray
) -> Behaviour:
    """role_behaviours as NumPy arrays; a head that is not said to have a role is not disturbed in it, and NaN there.

    Where each head is asked about each role, all in one program; else role by role, for in a large model runs are dear.
    """
    asked = [np.array(claim.places(role, config.n_layers, config.n_heads)) for role in claim.roles]
    if all(len(heads) == len(places) for heads in asked):
        return jax.tree.map(np.asarray, role_behaviours(config, params, prompts, jnp.asarray(places)))
    index = {tuple(place): i for i, place in enumerate(places.tolist())}
    found = []
    for r, heads in enumerate(asked):
        question = jax.tree.map(lambda x, r=r: x[r : r + 1], prompts.questions)
        alone = dataclasses.replace(prompts, questions=question)
        of_claimed = jax.tree.map(np.asarray, role_behaviours(config, params, alone, jnp.asarray(heads)))
        rows = [index[tuple(place)] for place in heads.tolist()]

        def among_all(seen: np.ndarray, rows: list[int] = rows) -> np.ndarray:
            out = np.full((1, len(places), *seen.shape[2:]), np.nan, seen.dtype)
            out[:, rows] = seen
            return out

        disturbed = (of_claimed.by_direction, of_claimed.blocked, of_claimed.by_counterfactual)
        by_direction, blocked, real = jax.tree.map(among_all, disturbed)
        found.append(
            dataclasses.replace(of_claimed, by_direction=by_direction, blocked=blocked, by_counterfactual=real)
        )
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


def analysis(
    name: str, config: TransformerConfig, params: Params, claim: Claim, task: Task, prompts: Prompts, found: Judged,
    words: Callable[[int], str], key: Array, n_draws: int, bos: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is shown of one model and one claim.

    Args:
        name: of the model, for people.
        config, params: the model.
        claim: what is claimed.
        task: as given to claim_prompts.
        prompts, found: what was asked and what came out.
        words: a token as text.
        key: draws the nulls of spectra and edges.
        n_draws: of each null of an edge.
        bos: token that sequences begin with; without one, published scores are left out.
    """
    spectra_key, rule_key, published_key, edge_key = jax.random.split(key, 4)
    weights = CircuitWeights.from_params(config, params)
    length = prompts.judged.tokens.shape[1]
    rule = symmetry_rule(symmetries(weights, length, rule_key).values())
    return {
        "task": claim.task,
        "model": name,
        "claim": claim.name,
        "source": claim.source,
        "does_task": found.verdicts[0].findings["task"].value,
        "heads": heads_of(claim, found),
        "edges": edge_evidence(config, params, claim, prompts, edge_key, n_draws),
        "spectra": _spectra(config, params, weights, claim, task, prompts, found, words, spectra_key),
        "symmetry_rule": rule,
        "published": []
        if bos is None or not claim.published
        else _published(config, params, claim, task, bos, published_key),
    }


def heads_of(claim: Claim, found: Judged) -> list[dict[str, Any]]:
    """Every verdict with its findings and alignments."""
    number = {role: r for r, role in enumerate(claim.roles)}
    return [
        {
            "role": verdict.role,
            "head": f"{verdict.layer}.{verdict.head}",
            "outcome": verdict.outcome,
            "structural": verdict.structural,
            "findings": {name: dataclasses.asdict(finding) for name, finding in verdict.findings.items()},
            "alignment": _alignment(of_role(found.structures.read, number[verdict.role]), verdict)
            | _attention(of_role(found.behaviours, number[verdict.role]), verdict),
            "alignment_embedded": _alignment(of_role(found.structures.embedded, number[verdict.role]), verdict),
            "establishes": [text for name, text in ESTABLISHES.items() if verdict.findings[name].outcome == "yes"],
            "does_not_establish": [
                *(text for name, text in OPEN.items() if verdict.findings[name].outcome != "yes"), ALWAYS_OPEN,
            ],
            "truth": None if found.truth is None else found.truth[i],
        }
        for i, verdict in enumerate(found.verdicts)
    ]  # fmt: skip


def _alignment(structure: Any, verdict: Verdict) -> dict[str, Any]:
    place = verdict.layer, verdict.head
    out = {name: {"value": float(getattr(structure, field)[place])} for name, field in SHARES.items()}
    for name, field in STATISTICS.items():
        statistic: Aligned = getattr(structure, field)
        out[name] = {part: float(x[place]) for part, x in dataclasses.asdict(statistic).items()}
    return dict(sorted(out.items(), key=lambda item: item[0].lower()))


def _attention(seen: Behaviour, verdict: Verdict) -> dict[str, Any]:
    """From query to key, mean over prompts: as it is, and as weights predict it from other prompts of the frame."""
    place = verdict.layer, verdict.head
    return {
        "attention, observed": {"value": float(seen.attention[:, *place].mean())},
        "attention, predicted": {"value": float(seen.predicted[:, *place].mean())},
    }


def _spectra(
    config: TransformerConfig, params: Params, weights: CircuitWeights, claim: Claim, task: Task, prompts: Prompts,
    found: Judged, words: Callable[[int], str], key: Array,
) -> list[dict[str, Any]]:  # fmt: skip
    """Of claimed heads, and of the other heads of their layers as controls."""
    batch = prompts.judged
    stream = run(config, params, batch)[1].residual[:, :-1]
    rows = role_rows.read_rows(weights, stream).v
    n, length = batch.tokens.shape
    place = np.arange(length)
    labels = {}
    for name, variable in claim.variables.items():
        here = np.zeros((n, length), bool)
        for position in variable.positions:
            here |= place == np.asarray(batch.positions[position])[:, None]
        labels[name] = np.where(here, np.asarray(batch.positions[variable.classes])[:, None], -1).ravel()
    tables = task.halves()[1].answers
    answers = {name: tables[v.classes] for name, v in claim.variables.items() if v.classes in tables}
    claimed: dict[tuple[int, int], list[Claimed]] = {}
    number = {role: r for r, role in enumerate(claim.roles)}
    for verdict in found.verdicts:
        claimed.setdefault((verdict.layer, verdict.head), []).append(
            _claimed(claim, verdict, found, number[verdict.role])
        )
    layers = sorted({layer for layer, _ in claimed})
    every = {(layer, h): claimed.get((layer, h), []) for layer in layers for h in range(config.n_heads)}
    flat = rows.reshape(len(rows), n * length, -1)
    entries = spectra_of_heads(weights, flat, labels, answers, words, every, length, key)
    # Where every head is asked about every role, a head is shown as what it is supported to be.
    supported = {(v.layer, v.head, v.role) for v in found.verdicts if v.outcome == "supported"}
    for entry, (layer, head) in zip(entries, every, strict=True):
        if all(isinstance(named, str) for named in claim.heads.values()):
            entry["claimed_as"] = [role for role in entry["claimed_as"] if (layer, head, role) in supported]
    return entries


def _claimed(claim: Claim, verdict: Verdict, found: Judged, r: int) -> Claimed:
    place = verdict.layer, verdict.head
    p = [
        min(
            float(part.covariance_p[place])
            for part in half_evidence(claim.roles[verdict.role], half, found.structures, r)
        )
        for half in claim_verdicts.STRUCTURE
    ]
    return Claimed(verdict.role, verdict.findings["QK"].outcome, p[0], verdict.findings["OV"].outcome, p[1])


def _published(
    config: TransformerConfig, params: Params, claim: Claim, task: Task, bos: int, key: Array
) -> list[dict[str, Any]]:
    if not claim.published:
        return []
    if not isinstance(task, IOI):
        raise ValueError(f"published scores are of names, which the task {claim.task} has not")
    scores = published_scores(config, params, task.names, bos, key)
    rows = []
    for published in claim.published:
        values, met = compared(published, scores)
        bounds = f">= {published.at_least:g}" if published.at_least > 0 else f"<= {published.at_most:g}"
        named = (
            published.heads if isinstance(published.heads, str) else [f"{layer}.{h}" for layer, h in published.heads]
        )
        rows.append(
            {
                "score": published.score,
                "heads": [named] if isinstance(named, str) else named,
                "expected": bounds,
                "value": min(values) if published.at_least > 0 else max(values),
                "met": met,
                "source": published.source,
            }
        )
    return rows


# --- the instrument itself: verdicts against the truth, over many models ---


def instrument(arm: str, kind: str, models: Sequence[Judged]) -> dict[str, Any]:
    """Precision and recall of verdicts, and of what weights alone say, over all heads, roles and models of a kind."""
    verdicts = [v for model in models for v in model.verdicts]
    truth = np.array([x for model in models for x in model.truth or ()], bool)
    supported, structural = (
        np.array([getattr(v, name) == "supported" for v in verdicts]) for name in ("outcome", "structural")
    )
    return {
        "arm": arm,
        "kind": kind,
        "models": len(models),
        "candidates": len(verdicts),
        "true": int(truth.sum()),
        **_agreement("", supported, truth),
        **_agreement("structural_", structural, truth),
        "by_role": _by_role(verdicts, supported, truth),
    }


def _agreement(prefix: str, labels: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    both = int((labels & truth).sum())
    return {
        prefix.rstrip("_") or "supported": int(labels.sum()),
        f"{prefix}precision": precision(labels, truth),
        f"{prefix}precision_interval": proportion_interval(both, int(labels.sum())),
        f"{prefix}recall": recall(labels, truth),
        f"{prefix}recall_interval": proportion_interval(both, int(truth.sum())),
    }


def _by_role(verdicts: Sequence[Verdict], supported: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, int]]:
    roles = np.array([v.role for v in verdicts])
    return {
        role: {
            "true": int(truth[roles == role].sum()),
            "supported": int(supported[roles == role].sum()),
            "both": int((truth & supported)[roles == role].sum()),
        }
        for role in dict.fromkeys(roles.tolist())
    }


def plain(value: Any) -> Any:
    """As JSON holds it: NaN and infinities are null, arrays lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(x) for x in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
