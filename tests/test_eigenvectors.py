"""Left and right eigenvectors and conditions, through LAPACK's Schur form and through the own one of GPU and TPU."""

import functools

import jax
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eigenvalues import CLASSES, EPS, bound, gaussian, matched_distance, orthogonal, zoo

from circuits_jax.circuits import linear_algebra
from circuits_jax.circuits.eigenvalues import francis_schur, scaled
from circuits_jax.circuits.eigenvectors import eigenvectors

SIZES = (1, 2, 3, 16, 64)


def through_francis(matrices):
    """eigenvectors() as it runs on GPU and TPU; the replacement is made while JAX traces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_algebra, "lapack_schur", francis_schur)
        return eigenvectors(matrices)


FUNCTIONS = {"lapack": eigenvectors, "own": through_francis}
JITTED = {name: jax.jit(function) for name, function in FUNCTIONS.items()}
SCHUR = {"lapack": jax.jit(linear_algebra.lapack_schur), "own": jax.jit(lambda a: francis_schur(a))}
both = pytest.mark.parametrize("branch", FUNCTIONS)


@functools.cache
def solved(branch, size):
    """{class: (A, Eigen) in float64}, all from one program."""
    matrices = zoo(size, 0)
    eigen = as_float64(JITTED[branch](np.stack([*matrices.values()])))
    return {
        name: (matrix.astype(np.float64), jax.tree.map(lambda leaf, i=i: leaf[i], eigen))
        for i, (name, matrix) in enumerate(matrices.items())
    }


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64), tree)


@both
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CLASSES)
def test_vectors_fit_their_values(name, size, branch):
    """A r = lambda r and A^T conj(l) = lambda conj(l), as backward stable as the values; of length 1; largest first."""
    matrix, (values, left, right, condition, converged) = solved(branch, size)[name]
    norm = np.linalg.norm(matrix, 2) or 1.0
    assert converged
    for vectors, a, roots in ((right, matrix, values), (left, matrix.T, values.conj())):
        assert np.linalg.norm(a @ vectors - vectors * roots, axis=0).max() <= bound(size) * norm
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=0), 1, atol=4 * EPS)
    assert (np.diff(np.abs(values)) <= 4 * EPS * norm).all()
    np.testing.assert_array_equal(np.sort_complex(values), np.sort_complex(values.conj()))
    assert (condition >= 1).all()


@both
@pytest.mark.parametrize("name", ["orthogonal", "symmetric", "skew", "identity", "zero"])
def test_condition_of_a_normal_matrix_is_one(name, branch):
    """1e-4, as the angle between left and right vector is some eps over the gap to the next eigenvalue."""
    np.testing.assert_allclose(solved(branch, 16)[name][1].condition, 1, rtol=1e-4)


@both
@pytest.mark.parametrize("size", SIZES[1:])
def test_condition_of_a_defective_matrix_is_huge(size, branch):
    """Rounding splits the eigenvalue of a turned block of size R by eps^(1/R): still 1 / sqrt(eps) for R = 2."""
    for name, least in {
        "turned Jordan block": 0.5 / np.sqrt(EPS),
        "Jordan block": 0.5 / EPS,
        "shift": 0.5 / EPS,
    }.items():
        assert (solved(branch, size)[name][1].condition >= least).all()


@both
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_planted_eigenvectors(branch, seed):
    """A = V D V^-1 with eigenvalues that are 1 apart: values, conditions, and A = sum of lambda r l^H / (l^H r).

    The tolerance is first-order perturbation theory: a vector moves by rounding x condition of V over the gap.
    """
    rng = np.random.default_rng(seed)
    basis = orthogonal(rng, 5) * np.linspace(1, 4, 5) @ orthogonal(rng, 5)
    matrix = basis @ scipy.linalg.block_diag(4.0, -3.0, [[1.0, -1.0], [1.0, 1.0]], 0.0) @ np.linalg.inv(basis)
    matrix = matrix.astype(np.float32).astype(np.float64)
    values, left, right, condition, converged = as_float64(JITTED[branch](matrix.astype(np.float32)))
    tolerance = 4 * bound(5) * np.linalg.norm(matrix, 2) * np.linalg.cond(basis)
    assert converged
    assert matched_distance(values, [4, -3, 1 + 1j, 1 - 1j, 0]) <= tolerance
    np.testing.assert_allclose(np.abs(values), [4, 3, 2**0.5, 2**0.5, 0], atol=tolerance)
    expected, expected_left, expected_right = scipy.linalg.eig(matrix, left=True)
    overlap = np.abs((expected_left.conj() * expected_right).sum(0))
    order = np.argsort(-np.abs(expected))
    np.testing.assert_allclose(condition, 1 / overlap[order], rtol=tolerance)
    weights = values / (left.conj() * right).sum(0)
    np.testing.assert_allclose(right * weights @ left.conj().T, matrix, atol=10 * tolerance)


@both
def test_bad_entries_are_flagged_in_their_own_matrix_only(branch):
    batch = gaussian(4, 16, 16)
    clean = JITTED[branch](batch)
    batch[1, 2, 3], batch[3, 0, 0] = np.nan, np.inf
    spoiled = JITTED[branch](batch)
    np.testing.assert_array_equal(spoiled.converged, [True, False, True, False])
    for before, after in zip(clean[:-1], spoiled[:-1], strict=True):
        assert np.isnan(after[1::2]).all()
        np.testing.assert_array_equal(after[::2], before[::2])


@both
def test_batch_loop_and_vmap_agree(branch):
    """Vectors are free up to a phase, so the projections r l^H / (l^H r) are compared."""

    def projections(eigen):
        overlap = (eigen.left.conj() * eigen.right).sum(-2)
        outer = np.einsum("...ir,...jr->...rij", eigen.right, eigen.left.conj())
        return outer / overlap[..., None, None], eigen.values, eigen.condition, eigen.converged

    function, batch = FUNCTIONS[branch], gaussian(2, 3, 3, 3)
    loop = [projections(JITTED[branch](matrix)) for matrix in batch.reshape(-1, 3, 3)]
    loop = [np.stack(leaves).reshape(2, 3, *leaves[0].shape) for leaves in zip(*loop, strict=True)]
    for answer in (JITTED[branch](batch), jax.jit(jax.vmap(jax.vmap(function)))(batch)):
        for actual, expected in zip(projections(answer), loop, strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-4)


@both
def test_float64_reaches_1e_13(branch):
    names = ["gaussian", "nearly normal", "companion", "turned Jordan block", "copying head"]
    matrices = np.stack([zoo(16, 0)[name] for name in names]).astype(np.float64)
    with jax.enable_x64(True):
        values, left, right, _, converged = map(np.asarray, JITTED[branch](matrices))
    assert right.dtype == np.complex128
    assert converged.all()
    norm = np.linalg.norm(matrices, 2, axis=(1, 2))[:, None, None]
    assert np.abs(matrices @ right - right * values[:, None]).max() <= 1e-13 * norm.min()
    assert np.abs(left.mT.conj() @ matrices - values[..., None] * left.mT.conj()).max() <= 1e-13 * norm.min()


@both
@pytest.mark.parametrize("size", SIZES)
def test_schur_form(size, branch):
    """A = Z T Z^T with orthogonal Z and 1 x 1 and 2 x 2 blocks on the diagonal of the triangle T."""
    matrices = np.asarray(scaled(np.stack([*zoo(size, 0).values()]))[0])
    triangle, basis = as_float64(SCHUR[branch](matrices))
    norm = np.linalg.norm(matrices.astype(np.float64), axis=(1, 2), keepdims=True)
    assert np.abs(basis.mT @ basis - np.eye(size)).max() <= bound(size)
    assert (np.abs(basis @ triangle @ basis.mT - matrices) <= bound(size) * norm).all()
    assert not np.tril(triangle, -2).any()
    below = np.diagonal(triangle, -1, axis1=1, axis2=2) != 0
    assert not (below[:, 1:] & below[:, :-1]).any()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_eigenvectors_lower_for(platform):
    """One by one: see test_eigenvalues_lower_for."""
    export = jax.export.export(jax.jit(lambda a: eigenvectors(a)), platforms=(platform,))
    assert export(jax.ShapeDtypeStruct((2, 3, 8, 8), np.float32)).platforms == (platform,)
