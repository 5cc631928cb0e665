"""A matrix kept as the product of two thin factors, and its exact spectrum without forming it."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits import linear_algebra
from circuits_jax.circuits.linear_algebra import einsum, matmul


class SVD(NamedTuple):
    """U [...,M,r], singular values [...,r] in falling order, V^T [...,r,N] with r = min(M,N,R)."""

    U: Array
    S: Array
    Vh: Array


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

    @property
    def shape(self) -> tuple[int, ...]:
        """[...,M,N] of the matrix that the factors stand for."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def T(self) -> "LowRank":
        """The transpose, right^T left^T."""
        return LowRank(self.right.mT, self.left.mT)

    def __getitem__(self, index: object) -> "LowRank":
        """Picks from the leading (batch) axes, for example circuits[layer, head]."""
        return LowRank(self.left[index], self.right[index])

    def __matmul__(self, other: "LowRank") -> "LowRank":
        """The product as another LowRank, at the smaller of the two ranks: A (B C) D with B C [R1,R2]."""
        core = matmul(self.right, other.left)
        if core.shape[-2] <= core.shape[-1]:
            return LowRank(self.left, matmul(core, other.right))
        return LowRank(matmul(self.left, core), other.right)

    def rows(self, index: ArrayLike) -> Array:
        """The rows with these indices [I]: [...,I,N]."""
        return matmul(self.left[..., jnp.atleast_1d(jnp.asarray(index)), :], self.right)

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
        return jnp.linalg.norm(self._core()[1], axis=(-2, -1))

    def singular_values(self) -> Array:
        """[...,min(M,N,R)] in falling order, to about float eps of ||left|| ||right||.

        A circuit of lower rank than R, or zero, has singular values of exactly or nearly zero at the end.
        """
        return linear_algebra.svd(self._core()[1])[1]

    def svd(self) -> SVD:
        """Thin singular value decomposition U S V^T.

        Signs are fixed: in each column of U the entry of largest magnitude is positive. Vectors of (nearly) equal
        singular values are an arbitrary basis of their subspace; compare the subspaces then. Vectors of zero
        singular values are orthonormal and otherwise arbitrary.
        """
        (q_left, q_right), core = self._core()
        u, s, vh = linear_algebra.svd(core)
        u, vh = matmul(q_left, u), matmul(vh, q_right.mT)
        largest = jnp.take_along_axis(u, jnp.argmax(jnp.abs(u), axis=-2, keepdims=True), axis=-2)
        sign = jnp.where(largest < 0, -1.0, 1.0)
        return SVD(u * sign, s, vh * sign.mT)

    def eigenvalues(self) -> Array:
        """The eigenvalues that can differ from zero, complex [...,min(M,R)], in falling order of magnitude.

        The non-zero eigenvalues of left right [M,M] are those of right left [R,R]. The matrices are in general far
        from normal: an eigenvalue can be far less certain than a singular value.
        """
        _assert_square(self)
        wide = self.left.shape[-2] < self.left.shape[-1]
        small = matmul(self.left, self.right) if wide else matmul(self.right, self.left)
        values = linear_algebra.eigenvalues(small)
        return jnp.take_along_axis(values, jnp.argsort(-jnp.abs(values), axis=-1, stable=True), axis=-1)

    def _core(self) -> tuple[tuple[Array, Array], Array]:
        """(Q_left, Q_right) and the small C with left right = Q_left C Q_right^T."""
        rank = self.left.shape[-1]
        chex.assert_axis_dimension(self.right, -2, rank)
        q_left, r_left = linear_algebra.qr(self.left)
        q_right, r_right = linear_algebra.qr(self.right.mT)
        return (q_left, q_right), matmul(r_left, r_right.mT)


def _assert_square(circuit: LowRank) -> None:
    if circuit.shape[-2] != circuit.shape[-1]:
        raise ValueError(f"a square circuit is needed; got shape {list(circuit.shape)}")
