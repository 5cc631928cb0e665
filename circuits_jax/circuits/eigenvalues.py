"""Eigenvalues of batches of real non-symmetric matrices, on every backend.

JAX has no such solver for TPU, and on GPU it takes one matrix after the other. This is Francis' double-shift QR
algorithm (Golub & Van Loan, Matrix Computations, 7.5; deflation and exceptional shifts as in LAPACK's lahqr) with two
changes for accelerators. A whole batch walks through its sweeps together, with the batch on the fastest axis, each
matrix in its own active window; and arithmetic stays real, so that conjugate pairs are exact. On CPU, LAPACK does it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import linear_algebra
from circuits_jax.circuits.linear_algebra import einsum

SWEEPS_PER_EIGENVALUE = 30  # as LAPACK; about 1.5 are used
BALANCING_STEPS = 10
TRACE_TOLERANCE = 50.0  # in float eps; up to 7 were seen (LAPACK and own, R from 2 to 256)


class Eigenvalues(NamedTuple):
    """values: complex [...,R], unsorted, NaN where a matrix did not converge. converged: bool [...]."""

    values: Array
    converged: Array


def eigenvalues(matrices: Array) -> Eigenvalues:
    """Eigenvalues of real [...,R,R], each within a few float eps of ||A|| of those of a matrix A + E.

    converged is False, and the values are NaN, where the iteration did not end, where an entry is not finite, and
    where tr A or tr A^2 are not those of the values: convergence is checked and never assumed.
    """
    small, scale = scaled(matrices)
    values = jax.lax.platform_dependent(small, cpu=linear_algebra.lapack_eigenvalues, default=francis)
    values, converged = checked(small, values)
    return Eigenvalues(times(values, scale[..., None]), converged)


def times(values: Array, scale: Array) -> Array:
    """Complex values times a real scale, without a complex product, which could overflow on the way."""
    return jax.lax.complex(values.real * scale, values.imag * scale)


def checked(matrices: Array, values: Array) -> Eigenvalues:
    """The values [...,R] for the matrices [...,R,R], NaN where they do not have the traces of A and A^2.

    |sum(lambda) - tr A| <= c eps sqrt(R) ||A||_F and |sum(lambda^2) - tr A^2| <= c eps sqrt(R) ||A||_F^2 with
    c = TRACE_TOLERANCE: a backward error E moves the first by at most sqrt(R) ||E||_F, the second by 2 ||A||_F ||E||_F.
    """
    square = jnp.square(matrices).sum((-2, -1))
    bound = TRACE_TOLERANCE * jnp.finfo(matrices.dtype).eps * math.sqrt(matrices.shape[-1])
    trace, trace_of_square = jnp.trace(matrices, axis1=-2, axis2=-1), einsum("...ij,...ji->...", matrices, matrices)
    converged = jnp.abs(values.sum(-1) - trace) <= bound * jnp.sqrt(square)
    converged &= jnp.abs((values * values).sum(-1) - trace_of_square) <= bound * square
    return Eigenvalues(jnp.where(converged[..., None], values, jnp.nan), converged)


@jax.custom_batching.custom_vmap
def francis(matrices: Array) -> Array:
    """Eigenvalues [...,R] of real [...,R,R] by the batched Francis algorithm; NaN where it did not converge."""
    triangle, _, converged = _schur(_balanced(matrices), with_vectors=False)
    return jnp.where(converged[..., None], of_quasi_triangle(triangle), jnp.nan)


@francis.def_vmap
def _(axis_size: int, in_batched: list[bool], matrices: Array) -> tuple[Array, bool]:
    return francis(matrices), True


@jax.custom_batching.custom_vmap
def francis_schur(matrices: Array) -> tuple[Array, Array]:
    """Real Schur form A = Z T Z^T of [...,R,R]: quasi-triangular T and orthogonal Z; NaN where it did not converge."""
    triangle, vectors, converged = _schur(matrices, with_vectors=True)
    keep = converged[..., None, None]
    return jnp.where(keep, triangle, jnp.nan), jnp.where(keep, vectors, jnp.nan)


@francis_schur.def_vmap
def _(axis_size: int, in_batched: list[bool], matrices: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    return francis_schur(matrices), (True, True)


def scaled(matrices: Array) -> tuple[Array, Array]:
    """The matrices with entries below 2, and the power of two [...] that was taken out, which rounds nothing.

    Raises:
        ValueError: the matrices are not square, or not real.
    """
    if matrices.ndim < 2 or matrices.shape[-2] != matrices.shape[-1] or jnp.iscomplexobj(matrices):
        raise ValueError(f"matrices must be real [...,R,R]; got {matrices.dtype} {list(matrices.shape)}")
    largest = jnp.max(jnp.abs(matrices), axis=(-2, -1), initial=0.0)
    scale = _power_of_two(largest)
    return matrices / scale[..., None, None], scale


def _power_of_two(x: Array) -> Array:
    """The power of two in (x/2, x], for x > 0; 1 otherwise."""
    return jnp.ldexp(jnp.ones_like(x), jnp.frexp(jnp.where(x > 0, x, 1.0))[1] - 1)


def _balanced(matrices: Array) -> Array:
    """D A D^-1, D diagonal of powers of two, with rows and columns of like norm off the diagonal (Osborne 1960).

    All rows take half of their step at once, so that an imbalance halves (in its logarithm) every time.
    """
    size = matrices.shape[-1]

    def step(_: int, a: Array) -> Array:
        square = jnp.square(a) * (1 - jnp.eye(size, dtype=a.dtype))
        ratio = square.sum(-2) / square.sum(-1)  # of column to row, squared; 0, infinite or NaN where one is zero
        exponent = jnp.where((ratio > 0) & (ratio < jnp.inf), jnp.round(jnp.log2(ratio) / 8), 0.0).astype(jnp.int32)
        return jnp.ldexp(a, exponent[..., :, None] - exponent[..., None, :])

    return jax.lax.fori_loop(0, BALANCING_STEPS, step, matrices)


def _schur(matrices: Array, with_vectors: bool) -> tuple[Array, Any, Array]:
    """T [...,R,R], Z [...,R,R] (None without vectors) and converged [...]."""
    *batch, size, _ = matrices.shape
    hessenberg, basis = jax.vmap(_hessenberg)(matrices.reshape(-1, size, size))
    h, z, converged = _to_quasi_triangle(_inside(hessenberg), _inside(basis) if with_vectors else None)

    def outside(x: Array) -> Array:
        return x[1:-1, 1:-1].transpose(2, 0, 1).reshape(*batch, size, size)

    return outside(h), None if z is None else outside(z), converged.reshape(batch)


def _inside(x: Array) -> Array:
    """[B,R,R] as the sweeps see it, [R+2,R+2,B]: the batch on the fastest axis, and a border of zeros.

    With the border a window of three rows or columns always fits, and the first row has a (zero) entry to its left;
    so rows count from 1.
    """
    return jnp.pad(x.transpose(1, 2, 0), ((1, 1), (1, 1), (0, 0)))


def _hessenberg(a: Array) -> tuple[Array, Array]:
    """H and Z of A = Z H Z^T, all [R,R]: one Householder reflection from both sides clears each column of H."""
    place = jnp.arange(len(a))

    def clear(column: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        h, z = state
        x = jnp.where(place > column, h[:, column], 0.0)
        v, tau, _ = _reflector(x, column + 1)
        h = h - jnp.outer(tau * v, einsum("i,ij->j", v, h))
        return h - jnp.outer(einsum("ij,j->i", h, v), tau * v), z - jnp.outer(einsum("ij,j->i", z, v), tau * v)

    return jax.lax.fori_loop(0, len(a) - 2, clear, (a, jnp.eye(len(a), dtype=a.dtype)))


def _reflector(x: Array, place: Array | int) -> tuple[Array, Array, Array]:
    """v [N,...], tau [...], beta [...] with (1 - tau v v^T) x = beta e_place; tau = 0 if x [N,...] has that form."""
    here = (jnp.arange(len(x)) == place).reshape(-1, *[1] * (x.ndim - 1))
    scale = _power_of_two(jnp.abs(x).max(0))  # squares that underflow would give a reflection that is none
    x = x / scale
    first, square = jnp.where(here, x, 0.0).sum(0), jnp.square(x)
    done = jnp.where(here, 0.0, square).sum(0) == 0
    norm = jnp.sqrt(square.sum(0))
    beta = jnp.where(done, first, jnp.where(first > 0, -norm, norm))
    pivot = jnp.where(done, 1.0, first - beta)
    return jnp.where(here, 1.0, x / pivot), jnp.where(done, 0.0, -pivot / jnp.where(done, 1.0, beta)), beta * scale


def _to_quasi_triangle(h: Array, z: Array | None) -> tuple[Array, Array | None, Array]:
    """Sweeps until no two neighbouring subdiagonal entries are left, or the sweeps run out."""
    size, n_matrices = len(h) - 2, h.shape[-1]
    finite = jnp.isfinite(h).all((0, 1))
    norm = jnp.sqrt(jnp.square(h).sum((0, 1)))
    h = jnp.where(finite, h, 0.0)

    def window(h: Array, stuck: Array) -> tuple[Array, Array, Array]:
        """H without its negligible subdiagonal entries, and the last window [low, high] that is still too long.

        Negligible against the neighbours on the diagonal, so that small eigenvalues of graded matrices keep digits;
        where rounding elsewhere in the window makes that impossible (stuck), against the norm of the matrix.
        """
        below = jnp.diagonal(h, -1).T  # entry i: row i + 1, column i
        diagonal = jnp.abs(jnp.diagonal(h).T)
        neighbours = diagonal[:-1] + diagonal[1:]
        small = jnp.finfo(h.dtype).eps * jnp.where((neighbours == 0) | (stuck >= 10), norm, neighbours)
        linked = jnp.abs(below) > small
        cleared = jnp.pad(jnp.where(linked, below, 0.0), ((1, 0), (0, 0)))
        row, col = jnp.arange(size + 2)[:, None, None], jnp.arange(size + 2)[:, None]
        h = jnp.where(row == col + 1, cleared[:, None], jnp.where(row > col + 1, 0.0, h))
        place = jnp.arange(1, size + 2)[:, None]  # of the lower row of a link
        high = jnp.max(jnp.where(linked & jnp.pad(linked[:-1], ((1, 0), (0, 0))), place, 0), axis=0)
        low = jnp.max(jnp.where(~linked & (place <= high), place, 0), axis=0)
        return h, low, high

    def unfinished(state: tuple[Any, ...]) -> Array:
        *_, high, _, sweeps = state
        return jnp.any(high > 0) & (sweeps < SWEEPS_PER_EIGENVALUE * max(size, 10))

    def sweep(state: tuple[Any, ...]) -> tuple[Any, ...]:
        h, z, low, high, stuck, sweeps = state
        start = _first_column(h, low, high, stuck)

        def step(row: Array, state: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            return _chase(row, *state, start, low, high)

        first, last = jnp.min(jnp.where(high > 0, low, size)), jnp.max(high)
        h, z = jax.lax.fori_loop(first, last, step, (h, z))
        h, low, now = window(h, stuck)
        return h, z, low, now, jnp.where(now == high, stuck + 1, 0), sweeps + 1

    stuck = jnp.zeros(n_matrices, jnp.int32)
    h, low, high = window(h, stuck)
    state: tuple[Any, ...] = (h, z, low, high, stuck, jnp.int32(0))
    h, z, _, high, *_ = jax.lax.while_loop(unfinished, sweep, state)
    return h, z, (high == 0) & finite


def _first_column(h: Array, low: Array, high: Array, stuck: Array) -> Array:
    """First three entries of (H - s1)(H - s2) e_low, [3,B], up to scale; s1, s2 the eigenvalues of the last 2 x 2."""
    diagonal, above, below = (jnp.diagonal(h, k).T for k in (0, 1, -1))

    def at(band: Array, place: Array) -> Array:
        return jnp.take_along_axis(band, jnp.clip(place, 0, len(band) - 1)[None], axis=0)[0]

    # The first two columns and the last 2 x 2 block of the window.
    first = at(diagonal, low), at(above, low), at(below, low), at(diagonal, low + 1), at(below, low + 1)
    end = at(diagonal, high - 1), at(above, high - 1), at(below, high - 1), at(diagonal, high), at(below, high - 2)
    entries = jnp.stack([*first, *end])
    entries = entries / jnp.maximum(jnp.abs(entries).max(0), jnp.finfo(h.dtype).tiny)  # or products could underflow
    a, b, c, d, e, before, over, corner, last, above_corner = entries
    exceptional = (stuck % 10 == 9) & (high > 0)
    jolt = jnp.abs(corner) + jnp.abs(above_corner)
    before = jnp.where(exceptional, 0.75 * jolt + last, before)
    last = jnp.where(exceptional, before, last)
    product = jnp.where(exceptional, -0.4375 * jolt * jolt, corner * over)
    half = (before - last) / 2
    discriminant = half * half + product
    root = jnp.sqrt(jnp.abs(discriminant))
    middle = (before + last) / 2
    nearer = jnp.where(half > 0, middle - root, middle + root)  # of two real shifts, the one nearer to the last entry
    is_real = discriminant >= 0
    total = jnp.where(is_real, 2 * nearer, 2 * middle)
    # (h - s1)(h - s2) = (h - middle)^2 - discriminant, without the cancelling products of its expansion
    polynomial = jnp.where(is_real, jnp.square(a - nearer), jnp.square(a - middle) - discriminant)
    return jnp.stack([polynomial + b * c, c * (a + d - total), c * e])


def _chase(row: Array, h: Array, z: Array | None, start: Array, low: Array, high: Array) -> tuple[Array, Array | None]:
    """One step of a sweep: a reflection of rows and columns row ... row + 2 in the matrices whose window holds it."""
    n, _, n_matrices = h.shape
    active = (low <= row) & (row < high)
    begins = low == row
    rows = jax.lax.dynamic_slice(h, (row, 0, 0), (3, n, n_matrices))
    bulge = jax.lax.dynamic_slice(rows, (0, row - 1, 0), (3, 1, n_matrices))[:, 0]
    x = jnp.where(begins, start, bulge)
    x = jnp.where(active & (row + jnp.arange(3)[:, None] <= high), x, 0.0)
    v, tau, beta = _reflector(x, 0)
    rows = rows - v[:, None] * (tau * (rows[0] * v[0] + rows[1] * v[1] + rows[2] * v[2]))
    # Behind the bulge, zeros are set and not computed.
    left = jax.lax.dynamic_slice(rows, (0, row - 1, 0), (3, 1, n_matrices))
    cleared = jnp.zeros_like(left).at[0, 0].set(beta)
    left = jnp.where(active & ~begins, cleared, left)
    rows = jax.lax.dynamic_update_slice(rows, left, (0, row - 1, 0))
    h = jax.lax.dynamic_update_slice(h, rows, (row, 0, 0))

    def reflect_columns(x: Array) -> Array:
        columns = jax.lax.dynamic_slice(x, (0, row, 0), (len(x), 3, n_matrices))
        along = columns[:, 0] * v[0] + columns[:, 1] * v[1] + columns[:, 2] * v[2]
        columns = columns - (tau * along)[:, None] * v
        return jax.lax.dynamic_update_slice(x, columns, (0, row, 0))

    return jax.tree.map(reflect_columns, (h, z))


def of_quasi_triangle(t: Array) -> Array:
    """Eigenvalues [...,R] of the 1 x 1 and 2 x 2 blocks on the diagonal of [...,R,R]."""
    diagonal, above, below = (jnp.diagonal(t, k, axis1=-2, axis2=-1) for k in (0, 1, -1))
    upper, lower = _pair(diagonal[..., :-1], above, below, diagonal[..., 1:])
    pair = below != 0
    pad = [(0, 0)] * (t.ndim - 2)
    before, after = (jnp.pad(pair, [*pad, side]) for side in ((0, 1), (1, 0)))
    upper, lower = jnp.pad(upper, [*pad, (0, 1)]), jnp.pad(lower, [*pad, (1, 0)])
    return jnp.where(before, upper, jnp.where(after, lower, diagonal))


def _pair(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """Both eigenvalues of ((a, b), (c, d)); the smaller in magnitude without cancellation."""
    half = (a - d) / 2
    discriminant = half * half + b * c
    root = jnp.sqrt(jnp.abs(discriminant))
    far = half + jnp.where(half < 0, -root, root)
    middle, is_real = (a + d) / 2, discriminant >= 0
    upper = jnp.where(is_real, d + far, jax.lax.complex(middle, root))
    lower = jnp.where(is_real, d - b * c / jnp.where(far == 0, 1.0, far), jax.lax.complex(middle, -root))
    return upper, lower
