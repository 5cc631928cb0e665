"""Memory recall: is an associative memory that a task needs already in the weights? (Bietti et al. 2306.00802.)

A matrix W remembers that x_i belongs to y_i when y_i is what it answers x_i with: argmax_j x_i W y_j^T = i. Recall is
the share of the i that it answers rightly, 1/N by chance; ties and NaN count against it. All three are of weights
alone, at the inputs that positions and tokens embed to.
"""

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import reading
from circuits_jax.circuits.attention import visible_offsets
from circuits_jax.circuits.composition import over_layer_pairs
from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.token_space import token_ov, top_share
from circuits_jax.circuits.weights import CircuitWeights, check_composes, per_query_head
from circuits_jax.heads import ideal_inputs as ideal


def output_recall(weights: CircuitWeights) -> Array:
    """R(W_O): share of tokens that raise their own logit most when a head attends to them, [L,H] in [0, 1]."""
    return top_share(token_ov(weights).own_row_rank(), k=1)


def previous_recall(weights: CircuitWeights, queries: Array) -> Array:
    """R(W_K) of a previous-token head: share of the queries [T] bool, t >= 1, that look at t - 1 most, [L,H] in [0, 1].

    Among the positions that t can see, all holding the mean token. NaN when no query counts.
    """
    rows = ideal.position_inputs(weights, len(queries))
    scores = reading.position_scores(weights, rows, rows)
    if weights.causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.mean(_is_best(scores[..., 1:, :], jnp.arange(len(queries) - 1)), axis=-1, where=queries[1:])


def match_recall(weights: CircuitWeights, tokens: Array) -> Array:
    """R(W_K) of an induction head: share of the tokens whose own key is the one it wants most, [L,H,L,H] in [0, 1].

    The key of token w is what the sender (first two axes) writes where it has attended to w: argmax_w of
    e_u W_QK^b (e_w W_OV^a)^T over the whole vocabulary is u. Zero where the sender is not in an earlier layer. With
    qk-norm all keys count as equally large, because what else they hold makes most of their size.

    Args:
        weights: of the model.
        tokens: [N] ids u that have to be matched, such as the triggers of a task.

    Raises:
        ValueError: a post-norm model, where what the sender writes does not reach the key through these weights alone.
    """
    check_composes(weights)
    rows = ideal.token_inputs(weights, weights.context_length)
    offsets = visible_offsets(weights.context_length, weights.causal)
    wanted = reading.mean_over_offsets(weights, reading.queries(weights, rows[tokens]), offsets)
    w_k, w_v = (per_query_head(weights, w) for w in (weights.W_K, weights.W_V))

    def measure(layer: Array, read: tuple[Array, Array]) -> Array:
        def of_sender(head: tuple[Array, Array]) -> Array:
            sent = matmul(matmul(rows, head[0]), head[1])
            scores = matmul(read[0], matmul(sent, read[1]).mT)
            return _is_best(scores, tokens).mean(-1)

        return jax.lax.map(of_sender, (w_v[layer], weights.W_O[layer]))

    recalled: Array = over_layer_pairs(len(w_k), lambda layer: (wanted[layer], w_k[layer]), measure)
    return recalled


def _is_best(scores: Array, right: Array) -> Array:
    """Whether entry right[i] of row i is larger than all others: scores [...,N,M], right [N] -> bool [...,N]."""
    own = scores[..., jnp.arange(len(right)), right]
    return jnp.sum(~(scores < own[..., None]), -1) == 1
