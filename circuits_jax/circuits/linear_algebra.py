"""The dense linear algebra that the circuits need, safe on every backend.

Two rules hold for all of it. Matmul precision is HIGHEST: the defaults of TPU (bfloat16) and H100 (tf32) would
spoil spectra. And on CPU a batch of factorisations runs one matrix after the other: jaxlib spreads a batched LAPACK
call over the same few threads that run the program, and two such calls in one program, or one under forced host
devices, can wait for each other forever on a machine with two cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def matmul(a: Array, b: Array) -> Array:
    """a @ b. Equal batch axes are taken as one, in which form XLA's CPU multiplies up to 2.7 times as fast."""
    highest = jax.lax.Precision.HIGHEST
    batch = a.shape[:-2]
    if len(batch) < 2 or batch != b.shape[:-2]:
        return jnp.matmul(a, b, precision=highest)
    flat = jnp.matmul(*(x.reshape(-1, *x.shape[-2:]) for x in (a, b)), precision=highest)
    return flat.reshape(*batch, *flat.shape[-2:])


def one_at_a_time(factorise: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A function of one matrix [M,N] as one of a batch [...,M,N] that takes them in turn, under vmap too."""
    one_by_one = jax.vmap(jax.custom_batching.sequential_vmap(factorise))

    def serial(matrices: Array) -> Any:
        batch = matrices.shape[:-2]  # as one axis, so one loop to compile
        factors = one_by_one(matrices.reshape(-1, *matrices.shape[-2:]))
        return jax.tree.map(lambda factor: factor.reshape(*batch, *factor.shape[1:]), factors)

    return serial


def _one_at_a_time_on_cpu(factorise: Callable[[Array], Any]) -> Callable[[Array], Any]:
    def factorise_batch(matrices: Array) -> Any:
        return jax.lax.platform_dependent(matrices, cpu=one_at_a_time(factorise), default=factorise)

    return factorise_batch


qr = _one_at_a_time_on_cpu(lambda a: tuple(jnp.linalg.qr(a)))
qr.__doc__ = (
    "Householder's thin QR of [...,M,N]: orthonormal columns [...,M,r], upper triangle [...,r,N], r = min(M,N)."
)

svd = _one_at_a_time_on_cpu(lambda a: tuple(jnp.linalg.svd(a, full_matrices=False)))
svd.__doc__ = "Thin SVD of [...,M,N]: U [...,M,r], singular values [...,r] in falling order, V^T [...,r,N]."

singular_values = _one_at_a_time_on_cpu(lambda a: jnp.linalg.svd(a, compute_uv=False))
singular_values.__doc__ = "Singular values [...,r] of [...,M,N] in falling order, for less than half of svd's cost."

lapack_eigenvalues = one_at_a_time(jnp.linalg.eigvals)
lapack_eigenvalues.__doc__ = "Complex eigenvalues [...,N] of real [...,N,N], unsorted. CPU only: see eigenvalues.py."

lapack_schur = one_at_a_time(lambda a: tuple(jax.lax.linalg.schur(a)))
lapack_schur.__doc__ = "Real Schur form A = Z T Z^T of [...,N,N]: quasi-triangular T, orthogonal Z. CPU only."
