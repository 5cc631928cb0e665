"""Spectral scores of known matrices, and that nothing which is reported depends on the gauge of a head."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from circuits_jax.circuits import spectra
from circuits_jax.circuits.attention import ov, position_qk, qk
from circuits_jax.circuits.composition import composition_scores, k_path, k_path_gaps
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.token_space import token_ov, token_qk
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


# --- summaries of singular values ---

SUMMARIES = (
    "effective_rank", "stable_rank", "participation_ratio", "leading_ratio", "flatness", "energy_curve", "spectral_gaps"
)  # fmt: skip
R = 6
summarize = jax.jit(spectra.summarize)


@jax.jit
def of_singular_values(values):
    return {name: getattr(spectra, name)(values) for name in SUMMARIES}


def slowly(values):
    """The same of one spectrum [R] that is not zero, in float64 and term by term."""
    values = [float(value) for value in values]
    total, energy = sum(values), sum(value**2 for value in values)
    entropy = -sum(value / total * math.log(value / total) for value in values if value > 0)
    return {
        "effective_rank": math.exp(entropy),
        "stable_rank": energy / values[0] ** 2,
        "participation_ratio": energy**2 / sum(value**4 for value in values),
        "leading_ratio": values[0] / values[1] if values[1] > 0 else math.inf,
        "flatness": entropy / math.log(len(values)),
        "energy_curve": [sum(value**2 for value in values[: k + 1]) / energy for k in range(len(values))],
        "spectral_gaps": [(big - small) / values[0] for big, small in itertools.pairwise(values)],
    }


def falling(seed):
    """A spectrum [R] over up to six orders of magnitude, with ties and zeros now and then."""
    rng = np.random.default_rng(seed)
    values = 10 ** rng.uniform(-rng.uniform(0, 6), 0, R)
    values[1] = values[0] if rng.random() < 0.3 else values[1]
    values[R - rng.integers(0, R) :] *= rng.random() < 0.5
    return np.sort(values)[::-1]


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_summaries_of_singular_values_are_right_at_every_scale(seed):
    values, scales = falling(seed), (1e-25, 1.0, 1e25)
    actual, expected = of_singular_values(np.float32([values * scale for scale in scales])), slowly(values)
    for name, i in itertools.product(SUMMARIES, range(len(scales))):
        np.testing.assert_allclose(actual[name][i], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_ranks_come_in_order_and_shares_stay_in_range(seed):
    values = falling(seed)
    actual = of_singular_values(np.float32([values] * 3))
    ranks = [actual[name][0] for name in ("stable_rank", "participation_ratio", "effective_rank")]
    assert (np.diff([1, *ranks, (values > 0).sum()]) >= -1e-5 * R).all()
    assert -1e-6 <= actual["flatness"][0] <= 1 + 1e-6
    assert actual["leading_ratio"][0] >= 1
    assert (np.diff(actual["energy_curve"][0]) >= -1e-6).all()
    assert actual["energy_curve"][0, -1] == pytest.approx(1)
    assert (actual["spectral_gaps"][0] >= 0).all()
    np.testing.assert_allclose(actual["spectral_gaps"][0].sum(), 1 - values[-1] / values[0], atol=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 3, 3, 3], [4, 4, 4, 1, 1, [0.25, 0.5, 0.75, 1], [0, 0, 0]]),
        ([5, 0, 0, 0], [1, 1, 1, np.inf, 0, [1, 1, 1, 1], [1, 0, 0]]),
        ([2, 2, 0, 0], [2, 2, 2, 1, 0.5, [0.5, 1, 1, 1], [0, 1, 0]]),
        ([0, 0, 0, 0], [0, 0, 0, 1, 0, [0, 0, 0, 0], [0, 0, 0]]),
        ([np.nan, np.nan, np.nan, np.nan], [np.nan] * 7),
        ([7], [1, 1, 1, np.inf, np.nan, [1], []]),
        ([0], [0, 0, 0, 1, np.nan, [0], []]),
    ],
    ids=["flat", "rank-one", "tie", "zero", "nan", "one-value", "one-zero"],
)
def test_summaries_of_known_spectra(values, expected):
    actual = of_singular_values(np.float32(values))
    for name, value in zip(SUMMARIES, expected, strict=True):
        np.testing.assert_allclose(actual[name], value, atol=1e-6, err_msg=name)


def test_a_gap_says_how_far_a_change_can_turn_the_singular_vectors():
    """Singular values 1, 0.999, 0.5: single vectors of the near tie turn far, their plane hardly."""
    rng = np.random.default_rng(0)
    matrix, change = np.diag([1, 0.999, 0.5, 0.0]), rng.normal(size=(4, 4))
    change *= 1e-3 / np.linalg.norm(change, 2)
    gaps = spectra.spectral_gaps(np.float32([1, 0.999, 0.5, 0.0]))
    np.testing.assert_allclose(gaps, [0.001, 0.499, 0.5], atol=1e-6)
    u = np.linalg.svd(matrix + change)[0]
    sines = np.array([np.linalg.norm(u[r:, :r], 2) for r in (1, 2, 3)])
    assert sines[0] > 0.1
    assert (sines[1:] <= 1e-3 / (np.asarray(gaps[1:]) - 1e-3)).all()


def test_effective_rank_of_a_random_head_of_gpt2_is_626():
    """62.6 is that of the product of two Gaussian factors; one factor alone has 63.3."""
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(2, 768, 64)).astype(np.float32) for _ in range(2))
    product = jax.jit(lambda circuit: spectra.effective_rank(circuit.singular_values()))(LowRank(left, right.mT))
    np.testing.assert_allclose(product, 62.6, atol=0.1)
    np.testing.assert_allclose(spectra.effective_rank(np.linalg.svd(left)[1]), 63.3, atol=0.1)


# --- symmetry, directionality and the whole summary ---


def dense_symmetry(matrix):
    halves = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
    return (np.linalg.norm(halves[0]) ** 2 - np.linalg.norm(halves[1]) ** 2) / np.linalg.norm(matrix) ** 2


def dense_directionality(matrix):
    """The score, and how far the norm nearest to a threshold is from it."""
    sums, margins = [], []
    for norms in (np.linalg.norm(matrix, axis=1), np.linalg.norm(matrix, axis=0)):
        threshold = norms.mean() + 2 * norms.std()
        sums.append(sum(norm for norm in norms if norm > threshold))
        margins.append(np.abs(norms / threshold - 1).min())
    rows, columns = sums
    return (columns - rows) / ((columns + rows) or 1.0), min(margins)


def heavy_tailed(seed):
    """Circuits [2,D,D] with a few rows and columns that stand out."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, D, K)), rng.normal(size=(2, K, D))
    left, right = left * rng.standard_t(2, (2, D, 1)), right * rng.standard_t(2, (2, 1, D))
    return LowRank(left.astype(np.float32), right.astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_summary_is_that_of_the_dense_matrix(seed):
    circuit = heavy_tailed(seed)
    summary = summarize(circuit)
    for i in range(2):
        matrix = circuit.left[i].astype(np.float64) @ circuit.right[i]
        values, eigenvalues = np.linalg.svd(matrix)[1][:K], np.linalg.eigvals(matrix)
        assume(values[-1] > 1e-3 * values[0])
        for name, expected in slowly(values).items():
            if name != "spectral_gaps":
                np.testing.assert_allclose(getattr(summary, name)[i], expected, rtol=1e-3, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(summary.symmetry[i], dense_symmetry(matrix), atol=1e-5)
        positivity = eigenvalues.real.sum() / np.abs(eigenvalues).sum()
        np.testing.assert_allclose(summary.positivity[i], positivity, atol=1e-3)
        expected, margin = dense_directionality(matrix)
        if margin > 1e-4:
            np.testing.assert_allclose(summary.directionality[i], expected, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.floats(1e-12, 1e12))
def test_summary_ignores_size_and_gauge_and_the_transpose_turns_only_the_direction(seed, size):
    circuit = heavy_tailed(seed)
    matrices = circuit.left.astype(np.float64) @ circuit.right
    assume((np.linalg.svd(matrices)[1][:, K - 1] > 1e-3 * np.linalg.norm(matrices, 2, axis=(1, 2))).all())
    assume(min(dense_directionality(matrix)[1] for matrix in matrices) > 1e-4)
    gauge = np.linalg.qr(np.random.default_rng(seed).normal(size=(K, K)))[0] * np.linspace(0.5, 2, K)
    others = {
        "size": LowRank(np.float32(size) * circuit.left, circuit.right),
        "gauge": LowRank(np.float32(circuit.left @ gauge), np.float32(np.linalg.inv(gauge) @ circuit.right)),
        "transpose": circuit.T,
    }
    summary = summarize(circuit)
    for (change, other), field in itertools.product(others.items(), dataclasses.fields(summary)):
        after, before = getattr(summarize(other), field.name), getattr(summary, field.name)
        turned = -1 if (change, field.name) == ("transpose", "directionality") else 1
        np.testing.assert_allclose(turned * after, before, rtol=1e-3, atol=1e-3, err_msg=f"{change}: {field.name}")
        if field.name in ("symmetry", "directionality", "positivity", "flatness"):
            assert (np.abs(after) <= 1 + 1e-6).all()


def test_summary_is_the_same_alone_batched_and_vmapped():
    circuit = heavy_tailed(0)
    whole = summarize(circuit)
    symmetry, directionality = jax.jit(lambda c: (spectra.symmetry(c), spectra.directionality(c)))(circuit)
    others = {
        "vmapped": jax.jit(jax.vmap(spectra.summarize))(circuit),
        "alone": jax.tree.map(lambda *heads: np.stack(heads), *(summarize(circuit[i]) for i in range(2))),
        "by name": dataclasses.replace(whole, symmetry=symmetry, directionality=directionality),
    }
    for name, other in others.items():
        for actual, expected in zip(jax.tree.leaves(other), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert whole.energy_curve.shape == (2, K)
    assert {leaf.shape for leaf in jax.tree.leaves(dataclasses.replace(whole, energy_curve=None))} == {(2,)}


def square(matrix):
    """A dense matrix [D,D] as a circuit of rank D."""
    return LowRank(np.float32(matrix), np.eye(D, dtype=np.float32))


SHIFT = np.eye(D, k=-1)  # row t reads column t - 1: an exact previous-token W_QK
NEIGHBOURS = SHIFT + SHIFT.T
LOUD_COLUMN = 0.1 * np.ones((D, D)) + 5 * np.eye(D)[3]


@pytest.mark.parametrize(
    ("matrix", "symmetry", "directionality"),
    [
        (np.eye(D), 1, 0),
        (SHIFT, 0, 0),
        (NEIGHBOURS, 1, 0),
        (SHIFT - SHIFT.T, -1, 0),
        (np.zeros((D, D)), 0, 0),
        (np.full((D, D), np.nan), np.nan, np.nan),
        (LOUD_COLUMN, dense_symmetry(LOUD_COLUMN), 1),
        (LOUD_COLUMN.T, dense_symmetry(LOUD_COLUMN), -1),
        (LOUD_COLUMN + LOUD_COLUMN.T, 1, 0),
    ],
    ids=["identity", "shift", "neighbours", "antisymmetric", "zero", "nan", "column", "row", "cross"],
)
def test_symmetry_and_direction_of_known_matrices(matrix, symmetry, directionality):
    summary = summarize(square(matrix))
    np.testing.assert_allclose(summary.symmetry, symmetry, atol=1e-5)
    np.testing.assert_allclose(summary.directionality, directionality, atol=1e-5)


def test_a_symmetric_circuit_can_be_a_previous_token_head():
    """Symmetry does not tell position from content: s = 1 for |i - j| = 1, and the causal mask does the rest."""
    scores = np.where(np.tri(D, dtype=bool), 20 * NEIGHBOURS, -np.inf)
    pattern = jax.nn.softmax(np.float32(scores), axis=-1)
    np.testing.assert_allclose(np.diagonal(pattern, -1), np.ones(D - 1), atol=1e-6)
    np.testing.assert_allclose(summarize(square(NEIGHBOURS)).symmetry, 1, atol=1e-6)


def test_a_shift_has_no_eigenvalues_to_see_it_by():
    """A positional circuit needs singular values: those of a shift are 1 and its eigenvalues all 0."""
    shift = LowRank(np.eye(D, dtype=np.float32)[:, 1:], np.eye(D, dtype=np.float32)[:-1])
    np.testing.assert_array_equal(shift.left @ shift.right, SHIFT)
    summary, eigenvalues, values = jax.jit(lambda c: (spectra.summarize(c), c.eigenvalues(), c.singular_values()))(
        shift
    )
    np.testing.assert_allclose(eigenvalues, np.zeros(D - 1), atol=1e-6)
    np.testing.assert_allclose(values, np.ones(D - 1), atol=1e-6)
    np.testing.assert_allclose(summary.positivity, 0, atol=1e-5)
    np.testing.assert_allclose([summary.effective_rank, summary.flatness], [D - 1, 1], rtol=1e-5)


def test_a_projection_is_flat_and_a_zero_head_has_rank_zero():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(D, K)))[0].astype(np.float32)
    summary = summarize(LowRank(np.stack([3 * basis, 0 * basis]), np.stack([basis.T] * 2)))
    expected = spectra.SpectralSummary(
        effective_rank=[K, 0], stable_rank=[K, 0], participation_ratio=[K, 0], leading_ratio=[1, 1], flatness=[1, 0],
        positivity=[1, 0], symmetry=[1, 0], directionality=[0, 0],
        energy_curve=[np.arange(1, K + 1) / K, np.zeros(K)],
    )  # fmt: skip
    for field in dataclasses.fields(expected):
        name = field.name
        np.testing.assert_allclose(getattr(summary, name), getattr(expected, name), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("function", [spectra.symmetry, spectra.directionality, spectra.summarize])
def test_a_rectangular_matrix_has_no_summary(function):
    with pytest.raises(ValueError, match=r"square.*\[4, 5\]"):
        function(LowRank(np.ones((4, 2), np.float32), np.ones((2, 5), np.float32)))


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
    path, queries = k_path(weights, (0, 0), (L - 1, H - 1)).low_rank(), jnp.ones(T, bool)
    numbers = {f"singular values of {name}": circuit.singular_values() for name, circuit in circuits.items()}
    numbers |= {f"norm of {name}": circuit.frobenius_norm() for name, circuit in circuits.items()}
    numbers |= {
        "position_qk": position_qk(weights).singular_values(),
        "copying_score": spectra.copying_score(weights),
        "matching_score": spectra.matching_score(weights),
        "composition": composition_scores(weights),
        "diagonal_gap": k_path_gaps(weights),
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
            # Predicted falls of attention are differences of numbers of order 1, and no better than their rounding.
            atol = max(1e-5 * np.abs(before).max(), 5e-7 if name == "induction" else 0.0)
            np.testing.assert_allclose(after, before, rtol=0, atol=atol, err_msg=name)
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
