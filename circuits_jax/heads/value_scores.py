"""What a head moves: scores of its value vectors, by weights (of ideal inputs) and by activations (of real ones) alike.

For each of n tokens a head has a value vector v_u in R^K, and writes v_u W_O. Everything here is relative to the mean
over tokens: what does not depend on the token carries nothing about it. Logits are relative to their mean too.

What is written counts as if it were unembedded as it is. In a post-norm model, and with a transform in front of the
unembedding (BERT), it is not: there these "logits" are its similarity with what W_U reads, and no part of a logit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.composition import over_layer_pairs
from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.spectra import eigenvalue_positivity, energy_curve
from circuits_jax.circuits.weights import CircuitWeights, per_query_head

ROUNDING = 1e-5  # differences of less than this share of their size are none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueScores:
    """Scores of what heads move, [...] each.

    Attributes:
        copying: Re sum(lambda) / sum |lambda| of the logit table, in [-1, 1]: a token raises its own logit (1), lowers
            it (-1), or does neither (about 0, as a random head).
        mapping: map_sharpness of the logit table, in [0, 1]; about 2 ln(n) / n for a random head.
        extracting: concentration of what is written, in [0, 1]: 1 when tokens differ in one direction only.
    """

    copying: Array
    mapping: Array
    extracting: Array


def logit_circuit(values: Array, w_o: Array, w_u: Array) -> LowRank:
    """What each token does to each logit, both relative to their mean: [...,n,n] of rank K; 0 where all is rounding.

    Args:
        values: [...,n,K].
        w_o: [...,K,D].
        w_u: [D,n].
    """
    tokens, logits = centred(values), w_u - w_u.mean(-1, keepdims=True)
    right = matmul(w_o, logits)
    size = jnp.sqrt(einsum("...jk,...kj->...", matmul(tokens.mT, tokens), matmul(right, right.mT)))
    return LowRank(tokens, jnp.where(_rounding(size, tokens, w_o, logits)[..., None, None], 0.0, right))


def value_scores(values: Array, w_o: Array, w_u: Array) -> ValueScores:
    """All scores of heads [...]; see logit_circuit for the arguments."""
    circuit = logit_circuit(values, w_o, w_u)
    return ValueScores(
        copying=eigenvalue_positivity(circuit.eigenvalues()),
        mapping=map_sharpness(matmul(circuit.left, circuit.right)),
        extracting=concentration(values, w_o),
    )


def map_sharpness(table: Array) -> Array:
    """mean over rows u of max_{w != u} max(A_uw, 0)^2 / sum_w A_uw^2, [...] in [0, 1].

    1 - 1/n when every token raises one other token and nothing else (logits are relative to their mean); 0 for a table
    of zeros, and for one that only raises each token itself, up to 1/n.
    """
    n = table.shape[-1]
    others = jnp.where(jnp.eye(n, dtype=bool), 0.0, jnp.maximum(table, 0.0))
    return _ratio(jnp.square(others).max(-1), jnp.square(table).sum(-1)).mean(-1)


def concentration(values: Array, w_o: Array) -> Array:
    """sigma_1^2 / sum sigma^2 of the rows v_u W_O, mean removed, [...] in [0, 1]; 0 when all are equal."""
    return energy_curve(LowRank(centred(values), w_o).singular_values())[..., 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matches:
    """How well tables [n,n] match rows with columns, [...] each.

    Attributes:
        cosine: tr(A) / (||A||_F sqrt(r)) with A double-centred and r = min(K, n - 1), in [-1, 1]: 1 when A is the
            identity on r dimensions; 0 for a zero table.
        z: nulls.diagonal_z of A: against columns in random order.
        norm: ||A||_F.
    """

    cosine: Array
    z: Array
    norm: Array


def matches(trace: Array, norm: Array, n: int, rank: int) -> Matches:
    """From the trace and the Frobenius norm of double-centred tables [n,n], n >= 2."""
    cosine = _ratio(trace, norm)
    return Matches(cosine=cosine / jnp.sqrt(min(rank, n - 1)), z=cosine * jnp.sqrt(n - 1.0), norm=norm)


def token_match(values: Array, w_o: Array, w_u: Array) -> Matches:
    """Of the logit table: does a token raise itself?"""
    circuit = logit_circuit(values, w_o, w_u)
    grams = matmul(circuit.left.mT, circuit.left) * matmul(circuit.right, circuit.right.mT)
    norm = jnp.sqrt(jnp.maximum(grams.sum((-2, -1)), 0.0))
    return matches(circuit.trace(), norm, *values.shape[-2:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Relays:
    """What a head writes for a later head to read; q, k, v: Matches of [L,H,L,H], sender first, 0 where not earlier.

    q: a position in the pointer of a query against the key one position on. k: a token in a key against the same
    token in a query. v: a token in a value against its own logit, which makes the pair a virtual head that copies.
    """

    q: Matches
    k: Matches
    v: Matches


def relays(
    weights: CircuitWeights, token_values: Array, place_values: Array, token_queries: Array, place_keys: Array
) -> Relays:
    """Tables V_a W_O^a W_X^b R_b^T of all pairs, with what b matches them with: two matmuls of K x K a pair.

    All 0 in a post-norm model, where what a head writes does not reach later ones through these weights alone.

    Args:
        weights: of the model, with W_U cut down to the n tokens.
        token_values: [L,H,n,K]; place_values: [L,H,T,K], of positions.
        token_queries: [L,H,n,K]; place_keys: [L,H,T,K].
    """
    if weights.norm_position == "post":
        none = jnp.zeros(weights.W_Q.shape[:2] * 2)
        return Relays(*[Matches(none, none, none)] * 3)
    w_k, w_v = (per_query_head(weights, w) for w in (weights.W_K, weights.W_V))
    logits = matmul(weights.W_O, weights.W_U - weights.W_U.mean(-1, keepdims=True)).mT
    tokens, places = centred(token_values), centred(place_values[..., :-1, :])
    asked, found = centred(token_queries), centred(place_keys[..., 1:, :])

    def reads(layer: Array) -> tuple[tuple[Array, Array], ...]:
        pairs = ((weights.W_Q, found), (w_k, asked), (w_v, logits))
        return tuple((w[layer], right[layer]) for w, right in pairs)

    def measure(layer: Array, read: tuple[tuple[Array, Array], ...]) -> Relays:
        sent = (places, tokens, tokens)
        return Relays(*(pair(s[layer], weights.W_O[layer], *r) for s, r in zip(sent, read, strict=True)))

    def pair(left: Array, w_o: Array, w_in: Array, right: Array) -> Matches:
        core = einsum("akd,bdj->abkj", w_o, w_in)
        trace = einsum("abkj,abkj->ab", einsum("ank,bnj->abkj", left, right), core)
        grams = [einsum("hnk,hnj->hkj", x, x) for x in (left, right)]
        square = einsum(
            "abkj,abkj->ab", einsum("aik,abkj->abij", grams[0], core), einsum("abij,bjk->abik", core, grams[1])
        )
        norm = jnp.sqrt(jnp.maximum(square, 0.0))
        nothing = _rounding(norm, left[:, None], w_o[:, None], w_in, right)
        return matches(jnp.where(nothing, 0.0, trace), jnp.where(nothing, 0.0, norm), *left.shape[-2:])

    return over_layer_pairs(len(weights.W_Q), reads, measure)


def centred(rows: Array) -> Array:
    """[...,n,K] less its mean over the n; exactly zero where rows differ by rounding alone."""
    less = rows - rows.mean(-2, keepdims=True)
    squares = lambda x: jnp.square(x).sum((-2, -1), keepdims=True)  # noqa: E731
    return jnp.where(squares(less) <= ROUNDING**2 * squares(rows), 0.0, less)


def _rounding(norm: Array, *factors: Array) -> Array:
    """Whether the norm [...] of a product is what rounding leaves of factors [...,M,N] that have nothing in common."""
    sizes = [jnp.linalg.norm(factor, axis=(-2, -1)) for factor in factors]
    return norm <= ROUNDING * math.prod(sizes)


def _ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))
