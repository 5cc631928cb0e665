"""What claimed roles ask of prompts, as arrays, and what heads read where they ask.

Three kinds of prompts, drawn apart:

    known     with other words (names, nouns) than those judged: what sets one position apart from others
    pairs     sentences that differ in one variable alone: what sets one of its classes apart from another. With other
              words too, unless the classes are words, whose directions nothing else tells
    judged    on which attention and effects are measured

Nothing is estimated on the prompts on which it is judged. Classes are told by pairs and not by means over sentences,
because variables need not be independent: who is the subject is never the object, and a mean would tell of both.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.reading import normalized, qk_rows
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.tasks.batch import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """Where a role looks in B prompts: int [B] each, R in front for many roles.

    Attributes:
        query, key: positions.
        over: the position that the key is held against; -1 for all other words up to the query.
        frame: which sentence frame. What sets a position apart is told frame by frame: with absolute positions it is
            another direction in each.
    """

    query: Array
    key: Array
    over: Array
    frame: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """B pairs of sentences that differ in a variable alone, R in front for many roles.

    Attributes:
        before, after: int [B,T] tokens.
        was, becomes: int [B] classes of the variable.
        query, key: int [B] positions.
    """

    before: Array
    after: Array
    was: Array
    becomes: Array
    query: Array
    key: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Questions:
    """R roles as arrays.

    Attributes:
        known, judged: see the top of the file; [R,B] each.
        matched, moved: pairs of the variable that is matched (of any, where none is) and of that which is moved.
        changed: the judged prompts, and the same with another class of what is moved.
        matches: bool [R], whether classes at query and key decide, not what sets the key apart.
        to_logits: bool [R], whether what is moved is for the logits, or for whoever reads it.
        sign, matching_sign: int [R], 1 or -1: the claimed side of what is moved, and of matching.
        answers: int [R,C,m] tokens that stand for each class of what is moved, -1 for none.
        judged_matched: int [R,B] the judged prompts' classes of what is matched.
    """

    known: Asked
    judged: Asked
    matched: Pairs
    moved: Pairs
    changed: Pairs
    matches: Array
    to_logits: Array
    sign: Array
    matching_sign: Array
    answers: Array
    judged_matched: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts that are known, those that are judged, and what R roles ask of them and of pairs."""

    known: Batch
    judged: Batch
    questions: Questions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What each layer reads at each position of prompts: [L,B,T,D], queries and keys, and values."""

    qk: Array
    v: Array


def read_rows(weights: CircuitWeights, residual: Array) -> Rows:
    """Of the residual stream [B,L,T,D] in front of each layer."""
    stream = jnp.moveaxis(residual, 0, 1)
    return Rows(qk_rows(weights, stream), normalized(weights, stream))


def at(rows: Array, positions: Array) -> Array:
    """Rows [L,B,T,D] at one position of each prompt [B]: [L,B,D]."""
    return rows[:, jnp.arange(len(positions)), positions]


def words_up_to(query: Array, length: int) -> Array:
    """Positions up to the query [B] but the first, where heads rest: bool [B,T]."""
    place = jnp.arange(length)
    return (place > 0) & (place <= query[:, None])


def others(asked: Asked, length: int) -> Array:
    """What the key is held against, as weights of positions that sum to 1: [B,T]; zeros where there is nothing."""
    place = jnp.arange(length)
    rest = words_up_to(asked.query, length) & (place != asked.key[:, None])
    chosen = jnp.where((asked.over < 0)[:, None], rest, place == asked.over[:, None])
    return chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1)


def contrasts(rows: Array, asked: Asked) -> Array:
    """What stands at the key less what stands where it is held against: [L,B,T,D] -> [L,B,D]."""
    return at(rows, asked.key) - einsum("lbtd,bt->lbd", rows, others(asked, rows.shape[2]))


def frame_means(rows: Array, frames: Array, of: Array) -> Array:
    """Mean of rows [L,B,D] over the prompts of the same frame [B] as each of these [b]: [L,b,D]; 0 where none is."""
    same = (of[:, None] == frames).astype(rows.dtype)
    return einsum("lbd,cb->lcd", rows, same / jnp.maximum(same.sum(1, keepdims=True), 1))


def class_effects(changes: Array, was: Array, becomes: Array, n_classes: int) -> Array:
    """What each class adds, centred, from what changes [...,B,D] when one becomes another [B]: [...,C,D].

    Mean over the pairs of a class of the change towards it, times (C' - 1) / C' for the C' classes that occur; zero
    for one that does not. Exact where the effects of classes add up and their partners are balanced.
    """
    to, of = (labels[:, None] == jnp.arange(n_classes) for labels in (becomes, was))
    signed = to.astype(changes.dtype) - of.astype(changes.dtype)
    count = jnp.abs(signed).sum(0)
    n = jnp.maximum((count > 0).sum(), 1)
    return einsum("bc,...bd->...cd", signed / jnp.maximum(count, 1.0), changes) * (n - 1) / n


def class_answers(W_U: Array, answers: Array) -> Array:
    """Mean unembedding of the tokens that stand for each class [C,m], less their mean: [C,D]; 0 for none."""
    there = answers >= 0
    vectors = jnp.where(there[..., None], W_U.T[jnp.maximum(answers, 0)], 0.0).sum(1)
    means = vectors / jnp.maximum(there.sum(1), 1)[:, None]
    occurs = there.any(1)[:, None]
    return jnp.where(occurs, means - means.sum(0) / jnp.maximum(occurs.sum(), 1), 0.0)


def other_classes(labels: Array) -> Array:
    """Another class for each prompt [B]: that of the next prompt whose class differs; its own where none does."""
    n = len(labels)
    following = labels[(jnp.arange(n)[:, None] + jnp.arange(n)) % n]
    return following[jnp.arange(n), jnp.argmax(following != labels[:, None], 1)]
