"""What one head does from one position to another, against a slow forward pass that disturbs that head alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effect_oracle import random_params
from planted_claims import frozen_logits, numpy_forward

from circuits_jax import Batch, CircuitWeights, TransformerConfig
from circuits_jax.heads import role_effects
from circuits_jax.heads.outcomes import run
from circuits_jax.heads.role_rows import read_rows

V, T, D = 7, 6, 8
CONFIGS = {
    "learned-bias": TransformerConfig(V, T, n_layers=2, n_heads=2, d_model=D, bias=True),
    "rms-rotary-grouped-qk-norm": TransformerConfig(
        V, T, n_layers=2, n_heads=2, n_kv_heads=1, d_model=D, d_head=4, norm="rms", positions="rotary", bias=True,
        qk_norm=True,
    ),
    "layernorm-shortformer": TransformerConfig(
        V, T, n_layers=2, n_heads=2, d_model=D, norm="layer", positions="shortformer", bias=True
    ),
}  # fmt: skip
TOKENS = np.array([[1, 2, 3, 4, 5, 6], [0, 0, 2, 6, 1, 3], [5, 1, 5, 2, 2, 0]])
QUERY, KEY, AT = np.array([4, 3, 5]), np.array([1, 0, 5]), np.array([5, 3, 5])
RIGHT, WRONG = np.array([[1], [2], [0]]), np.array([[3], [0], [6]])
OWN, OTHER = np.array([[1, 2], [3, -1], [0, 4]]), np.array([[5, -1], [4, 6], [-1, -1]])
BATCH = Batch(jnp.asarray(TOKENS), jnp.ones((3, T), bool), {"at": jnp.asarray(AT)})
INTO = ("q", "k", "v", "block")


def drawn_params(config):
    """Random, with queries so small that attention is spread."""

    def tamed(path, leaf):
        return leaf * 0.3 if path[-1].key in ("W_Q", "b_Q", "q_gain") else leaf

    return jax.tree_util.tree_map_with_path(tamed, random_params(config))


def drawn_change(config, seed=0):
    """[L,B,D]; of what a LayerNorm leaves, which has mean zero."""
    change = np.random.default_rng(seed).normal(size=(2, 3, D))
    return np.float32(change - change.mean(-1, keepdims=True) if config.norm == "layer" else change)


@partial(jax.jit, static_argnums=0)
def all_seen(config, params, batch, change, place):
    """{"q", "k", "v", "block": Seen [B]} of one head."""
    weights = CircuitWeights.from_params(config, params)
    seen = run(config, params, batch)[1]
    rows, (layer, head) = read_rows(weights, seen.residual[:, :-1]), place
    last = role_effects.last_residual(seen, batch)
    right, own = (role_effects.readers(weights, last, *pair) for pair in ((RIGHT, WRONG), (OWN, OTHER)))
    watched = role_effects.Watched(batch, jnp.asarray(QUERY), jnp.asarray(KEY), last, right, own)
    added = {
        "q": role_effects.with_other_query(weights, rows.qk, watched.query, change)[layer, head],
        "k": role_effects.with_other_key(weights, rows.qk, watched.query, watched.key, change)[layer, head],
        "block": role_effects.blocked(T, watched.key),
    }
    out = {name: role_effects.with_scores(config, params, watched, x, place) for name, x in added.items()}
    attention = role_effects.attention_between(seen, watched.query, watched.key)
    more = role_effects.with_other_value(weights, attention, change)[layer, head]
    written = seen.head_outputs[jnp.arange(3), layer, head, watched.query]
    return out | {"v": role_effects.with_output(config, params, watched, written + more, place)}


def mean_logit(logits, tokens):
    """Of those that are there; 0 for none."""
    there = [logits[token] for token in tokens if token >= 0]
    return np.mean(there) if there else 0.0


@pytest.mark.parametrize("place", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_disturbance_is_that_of_one_head_at_one_query(name, place):
    config = CONFIGS[name]
    params, change = drawn_params(config), drawn_change(config)
    found = all_seen(config, params, BATCH, change, jnp.array(place))
    for into in INTO:
        assert np.abs(found[into].difference).max() > 1e-3, f"{into}: this would hold for a head that does nothing"
    for b, tokens in enumerate(TOKENS):
        before = numpy_forward(config, params, tokens)[0]
        for into in INTO:
            residual, patterns, _ = numpy_forward(
                config, params, tokens, place, QUERY[b], KEY[b], into, change[place[0], b]
            )
            moved = residual[-1, AT[b]] - before[-1, AT[b]]
            logits = frozen_logits(config, params, moved, before[-1, AT[b]])
            expected = (
                logits[RIGHT[b, 0]] - logits[WRONG[b, 0]],
                mean_logit(logits, OWN[b]) - mean_logit(logits, OTHER[b]),
                patterns[(*place, QUERY[b], KEY[b])],
            )
            seen = found[into]
            actual = (seen.difference[b], seen.own[b], seen.attention[b])
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=2e-5, err_msg=f"{into}, sentence {b}")


def test_blocked_attention_is_exactly_none():
    config = CONFIGS["rms-rotary-grouped-qk-norm"]
    found = all_seen(config, drawn_params(config), BATCH, drawn_change(config), jnp.array([1, 1]))
    assert (found["block"].attention == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_other_queries_and_other_heads_stay_as_they_are(name):
    """The answer is read where the disturbed query is not: in the last layer nothing reaches it, exactly."""
    config = CONFIGS[name]
    elsewhere = Batch(BATCH.tokens, BATCH.mask, {"at": jnp.array([5, 5, 4])})
    found = all_seen(config, drawn_params(config), elsewhere, drawn_change(config), jnp.array([1, 1]))
    there = all_seen(config, drawn_params(config), BATCH, drawn_change(config), jnp.array([1, 1]))
    for into in INTO:
        assert (found[into].difference == 0).all(), into
        assert (found[into].own == 0).all(), into
        np.testing.assert_array_equal(found[into].attention, there[into].attention)


@pytest.mark.parametrize("name", CONFIGS)
def test_readers_read_the_logits_of_the_residual_whose_size_they_take(name):
    config = CONFIGS[name]
    params = drawn_params(config)
    weights = CircuitWeights.from_params(config, params)
    logits, seen = run(config, params, BATCH)
    last = role_effects.last_residual(seen, BATCH)
    read = np.einsum("bd,bd->b", last, role_effects.readers(weights, last, RIGHT, WRONG))
    bias = np.asarray(weights.b_U)
    at_answer = np.asarray(logits)[np.arange(3), AT] - bias
    expected = at_answer[np.arange(3), RIGHT[:, 0]] - at_answer[np.arange(3), WRONG[:, 0]]
    np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-4)


def test_a_longer_stream_is_no_ones_job():
    """What a change does to the logits is linear: twice the output, twice the change, whatever the norm would make."""
    config = CONFIGS["layernorm-shortformer"]
    params, change = drawn_params(config), drawn_change(config)
    once, twice = (all_seen(config, params, BATCH, x, jnp.array([1, 0]))["v"] for x in (change, 2 * change))
    np.testing.assert_allclose(twice.difference, 2 * once.difference, rtol=1e-4, atol=1e-5)
    assert np.abs(once.difference).max() > 1e-3


def test_scores_of_queries_are_those_of_the_forward_pass():
    for config in CONFIGS.values():
        params = drawn_params(config)
        weights, seen = CircuitWeights.from_params(config, params), run(config, params, BATCH)[1]
        rows = read_rows(weights, seen.residual[:, :-1]).qk
        asking = rows[:, np.arange(3), QUERY]
        scores = np.asarray(role_effects.query_scores(weights, asking, jnp.asarray(QUERY), rows))
        for b, query in enumerate(QUERY):
            np.testing.assert_allclose(scores[:, :, b], seen.scores[b, :, :, query], rtol=1e-4, atol=1e-4)


def test_classes_are_swapped_by_the_difference_of_their_effects():
    effects = np.random.default_rng(2).normal(size=(2, 3, D))
    was, becomes = np.array([0, 1, 2, 2]), np.array([1, 1, 0, 1])
    expected = [[layer[b] - layer[a] for a, b in zip(was, becomes, strict=True)] for layer in effects]
    swapped = role_effects.swapped(jnp.asarray(effects, jnp.float32), was, becomes)
    np.testing.assert_allclose(swapped, expected, atol=1e-6)
    assert (swapped[:, 1] == 0).all()
