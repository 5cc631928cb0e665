"""LowRank against the dense product in float64: spectra, norms, entries, products, and what happens at the edges."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits.low_rank import LowRank

SEEDS = st.integers(0, 2**32 - 1)
RECTANGULAR = {"M>R": (9, 4, 7), "M<R": (3, 6, 8), "N<R": (8, 6, 3), "M,N<R": (4, 6, 3), "R=1": (5, 1, 6)}
SQUARE = {"M>R": (10, 4, 10), "M=R": (4, 4, 4), "M<R": (3, 6, 3)}
property_test = settings(max_examples=15, deadline=None)


@jax.jit
def spectrum(circuit):
    return circuit.svd(), circuit.singular_values(), circuit.frobenius_norm()


@jax.jit
def square_analysis(circuit):
    return circuit.eigenvalues(), circuit.trace()


@jax.jit
def entries(circuit):
    return circuit.rows(np.array([2, 0, 2])), circuit.diagonal(), circuit.sum(), circuit.T


def gaussian(seed, m, r, n, batch=()):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=(*batch, *shape)).astype(np.float32)  # noqa: E731
    return LowRank(draw(m, r), draw(r, n))


def orthonormal(rng, m, r):
    """[M,r] orthonormal columns, r at most M."""
    return np.linalg.qr(rng.normal(size=(m, r)))[0]


def dense(circuit):
    return np.asarray(circuit.left, np.float64) @ np.asarray(circuit.right, np.float64)


def float32(left, right):
    return LowRank(left.astype(np.float32), right.astype(np.float32))


def assert_spectrum_is_right(circuit):
    """Singular values to 1e-5 of the largest, orthonormal vectors, and a product that gives the matrix back."""
    matrix = dense(circuit)
    (u, s, vh), values, norm = spectrum(circuit)
    expected = np.linalg.svd(matrix, compute_uv=False)
    rank = min(*matrix.shape, circuit.left.shape[-1])
    assert u.shape == (matrix.shape[0], rank)
    assert s.shape == values.shape == (rank,)
    assert vh.shape == (rank, matrix.shape[1])
    tolerance = 1e-5 * expected[0]
    np.testing.assert_allclose(s, expected[:rank], atol=tolerance, rtol=0)
    np.testing.assert_allclose(values, expected[:rank], atol=tolerance, rtol=0)
    np.testing.assert_allclose(norm, np.sqrt((expected**2).sum()), atol=tolerance, rtol=0)
    assert (np.diff(s) <= 0).all()
    u, s, vh = (np.asarray(part, np.float64) for part in (u, s, vh))
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(vh @ vh.T, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(u @ np.diag(s) @ vh, matrix, atol=tolerance)


@pytest.mark.parametrize("shape", RECTANGULAR.values(), ids=RECTANGULAR)
@property_test
@given(seed=SEEDS)
def test_spectrum_of_gaussian_factors(shape, seed):
    assert_spectrum_is_right(gaussian(seed, *shape))


@property_test
@given(seed=SEEDS)
def test_spectrum_of_ill_conditioned_factors(seed):
    """Both factors have condition 1e4 and meet in the same basis, so the product has 1e8: a Gram matrix would fail."""
    rng = np.random.default_rng(seed)
    shared, scales = orthonormal(rng, 4, 4), np.logspace(0, -4, 4)
    left = orthonormal(rng, 9, 4) * scales @ shared.T
    right = shared * scales @ orthonormal(rng, 7, 4).T
    assert_spectrum_is_right(float32(left, right))


@property_test
@given(seed=SEEDS)
def test_small_singular_values_of_one_ill_conditioned_factor(seed):
    """right is orthonormal, so the singular values are those of left, down to the smallest: 1e-4 of the largest.

    Float32 QR keeps it to 1e-6 / 1e-4 = 1 %; a Gram matrix, at 1e-8 of its largest entry, would lose it whole.
    """
    rng = np.random.default_rng(seed)
    left = orthonormal(rng, 9, 4) * np.logspace(0, -4, 4) @ orthonormal(rng, 4, 4)
    circuit = float32(left, orthonormal(rng, 7, 4).T)
    expected = np.linalg.svd(dense(circuit), compute_uv=False)[:4]
    np.testing.assert_allclose(spectrum(circuit)[1], expected, rtol=1e-2)


@property_test
@given(seed=SEEDS)
def test_norm_survives_factors_that_nearly_cancel(seed):
    """What left keeps right kills: the norm is 1e-4 of the factors'. 1e-2, as float32 leaves 1e-6 / 1e-4 of it."""
    rng = np.random.default_rng(seed)
    shared, scales = orthonormal(rng, 4, 4), np.logspace(0, -4, 4)
    left = orthonormal(rng, 9, 4) * scales @ shared.T
    right = shared * scales[::-1] @ orthonormal(rng, 7, 4).T
    circuit = float32(left, right)
    np.testing.assert_allclose(spectrum(circuit)[2], np.linalg.norm(dense(circuit)), rtol=1e-2)


@property_test
@given(seed=SEEDS)
def test_rank_deficient_spectrum(seed):
    """Two equal columns in left and a zero row in right: rank 2 of at most 4."""
    circuit = gaussian(seed, 9, 4, 7)
    circuit.left[:, 1] = circuit.left[:, 0]
    circuit.right[3] = 0.0
    assert_spectrum_is_right(circuit)
    values = spectrum(circuit)[1]
    assert (values[2:] <= 1e-6 * values[0]).all()


def test_tied_spectrum():
    rng = np.random.default_rng(0)
    circuit = float32(3.0 * orthonormal(rng, 9, 4), orthonormal(rng, 7, 4).T)
    assert_spectrum_is_right(circuit)
    np.testing.assert_allclose(spectrum(circuit)[1], [3.0] * 4, rtol=1e-6)


@pytest.mark.parametrize("zeroed", ["left", "right", "both"])
def test_zero_matrix(zeroed):
    circuit = gaussian(0, 10, 4, 10)
    for name in ("left", "right"):
        if zeroed in (name, "both"):
            getattr(circuit, name)[:] = 0.0
    (u, s, vh), values, norm = spectrum(circuit)
    assert not s.any()
    assert not values.any()
    assert norm == 0.0
    np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(vh @ vh.T, np.eye(4), atol=1e-5)
    eigenvalues, trace = square_analysis(circuit)
    assert not eigenvalues.any()
    assert trace == 0.0


@pytest.mark.parametrize("shape", RECTANGULAR.values(), ids=RECTANGULAR)
@property_test
@given(seed=SEEDS)
def test_signs_are_fixed_whatever_the_factors(shape, seed):
    """The largest entry of each left vector is positive, and factors of flipped sign give the same vectors."""
    circuit = gaussian(seed, *shape)
    u, s, _ = map(np.asarray, spectrum(circuit)[0])
    columns = np.arange(len(s))
    assert (u[np.abs(u).argmax(0), columns] > 0).all()
    turned = np.asarray(spectrum(LowRank(-circuit.left, -circuit.right))[0].U)
    # A vector is only as certain as its singular value is apart from the others; its sign only as the largest entry.
    gap = np.abs(s[:, None] - s).astype(np.float64) + np.diag(np.full(len(s), np.inf))
    ranked = np.sort(np.abs(u), axis=0)
    clear = (gap.min(0) > 1e-2 * s[0]) & (s > 1e-2 * s[0]) & (ranked[-1] - ranked[-2] > 1e-2)
    np.testing.assert_allclose(turned[:, clear], u[:, clear], atol=1e-3)


@pytest.mark.parametrize("shape", SQUARE.values(), ids=SQUARE)
@property_test
@given(seed=SEEDS)
def test_eigenvalues_and_trace_are_those_of_the_dense_matrix(shape, seed):
    """Same multiset: every eigenvalue of the dense matrix that is not among ours is zero.

    The tolerance is the theorem of Bauer and Fike: condition of the eigenvectors times the rounding of the matrix.
    """
    circuit = gaussian(seed, *shape)
    matrix = dense(circuit)
    values, trace = square_analysis(circuit)
    expected, _ = np.linalg.eig(matrix)
    assert values.shape == (min(shape[0], shape[1]),)
    assert (np.diff(np.abs(values)) <= 1e-6 * np.abs(values[0])).all()
    padded = np.append(np.asarray(values, np.complex128), np.zeros(shape[0] - len(values)))
    small = matrix if shape[0] < shape[1] else circuit.right.astype(np.float64) @ circuit.left
    condition = np.linalg.cond(np.linalg.eig(small)[1])
    size = np.linalg.norm(circuit.left) * np.linalg.norm(circuit.right)
    tolerance = 4 * np.finfo(np.float32).eps * condition * size
    assert multiset_distance(padded, expected) <= tolerance
    np.testing.assert_allclose(trace, np.trace(matrix), atol=1e-6 * size)


def multiset_distance(values, expected):
    """Largest distance when the nearest are paired off, one by one."""
    left, worst = list(expected), 0.0
    for value in sorted(values, key=abs, reverse=True):
        nearest = min(left, key=lambda other: abs(other - value))
        worst = max(worst, abs(nearest - value))
        left.remove(nearest)
    return worst


def test_eigenvalues_of_a_planted_spectrum():
    """left = basis, right = spectrum x dual basis: the eigenvalues are known, with a complex pair among them."""
    rng = np.random.default_rng(1)
    basis = orthonormal(rng, 10, 4)
    block = np.zeros((4, 4))
    block[:2, :2] = [[1.0, -2.0], [2.0, 1.0]]
    block[2, 2], block[3, 3] = -3.0, 0.5
    values = square_analysis(float32(basis, block @ basis.T))[0]
    assert multiset_distance(values, [1 + 2j, 1 - 2j, -3, 0.5]) <= 1e-5
    np.testing.assert_allclose(np.abs(values), [3, 5**0.5, 5**0.5, 0.5], atol=1e-5)


@pytest.mark.parametrize("name", ["eigenvalues", "trace"])
def test_rectangular_matrices_have_no_eigenvalues_and_no_trace(name):
    with pytest.raises(ValueError, match=r"square circuit.*\[2, 9, 7\]"):
        getattr(gaussian(0, 9, 4, 7, batch=(2,)), name)()


@pytest.mark.parametrize("shape", RECTANGULAR.values(), ids=RECTANGULAR)
def test_entries_sum_and_transpose(shape):
    circuit = gaussian(2, *shape)
    matrix = dense(circuit)
    rows, diagonal, total, transpose = entries(circuit)
    assert circuit.shape == matrix.shape
    np.testing.assert_allclose(rows, matrix[[2, 0, 2]], atol=1e-5)
    np.testing.assert_allclose(diagonal, np.diagonal(matrix), atol=1e-5)
    np.testing.assert_allclose(total, matrix.sum(), atol=1e-5 * np.abs(matrix).sum())
    assert transpose.shape == matrix.T.shape
    np.testing.assert_allclose(dense(transpose), matrix.T, atol=1e-5)


def test_one_row_is_still_a_matrix():
    circuit = gaussian(3, 9, 4, 7, batch=(2,))
    np.testing.assert_allclose(circuit.rows(5), dense(circuit)[:, 5:6], atol=1e-5)


def test_index_picks_from_the_batch():
    circuit = gaussian(4, 5, 2, 6, batch=(2, 3))
    matrix = dense(circuit)
    np.testing.assert_array_equal(dense(circuit[1, 2]), matrix[1, 2])
    np.testing.assert_array_equal(dense(circuit[0]), matrix[0])
    np.testing.assert_array_equal(dense(circuit[:, 1]), matrix[:, 1])
    np.testing.assert_array_equal(dense(circuit[np.array([1, 0]), np.array([0, 2])]), matrix[[1, 0], [0, 2]])


@jax.jit
def products(a, b, c):
    return a @ b, (a @ b) @ c, a @ (b @ c), (a @ b).T, b.T @ a.T


@pytest.mark.parametrize("ranks", [(2, 5, 3), (5, 2, 3), (3, 3, 3)])
@property_test
@given(seed=SEEDS)
def test_products_of_circuits(ranks, seed):
    a, b, c = (gaussian(seed + i, 6, rank, 6) for i, rank in enumerate(ranks))
    ab, ab_c, a_bc, ab_t, bt_at = products(a, b, c)
    assert ab.left.shape[-1] == min(ranks[:2])
    assert ab_c.left.shape[-1] == a_bc.left.shape[-1] == min(ranks)
    # Rounding is relative to the factors, not to a product that happens to be small.
    size = np.prod([np.linalg.norm(factor) for circuit in (a, b, c) for factor in (circuit.left, circuit.right)])
    expected = dense(a) @ dense(b)
    np.testing.assert_allclose(dense(ab), expected, atol=1e-6 * size)
    np.testing.assert_allclose(dense(ab_c), expected @ dense(c), atol=1e-6 * size)
    np.testing.assert_allclose(dense(a_bc), expected @ dense(c), atol=1e-6 * size)
    np.testing.assert_allclose(dense(ab_t), expected.T, atol=1e-6 * size)
    np.testing.assert_allclose(dense(bt_at), expected.T, atol=1e-6 * size)


def test_batch_vmap_and_loop_agree():
    def analyse(circuit):
        return spectrum(circuit), square_analysis(circuit), entries(circuit), circuit @ circuit.T

    batched = gaussian(5, 10, 4, 10, batch=(2, 3))
    one = jax.jit(analyse)
    loop = [one(batched[i, j]) for i in range(2) for j in range(3)]
    loop = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(2, 3, *leaves[0].shape), *loop)
    for answer in (one(batched), jax.jit(jax.vmap(analyse))(batched), jax.jit(jax.vmap(jax.vmap(analyse)))(batched)):
        for actual, expected in zip(jax.tree.leaves(answer), jax.tree.leaves(loop), strict=True):
            assert actual.shape == expected.shape
            # Vectors and eigenvalues carry the rounding of the core, magnified by their condition.
            np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_nan_is_not_hidden():
    circuit = gaussian(6, 10, 4, 10)
    circuit.left[3, 1] = np.nan
    (_, s, _), values, norm = spectrum(circuit)
    eigenvalues, trace = square_analysis(circuit)
    for answer in (s, values, norm, eigenvalues, trace):
        assert np.isnan(answer).all()
