"""A small algebra of matrices kept as the product of two thin factors; the matrix itself is never formed."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits import linear_algebra, orthonormalisation
from circuits_jax.circuits.eigenvalues import eigenvalues
from circuits_jax.circuits.eigenvectors import Eigen, eigenvectors
from circuits_jax.circuits.linear_algebra import einsum, matmul

ENTRIES_AT_ONCE = 2**23  # of a product that is searched block by block, 32 MiB


class SVD(NamedTuple):
    """U [...,M,r], singular values [...,r] in falling order, V^T [...,r,N] with r = min(M,N,R)."""

    U: Array
    S: Array
    Vh: Array


class Entries(NamedTuple):
    """Entries of a matrix: values [...,k] at (rows [...,k], columns [...,k])."""

    values: Array
    rows: Array
    columns: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The matrix left @ right [...,M,N] of rank at most R, batched over leading axes; M x N is never formed.

    Attributes:
        left: [...,M,R]. For a circuit: the side that reads (queries for QK, the attended residual for OV).
        right: [...,R,N]. The other side (keys for QK, what is written for OV).
    """

    left: Array
    right: Array

    __array_ufunc__ = None  # numpy arrays then leave array @ circuit and array * circuit to this class

    @property
    def shape(self) -> tuple[int, ...]:
        """[...,M,N] of the matrix that the factors stand for; the leading axes of the two factors broadcast."""
        batch = jnp.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return (*batch, self.left.shape[-2], self.right.shape[-1])

    @property
    def T(self) -> "LowRank":
        """The transpose, right^T left^T."""
        return LowRank(self.right.mT, self.left.mT)

    def __getitem__(self, index: Any) -> "LowRank":
        """Picks from the leading (batch) axes, for example circuits[layer, head] or circuits[..., head].

        Raises:
            IndexError: a plain index out of range; a traced one takes the nearest entry, as in JAX.
        """
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(index)):
            np.broadcast_to(0, self.shape[:-2])[index]  # numpy checks the bounds
        index = (*(index if isinstance(index, tuple) else (index,)), slice(None), slice(None))
        whole = self._with_batch(self.shape[:-2])
        return LowRank(whole.left[index], whole.right[index])

    def __matmul__(self, other: "LowRank | Array") -> "LowRank":
        """The product as another LowRank, at the smaller of the two ranks: A (B C) D with B C [R1,R2].

        Leading axes broadcast: circuits[:, None] @ circuits[None] are all pairs. An array [...,N,I] keeps the rank.

        Raises:
            ValueError: the inner sizes differ, or the array is a vector (make it a matrix of one column).
        """
        _assert_product(self, other)
        if not isinstance(other, LowRank):
            return LowRank(self.left, matmul(self.right, other))
        core = matmul(self.right, other.left)
        if core.shape[-2] <= core.shape[-1]:
            return LowRank(self.left, matmul(core, other.right))
        return LowRank(matmul(self.left, core), other.right)

    def __rmatmul__(self, other: Array) -> "LowRank":
        """An array [...,I,M] times this: [...,I,N], at the same rank."""
        _assert_product(other, self)
        return LowRank(matmul(other, self.left), self.right)

    def __add__(self, other: "LowRank") -> "LowRank":
        """The sum, at the sum of the ranks."""
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(f"a sum needs equal shapes; got {list(self.shape)} and {list(other.shape)}")
        batch = jnp.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        a, b = self._with_batch(batch), other._with_batch(batch)
        return LowRank(jnp.concatenate([a.left, b.left], -1), jnp.concatenate([a.right, b.right], -2))

    def __mul__(self, scale: ArrayLike) -> "LowRank":
        """Times a number, or one for each matrix of the batch, [...]."""
        return LowRank(self.left * jnp.asarray(scale)[..., None, None], self.right)

    __rmul__ = __mul__

    def __neg__(self) -> "LowRank":
        """Minus the matrix."""
        return LowRank(-self.left, self.right)

    def __sub__(self, other: "LowRank") -> "LowRank":
        """The difference, at the sum of the ranks."""
        return self + -other

    def rows(self, index: ArrayLike) -> Array:
        """The rows with these indices [I]: [...,I,N]; NaN for a row that does not exist."""
        return matmul(_take(self.left, index, -2), self.right)

    def columns(self, index: ArrayLike) -> Array:
        """The columns with these indices [J]: [...,M,J]; NaN for a column that does not exist."""
        return matmul(self.left, _take(self.right, index, -1))

    def block(self, rows: ArrayLike, columns: ArrayLike) -> Array:
        """The entries at rows [I] and columns [J]: [...,I,J]; NaN for those that do not exist."""
        return matmul(_take(self.left, rows, -2), _take(self.right, columns, -1))

    def top_k(self, k: int) -> Entries:
        """The k largest entries, in falling order; [...,k] each. For the smallest: (-circuit).top_k(k).

        Blocks of rows of one matrix at a time are formed and forgotten, about 32 MiB each. Ties go to the first in
        row-major order; NaN counts as the largest, so that it shows.

        Raises:
            ValueError: k is not between 1 and M N.
        """
        m, n = self.shape[-2:]
        if not 1 <= k <= m * n:
            raise ValueError(f"k must be between 1 and the number of entries {m * n}; got {k}")
        height = max(1, min(m, ENTRIES_AT_ONCE // n))
        n_blocks = -(-m // height)

        def of_one(circuit: LowRank) -> Entries:
            def merge(best: Entries, block: Array) -> tuple[Entries, None]:
                # The last block starts early enough to be whole; rows that it shares with the one before count once.
                start = jnp.minimum(block * height, m - height)
                rows = start + jnp.arange(height)
                values = matmul(jax.lax.dynamic_slice_in_dim(circuit.left, start, height), circuit.right)
                values = jnp.where(values == 0, 0.0, values)  # -0.0, which top_k would put behind 0.0
                values = jnp.where((rows >= block * height)[:, None], values, -jnp.inf)
                values, place = jax.lax.top_k(values.reshape(-1), min(k, height * n))
                found = Entries(values, rows[place // n], place % n)
                both = jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), best, found)
                order = jax.lax.top_k(both.values, k)[1]
                return jax.tree.map(lambda x: x[order], both), None

            none = Entries(jnp.full(k, -jnp.inf, circuit.left.dtype), *(jnp.zeros(k, jnp.int32) for _ in range(2)))
            return jax.lax.scan(merge, none, jnp.arange(n_blocks))[0]

        return self.one_by_one(of_one)

    def one_by_one(self, function: Callable[["LowRank"], Any]) -> Any:
        """A function of one matrix over the batch, one matrix after the other, so that memory is that of one."""
        batch = self.shape[:-2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), self._with_batch(batch))
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), jax.lax.map(function, flat))

    def diagonal(self) -> Array:
        """The entries (i,i), [...,min(M,N)]."""
        n = min(self.shape[-2:])
        return einsum("...mr,...rm->...m", self.left[..., :n, :], self.right[..., :n])

    def trace(self) -> Array:
        """tr = sum of <row i of left, column i of right>, [...]."""
        _assert_square(self)
        return einsum("...mr,...rm->...", self.left, self.right)

    def sum(self) -> Array:
        """Sum over all M x N entries, [...]."""
        return einsum("...r,...r->...", self.left.sum(-2), self.right.sum(-1))

    def frobenius_norm(self) -> Array:
        """||left right||_F through triangular factors, [...]; exact zero for a zero factor.

        Gram matrices would lose a norm that is small against the factors' (when left and right nearly cancel).
        """
        return jnp.linalg.norm(self._small(), axis=(-2, -1))

    def spectral_norm(self) -> Array:
        """The largest singular value, [...]."""
        return self.singular_values()[..., 0]

    def singular_values(self) -> Array:
        """[...,min(M,N,R)] in falling order, to about float eps of ||left|| ||right||.

        A circuit of lower rank than R, or zero, has singular values of exactly or nearly zero at the end.
        """
        return linear_algebra.singular_values(self._small())

    def svd(self) -> SVD:
        """Thin singular value decomposition U S V^T.

        Signs are fixed: in each column of U the entry of largest magnitude is positive. Vectors of (nearly) equal
        singular values are an arbitrary basis of their subspace; compare the subspaces then (subspace_overlap).
        Vectors of zero singular values are orthonormal and otherwise arbitrary.
        """
        chex.assert_axis_dimension(self.right, -2, self.left.shape[-1])
        q_left, r_left = orthonormalisation.qr(self.left)
        q_right, r_right = orthonormalisation.qr(self.right.mT)
        u, s, vh = linear_algebra.svd(matmul(r_left, r_right.mT))
        u, vh = matmul(q_left, u), matmul(vh, q_right.mT)
        sign = jnp.where(u.max(-2, keepdims=True) >= -u.min(-2, keepdims=True), 1.0, -1.0)
        return SVD(u * sign, s, vh * sign.mT)

    def eigenvalues(self) -> Array:
        """The eigenvalues that can differ from zero, complex [...,min(M,R)], in falling order of magnitude.

        The non-zero eigenvalues of left right [M,M] are those of right left [R,R]. The matrices are in general far
        from normal: an eigenvalue can be far less certain than a singular value (see eigenvectors().condition). NaN for
        a matrix whose iteration did not converge (see circuits.eigenvalues).
        """
        _assert_square(self)
        wide = self.left.shape[-2] < self.left.shape[-1]
        values = eigenvalues(matmul(self.left, self.right) if wide else matmul(self.right, self.left)).values
        return jnp.take_along_axis(values, jnp.argsort(-jnp.abs(values), axis=-1, stable=True), axis=-1)

    def eigenvectors(self) -> Eigen:
        """Eigenvalues as above with left and right eigenvectors in M dimensions and each value's condition.

        With left = Q R, Q orthonormal, and B = R right: if B Q u = lambda u, then Q u is a right eigenvector of left
        right = Q B. If w^H B Q = lambda w^H, then w^H B is a left one; where that vanishes, as it can for lambda = 0,
        w^H Q^T is. So a circuit of lower rank than R, or zero, has vectors of length 1 too.
        """
        _assert_square(self)
        if self.left.shape[-2] < self.left.shape[-1]:
            return eigenvectors(matmul(self.left, self.right))
        q, r = orthonormalisation.qr(self.left)
        b = matmul(r, self.right)
        small = eigenvectors(matmul(b, q))

        def misfit(left: Array) -> Array:
            rest = matmul(b.mT, matmul(q.mT, left)) - small.values.conj()[..., None, :] * left
            return jnp.linalg.norm(rest, axis=-2, keepdims=True)

        right, left, other = matmul(q, small.right), _unit_columns(matmul(b.mT, small.left)), matmul(q, small.left)
        vanishes = jnp.linalg.norm(left, axis=-2, keepdims=True) == 0  # a perfect fit, and no vector
        left = jnp.where(vanishes | (misfit(left) >= misfit(other)), other, left)
        overlap = jnp.abs(einsum("...mr,...mr->...r", left.conj(), right))
        return small._replace(left=left, right=right, condition=1 / overlap)

    def _small(self) -> Array:
        """An R x R (or smaller) matrix with the singular values of left right: the product of triangular factors."""
        chex.assert_axis_dimension(self.right, -2, self.left.shape[-1])
        r_left, r_right = orthonormalisation.triangle(self.left), orthonormalisation.triangle(self.right.mT)
        return matmul(r_left, r_right.mT)

    def _with_batch(self, batch: tuple[int, ...]) -> "LowRank":
        """The same with these leading axes on both factors."""
        return LowRank(*(jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (self.left, self.right)))


def subspace_overlap(a: Array, b: Array) -> Array:
    """Mean squared cosine of the principal angles between two column spans, [...] in [0, 1].

    ||Q_a^T Q_b||_F^2 / min(r, s) for a [...,M,r] and b [...,M,s] of full column rank, Q their orthonormal bases: 1
    when one span holds the other, 0 when they are orthogonal, max(r, s) / M on average for random spans.
    """
    cosines = matmul(orthonormalisation.qr(a)[0].mT, orthonormalisation.qr(b)[0])
    return jnp.square(cosines).sum((-2, -1)) / min(cosines.shape[-2:])


def _take(x: Array, index: ArrayLike, axis: int) -> Array:
    return jnp.take(x, jnp.atleast_1d(jnp.asarray(index)), axis=axis, mode="fill")


def _unit_columns(x: Array) -> Array:
    length = jnp.linalg.norm(x, axis=-2, keepdims=True)
    return x / jnp.where(length == 0, 1.0, length)


def _assert_square(circuit: LowRank) -> None:
    if circuit.shape[-2] != circuit.shape[-1]:
        raise ValueError(f"a square circuit is needed; got shape {list(circuit.shape)}")


def _assert_product(a: LowRank | Array, b: LowRank | Array) -> None:
    if min(len(a.shape), len(b.shape)) < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a product needs [...,M,N] @ [...,N,I]; got {list(a.shape)} and {list(b.shape)}")
