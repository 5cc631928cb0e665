"""What is measured of heads in claimed roles: structure by weights, attention and effects on prompts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import role_effects
from circuits_jax.heads.outcomes import run
from circuits_jax.heads.role_effects import Seen
from circuits_jax.heads.role_rows import (
    Asked,
    Pairs,
    Prompts,
    Questions,
    at,
    class_effects,
    contrasts,
    frame_means,
    other_classes,
    others,
    read_rows,
)
from circuits_jax.heads.role_structure import Changes, Structure, structure
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Activations, Params, check_tokens
from circuits_jax.tasks.batch import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Behaviour:
    """What heads do on the judged prompts.

    Attributes:
        difference: [B] the logit difference of the model as it is.
        attention, over: [B,L,H] from the query to the key, and to what it is held against, a position's mean.
        uniform: [B] one over the number of positions that the query sees.
        by_direction: {"q", "k", "v": Seen [n,B]} with directions changed.
        blocked: Seen [n,B] without the attention from query to key.
        by_counterfactual: Seen [n,B] with what the head would get from the key of a real prompt.
        predicted: [B,L,H] attention from the query to the key that weights give at what layers read on average on known
            prompts of the same frame: what a head does whatever the words.
    """

    difference: Array
    attention: Array
    over: Array
    uniform: Array
    by_direction: dict[str, Seen]
    blocked: Seen
    by_counterfactual: Seen
    predicted: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Structures:
    """Structure of R roles, R in front: by directions where heads read them, and as the embedding alone holds them."""

    read: Structure
    embedded: Structure


def role_structures(
    config: TransformerConfig, params: Params, prompts: Prompts, key: Array, n_draws: int = 999
) -> Structures:
    """What weights say of every head in each of R roles.

    Args:
        config, params: the model: a decoder with pre-norm or without norms.
        prompts: of which the known ones and the pairs are looked at.
        key: draws the nulls.
        n_draws: of each null; no p is below 1 / (1 + n_draws).

    Raises:
        ValueError: bad tokens, or a post-norm model or an encoder.
    """
    check_model(config, prompts)
    return _role_structures(config, n_draws, params, prompts, key)


def role_behaviours(config: TransformerConfig, params: Params, prompts: Prompts, places: Array) -> Behaviour:
    """Attention and effects of heads in each of R roles on the judged prompts, R in front.

    Args:
        config, params, prompts: as in role_structures; judged prompts have the positions "at", "right" and "wrong".
        places: int [n,2], the (layer, head) whose effects are measured, five runs each.

    Raises:
        ValueError: as in role_structures.
    """
    check_model(config, prompts)
    return _role_behaviours(config, params, prompts, places)


def check_model(config: TransformerConfig, prompts: Prompts) -> None:
    """Raises ValueError for a model whose answers are not what heads add up to, and for tokens it does not have."""
    if config.norm_position != "pre" or not config.causal:
        raise ValueError("claims are about decoders without post-norm: in others no answer follows from what heads add")
    for batch in (prompts.known, prompts.judged):
        check_tokens(config, batch.tokens)


def stream(config: TransformerConfig, params: Params, tokens: Array) -> Array:
    """What stands in front of each layer in prompts [B,T]: [B,L,T,D]."""
    return run(config, params, Batch(tokens, tokens >= 0, {}))[1].residual[:, :-1]


def _changes(weights: CircuitWeights, pairs: Pairs, before: Array, after: Array) -> Changes:
    """What changes in what layers read, of streams [B,L,T,D] of both sentences of each pair."""
    was, becomes = (read_rows(weights, stream) for stream in (before, after))
    return Changes(
        at(becomes.qk - was.qk, pairs.query), at(becomes.qk - was.qk, pairs.key), at(becomes.v - was.v, pairs.key)
    )


@partial(jax.jit, static_argnums=(0, 1))
def _role_structures(
    config: TransformerConfig, n_draws: int, params: Params, prompts: Prompts, key: Array
) -> Structures:
    weights = CircuitWeights.from_params(config, params)
    known = stream(config, params, prompts.known.tokens)

    def of_role(role: tuple[Questions, Array]) -> Structures:
        asked, role_key = role
        streams = [
            known, *(stream(config, params, x) for of in (asked.matched, asked.moved) for x in (of.before, of.after)),
        ]  # fmt: skip

        def of_streams(streams: list[Array]) -> Structure:
            matched, moved = (
                _changes(weights, asked.matched, *streams[1:3]),
                _changes(weights, asked.moved, *streams[3:]),
            )
            return structure(weights, read_rows(weights, streams[0]), matched, moved, asked, n_draws, role_key)

        both = jax.tree.map(lambda x: jnp.stack([x, jnp.broadcast_to(x[:, :1], x.shape)]), streams)
        read, embedded = (jax.tree.map(lambda x, i=i: x[i], jax.lax.map(of_streams, both)) for i in range(2))
        return Structures(read, embedded)

    return jax.lax.map(of_role, (prompts.questions, jax.random.split(key, len(prompts.questions.sign))))


@partial(jax.jit, static_argnums=0)
def _role_behaviours(config: TransformerConfig, params: Params, prompts: Prompts, places: Array) -> Behaviour:
    weights = CircuitWeights.from_params(config, params)
    logits, seen = run(config, params, prompts.judged)
    known = stream(config, params, prompts.known.tokens)

    def of_role(questions: Questions) -> Behaviour:
        return _behaviour(config, params, weights, prompts.judged, logits, seen, known, questions, places)

    return jax.lax.map(of_role, prompts.questions)


def _behaviour(
    config: TransformerConfig, params: Params, weights: CircuitWeights, judged: Batch, logits: Array,
    seen: Activations, known_stream: Array, questions: Questions, places: Array,
) -> Behaviour:  # fmt: skip
    asked, known, n_classes = questions.judged, questions.known, len(questions.answers)
    query, key, prompts = asked.query, asked.key, jnp.arange(len(asked.query))
    here, elsewhere = (read_rows(weights, x) for x in (seen.residual[:, :-1], known_stream))
    attention = role_effects.attention_between(seen, query, key)

    def effects(pairs: Pairs) -> Changes:
        changes = _changes(weights, pairs, *(stream(config, params, x) for x in (pairs.before, pairs.after)))
        classes = pairs.was, pairs.becomes, n_classes
        return Changes(*(class_effects(x, *classes) for x in (changes.query, changes.key, changes.value)))

    others_of = other_classes(questions.judged_matched), other_classes(questions.changed.was)
    asks = role_effects.swapped(effects(questions.matched).query, questions.judged_matched, others_of[0])
    moves = role_effects.swapped(effects(questions.moved).value, questions.changed.was, others_of[1])
    contrast = frame_means(contrasts(elsewhere.qk, known), known.frame, asked.frame)
    real = _changes(weights, questions.changed, seen.residual[:, :-1], stream(config, params, questions.changed.after))

    scores = {
        "q": role_effects.with_other_query(weights, here.qk, query, asks),
        "k": role_effects.with_other_key(weights, here.qk, query, key, -contrast),
    }
    written = {
        name: role_effects.with_other_value(weights, attention, change)
        for name, change in (("v", moves), ("real", real.value))
    }
    last, tokens = role_effects.last_residual(seen, judged), questions.answers[questions.changed.was]
    right, wrong = (judged.positions[name][:, None] for name in ("right", "wrong"))
    watched = {
        name: role_effects.Watched(
            judged, query, key, last, role_effects.readers(weights, last, right, wrong),
            role_effects.readers(weights, last, tokens, questions.answers[other]),
        )
        for name, other in (("v", others_of[1]), ("real", questions.changed.becomes))
    }  # fmt: skip
    outputs = seen.head_outputs[prompts, :, :, query]

    def at_place(place: Array) -> dict[str, Seen]:
        layer, head = place
        of_scores = partial(role_effects.with_scores, config, params, watched["v"], place=place)
        disturbed = {name: of_scores(added[layer, head]) for name, added in scores.items()}
        disturbed["block"] = of_scores(role_effects.blocked(judged.tokens.shape[1], key))
        for name, more in written.items():
            output = outputs[:, layer, head] + more[layer, head]
            disturbed[name] = role_effects.with_output(config, params, watched[name], output, place)
        return disturbed

    changed = jax.lax.map(at_place, places)
    real_changed, blocked = changed.pop("real"), changed.pop("block")
    over = einsum("blht,bt->blh", seen.patterns[prompts, :, :, query], others(asked, judged.tokens.shape[1]))
    at_answer = logits[prompts, judged.positions["at"]]
    difference = at_answer[prompts, right[:, 0]] - at_answer[prompts, wrong[:, 0]]
    predicted = _predicted(weights, elsewhere.qk, known, asked)
    return Behaviour(difference, attention, over, 1 / (query + 1), changed, blocked, real_changed, predicted)


def _predicted(weights: CircuitWeights, rows: Array, known: Asked, asked: Asked) -> Array:
    """Attention [B,L,H] from query to key by rows [L,B,T,D] of known prompts, averaged over those of each frame."""
    n_layers, n, length, d_model = rows.shape
    means = frame_means(rows.reshape(n_layers, n, length * d_model), known.frame, asked.frame)
    means = means.reshape(n_layers, -1, length, d_model)
    scores = role_effects.query_scores(weights, at(means, asked.query), asked.query, means)
    seen = jnp.arange(length) <= asked.query[:, None]
    attention = jax.nn.softmax(scores, axis=-1, where=seen)
    return attention[:, :, jnp.arange(len(asked.key)), asked.key].transpose(2, 0, 1)
