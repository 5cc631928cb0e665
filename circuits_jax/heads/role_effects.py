"""What a head does from one position to another, causally: does it use a direction, and does it do the job at all?

Everything is about one head, one query and one key of each prompt; what the head does from other queries stays. Four
ways to disturb it there:

    q       what it reads at the query changes, and with it where the query looks
    k       what it reads at the key changes, and with it the score between the two
    v       what it reads at the key changes, and with it what the query gets from there
    block   the query may not look at the key

What a head reads is the normed residual stream. With directions estimated on other prompts swapped (the contrast of the
key taken away, one class put for another), q, k and v say whether the head uses them: only this licenses the word
(science.md 28 E). With the rows of a real prompt in which one variable differs, v says whether the head moves the
variable; with block, whether it has to look there.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.reading import keys, normalized, queries, values
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads.outcomes import run
from circuits_jax.heads.role_rows import at
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.interventions import Interventions, Replacement
from circuits_jax.models.rotary import rotate
from circuits_jax.models.transformer import Activations, Params
from circuits_jax.tasks.batch import Batch

BLOCKED = -1e9


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Of one head on B prompts, with places [n] in front.

    Attributes:
        difference: [B] change of the logit of the right token minus that of the wrong one.
        own: [B] change of the mean logit of the tokens that stand for a prompt's class, minus that of another class.
        attention: [B] of the head from the query to the key, after the change.

    Logits are those with the final norm as it was: what only makes the stream longer or shorter is no one's job.
    """

    difference: Array
    own: Array
    attention: Array


def attention_between(seen: Activations, query: Array, key: Array) -> Array:
    """Attention of every head from one position to another of each prompt: [B,L,H]."""
    return seen.patterns[jnp.arange(len(query)), :, :, query, key]


# --- what is changed, for every head: scores [L,H,B,T] of the query, or what is written there [L,H,B,D] ---


def with_other_query(weights: CircuitWeights, rows: Array, query: Array, change: Array) -> Array:
    """By how much the query's scores change when a change [L,B,D] is added to what it reads; rows [L,B,T,D]."""
    asking = at(rows, query)
    return query_scores(weights, asking + change, query, rows) - query_scores(weights, asking, query, rows)


def with_other_key(weights: CircuitWeights, rows: Array, query: Array, key: Array, change: Array) -> Array:
    """By how much they change when a change [L,B,D] is added to what is read at the key."""
    asking, changed = at(rows, query), rows.at[:, jnp.arange(len(key)), key].add(change)
    return query_scores(weights, asking, query, changed) - query_scores(weights, asking, query, rows)


def with_other_value(weights: CircuitWeights, attention: Array, change: Array) -> Array:
    """What is written more when a change [L,B,D] is added to what values read at the key; attention [B,L,H] to it."""
    return einsum("blh,lhbk,lhkd->lhbd", attention, values(weights, change), weights.W_O)


def query_scores(weights: CircuitWeights, asking: Array, query: Array, rows: Array) -> Array:
    """Scores of queries that read [L,B,D] at positions [B] with all rows [L,B,T,D]: [L,H,B,T]."""
    n_layers, n_prompts, length, d_model = rows.shape
    q, k = queries(weights, asking), keys(weights, rows.reshape(n_layers, -1, d_model))
    k = k.reshape(*k.shape[:2], n_prompts, length, -1)
    if weights.positions == "rotary":
        q, k = rotate(q, query, weights.rotary), rotate(k, jnp.arange(length), weights.rotary)
    return einsum("lhbk,lhbtk->lhbt", q, k) / math.sqrt(q.shape[-1])


def swapped(effects: Array, was: Array, becomes: Array) -> Array:
    """What to add so that one class [B] becomes another [B], by effects of classes [L,C,D]: [L,B,D]."""
    return effects[:, becomes] - effects[:, was]


# --- and what comes of it ---


@dataclasses.dataclass(frozen=True)
class Watched:
    """What is looked at while one head is disturbed.

    Attributes:
        batch: B prompts.
        query, key: int [B], the role's positions.
        undisturbed: [B,D] the last residual at the position that is asked.
        right, own: [B,D] by what the last residual is read: the right token's unembedding less the wrong one's, and
            that of the own class less another's, at the undisturbed size of the final norm.
    """

    batch: Batch
    query: Array
    key: Array
    undisturbed: Array
    right: Array
    own: Array

    def seen(self, seen: Activations, place: Array) -> Seen:
        """Of one head (layer, head), as changes from the undisturbed prompts."""
        moved = last_residual(seen, self.batch) - self.undisturbed
        difference, own = (einsum("bd,bd->b", moved, reader) for reader in (self.right, self.own))
        return Seen(difference, own, attention_between(seen, self.query, self.key)[:, place[0], place[1]])


def last_residual(seen: Activations, batch: Batch) -> Array:
    """Behind the last layer, at the position that is asked: [B,D]."""
    return seen.residual[jnp.arange(len(batch.tokens)), -1, batch.positions["at"]]


def readers(weights: CircuitWeights, residual: Array, of: Array, other: Array) -> Array:
    """Mean unembedding of the tokens of [B,m] less that of other [B,m], over the size of the final norm: [B,D].

    -1 stands for no token. The residual [B,D] is that of which the norm takes the size.
    """
    normed = normalized(weights, residual)
    size = (normed * residual).sum(-1, keepdims=True) / jnp.square(normed).sum(-1, keepdims=True)

    def mean(tokens: Array) -> Array:
        there = tokens >= 0
        vectors = jnp.where(there[..., None], weights.W_U.T[jnp.maximum(tokens, 0)], 0.0)
        return vectors.sum(1) / jnp.maximum(there.sum(1, keepdims=True), 1)

    return (mean(of) - mean(other)) / size


def with_scores(config: TransformerConfig, params: Params, watched: Watched, added: Array, place: Array) -> Seen:
    """One head (layer, head) with added [B,T] on the scores of the query."""
    prompts, length = jnp.arange(len(watched.query)), watched.batch.tokens.shape[1]
    scores = jnp.zeros((len(prompts), config.n_layers, config.n_heads, length, length))
    changes = Interventions(scores_added=scores.at[prompts, place[0], place[1], watched.query].set(added))
    return watched.seen(run(config, params, watched.batch, changes)[1], place)


def with_output(config: TransformerConfig, params: Params, watched: Watched, output: Array, place: Array) -> Seen:
    """One head (layer, head) with output [B,D] in place of what it writes at the query."""
    prompts = jnp.arange(len(watched.query))
    shape = (len(prompts), config.n_layers, config.n_heads, watched.batch.tokens.shape[1])
    here = (prompts, place[0], place[1], watched.query)
    value = jnp.zeros((*shape, config.d_model)).at[here].set(output)
    changes = Interventions(head_outputs=Replacement(value, jnp.zeros(shape).at[here].set(1.0)))
    return watched.seen(run(config, params, watched.batch, changes)[1], place)


def blocked(length: int, key: Array) -> Array:
    """What keeps a query from the key: [B,T] to add to its scores."""
    return jnp.where(jnp.arange(length) == key[:, None], BLOCKED, 0.0)
