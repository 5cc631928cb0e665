"""The head atlas as a plain dict: what head_evidence.py found in every state of a model, with tokens and heads by name.

atlas_page.py draws it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from circuits_jax.circuits.spectra import eigenvalue_positivity
from circuits_jax.heads import nulls, taxonomy
from circuits_jax.heads.directions import MaxActivating, OVProbe, Ranked, Side
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.transformer import init_params
from circuits_jax.reports.head_evidence import Results, examine
from circuits_jax.reports.studied_model import StudiedModel

PATHS = ("q", "k", "v")
N_PARTNERS = 8
MOST_EDGES = 2000


@dataclasses.dataclass(frozen=True)
class Material:
    """What heads are shown and asked about, besides their weights.

    Attributes:
        token_names: [V] the tokens as text.
        tokens: [B,T] sequences, or None: then all is from weights alone.
        about: what the sequences are.
        between: what stands between tokens in a row.
        entries, dictionary: names and directions [N,D] to probe W_OV with; no names, no probes.
    """

    token_names: Sequence[str]
    tokens: np.ndarray | None = None
    about: str = ""
    between: str = ""
    entries: Sequence[str] = ()
    dictionary: np.ndarray | None = None


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
    notes = [*model.notes, *_left_out(model.config, material)]
    states = []
    for name, load in model.states:
        part = partial(_prefixed, on_part, name)
        results = examine(model.config, load(), key, material.tokens, material.dictionary, model.bos, part)
        states.append({"name": name, **_state(model.config, results, material)})
    tokens = [] if material.tokens is None else material.tokens.tolist()
    return {
        "title": f"Head atlas: {model.name}",
        "facts": _facts(model, material),
        "notes": notes,
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
        "maps": _maps(results),
        "heads": [_head(config, results, material, at, edges) for at in places],
        "edges": {name: values[:MOST_EDGES] for name, values in edges.items()},
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
        "kernel": {
            "about": "attention to the key that many positions back, among rows that differ by position alone",
            "offset": np.arange(results["kernel"].shape[-1]), "value": results["kernel"][at],
        },
        "directions": _named_directions(results["directions"], at, names),
        "contexts": [], "probes": [], "effects": [],
        "partners": _partners(config, edges, at),
        "patterns": np.zeros((0, 0, 0), np.uint8),
    }  # fmt: skip
    if "patterns" in results and material.tokens is not None:
        head["patterns"] = results["patterns"][at]
        head["contexts"] = _named_directions(results["contexts"], at, _in_context(material))
    if "effects" in results:
        head["effects"] = [("rise of the loss when zero-ablated (nats a token)", results["effects"][at])]
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
    return {
        **{name: found[name][at] for name in ("sigma", "low", "high")},
        "eigenvalues": results["eigenvalues"][side][at], "summary": summary,
    }  # fmt: skip


def _named_pairs(found: Results, at: tuple[int, int], names: Sequence[str]) -> list[tuple[str, str, float]]:
    places = zip(found["rows"][at], found["columns"][at], found["values"][at], strict=True)
    return [(names[row], names[column], float(value)) for row, column, value in places if not np.isnan(value)]


def _named_directions(found: MaxActivating, at: tuple[int, int], names: Sequence[str]) -> list[dict[str, Any]]:
    def side(of_side: Side, r: int) -> dict[str, Any]:
        def listed(x: Ranked) -> list[tuple[str, float]]:
            # Where no rows differ in this direction, which of them come first is rounding.
            if not of_side.extremeness[at][r] > 0:
                return []
            return [
                (names[row], float(value))
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


def _in_context(material: Material) -> list[str]:
    """Every position of the sequences [B T] as the tokens in front of it and itself, in brackets."""
    assert material.tokens is not None

    def upto(names: list[str]) -> str:
        return material.between.join([*names[-7:-1], f"[{names[-1]}]"])

    sequences = [[material.token_names[token] for token in tokens] for tokens in material.tokens.tolist()]
    return [upto(names[: place + 1]) for names in sequences for place in range(len(names))]


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


def _maps(results: Results) -> list[dict[str, Any]]:
    positivity = {side: np.asarray(eigenvalue_positivity(results["eigenvalues"][side])) for side in ("qk", "ov")}
    rank = {side: results["spectra"][side]["z"].effective_rank for side in ("qk", "ov")}
    found = [
        ("copying score", "Re Σλ / Σ|λ| of W_E W_OV W_U", positivity["ov"], True),
        ("matching score", "Re Σλ / Σ|λ| of W_E W_QK W_Eᵀ", positivity["qk"], True),
        ("QK effective rank, z", "against random circuits of the same size", rank["qk"], True),
        ("OV effective rank, z", "against random circuits of the same size", rank["ov"], True),
    ]
    if "effects" in results:
        found.insert(0, ("effect on the loss", "rise when zero-ablated, nats a token", results["effects"], True))
    if results["kernel"].shape[-1] > 1:
        found.append(("previous position", "attention one back, by position alone", results["kernel"][..., 1], False))
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
        chosen = np.nonzero(edges[here] == own)[0][:N_PARTNERS]
        return [
            (int(edges[there][i]), PATHS[int(edges["path"][i])], float(edges["score"][i]), float(edges["z"][i]))
            for i in chosen
        ]

    return {"sends": listed("sender", "receiver"), "receives": listed("receiver", "sender")}


def _left_out(config: TransformerConfig, material: Material) -> list[str]:
    said = {
        "From weights alone: labels are structural, and attention on text, contexts and causal effects are missing.":
            material.tokens is None,
        "No causal effects: an encoder predicts no next token, so ablations have no loss to raise.":
            material.tokens is not None and not config.causal,
        "No composition: in a post-norm model gains of norms stand between what one layer writes and what the next "
        "one reads.": config.norm_position == "post",
        "In front of the unembedding this model has a nonlinear transform: pairs and copying scores of OV circuits "
        "compare embeddings, they are no logits.": config.unembed_transform,
        "Queries and keys are divided by their size: pairs, directions and spectra of QK circuits are those of W_QK "
        "without it.": config.qk_norm,
        "Rotary positions: W_QK changes with the offset; pairs, directions, spectra and composition are those at "
        "offset 0.": config.positions == "rotary",
        "Token pairs are those of embeddings as the first layer reads them, at their mean size: further on the "
        "residual stream is larger, so scores and logits of single tokens are smaller.": config.norm != "none",
        "Strongest pairs: every pair of which one token is among the 128 of largest projection is compared; weaker "
        "ones are left out.": config.n_vocab > 128,
    }  # fmt: skip
    return [note for note, holds in said.items() if holds]


def _facts(model: StudiedModel, material: Material) -> list[tuple[str, str]]:
    config = model.config
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    groups = f", {config.n_groups} key/value heads" if config.n_groups != config.n_heads else ""
    return [
        ("layers × heads", f"{config.n_layers} × {config.n_heads}{groups}"),
        ("d_model, d_head, d_mlp", f"{config.d_model}, {config.d_head}, {config.d_mlp or 'none'}"),
        ("parameters", f"{sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)):,}"),
        ("vocabulary, context", f"{config.n_vocab:,}, {config.n_context:,}"),
        ("positions, norm", f"{config.positions}, {config.norm} ({config.norm_position})"),
        ("sequences begin with", "any token" if model.bos is None else material.token_names[model.bos]),
        ("shown", material.about or "nothing: weights alone"),
    ]
