"""What scores look like where there is nothing to find."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.spectra import copying_score
from circuits_jax.circuits.weights import CircuitWeights


def norm_matched(weights: CircuitWeights, key: Array) -> CircuitWeights:
    """The same model with Gaussian heads: W_Q, W_K, W_V, W_O of every head drawn anew at their Frobenius norms."""
    drawn = {}
    for name, matrix_key in zip(("W_Q", "W_K", "W_V", "W_O"), jax.random.split(key, 4), strict=True):
        matrix = getattr(weights, name)
        noise = jax.random.normal(matrix_key, matrix.shape, matrix.dtype)
        norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)  # noqa: E731
        drawn[name] = noise * norm(matrix) / norm(noise)
    return dataclasses.replace(weights, **drawn)


def copying_threshold(weights: CircuitWeights, key: Array, n_draws: int = 32, quantile: float = 0.99) -> Array:
    """Quantile of copying_score over n_draws L H norm-matched random heads: scalar in [-1, 1]."""
    one = lambda draw: copying_score(norm_matched(weights, draw))  # noqa: E731
    return jnp.quantile(jax.lax.map(one, jax.random.split(key, n_draws)), quantile)
