"""LowRank against the dense product in float64: spectra, norms, entries, products, and what happens at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits import low_rank
from circuits_jax.circuits.low_rank import LowRank, subspace_overlap

SEEDS = st.integers(0, 2**32 - 1)
RECTANGULAR = {"M>R": (9, 4, 7), "M<R": (3, 6, 8), "N<R": (8, 6, 3), "M,N<R": (4, 6, 3), "R=1": (5, 1, 6)}
SQUARE = {"M>R": (10, 4, 10), "M=R": (4, 4, 4), "M<R": (3, 6, 3)}
EPS = float(np.finfo(np.float32).eps)
property_test = settings(max_examples=15, deadline=None)


@jax.jit
def spectrum(circuit):
    return circuit.svd(), circuit.singular_values(), circuit.frobenius_norm()


@jax.jit
def square_analysis(circuit):
    return circuit.eigenvalues(), circuit.trace()


@jax.jit
def entries(circuit):
    rows, columns = np.array([2, 0, 2]), np.array([1, 2])
    parts = circuit.rows(rows), circuit.columns(columns), circuit.block(rows, columns)
    return *parts, circuit.diagonal(), circuit.sum(), circuit.T


eigenpairs, overlap = jax.jit(LowRank.eigenvectors), jax.jit(subspace_overlap)


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


@pytest.mark.parametrize("digits", [4, 6])
@property_test
@given(seed=SEEDS)
def test_spectrum_of_ill_conditioned_factors(digits, seed):
    """Factors of condition 1e4 or 1e6 that meet in the same basis: the product has the square of it."""
    rng = np.random.default_rng(seed)
    shared, scales = orthonormal(rng, 4, 4), np.logspace(0, -digits, 4)
    left = orthonormal(rng, 9, 4) * scales @ shared.T
    right = shared * scales @ orthonormal(rng, 7, 4).T
    assert_spectrum_is_right(float32(left, right))


@pytest.mark.parametrize("digits", [4, 6])
@property_test
@given(seed=SEEDS)
def test_small_singular_values_of_one_ill_conditioned_factor(digits, seed):
    """right is orthonormal: the singular values are those of left, down to the smallest, 1e-4 or 1e-6 of the largest.

    QR keeps it to a few float32 roundings of the largest; a Gram matrix, to the square root of one: 3e-4.
    """
    rng = np.random.default_rng(seed)
    left = orthonormal(rng, 9, 4) * np.logspace(0, -digits, 4) @ orthonormal(rng, 4, 4)
    circuit = float32(left, orthonormal(rng, 7, 4).T)
    expected = np.linalg.svd(dense(circuit), compute_uv=False)[:4]
    for values in (spectrum(circuit)[1], spectrum(circuit)[0].S):
        np.testing.assert_allclose(values, expected, rtol=0, atol=4 * EPS * expected[0])


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
    answer = everything(circuit)
    (u, s, vh), eigen = answer["svd"], answer["eigen"]
    for name in (*EXACT, "eigenvalues"):
        assert not np.asarray(answer[name]).any(), name
    assert not s.any()
    np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(vh @ vh.T, np.eye(4), atol=1e-5)
    assert not np.asarray(eigen.values).any()
    for vectors in (eigen.left, eigen.right):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(eigen.condition, 1, rtol=1e-5)  # a zero matrix is normal


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


@pytest.mark.parametrize("name", ["eigenvalues", "eigenvectors", "trace"])
def test_rectangular_matrices_have_no_eigenvalues_and_no_trace(name):
    with pytest.raises(ValueError, match=r"square circuit.*\[2, 9, 7\]"):
        getattr(gaussian(0, 9, 4, 7, batch=(2,)), name)()


@pytest.mark.parametrize("shape", RECTANGULAR.values(), ids=RECTANGULAR)
def test_entries_sum_and_transpose(shape):
    circuit = gaussian(2, *shape)
    matrix = dense(circuit)
    rows, columns, block, diagonal, total, transpose = entries(circuit)
    assert circuit.shape == matrix.shape
    np.testing.assert_allclose(rows, matrix[[2, 0, 2]], atol=1e-5)
    np.testing.assert_allclose(columns, matrix[:, [1, 2]], atol=1e-5)
    np.testing.assert_allclose(block, matrix[[2, 0, 2]][:, [1, 2]], atol=1e-5)
    np.testing.assert_allclose(diagonal, np.diagonal(matrix), atol=1e-5)
    np.testing.assert_allclose(total, matrix.sum(), atol=1e-5 * np.abs(matrix).sum())
    assert transpose.shape == matrix.T.shape
    np.testing.assert_allclose(dense(transpose), matrix.T, atol=1e-5)


def test_one_row_is_still_a_matrix():
    circuit = gaussian(3, 9, 4, 7, batch=(2,))
    matrix = dense(circuit)
    np.testing.assert_allclose(circuit.rows(5), matrix[:, 5:6], atol=1e-5)
    np.testing.assert_allclose(circuit.columns(5), matrix[:, :, 5:6], atol=1e-5)
    np.testing.assert_allclose(circuit.block(8, 6), matrix[:, 8:9, 6:7], atol=1e-5)


def test_rows_and_columns_that_do_not_exist_are_nan():
    circuit = gaussian(3, 9, 4, 7, batch=(2,))
    matrix = np.pad(dense(circuit), ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    np.testing.assert_allclose(circuit.rows([9, 0, 20]), matrix[:, [9, 0, 9], :7], atol=1e-5)
    np.testing.assert_allclose(circuit.columns([7, 0, 20]), matrix[:, :9, [7, 0, 7]], atol=1e-5)
    np.testing.assert_allclose(circuit.block([9, 0], [1, 7]), matrix[:, [9, 0]][:, :, [1, 7]], atol=1e-5)
    np.testing.assert_allclose(circuit.rows([-1, -9, -10]), matrix[:, [8, 0, 9], :7], atol=1e-5)  # as numpy counts
    np.testing.assert_allclose(circuit.columns([-1, -7, -8]), matrix[:, :9, [6, 0, 7]], atol=1e-5)


def test_index_picks_from_the_batch():
    circuit = gaussian(4, 5, 2, 6, batch=(2, 3))
    matrix = dense(circuit)
    np.testing.assert_array_equal(dense(circuit[1, 2]), matrix[1, 2])
    np.testing.assert_array_equal(dense(circuit[0]), matrix[0])
    np.testing.assert_array_equal(dense(circuit[:, 1]), matrix[:, 1])
    np.testing.assert_array_equal(dense(circuit[np.array([1, 0]), np.array([0, 2])]), matrix[[1, 0], [0, 2]])
    np.testing.assert_array_equal(dense(circuit[..., 1]), matrix[:, 1])
    np.testing.assert_array_equal(dense(circuit[-1, None, :2]), matrix[-1, None, :2])
    chosen = np.array([[True, False, True], [False, False, True]])
    np.testing.assert_array_equal(dense(circuit[chosen]), matrix[chosen])
    np.testing.assert_array_equal(dense(circuit[0, 0][()]), matrix[0, 0])


@pytest.mark.parametrize(
    "index", [2, -3, (0, 3), (0, 0, 0), (..., 3), np.array([0, 2]), (slice(None), jnp.array([0, 3]))], ids=str
)
def test_an_index_out_of_the_batch_is_an_error(index):
    circuit = gaussian(4, 5, 2, 6, batch=(2, 3))
    with pytest.raises(IndexError):
        circuit[index]
    with pytest.raises(IndexError):
        jax.jit(lambda circuit: circuit[index])(circuit)


def test_a_traced_index_takes_the_nearest_entry():
    circuit = gaussian(4, 5, 2, 6, batch=(2, 3))
    picked = jax.jit(lambda circuit, head: circuit[:, head])(circuit, 7)
    np.testing.assert_array_equal(dense(picked), dense(circuit)[:, 2])


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


def test_nan_is_not_hidden():
    circuit = gaussian(6, 10, 4, 10)
    circuit.left[3, 1] = np.nan
    answer = everything(circuit)
    assert not answer["eigen"].converged
    assert np.isnan(answer["diagonal"]).tolist() == [i == 3 for i in range(10)]
    for name in set(answer) - {"diagonal", "column", "block", "algebra"}:  # of these it is in parts only
        parts = answer["eigen"][:4] if name == "eigen" else jax.tree.leaves(answer[name])
        for part in (answer["top"].values,) if name == "top" else parts:
            assert np.isnan(part).all(), name
    assert np.isnan(overlap(circuit.left, np.ones((10, 1), np.float32)))


# Eigenvectors ---------------------------------------------------------------------------------------------------------


def assert_eigenpairs(circuit):
    """Every right pair fits to the rounding of a few products. So does w^H B Q = lambda w^H, and then w^H B, if short,
    is off by that over its length, which is no smaller than the last singular value that is not zero; and where w^H B
    should be zero, w is off by rounding x condition.
    """
    matrix, eigen = dense(circuit), eigenpairs(circuit)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    sigma = sigma[sigma > 1e-5 * sigma[0]]
    values, left, right = (np.asarray(x, np.complex128) for x in eigen[:3])
    assert eigen.converged
    assert values.shape == eigen.condition.shape == (min(circuit.left.shape),)
    assert left.shape == right.shape == (len(matrix), len(values))
    for vectors in (left, right):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=0), 1, rtol=1e-5)
    rounding = 32 * EPS * sigma[0]
    assert np.abs(matrix @ right - right * values).max() <= rounding
    off = np.abs(left.conj().T @ matrix - values[:, None] * left.conj().T).max(1)
    assert (off <= rounding * sigma[0] / sigma[-1] * np.maximum(1, eigen.condition)).all()
    np.testing.assert_allclose(eigen.condition, 1 / np.abs((left.conj() * right).sum(0)), rtol=1e-3)
    assert (np.asarray(eigen.condition) >= 1 - 1e-5).all()
    return eigen


@pytest.mark.parametrize("shape", SQUARE.values(), ids=SQUARE)
@property_test
@given(seed=SEEDS)
def test_eigenvectors_and_conditions(shape, seed):
    """Conditions are those of float64 wherever vectors are determined.

    A vector turns by about EPS sigma_1 condition / gap: 1e-7 x 30 / 1e-2 = 4e-4, and a condition holds two of them.
    """
    circuit = gaussian(seed, *shape)
    eigen, matrix = assert_eigenpairs(circuit), dense(circuit)
    expected, left, right = scipy.linalg.eig(matrix, left=True, right=True)
    condition = 1 / np.abs((left.conj() * right).sum(0))
    distance = np.abs(expected[:, None] - expected) + np.diag(np.full(len(expected), np.inf))
    clear = (distance.min(0) > 1e-2 * np.linalg.norm(matrix, 2)) & (condition < 30)
    for value, its_condition in zip(expected[clear], condition[clear], strict=True):
        nearest = np.abs(np.asarray(eigen.values) - value).argmin()
        np.testing.assert_allclose(eigen.condition[nearest], its_condition, rtol=1e-2)


@property_test
@given(seed=SEEDS)
def test_eigenvectors_of_a_rank_deficient_circuit(seed):
    """An eigenvector of right left that left, or right, sends to rounding noise: the noise is no eigenvector."""
    circuit = gaussian(seed, 10, 4, 10)
    circuit.left[:, 1] = circuit.left[:, 0]
    assert_eigenpairs(circuit)
    assert_eigenpairs(circuit.T)


def test_eigenvectors_have_length_1_where_factors_have_empty_columns():
    left = np.random.default_rng(0).normal(size=(8, 4)) * (np.arange(4) < 2)
    found = eigenpairs(LowRank(*map(jnp.float32, (left, np.random.default_rng(1).normal(size=(4, 8))))))
    for vectors in (found.left, found.right):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=-2), 1, atol=1e-5)


def test_eigenvectors_of_a_normal_and_of_a_shift_matrix():
    """A pair of planes that turn: condition 1. A shift is as far from normal as can be: its vectors are orthogonal."""
    rng = np.random.default_rng(7)
    basis = orthonormal(rng, 10, 4)
    turn = scipy.linalg.block_diag([[1.0, -2.0], [2.0, 1.0]], [[0.5, 1.0], [-1.0, 0.5]])
    np.testing.assert_allclose(assert_eigenpairs(float32(basis, turn @ basis.T)).condition, 1, rtol=1e-5)
    shift = eigenpairs(float32(basis, np.eye(4, k=1) @ basis.T))
    assert shift.converged
    assert (np.asarray(shift.condition) > 1e3).all()


# Sums, multiples and products with arrays -----------------------------------------------------------------------------


@jax.jit
def combinations(a, b, scale, array):
    return {
        "a + b": a + b, "a - b": a - b, "-a": -a, "2.5 a": 2.5 * a, "a 3": a * 3, "scaled": a * scale,
        "scaled left": scale * a, "array @ a": array @ a, "a @ array": a @ array.mT, "both": array @ (a + b) @ b.T,
    }  # fmt: skip


@property_test
@given(seed=SEEDS)
def test_sums_multiples_and_products_with_arrays(seed):
    a, b = gaussian(seed, 6, 4, 6, batch=(2, 3)), gaussian(seed + 1, 6, 2, 6, batch=(3,))
    scale, array = gaussian(seed + 2, 3, 1, 5, batch=(2,)).left[..., 0], gaussian(seed + 3, 5, 6, 1).left
    answer, (x, y) = combinations(a, b, scale, array), (dense(a), dense(b))
    multiple, array = scale[..., None, None].astype(np.float64), array.astype(np.float64)
    expected = {
        "a + b": x + y, "a - b": x - y, "-a": -x, "2.5 a": 2.5 * x, "a 3": 3 * x, "scaled": multiple * x,
        "scaled left": multiple * x, "array @ a": array @ x, "a @ array": x @ array.T,
        "both": array @ (x + y) @ y.mT,
    }  # fmt: skip
    assert answer["a + b"].left.shape[-1] == answer["a - b"].right.shape[-2] == 6
    assert answer["array @ a"].left.shape[-1] == answer["a @ array"].left.shape[-1] == 4
    assert answer["both"].left.shape[-1] == 2
    sizes = [np.linalg.norm(factor) for factor in (a.left, a.right, b.left, b.right, b.left, b.right)]
    for name, circuit in answer.items():
        assert circuit.shape == expected[name].shape
        # Rounding of the longest product is relative to its factors.
        size = np.prod(sizes) * np.linalg.norm(array) if name == "both" else np.abs(expected[name]).max() * 6
        np.testing.assert_allclose(dense(circuit), expected[name], rtol=0, atol=4 * EPS * size, err_msg=name)


def test_numpy_arrays_on_the_left_leave_the_operation_to_the_circuit():
    circuit = gaussian(8, 6, 4, 6, batch=(2, 3))
    array, scale = gaussian(9, 5, 6, 1).left, np.array([1.0, -2.0, 0.5], np.float32)
    for product in (array @ circuit, jnp.asarray(array) @ circuit):
        assert isinstance(product, LowRank)
        np.testing.assert_allclose(dense(product), array.astype(np.float64) @ dense(circuit), atol=1e-5)
    for multiple in (scale * circuit, jnp.asarray(scale) * circuit, circuit * scale):
        assert isinstance(multiple, LowRank)
        np.testing.assert_array_equal(dense(multiple), scale[:, None, None] * dense(circuit))
    np.testing.assert_array_equal(dense(np.float32(2) * circuit), 2 * dense(circuit))


def test_leading_axes_broadcast_in_a_product():
    """All pairs of three heads, though each factor carries one of the two axes only."""
    circuits = gaussian(10, 6, 2, 6, batch=(3,))
    matrices = dense(circuits)
    expected = matrices[:, None] @ matrices[None]
    for pairs in (circuits[:, None] @ circuits[None], (circuits.T[None] @ circuits.T[:, None]).T):
        assert pairs.shape == (3, 3, 6, 6)
        np.testing.assert_allclose(dense(pairs), expected, atol=1e-5)
        np.testing.assert_allclose(dense(pairs[2, 1]), expected[2, 1], atol=1e-5)
        np.testing.assert_allclose(pairs.trace(), np.trace(expected, axis1=-2, axis2=-1), atol=1e-5)
        np.testing.assert_allclose(pairs.top_k(1).values[..., 0], expected.max((-2, -1)), atol=1e-5)
        np.testing.assert_allclose(dense(pairs + circuits[0]), expected + matrices[0], atol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    a, b = gaussian(0, 6, 2, 5), gaussian(0, 6, 2, 5)
    with pytest.raises(ValueError, match=r"equal shapes.*\[6, 5\] and \[5, 6\]"):
        a + b.T
    for left, right, shapes in (
        (a, b, r"\[6, 5\] and \[6, 5\]"), (a, np.ones(5), r"\[6, 5\] and \[5\]"),
        (np.ones(6), a, r"\[6\] and \[6, 5\]"), (np.ones((3, 5)), a, r"\[3, 5\] and \[6, 5\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"product needs .* got " + shapes):
            left @ right


norms = jax.jit(lambda circuit: (circuit.frobenius_norm(), circuit.spectral_norm()))


@property_test
@given(seed=SEEDS)
def test_spectrum_and_norms_of_a_sum(seed):
    a, b = gaussian(seed, 9, 2, 7), gaussian(seed + 1, 9, 2, 7)
    assert_spectrum_is_right(a + b)
    assert_spectrum_is_right(a - b)
    for i, order in enumerate(("fro", 2)):
        of = lambda circuit, i=i: float(norms(circuit)[i])  # noqa: E731
        np.testing.assert_allclose(of(a + b), np.linalg.norm(dense(a) + dense(b), order), rtol=1e-5)
        assert of(a + b) <= (1 + 1e-5) * (of(a) + of(b))
        np.testing.assert_allclose(of(a + a), 2 * of(a), rtol=1e-5)
        assert of(a - a) <= 1e-5 * of(a)


# The largest entries --------------------------------------------------------------------------------------------------


def largest(matrix, k):
    """The k largest entries of [M,N] in falling order, NaN first, ties in row-major order."""
    order = sorted(np.ndindex(matrix.shape), key=lambda at: (not np.isnan(matrix[at]), -matrix[at], at))[:k]
    return [matrix[at] for at in order], [at[0] for at in order], [at[1] for at in order]


@pytest.mark.parametrize("k", [1, 9, 63])
@pytest.mark.parametrize("entries_at_once", [1, 30, 2**23], ids=["row by row", "4 rows", "all 9 rows"])
def test_largest_entries_with_ties_across_blocks(monkeypatch, k, entries_at_once):
    """Small integers, so that products are exact and full of ties; 9 rows in blocks of 4 make the last overlap."""
    monkeypatch.setattr(low_rank, "ENTRIES_AT_ONCE", entries_at_once)
    top_k = jax.jit(lambda circuit: circuit.top_k(k))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        circuit = float32(rng.integers(-1, 2, (9, 3)), rng.integers(-1, 2, (3, 7)))
        if seed == 9:
            circuit.left[5] = np.nan
        expected = largest(dense(circuit), k)
        for actual, wanted in zip(top_k(circuit), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("entries_at_once", [15, 2**23])
def test_largest_and_smallest_entries_of_every_head(monkeypatch, entries_at_once):
    monkeypatch.setattr(low_rank, "ENTRIES_AT_ONCE", entries_at_once)
    circuit = gaussian(11, 9, 4, 7, batch=(2, 3))
    matrix = dense(circuit)
    values, rows, columns = jax.jit(lambda circuit: circuit.top_k(5))(circuit)
    lowest, low_rows, low_columns = jax.jit(lambda circuit: (-circuit).top_k(5))(circuit)
    assert values.shape == rows.shape == columns.shape == (2, 3, 5)
    for head in np.ndindex(2, 3):
        expected = largest(matrix[head], 5)
        np.testing.assert_allclose(values[head], expected[0], rtol=1e-5)
        np.testing.assert_array_equal((rows[head], columns[head]), expected[1:])
        expected = largest(-matrix[head], 5)
        np.testing.assert_allclose(-lowest[head], -np.array(expected[0]), rtol=1e-5)
        np.testing.assert_array_equal((low_rows[head], low_columns[head]), expected[1:])


@pytest.mark.parametrize("k", [-1, 0, 64])
def test_more_entries_than_there_are(k):
    with pytest.raises(ValueError, match=f"k must be between 1 and the number of entries 63; got {k}"):
        gaussian(0, 9, 4, 7).top_k(k)


# Subspaces ------------------------------------------------------------------------------------------------------------


@property_test
@given(seed=SEEDS)
def test_overlap_of_known_subspaces(seed):
    """Whatever the basis: the same span 1, nested 1, orthogonal 0, and between them the share of common dimensions."""
    rng = np.random.default_rng(seed)
    directions = orthonormal(rng, 12, 12)
    mix = lambda *columns: (directions[:, columns] @ well_conditioned(rng, len(columns))).astype(np.float32)  # noqa: E731
    for other, expected in (
        (mix(0, 1, 2), 1.0), (mix(0, 1, 2, 3, 4), 1.0), (mix(0, 1, 5, 6, 7), 2 / 3), (mix(5, 6, 7, 8, 9), 0.0)
    ):  # fmt: skip
        a = mix(0, 1, 2)
        np.testing.assert_allclose(overlap(a, other), expected, atol=1e-5)
        np.testing.assert_allclose(overlap(other, a), expected, atol=1e-5)


def test_overlap_is_that_of_the_principal_angles_and_random_on_average():
    rng = np.random.default_rng(12)
    a, b = rng.normal(size=(400, 12, 3)).astype(np.float32), rng.normal(size=(400, 12, 5)).astype(np.float32)
    values = overlap(a, b)
    for i in range(20):
        angles = scipy.linalg.subspace_angles(a[i].astype(np.float64), b[i].astype(np.float64))
        np.testing.assert_allclose(values[i], (np.cos(angles) ** 2).mean(), atol=1e-5)
    np.testing.assert_allclose(values.mean(), 5 / 12, atol=4 * np.std(values) / 20)  # four standard errors
    np.testing.assert_allclose(overlap(a, b[0]), overlap(a, np.broadcast_to(b[0], b.shape)), atol=1e-6)


# What must not matter -------------------------------------------------------------------------------------------------

HEADS = (10, 4, 10)
EXACT = ("frobenius", "spectral", "trace", "sum", "diagonal", "singular values", "row", "column", "block")


@jax.jit
def everything(circuit):
    """All that is reported of a square circuit, what does not depend on it being determined first."""
    svd, eigen = circuit.svd(), circuit.eigenvectors()
    return {
        "frobenius": circuit.frobenius_norm(), "spectral": circuit.spectral_norm(), "trace": circuit.trace(),
        "sum": circuit.sum(), "diagonal": circuit.diagonal(), "singular values": circuit.singular_values(),
        "row": circuit.rows(3), "column": circuit.columns(3), "block": circuit.block([1, 4], [2, 3, 0]),
        "svd": svd, "eigenvalues": circuit.eigenvalues(), "eigen": eigen, "top": circuit.top_k(3),
        "algebra": (circuit @ circuit.T - 2 * circuit) * circuit.sum(),
    }  # fmt: skip


def well_conditioned(rng, n):
    """[n,n] of condition at most 4."""
    return orthonormal(rng, n, n) * rng.uniform(0.5, 2.0, n) @ orthonormal(rng, n, n)


def size_of(circuit):
    return np.linalg.norm(circuit.left) * np.linalg.norm(circuit.right)


def projectors(left, right, clear):
    """left_r right_r^H of the components that are clear: what a sign or phase of the vectors does not change."""
    left, right = np.asarray(left)[:, clear], np.asarray(right)[:, clear]
    return np.einsum("mr,nr->rmn", left, right.conj())


def apart(values, scale):
    """Which values [R] are farther than 1e-2 of the scale from all others and from zero."""
    distance = np.abs(values[:, None] - values) + np.diag(np.abs(values))
    return distance.min(0) > 1e-2 * scale


def assert_same_eigenvalues(actual, expected, circuit):
    """To rounding, magnified as Bauer and Fike allow: by the condition of the eigenvectors."""
    small = np.asarray(circuit.right, np.float64) @ circuit.left
    tolerance = 8 * EPS * np.linalg.cond(np.linalg.eig(small)[1]) * size_of(circuit)
    assert multiset_distance(np.asarray(actual), np.asarray(expected)) <= tolerance


def assert_same_vectors(actual, expected, turn=None):
    """Singular and eigenvectors of components that stand alone: turned by O, but for the signs and phases.

    A vector turns by rounding x condition / gap: 1e-6 x 10 / 1e-2 = 1e-3, with a condition of at most 10.
    """
    turn = np.eye(HEADS[0]) if turn is None else turn
    s = np.asarray(expected["svd"].S)
    clear = apart(s, s[0])
    products = turn @ projectors(expected["svd"].U, expected["svd"].Vh.T, clear) @ turn.T
    np.testing.assert_allclose(projectors(actual["svd"].U, actual["svd"].Vh.T, clear), products, atol=2e-3)
    ours, theirs = actual["eigen"], expected["eigen"]
    clear = apart(np.asarray(theirs.values), s[0]) & (np.asarray(theirs.condition) < 10)
    places = [int(np.abs(np.asarray(ours.values) - value).argmin()) for value in theirs.values]
    places = np.array(places)[clear]
    np.testing.assert_allclose(np.asarray(ours.condition)[places], np.asarray(theirs.condition)[clear], rtol=2e-2)
    for side in ("left", "right"):
        one, other = getattr(ours, side), getattr(theirs, side)
        products = turn @ projectors(other, other, clear) @ turn.T
        np.testing.assert_allclose(projectors(one, one, places), products, atol=5e-3)


@property_test
@given(seed=SEEDS)
def test_gauge(seed):
    """left G and G^-1 right are the same circuit, so nothing that is reported may change."""
    circuit, rng = gaussian(seed, *HEADS), np.random.default_rng(seed)
    gauge = well_conditioned(rng, 4)
    other = float32(circuit.left @ gauge, np.linalg.solve(gauge, circuit.right))
    before, after = everything(circuit), everything(other)
    for name in EXACT:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-5 * size_of(circuit), err_msg=name)
    assert_same_eigenvalues(after["eigenvalues"], before["eigenvalues"], circuit)
    assert_same_vectors(after, before)
    np.testing.assert_allclose(overlap(circuit.left, other.left), 1, atol=1e-5)


@property_test
@given(seed=SEEDS)
def test_transpose(seed):
    """The same spectra, norms and trace; rows are columns; the sides of the vectors change places."""
    circuit = gaussian(seed, *HEADS)
    before, after = everything(circuit), everything(circuit.T)
    after["row"], after["column"] = after["column"].T, after["row"].T
    np.testing.assert_allclose(circuit.T.block([2, 3, 0], [1, 4]).T, before["block"], atol=1e-5)
    for name in set(EXACT) - {"block"}:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-5 * size_of(circuit), err_msg=name)
    assert_same_eigenvalues(after["eigenvalues"], before["eigenvalues"], circuit)
    (u, s, vh), eigen = after["svd"], after["eigen"]
    after["svd"] = before["svd"]._replace(U=vh.T, S=s, Vh=u.T)
    after["eigen"] = eigen._replace(left=eigen.right.conj(), right=eigen.left.conj())
    assert_same_vectors(after, before)


@property_test
@given(seed=SEEDS)
def test_rotation_of_the_residual_basis(seed):
    """O left and right O^T: spectra, norms and trace stay, vectors turn."""
    circuit, rng = gaussian(seed, *HEADS), np.random.default_rng(seed)
    turn = orthonormal(rng, 10, 10)
    before, after = everything(circuit), everything(float32(turn @ circuit.left, circuit.right @ turn.T))
    for name in ("frobenius", "spectral", "trace", "singular values"):
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-5 * size_of(circuit), err_msg=name)
    assert_same_eigenvalues(after["eigenvalues"], before["eigenvalues"], circuit)
    assert_same_vectors(after, before, turn)


def test_batch_vmap_and_loop_agree():
    batched = gaussian(5, *HEADS, batch=(5,))
    loop = jax.tree.map(lambda *leaves: np.stack(leaves), *[everything(batched[i]) for i in range(5)])
    runs = jax.jit(jax.vmap(jax.vmap(everything)))(jax.tree.map(lambda x: x[None], batched))
    for answer in (everything(batched), jax.tree.map(lambda x: x[0], runs)):
        for i in range(5):
            assert_same_vectors(*(jax.tree.map(lambda x, i=i: x[i], either) for either in (answer, loop)))
        for name in set(loop) - {"svd", "eigen"}:
            for actual, expected in zip(*map(jax.tree.leaves, (answer[name], loop[name])), strict=True):
                assert actual.shape == expected.shape
                # Eigenvalues carry the rounding of the core, magnified by their condition.
                np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@property_test
@given(seed=SEEDS)
def test_order_of_the_heads(seed):
    circuit, order = gaussian(seed, *HEADS, batch=(5,)), np.random.default_rng(seed).permutation(5)
    before, after = everything(circuit), everything(circuit[order])
    for actual, expected in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(actual, np.asarray(expected)[order])


@property_test
@given(seed=SEEDS)
def test_products_distribute_over_sums(seed):
    a, b, c = (gaussian(seed + i, 6, 3, 6) for i in range(3))
    size = (size_of(a) + size_of(b)) * size_of(c)
    one, other = jax.jit(lambda a, b, c: ((a + b) @ c, a @ c + b @ c))(a, b, c)
    np.testing.assert_allclose(dense(one), (dense(a) + dense(b)) @ dense(c), atol=1e-6 * size)
    np.testing.assert_allclose(dense(other), dense(one), atol=1e-6 * size)


def test_lowers_for_every_platform():
    def without_eigenvalues(circuit):
        parts = circuit.rows([0]), circuit.columns([0]), circuit.block([0], [1]), circuit.top_k(3), circuit.diagonal()
        norms = circuit.frobenius_norm(), circuit.spectral_norm(), circuit.singular_values(), circuit.svd()
        numbers = circuit.trace(), circuit.sum(), subspace_overlap(circuit.left, circuit.right.mT)
        return parts, norms, numbers, circuit[0] @ circuit.T - 2.0 * circuit

    array = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    circuit, platforms = LowRank(array(2, 2, 8, 4), array(2, 2, 4, 8)), ("cpu", "cuda", "tpu")
    assert jax.export.export(jax.jit(without_eigenvalues), platforms=platforms)(circuit).platforms == platforms
    with_eigenvalues = jax.jit(lambda circuit: (circuit.eigenvalues(), circuit.eigenvectors()))
    for platform in platforms:
        assert jax.export.export(with_eigenvalues, platforms=[platform])(circuit).platforms == (platform,)
