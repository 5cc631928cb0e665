"""The factorisations: right, the same one at a time and in a batch, and never a deadlock."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits_jax.circuits import linear_algebra

FACTORISATIONS = {
    name: getattr(linear_algebra, name)
    for name in ("qr", "svd", "singular_values", "lapack_eigenvalues", "lapack_schur")
}
SHAPES = {"tall": (7, 4), "wide": (3, 6), "square": (5, 5)}
JITTED = {name: jax.jit(factorise) for name, factorise in FACTORISATIONS.items()}
SEEDS = st.integers(0, 2**32 - 1)


def cases():
    for name in FACTORISATIONS:
        for shape in ("square",) if name.startswith("lapack") else SHAPES:
            yield pytest.param(name, SHAPES[shape], id=f"{name}-{shape}")


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same(actual, expected):
    """Both come from one LAPACK routine on one matrix at a time; only the float32 rounding may differ."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, atol=1e-6 * max(1.0, np.abs(e).max()), rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_qr_reconstructs_with_orthonormal_columns_and_a_triangle(shape, seed):
    a = gaussian(seed, *shape)
    q, r = (np.asarray(factor, np.float64) for factor in JITTED["qr"](a))
    assert q.shape == (shape[0], min(shape))
    assert r.shape == (min(shape), shape[1])
    np.testing.assert_allclose(q @ r, a, atol=1e-5)
    np.testing.assert_allclose(q.T @ q, np.eye(min(shape)), atol=1e-5)
    np.testing.assert_array_equal(r, np.triu(r))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_svd_agrees_with_float64(shape, seed):
    a = gaussian(seed, *shape)
    u, s, vh = (np.asarray(factor, np.float64) for factor in JITTED["svd"](a))
    expected = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(s, expected, atol=1e-5 * expected[0], rtol=0)
    np.testing.assert_allclose(u @ np.diag(s) @ vh, a, atol=1e-5 * expected[0])
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-5)
    np.testing.assert_allclose(vh @ vh.T, np.eye(len(s)), atol=1e-5)
    np.testing.assert_allclose(JITTED["singular_values"](a), expected, atol=1e-5 * expected[0], rtol=0)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_schur_reconstructs_with_an_orthogonal_basis_and_a_quasi_triangle(seed):
    a = gaussian(seed, 5, 5)
    triangle, basis = (np.asarray(factor, np.float64) for factor in JITTED["lapack_schur"](a))
    np.testing.assert_allclose(basis @ triangle @ basis.T, a, atol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)
    np.testing.assert_array_equal(np.tril(triangle, -2), 0)


def test_eigenvalues_of_known_matrices():
    upper = np.triu(gaussian(0, 4, 4), 1) + np.diag([3.0, -2.0, 1.0, 0.5]).astype(np.float32)
    turn = np.array([[0, -2], [2, 0]], np.float32)
    np.testing.assert_allclose(np.sort_complex(linear_algebra.lapack_eigenvalues(upper)), [-2, 0.5, 1, 3], atol=1e-5)
    np.testing.assert_allclose(np.sort_complex(linear_algebra.lapack_eigenvalues(turn)), [-2j, 2j], atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), list(cases()))
def test_batch_vmap_and_loop_agree(name, shape):
    factorise, jitted = FACTORISATIONS[name], JITTED[name]
    matrices = gaussian(1, 2, 3, *shape)
    one_by_one = [jitted(matrix) for matrix in matrices.reshape(-1, *shape)]
    loop = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(2, 3, *leaves[0].shape), *one_by_one)
    assert_same(jitted(matrices), loop)
    assert_same(factorise(matrices), loop)
    assert_same(jax.jit(jax.vmap(factorise))(matrices), loop)
    assert_same(jax.jit(jax.vmap(jax.vmap(factorise)))(matrices), loop)


@pytest.mark.parametrize("name", FACTORISATIONS)
def test_nan_stays_in_its_own_matrix(name):
    matrices = gaussian(2, 2, 5, 5)
    clean = JITTED[name](matrices)
    matrices[0, 2, 3] = np.nan
    spoiled = JITTED[name](matrices)
    assert_same(jax.tree.map(lambda leaf: leaf[1], spoiled), jax.tree.map(lambda leaf: leaf[1], clean))
    assert any(np.isnan(leaf[0]).any() for leaf in jax.tree.leaves(spoiled))


@pytest.mark.parametrize("name", ["qr", "svd", "singular_values"])
def test_lowers_for_every_backend(name):
    export = jax.export.export(jax.jit(FACTORISATIONS[name]), platforms=("cpu", "cuda", "tpu"))
    exported = export(jax.ShapeDtypeStruct((2, 3, 7, 4), np.float32))
    assert exported.platforms == ("cpu", "cuda", "tpu")


TWO_CORES = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, numpy as np
import circuits_jax as cj
from circuits_jax.circuits import linear_algebra

@jax.jit
def factorise(a, b):
    square = a[:, :32], b[:, :32]
    factorisations = linear_algebra.qr, linear_algebra.svd, linear_algebra.singular_values
    only_square = linear_algebra.lapack_eigenvalues, linear_algebra.lapack_schur
    return [f(x) for f in factorisations for x in (a, b)] + [f(x) for f in only_square for x in square]

@jax.jit
def analyse(weights):
    ov, qk, token_ov = cj.ov(weights), cj.qk(weights), cj.token_ov(weights)
    return (ov.svd(), qk.svd(), ov.eigenvalues(), qk.eigenvalues(), ov.eigenvectors(), qk.eigenvectors(),
            ov.singular_values(), qk.frobenius_norm(), cj.copying_score(weights), cj.composition_scores(weights),
            token_ov.eigenvalues(), token_ov.singular_values())

rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
assert jax.device_count() == int(sys.argv[1])
for run in range(100):
    jax.block_until_ready(factorise(draw(64, 64, 32), draw(64, 64, 32)))
    weights = cj.CircuitWeights(
        W_E=draw(40, 32), W_P=draw(8, 32), W_U=draw(32, 40), W_O=draw(2, 16, 8, 32),
        W_Q=draw(2, 16, 32, 8), W_K=draw(2, 16, 32, 8), W_V=draw(2, 16, 32, 8),
    )
    jax.block_until_ready(analyse(weights))
print("finished", run + 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_devices", [1, 2])
def test_the_whole_algebra_in_one_program_never_deadlocks_on_two_cores(n_devices):
    """With plain jnp.linalg calls this program stops in its first runs: batches of 64 matrices of 64 x 32 are enough.

    One OpenBLAS thread, because several spin against each other on a loaded machine, which looks like a deadlock.
    """
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_CORES, str(n_devices)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "finished 100\n"
