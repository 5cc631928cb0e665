"""Null heads have the norms of the real ones and nothing else of them; p values and rejections are the slow ones."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits.attention import ov
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.spectra import copying_score, summarize
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import nulls
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import init_params

CONFIG = TransformerConfig(n_vocab=12, n_context=8, n_layers=2, n_heads=2, d_model=16)
SEEDS = st.integers(0, 2**32 - 1)
N = 20


@pytest.fixture(scope="module")
def weights():
    return CircuitWeights.from_params(CONFIG, init_params(CONFIG, jax.random.key(0)))


def norms(matrix):
    return np.linalg.norm(matrix, axis=(-2, -1))


def assert_redrawn(null, real):
    """The norms of the real matrices and none of their directions."""
    np.testing.assert_allclose(norms(null), norms(real), rtol=1e-5)
    cosine = (np.asarray(real) * null).sum((-2, -1)) / norms(real) ** 2
    assert (np.abs(cosine) < 0.4).all()


# --- random heads ---


def test_norms_are_kept_and_directions_are_not(weights):
    null = nulls.norm_matched(weights, jax.random.key(1))
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        assert_redrawn(np.asarray(getattr(null, name)), getattr(weights, name))
    assert null.W_E is weights.W_E


def test_grouped_keys_and_values_stay_grouped(weights):
    """One key and value head [L,1,D,K] for two query heads."""
    grouped = dataclasses.replace(weights, W_K=weights.W_K[:, :1], W_V=weights.W_V[:, :1])
    null = nulls.norm_matched(grouped, jax.random.key(1))
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        assert_redrawn(np.asarray(getattr(null, name)), getattr(grouped, name))
    threshold = jax.jit(lambda w: nulls.copying_threshold(w, jax.random.key(2), n_draws=4))(grouped)
    assert 0 < threshold < 1


def test_copying_threshold_is_the_quantile_of_null_copying(weights):
    threshold = jax.jit(lambda w: nulls.copying_threshold(w, jax.random.key(2), n_draws=16, quantile=0.9))(weights)
    keys = jax.random.split(jax.random.key(2), 16)
    scores = jax.jit(lambda w: jax.lax.map(lambda k: copying_score(nulls.norm_matched(w, k)), keys))(weights)
    assert np.mean(np.asarray(scores) <= threshold) == pytest.approx(0.9, abs=0.02)
    assert 0 < threshold < 1


def test_random_circuits_keep_the_norm_of_each_factor(weights):
    circuit = ov(weights)
    null = nulls.random_circuits(circuit, jax.random.key(3))
    assert_redrawn(np.asarray(null.left), circuit.left)
    assert_redrawn(np.asarray(null.right), circuit.right)
    assert np.abs(np.corrcoef(np.ravel(null.left), np.ravel(null.right))[0, 1]) < 0.2


def test_a_zero_head_stays_zero_and_a_diverged_one_nan():
    factor = np.stack([np.zeros((4, 2)), np.full((4, 2), np.nan)]).astype(np.float32)
    null = nulls.random_circuits(LowRank(factor, factor.mT), jax.random.key(0))
    np.testing.assert_array_equal(null.left, factor)
    np.testing.assert_array_equal(null.right, factor.mT)


# --- spectra against their null ---


@jax.jit
def spectra_against_null(circuit, null):
    summary = summarize(circuit)
    return summary, nulls.z_score(summary, null), nulls.p_value(summary, null)


spectral_null = jax.jit(lambda circuit, key: nulls.spectral_null(circuit, key, N))


def test_a_planted_projection_stands_out_and_a_random_head_does_not():
    """Heads [2]: a projection on K dimensions, which copies, is symmetric and flat, beside a random one."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(16, 4)))[0]
    left, right = (np.float32([planted, rng.normal(size=basis.shape)]) for planted in (basis, basis))
    circuit = LowRank(left, right.mT)
    null = spectral_null(circuit, jax.random.key(0))
    _, z, p = spectra_against_null(circuit, null)
    for name in ("effective_rank", "stable_rank", "participation_ratio", "flatness", "positivity", "symmetry"):
        assert getattr(z, name)[0] > 2, name
        np.testing.assert_allclose(getattr(p, name)[0], 1 / (N + 1), rtol=1e-5, err_msg=name)
        assert np.abs(getattr(z, name)[1]) < 2.5, name
        assert getattr(p, name)[1] > 2 / (N + 1), name
    assert null.draws.energy_curve.shape == (N, 2, 4)
    assert z.energy_curve.shape == p.energy_curve.shape == (2, 4)
    np.testing.assert_array_equal(z.energy_curve[:, -1], 0)  # always 1 up to rounding: no draw and no head differs
    np.testing.assert_array_equal(p.energy_curve[:, -1], 1)


def test_the_null_is_that_of_the_shape_alone():
    """Norms and gauge of a head do not show in it, so one head's null serves all; mean and std are over the draws."""
    rng = np.random.default_rng(1)
    circuit = LowRank(*(rng.normal(size=(2, *shape)).astype(np.float32) for shape in ((16, 4), (4, 16))))
    null = spectral_null(circuit, jax.random.key(0))
    same = spectral_null(LowRank(5 * circuit.left[:, ::-1], circuit.right / 7), jax.random.key(0))
    for a, b in zip(jax.tree.leaves(null.draws), jax.tree.leaves(same.draws), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    ranks = np.asarray(null.draws.effective_rank, np.float64)
    np.testing.assert_allclose(null.mean.effective_rank, ranks.mean(0), rtol=1e-5)
    np.testing.assert_allclose(null.std.effective_rank, ranks.std(0, ddof=1), rtol=1e-3)

    shared = jax.tree.map(lambda draws: draws[:, 0], null)
    _, z, p = spectra_against_null(circuit, shared)
    _, own_z, own_p = spectra_against_null(circuit, null)
    for a, b in ((z, own_z), (p, own_p)):
        np.testing.assert_allclose(a.effective_rank[0], b.effective_rank[0], rtol=1e-5)
        np.testing.assert_allclose(a.energy_curve[0], b.energy_curve[0], rtol=1e-5)
        assert a.energy_curve.shape == (2, 4)


def test_every_draw_is_another_and_the_key_decides():
    circuit = LowRank(np.ones((2, 16, 4), np.float32), np.ones((2, 4, 16), np.float32))
    ranks, same, others = (spectral_null(circuit, jax.random.key(k)).draws.effective_rank for k in (0, 0, 1))
    assert len(np.unique(ranks)) == 2 * N
    np.testing.assert_array_equal(ranks, same)
    assert not np.isin(others, ranks).any()


def test_a_zero_head_does_not_stand_out_and_a_diverged_one_is_undetermined():
    factor = np.zeros((2, 16, 4), np.float32)
    factor[1] = np.nan
    circuit = LowRank(factor, factor.mT)
    _, z, p = spectra_against_null(circuit, spectral_null(circuit, jax.random.key(0)))
    for leaf, at_rest in ((z, 0.0), (p, 1.0)):
        for scores in jax.tree.leaves(leaf):
            np.testing.assert_array_equal(scores[0], np.full(scores.shape[1:], at_rest))
            assert np.isnan(scores[1]).all()


# --- z and p ---

z_score, p_value = jax.jit(nulls.z_score), jax.jit(nulls.p_value)


def slow_p(value, draws):
    """Exact, on integers. (Of 32 small integers the mean is exact in float32 too, so ties agree.)"""
    numbers = [Fraction(int(number)) for number in (value, *draws)]
    mean = sum(numbers) / len(numbers)
    return sum(abs(number - mean) >= abs(numbers[0] - mean) for number in numbers) / len(numbers)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_p_and_z_are_the_slow_ones(seed):
    """Against draws [N,2,3] of one's own, and against one set [N] for all."""
    rng = np.random.default_rng(seed)
    value, draws = rng.integers(-512, 512, (2, 3)), rng.integers(-512, 512, (31, 2, 3)) // rng.integers(1, 200)
    p, z = (f(np.float32(value), nulls.Null(np.float32(draws))) for f in (p_value, z_score))
    shared_p, shared_z = (f(np.float32(value), nulls.Null(np.float32(draws[:, 0, 0]))) for f in (p_value, z_score))
    for i in np.ndindex(2, 3):
        assert p[i] == pytest.approx(slow_p(value[i], draws[:, *i]))
        assert shared_p[i] == pytest.approx(slow_p(value[i], draws[:, 0, 0]))
        assert 1 / 32 <= p[i] <= 1
    for actual, null in ((z, draws), (shared_z, draws[:, 0, 0])):
        spread = null.std(0, ddof=1)
        expected = (value - null.mean(0)) / np.where(spread == 0, 1, spread)
        moving = np.broadcast_to(spread > 0, value.shape)
        np.testing.assert_allclose(actual[moving], expected[moving], rtol=1e-4, atol=1e-5)


def test_p_is_exact_under_the_null():
    """A value drawn as the 19 draws are has p <= k/20 in k of 20 cases."""
    numbers = np.random.default_rng(0).gamma(1.0, size=(20, 20_000)).astype(np.float32)
    p = np.asarray(p_value(numbers[0], nulls.Null(numbers[1:])))
    for k in (1, 2, 5, 10):
        assert np.mean(p <= k / 20 + 1e-6) == pytest.approx(k / 20, abs=0.01)


def test_a_null_that_does_not_vary_or_is_not_finite():
    draws = np.float32([[0.1, 0.1, 1, np.nan, np.inf, 1]] * 6 + [[0.1, 0.1, 2, 1, 1, 2]])
    value = np.float32([0.1, 0.2, np.nan, 1, 1, np.inf])
    np.testing.assert_array_equal(z_score(value, nulls.Null(draws)), [0, np.inf, np.nan, np.nan, np.nan, np.inf])
    p = [1, 1 / 8, np.nan, np.nan, np.nan, np.nan]
    np.testing.assert_allclose(p_value(value, nulls.Null(draws)), p, rtol=1e-6)
    one_draw = nulls.Null(np.float32([[1.0, 2.0]]))
    np.testing.assert_array_equal(z_score(np.float32([1, 1]), one_draw), [np.nan, np.nan])
    np.testing.assert_array_equal(p_value(np.float32([1, 1]), one_draw), [1, 1])


# --- multiplicity ---

reject = jax.jit(nulls.benjamini_hochberg)


def slow_rejections(p_values, rate):
    """The k smallest, for the largest k whose k-th smallest is at most rate k / M."""
    ordered = sorted(p for p in p_values if not np.isnan(p))
    passing = [p for k, p in enumerate(ordered, 1) if p * len(ordered) <= np.float32(rate) * np.float32(k)]
    return [p <= passing[-1] if passing else False for p in p_values]


def some_p_values(seed, n=12):
    """Some tiny, some not, ties, and now and then NaN."""
    rng = np.random.default_rng(seed)
    p = rng.uniform(size=n) ** rng.uniform(1, 6)
    p[rng.integers(n, size=3)] = p[0]
    p[rng.random(n) < rng.choice([0, 0.3])] = np.nan
    return p.astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, rate=st.sampled_from([0.01, 0.05, 0.2]))
def test_rejections_are_the_slow_ones(seed, rate):
    p = some_p_values(seed)
    np.testing.assert_array_equal(reject(p, rate), slow_rejections(p, rate))


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_rejections_are_the_smallest_p_values_whatever_their_order(seed):
    p = some_p_values(seed)
    strict, loose = np.asarray(reject(p, 0.05)), np.asarray(reject(p, 0.2))
    assert (p[strict] <= 0.05).all()
    assert not loose[np.isnan(p)].any()
    assert (loose >= strict).all()
    assert strict[p <= 0.05 / len(p) * (1 - 1e-6)].all()  # what Bonferroni rejects
    assert p[strict].max(initial=0) <= p[~strict].min(initial=np.inf, where=~np.isnan(p[~strict]))
    order = np.random.default_rng(seed).permutation(len(p))
    np.testing.assert_array_equal(reject(p[order], 0.05), strict[order])


def test_rejections_of_known_p_values():
    """The example of Benjamini & Hochberg 1995, section 3.2: four rejections at 0.05, three by Bonferroni."""
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1,
    ]
    np.testing.assert_array_equal(reject(np.float32(p), 0.05), [True] * 4 + [False] * 11)
    heads = np.float32(p).reshape(3, 5)
    np.testing.assert_array_equal(reject(heads, 0.05), np.reshape([True] * 4 + [False] * 11, (3, 5)))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.05], [True]),
        ([0.051], [False]),
        ([np.nan], [False]),
        ([np.nan, 0.05], [False, True]),  # one test was made, not two
        ([0.0, 0.0], [True, True]),
        ([1.0, 1.0], [False, False]),
        ([], []),
    ],
    ids=["at the rate", "above", "nan", "nan does not count", "zeros", "ones", "none"],
)
def test_rejections_at_the_edges(p, expected):
    np.testing.assert_array_equal(nulls.benjamini_hochberg(jnp.array(p), 0.05), np.array(expected, bool))
