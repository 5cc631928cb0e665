"""How much a head reads of what an earlier head wrote: Q-, K- and V-composition of all pairs of heads."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import linear_algebra
from circuits_jax.circuits.attention import mean_qk
from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompositionScores:
    """q, k, v: [L,H,L,H], the sending head first, in [0, 1]; 0 where the sender is not in an earlier layer."""

    q: Array
    k: Array
    v: Array


def composition_scores(weights: CircuitWeights) -> CompositionScores:
    """Frobenius composition of head a with every later head b (Elhage et al. 2021).

    Q: ||W_OV^a W_QK^b|| / (||W_OV^a|| ||W_QK^b||)      K: ||W_OV^a (W_QK^b)^T|| / ...      V: ||W_OV^a W_OV^b|| / ...

    Only K x K matrices are formed for a pair: ||W_OV^a W_QK^b|| = ||R_V (W_O^a W_Q^b) R_K^T|| with the triangular
    factors of W_V^a and W_K^b. Two random matrices score 1/sqrt(D), so a score means nothing before that is taken
    off. With rotary positions W_QK is the one at offset 0. A zero head scores 0.

    What it establishes: how much of the sender's output subspace the receiver reads. Not that the receiver's
    attention depends on it: junk of a large norm scores as high as a circuit.
    """
    r_q, r_k, r_v, r_o = linear_algebra.qr(jnp.stack([weights.W_Q, weights.W_K, weights.W_V, weights.W_O.mT]))[1]
    ov_norm = _norm(einsum("lhij,lhkj->lhik", r_v, r_o))
    qk_norm = _norm(einsum("lhij,lhkj->lhik", r_q, r_k))

    def score(reads: Array, r_other: Array, norm: Array) -> Array:
        core = einsum("lhkd,mgdj->lhmgkj", weights.W_O, reads)
        product = einsum("lhik,lhmgkj,mgnj->lhmgin", r_v, core, r_other)
        scale = ov_norm[:, :, None, None] * norm
        earlier = jnp.arange(len(reads))[:, None, None, None] < jnp.arange(len(reads))[:, None]
        return jnp.where(earlier & (scale != 0), _norm(product) / jnp.where(scale == 0, 1.0, scale), 0.0)

    return CompositionScores(
        q=score(weights.W_Q, r_k, qk_norm), k=score(weights.W_K, r_q, qk_norm), v=score(weights.W_V, r_o, ov_norm)
    )


def k_path(weights: CircuitWeights) -> LowRank:
    """W_E W_QK^b (W_OV^a)^T W_E^T for every sender a and receiver b, [L,H,L,H,V,V].

    Entry (u, w) is how much head b, at a query token u, wants a key at which head a has written what it took from
    token w. If a looks one position back, that key is the position after w, so a large diagonal is what an induction
    head needs: the query matches the token before the key. With rotary positions W_QK is averaged over all offsets
    of the context.
    """
    reads = mean_qk(weights)
    left = einsum("vd,mgdk->mgvk", weights.W_E, reads.left)
    core = einsum("mgkd,lhjd->lhmgkj", reads.right, weights.W_O)
    right = einsum("lhmgkj,lhdj,vd->lhmgkv", core, weights.W_V, weights.W_E)
    return LowRank(jnp.broadcast_to(left, (*right.shape[:4], *left.shape[-2:])), right)


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x, axis=(-2, -1))
