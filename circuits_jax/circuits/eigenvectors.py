"""Left and right eigenvectors of batches of real matrices with the condition of each eigenvalue, on every backend."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import eigenvalues, linear_algebra
from circuits_jax.circuits.linear_algebra import einsum, matmul


class Eigen(NamedTuple):
    """Eigenvalues with their vectors in columns: A right_r = values_r right_r, left_r^H A = values_r left_r^H.

    Attributes:
        values: complex [...,R] in falling order of magnitude.
        left, right: complex [...,M,R], of length 1.
        condition: [...,R] = 1 / |left_r^H right_r| >= 1: a small error E of the matrix moves value r by up to
            condition_r ||E||. 1 for a normal matrix, huge near a defective one, infinite at it.
        converged: bool [...]; all else is NaN where it is False.
    """

    values: Array
    left: Array
    right: Array
    condition: Array
    converged: Array


def eigenvectors(matrices: Array) -> Eigen:
    """Eigenvalues, left and right eigenvectors of real [...,R,R], from its Schur form (Golub & Van Loan, 7.6).

    Vectors of (nearly) equal eigenvalues span their common space only as well as it is determined; of a defective
    matrix they coincide, and the condition is then as large as float allows, or infinite.
    """
    small, scale = eigenvalues.scaled(matrices)
    quasi, basis = jax.lax.platform_dependent(small, cpu=linear_algebra.lapack_schur, default=eigenvalues.francis_schur)
    triangle, basis = _complex_schur(quasi, basis)
    right = matmul(basis, _of_triangle(triangle))
    # Turned upside down, the transpose of an upper triangle is one again, with the same values in reverse.
    flipped = jnp.flip(_of_triangle(jnp.flip(triangle.mT, (-2, -1))), (-2, -1))
    left = matmul(basis, flipped.conj())
    right, left = (x / jnp.linalg.norm(x, axis=-2, keepdims=True) for x in (right, left))
    overlap = jnp.minimum(jnp.abs(einsum("...ij,...ij->...j", left.conj(), right)), 1.0)
    values = eigenvalues.of_quasi_triangle(quasi)  # the diagonal of triangle, with exact conjugate pairs
    values, converged = eigenvalues.checked(small, jnp.where(jnp.isnan(overlap), jnp.nan, values))
    order = jnp.argsort(-jnp.abs(values), axis=-1, stable=True)
    keep = converged[..., None]
    return Eigen(
        values=jnp.take_along_axis(eigenvalues.times(values, scale[..., None]), order, axis=-1),
        left=jnp.where(keep[..., None], jnp.take_along_axis(left, order[..., None, :], axis=-1), jnp.nan),
        right=jnp.where(keep[..., None], jnp.take_along_axis(right, order[..., None, :], axis=-1), jnp.nan),
        condition=jnp.where(keep, jnp.take_along_axis(1 / overlap, order, axis=-1), jnp.nan),
        converged=converged,
    )


def _complex_schur(quasi: Array, basis: Array) -> tuple[Array, Array]:
    """Upper triangular T and unitary Z of the same matrix: each 2 x 2 block turned into its own complex Schur form."""
    first = eigenvalues.of_quasi_triangle(quasi)[..., :-1]
    diagonal, below = (jnp.diagonal(quasi, k, axis1=-2, axis2=-1) for k in (0, -1))
    # (T - second) v = 0 has the direction (T11 - first', T21) of the first column of T - first', first' the other root.
    other = diagonal[..., :-1] + diagonal[..., 1:] - first
    x, y = diagonal[..., :-1] - other, below.astype(first.dtype)
    largest = jnp.maximum(jnp.abs(x), jnp.abs(y))
    pair = (below != 0) & (largest > 0)
    x, y = (jnp.where(pair, eigenvalues.times(part, 1 / largest), fill) for part, fill in ((x, 1), (y, 0)))
    norm = jnp.sqrt(jnp.square(jnp.abs(x)) + jnp.square(jnp.abs(y)))
    c, s = x / norm, y / norm
    # The unitary ((c, -s*), (s, c*)) in the rows and columns of each block.
    pad = [(0, 0)] * (quasi.ndim - 2)
    on = jnp.pad(c, [*pad, (0, 1)], constant_values=1) * jnp.pad(c.conj(), [*pad, (1, 0)], constant_values=1)
    size = quasi.shape[-1]
    row, col = jnp.arange(size)[:, None], jnp.arange(size)
    under, over = jnp.pad(s, [*pad, (1, 0)]), jnp.pad(-s.conj(), [*pad, (0, 1)])
    turn = jnp.where(row == col, on[..., None], 0)
    turn = turn + jnp.where(row == col + 1, under[..., None], 0) + jnp.where(row + 1 == col, over[..., None], 0)
    triangle = matmul(matmul(turn.conj().mT, quasi.astype(turn.dtype)), turn)
    return jnp.triu(triangle), matmul(basis.astype(turn.dtype), turn)


def _of_triangle(triangle: Array) -> Array:
    """Right eigenvectors of upper triangular complex [...,R,R], one for each diagonal entry, in columns.

    Back substitution in (T - lambda_r) y = 0 with y_r = 1 for all r at once. A difference of two eigenvalues below
    rounding is put at rounding (as LAPACK's trevc does), so that vectors of equal eigenvalues stay finite.
    """
    size = triangle.shape[-1]
    values = jnp.diagonal(triangle, axis1=-2, axis2=-1)
    norm = jnp.sqrt(jnp.square(jnp.abs(triangle)).sum((-2, -1)))[..., None]
    smallest = jnp.maximum(jnp.finfo(norm.dtype).eps * norm, jnp.finfo(norm.dtype).tiny)
    column = jnp.arange(size)

    def substitute(i: Array, vectors: Array) -> Array:
        row = size - 1 - i
        coefficients = jax.lax.dynamic_index_in_dim(triangle, row, axis=-2, keepdims=False)
        difference = jax.lax.dynamic_index_in_dim(values, row, axis=-1) - values
        difference = jnp.where(jnp.abs(difference) < smallest, smallest.astype(difference.dtype), difference)
        entry = -einsum("...j,...jr->...r", coefficients, vectors) / difference
        entry = jnp.where(column == row, 1, jnp.where(column > row, entry, 0))
        vectors = jax.lax.dynamic_update_index_in_dim(vectors, entry[..., None, :], row, axis=-2)
        # Near a defective matrix entries grow without bound: each column keeps a length that float can hold.
        return vectors / jnp.maximum(jnp.abs(vectors).max(-2, keepdims=True), 1)

    return jax.lax.fori_loop(0, size, substitute, jnp.zeros_like(triangle))
