"""Everything that the head atlas says of a model: labels with their evidence, spectra, pairs, directions, effects.

Each part is one compiled program over all heads. `atlas` gathers them as a plain dict, which atlas_page.py draws.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.reading import normalized
from circuits_jax.circuits.spectra import eigenvalue_positivity, summarize
from circuits_jax.circuits.token_space import TokenCircuit, token_ov, token_qk
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import nulls, patterns, signatures, taxonomy
from circuits_jax.heads.composition_evidence import composition_evidence
from circuits_jax.heads.directions import MaxActivating, OVProbe, Side, max_activating, probe_ov
from circuits_jax.heads.effects import ablate, single_heads
from circuits_jax.heads.ideal_inputs import residual_size
from circuits_jax.heads.realisation import on_own_batch
from circuits_jax.heads.structure import structure
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.transformer import Params, forward, init_params
from circuits_jax.reports.studied_model import StudiedModel
from circuits_jax.tasks.batch import Batch

Results = dict[str, Any]
PATHS = ("q", "k", "v")
N_PAIRS, N_DIRECTIONS, N_EXAMPLES, N_NEAREST, N_PARTNERS = 12, 4, 8, 5, 8
MOST_EDGES = 2000
KERNEL = 64  # positions over which the positional kernel is drawn
NULL_DRAWS = 256
BAND = (2.5, 97.5)  # percentiles of the null band of singular values


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
        results = examine(model.config, load(), material, model.bos, key, partial(_prefixed, on_part, name))
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


# --- what is computed ---


def examine(
    config: TransformerConfig,
    params: Params,
    material: Material,
    bos: int | None,
    key: Array,
    on_part: Callable[[str], None],
) -> Results:
    """All parts for one set of parameters, as NumPy arrays with [L,H] in front."""
    label_key, null_key, control_key, composition_key = jax.random.split(key, 4)
    weights = _weights(config, params)
    queries = jnp.ones(min(config.n_context, taxonomy.DEFAULT_LENGTH), bool)
    results: Results = {}
    if material.tokens is None:
        del params  # what follows needs the attention's weights alone
        on_part("labels from weights")
        results["reports"] = taxonomy.reports(_structure(weights, queries, label_key, bos), None, {})
    else:
        tokens = jnp.asarray(material.tokens)
        on_part("labels from weights and activations")
        by_weights, by_activations = _evidence(config, params, queries, label_key, bos)
        results["reports"] = taxonomy.reports(by_weights, by_activations, on_own_batch(config, params, tokens))
        on_part("attention and contexts")
        results["patterns"], results["contexts"] = _on_host(_on_text(config, params, weights, tokens, control_key))
        if config.causal:
            on_part("causal effects")
            results["effects"] = _on_host(_effects(config, params, tokens))
        del params
    on_part("spectra")
    results["spectra"] = {name: _on_host(_spectra(of(weights), null_key)) for name, of in (("qk", qk), ("ov", ov))}
    results["eigenvalues"] = _on_host(_eigenvalues(weights))
    on_part("token pairs")
    results["pairs"] = {name: _on_host(_pairs(of(weights))) for name, of in (("qk", token_qk), ("ov", token_ov))}
    on_part("directions")
    results["directions"] = _on_host(_directions(weights, control_key))
    results["kernel"] = _on_host(_kernel(weights, min(config.n_context, KERNEL)))
    if material.dictionary is not None:
        on_part("probes")
        results["probes"] = _on_host(_probes(weights, jnp.asarray(material.dictionary, jnp.float32)))
    if config.norm_position == "pre" and config.n_layers > 1:
        on_part("composition")
        results["composition"] = _on_host(_composition(weights, composition_key))
    return results


def _on_host(found: Any) -> Any:
    """Waits for one part before the next one begins: together they would take the memory of all."""
    return jax.tree.map(np.asarray, found)


@partial(jax.jit, static_argnums=0)
def _weights(config: TransformerConfig, params: Params) -> CircuitWeights:
    return CircuitWeights.from_params(config, params)


@partial(jax.jit, static_argnums=3)
def _structure(weights: CircuitWeights, queries: Array, key: Array, bos: int | None) -> Any:
    return structure(weights, queries, key, bos=bos).evidence


@partial(jax.jit, static_argnums=(0, 4))
def _evidence(config: TransformerConfig, params: Params, queries: Array, key: Array, bos: int | None) -> Any:
    return taxonomy.evidence(config, params, queries, key, bos)


@partial(jax.jit, static_argnums=0)
def _on_text(
    config: TransformerConfig, params: Params, weights: CircuitWeights, tokens: Array, key: Array
) -> tuple[Array, MaxActivating]:
    """Patterns uint8 [L,H,B,T,T], and the positions [B T] that activate the leading QK directions."""
    with jax.default_matmul_precision("highest"):
        _, seen = forward(config, params, tokens)
    rows = normalized(weights, jnp.moveaxis(seen.residual[:, :-1], 1, 0))
    rows = rows.reshape(config.n_layers, -1, config.d_model)
    n, k = min(N_DIRECTIONS, config.d_head, config.d_model), min(N_EXAMPLES, rows.shape[1])
    found = max_activating(qk(weights), rows, key, n=n, k=k)
    return jnp.round(255 * jnp.moveaxis(seen.patterns, 0, 2)).astype(jnp.uint8), found


def _effects(config: TransformerConfig, params: Params, tokens: Array) -> Array:
    """Rise of the loss in nats a token when each head is zero-ablated, [L,H]."""
    mask = jnp.ones(tokens.shape, bool).at[:, -1].set(False)
    # Logits of a large vocabulary are what fills the memory.
    chunk = max(1, min(32, 2**26 // (tokens.size * config.n_vocab)))
    with jax.default_matmul_precision("highest"):
        fall = ablate(config, params, Batch(tokens, mask, {}), single_heads(config), chunk=chunk)
    return fall.reshape(config.n_layers, config.n_heads)


@jax.jit
def _spectra(circuit: LowRank, key: Array) -> Results:
    """Singular values, the band of random circuits of the same size, and summaries with z against these."""
    one = circuit[0, 0]

    def statistic(drawn: LowRank) -> Any:
        return drawn.singular_values() / drawn.frobenius_norm(), summarize(drawn)

    null = nulls.draw(statistic, one, nulls.random_circuits, key, NULL_DRAWS)
    shapes, of_null = null.draws
    found, size = summarize(circuit), circuit.frobenius_norm()[..., None]
    low, high = (size * jnp.percentile(shapes, q, axis=0) for q in BAND)
    return {
        "sigma": circuit.singular_values(), "low": low, "high": high,
        "summary": found, "null": nulls.Null(of_null).mean, "z": nulls.z_score(found, nulls.Null(of_null)),
    }  # fmt: skip


@jax.jit
def _eigenvalues(weights: CircuitWeights) -> Results:
    return {"qk": token_qk(weights).eigenvalues(), "ov": token_ov(weights).eigenvalues()}


@jax.jit
def _pairs(circuit: TokenCircuit) -> Results:
    found, bound = circuit.likely_top_k(min(N_PAIRS, circuit.shape[-1] ** 2))
    return {"rows": found.rows, "columns": found.columns, "values": found.values, "bound": bound}


@jax.jit
def _directions(weights: CircuitWeights, key: Array) -> MaxActivating:
    n_vocab, d_model = weights.W_E.shape
    size = residual_size(weights, max(1, min(weights.context_length, KERNEL))).mean()
    n, k = min(N_DIRECTIONS, d_model, weights.W_Q.shape[-1]), min(N_EXAMPLES, n_vocab)
    # Rows as they are embedded: the size that norms divide by is the same for all, and comes in afterwards.
    found = max_activating(qk(weights), weights.W_E, key, n=n, k=k)

    def scaled(side: Side) -> Side:
        top, bottom = (x._replace(values=x.values / size) for x in (side.top, side.bottom))
        return dataclasses.replace(side, mean=side.mean / size, std=side.std / size, top=top, bottom=bottom)

    return dataclasses.replace(found, query=scaled(found.query), key=scaled(found.key))


@partial(jax.jit, static_argnums=1)
def _kernel(weights: CircuitWeights, length: int) -> Array:
    """Attention by offset among rows that differ by their position alone, [L,H,T]."""
    pattern = signatures.position_pattern(weights, length)
    return jax.vmap(jax.vmap(lambda x: patterns.offset_profile(x, jnp.ones(length, bool))))(pattern)


@jax.jit
def _probes(weights: CircuitWeights, dictionary: Array) -> OVProbe:
    return probe_ov(weights, dictionary, k=min(N_NEAREST, len(weights.W_E)))


@jax.jit
def _composition(weights: CircuitWeights, key: Array) -> Results:
    """score, z: [3,L,H,L,H], through q, k, v; z against pairs of one layer, or random rotations where there are none."""
    found = composition_evidence(weights, key, n_draws=1)
    z = found.z_rotation if weights.W_Q.shape[1] == 1 else found.z_same_layer
    return {name: jnp.stack([x.q, x.k, x.v]) for name, x in (("score", found.score), ("z", z))}


# --- what is said of it ---


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
    pairs = {side: _named_pairs(jax.tree.map(lambda x: x[at], of_side), names) for side, of_side in results["pairs"].items()}
    head: dict[str, Any] = {
        "qk": [_label(label) for label in report.qk],
        "ov": [_label(label) for label in report.ov],
        "evidence": [
            {"type": name, "side": "qk" if name in QK_TYPES else "ov", "own": report.own_batch.get(name),
             "weights": _score(of_type.get("weights")), "activations": _score(of_type.get("activations"))}
            for name, of_type in report.evidence.items()
        ],
        "spectra": {side: _spectrum(results, side, at) for side in ("qk", "ov")},
        "pairs": pairs,
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


def _named_pairs(found: Results, names: Sequence[str]) -> list[tuple[str, str, float]]:
    return [
        (names[row], names[column], float(value))
        for row, column, value in zip(found["rows"], found["columns"], found["values"], strict=True)
    ]


def _named_directions(found: MaxActivating, at: tuple[int, int], names: Sequence[str]) -> list[dict[str, Any]]:
    def side(of_side: Side, r: int) -> dict[str, Any]:
        top, bottom = (
            [(names[row], float(value)) for value, row in zip(x.values[at][r], x.rows[at][r], strict=True) if row >= 0]
            for x in (of_side.top, of_side.bottom)
        )
        return {"top": top, "bottom": bottom, "control": float(of_side.quantile[at][r])}

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
    names = material.token_names
    return [
        material.between.join([*(names[token] for token in sequence[max(0, place - 6) : place]), f"[{names[sequence[place]]}]"])
        for sequence in material.tokens.tolist() for place in range(len(sequence))
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


def _maps(results: Results) -> list[dict[str, Any]]:
    positivity = {side: np.asarray(eigenvalue_positivity(results["eigenvalues"][side])) for side in ("qk", "ov")}
    found = [
        ("copying score", "Re Σλ / Σ|λ| of W_E W_OV W_U", positivity["ov"], True),
        ("matching score", "Re Σλ / Σ|λ| of W_E W_QK W_Eᵀ", positivity["qk"], True),
        ("QK effective rank, z", "against random circuits of the same size", results["spectra"]["qk"]["z"].effective_rank, True),
        ("OV effective rank, z", "against random circuits of the same size", results["spectra"]["ov"]["z"].effective_rank, True),
    ]  # fmt: skip
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

    def listed(here: str, there: str) -> list[tuple[str, str, float, float]]:
        chosen = np.nonzero(edges[here] == own)[0][:N_PARTNERS]
        name = lambda head: f"{head // config.n_heads}.{head % config.n_heads}"  # noqa: E731
        return [
            (name(int(edges[there][i])), PATHS[int(edges["path"][i])], float(edges["score"][i]), float(edges["z"][i]))
            for i in chosen
        ]

    return {"sends": listed("sender", "receiver"), "receives": listed("receiver", "sender")}


def _left_out(config: TransformerConfig, material: Material) -> list[str]:
    notes = []
    if material.tokens is None:
        notes.append("From weights alone: no batch was given and there is no tokenizer to make one, so labels are structural, and attention on text, contexts and causal effects are missing.")
    elif not config.causal:
        notes.append("No causal effects: an encoder predicts no next token, so ablations have no loss to raise.")
    if config.norm_position == "post":
        notes.append("No composition: in a post-norm model gains of norms stand between what one layer writes and what the next one reads.")
    if config.unembed_transform:
        notes.append("In front of the unembedding this model has a nonlinear transform: pairs and copying scores of OV circuits compare embeddings, they are no logits.")
    if config.qk_norm:
        notes.append("Queries and keys are divided by their size: pairs, directions and spectra of QK circuits are those of W_QK without it.")
    notes.append("Strongest pairs: every pair of which one token is among the 128 of largest projection is compared; weaker ones are left out.")
    return notes


def _facts(model: StudiedModel, material: Material) -> list[tuple[str, str]]:
    config = model.config
    n_params = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0)))))
    groups = f", {config.n_groups} key/value heads" if config.n_groups != config.n_heads else ""
    return [
        ("layers × heads", f"{config.n_layers} × {config.n_heads}{groups}"),
        ("d_model, d_head, d_mlp", f"{config.d_model}, {config.d_head}, {config.d_mlp or 'none'}"),
        ("parameters", f"{n_params:,}"),
        ("vocabulary, context", f"{config.n_vocab:,}, {config.n_context:,}"),
        ("positions, norm", f"{config.positions}, {config.norm} ({config.norm_position})"),
        ("shown", material.about or "nothing: weights alone"),
    ]
