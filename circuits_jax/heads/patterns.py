"""What a head did: scores of one attention pattern [T,T], each in [0, 1]; heads and batches come from vmap.

Every score is a mean over queries. `queries` [T] bool picks those that count, because a head does its work only
where the task needs it: a previous-token head that serves an induction head attends back at positions below the
longest period and anywhere after, and its mean over all positions reads .5 for a perfect one.
A score is NaN when no query counts.

In encoders (causal=False) the types mean what they mean in decoders: offsets look back, copies are earlier ones. A head
that attends to t + 1, or to later copies, has no score of its own here.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import xlogy

from circuits_jax.models.transformer import attend
from circuits_jax.tasks.batch import Batch


def previous_token(pattern: Array, queries: Array) -> Array:
    """Mean over queries t >= 1 of the attention to t - 1; 1/n_visible each for uniform attention."""
    back = jnp.diagonal(pattern, offset=-1)
    return jnp.mean(back, where=queries[1:])


def same_position(pattern: Array, queries: Array) -> Array:
    """Mean over queries t of the attention to t itself."""
    return jnp.mean(jnp.diagonal(pattern), where=queries)


def offset_profile(pattern: Array, queries: Array) -> Array:
    """f(k) = mean over queries t >= k of the attention to t - k, [T]: previous_token at k = 1, same_position at 0."""
    place = jnp.arange(len(pattern))
    key = place[:, None] - place  # [t,k]
    back = jnp.take_along_axis(pattern, jnp.maximum(key, 0), -1)
    return jnp.mean(back, 0, where=queries[:, None] & (key >= 0))


def n_visible(length: int, causal: bool = True) -> Array:
    """How many keys each of T queries can see, [T]: t + 1, or all T in an encoder."""
    return jnp.arange(1, length + 1) if causal else jnp.full(length, length)


def uniform(length: int, causal: bool = True) -> Array:
    """The pattern that attends to all keys alike that a query can see: 1/n_visible for each, [T,T]."""
    return attend(jnp.zeros((length, length)), causal)


def above_chance(score: Array, chance: Array) -> Array:
    """(score - chance) / (1 - chance): 0 for uniform attention, 1 for a perfect score; 0 where chance is 1."""
    return jnp.where(chance == 1, 0.0, (score - chance) / jnp.where(chance == 1, 1.0, 1.0 - chance))


def first_token(pattern: Array, queries: Array) -> Array:
    """Mean over queries t >= 1 of the attention to position 0. In a decoder often a resting place, not a function."""
    return jnp.mean(pattern[1:, 0], where=queries[1:])


def duplicate_token(pattern: Array, tokens: Array, queries: Array) -> Array:
    """Mean over queries t with an earlier copy of token t of the attention to all those copies."""
    copies = earlier_copies(tokens)
    return jnp.mean(jnp.sum(pattern * copies, axis=-1), where=queries & copies.any(-1))


def induction(pattern: Array, tokens: Array, queries: Array) -> Array:
    """Mean over queries t with an earlier copy of token t of the attention to the positions after those copies.

    Prefix matching of Olsson et al. 2209.11895. Queries without an earlier copy do not count, so a perfect head
    scores 1 on [BOS, r, r]. The position after a copy never lies after t; where it is t itself (the token directly
    before t is its copy) it does not count as a target.
    """
    after = after_copies(tokens)
    return jnp.mean(jnp.sum(pattern * after, axis=-1), where=queries & after.any(-1))


def after_copies(tokens: Array) -> Array:
    """[T,T] bool: entry (t,j) is true where j < t and j - 1 holds the same token as t: what induction looks for."""
    return jnp.tril(jnp.pad(earlier_copies(tokens), ((0, 0), (1, 0)))[:, :-1], k=-1)


def entropy(pattern: Array, queries: Array, causal: bool = True) -> Array:
    """Mean over queries t >= 1 of H(attention of t) / ln(n_visible): 0 for one key, 1 for uniform attention."""
    p_log_p = xlogy(pattern, jnp.where(pattern == 0, 1.0, pattern))
    most = jnp.log(n_visible(len(pattern), causal)[1:].astype(pattern.dtype))
    return jnp.mean(-p_log_p.sum(-1)[1:] / most, where=queries[1:])


def earlier_copies(tokens: Array) -> Array:
    """[T,T] bool: entry (t,j) is true where j < t holds the same token as t."""
    chex.assert_rank(tokens, 1)
    same = tokens[:, None] == tokens[None, :]
    return jnp.tril(same, k=-1)


def mean_over_sequences(scores: Array, targets: Callable[[Array], Array], batch: Batch) -> Array:
    """Mean of scores [B,...] over the sequences in which a query of batch.mask has a target; NaN where none has.

    Args:
        scores: one for each sequence.
        targets: tokens [T] -> bool [T,T], such as earlier_copies.
        batch: B sequences.
    """
    counts = (batch.mask & jax.vmap(targets)(batch.tokens).any(-1)).any(-1)
    return jnp.mean(scores, axis=0, where=counts.reshape(-1, *[1] * (scores.ndim - 1)))
