"""Spectral scores of known matrices, and that nothing which is reported depends on the gauge of a head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits import spectra
from circuits_jax.circuits.attention import ov, position_qk, qk, token_ov, token_qk
from circuits_jax.circuits.composition import composition_scores, k_path
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import signatures

V, T, L, H, D, K = 9, 6, 2, 2, 16, 4
SEEDS = st.integers(0, 2**32 - 1)
positivity = jax.jit(lambda circuit: spectra.eigenvalue_positivity(circuit.eigenvalues()))


def random_weights(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 2  # noqa: E731
    return CircuitWeights(
        W_E=draw(V, D), W_U=draw(D, V), W_P=draw(T, D), b_Q=draw(L, H, K), b_K=draw(L, H, K), b_V=draw(L, H, K),
        W_Q=draw(L, H, D, K), W_K=draw(L, H, D, K), W_V=draw(L, H, D, K), W_O=draw(L, H, K, D),
    )  # fmt: skip


# --- eigenvalue positivity ---


def test_positivity_of_known_spectra():
    values = np.array(
        [[1, 2, 3, 0.5], [-1, -2, 0, 0], [0, 0, 0, 0], [1, 1j, -1, -1j], [2 + 1j, 2 - 1j, 0, 0], [3, -1, 0, 0]],
        np.complex64,
    )
    expected = [1, -1, 0, 0, 2 / 5**0.5, 0.5]
    np.testing.assert_allclose(spectra.eigenvalue_positivity(values), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (np.eye(5), 1.0),
        (-2.5 * np.eye(5), -1.0),
        (np.zeros((5, 5)), 0.0),
        (np.roll(np.eye(5), 1, axis=1), 0.0),
        (np.eye(5, k=1), 0.0),
        (np.diag([4.0, -1.0, 0.0, 0.0, 0.0]), 0.6),
    ],
    ids=["identity", "negative", "zero", "cyclic-shift", "shift", "mixed"],
)
def test_positivity_of_known_matrices(matrix, expected):
    circuit = LowRank(np.eye(5, dtype=np.float32), matrix.astype(np.float32))
    np.testing.assert_allclose(positivity(circuit), expected, atol=1e-5)


def test_positivity_of_nan_is_nan():
    """A model that diverged must not look like one that neither copies nor suppresses."""
    values = np.array([[np.nan, 1.0], [1.0, 1.0]], np.complex64)
    np.testing.assert_array_equal(spectra.eigenvalue_positivity(values), [np.nan, 1.0])


# --- copying and matching ---


def planted(seed, signs):
    """Heads [1,H] with W_OV = W_QK = sign x the projection on a random K-dimensional subspace, W_U = W_E^T."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(1, H, D, K)))[0].astype(np.float32)
    signed = basis * np.array(signs, np.float32)[:, None, None]
    w_e = rng.normal(size=(V, D)).astype(np.float32)
    return CircuitWeights(W_E=w_e, W_U=w_e.T, W_P=w_e[:T], W_Q=signed, W_K=basis, W_V=signed, W_O=basis.mT)


copying, matching = jax.jit(spectra.copying_score), jax.jit(spectra.matching_score)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, size=st.floats(0.01, 100))
def test_planted_projection_copies_and_its_negative_suppresses(seed, size):
    weights = planted(seed, [size, -size])
    np.testing.assert_allclose(copying(weights), [[1.0, -1.0]], atol=1e-5)
    np.testing.assert_allclose(matching(weights), [[1.0, -1.0]], atol=1e-5)


def test_planted_successor_does_not_copy():
    """Orthonormal tokens and W_OV that sends each of K tokens to the next, in a circle."""
    w_e = np.eye(K, D, dtype=np.float32)
    step = np.roll(np.eye(K, dtype=np.float32), 1, axis=1)
    one = lambda matrix: np.stack([matrix] * H)[None]  # noqa: E731
    weights = CircuitWeights(
        W_E=w_e, W_U=w_e.T, W_P=w_e, W_Q=one(w_e.T), W_K=one(w_e.T @ step), W_V=one(w_e.T), W_O=one(step @ w_e)
    )
    np.testing.assert_allclose(jax.jit(token_ov)(weights)[0, 0].rows(np.arange(K)), step, atol=1e-6)
    np.testing.assert_allclose(copying(weights), np.zeros((1, H)), atol=1e-6)
    np.testing.assert_allclose(matching(weights), np.zeros((1, H)), atol=1e-6)


def test_scores_are_those_of_the_dense_matrices():
    weights = random_weights(0)
    for score, left, right in ((copying, ("W_V", "W_O"), "W_U"), (matching, ("W_Q", "W_K"), "W_E")):
        actual = score(weights)
        for head in np.ndindex(L, H):
            first, second = (np.asarray(getattr(weights, name)[head], np.float64) for name in left)
            second = second.T if right == "W_E" else second
            last = weights.W_U if right == "W_U" else weights.W_E.T
            values = np.linalg.eigvals(weights.W_E @ first @ second @ last)
            np.testing.assert_allclose(actual[head], values.real.sum() / np.abs(values).sum(), atol=1e-5)


def test_zero_head_scores_zero():
    weights = random_weights(1)
    weights.W_V[1, 0] = 0.0
    weights.W_K[0, 1] = 0.0
    assert copying(weights)[1, 0] == 0.0
    assert matching(weights)[0, 1] == 0.0
    assert np.isfinite(copying(weights)).all()
    assert np.isfinite(matching(weights)).all()


# --- diagonal against the rest ---


@jax.jit
def entry_statistics(circuit):
    return spectra.diagonal_gap(circuit), *spectra.entry_variance(circuit)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_gap_and_variance_are_those_of_the_dense_entries(seed):
    rng = np.random.default_rng(seed)
    circuit = LowRank(*(rng.normal(size=(2, *shape)).astype(np.float32) for shape in ((V, K), (K, V))))
    gap, variance_on, variance_off = entry_statistics(circuit)
    for i in range(2):
        matrix = circuit.left[i].astype(np.float64) @ circuit.right[i]
        on, off = np.diagonal(matrix), matrix[~np.eye(V, dtype=bool)]
        scale = np.abs(matrix).max()
        np.testing.assert_allclose(gap[i], on.mean() - off.mean(), atol=1e-5 * scale)
        np.testing.assert_allclose(variance_on[i], on.var(), atol=1e-5 * scale**2)
        np.testing.assert_allclose(variance_off[i], off.var(), atol=1e-5 * scale**2)


def test_gap_and_variance_of_known_matrices():
    eye, ones = np.eye(V, dtype=np.float32), np.ones((V, 1), np.float32)
    np.testing.assert_allclose(entry_statistics(LowRank(3 * eye, eye)), [3, 0, 0], atol=1e-5)
    np.testing.assert_allclose(entry_statistics(LowRank(ones, 5 * ones.T)), [0, 0, 0], atol=1e-5)
    ramp = np.arange(V, dtype=np.float32)
    diagonal = entry_statistics(LowRank(np.diag(ramp), eye))
    np.testing.assert_allclose(diagonal, [ramp.mean(), ramp.var(), 0], atol=1e-5)


@pytest.mark.parametrize("statistic", [spectra.diagonal_gap, spectra.entry_variance])
def test_a_rectangular_matrix_has_no_diagonal_to_compare(statistic):
    with pytest.raises(ValueError, match="square"):
        statistic(LowRank(np.ones((4, 2), np.float32), np.ones((2, 5), np.float32)))


# --- gauge ---


def regauge(weights, seed):
    """W_Q G, W_K G^-T, W_V F, F^-1 W_O with random G and F of condition at most 4; biases turn with their weights."""
    rng = np.random.default_rng(seed)

    def draw():
        left, right = (np.linalg.qr(rng.normal(size=(L, H, K, K)))[0] for _ in range(2))
        return left * rng.uniform(0.5, 2, (L, H, 1, K)) @ right

    def turn(array, by):
        array = array[..., None, :] if array.ndim == 3 else array
        return np.asarray(array @ by, np.float32)

    g, f = draw(), draw()
    g_inverse_transpose = np.linalg.inv(g).mT
    return dataclasses.replace(
        weights,
        W_Q=turn(weights.W_Q, g), b_Q=turn(weights.b_Q, g)[..., 0, :],
        W_K=turn(weights.W_K, g_inverse_transpose), b_K=turn(weights.b_K, g_inverse_transpose)[..., 0, :],
        W_V=turn(weights.W_V, f), b_V=turn(weights.b_V, f)[..., 0, :],
        W_O=(np.linalg.inv(f) @ weights.W_O).astype(np.float32),
    )  # fmt: skip


@jax.jit
def everything_reported(weights):
    circuits = {"qk": qk(weights), "ov": ov(weights), "token_qk": token_qk(weights), "token_ov": token_ov(weights)}
    path, queries = k_path(weights), jnp.ones(T, bool)
    numbers = {f"singular values of {name}": circuit.singular_values() for name, circuit in circuits.items()}
    numbers |= {f"norm of {name}": circuit.frobenius_norm() for name, circuit in circuits.items()}
    numbers |= {
        "position_qk": position_qk(weights).singular_values(),
        "copying_score": spectra.copying_score(weights),
        "matching_score": spectra.matching_score(weights),
        "composition": composition_scores(weights),
        "diagonal_gap": spectra.diagonal_gap(path),
        "entry_variance": spectra.entry_variance(path),
        "position_pattern": signatures.position_pattern(weights, T),
        "previous_token": signatures.previous_token(weights, queries),
        "k_composition": signatures.k_composition(weights),
        "induction": signatures.induction(weights, queries, 5.0),
    }
    return numbers, {name: circuit.eigenvalues() for name, circuit in circuits.items()}


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_nothing_reported_depends_on_the_gauge(seed):
    weights = random_weights(seed)
    numbers, eigenvalues = everything_reported(weights)
    turned_numbers, turned_eigenvalues = everything_reported(regauge(weights, seed + 1))
    for name, number in numbers.items():
        for before, after in zip(jax.tree.leaves(number), jax.tree.leaves(turned_numbers[name]), strict=True):
            assert np.isfinite(before).all(), name
            np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max(), err_msg=name)
    for name, values in eigenvalues.items():
        for head in np.ndindex(L, H):
            distance = multiset_distance(values[head], turned_eigenvalues[name][head])
            assert distance <= 1e-5 * numbers[f"norm of {name}"][head], name


def multiset_distance(values, others):
    """Largest distance when the nearest are paired off, one by one."""
    left, worst = list(np.asarray(others)), 0.0
    for value in sorted(np.asarray(values), key=abs, reverse=True):
        nearest = min(left, key=lambda other: abs(other - value))
        worst = max(worst, abs(nearest - value))
        left.remove(nearest)
    return worst


def test_a_change_that_is_no_gauge_shows():
    """The gauge test can fail: G on both W_Q and W_K changes what is reported."""
    weights = random_weights(3)
    wrong = dataclasses.replace(weights, W_K=regauge(weights, 4).W_Q)
    numbers, changed = everything_reported(weights)[0], everything_reported(wrong)[0]
    for name in ("singular values of qk", "matching_score", "position_pattern", "k_composition"):
        assert np.abs(changed[name] - numbers[name]).max() > 1e-2 * np.abs(numbers[name]).max(), name
