"""What scores look like where there is nothing to find, and which of many scores stand out from that."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.spectra import copying_score, summarize
from circuits_jax.circuits.weights import CircuitWeights

ROUNDING = 1e-6  # scores that differ by less than this share of their mean are the same


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Null:
    """N draws of a statistic from where there is nothing to find.

    Attributes:
        draws: the statistic, an array or a pytree of arrays, with the draws as first axis: every leaf [N,...].
    """

    draws: Any

    @property
    def mean(self) -> Any:
        """Mean over the draws, in the statistic's shape."""
        return jax.tree.map(lambda draws: draws.mean(0), self.draws)

    @property
    def std(self) -> Any:
        """Standard deviation over the draws (N - 1 in the divisor), in the statistic's shape; NaN for N = 1."""
        return jax.tree.map(lambda draws: draws.std(0, ddof=1), self.draws)


# --- random heads ---


def norm_matched(weights: CircuitWeights, key: Array) -> CircuitWeights:
    """The same model with Gaussian heads: W_Q, W_K, W_V, W_O of every head drawn anew at their Frobenius norms.

    With grouped heads, W_K and W_V [L,G,D,K] are drawn once a group and stay shared.
    """
    drawn: dict[str, Any] = {}
    for name, matrix_key in zip(("W_Q", "W_K", "W_V", "W_O"), jax.random.split(key, 4), strict=True):
        drawn[name] = _gaussian_like(getattr(weights, name), matrix_key)
    return dataclasses.replace(weights, **drawn)


def random_circuits(circuit: LowRank, key: Array) -> LowRank:
    """Random circuits of the same shape and rank: both factors Gaussian, each at the Frobenius norm of its own.

    A factor's norm belongs to the gauge, so compare with it only what the size of W does not change.
    """
    left_key, right_key = jax.random.split(key)
    return LowRank(_gaussian_like(circuit.left, left_key), _gaussian_like(circuit.right, right_key))


def _gaussian_like(matrix: Array, key: Array) -> Array:
    noise = jax.random.normal(key, matrix.shape, matrix.dtype)
    norm = lambda x: jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)  # noqa: E731
    return noise * norm(matrix) / norm(noise)


def copying_threshold(weights: CircuitWeights, key: Array, n_draws: int = 32, quantile: float = 0.99) -> Array:
    """Quantile of copying_score over n_draws L H norm-matched random heads: scalar in [-1, 1]."""
    one = lambda draw: copying_score(norm_matched(weights, draw))  # noqa: E731
    return jnp.quantile(jax.lax.map(one, jax.random.split(key, n_draws)), quantile)


def spectral_null(circuit: LowRank, key: Array, n_draws: int = 32) -> Null:
    """SpectralSummary of n_draws random circuits for every circuit [...,D,D]; memory is that of one draw.

    The summaries are scale-free, so the null depends on D and R alone and one head's serves all heads of a model:
    spectral_null(circuit[0, 0], key, 4096) gives p values that are fine enough for many heads. A zero circuit's own
    draws are zero too: z 0 and p 1.
    """
    one = lambda draw: summarize(random_circuits(circuit, draw))  # noqa: E731
    return Null(jax.lax.map(one, jax.random.split(key, n_draws)))


# --- a score against its null ---


def z_score(value: Any, null: Null) -> Any:
    """(value - mean) / std over the draws, in the value's shape and pytree.

    Where the draws do not vary beyond rounding: 0 for their own value, +inf or -inf for another. NaN where the value
    or a draw is NaN, or a draw infinite. Axes that the value has in front of the null's are shared: the null of one
    head serves many.
    """

    def one(value: Array, mean: Array, std: Array) -> Array:
        rounding = ROUNDING * jnp.abs(mean)
        away = jnp.where(jnp.abs(value - mean) <= rounding, 0.0, value - mean)
        spread = jnp.where(std <= rounding, 0.0, std)
        return jnp.where((away == 0) & (spread == 0), 0.0, away / spread)

    return jax.tree.map(one, value, null.mean, null.std)


def p_value(value: Any, null: Null) -> Any:
    """Two-sided p in [1/(1+N), 1]: share of draws and value that lie at least as far from their mean as the value.

    (1 + #{|draw - mean| >= |value - mean|}) / (1 + N), in the value's shape and pytree; ties, up to rounding, count.
    The mean is that of value and draws together, which makes p exact for any N: with the mean of 32 draws alone, the
    smallest p would come up a fifth too often. NaN where the value or a draw is not finite. Axes that the value has
    in front of the null's are shared. No p is below 1/(1+N): benjamini_hochberg over M heads needs N well above
    M / rate.
    """

    def one(value: Array, draws: Array) -> Array:
        n_shared = value.ndim - (draws.ndim - 1)
        draws = draws.reshape(-1, *(1,) * n_shared, *draws.shape[1:])
        together = jnp.concatenate([value[None], jnp.broadcast_to(draws, (len(draws), *value.shape))])
        mean = together.mean(0)
        distance = jnp.abs(together - mean)
        as_far = distance >= distance[0] - ROUNDING * jnp.abs(mean)
        return jnp.where(jnp.isnan(distance).any(0), jnp.nan, as_far.mean(0))

    return jax.tree.map(one, value, null.draws)


def benjamini_hochberg(p_values: Array, rate: float = 0.05) -> Array:
    """Which of M p values [...] to reject at this false discovery rate: bool [...] (Benjamini & Hochberg 1995).

    The k smallest, for the largest k with p_(k) <= rate k / M; equal p values share one fate. NaN is never rejected
    and does not count in M. The rate holds for independent and positively dependent tests; for others it can be up
    to sum_{k<=M} 1/k times as high (Benjamini & Yekutieli 2001).
    """
    ordered = jnp.sort(p_values.ravel())  # NaN comes last
    n_tests = jnp.isfinite(ordered).sum()
    passes = ordered * n_tests <= rate * jnp.arange(1, ordered.size + 1)
    return p_values <= jnp.max(ordered, initial=-jnp.inf, where=passes)
