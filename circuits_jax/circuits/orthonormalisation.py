"""Thin QR of tall matrices from matmuls: A = Q R with orthonormal Q, as accurate as Householder's and faster.

One pass of Cholesky QR is R = chol(A^T A), Q = A R^-1. It squares the condition number, so one float32 pass is not
enough: passes are repeated, shifted while the matrix is ill-conditioned (Fukaya et al. 1809.11085), until the Gram
matrix is the identity, twice for most heads. What no pass can do, a rank-deficient matrix, is left to Householder's QR.
Where R alone is wanted, a CPU takes the Gram matrix in float64, once: R is then right to float32 for condition numbers
up to 1e7. (Measured: LOG.md, 2026-11-22.)
"""

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import linear_algebra
from circuits_jax.circuits.linear_algebra import matmul, one_at_a_time

ROWS_AT_ONCE = 4096  # of a tall matrix, when its Gram matrix is summed
MOST_PASSES = 6
SHIFT = 32  # in float eps of the Gram matrix's trace; less would cost digits in each pass, more would need more passes
NEARLY_IDENTITY = 0.5  # a Gram matrix so near the identity (in ||.||_F) is made one, to rounding, by the next pass


@jax.custom_batching.custom_vmap
def qr(a: Array) -> tuple[Array, Array]:
    """Thin QR of [...,M,N]: Q [...,M,r] with orthonormal columns and R [...,r,N], r = min(M,N).

    Q^T Q = 1 and A = Q R to float rounding, for any condition number (the latter to 50 float eps of ||A|| when one
    singular value is far below the others, else to a few); R has no fixed signs. Of a rank-deficient matrix, zero
    included, Q is still orthonormal and arbitrary where A does not reach. NaN and infinity give NaN.
    """
    if _householder_is_better(a):
        return linear_algebra.qr(a)
    q, r = _scaled(a)

    def not_done(state: tuple[Array, Array, Array, Array]) -> Array:
        return ~state[2].all() & (state[3] < MOST_PASSES)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        q, r, _, passes = state
        q, factor, done = _pass(q)
        return q, matmul(factor, r), done, passes + 1

    q, r, done, _ = jax.lax.while_loop(not_done, step, (q, r, jnp.zeros(a.shape[:-2], bool), jnp.int32(0)))
    return jax.lax.cond(done.all(), lambda: (q, r), lambda: linear_algebra.qr(a))


@qr.def_vmap
def _(axis_size: int, in_batched: list[bool], a: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    return qr(a), (True, True)  # vmap would turn the choice of Householder into both


def triangle(a: Array) -> Array:
    """R [...,r,N] of qr, on CPU for a quarter of the cost: R^T R = A^T A, so R has the singular values of A.

    Singular values are right to float rounding of the largest; those of a rank-deficient matrix come out that small.
    """
    if _householder_is_better(a):
        return linear_algebra.qr(a)[1]
    in_float64 = one_at_a_time(lambda a: _float64_triangle(a).astype(a.dtype))
    return jax.lax.platform_dependent(a, cpu=in_float64, default=lambda a: qr(a)[1])


def _householder_is_better(a: Array) -> bool:
    return a.shape[-2] < a.shape[-1] or a.dtype != jnp.float32


def _float64_triangle(a: Array) -> Array:
    """chol(A^T A) of one [M,N], in float64 whatever JAX's setting; a shift at its rounding keeps it from failing."""
    n = a.shape[-1]
    with jax.enable_x64(True):
        square = lambda rows: matmul(rows.mT, rows)  # noqa: E731
        blocks = len(a) // ROWS_AT_ONCE
        gram = square(a[blocks * ROWS_AT_ONCE :].astype(jnp.float64))

        def add(block: Array, total: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(a, block * ROWS_AT_ONCE, ROWS_AT_ONCE)  # no copy of the whole
            return total + square(rows.astype(jnp.float64))

        if blocks:
            gram = jax.lax.fori_loop(0, blocks, add, gram)
        shift = 8 * jnp.finfo(jnp.float64).eps * jnp.trace(gram) + jnp.finfo(jnp.float64).tiny
        return jnp.linalg.cholesky(gram + shift * jnp.eye(n, dtype=gram.dtype), upper=True, symmetrize_input=False)


def _scaled(a: Array) -> tuple[Array, Array]:
    """A = (A / scale) diag(scale): squares neither overflow nor vanish, and columns of unlike size cost no pass."""
    scale = jnp.max(jnp.abs(a), axis=-2, keepdims=True, initial=0.0)
    scale = jnp.where(scale == 0, 1.0, scale)
    return a / scale, scale * jnp.eye(a.shape[-1], dtype=a.dtype)


def _pass(q: Array) -> tuple[Array, Array, Array]:
    """One pass of Cholesky QR: the new Q, its factor R, and whether Q was near enough to orthonormal to be so now."""
    identity = jnp.eye(q.shape[-1], dtype=q.dtype)
    gram = matmul(q.mT, q)
    done = jnp.square(gram - identity).sum((-2, -1)) < NEARLY_IDENTITY**2
    shift = SHIFT * jnp.finfo(q.dtype).eps * jnp.trace(gram, axis1=-2, axis2=-1)
    shift = jnp.where(done, 0.0, shift)[..., None, None]
    factor, inverse = _factor_and_inverse(gram + shift * identity)
    return matmul(q, inverse), factor, done


def _factor_and_inverse(gram: Array) -> tuple[Array, Array]:
    def both(gram: Array) -> tuple[Array, Array]:
        factor = jnp.linalg.cholesky(gram, upper=True, symmetrize_input=False)
        return factor, _inverse(factor)

    return jax.lax.platform_dependent(gram, cpu=one_at_a_time(both), default=both)


def _inverse(upper: Array) -> Array:
    identity = jnp.broadcast_to(jnp.eye(upper.shape[-1], dtype=upper.dtype), upper.shape)
    return jax.lax.linalg.triangular_solve(upper, identity, left_side=False, lower=False)
