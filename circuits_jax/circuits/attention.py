"""The two circuits of a head: QK, where it looks, and OV, what it moves; in residual and position space."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.linear_algebra import einsum, matmul, qr
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights, per_query_head
from circuits_jax.models.rotary import relative

LONGEST_PROFILE = 8192  # offsets that offset_profile goes through unasked


def qk(weights: CircuitWeights, offset: ArrayLike = 0) -> LowRank:
    """W_QK = W_Q W_K^T of every head, [L,H,D,D]: x_i W_QK x_j^T / sqrt(K) is the score of query i for key j.

    Args:
        weights: of the model.
        offset: i - j. With rotary positions there is one matrix per offset, W_Q R_offset W_K^T; without, it
            changes nothing.

    Query and key biases are not part of it: see qk_with_bias. With qk-norm scores are these over the sizes of query
    and key (reading.attention_scores has them). In a post-norm model x is what the layer reads, and embeddings and
    positions are that in the first layer alone.
    """
    queries = rotated_queries(weights, jnp.atleast_1d(jnp.asarray(offset)))
    return LowRank(queries, per_query_head(weights, weights.W_K).mT)


def qk_with_bias(weights: CircuitWeights, offset: ArrayLike = 0) -> LowRank:
    """[W_Q; b_Q] R_offset [W_K; b_K]^T of every head, [L,H,D+1,D+1]: the whole score, biases too.

    [x_i, 1] M [x_j, 1]^T / sqrt(K) is the exact score before softmax of query i for key j = i - offset, with x what
    q and k read, up to the sizes of query and key with qk-norm. A missing bias is a row of zeros.

    The query bias against keys (last row) changes attention. The key bias against queries (last column) is the same
    for all keys of a query and drops out of softmax, and so does the last corner; not under rotary positions, where
    both change with the offset.
    """
    w_q, w_k = (
        jnp.concatenate([w, (jnp.zeros_like(w[..., 0, :]) if b is None else b)[..., None, :]], -2)
        for w, b in ((weights.W_Q, weights.b_Q), (weights.W_K, weights.b_K))
    )
    return qk(dataclasses.replace(weights, W_Q=w_q, W_K=w_k), offset)


def mean_qk(weights: CircuitWeights) -> LowRank:
    """W_QK averaged over all offsets of the context that a query can see; W_QK itself without rotary positions."""
    if weights.positions == "rotary" and not weights.n_context:
        raise ValueError("CircuitWeights.n_context must be given to average over the offsets of rotary positions")
    offsets = visible_offsets(weights.n_context, weights.causal)
    return LowRank(rotated_queries(weights, offsets), per_query_head(weights, weights.W_K).mT)


def visible_offsets(length: int, causal: bool) -> Array:
    """The offsets i - j among T positions at which a query sees keys: 0 ... T - 1, in an encoder from 1 - T on."""
    return jnp.arange(0 if causal else 1 - length, length)


def rotated_queries(weights: CircuitWeights, offsets: Array) -> Array:
    """mean over offsets of W_Q R_offset, [L,H,D,K]; W_Q itself without rotary positions."""
    if weights.positions != "rotary":
        return weights.W_Q
    return relative(weights.W_Q, offsets, weights.rotary)


def offset_profile(weights: CircuitWeights, offsets: ArrayLike | None = None) -> Array:
    """||W_Q R_offset W_K^T||_F of every head at N offsets i - j, [L,H,N].

    How strongly a head can match queries to keys that far back, whatever the content; constant without rotary
    positions. It is the size of the circuit, not the score of any one query and key.

    Args:
        weights: of the model.
        offsets: [N]; 0 ... n_context - 1 when left out.

    Raises:
        ValueError: offsets are left out, and the context has no length or is beyond LONGEST_PROFILE.
    """
    if offsets is None:
        length = weights.context_length
        if not length:
            raise ValueError("CircuitWeights.n_context must be given for a profile over the offsets of the context")
        if length > LONGEST_PROFILE:
            raise ValueError(
                f"offsets must be given for a context longer than {LONGEST_PROFILE}: all of them would take as many "
                f"products of all heads; got n_context={length}"
            )
        offsets = jnp.arange(length)
    offsets = jnp.asarray(offsets)
    if weights.positions != "rotary":
        norm = qk(weights).frobenius_norm()
        return jnp.broadcast_to(norm[..., None], (*norm.shape, len(offsets)))
    # Q factors keep a norm, and rotation acts on K, which the triangular factors keep: QR once for all offsets.
    r_q, r_k = qr(weights.W_Q)[1], per_query_head(weights, qr(weights.W_K)[1])

    def norm_at(offset: Array) -> Array:
        return jnp.linalg.norm(matmul(relative(r_q, offset[None], weights.rotary), r_k.mT), axis=(-2, -1))

    # One offset after the other: all at once would take n_context times the memory of the heads.
    return jnp.moveaxis(jax.lax.map(norm_at, offsets), 0, -1)


def ov(weights: CircuitWeights) -> LowRank:
    """W_OV = W_V W_O of every head, [L,H,D,D]: x_j W_OV is what the head moves from an attended position."""
    return LowRank(per_query_head(weights, weights.W_V), weights.W_O)


def ov_bias(weights: CircuitWeights) -> Array:
    """b_V W_O of every head, [L,H,D]: what the head adds whatever it attends to; zero without b_V."""
    if weights.b_V is None:
        return jnp.zeros_like(weights.W_O[..., 0, :])
    return einsum("lhk,lhkd->lhd", per_query_head(weights, weights.b_V), weights.W_O)


def position_qk(weights: CircuitWeights) -> LowRank:
    """W_P W_QK W_P^T of every head, [L,H,T,T]: how much a query position wants a key position, tokens aside; see qk.

    Raises:
        ValueError: the model has no position vectors W_P.
    """
    if weights.W_P is None:
        raise ValueError(f"position space needs W_P; a model with positions={weights.positions!r} has none")
    positions = weights.W_P[..., None, :, :] if weights.W_P.ndim == 3 else weights.W_P
    keys = per_query_head(weights, matmul(positions, weights.W_K))
    return LowRank(matmul(positions, weights.W_Q), keys.mT)
