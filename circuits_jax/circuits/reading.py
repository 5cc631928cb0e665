"""What heads make of given rows of the residual stream, from weights alone: queries, keys, values and scores."""

import math

import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.weights import CircuitWeights, check_positions, per_query_head
from circuits_jax.models.position_wise import unit_norm
from circuits_jax.models.rotary import relative, rotate


def normalized(weights: CircuitWeights, residual: Array) -> Array:
    """The residual stream [...,D] as heads read it: divided by its own size, as the model's norm does."""
    return unit_norm(weights.norm, residual, weights.norm_epsilon)


def qk_rows(weights: CircuitWeights, residual: Array) -> Array:
    """What queries and keys read of the residual stream [L,...,T,D]: normalized, W_P of shortformer positions added."""
    rows = normalized(weights, residual)
    if weights.positions != "shortformer" or weights.W_P is None:
        return rows
    added = weights.W_P[..., : rows.shape[-2], :]
    return rows + (jnp.expand_dims(added, range(1, rows.ndim - 2)) if added.ndim == 3 else added)


def queries(weights: CircuitWeights, rows: Array) -> Array:
    """x W_Q + b_Q of rows [n,D], or [L,n,D] by layer, over its size with qk-norm: [L,H,n,K]."""
    q = _read(rows, weights.W_Q)
    return _unit_size(weights, q if weights.b_Q is None else q + weights.b_Q[:, :, None], weights.q_gain)


def keys(weights: CircuitWeights, rows: Array) -> Array:
    """x W_K + b_K of rows [n,D], or [L,n,D] by layer, over its size with qk-norm: [L,H,n,K]."""
    k = _read(rows, weights.W_K)
    k = _unit_size(weights, k if weights.b_K is None else k + weights.b_K[:, :, None], weights.k_gain)
    return per_query_head(weights, k)


def values(weights: CircuitWeights, rows: Array) -> Array:
    """x W_V of rows [n,D], or [L,n,D] by layer, without b_V, which does not depend on them: [L,H,n,K]."""
    return per_query_head(weights, _read(rows, weights.W_V))


def _read(rows: Array, matrices: Array) -> Array:
    return einsum("nd,lhdk->lhnk" if rows.ndim == 2 else "lnd,lhdk->lhnk", rows, matrices)


def _unit_size(weights: CircuitWeights, x: Array, gain: Array | None) -> Array:
    """x [L,H,n,K] over the root mean square that it has without the gain [L,K] folded into its weights."""
    if gain is None:
        return x
    square = jnp.square(x / gain[:, None, None]).mean(-1, keepdims=True)
    return x / jnp.sqrt(square + weights.norm_epsilon)


def position_scores(weights: CircuitWeights, from_rows: Array, to_rows: Array) -> Array:
    """Scores in logits between rows that stand at the positions 0 ... T - 1, [L,H,T,T], query first, unmasked."""
    q, k = queries(weights, from_rows), keys(weights, to_rows)
    if weights.positions == "rotary":
        place = jnp.arange(q.shape[-2])
        q, k = (rotate(x, place, weights.rotary) for x in (q, k))
    return matmul(q, k.mT) / math.sqrt(q.shape[-1])


def token_scores(weights: CircuitWeights, from_rows: Array, to_rows: Array, offsets: Array) -> Array:
    """Scores in logits between rows wherever they stand, [L,H,n,m]: with rotary positions the mean over the offsets."""
    q, k = mean_over_offsets(weights, queries(weights, from_rows), offsets), keys(weights, to_rows)
    return matmul(q, k.mT) / math.sqrt(q.shape[-1])


def mean_over_offsets(weights: CircuitWeights, q: Array, offsets: Array) -> Array:
    """mean over offsets of q R_offset, for queries [...,K]; q itself without rotary positions."""
    return relative(q, offsets, weights.rotary) if weights.positions == "rotary" else q


def attention_scores(weights: CircuitWeights, residual: Array) -> Array:
    """(x_i W_Q + b_Q) R_(i-j) (x_j W_K + b_K)^T / sqrt(K) of every head, [L,H,T,T], query first, unmasked.

    The scores of the forward pass, from the folded weights and what each layer saw; rotary positions, biases, grouped
    heads and qk-norm (which divides q and k by their own size) included.

    Args:
        weights: of the model.
        residual: [L,T,D] in front of each layer, before its norm: Activations.residual[:-1].
    """
    check_positions(weights)
    rows = qk_rows(weights, residual)
    return position_scores(weights, rows, rows)
