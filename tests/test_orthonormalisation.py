"""Q orthonormal, Q R the matrix, R with its singular values: for every matrix, also where A^T A says little of A."""

import jax
import numpy as np
import pytest

from circuits_jax.circuits import orthonormalisation
from circuits_jax.circuits.orthonormalisation import qr, triangle

EPS = float(np.finfo(np.float32).eps)
SHAPES = {"tall": (90, 16), "square": (16, 16), "one column": (90, 1), "wide": (9, 16), "long": (5000, 64)}
JITTED_QR, JITTED_TRIANGLE = jax.jit(qr), jax.jit(triangle)


def orthonormal(rng, m, n):
    return np.linalg.qr(rng.normal(size=(m, n)))[0]


def zoo(m, n):
    """{class: float32 [M,N]}."""
    rng = np.random.default_rng(0)
    gaussian, least = rng.normal(size=(m, n)), min(m, n)
    left, right = orthonormal(rng, m, least), orthonormal(rng, n, least)
    repeated, with_zero = gaussian.copy(), gaussian.copy()
    repeated[:, -1] = repeated[:, 0]
    with_zero[:, n // 2] = 0
    powers = np.append(np.zeros(least - 1), -6)
    matrices = {f"condition 1e{power}": left * np.logspace(0, -power, least) @ right.T for power in range(9)} | {
        "one small singular value": left * 10.0**powers @ right.T,
        "one large singular value": left * 10.0 ** (-6 - powers) @ right.T,
        "graded columns": gaussian * np.logspace(0, -12, n),
        "columns over 30 decades": gaussian * np.logspace(-30, 0, n),
        "graded rows": gaussian * np.logspace(0, -12, m)[:, None],
        "rank one": np.outer(gaussian[:, 0], gaussian[0]),
        "half the rank": gaussian[:, : (n + 1) // 2] @ rng.normal(size=((n + 1) // 2, n)),
        "repeated column": repeated,
        "zero column": with_zero,
        "zero": 0 * gaussian,
        "all ones": np.ones((m, n)),
        "nearly all ones": 1 + 1e-3 * gaussian,
        "identity": np.eye(m, n),
        "1e-30": 1e-30 * gaussian,
        "1e30": 1e30 * gaussian,
    }
    return {name: matrix.astype(np.float32) for name, matrix in matrices.items()}


CLASSES = [*zoo(2, 2)]
# How far off they may be, in eps of the largest singular value; twice what was seen, or more. The product pays most for
# the explicit inverse of a factor, whose condition the shift keeps below sqrt(1 / (32 N eps)): 128 for N = 16.
ORTHONORMAL, PRODUCT, SINGULAR_VALUES = 24, 100, 48


def float64(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)


def singular_values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def assert_is_qr(matrix, q, r, eps=EPS):
    (matrix, q, r), least = float64(matrix, q, r), min(matrix.shape)
    scale = np.abs(matrix).max() or 1.0  # so that squares in the oracle neither overflow nor vanish
    matrix, r = matrix / scale, r / scale
    assert q.shape == (len(matrix), least)
    assert r.shape == (least, matrix.shape[1])
    assert not np.tril(r, -1).any()
    assert np.abs(q.T @ q - np.eye(least)).max() <= ORTHONORMAL * eps
    expected = singular_values(matrix)
    assert np.linalg.norm(q @ r - matrix, 2) <= PRODUCT * eps * expected[0]
    assert np.abs(singular_values(r) - expected).max() <= SINGULAR_VALUES * eps * expected[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_qr(name, shape):
    matrix = zoo(*shape)[name]
    if name == "all ones" and shape == SHAPES["long"]:
        pytest.skip("rank-deficient, so LAPACK's, whose sums of 5000 equal numbers are off by 85 eps")
    assert_is_qr(matrix, *JITTED_QR(matrix))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_triangle_on_cpu_has_the_singular_values(name, shape):
    """From a float64 Gram matrix, so to the rounding of the result, even where the matrix has lost rank."""
    matrix = zoo(*shape)[name]
    (r,) = float64(JITTED_TRIANGLE(matrix))
    scale = float(np.abs(matrix).max()) or 1.0
    expected = singular_values(matrix / np.float64(scale))
    assert r.shape == (min(shape), shape[1])
    assert not np.tril(r, -1).any()
    assert np.abs(singular_values(r / scale) - expected).max() <= 4 * EPS * expected[0]


def test_small_singular_values_keep_their_digits():
    """Down to 1e-4 of the largest a few eps of the largest are a few parts in a thousand of the smallest."""
    matrix = zoo(90, 16)["condition 1e4"]
    expected = singular_values(matrix.astype(np.float64))
    for r in (JITTED_QR(matrix)[1], JITTED_TRIANGLE(matrix)):
        np.testing.assert_allclose(singular_values(*float64(r)), expected, rtol=5e-3)


def test_rows_are_summed_in_blocks(monkeypatch):
    """A tall matrix that is one block, several and a rest, or a rest alone: the same triangle."""
    matrix = zoo(90, 16)["condition 1e3"]
    whole = np.asarray(JITTED_TRIANGLE(matrix))
    for rows in (1, 32, 45, 89, 90):
        monkeypatch.setattr(orthonormalisation, "ROWS_AT_ONCE", rows)
        np.testing.assert_allclose(jax.jit(lambda a: triangle(a))(matrix), whole, atol=2 * EPS * np.abs(whole).max())


def batch_with_one_deficient_matrix():
    matrices = zoo(90, 16)
    names = ["condition 1e0", "repeated column", "condition 1e6", "zero", "zero column", "graded rows"]
    return np.stack([matrices[name] for name in names]).reshape(2, 3, 90, 16)


def test_batch_loop_and_vmap_agree():
    """To the last bits where Cholesky did it, and to the choice of signs where one matrix sends all to Householder."""
    batch = batch_with_one_deficient_matrix()
    vmapped = jax.jit(jax.vmap(jax.vmap(qr)))
    for answer in (JITTED_QR(batch), vmapped(batch), jax.jit(jax.vmap(qr))(batch), qr(batch)):
        for matrix, q, r in zip(*(x.reshape(6, *x.shape[2:]) for x in (batch, *answer)), strict=True):
            assert_is_qr(matrix, q, r)
    loop = np.stack([JITTED_TRIANGLE(matrix) for matrix in batch.reshape(6, 90, 16)]).reshape(2, 3, 16, 16)
    for answer in (JITTED_TRIANGLE(batch), jax.jit(jax.vmap(jax.vmap(triangle)))(batch), triangle(batch)):
        np.testing.assert_allclose(answer, loop, atol=4 * EPS * np.abs(loop).max())


@pytest.mark.parametrize("n", [1, 16, 64])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_entries_stay_in_their_own_matrix(bad, n):
    """64 columns are enough for XLA's max on CPU to lose a NaN, and with it the sign that something is wrong."""
    batch = np.stack([zoo(90, n)["condition 1e2"]] * 3)
    batch[1, 2, 0] = bad
    q, r = JITTED_QR(batch)
    for good in (0, 2):
        assert_is_qr(batch[good], q[good], r[good])
    bad_triangle = JITTED_TRIANGLE(batch)
    assert np.isfinite(bad_triangle[::2]).all()
    for spoiled in (q[1], r[1], bad_triangle[1]):
        assert not np.isfinite(spoiled).all()


@pytest.mark.parametrize("enable_x64", [False, True])
def test_types_do_not_depend_on_jaxs_setting(enable_x64):
    matrix = zoo(90, 16)["condition 1e2"]
    with jax.enable_x64(enable_x64):
        q, r = JITTED_QR(matrix)
        also_r = JITTED_TRIANGLE(matrix)
    assert q.dtype == r.dtype == also_r.dtype == np.float32
    assert_is_qr(matrix, q, r)


def test_float64_reaches_1e_13():
    matrix = zoo(90, 16)["condition 1e6"].astype(np.float64)
    with jax.enable_x64(True):
        q, r = JITTED_QR(matrix)
        also_r = JITTED_TRIANGLE(matrix)
    assert q.dtype == also_r.dtype == np.float64
    assert_is_qr(matrix, q, r, eps=1e-13 / PRODUCT)
    np.testing.assert_allclose(singular_values(*float64(also_r)), singular_values(matrix), atol=1e-13)


@pytest.mark.parametrize("function", [qr, triangle], ids=["qr", "triangle"])
@pytest.mark.parametrize("shape", [(40, 8), (5, 8), (9000, 8)])
def test_lowers_for_every_platform_at_once(function, shape):
    export = jax.export.export(jax.jit(lambda a: function(a)), platforms=("cpu", "cuda", "tpu"))
    assert export(jax.ShapeDtypeStruct((2, 3, *shape), np.float32)).platforms == ("cpu", "cuda", "tpu")
