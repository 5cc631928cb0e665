"""What a circuit's spectrum or entries say in one number."""

import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.attention import token_ov, token_qk
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights


def eigenvalue_positivity(eigenvalues: Array) -> Array:
    """Re sum(lambda) / sum |lambda| in [-1, 1] of complex [...,R] (Elhage et al. 2021); 0 when all are zero.

    1 when every eigenvalue is real and positive, about 0 for a random matrix, -1 when all are negative.
    """
    total = jnp.abs(eigenvalues).sum(-1)
    return jnp.where(total > 0, eigenvalues.real.sum(-1) / jnp.where(total > 0, total, 1.0), 0.0)


def copying_score(weights: CircuitWeights) -> Array:
    """eigenvalue_positivity of W_E W_OV W_U, [L,H] in [-1, 1]: whether moving a token raises its own logit."""
    return eigenvalue_positivity(token_ov(weights).eigenvalues())


def matching_score(weights: CircuitWeights) -> Array:
    """eigenvalue_positivity of W_E W_QK W_E^T, [L,H] in [-1, 1]: whether a token looks for its own copies."""
    return eigenvalue_positivity(token_qk(weights).eigenvalues())


def diagonal_gap(circuit: LowRank) -> Array:
    """Mean diagonal minus mean off-diagonal entry, [...]: tr/V - (sum - tr)/(V (V - 1)), in the entries' units."""
    size = circuit.shape[-1]
    trace = circuit.trace()
    return trace / size - (circuit.sum() - trace) / (size * (size - 1))


def entry_variance(circuit: LowRank) -> tuple[Array, Array]:
    """Variance of the entries on the diagonal and off it, [...] each, from the Frobenius norm: V x V is not formed."""
    size = circuit.shape[-1]
    diagonal = circuit.diagonal()
    n_off = size * (size - 1)
    mean_off = (circuit.sum() - diagonal.sum(-1)) / n_off
    square_off = (jnp.square(circuit.frobenius_norm()) - jnp.square(diagonal).sum(-1)) / n_off
    return diagonal.var(-1), jnp.maximum(square_off - jnp.square(mean_off), 0.0)
