"""Null heads have the norms of the real ones and nothing else of them; p values and rejections are the slow ones."""

import dataclasses
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.spectra import summarize
from circuits_jax.circuits.token_space import token_ov
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


# --- models drawn from a real one ---


def gaussian_weights(n_heads=3, n_groups=3, d_model=16, d_head=4, n_layers=2, n_vocab=10, positions="none"):
    """Every array that heads and logits have, biases too."""
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return CircuitWeights(
        W_E=array(n_vocab, d_model), W_Q=array(n_layers, n_heads, d_model, d_head),
        W_K=array(n_layers, n_groups, d_model, d_head), W_V=array(n_layers, n_groups, d_model, d_head),
        W_O=array(n_layers, n_heads, d_head, d_model), W_U=array(d_model, n_vocab),
        b_Q=array(n_layers, n_heads, d_head), b_K=array(n_layers, n_groups, d_head),
        b_V=array(n_layers, n_groups, d_head), b_U=array(n_vocab), n_context=8, positions=positions,
    )  # fmt: skip


NULLS = {f.__name__: f for f in (nulls.norm_matched, nulls.random_rotation, nulls.token_permutation)}
a_null = pytest.mark.parametrize("null", NULLS.values(), ids=NULLS)


def own_logits(weights):
    """tr(W_E W_OV W_U) of every head [L,H]: what attended tokens do for themselves."""
    return token_ov(weights).trace()


@a_null
def test_the_key_decides_and_vmap_is_each_draw_alone(null):
    weights = gaussian_weights()
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda k: null(weights, k)))(keys)
    for i in (0, 2):
        again = jax.jit(null)(weights, keys[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), together, again)
    assert len(np.unique(np.asarray(jax.vmap(own_logits)(together))[:, 0, 0])) == 3


@a_null
@pytest.mark.parametrize("shape", [{}, {"n_heads": 4, "n_groups": 2}, {"d_model": 4, "d_head": 6}], ids=str)
def test_nulls_lower_for_every_platform(null, shape):
    weights, key = gaussian_weights(**shape), jax.random.key(0)
    platforms = ("cpu", "cuda", "tpu")
    drawn = jax.jit(lambda w, k: nulls.draw(own_logits, w, null, k, 3))
    assert jax.export.export(drawn, platforms=platforms)(weights, key).platforms == platforms


@a_null
def test_p_values_of_a_null_against_itself_are_uniform(null):
    """A model drawn from the null and judged by 19 more draws made from it: p <= k/20 in k of 20 cases."""
    real = gaussian_weights(n_heads=1, n_groups=1, n_layers=1, d_model=6, d_head=2)

    def p_of(key):
        value_key, null_key = jax.random.split(key)
        weights = null(real, value_key)
        return nulls.p_value(own_logits(weights), nulls.draw(own_logits, weights, null, null_key, 19))

    p = np.asarray(
        jax.jit(lambda keys: jax.lax.map(p_of, keys, batch_size=100))(jax.random.split(jax.random.key(3), 1500))
    )
    for k in (1, 2, 5, 10, 15):
        assert np.mean(p <= k / 20 + 1e-6) == pytest.approx(k / 20, abs=4 * np.sqrt(k / 20 * (1 - k / 20) / 1500))


def test_draw_is_the_statistic_of_each_draw():
    weights, key = gaussian_weights(), jax.random.key(5)
    drawn = jax.jit(lambda w: nulls.draw(lambda n: {"own": own_logits(n)}, w, nulls.token_permutation, key, 3))(weights)
    for i, k in enumerate(jax.random.split(key, 3)):
        alone = own_logits(nulls.token_permutation(weights, k))
        np.testing.assert_allclose(drawn.draws["own"][i], alone, rtol=1e-4, atol=1e-4)
    assert drawn.mean["own"].shape == (2, 3)


# --- heads that read and write elsewhere ---

rotated = jax.jit(nulls.random_rotation)


def slow_spectra(weights, offset=0):
    """Singular values of W_QK at one offset and of W_OV, [L,H,D] each: D x D in float64."""
    circuits = (jax.tree.map(lambda x: np.asarray(x, np.float64), c) for c in (qk(weights, offset), ov(weights)))
    return [np.linalg.svd(c.left @ c.right, compute_uv=False) for c in circuits]


SHAPES = {
    "heads": {},
    "grouped": {"n_heads": 4, "n_groups": 2},
    "one-head": {"n_heads": 1, "n_groups": 1},
    "K=D": {"d_model": 6, "d_head": 6},
    "K>D": {"d_model": 4, "d_head": 6},
    "rotary": {"positions": "rotary"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rotated_heads_keep_their_spectra_and_lose_their_places(shape):
    real = gaussian_weights(**shape)
    null = rotated(real, jax.random.key(1))
    for offset in (0, 3):
        for a, b in zip(slow_spectra(null, offset), slow_spectra(real, offset), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * b.max())
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        a, b = (np.asarray(getattr(w, name), np.float64) for w in (null, real))
        a, b = (a.mT, b.mT) if name == "W_O" else (a, b)
        assert a.shape == b.shape
        # F R and Q R agree up to a frame: their Gram matrices are the same.
        np.testing.assert_allclose(a.mT @ a, b.mT @ b, atol=1e-4)
        assert np.abs(a - b).max() > 0.5
    for name in ("W_E", "W_U", "b_Q", "b_K", "b_V", "b_U"):
        np.testing.assert_array_equal(getattr(null, name), getattr(real, name))


@pytest.mark.parametrize(("d_model", "d_head"), [(6, 3), (4, 4), (3, 5)])
def test_frames_are_orthonormal_and_uniform(d_model, d_head):
    """A head that reads the first K dimensions is turned into the frame itself. Haar: E F_ij = 0, E F_ij^2 = 1/D,
    E F_ij^4 = 3/(D (D + 2)), and the four sides are independent."""
    first = np.eye(d_model, d_head, dtype=np.float32)[None, None]
    real = dataclasses.replace(
        gaussian_weights(n_heads=1, n_groups=1, n_layers=1, d_model=d_model, d_head=d_head),
        W_Q=first, W_K=first, W_V=first, W_O=first.mT,
    )  # fmt: skip
    n = 4000
    null = jax.jit(jax.vmap(lambda k: nulls.random_rotation(real, k)))(jax.random.split(jax.random.key(0), n))
    sides = [np.asarray(x, np.float64)[:, 0, 0] for x in (null.W_Q, null.W_K, null.W_V, null.W_O.mT)]
    for side in sides:
        gram = side.mT @ side
        np.testing.assert_allclose(gram, np.broadcast_to(first[0, 0].T @ first[0, 0], gram.shape), atol=1e-5)
        frame = side[..., :d_model]
        np.testing.assert_allclose(frame.mean(0), 0, atol=5 / np.sqrt(n * d_model))
        np.testing.assert_allclose((frame**2).mean(0), 1 / d_model, rtol=0.1)
        np.testing.assert_allclose((frame**4).mean(0), 3 / (d_model * (d_model + 2)), rtol=0.25)
    for a, b in itertools.combinations(sides, 2):
        cosine = (a * b).sum((-2, -1)) / min(d_model, d_head)
        assert np.abs(cosine.mean()) < 5 * cosine.std() / np.sqrt(n)
        assert cosine.std() < 0.8


def test_a_rotated_circuit_has_the_mean_and_mean_square_of_theory():
    """x W_QK y^T and x W_OV y^T of every head: mean 0, mean square ||x||^2 ||y||^2 ||W||_F^2 / D^2."""
    real, n = gaussian_weights(n_heads=2, n_groups=1, d_model=8, d_head=3), 4000
    rng = np.random.default_rng(1)
    x, y = (rng.normal(size=8).astype(np.float32) for _ in range(2))
    for circuit in (qk, ov):
        value = lambda w, circuit=circuit: jnp.einsum("d,lhdk,lhke,e->lh", x, circuit(w).left, circuit(w).right, y)  # noqa: E731
        keys = jax.random.split(jax.random.key(7), n)
        values = np.asarray(jax.jit(jax.vmap(lambda k, f=value: f(nulls.random_rotation(real, k))))(keys), np.float64)
        norm = np.linalg.norm(np.asarray(circuit(real).left @ circuit(real).right), axis=(-2, -1))
        expected = (x @ x) * (y @ y) * norm**2 / 8**2
        assert (np.abs(values.mean(0)) < 5 * np.sqrt(expected / n)).all()
        np.testing.assert_allclose((values**2).mean(0), expected, rtol=0.15)


def test_rotation_knows_nothing_of_the_gauge():
    """W_Q G with W_K G^-T, and W_V G with G^-1 W_O: the spectra of the null are the same."""
    real = gaussian_weights()
    gauge = np.random.default_rng(2).normal(size=(2, 3, 4, 4)).astype(np.float32)
    gauge, inverse = gauge + 3 * np.eye(4, dtype=np.float32), np.linalg.inv(gauge + 3 * np.eye(4, dtype=np.float32))
    other = dataclasses.replace(
        real, W_Q=real.W_Q @ gauge, W_K=real.W_K @ inverse.mT, W_V=real.W_V @ gauge, W_O=inverse @ real.W_O
    )
    nulls_of = (rotated(w, jax.random.key(1)) for w in (real, other))
    for a, b in zip(*map(slow_spectra, nulls_of), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * b.max())


def test_a_zero_head_rotates_to_zero_and_a_diverged_one_alone_to_nan():
    real = gaussian_weights()
    W_Q = real.W_Q.copy()
    W_Q[0, 1], W_Q[1, 2] = 0, np.nan
    null = np.asarray(rotated(dataclasses.replace(real, W_Q=W_Q), jax.random.key(0)).W_Q)
    np.testing.assert_array_equal(null[0, 1], 0)
    assert np.isnan(null[1, 2]).all()
    assert np.isfinite(np.delete(null.reshape(6, -1), 5, axis=0)).all()


# --- halves of other heads ---


@pytest.mark.parametrize(
    ("heads", "groups", "shift"), [(2, 2, 1), (3, 3, 2), (3, 3, -1), (4, 2, 2), (6, 3, 3), (6, 3, 4)]
)
def test_halves_are_those_of_the_head_that_is_shift_further(heads, groups, shift):
    real = gaussian_weights(n_heads=heads, n_groups=groups)
    null = nulls.same_layer_permutation(real, shift)
    for h in range(heads):
        other = (h + shift) % heads
        own_group, other_group = h // (heads // groups), other // (heads // groups)
        assert own_group != other_group
        np.testing.assert_array_equal(null.W_Q[:, h], real.W_Q[:, h])
        np.testing.assert_array_equal(null.b_Q[:, h], real.b_Q[:, h])
        np.testing.assert_array_equal(null.W_K[:, h], real.W_K[:, other_group])
        np.testing.assert_array_equal(null.b_K[:, h], real.b_K[:, other_group])
        np.testing.assert_array_equal(null.W_V[:, h], real.W_V[:, own_group])
        np.testing.assert_array_equal(null.b_V[:, h], real.b_V[:, own_group])
        np.testing.assert_array_equal(null.W_O[:, h], real.W_O[:, other])


def test_shifts_can_be_traced_and_biases_missing():
    real = dataclasses.replace(gaussian_weights(), b_K=None, b_V=None)
    both = jax.jit(jax.vmap(lambda shift: nulls.same_layer_permutation(real, shift)))(jnp.array([1, 2]))
    for i, shift in enumerate((1, 2)):
        alone = nulls.same_layer_permutation(real, shift)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), both, alone)
    assert both.b_K is None
    assert both.b_V is None
    exported = jax.export.export(jax.jit(nulls.same_layer_permutation), platforms=("cpu", "cuda", "tpu"))
    assert exported(real, 1).platforms == ("cpu", "cuda", "tpu")


def test_a_head_whose_halves_belong_together_is_told_from_one_whose_do_not():
    """Heads that copy within dimensions of their own: c = tr(W_OV)/K is 1, and 0 with the half of another head."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0].astype(np.float32)
    W_V = np.stack([basis[:, 4 * h : 4 * h + 4] for h in range(3)])[None]
    real = dataclasses.replace(gaussian_weights(n_layers=1), W_V=W_V, W_O=W_V.mT, W_Q=W_V, W_K=W_V)
    null = nulls.same_layer_permutation(real, 1)
    for circuit in (ov, qk):
        np.testing.assert_allclose(circuit(real).trace() / 4, 1, atol=1e-5)
        np.testing.assert_allclose(circuit(null).trace() / 4, 0, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "groups", "shift", "message"),
    [
        (1, 1, 1, "same_layer_permutation needs two heads with keys and values of their own in a layer; got 1 for 1"),
        (4, 1, 2, "same_layer_permutation needs two heads with keys and values of their own in a layer; got 1 for 4"),
        (3, 3, 0, r"shift must be in 1 \.\.\. 2 modulo the 3 heads, so that no head keeps its other half; got 0"),
        (3, 3, 6, r"shift must be in 1 \.\.\. 2 modulo the 3 heads, .* got 6"),
        (4, 2, 1, r"shift must be in 2 \.\.\. 2 modulo the 4 heads, .* got 1"),
        (4, 2, 3, r"shift must be in 2 \.\.\. 2 modulo the 4 heads, .* got 3"),
    ],
)
def test_shifts_that_leave_a_head_its_own_half_are_refused(heads, groups, shift, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        nulls.same_layer_permutation(gaussian_weights(n_heads=heads, n_groups=groups), shift)


# --- logits of other tokens ---


def test_permuted_tokens_keep_spectra_and_the_bias_of_their_column():
    real = gaussian_weights()
    null = jax.jit(nulls.token_permutation)(real, jax.random.key(0))
    columns, own = (np.vstack([w.W_U, w.b_U]).T for w in (null, real))
    place = [np.flatnonzero((own == column).all(1)).item() for column in columns]
    assert sorted(place) == list(range(10))
    assert place != list(range(10))
    np.testing.assert_array_equal(null.W_E, real.W_E)
    tables = [np.asarray(token_ov(w).low_rank().left @ token_ov(w).low_rank().right, np.float64) for w in (null, real)]
    np.testing.assert_allclose(tables[0], tables[1][..., place], atol=1e-4)
    spectra = [np.linalg.svd(table, compute_uv=False) for table in tables]
    np.testing.assert_allclose(*spectra, atol=1e-5 * spectra[1].max())
    assert nulls.token_permutation(dataclasses.replace(real, b_U=None), jax.random.key(0)).b_U is None


def test_permuted_tokens_break_copying():
    """A model that copies every token: the trace stands out from 99 draws, whose mean is that of the whole table."""
    real = gaussian_weights(n_heads=1, n_groups=1, n_layers=1, n_vocab=12, d_model=12, d_head=12)
    one = np.eye(12, dtype=np.float32)
    real = dataclasses.replace(real, W_E=one, W_U=one, W_V=one[None, None], W_O=one[None, None], b_U=None)
    null = jax.jit(lambda k: nulls.draw(own_logits, real, nulls.token_permutation, k, 99))(jax.random.key(0))
    assert own_logits(real)[0, 0] == pytest.approx(12)
    assert nulls.p_value(own_logits(real), null)[0, 0] == pytest.approx(0.01)
    assert null.mean[0, 0] == pytest.approx(1, abs=0.5)  # fixed points of a permutation: one on average


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


# --- a diagonal against its table ---

diagonal_z, upper_p = jax.jit(nulls.diagonal_z), jax.jit(nulls.upper_p)


def slow_diagonal_z(table):
    """(trace - mean) / standard deviation over all n! permutations of the columns."""
    n = len(table)
    sums = [sum(table[u, order[u]] for u in range(n)) for order in itertools.permutations(range(n))]
    return (np.trace(table) - np.mean(sums)) / np.std(sums)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n=st.integers(2, 5))
def test_the_diagonal_stands_out_as_over_all_permutations(seed, n):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(n, n)) + rng.normal(size=(n, 1)) * 3 + rng.normal(size=n) + rng.uniform(0, 3) * np.eye(n)
    z = diagonal_z(np.float32(table))
    assert z == pytest.approx(slow_diagonal_z(table), abs=1e-3)
    assert abs(z) <= (n - 1) * (1 + 1e-5)
    for same in (table * 1e-30, table * 1e30, table.T, table + rng.normal(size=n)):
        np.testing.assert_allclose(diagonal_z(np.float32(same)), z, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(diagonal_z(np.float32(-table)), -z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_the_largest_and_smallest_z_are_those_of_the_identity(n):
    for scale, offset in ((1, 0), (0.1, 5)):
        identity = np.float32(scale * np.eye(n) + offset)
        np.testing.assert_allclose(diagonal_z(identity), n - 1, rtol=1e-4)
        np.testing.assert_allclose(diagonal_z(-identity), 1 - n, rtol=1e-4)


def test_tables_with_nothing_in_them():
    zero = np.zeros((2, 4, 4), np.float32)
    np.testing.assert_array_equal(diagonal_z(zero), [0, 0])
    rows_and_columns = np.float32(0.1 * np.arange(30)[:, None] + np.random.default_rng(0).normal(size=30))
    np.testing.assert_array_equal(diagonal_z(np.stack([rows_and_columns, rows_and_columns * 1e-20])), [0, 0])
    np.testing.assert_array_equal(diagonal_z(np.ones((1, 1), np.float32)), 0)
    broken = zero.copy()
    broken[0, 1, 2], broken[1, 0, 0] = np.nan, np.inf
    assert np.isnan(diagonal_z(broken)).all()


def test_p_of_the_diagonals_of_random_tables_is_uniform():
    tables = np.random.default_rng(0).normal(size=(4000, 20, 20)).astype(np.float32)
    p = np.asarray(upper_p(diagonal_z(tables)))
    for share in (0.01, 0.05, 0.5, 0.9):
        assert np.mean(p <= share) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 4000))


def test_upper_p_is_the_normal_tail():
    z = np.float32([-8, -1, 0, 1, 2.5, 5, 10])
    np.testing.assert_allclose(upper_p(z), stats.norm.sf(z), rtol=1e-5)
    np.testing.assert_array_equal(upper_p(np.float32([np.nan, np.inf, -np.inf, 14])), [np.nan, 0, 1, 0])


@pytest.mark.parametrize(("function", "shape"), [(nulls.diagonal_z, (2, 5, 5)), (nulls.upper_p, (2,))])
def test_diagonals_lower_for_every_platform(function, shape):
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))
    assert exported(np.zeros(shape, np.float32)).platforms == ("cpu", "cuda", "tpu")


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
