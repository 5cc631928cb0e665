"""What scores look like where there is nothing to find, and which of many scores stand out from that."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import norm

from circuits_jax.circuits import orthonormalisation
from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.spectra import summarize
from circuits_jax.circuits.weights import CircuitWeights, per_query_head

ROUNDING = 1e-6  # scores that differ by less than this share of their mean are the same
Studied = TypeVar("Studied", CircuitWeights, LowRank)


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


def draw(
    statistic: Callable[[Studied], Any],
    weights: Studied,
    null: Callable[[Studied, Array], Studied],
    key: Array,
    n_draws: int,
) -> Null:
    """statistic(null(weights, k)) for n_draws keys k split from key, one after the other: memory is that of one draw.

    Args:
        statistic: of a model (or circuit), an array or a pytree of arrays.
        weights: of the model (or a circuit).
        null: norm_matched, random_rotation, token_permutation, random_circuits or another such function.
    """
    return Null(jax.lax.map(lambda k: statistic(null(weights, k)), jax.random.split(key, n_draws)))


# --- random heads ---


def norm_matched(weights: CircuitWeights, key: Array) -> CircuitWeights:
    """The same model with Gaussian heads: W_Q, W_K, W_V, W_O of every head drawn anew at their Frobenius norms.

    With grouped heads, W_K and W_V [L,G,D,K] are drawn once a group and stay shared.
    """
    drawn: dict[str, Any] = {}
    for name, matrix_key in zip(("W_Q", "W_K", "W_V", "W_O"), jax.random.split(key, 4), strict=True):
        drawn[name] = _gaussian_like(getattr(weights, name), matrix_key)
    return dataclasses.replace(weights, **drawn)


def random_rotation(weights: CircuitWeights, key: Array) -> CircuitWeights:
    """The same heads, reading and writing elsewhere: a null of equal spectra, unrelated to what is in the stream.

    The column space of W_Q = Q R in the residual stream is replaced by a random one, W_Q -> F R, with F [D,K] a
    Haar-random orthonormal frame ([D,D] where K > D); W_K, W_V and W_O^T likewise, each with a frame of its own. So
    R, and with it the singular values of W_QK (at every rotary offset) and of W_OV, stay; eigenvalues do not. For
    fixed x and y, x W_QK y^T has mean 0 and mean square ||x||^2 ||y||^2 ||W_QK||_F^2 / D^2.

    All heads of all layers share the four frames of a draw: each W_QK and W_OV, and each W_OV W_QK of two heads, is
    distributed as with frames of its own, W_OV W_OV in its singular values, but the heads of a draw are not
    independent of each other. Biases stay as they are in the head's coordinates. The frames know nothing of what a
    norm takes out of the stream: with LayerNorm 1/D of what a null head reads and writes lies in the mean direction,
    where no embedding is.
    """
    sides = (weights.W_Q, weights.W_K, weights.W_V, weights.W_O.mT)
    d_model, d_head = weights.W_Q.shape[-2:]
    frames = random_frames(key, (len(sides), d_model, min(d_model, d_head)), weights.W_Q.dtype)
    turned = (matmul(frame, orthonormalisation.triangle(side)) for frame, side in zip(frames, sides, strict=True))
    W_Q, W_K, W_V, W_O_transposed = turned
    return dataclasses.replace(weights, W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O_transposed.mT)


def random_frames(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Orthonormal columns [...,D,K], K <= D, uniform over all such frames (Haar)."""
    frames, triangle = orthonormalisation.qr(jax.random.normal(key, shape, dtype))
    # Without this the signs are the algorithm's, not random (Mezzadri, math-ph/0609050).
    return frames * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]


def same_layer_permutation(weights: CircuitWeights, shift: int | Array) -> CircuitWeights:
    """The model's own matrices, wrongly paired: is it with its own other half that a half of a head does its work?

    The query side of head h meets the key side of head (h + shift) mod H of its layer, and the value side of h the
    output side of (h + shift) mod H; biases go with their side. Grouped keys and values are expanded, G becomes H.

    Args:
        weights: of the model.
        shift: in H/G ... H - H/G, modulo H, so that no head meets a half that is its own or shared with its own:
            1 ... H - 1 without groups. A traced shift is not checked.

    The halves meet in the K coordinates of their heads, which are each head's own gauge: unlike the other nulls this
    one depends on it. Where the gauges have nothing to do with each other, as in heads that began as independent
    Gaussian matrices, the K dimensions of the halves are matched by chance, as a null's may be. With rotary positions
    coordinates are frequencies, the same in every head. A planted head in a gauge made by hand can be misjudged.

    Raises:
        ValueError: H = 1 or G = 1, or a static shift out of its range.
    """
    n_heads, shared = weights.W_Q.shape[1], weights.W_Q.shape[1] // weights.W_K.shape[1]
    if shared == n_heads:
        raise ValueError(
            f"same_layer_permutation needs two heads with keys and values of their own in a layer; got "
            f"{weights.W_K.shape[1]} for {n_heads} query heads"
        )
    if not isinstance(shift, jax.core.Tracer) and not shared <= int(shift) % n_heads <= n_heads - shared:
        raise ValueError(
            f"shift must be in {shared} ... {n_heads - shared} modulo the {n_heads} heads, so that no head keeps its "
            f"other half; got {shift}"
        )
    halves: dict[str, Any] = {name: getattr(weights, name) for name in ("W_K", "b_K", "W_V", "b_V")}
    halves = jax.tree.map(lambda x: per_query_head(weights, x), halves)  # where a bias is None it stays None
    others = {"W_K": halves["W_K"], "b_K": halves["b_K"], "W_O": weights.W_O}
    others = jax.tree.map(lambda x: jnp.roll(x, -shift, axis=1), others)
    return dataclasses.replace(weights, **(halves | others))


def token_permutation(weights: CircuitWeights, key: Array) -> CircuitWeights:
    """The same model with its logits dealt out to other tokens: the columns of W_U and b_U permuted at random.

    What W_E reads stays in place, so W_E W_OV W_U keeps its rows' entries and its singular values, and copying in
    token space is broken: its eigenvalues and diagonal are those of a head that knows which outputs there are, but
    not which token is which. For the matching of QK, where one table of tokens has both sides, see diagonal_z.
    """
    place = jax.random.permutation(key, weights.W_U.shape[-1])
    b_U = None if weights.b_U is None else jnp.take(weights.b_U, place)
    return dataclasses.replace(weights, W_U=jnp.take(weights.W_U, place, axis=1), b_U=b_U)


def random_circuits(circuit: LowRank, key: Array) -> LowRank:
    """Random circuits of the same shape and rank: both factors Gaussian, each at the Frobenius norm of its own.

    A factor's norm belongs to the gauge, so compare with it only what the size of W does not change.
    """
    left_key, right_key = jax.random.split(key)
    return LowRank(_gaussian_like(circuit.left, left_key), _gaussian_like(circuit.right, right_key))


def _gaussian_like(matrix: Array, key: Array) -> Array:
    noise = jax.random.normal(key, matrix.shape, matrix.dtype)
    size = lambda x: jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)  # noqa: E731
    return noise * size(matrix) / size(noise)


def spectral_null(circuit: LowRank, key: Array, n_draws: int = 32) -> Null:
    """SpectralSummary of n_draws random circuits for every circuit [...,D,D]; memory is that of one draw.

    The summaries are scale-free, so the null depends on D and R alone and one head's serves all heads of a model:
    spectral_null(circuit[0, 0], key, 4096) gives p values that are fine enough for many heads. A zero circuit's own
    draws are zero too: z 0 and p 1.
    """
    return draw(summarize, circuit, random_circuits, key, n_draws)


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


def diagonal_z(table: Array) -> Array:
    """How far a diagonal stands out of its table [...,n,n] when columns are permuted at random: z [...], exact.

        z = tr(A) sqrt(n-1) / ||A||_F,   A the table without its row means, column means and grand mean

    Over all n! permutations pi, sum_u A[u, pi(u)] has mean 0 and variance ||A||_F^2 / (n-1) (Hoeffding 1951): z has
    mean 0 and variance 1, and is about normal where no few entries of A outweigh the others. What a token gives as a
    query to any key, or gets as a key from any query, is in the means and does not count.

    Returns:
        In [-(n-1), n-1], the ends reached where A is a multiple of the centred identity. 0 where A is zero up to
        rounding, n = 1 included; NaN where an entry is not finite.
    """
    n = table.shape[-1]
    chex.assert_axis_dimension(table, -2, n)
    largest = jnp.abs(table).max((-2, -1), keepdims=True, initial=0.0)
    table = table / jnp.where(largest == 0, 1.0, largest)  # squares neither overflow nor vanish
    centred = table - table.mean(-1, keepdims=True)
    centred -= centred.mean(-2, keepdims=True)
    size, whole = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (centred, table))
    flat = size <= ROUNDING * whole
    z = jnp.trace(centred, axis1=-2, axis2=-1) * (n - 1) ** 0.5 / jnp.where(flat, 1.0, size)
    return jnp.where(flat, 0.0, z)


def upper_p(z: Array) -> Array:
    """One-sided p = 1 - Phi(z) in [0, 1] of a standard normal z: the chance of one at least as large; NaN stays NaN.

    In float32 it is 0 from z of about 13 on.
    """
    return norm.sf(z)


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
