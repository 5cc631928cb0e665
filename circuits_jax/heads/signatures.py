"""What a head is built to do: scores from weights alone, with the names of their counterparts in patterns.py.

They say what inputs of the right kind would make the head do; not that such inputs reach it. In a model with norms,
what a head reads is divided by the size of the residual stream; these scores take the size that the embedding gives it
(exact in the first layer up to the spread over tokens, an estimate after it), and so with the sizes of qk-norm.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.attention import mean_qk
from circuits_jax.circuits.composition import k_path_gaps
from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.reading import position_scores
from circuits_jax.circuits.spectra import entry_variance
from circuits_jax.circuits.weights import CircuitWeights, per_query_head
from circuits_jax.heads import patterns
from circuits_jax.heads.ideal_inputs import at_size_of, position_inputs, residual_size
from circuits_jax.models.transformer import attend


def previous_token(weights: CircuitWeights, queries: Array) -> Array:
    """patterns.previous_token of the attention that positions alone would give, [L,H] in [0, 1].

    Args:
        weights: of the model.
        queries: [T] bool, the positions that count.

    See position_pattern.
    """
    score = jax.vmap(jax.vmap(patterns.previous_token, (0, None)), (0, None))
    return score(position_pattern(weights, len(queries)), queries)


def position_pattern(weights: CircuitWeights, length: int) -> Array:
    """The attention pattern among positions that all hold the mean token e, [L,H,T,T].

    The softmax of ((e + W_P) W_Q + b_Q)((e + W_P) W_K + b_K)^T / sqrt(K), over the keys that a query can see. With
    rotary positions there is no W_P: the score depends on the offset alone, e W_Q R_offset W_K^T e^T / sqrt(K). Without
    positions the pattern is uniform.
    """
    rows = position_inputs(weights, length)
    return attend(position_scores(weights, rows, rows), weights.causal)


def _mean_size(weights: CircuitWeights) -> Array:
    return residual_size(weights, max(weights.context_length, 1)).mean()


def k_composition(weights: CircuitWeights) -> Array:
    """Diagonal gap of the K-path circuit W_E W_QK^b (W_OV^a)^T W_E^T / sqrt(K), [L,H,L,H], sender a first.

    In units of attention score: by how much a query prefers the key where the sender wrote the query's own token
    over one where it wrote another token. Zero where the sender is not in an earlier layer. An induction edge also
    needs the sender to look one position back, and enough margin over other tokens: see induction.

    Raises:
        ValueError: a post-norm model, where what the sender wrote does not reach the key through these weights alone.
    """
    size = _mean_size(weights)  # of the norms of query, sender and key
    linear = at_size_of(weights, weights.W_E / size)
    return k_path_gaps(linear) / (math.sqrt(weights.W_Q.shape[-1]) * size**3)


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

    Raises:
        ValueError: a post-norm model, as in k_composition.
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


def usual_distractors(weights: CircuitWeights, length: int) -> float:
    """How many keys do not match, for a query among T positions: T/2 on average, T in an encoder."""
    return length / 2 if weights.causal else float(length)


def matching(scores: Array, n_distractors: float | Array, n_matches: int) -> Array:
    """Attention of a query to one key that matches it, above chance: 0 for uniform attention, 1 at most; n >= 2.

    p = mean_u exp(s_uu) / (m exp(s_uu) + N mean_{w != u} exp(s_uw)), returned as (p - c) / (1 - c), c = 1/(m + N).

    Args:
        scores: [n,n] in logits; row u is a query, column u the key that matches it.
        n_distractors: N, keys that do not match.
        n_matches: m, keys that do. 1 for induction (the key after the token, or the position that a pointer asks
            for); 2 for duplicate tokens, where the query's own position matches too, so that 1/2 is the most.
    """
    n = len(scores)
    others = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, scores)
    distraction = jax.nn.logsumexp(others, -1) - math.log(n - 1) + jnp.log(n_distractors)
    attention = jnp.exp(-jnp.logaddexp(math.log(n_matches), distraction - jnp.diagonal(scores))).mean()
    chance = 1 / (n_matches + n_distractors)
    return (attention - chance) / (1 - chance)


def content(tokens: Array, positions: Array, cross: Array) -> Array:
    """Share of the score's energy that tokens alone decide, in [0, 1).

    E_tokens / (E_tokens + E_positions + E_cross + 1). Energies are mean squares of double-centred scores in logits, of
    which the 1 is the unit: where scores differ by less, softmax hardly sees it. Pairs of the same token do not count
    (they are duplicate_token's), so a head that matches tokens with themselves scores about 0. A random head has
    whatever share the sizes of embeddings and positions give it, so the taxonomy takes the share of its rotations off.

    Args:
        tokens: [n,n] scores between tokens.
        positions: [T,T] scores between positions.
        cross: [] energy of what tokens and positions decide together.
    """
    energy = energy_between_different(tokens)
    return energy / (energy + jnp.square(double_centred(positions)).mean() + cross + 1.0)


def double_centred(scores: Array) -> Array:
    """[...,m,n] without its row, column and grand means."""
    rows = scores - scores.mean(-1, keepdims=True)
    return rows - rows.mean(-2, keepdims=True)


def energy_between_different(scores: Array) -> Array:
    """Mean square off the diagonal of [n,n] scores less what rows and columns give alone, n >= 3."""
    off = ~jnp.eye(len(scores), dtype=bool)
    return jnp.mean(jnp.square(double_centred(additive_diagonal(scores))), where=off)


def additive_diagonal(scores: Array) -> Array:
    """[...,n,n] with the diagonal that rows and columns predict from the rest, n >= 3.

    Least squares of s_uw = m + r_u + c_w over u != w, in closed form: with row and column sums R, C of the rest and
    its mean m, r_u + c_u = (R_u + C_u - 2 (n - 1) m) / (n - 2). Double-centring then leaves the residuals of that fit.
    """
    n = scores.shape[-1]
    diagonal = jnp.eye(n, dtype=bool)
    rest = jnp.where(diagonal, 0.0, scores)
    mean = rest.sum((-2, -1)) / (n * (n - 1))
    alone = (rest.sum(-1) + rest.sum(-2) - 2 * (n - 1) * mean[..., None]) / (n - 2)
    return jnp.where(diagonal, (mean[..., None] + alone)[..., None], scores)


def _token_noise(weights: CircuitWeights, looks_back: Array) -> Array:
    """Variance over tokens of a right score minus a wrong one, [L,H], as each receiving head sees it.

    The keys of head b hold their own token and what the previous-token heads wrote; the first scores through
    W_E W_QK W_E^T, the second through the sum of the K-paths, weighted by how much each sender looks back.
    """
    size = _mean_size(weights)
    tokens = weights.W_E / size
    reads = mean_qk(at_size_of(weights, tokens))
    w_v = per_query_head(weights, weights.W_V)
    layers = jnp.arange(len(weights.W_Q))

    def of_layer(layer: Array) -> Array:
        left = matmul(tokens, reads.left[layer]) / math.sqrt(weights.W_Q.shape[-1])
        share = jnp.where(layers[:, None] < layer, looks_back, 0.0)[..., None, None]
        sent = matmul(tokens, einsum("lhdk,lhke->de", share * w_v, weights.W_O)) / size
        through_senders, own_token = (LowRank(left, matmul(reads.right[layer], x.T)) for x in (sent, tokens))
        on, off = entry_variance(through_senders)
        return on + off + 2 * entry_variance(own_token)[1]

    # One receiving layer after the other: a vocabulary of 50,000 times the heads of all would take gigabytes.
    return jax.lax.map(of_layer, layers)
