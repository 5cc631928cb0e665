"""What a circuit's spectrum or entries say in one number."""

import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.attention import token_ov, token_qk
from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights


def eigenvalue_positivity(eigenvalues: Array) -> Array:
    """Re sum(lambda) / sum |lambda| in [-1, 1] of complex [...,R] (Elhage et al. 2021); 0 when all are zero.

    1 when every eigenvalue is real and positive, about 0 for a random matrix, -1 when all are negative.
    """
    total = jnp.abs(eigenvalues).sum(-1)
    return eigenvalues.real.sum(-1) / jnp.where(total == 0, 1.0, total)


def copying_score(weights: CircuitWeights) -> Array:
    """eigenvalue_positivity of W_E W_OV W_U, [L,H] in [-1, 1]: whether moving a token raises its own logit."""
    return eigenvalue_positivity(token_ov(weights).eigenvalues())


def matching_score(weights: CircuitWeights) -> Array:
    """eigenvalue_positivity of W_E W_QK W_E^T, [L,H] in [-1, 1]: whether a token looks for its own copies.

    With rotary positions that is at offset 0, where a copy never is: see attention.qk for others.
    """
    return eigenvalue_positivity(token_qk(weights).eigenvalues())


def diagonal_gap(circuit: LowRank) -> Array:
    """Mean diagonal minus mean off-diagonal entry, [...]: tr/V - (sum - tr)/(V (V - 1)), in the entries' units.

    NaN for V = 1, which has no entry off the diagonal.
    """
    size = circuit.shape[-1]
    trace = circuit.trace()
    return trace / size - (circuit.sum() - trace) / (size * (size - 1))


def entry_variance(circuit: LowRank) -> tuple[Array, Array]:
    """Variance of the entries on the diagonal and off it, [...] each, without V x V.

    The second is NaN for V = 1, which has no entry off the diagonal.
    """
    size = circuit.shape[-1]
    n_off = size * (size - 1)
    mean_off = (circuit.sum() - circuit.trace()) / n_off
    # The mean is taken off as one more rank: taken off the squares, it would cancel digits of a small variance.
    shift = jnp.broadcast_to(-mean_off[..., None, None], (*circuit.left.shape[:-1], 1))
    ones = jnp.ones((*circuit.right.shape[:-2], 1, size))
    centred = LowRank(jnp.concatenate([circuit.left, shift], -1), jnp.concatenate([circuit.right, ones], -2))
    # Grams are exact enough for a variance, and products alone are cheap to compile and run inside a training scan.
    grams = matmul(centred.left.mT, centred.left) * matmul(centred.right, centred.right.mT)
    square_off = grams.sum((-2, -1)) - jnp.square(centred.diagonal()).sum(-1)
    return circuit.diagonal().var(-1), jnp.maximum(square_off / n_off, 0.0)
