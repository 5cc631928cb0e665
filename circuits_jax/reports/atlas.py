"""The head atlas as a plain dict: what head_evidence.py found in every state of a model, with tokens and heads by name.

atlas_page.py draws it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax import Array

from circuits_jax.circuits.spectra import eigenvalue_positivity
from circuits_jax.heads import nulls, taxonomy
from circuits_jax.heads.directions import MaxActivating, OVProbe, Ranked, Side
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.reports import atlas_words as words
from circuits_jax.reports.head_evidence import Results, examine
from circuits_jax.reports.material import Material
from circuits_jax.reports.studied_model import StudiedModel

PATHS = ("q", "k", "v")
N_PARTNERS = 8
MOST_EDGES = 2000
SCORES = {"qk": "matching score", "ov": "copying score"}


def atlas(
    model: StudiedModel, material: Material, key: Array, on_part: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """The atlas of a model as a plain dict: see atlas_page.

    Args:
        model: and its states.
        material: to look at it with.
        key: draws nulls, controls and designed inputs.
        on_part: is called when a part begins, with its name.
    """
    notes = [*model.notes, *words.left_out(model.config, material)]
    states = []
    for name, load in model.states:
        part = partial(_prefixed, on_part, name)
        # Not *arguments: the tuple would keep the parameters, which examine lets go.
        results = examine(
            model.config, load(), key, material.tokens, material.predicted, material.dictionary, model.bos, part
        )
        states.append({"name": name, **_state(model.config, results, material)})
    tokens = [] if material.tokens is None else material.tokens.tolist()
    return {
        "title": f"Head atlas: {model.name}",
        "facts": words.facts(model, material),
        "notes": notes,
        "captions": words.captions(model.config, material),
        "n_layers": model.config.n_layers,
        "n_heads": model.config.n_heads,
        "types": {"qk": list(QK_TYPES), "ov": list(OV_TYPES)},
        "samples": [[material.token_names[token] for token in sequence] for sequence in tokens],
        "states": states,
    }


def _prefixed(on_part: Callable[[str], None], state: str, part: str) -> None:
    on_part(f"{state}: {part}" if state else part)


def _state(config: TransformerConfig, results: Results, material: Material) -> dict[str, Any]:
    places = [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    edges = _edges(config, results)
    return {
        "maps": _maps(config.causal, results),
        "heads": [_head(config, results, material, at, edges) for at in places],
        "edges": {"total": len(edges["z"]), **{name: values[:MOST_EDGES] for name, values in edges.items()}},
    }


def _head(
    config: TransformerConfig, results: Results, material: Material, at: tuple[int, int], edges: Results
) -> dict[str, Any]:
    report = results["reports"][f"{at[0]}.{at[1]}"]
    names = material.token_names
    head: dict[str, Any] = {
        "qk": [_label(label) for label in report.qk],
        "ov": [_label(label) for label in report.ov],
        "evidence": [
            {"type": name, "side": "qk" if name in QK_TYPES else "ov", "own": report.own_batch.get(name),
             "weights": _score(of_type.get("weights")), "activations": _score(of_type.get("activations"))}
            for name, of_type in report.evidence.items()
        ],
        "spectra": {side: _spectrum(results, side, at) for side in ("qk", "ov")},
        "pairs": {side: _named_pairs(found, at, names) for side, found in results["pairs"].items()},
        "kernel": _kernel(config, results, at),
        "directions": _named_directions(results["directions"], at, [(name,) for name in names]),
        "places": [], "contexts": [], "probes": [], "effects": [],
        "partners": _partners(config, edges, at),
        "patterns": np.zeros((0, 0, 0), np.uint8),
    }  # fmt: skip
    if "patterns" in results and material.tokens is not None:
        head["patterns"] = results["patterns"][at]
        head["contexts"] = _named_directions(results["contexts"], at, _in_context(material))
    if "places" in results:
        places = [(f"position {i}",) for i in range(config.n_context)]
        head["places"] = _named_directions(results["places"], at, places)
    if "effects" in results:
        of_sequences = results["effects"][at]
        head["effects"] = [("rise of the loss, mean over sequences", of_sequences.mean())]
        head["effects"] += [(f"in sequence {i + 1}", value) for i, value in enumerate(of_sequences)]
    if "probes" in results:
        head["probes"] = _named_probes(results["probes"], at, material)
    return head


def _label(label: taxonomy.Label) -> dict[str, Any]:
    return {**dataclasses.asdict(label), "establishes": label.establishes}


def _score(score: taxonomy.Score | None) -> dict[str, Any] | None:
    return None if score is None else dataclasses.asdict(score)


def _spectrum(results: Results, side: str, at: tuple[int, int]) -> dict[str, Any]:
    found = results["spectra"][side]
    summary = [
        (field.name.replace("_", " "), float(getattr(found["summary"], field.name)[at]),
         float(getattr(found["null"], field.name)), float(getattr(found["z"], field.name)[at]))
        for field in dataclasses.fields(found["summary"]) if field.name not in ("energy_curve", "positivity")
    ]  # fmt: skip
    values = results["eigenvalues"][side][at]
    summary.append((SCORES[side], float(eigenvalue_positivity(values)), math.nan, math.nan))
    return {
        **{name: found[name][at] for name in ("sigma", "low", "high")},
        "eigenvalues": values, "summary": summary,
    }  # fmt: skip


def _named_pairs(found: Results, at: tuple[int, int], names: Sequence[str]) -> list[tuple[str, str, float]]:
    places = zip(found["rows"][at], found["columns"][at], found["values"][at], strict=True)
    named = [(names[row], names[column], float(value)) for row, column, value in places if not np.isnan(value)]
    if "wanted" not in found:
        return named
    wanted = zip(found["wanted"][at], found["wanted_values"][at], strict=True)
    return [*[("any query", names[column], float(value)) for column, value in wanted if value > 0], *named]


def _kernel(config: TransformerConfig, results: Results, at: tuple[int, int]) -> dict[str, Any]:
    values, chance = results["kernel"]
    first = 0 if config.causal else -(len(chance) // 2)
    return {"offset": np.arange(first, first + len(chance)), "value": values[at], "chance": chance}


def _named_directions(
    found: MaxActivating, at: tuple[int, int], names: Sequence[tuple[str, ...]]
) -> list[dict[str, Any]]:
    """Each row under its name: (token,), or (what stands before it, token)."""

    def side(of_side: Side, r: int) -> dict[str, Any]:
        def listed(x: Ranked) -> list[tuple[str | float, ...]]:
            # Where no rows differ in this direction, which of them come first is rounding.
            if not of_side.extremeness[at][r] > 0:
                return []
            return [
                (*names[row], float(value))
                for value, row in zip(x.values[at][r], x.rows[at][r], strict=True)
                if row >= 0
            ]

        control = float(of_side.quantile[at][r])
        return {"top": listed(of_side.top), "bottom": listed(of_side.bottom), "control": control}

    # The members of a tied group share one answer: it is said once.
    firsts = [r for r, first in enumerate(found.group[at]) if r == first]
    return [
        {"sigma": float(found.singular_values[at][r]), "size": int(found.group_size[at][r]),
         "query": side(found.query, r), "key": side(found.key, r)}
        for r in firsts
    ]  # fmt: skip


def _in_context(material: Material) -> list[tuple[str, str]]:
    """Every position of the sequences [B T]: the six tokens in front of it, and itself."""
    assert material.tokens is not None
    sequences = [[material.token_names[token] for token in tokens] for tokens in material.tokens.tolist()]
    return [
        (material.between.join([*names[max(0, place - 6) : place], ""]), names[place])
        for names in sequences for place in range(len(names))
    ]  # fmt: skip


def _named_probes(found: OVProbe, at: tuple[int, int], material: Material) -> list[dict[str, Any]]:
    def ranked(values: Array, rows: Array, names: Sequence[str]) -> list[tuple[str, float]]:
        return [(names[row], float(value)) for value, row in zip(values, rows, strict=True)]

    return [
        {
            "name": name, "gain": float(found.relative_gain[at][i]), "own": float(found.own_cosine[at][i]),
            "nearest": ranked(found.nearest.values[at][i], found.nearest.rows[at][i], material.entries),
            "tokens": ranked(found.tokens.values[at][i], found.tokens.rows[at][i], material.token_names),
        }
        for i, name in enumerate(material.entries)
    ]  # fmt: skip


def _maps(causal: bool, results: Results) -> list[dict[str, Any]]:
    positivity = {side: np.asarray(eigenvalue_positivity(results["eigenvalues"][side])) for side in ("qk", "ov")}
    rank = {side: results["spectra"][side]["z"].effective_rank for side in ("qk", "ov")}
    found = [
        ("copying score", "Re Σλ / Σ|λ| of W_E W_OV W_U", positivity["ov"], True),
        ("matching score", "Re Σλ / Σ|λ| of W_E W_QK W_Eᵀ", positivity["qk"], True),
        ("QK effective rank, z", "against random circuits of the same size", rank["qk"], True),
        ("OV effective rank, z", "against random circuits of the same size", rank["ov"], True),
    ]
    if "effects" in results:
        rise = results["effects"].mean(-1)
        found.insert(0, ("effect on the loss", "rise when zero-ablated, nats a token", rise, True))
    profile = results["kernel"][0]
    back = profile[..., profile.shape[-1] // 2 + 1 :] if not causal else profile[..., 1:]
    if back.shape[-1]:
        found.append(("previous position", "attention one back, by position alone", back[..., 0], False))
    return [{"name": n, "about": about, "values": values, "diverging": both} for n, about, values, both in found]


def _edges(config: TransformerConfig, results: Results) -> Results:
    """All pairs of heads that could compose, the largest z first."""
    if "composition" not in results:
        return {name: np.zeros(0) for name in ("sender", "receiver", "path", "score", "z")}
    z = results["composition"]["z"]
    # A score of rounding can still be far above the rounding of others.
    path, *places = np.nonzero(np.isfinite(z) & (results["composition"]["score"] > nulls.ROUNDING))
    order = np.argsort(-z[path, *places])
    path, (a_layer, a, b_layer, b) = path[order], (x[order] for x in places)
    score = results["composition"]["score"]
    return {
        "sender": a_layer * config.n_heads + a, "receiver": b_layer * config.n_heads + b, "path": path,
        "score": score[path, a_layer, a, b_layer, b], "z": z[path, a_layer, a, b_layer, b],
    }  # fmt: skip


def _partners(config: TransformerConfig, edges: Results, at: tuple[int, int]) -> dict[str, Any]:
    own = at[0] * config.n_heads + at[1]

    def listed(here: str, there: str) -> list[tuple[int, str, float, float]]:
        chosen = np.nonzero((edges[here] == own) & (edges["z"] >= words.CONVINCING))[0][:N_PARTNERS]
        return [
            (int(edges[there][i]), PATHS[int(edges["path"][i])], float(edges["score"][i]), float(edges["z"][i]))
            for i in chosen
        ]

    return {"sends": listed("sender", "receiver"), "receives": listed("receiver", "sender")}
