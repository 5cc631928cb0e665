"""What a head is built to do: scores from weights alone, with the names of their counterparts in patterns.py.

They say what inputs of the right kind would make the head do; not that such inputs reach it. In a model with norms,
what a head reads is divided by the size of the residual stream; these scores take the size that the embedding gives it
(exact in the first layer up to the spread over tokens, an estimate after it).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.attention import mean_qk
from circuits_jax.circuits.composition import k_path_gaps
from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.spectra import entry_variance
from circuits_jax.circuits.weights import CircuitWeights, check_positions, per_query_head
from circuits_jax.heads import patterns
from circuits_jax.models.rotary import rotate
from circuits_jax.models.transformer import NORM_EPSILON


def previous_token(weights: CircuitWeights, queries: Array) -> Array:
    """patterns.previous_token of the attention that positions alone would give, [L,H] in [0, 1].

    Args:
        weights: of the model.
        queries: [T] bool, the positions that count.

    The pattern is the causal softmax of (W_P W_Q + b_Q)(W_P W_K + b_K)^T / sqrt(K). Rotary positions have no W_P:
    there the score depends on the offset alone, e W_Q R_offset W_K^T e^T / sqrt(K) with e the mean token. Without
    positions the pattern is uniform.
    """
    score = jax.vmap(jax.vmap(patterns.previous_token, (0, None)), (0, None))
    return score(position_pattern(weights, len(queries)), queries)


def position_pattern(weights: CircuitWeights, length: int) -> Array:
    """The causal attention pattern that positions (and attention biases) alone would give, [L,H,T,T]."""
    size = residual_size(weights, length)
    check_positions(weights)
    n_layers, _, d_model, d_head = weights.W_Q.shape
    if weights.positions == "none":
        read = jnp.zeros((length, d_model))
    elif weights.W_P is None:
        read = weights.W_E.mean(0) / size[:, None]
    else:
        read = weights.W_P[..., :length, :] / (size[:, None] if weights.positions == "learned" else 1.0)
    read = jnp.broadcast_to(read, (n_layers, length, d_model))
    q = einsum("ltd,lhdk->lhtk", read, weights.W_Q)
    k = einsum("ltd,lgdk->lgtk", read, weights.W_K)
    if weights.b_Q is not None:
        q = q + weights.b_Q[:, :, None]
    if weights.b_K is not None:
        k = k + weights.b_K[:, :, None]
    if weights.positions == "rotary":
        q, k = (rotate(x, jnp.arange(length), weights.rotary) for x in (q, k))
    scores = einsum("lhtk,lhsk->lhts", q, per_query_head(weights, k)) / math.sqrt(d_head)
    return jax.nn.softmax(scores, axis=-1, where=jnp.tril(jnp.ones((length, length), bool)))


def residual_size(weights: CircuitWeights, length: int) -> Array:
    """By what the norm divides the embedded residual at each position, averaged over tokens: [T]; 1 without a norm.

    sqrt(mean over tokens of |W_E|^2 / D + |W_P|^2 / D + epsilon), W_P where positions are added to the residual.
    """
    if weights.norm == "none":
        return jnp.ones(length)
    d_model = weights.W_E.shape[-1]
    square = jnp.broadcast_to(jnp.square(weights.W_E).sum(-1).mean(), (length,))
    if weights.positions == "learned" and weights.W_P is not None:
        square = square + jnp.square(weights.W_P[:length]).sum(-1)
    return jnp.sqrt(square / d_model + NORM_EPSILON)


def _mean_size(weights: CircuitWeights) -> Array:
    return residual_size(weights, max(weights.context_length, 1)).mean()


def k_composition(weights: CircuitWeights) -> Array:
    """Diagonal gap of the K-path circuit W_E W_QK^b (W_OV^a)^T W_E^T / sqrt(K), [L,H,L,H], sender a first.

    In units of attention score: by how much a query prefers the key where the sender wrote the query's own token
    over one where it wrote another token. Zero where the sender is not in an earlier layer. An induction edge also
    needs the sender to look one position back, and enough margin over other tokens: see induction.
    """
    sizes = _mean_size(weights) ** 3  # the query's, the sender's and the key's norm
    return k_path_gaps(weights) / (math.sqrt(weights.W_Q.shape[-1]) * sizes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InductionPrediction:
    """What weights predict for repeats of distinct tokens.

    Attributes:
        attention: [L,H] the head's induction attention, in [0, 1].
        edges: [L,H,L,H] by how much cutting the K-edge sender -> receiver lowers the receiver's.
        joint_edges: [L,H] the same with the K-edges from all senders cut at once.
    """

    attention: Array
    edges: Array
    joint_edges: Array


def induction(weights: CircuitWeights, queries: Array, n_distractors: float | Array) -> InductionPrediction:
    """Predicts induction attention, and what each K-edge contributes to it, in closed form.

    Head a gives the right key the margin z_ab = previous_token_a * k_composition_ab over a wrong one; the margins of
    all senders add up to Z_b. Over n wrong keys for each right one, softmax attention to the right key is the logistic
    function of Z - ln n; averaged over a token-to-token noise of variance v_b it is about

        p(Z) = 1 / (1 + exp(-(Z - ln n) / s)),   s = sqrt(1 + pi v / 8)

    (the logistic-normal integral, MacKay 1992), and cutting edge a costs p(Z) - p(Z - z_a). So a sender counts for
    little where others do its work: a gap alone cannot see that.

    Args:
        weights: of the model.
        queries: [T] bool, the positions from which senders have to look back.
        n_distractors: n > 0; p - 1 for repeats of period p.

    What it establishes: tokens and positions that reach the heads as embedded would make this circuit. Not that
    something else (MLPs, other layers, norms) leaves them so.
    """
    looks_back = previous_token(weights, queries)
    margins = looks_back[:, :, None, None] * k_composition(weights)
    margin = margins.sum((0, 1))
    softness = jnp.sqrt(1.0 + math.pi / 8.0 * _token_noise(weights, looks_back))

    def attention(z: Array) -> Array:
        return jax.nn.sigmoid((z - jnp.log(n_distractors)) / softness)

    whole = attention(margin)
    return InductionPrediction(
        attention=whole,
        edges=whole - attention(margin - margins),
        joint_edges=whole - attention(jnp.zeros_like(margin)),
    )


def _token_noise(weights: CircuitWeights, looks_back: Array) -> Array:
    """Variance over tokens of a right score minus a wrong one, [L,H], as each receiving head sees it.

    The keys of head b hold their own token and what the previous-token heads wrote; the first scores through
    W_E W_QK W_E^T, the second through the sum of the K-paths, weighted by how much each sender looks back.
    """
    size = _mean_size(weights)
    tokens = weights.W_E / size
    reads = mean_qk(weights)
    left = einsum("vd,mgdk->mgvk", tokens, reads.left) / math.sqrt(weights.W_Q.shape[-1])
    w_v = per_query_head(weights, weights.W_V)
    sent = einsum("lm,lh,vd,lhdk,lhke->mve", _earlier(weights), looks_back, tokens, w_v, weights.W_O)
    through_senders = LowRank(left, einsum("mgkd,mvd->mgkv", reads.right, sent / size))
    own_token = LowRank(left, einsum("mgkd,vd->mgkv", reads.right, tokens))
    on, off = entry_variance(through_senders)
    return on + off + 2 * entry_variance(own_token)[1]


def _earlier(weights: CircuitWeights) -> Array:
    """[L,L]: 1 where the first layer is in front of the second."""
    layer = jnp.arange(len(weights.W_Q))
    return (layer[:, None] < layer).astype(weights.W_Q.dtype)
