"""The two circuits of a head: QK, where it looks, and OV, what it moves; in residual, token and position space."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.models.transformer import rotate


def qk(weights: CircuitWeights, offset: ArrayLike = 0) -> LowRank:
    """W_QK = W_Q W_K^T of every head, [L,H,D,D]: x_i W_QK x_j^T / sqrt(K) is the score of query i for key j.

    Args:
        weights: of the model.
        offset: i - j. With rotary positions there is one matrix per offset, W_Q R_offset W_K^T; without, it
            changes nothing.

    Query and key biases are not part of it (see CircuitWeights.b_Q, b_K).
    """
    return LowRank(rotated_queries(weights, jnp.atleast_1d(jnp.asarray(offset))), weights.W_K.mT)


def mean_qk(weights: CircuitWeights) -> LowRank:
    """W_QK averaged over the offsets 0 ... n_context - 1; W_QK itself without rotary positions."""
    if weights.positions == "rotary" and not weights.n_context:
        raise ValueError("CircuitWeights.n_context must be given to average over the offsets of rotary positions")
    return LowRank(rotated_queries(weights, jnp.arange(weights.n_context)), weights.W_K.mT)


def rotated_queries(weights: CircuitWeights, offsets: Array) -> Array:
    """mean over offsets of W_Q R_offset, [L,H,D,K]; W_Q itself without rotary positions."""
    if weights.positions != "rotary":
        return weights.W_Q
    turned = jax.vmap(lambda offset: rotate(weights.W_Q, jnp.broadcast_to(offset, weights.W_Q.shape[-2:-1])))
    return turned(offsets).mean(0)


def ov(weights: CircuitWeights) -> LowRank:
    """W_OV = W_V W_O of every head, [L,H,D,D]: x_j W_OV is what the head moves from an attended position."""
    return LowRank(weights.W_V, weights.W_O)


def token_qk(weights: CircuitWeights, offset: ArrayLike = 0) -> LowRank:
    """W_E W_QK W_E^T of every head, [L,H,V,V]: how much a query token wants a key token, positions aside."""
    circuit = qk(weights, offset)
    return LowRank(matmul(weights.W_E, circuit.left), matmul(circuit.right, weights.W_E.T))


def token_ov(weights: CircuitWeights) -> LowRank:
    """W_E W_OV W_U of every head, [L,H,V,V]: what attending to a token (row) does to each logit (column)."""
    return LowRank(matmul(weights.W_E, weights.W_V), matmul(weights.W_O, weights.W_U))


def position_qk(weights: CircuitWeights) -> LowRank:
    """W_P W_QK W_P^T of every head, [L,H,T,T]: how much a query position wants a key position, tokens aside.

    Raises:
        ValueError: the model has no position vectors W_P.
    """
    if weights.W_P is None:
        raise ValueError(f"position space needs W_P; a model with positions={weights.positions!r} has none")
    positions = weights.W_P[..., None, :, :] if weights.W_P.ndim == 3 else weights.W_P
    return LowRank(matmul(positions, weights.W_Q), matmul(weights.W_K.mT, positions.mT))
