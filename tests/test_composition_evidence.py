"""Composition against its nulls: unrelated heads are unremarkable, a planted edge stands out, the null is exact."""

import jax
import numpy as np
import pytest

from circuits_jax.circuits.spectra import participation_ratio
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads.composition_evidence import composition_evidence, rotation_deviation

L, H, G, D, K = 3, 8, 4, 32, 4
KINDS = ("q", "k", "v")
NULLS = ("z_rotation", "z_random", "z_same_layer")
evidence = jax.jit(composition_evidence)


def random_weights(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    return CircuitWeights(
        W_E=draw(5, D), W_U=draw(D, 5), W_P=draw(6, D),
        W_Q=draw(L, H, D, K), W_K=draw(L, G, D, K), W_V=draw(L, G, D, K), W_O=draw(L, H, K, D),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scale_a", "scale_b"), [((1, 1, 1), (1, 1, 1, 1)), ((3, 1, 0.1), (2, 1, 1, 0.5)), ((1,), (1,))]
)
def test_rotation_null_is_that_of_random_rotations(scale_a, scale_b):
    """20 000 rotations: mean within 3 %, deviation within 4 %, three or more standard errors of either."""
    rng, d = np.random.default_rng(0), 8
    a = np.diag(np.pad(np.array(scale_a, float), (0, d - len(scale_a))))
    b = np.diag(np.pad(np.array(scale_b, float), (0, d - len(scale_b))))
    rotations = np.linalg.qr(rng.normal(size=(20_000, d, d)))[0]
    squares = np.square(np.linalg.norm(a @ rotations @ b, axis=(-2, -1)) / np.linalg.norm(a) / np.linalg.norm(b))
    ratios = (participation_ratio(np.sort(np.diag(x))[::-1].astype(np.float32)) for x in (a, b))
    np.testing.assert_allclose(squares.mean(), 1 / d, rtol=0.03)
    np.testing.assert_allclose(rotation_deviation(*ratios, d), squares.std(), rtol=0.04)


def test_a_flat_full_rank_matrix_does_not_vary():
    assert rotation_deviation(np.float32(D), np.float32(3.0), D) == 0.0


def test_unrelated_heads_are_unremarkable():
    """Of Gaussian heads every z has mean 0 and deviation 1, up to what 192 pairs that share heads leave open."""
    found = evidence(random_weights(0), jax.random.key(0))
    for kind in KINDS:
        assert abs(np.nanmean(getattr(found.excess, kind))) < 0.01
        for null in NULLS:
            z = np.asarray(getattr(getattr(found, null), kind))
            assert abs(np.nanmean(z)) < 0.4, (null, kind)
            assert 0.7 < np.nanstd(z) < 1.4, (null, kind)


@pytest.mark.parametrize(("kind", "name"), [("q", "W_Q"), ("k", "W_K"), ("v", "W_V")])
def test_a_planted_edge_stands_out_from_every_null(kind, name):
    weights, sender, receiver = random_weights(1), (0, 1), (2, 5)
    group = receiver[1] if name == "W_Q" else receiver[1] // (H // G)
    getattr(weights, name)[2, group] = weights.W_O[sender].T
    found = evidence(weights, jax.random.key(1))
    for null in NULLS:
        z = np.asarray(getattr(getattr(found, null), kind))
        best = np.unravel_index(np.nanargmax(z), z.shape)
        assert best[:2] == sender
        assert best[2] == 2
        assert z[*sender, *receiver] > 5


def test_only_pairs_that_can_compose_have_evidence():
    found = evidence(random_weights(2), jax.random.key(2))
    earlier = np.arange(L)[:, None, None, None] < np.arange(L)[:, None]
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(np.isfinite(leaf), np.broadcast_to(earlier, leaf.shape))


def test_rotation_deviation_of_wide_models_does_not_overflow():
    # D^2 (D - 1) (D + 2) of GPT-2 small is more than an int32 holds.
    found = jax.jit(lambda a, b: rotation_deviation(a, b, 768))(np.float32(3.0), np.float32(5.0))
    expected = np.sqrt(2 * (768 / 3 - 1) * (768 / 5 - 1) / (768**2 * 767 * 770))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
