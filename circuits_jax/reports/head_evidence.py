"""All evidence on the heads of one model, each part a compiled program: labels, spectra, pairs, directions, effects.

It is what the head atlas shows; reports/atlas.py says it in words.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.reading import qk_rows
from circuits_jax.circuits.spectra import summarize
from circuits_jax.circuits.token_space import TokenCircuit, key_preference, token_ov, token_qk
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import nulls, patterns, signatures, taxonomy
from circuits_jax.heads.composition_evidence import composition_evidence
from circuits_jax.heads.directions import MaxActivating, OVProbe, Side, max_activating, probe_ov
from circuits_jax.heads.effects import ablate, single_heads
from circuits_jax.heads.ideal_inputs import residual_size
from circuits_jax.heads.realisation import on_own_batch
from circuits_jax.heads.structure import structure
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Activations, Params, forward
from circuits_jax.tasks.batch import Batch, next_token_loss

Results = dict[str, Any]
N_PAIRS, N_DIRECTIONS, N_EXAMPLES, N_NEAREST = 12, 4, 8, 5
KERNEL = 64  # positions over which the positional kernel is drawn
NULL_DRAWS = 256
FEWEST_PAIRS = 20  # of heads in one layer that make a null
BAND = (2.5, 97.5)  # percentiles of the null band of singular values


def examine(
    config: TransformerConfig,
    params: Params,
    key: Array,
    tokens: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    dictionary: np.ndarray | None = None,
    bos: int | None = None,
    on_part: Callable[[str], None] = lambda name: None,
) -> Results:
    """All parts for one set of parameters, as NumPy arrays with [L,H] in front.

    Args:
        config, params: the model. Whoever keeps no parameters of its own saves their memory: they are let go early.
        key: draws nulls, controls and designed inputs.
        tokens: [B,T] sequences; without them patterns, contexts and effects are missing, and labels are structural.
        predicted: [B,T] bool, at which of their positions the next token counts for effects.
        dictionary: [N,D] directions to probe W_OV with; without it probes are missing.
        bos: token that sequences begin with, if there is one.
        on_part: is called when a part begins, with its name.
    """
    label_key, null_key, control_key, composition_key = jax.random.split(key, 4)
    weights = _weights(config, params)
    queries = jnp.ones(min(config.n_context, taxonomy.DEFAULT_LENGTH), bool)
    results: Results = {}
    if tokens is None:
        del params  # what follows needs the attention's weights alone
        on_part("labels from weights")
        results["reports"] = taxonomy.reports(_structure(weights, queries, label_key, bos), None, {})
    else:
        sequences = jnp.asarray(tokens)
        on_part("labels from weights and activations")
        by_weights, by_activations = _evidence(config, params, queries, label_key, bos)
        results["reports"] = taxonomy.reports(by_weights, by_activations, on_own_batch(config, params, sequences))
        on_part("attention and contexts")
        results["patterns"], results["contexts"] = _on_host(_on_text(config, params, weights, sequences, control_key))
        if config.causal and predicted is not None:
            on_part("causal effects")
            results["effects"] = _on_host(_effects(config, params, Batch(sequences, jnp.asarray(predicted), {})))
        del params
    on_part("spectra")
    results["spectra"] = {name: _on_host(_spectra(of(weights), null_key)) for name, of in (("qk", qk), ("ov", ov))}
    results["eigenvalues"] = _on_host(_eigenvalues(weights))
    on_part("token pairs")
    # Apart: each takes the memory of a few heads' entries.
    results["pairs"] = {"qk": _on_host(_qk_pairs(weights)), "ov": _on_host(_ov_pairs(weights))}
    on_part("directions")
    results["directions"] = _on_host(_directions(weights, control_key))
    if weights.W_P is not None:
        results["places"] = _on_host(_of_positions(weights, control_key))
    results["kernel"] = _on_host(_kernel(weights, min(config.n_context, KERNEL)))
    if dictionary is not None:
        on_part("probes")
        results["probes"] = _on_host(_probes(weights, jnp.asarray(dictionary, jnp.float32)))
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
    rows = qk_rows(weights, jnp.moveaxis(seen.residual[:, :-1], 1, 0))  # [L,B,T,D]
    rows = rows.reshape(config.n_layers, -1, config.d_model)
    n, k = min(N_DIRECTIONS, config.d_head, config.d_model), min(N_EXAMPLES, rows.shape[1])
    found = max_activating(qk(weights), rows, key, n=n, k=k)
    return jnp.round(255 * jnp.moveaxis(seen.patterns, 0, 2)).astype(jnp.uint8), found


def _effects(config: TransformerConfig, params: Params, batch: Batch) -> Array:
    """Rise of the loss of each sequence, in nats a token, when each head is zero-ablated: [L,H,B]."""
    # Logits of a large vocabulary are what fills the memory.
    chunk = max(1, min(32, 2**26 // (batch.tokens.size * config.n_vocab)))
    with jax.default_matmul_precision("highest"):
        fall = ablate(config, params, batch, single_heads(config), _log_likelihoods, chunk=chunk)
    return fall.reshape(config.n_layers, config.n_heads, -1)


def _log_likelihoods(logits: Array, seen: Activations, batch: Batch) -> Array:
    """outcomes.log_likelihood of each sequence, [B]."""
    return jax.vmap(lambda *one: -next_token_loss(one[0], Batch(one[1], one[2], {})))(logits, batch.tokens, batch.mask)


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
def _qk_pairs(weights: CircuitWeights) -> Results:
    """Pairs of query and key in units of attention score; keys that any query wants, [L,H,n], by the query bias."""
    root, size = weights.W_Q.shape[-1] ** 0.5, _size(weights)
    found = _pairs(token_qk(weights), root * size**2)
    if weights.b_Q is None:
        return found
    values, keys = jax.lax.top_k(key_preference(weights) / (root * size), min(N_NEAREST, len(weights.W_E)))
    return found | {"wanted": keys, "wanted_values": values}


@jax.jit
def _ov_pairs(weights: CircuitWeights) -> Results:
    """Pairs of a token attended to and a token raised or lowered, in logits in front of the last norm."""
    return _pairs(token_ov(weights), _size(weights))


def _pairs(circuit: TokenCircuit, unit: Array) -> Results:
    """The highest pairs, then the lowest, [L,H,2 n]; NaN where a head has no more of them beyond rounding."""
    highest, lowest, _ = circuit.likely_extremes(min(N_PAIRS, circuit.shape[-1] ** 2))
    values, rows, columns = (jnp.concatenate(both, -1) for both in zip(highest, lowest, strict=True))
    longest = jnp.linalg.norm(circuit.embed, axis=1).max()
    longest = longest * (longest if circuit.unembed is None else jnp.linalg.norm(circuit.unembed, axis=0).max())
    sign = jnp.repeat(jnp.array([1.0, -1.0]), highest.values.shape[-1])
    real = sign * values > nulls.ROUNDING * longest * circuit.inner.frobenius_norm()[..., None]
    return {"rows": rows, "columns": columns, "values": jnp.where(real, values / unit, jnp.nan)}


def _size(weights: CircuitWeights) -> Array:
    """By what a norm divides the embedded residual, over tokens and the first positions."""
    return residual_size(weights, max(1, min(weights.context_length, KERNEL))).mean()


@jax.jit
def _directions(weights: CircuitWeights, key: Array) -> MaxActivating:
    n_vocab, d_model = weights.W_E.shape
    size = _size(weights)
    n, k = min(N_DIRECTIONS, d_model, weights.W_Q.shape[-1]), min(N_EXAMPLES, n_vocab)
    # Rows as they are embedded: the size that norms divide by is the same for all, and comes in afterwards.
    found = max_activating(qk(weights), weights.W_E, key, n=n, k=k)

    def scaled(side: Side) -> Side:
        top, bottom = (x._replace(values=x.values / size) for x in (side.top, side.bottom))
        return dataclasses.replace(side, mean=side.mean / size, std=side.std / size, top=top, bottom=bottom)

    return dataclasses.replace(found, query=scaled(found.query), key=scaled(found.key))


@jax.jit
def _of_positions(weights: CircuitWeights, key: Array) -> MaxActivating:
    """The positions that activate the leading QK directions."""
    assert weights.W_P is not None
    n, k = min(N_DIRECTIONS, *weights.W_Q.shape[-2:]), min(N_EXAMPLES, weights.W_P.shape[-2])
    return max_activating(qk(weights), weights.W_P, key, n=n, k=k)


@partial(jax.jit, static_argnums=1)
def _kernel(weights: CircuitWeights, length: int) -> tuple[Array, Array]:
    """Attention by offset among rows that differ by their position alone, [L,H,N], and of a uniform pattern, [N].

    The offsets are -(N-1)/2 ... (N-1)/2 in an encoder, else 0 ... N - 1, at most half of the length: far ones have few
    queries, which would show a first-token head as one of the farthest offset.
    """
    every = jnp.ones(length, bool)

    def profile(pattern: Array) -> Array:
        back = patterns.offset_profile(pattern, every)[: max(1, length // 2)]
        ahead = patterns.offset_profile(pattern[::-1, ::-1], every)[: max(1, length // 2)]
        return back if weights.causal else jnp.concatenate([ahead[:0:-1], back])

    pattern = signatures.position_pattern(weights, length)
    return jax.vmap(jax.vmap(profile))(pattern), profile(patterns.uniform(length, weights.causal))


@jax.jit
def _probes(weights: CircuitWeights, dictionary: Array) -> OVProbe:
    return probe_ov(weights, dictionary, k=min(N_NEAREST, len(weights.W_E)))


@jax.jit
def _composition(weights: CircuitWeights, key: Array) -> Results:
    """score, z: [3,L,H,L,H], through q, k, v; z against pairs of one layer, or rotations where these are few."""
    found = composition_evidence(weights, key, n_draws=1)
    n_layers, n_heads = weights.W_Q.shape[:2]
    z = found.z_same_layer if n_layers * n_heads * (n_heads - 1) >= FEWEST_PAIRS else found.z_rotation
    return {name: jnp.stack([x.q, x.k, x.v]) for name, x in (("score", found.score), ("z", z))}
