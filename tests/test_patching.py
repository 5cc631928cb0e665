"""Patching and knocked-out directions, against runs in which the change is made by hand, one at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effect_oracle import (
    CONFIGS,
    B,
    T,
    V,
    all_edges,
    close_edges,
    corrupted,
    edge_by_edge,
    one_hot,
    oracle_difference,
    oracle_loss,
    random_params,
    repeats,
)

from circuits_jax import Interventions, TransformerConfig, forward
from circuits_jax.heads.outcomes import log_likelihood, logit_difference
from circuits_jax.heads.patching import knock_out_direction, patch_edges, patch_heads, patch_mlps, patch_residual
from circuits_jax.models import graph
from circuits_jax.models.interventions import Replacement

TWO, GROUPED = CONFIGS["two-layers"], CONFIGS["rms-rotary-grouped-mlp"]
PATCHES = (patch_heads, patch_residual, patch_edges)


class Runs:
    """A clean and a corrupted run of one model, and shares of a metric that come back, by hand."""

    def __init__(self, config, oracle=lambda logits, batch: -oracle_loss(logits, batch)):
        self.config, self.params, self.oracle = config, random_params(config), oracle
        self.clean, self.corrupted = repeats(), corrupted()
        logits, self.seen = forward(config, self.params, self.clean.tokens)
        self.most, self.least = oracle(logits, self.clean), self.run()

    def run(self, **fields):
        """The metric of the corrupted run; the answer that is asked is the clean one."""
        logits, _ = forward(self.config, self.params, self.corrupted.tokens, Interventions(**fields))
        return self.oracle(logits, self.clean)

    def share(self, **fields):
        return (self.run(**fields) - self.least) / (self.most - self.least)

    def replaced(self, field, index):
        """The share when what one place (index into the mask) wrote in the clean run is in the corrupted one."""
        value = getattr(self.seen, field)
        mask = one_hot(value.shape[1:-1], index)
        return self.share(**{field: Replacement(value, jnp.asarray(mask))})

    def arguments(self):
        return self.config, self.params, self.clean, self.corrupted


@pytest.fixture(scope="module", params=["two-layers", "rms-rotary-grouped-mlp"])
def runs(request):
    return Runs(CONFIGS[request.param])


# float32 falls, divided by the gap between clean and corrupted runs, which is .2 to 1.
CLOSE = 3e-5


def test_the_runs_differ(runs):
    assert abs(runs.most - runs.least) > 0.2


def test_patching_heads_one_at_a_time(runs):
    """chunk = 3 makes two rounds of the four heads."""
    found = patch_heads(*runs.arguments(), chunk=3)
    expected = [[runs.replaced("head_outputs", (i, j)) for j in range(2)] for i in range(2)]
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert np.abs(expected).min() > 1e-3


def test_patching_mlps_one_at_a_time():
    runs = Runs(GROUPED)
    found = patch_mlps(*runs.arguments())
    expected = [runs.replaced("mlp_outputs", i) for i in range(2)]
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert np.abs(expected).min() > 1e-3
    with pytest.raises(ValueError, match="no MLPs"):
        patch_mlps(*Runs(TWO).arguments())


def test_patching_the_residual_stream_one_place_at_a_time(runs):
    found = patch_residual(*runs.arguments())
    expected = np.array([[runs.replaced("residual", (i, t)) for t in range(T)] for i in range(3)])
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    # A position of which the token is the same in both runs gives back nothing by itself.
    same = np.asarray(runs.clean.tokens == runs.corrupted.tokens).all(0)
    assert not same.any() or np.abs(expected[0, same]).max() < 1e-9
    assert np.abs(expected).max() > 0.1


def test_patching_edges_one_at_a_time(runs):
    found = patch_edges(*runs.arguments())
    clean = graph.outputs(runs.config, runs.seen)
    expected = edge_by_edge(
        runs.config, lambda name: runs.share(edges=graph.cut(runs.config, [name]), edge_outputs=clean)
    )
    close_edges(runs.config, found, expected, CLOSE)
    assert np.mean(np.abs(all_edges(runs.config, expected)) > 1e-3) > 0.7


def test_patching_asks_for_the_clean_answer():
    """Places, right and wrong tokens and the mask come from the clean batch in every run."""
    runs = Runs(TWO, oracle_difference)
    expected = [[runs.replaced("head_outputs", (i, j)) for j in range(2)] for i in range(2)]
    found = patch_heads(*runs.arguments(), logit_difference)
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    careless = dataclasses.replace(runs.corrupted, mask=runs.corrupted.mask & False, positions={})
    np.testing.assert_array_equal(patch_heads(runs.config, runs.params, runs.clean, careless, logit_difference), found)
    asked = []

    def noting(logits, seen, batch):
        asked.append(batch.positions["at"].shape)
        return log_likelihood(logits, seen, batch)

    patch_heads(runs.config, runs.params, runs.clean, careless, noting)
    assert len(asked) >= 3


def test_the_residual_stream_behind_all_layers_carries_everything(runs):
    """The metric is a mean over positions, and a position reads the last residual stream of itself alone."""
    np.testing.assert_allclose(patch_residual(*runs.arguments())[-1].sum(), 1.0, atol=1e-4)


def test_the_only_token_that_differs_carries_everything_at_first(runs):
    """In front of layer 0 at its position; where it is asked, behind all layers; nowhere before it."""
    place, asked = 2, 5
    other = dataclasses.replace(
        runs.clean, tokens=runs.clean.tokens.at[:, place].set((runs.clean.tokens[:, place] + 1) % V)
    )
    at = {"at": jnp.full(B, asked), "right": jnp.array([0, 1, 2]), "wrong": jnp.array([3, 4, 0])}
    clean = dataclasses.replace(runs.clean, positions=at)
    found = patch_residual(runs.config, runs.params, clean, other, logit_difference)
    np.testing.assert_allclose(found[0], one_hot(T, place), atol=CLOSE)
    np.testing.assert_allclose(found[-1], one_hot(T, asked), atol=CLOSE)
    np.testing.assert_allclose(found[:, :place], 0.0, atol=CLOSE)


@pytest.mark.parametrize("patch", PATCHES)
def test_equal_runs_have_nothing_to_bring_back(patch):
    runs = Runs(TWO)
    found = patch(TWO, runs.params, runs.clean, runs.clean)
    there = jax.tree.leaves(graph.existing(TWO)) if patch is patch_edges else [True]
    values = np.concatenate(
        [np.asarray(x)[np.broadcast_to(y, x.shape)] for x, y in zip(jax.tree.leaves(found), there, strict=True)]
    )
    assert not np.isfinite(values).any()


@pytest.mark.parametrize("patch", [*PATCHES, patch_mlps])
def test_batches_have_to_correspond(patch):
    runs = Runs(GROUPED)
    short = dataclasses.replace(runs.corrupted, tokens=runs.corrupted.tokens[:, :-1])
    with pytest.raises(ValueError, match=r"both be \[B,T\]; got \[3, 8\] and \[3, 7\]"):
        patch(GROUPED, runs.params, runs.clean, short)
    one, other = (dataclasses.replace(x, tokens=x.tokens[0]) for x in (runs.clean, runs.corrupted))
    with pytest.raises(ValueError, match=r"both be \[B,T\]; got \[8\] and \[8\]"):
        patch(GROUPED, runs.params, one, other)
    outside = dataclasses.replace(runs.corrupted, tokens=runs.corrupted.tokens.at[0, 0].set(V))
    with pytest.raises(ValueError, match="tokens must be in"):
        patch(GROUPED, runs.params, runs.clean, outside)


# Directions -----------------------------------------------------------------------------------------------------------


def everything(logits, seen, batch):
    return {
        "logits": logits,
        "patterns": seen.patterns,
        "scores": seen.scores,
        "value": log_likelihood(logits, seen, batch),
    }


def directions_of(config, seed=2):
    shape = (config.n_layers, config.n_heads, config.d_model)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=["two-layers", "three-layers-layernorm-bias-mlp", "rms-rotary-grouped-mlp"])
def seen_model(request):
    config = CONFIGS[request.param]
    params, batch = random_params(config), repeats()
    return config, params, batch, *forward(config, params, batch.tokens)


@pytest.mark.parametrize("becomes", ["0", "T", "BT"])
def test_knocking_out_directions_one_head_at_a_time(seen_model, becomes):
    """What the head reads of the plain run, with another component along d: added by hand, in front of the norm."""
    config, params, batch, logits, seen = seen_model
    directions = directions_of(config)
    rng = np.random.default_rng(9)
    c = {"0": np.zeros(()), "T": rng.normal(size=T), "BT": rng.normal(size=(B, T))}[becomes].astype(np.float32)
    found = knock_out_direction(config, params, batch, directions, everything, c)
    assert found["logits"].shape == (2, config.n_layers, config.n_heads, B, T, V)
    residual = np.float64(seen.residual)
    for i, name in enumerate("qk"):
        for layer, head in np.ndindex(directions.shape[:2]):
            d = np.float64(directions[layer, head])
            d /= np.linalg.norm(d)
            x = residual[:, layer]
            added = np.zeros((B, *directions.shape[:2], T, config.d_model), np.float32)
            added[:, layer, head] = (c - x @ d)[..., None] * d
            after, there = forward(config, params, batch.tokens, Interventions(**{f"{name}_added": added}))
            np.testing.assert_allclose(found["logits"][i, layer, head], logits - after, atol=1e-4)
            np.testing.assert_allclose(found["patterns"][i, layer, head], seen.patterns - there.patterns, atol=2e-5)
            np.testing.assert_allclose(
                found["value"][i, layer, head], oracle_loss(after, batch) - oracle_loss(logits, batch), atol=2e-5
            )
    assert (np.abs(found["value"]) > 1e-4).mean() > 0.9


def test_a_knocked_out_direction_is_one_that_the_weights_do_not_read():
    """Without norms: the same logits with (I - d d^T) in front of the W_Q or the W_K of that one head."""
    config = TransformerConfig(V, T, n_layers=2, n_heads=2, d_model=8, bias=True)
    params, batch, directions = random_params(config), repeats(), directions_of(TWO)
    logits, _ = forward(config, params, batch.tokens)
    found = knock_out_direction(config, params, batch, directions, everything)
    for i, name in enumerate(("W_Q", "W_K")):
        for layer, head in np.ndindex(2, 2):
            d = np.float64(directions[layer, head])
            blind = np.eye(8) - np.outer(d, d) / (d @ d)
            attention = dict(params[f"layer_{layer}"]["attention"])
            attention[name] = attention[name].copy()
            attention[name][head] = (blind @ attention[name][head]).astype(np.float32)
            edited = params | {f"layer_{layer}": params[f"layer_{layer}"] | {"attention": attention}}
            after, _ = forward(config, edited, batch.tokens)
            np.testing.assert_allclose(found["logits"][i, layer, head], logits - after, atol=1e-4)
            assert np.abs(logits - after).max() > 1e-2


def test_a_direction_that_keeps_its_component_changes_nothing(seen_model):
    config, params, batch, _, seen = seen_model
    d = directions_of(config)[0, 0] / np.linalg.norm(directions_of(config)[0, 0])
    for layer in range(config.n_layers):
        own = np.asarray(seen.residual)[:, layer] @ d
        found = knock_out_direction(config, params, batch, d, everything, own)
        np.testing.assert_allclose(found["logits"][:, layer], 0.0, atol=1e-4)
        others = np.delete(np.asarray(found["logits"]), layer, 1)
        assert np.abs(others).max((2, 3, 4, 5)).min() > 1e-3


def test_swapping_a_class_is_reading_the_other_token():
    """Where two tokens differ along d alone, their components swapped make one look like the other to a first head."""
    batch, d, place = repeats(), directions_of(TWO)[0, 0], 5
    d /= np.linalg.norm(d)
    params = random_params(TWO)
    params = params | {"W_E": params["W_E"].copy()}
    params["W_E"][1] = params["W_E"][0] + 1.5 * d
    tokens = batch.tokens.at[:, place].set(0)
    batch = dataclasses.replace(batch, tokens=tokens)
    _, seen = forward(TWO, params, tokens)
    _, other = forward(TWO, params, tokens.at[:, place].set(1))
    becomes = np.asarray(seen.residual)[:, 0] @ d
    becomes[:, place] = np.asarray(other.residual)[:, 0, place] @ d
    found = knock_out_direction(TWO, params, batch, d, everything, becomes)
    scores = np.asarray(seen.scores) - np.asarray(found["scores"])  # [2,L,H,B,L,H,T,T]
    seen, other = np.asarray(seen.scores), np.asarray(other.scores)
    for head in range(2):
        # As a query it scores all other keys, and as a key it is scored by all other queries, like the other token.
        np.testing.assert_allclose(
            scores[0, 0, head][:, 0, head, place, :place], other[:, 0, head, place, :place], atol=1e-4
        )
        np.testing.assert_allclose(
            scores[1, 0, head][:, 0, head, place + 1 :, place], other[:, 0, head, place + 1 :, place], atol=1e-4
        )
        assert np.abs(seen - other)[:, 0, head, place, :place].max() > 0.1


def test_what_a_head_moves_does_not_change():
    """Where no head can look anywhere but everywhere, q and k do not matter, and v still reads the direction."""
    params = random_params(TWO)
    layers = {}
    for name in ("layer_0", "layer_1"):
        attention = params[name]["attention"]
        layers[name] = params[name] | {
            "attention": attention | {"W_Q": 0 * attention["W_Q"], "W_K": 0 * attention["W_K"]}
        }
    params, batch = params | layers, repeats()
    found = knock_out_direction(TWO, params, batch, directions_of(TWO), everything)
    np.testing.assert_allclose(found["logits"], 0.0, atol=1e-5)


def test_directions_have_no_length_and_may_be_one_for_all_heads():
    params, batch, d = random_params(TWO), repeats(), directions_of(TWO)[1, 1]
    found = knock_out_direction(TWO, params, batch, d, chunk=3)
    assert found.shape == (2, 2, 2)
    each = np.broadcast_to(d, (2, 2, 8)) * np.array([[1, 30], [-1, 0.01]], np.float32)[..., None]
    np.testing.assert_allclose(knock_out_direction(TWO, params, batch, each), found, atol=1e-5)
    c = np.float32(0.7)
    np.testing.assert_allclose(
        knock_out_direction(TWO, params, batch, -5 * d, becomes=-c),
        knock_out_direction(TWO, params, batch, d, becomes=c),
        atol=1e-5,
    )
    assert np.abs(found).min() > 1e-4


def test_directions_of_another_shape():
    params, batch = random_params(TWO), repeats()
    for shape in ((7,), (2, 8), (2, 2, 7)):
        with pytest.raises(ValueError, match=r"directions must be \[D\] or \[L,H,D\] = \[2, 2, 8\]; got"):
            knock_out_direction(TWO, params, batch, np.ones(shape, np.float32))
    for shape in ((B,), (B, T, 1), (2, B, T)):
        with pytest.raises(ValueError, match=r"becomes must be a number, \[T\] or \[B,T\] = \[3, 8\]; got"):
            knock_out_direction(TWO, params, batch, np.ones(8, np.float32), becomes=np.ones(shape))
    with pytest.raises(ValueError, match="directions must not be zero"):
        knock_out_direction(TWO, params, batch, np.zeros(8, np.float32))
    outside = dataclasses.replace(batch, tokens=batch.tokens.at[0, 0].set(V))
    with pytest.raises(ValueError, match="tokens must be in"):
        knock_out_direction(TWO, params, outside, np.ones(8, np.float32))
