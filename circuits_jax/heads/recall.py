"""Memory recall: is an associative memory that a task needs already in the weights? (Bietti et al. 2306.00802.)

A matrix W remembers that x_i belongs to y_i when y_i is what it answers x_i with: argmax_j x_i W y_j^T = i. Recall is
the share of the i that it answers rightly, 1/N by chance; ties and NaN count against it. All three are of weights
alone, at the inputs that positions and tokens embed to.
"""

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import reading
from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.token_space import token_ov, top_share
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import ideal_inputs as ideal


def output_recall(weights: CircuitWeights) -> Array:
    """R(W_O): share of tokens that raise their own logit most when a head attends to them, [L,H] in [0, 1]."""
    return top_share(token_ov(weights).own_row_rank(), k=1)


def previous_recall(weights: CircuitWeights, queries: Array) -> Array:
    """R(W_K) of a previous-token head: share of the queries [T] bool, t >= 1, that look at t - 1 most, [L,H] in [0, 1].

    Among the positions up to t, all holding the mean token. NaN when no query counts.
    """
    rows = ideal.position_inputs(weights, len(queries))
    scores = reading.position_scores(weights, rows, rows)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    seen = jnp.where(causal, scores, -jnp.inf)
    return jnp.mean(_is_best(seen[..., 1:, :], jnp.arange(len(queries) - 1)), axis=-1, where=queries[1:])


def match_recall(weights: CircuitWeights, tokens: Array) -> Array:
    """R(W_K) of an induction head: share of the tokens whose own key is the one it wants most, [L,H,L,H] in [0, 1].

    The key of token w is what the sender (first two axes) writes where it has attended to w: argmax_w of
    e_u W_QK^b (e_w W_OV^a)^T over the whole vocabulary is u. Zero where the sender is not in an earlier layer.

    Args:
        weights: of the model.
        tokens: [N] ids u that have to be matched, such as the triggers of a task.
    """
    n_layers, n_heads = weights.W_Q.shape[:2]
    rows = ideal.token_inputs(weights, weights.context_length)
    offsets = jnp.arange(weights.context_length)
    wanted = reading.mean_over_offsets(weights, reading.queries(weights, rows[tokens]), offsets)
    moved = reading.values(weights, rows)

    def of_sender(layer: Array, head: Array) -> Array:
        sent = matmul(moved[layer, head], weights.W_O[layer, head])
        scores = matmul(wanted, reading.keys(weights, sent).mT)
        recalled = _is_best(scores, tokens).mean(-1)
        return jnp.where(jnp.arange(n_layers)[:, None] > layer, recalled, 0.0)

    senders = jnp.indices((n_layers, n_heads)).reshape(2, -1)
    of_all = jax.lax.map(lambda at: of_sender(*at), tuple(senders))
    return of_all.reshape(n_layers, n_heads, n_layers, n_heads)


def _is_best(scores: Array, right: Array) -> Array:
    """Whether entry right[i] of row i is larger than all others: scores [...,N,M], right [N] -> bool [...,N]."""
    own = scores[..., jnp.arange(len(right)), right]
    return jnp.sum(~(scores < own[..., None]), -1) == 1
