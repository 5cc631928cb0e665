"""Composition of every pair of heads, against the dense Frobenius formula in float64, its null and planted edges."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits.composition import (
    component_scores,
    composition_scores,
    k_path,
    k_path_gaps,
    projection_kernel,
    same_layer_scores,
    virtual_head,
)
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.models.config import ROTARY_BASE

V, T, L, H, D, K = 7, 6, 3, 2, 16, 4
KINDS = ("q", "k", "v")
compose = jax.jit(composition_scores)


def random_weights(seed, shape=(L, H, D, K), n_groups=None):
    rng = np.random.default_rng(seed)
    n_layers, n_heads, d_model, d_head = shape
    draw = lambda *size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    read, shared = (n_layers, n_heads, d_model, d_head), (n_layers, n_groups or n_heads, d_model, d_head)
    return CircuitWeights(
        W_E=draw(V, d_model), W_U=draw(d_model, V), W_P=draw(T, d_model),
        W_Q=draw(*read), W_K=draw(*shared), W_V=draw(*shared), W_O=draw(n_layers, n_heads, d_head, d_model),
    )  # fmt: skip


def shared(weights, x, head):
    """What key/value head h // (H/G) has for query head h."""
    n_heads, n_groups = weights.W_Q.shape[1], x.shape[1]
    return np.asarray(x[head[0], head[1] // (n_heads // n_groups)], np.float64)


def ov(weights, head):
    return shared(weights, weights.W_V, head) @ weights.W_O[head]


def qk(weights, head):
    return weights.W_Q[head].astype(np.float64) @ shared(weights, weights.W_K, head).T


def reads(weights, head):
    """What each kind of composition multiplies the sender's W_OV with."""
    return {"q": qk(weights, head), "k": qk(weights, head).T, "v": ov(weights, head)}


def pairs(n_layers=L, n_heads=H):
    """((layer, head) of the sender, (layer, head) of the receiver), for all pairs."""
    heads = list(np.ndindex(n_layers, n_heads))
    return [(a, b) for a in heads for b in heads]


def assert_dense(scores, weights, n_heads=H):
    norm = np.linalg.norm
    for kind in KINDS:
        assert getattr(scores, kind).shape == (L, n_heads, L, n_heads)
    for a, b in pairs(n_heads=n_heads):
        if a[0] >= b[0]:
            assert scores.q[*a, *b] == scores.k[*a, *b] == scores.v[*a, *b] == 0.0
            continue
        sent = ov(weights, a)
        for kind, read in reads(weights, b).items():
            expected = norm(sent @ read) / norm(sent) / norm(read)
            np.testing.assert_allclose(getattr(scores, kind)[*a, *b], expected, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_scores_are_those_of_the_dense_matrices(seed):
    weights = random_weights(seed)
    assert_dense(compose(weights), weights)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_grouped_heads_score_as_the_dense_matrices(n_groups):
    """Fails for a key/value head of h mod G."""
    weights = random_weights(0, (L, 4, D, K), n_groups)
    assert_dense(compose(weights), weights, n_heads=4)


def test_more_dimensions_in_a_head_than_in_the_model():
    weights = random_weights(1, (L, H, 3, 5))
    assert_dense(compose(weights), weights)


def test_rotary_scores_are_those_of_one_offset():
    weights = dataclasses.replace(random_weights(2), W_P=None, positions="rotary", n_context=T)
    assert_dense(compose(weights), weights)
    scores = compose(weights, 3)
    sent = ov(weights, (0, 1))
    wants = weights.W_Q[2, 0].astype(np.float64) @ turn_by(3) @ weights.W_K[2, 0].T
    for kind, read in (("q", wants), ("k", wants.T)):
        expected = np.linalg.norm(sent @ read) / np.linalg.norm(sent) / np.linalg.norm(read)
        np.testing.assert_allclose(getattr(scores, kind)[0, 1, 2, 0], expected, atol=1e-5)


def test_pairs_of_one_layer():
    weights = random_weights(3, (L, 4, D, K), 2)
    scores = jax.jit(same_layer_scores)(weights)
    norm = np.linalg.norm
    for layer, a, b in np.ndindex(L, 4, 4):
        sent = ov(weights, (layer, a))
        for kind, read in reads(weights, (layer, b)).items():
            expected = norm(sent @ read) / norm(sent) / norm(read)
            np.testing.assert_allclose(getattr(scores, kind)[layer, a, b], expected, atol=1e-5)


def test_components_of_a_sender():
    """Each against its own singular direction; together, weighted with their strength, they are the whole score."""
    weights = random_weights(4, (L, 4, D, K), 2)
    components, scores = jax.jit(component_scores)(weights), compose(weights)
    for a, b in pairs(n_heads=4):
        if a[0] >= b[0]:
            continue
        _, sigma, vh = np.linalg.svd(ov(weights, a))
        for kind, read in reads(weights, b).items():
            found = np.asarray(getattr(components, kind)[*a, *b], np.float64)
            np.testing.assert_allclose(found, np.linalg.norm(vh[:K] @ read, axis=1) / np.linalg.norm(read), atol=1e-5)
            whole = np.sqrt((sigma[:K] ** 2 * found**2).sum() / (sigma**2).sum())
            np.testing.assert_allclose(whole, getattr(scores, kind)[*a, *b], atol=1e-5)


def test_shared_dimensions_of_two_heads():
    weights, rng = random_weights(5, (L, 4, D, K), 2), np.random.default_rng(5)
    weights.W_Q[2, 3] = weights.W_O[0, 1].T @ rng.normal(size=(K, K))  # reads all that head 0.1 writes
    kernel = jax.jit(projection_kernel)(weights)
    np.testing.assert_allclose(kernel.q[0, 1, 2, 3], K, rtol=1e-5)
    base = lambda x: np.linalg.qr(np.asarray(x, np.float64))[0]  # noqa: E731
    for a, b in pairs(n_heads=4):
        spaces = {
            "q": weights.W_Q[b],
            "k": shared(weights, weights.W_K, b),
            "v": shared(weights, weights.W_V, b),
        }
        for kind, space in spaces.items():
            expected = np.linalg.norm(base(weights.W_O[a].T).T @ base(space)) ** 2 if a[0] < b[0] else 0.0
            np.testing.assert_allclose(getattr(kernel, kind)[*a, *b], expected, atol=1e-4)


def test_virtual_head_is_the_product():
    weights = random_weights(6, (L, 4, D, K), 2)
    circuit = virtual_head(weights, (0, 3), (2, 1))
    expected = ov(weights, (0, 3)) @ ov(weights, (2, 1))
    np.testing.assert_allclose(circuit.rows(np.arange(D)), expected, atol=1e-5 * np.abs(expected).max())


def gauged(weights, seed):
    """W_Q G, W_K G^-T, W_V G', G'^-1 W_O: the same model."""
    rng = np.random.default_rng(seed)
    g, f = (np.eye(K) + 0.3 * rng.normal(size=(*weights.W_Q.shape[:2], K, K)) for _ in range(2))
    change = lambda x: x.astype(np.float32)  # noqa: E731
    return dataclasses.replace(
        weights,
        W_Q=change(weights.W_Q @ g),
        W_K=change(weights.W_K @ np.linalg.inv(g).swapaxes(-1, -2)),
        W_V=change(weights.W_V @ f),
        W_O=change(np.linalg.inv(f) @ weights.W_O),
    )


def turned(weights, seed):
    """The residual stream in another orthonormal basis: the same model."""
    o = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    change = lambda x: x.astype(np.float32)  # noqa: E731
    readers = {name: change(o.T @ getattr(weights, name)) for name in ("W_Q", "W_K", "W_V", "W_U")}
    writers = {name: change(getattr(weights, name) @ o) for name in ("W_E", "W_P", "W_O")}
    return dataclasses.replace(weights, **readers, **writers)


everything = jax.jit(lambda w: (composition_scores(w), component_scores(w), projection_kernel(w), k_path_gaps(w)))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_gauge_and_basis_change_nothing(seed):
    weights = random_weights(seed)
    expected = everything(weights)
    for same in (gauged(weights, seed), turned(weights, seed)):
        for actual, wanted in zip(jax.tree.leaves(everything(same)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-4 * max(1.0, np.abs(wanted).max()))


def test_permuted_heads_permute_the_scores():
    weights, order = random_weights(7, (L, 4, D, K)), np.array([2, 0, 3, 1])
    names = ("W_Q", "W_K", "W_V", "W_O")
    permuted = dataclasses.replace(weights, **{name: getattr(weights, name)[:, order] for name in names})
    for kind in KINDS:
        expected = np.asarray(getattr(compose(weights), kind))[:, order][..., order]
        np.testing.assert_allclose(getattr(compose(permuted), kind), expected, atol=1e-6)


def test_bfloat16_weights_are_looked_at_in_float32():
    weights = random_weights(8)
    rough = jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.bfloat16), weights)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), rough)
    for kind in KINDS:
        scores = getattr(compose(rough), kind)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, getattr(compose(exact), kind), atol=1e-6)


@pytest.mark.parametrize("function", [composition_scores, k_path_gaps], ids=["scores", "k_path_gaps"])
def test_memory_is_that_of_one_pair_of_layers(function):
    """Twice the layers, four times the pairs: the same temporary memory, up to what grows with the model."""

    def temporary(n_layers):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_weights(9, (n_layers, 8, 64, 8)))
        return jax.jit(function).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(4), temporary(16)
    weights = 4 * 16 * 8 * 64 * 8 * 4  # bytes of the larger model's heads
    assert many - few < weights
    assert many < (16 * 8) ** 2 * 8 * 8 * 4 / 4  # all pairs at once would take four times that at least


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


def turn_by(offset):
    """R_offset [K,K] in float64."""
    turn = np.zeros((K, K))
    for i in range(K // 2):
        angle = offset * ROTARY_BASE ** (-2 * i / K)
        j = i + K // 2
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[[i, j], [j, i]] = np.array([1, -1]) * np.sin(angle)
    return turn


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_k_paths_are_the_dense_products(positions):
    weights, turn = random_weights(8), np.eye(K)
    if positions == "rotary":
        weights = dataclasses.replace(weights, W_P=None, positions="rotary", n_context=T)
        turn = np.mean([turn_by(offset) for offset in range(T)], 0)
    gaps = np.asarray(jax.jit(k_path_gaps)(weights))
    e = weights.W_E.astype(np.float64)
    scale = 0.0
    for a, b in pairs():
        if a[0] >= b[0]:
            assert gaps[*a, *b] == 0.0
            continue
        expected = e @ weights.W_Q[b].astype(np.float64) @ turn @ weights.W_K[b].T @ ov(weights, a).T @ e.T
        scale = max(scale, np.abs(expected).max())
        off = expected[~np.eye(V, dtype=bool)]
        np.testing.assert_allclose(gaps[*a, *b], np.diag(expected).mean() - off.mean(), rtol=0, atol=1e-5 * scale)
        circuit = k_path(weights, a, b)
        assert circuit.shape == (V, V)
        np.testing.assert_allclose(circuit.rows(np.arange(V)), expected, rtol=0, atol=1e-5 * scale)


def test_a_path_goes_forward():
    for function in (k_path, virtual_head):
        with pytest.raises(ValueError, match="earlier layer"):
            function(random_weights(8), (1, 0), (1, 1))
        with pytest.raises(IndexError):
            function(random_weights(8), (0, 0), (1, H))


def test_many_models_under_vmap():
    models = [random_weights(seed) for seed in (10, 11)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
    together = jax.jit(jax.vmap(composition_scores))(stacked)
    for i, weights in enumerate(models):
        for kind in KINDS:
            np.testing.assert_allclose(getattr(together, kind)[i], getattr(compose(weights), kind), atol=1e-6)
