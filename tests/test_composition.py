"""Composition of every pair of heads, against the dense Frobenius formula in float64, its null and planted edges."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits.composition import composition_scores, k_path
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.models.transformer import ROTARY_BASE

V, T, L, H, D, K = 7, 6, 3, 2, 16, 4
KINDS = ("q", "k", "v")
compose, paths = jax.jit(composition_scores), jax.jit(k_path)


def random_weights(seed, shape=(L, H, D, K)):
    rng = np.random.default_rng(seed)
    n_layers, n_heads, d_model, d_head = shape
    draw = lambda *size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    read = (n_layers, n_heads, d_model, d_head)
    return CircuitWeights(
        W_E=draw(V, d_model), W_U=draw(d_model, V), W_P=draw(T, d_model),
        W_Q=draw(*read), W_K=draw(*read), W_V=draw(*read), W_O=draw(n_layers, n_heads, d_head, d_model),
    )  # fmt: skip


def ov(weights, head):
    return weights.W_V[head].astype(np.float64) @ weights.W_O[head]


def qk(weights, head):
    return weights.W_Q[head].astype(np.float64) @ weights.W_K[head].T


def pairs(n_layers=L, n_heads=H):
    """((layer, head) of the sender, (layer, head) of the receiver), for all pairs."""
    heads = list(np.ndindex(n_layers, n_heads))
    return [(a, b) for a in heads for b in heads]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_scores_are_those_of_the_dense_matrices(seed):
    weights = random_weights(seed)
    scores = compose(weights)
    assert scores.q.shape == scores.k.shape == scores.v.shape == (L, H, L, H)
    norm = np.linalg.norm
    for a, b in pairs():
        if a[0] >= b[0]:
            assert scores.q[*a, *b] == scores.k[*a, *b] == scores.v[*a, *b] == 0.0
            continue
        sent, wants = ov(weights, a), qk(weights, b)
        expected = {
            "q": norm(sent @ wants) / norm(sent) / norm(wants),
            "k": norm(sent @ wants.T) / norm(sent) / norm(wants),
            "v": norm(sent @ ov(weights, b)) / norm(sent) / norm(ov(weights, b)),
        }
        for kind in KINDS:
            np.testing.assert_allclose(getattr(scores, kind)[*a, *b], expected[kind], atol=1e-5)


def test_scale_of_a_head_does_not_matter():
    weights = random_weights(0)
    scaled = dataclasses.replace(weights, W_V=1e3 * weights.W_V, W_Q=1e-3 * weights.W_Q)
    for kind in KINDS:
        np.testing.assert_allclose(getattr(compose(scaled), kind), getattr(compose(weights), kind), atol=1e-5)


def test_random_heads_score_one_over_root_d():
    """256 pairs of independent Gaussian heads: mean within 5 % of 1/sqrt(D)."""
    shape = (2, 16, 64, 8)
    scores = jax.jit(composition_scores)(random_weights(1, shape))
    for kind in KINDS:
        earlier = np.asarray(getattr(scores, kind))[0, :, 1]
        assert abs(earlier.mean() * 64**0.5 - 1) < 0.05


@pytest.mark.parametrize(("kind", "reads"), [("q", "W_Q"), ("k", "W_K"), ("v", "W_V")])
def test_planted_edge_ranks_first(kind, reads):
    """The receiver reads exactly the K directions that the sender writes; with orthonormal factors: 1/sqrt(K)."""
    weights, rng, sender, receiver = random_weights(2), np.random.default_rng(3), (0, 1), (2, 0)
    basis = lambda: np.linalg.qr(rng.normal(size=(D, K)))[0].astype(np.float32)  # noqa: E731
    for head, names in ((sender, ("W_V",)), (receiver, ("W_Q", "W_K", "W_V"))):
        for name in names:
            getattr(weights, name)[head] = basis()
    weights.W_O[receiver] = basis().T
    weights.W_O[sender] = getattr(weights, reads)[receiver].T
    scores = np.asarray(getattr(compose(weights), kind))
    assert np.unravel_index(scores.argmax(), scores.shape) == (*sender, *receiver)
    np.testing.assert_allclose(scores[*sender, *receiver], K**-0.5, atol=1e-5)


def test_heads_that_touch_nothing_of_each_other_score_zero():
    weights = random_weights(4)
    weights.W_O[0, 0, :, D // 2 :] = 0.0
    for name in ("W_Q", "W_K", "W_V"):
        getattr(weights, name)[1, 1, : D // 2] = 0.0
    scores = compose(weights)
    for kind in KINDS:
        assert getattr(scores, kind)[0, 0, 1, 1] == 0.0
        assert getattr(scores, kind)[0, 1, 1, 1] > 0.05


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O"])
def test_zero_head_scores_zero_and_spoils_nothing(name):
    weights, head = random_weights(5), (1, 0)
    before = compose(weights)
    getattr(weights, name)[head] = 0.0
    after = compose(weights)
    is_sender, is_receiver = np.zeros((2, L, H, L, H), bool)
    is_sender[head], is_receiver[:, :, *head] = True, True
    dead = {
        "q": is_receiver if name in ("W_Q", "W_K") else is_sender,
        "k": is_receiver if name in ("W_Q", "W_K") else is_sender,
        "v": is_sender | is_receiver if name in ("W_V", "W_O") else np.zeros_like(is_sender),
    }
    for kind in KINDS:
        expected = np.where(dead[kind], 0.0, getattr(before, kind))
        np.testing.assert_allclose(getattr(after, kind), expected, atol=1e-6)


def test_nan_is_not_reported_as_no_composition():
    """A head that diverged in training must not look like one that composes with nobody."""
    weights = random_weights(6)
    weights.W_O[0, 1, 2, 3] = np.nan
    scores = compose(weights)
    for kind in KINDS:
        assert np.isnan(getattr(scores, kind)[0, 1, 1:]).all()
        assert np.isfinite(getattr(scores, kind)[0, 0]).all()


def test_one_layer_has_no_pairs():
    scores = jax.jit(composition_scores)(random_weights(7, (1, H, D, K)))
    for kind in KINDS:
        assert not np.asarray(getattr(scores, kind)).any()


def test_k_path_is_the_dense_product():
    weights = random_weights(8)
    circuit = paths(weights)
    assert circuit.shape == (L, H, L, H, V, V)
    assert circuit.left.shape[-1] == K
    e = weights.W_E.astype(np.float64)
    for a, b in pairs():
        expected = e @ qk(weights, b) @ ov(weights, a).T @ e.T
        actual = np.asarray(circuit.left[*a, *b], np.float64) @ circuit.right[*a, *b]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_rotary_k_path_averages_the_reader_over_the_context():
    weights = dataclasses.replace(random_weights(9), W_P=None, positions="rotary", n_context=T)
    circuit = paths(weights)
    turn = np.zeros((K, K))
    for offset in range(T):
        for i in range(K // 2):
            angle = offset * ROTARY_BASE ** (-2 * i / K)
            j = i + K // 2
            turn[[i, j], [i, j]] += np.cos(angle) / T
            turn[[i, j], [j, i]] += np.array([1, -1]) * np.sin(angle) / T
    e = weights.W_E.astype(np.float64)
    for a, b in pairs():
        reads = weights.W_Q[b].astype(np.float64) @ turn @ weights.W_K[b].T
        expected = e @ reads @ ov(weights, a).T @ e.T
        actual = np.asarray(circuit.left[*a, *b], np.float64) @ circuit.right[*a, *b]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_many_models_under_vmap():
    models = [random_weights(seed) for seed in (10, 11)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
    together = jax.jit(jax.vmap(composition_scores))(stacked)
    for i, weights in enumerate(models):
        for kind in KINDS:
            np.testing.assert_allclose(getattr(together, kind)[i], getattr(compose(weights), kind), atol=1e-6)
