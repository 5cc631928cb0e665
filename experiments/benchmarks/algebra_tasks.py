"""What algebra.py measures: the tasks with their numbers of operations and aims, and the weights."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import circuits_jax as cj


@dataclasses.dataclass(frozen=True)
class Shape:
    """L, H, D, K and V of a model."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    n_vocab: int

    @property
    def all_heads(self) -> int:
        """L H."""
        return self.n_layers * self.n_heads


GPT2_SMALL = Shape(12, 12, 768, 64, 50257)
TINY = Shape(2, 2, 32, 8, 100)


def random_weights(shape: Shape, seed: int) -> cj.CircuitWeights:
    """Normal entries of variance 1/D, from one NumPy seed."""
    rng = np.random.default_rng(seed)
    n_layers, n_heads, d, k, v = dataclasses.astuple(shape)

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(size, np.float32) / np.float32(np.sqrt(d)))

    per_head = (n_layers, n_heads)
    return cj.CircuitWeights(
        W_E=normal(v, d), W_Q=normal(*per_head, d, k), W_K=normal(*per_head, d, k), W_V=normal(*per_head, d, k),
        W_O=normal(*per_head, k, d), W_U=normal(d, v), n_context=8, positions="none",
    )  # fmt: skip


def solver_batch(weights: cj.CircuitWeights) -> jax.Array:
    """The matrices of the eigenvalue_solver task, [L H,K,K]: W_O W_V of all heads."""
    small = jnp.matmul(weights.W_O, weights.W_V, precision="highest")
    return small.reshape(-1, *small.shape[-2:])


# Useful operations, whatever an implementation really does. QR of [m,n] by Householder's; the K x K decompositions by
# the table of Golub and Van Loan: 8/3 n^3 for singular values, 21 n^3 for U, S, V and 10 n^3 for eigenvalues.


def _triangle(m: int, n: int) -> float:
    """R of a QR of [m,n]; Q costs as much again."""
    return 2 * n**2 * (m - n / 3)


def _singular_values(s: Shape) -> float:
    """Two triangles, their K x K product, its singular values."""
    return s.all_heads * (2 * _triangle(s.d_model, s.d_head) + (2 + 8 / 3) * s.d_head**3)


def _svd(s: Shape) -> float:
    """Two QRs with Q, a K x K product, its SVD, Q times its vectors."""
    d, k = s.d_model, s.d_head
    return s.all_heads * (4 * _triangle(d, k) + (2 + 21) * k**3 + 4 * d * k**2)


def _eigenvalues(s: Shape) -> float:
    """A K x K product and its eigenvalues."""
    return s.all_heads * (2 * s.d_model * s.d_head**2 + 10 * s.d_head**3)


def full_ov_products(s: Shape) -> float:
    """W_U W_E once; W_O (W_U W_E) and that times W_V for all heads."""
    d, k = s.d_model, s.d_head
    return 2 * s.n_vocab * d**2 + s.all_heads * (2 * k * d**2 + 2 * d * k**2)


def _full_ov(s: Shape) -> float:
    """Those products, and eigenvalues."""
    return full_ov_products(s) + s.all_heads * 10 * s.d_head**3


def _full_qk(s: Shape) -> float:
    """The triangle of W_E once; that times W_Q and W_K; singular values as above."""
    return _triangle(s.n_vocab, s.d_model) + s.all_heads * 4 * s.d_model**2 * s.d_head + _singular_values(s)


def _composition(s: Shape) -> float:
    """Triangles of four factors, four folds, and K x D times D x K for three kinds of all pairs, earlier to later."""
    d, k, pairs = s.d_model, s.d_head, s.n_layers * (s.n_layers - 1) / 2 * s.n_heads**2
    return 3 * pairs * 2 * d * k**2 + s.all_heads * (4 * _triangle(d, k) + 4 * 2 * d * k**2)


FLOPS: dict[str, Callable[[Shape], float]] = {
    "ov_singular_values": _singular_values,
    "qk_singular_values": _singular_values,
    "ov_svd": _svd,
    "qk_svd": _svd,
    "ov_eigenvalues": _eigenvalues,
    "qk_eigenvalues": _eigenvalues,
    "full_ov_eigenvalues": _full_ov,
    "full_qk_singular_values": _full_qk,
    "composition": _composition,
    "eigenvalue_solver": lambda s: s.all_heads * 10 * s.d_head**3,
}
TASKS = tuple(FLOPS)

# Aims on two CPU cores.
TIMES_FASTER_THAN_TRANSFORMER_LENS = {
    "ov_singular_values": 6, "qk_singular_values": 6, "ov_svd": 3, "qk_svd": 3, "full_ov_eigenvalues": 20,
    "composition": 13,
}  # fmt: skip
TIMES_LEANER_THAN_TRANSFORMER_LENS = {"composition": 30}
FRACTION_OF_PEAK = {"composition": 0.6, "full_ov_eigenvalues": 0.8}
TIME_OF_TORCH = {task: 0.95 for task in TASKS if task != "eigenvalue_solver"}  # where CPUs use LAPACK, not francis
