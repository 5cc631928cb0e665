"""What a circuit's spectrum or entries say in one number."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import entr

from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.low_rank import SVD, LowRank
from circuits_jax.circuits.token_space import token_ov, token_qk
from circuits_jax.circuits.weights import CircuitWeights


def eigenvalue_positivity(eigenvalues: Array) -> Array:
    """Re sum(lambda) / sum |lambda| in [-1, 1] of complex [...,R] (Elhage et al. 2021); 0 when all are zero.

    1 when every eigenvalue is real and positive, about 0 for a random matrix, -1 when all are negative.
    """
    total = jnp.abs(eigenvalues).sum(-1)
    return eigenvalues.real.sum(-1) / jnp.where(total == 0, 1.0, total)


def copying_score(weights: CircuitWeights) -> Array:
    """eigenvalue_positivity of W_E W_OV W_U, [L,H] in [-1, 1]: whether moving a token raises its own logit.

    In a post-norm model, and with a transform in front of the unembedding (BERT), W_E W_OV W_U is a similarity of what
    is written with what W_U reads, and no logit.
    """
    return eigenvalue_positivity(token_ov(weights).eigenvalues())


def matching_score(weights: CircuitWeights) -> Array:
    """eigenvalue_positivity of W_E W_QK W_E^T, [L,H] in [-1, 1]: whether a token looks for its own copies.

    With rotary positions that is at offset 0, where a copy never is: see attention.qk for others. With qk-norm scores
    are these over the sizes of query and key, which change no sign of an entry.
    """
    return eigenvalue_positivity(token_qk(weights).eigenvalues())


def diagonal_gap(circuit: LowRank) -> Array:
    """Mean diagonal minus mean off-diagonal entry, [...]: tr/V - (sum - tr)/(V (V - 1)), in the entries' units.

    NaN for V = 1, which has no entry off the diagonal.
    """
    size = float(circuit.shape[-1])  # V (V - 1) of a vocabulary of 50,000 is beyond int32
    trace = circuit.trace()
    return trace / size - (circuit.sum() - trace) / (size * (size - 1))


def entry_variance(circuit: LowRank) -> tuple[Array, Array]:
    """Variance of the entries on the diagonal and off it, [...] each, without V x V.

    The second is NaN for V = 1, which has no entry off the diagonal.
    """
    size = circuit.shape[-1]
    n_off = float(size * (size - 1))
    mean_off = (circuit.sum() - circuit.trace()) / n_off
    # The mean is taken off as one more rank: taken off the squares, it would cancel digits of a small variance.
    shift = jnp.broadcast_to(-mean_off[..., None, None], (*circuit.left.shape[:-1], 1))
    ones = jnp.ones((*circuit.right.shape[:-2], 1, size))
    centred = LowRank(jnp.concatenate([circuit.left, shift], -1), jnp.concatenate([circuit.right, ones], -2))
    # Grams are exact enough for a variance, and products alone are cheap to compile and run inside a training scan.
    grams = matmul(centred.left.mT, centred.left) * matmul(centred.right, centred.right.mT)
    square_off = grams.sum((-2, -1)) - jnp.square(centred.diagonal()).sum(-1)
    return circuit.diagonal().var(-1), jnp.maximum(square_off / n_off, 0.0)


# --- of singular values [...,R] in falling order: all scale-free, NaN where a value is NaN ---


def effective_rank(singular_values: Array) -> Array:
    """exp(-sum p ln p) with p = sigma / sum sigma, [...] in [1, R]; 0 when all are zero (Roy & Vetterli 2007).

    R for R equal values. 1 <= stable_rank <= participation_ratio <= effective_rank <= number of values that are
    not zero: Renyi entropies of sigma^2 of falling order, then of sigma itself. A bare number says nothing: for
    two random factors of D=768, K=64 it is 62.6 (for one such factor 63.3), so read it against heads.nulls.
    """
    return jnp.where(singular_values[..., 0] == 0, 0.0, jnp.exp(_entropy(singular_values)))


def stable_rank(singular_values: Array) -> Array:
    """sum sigma^2 / sigma_1^2, [...] in [1, R]; 0 when all are zero."""
    return jnp.square(_relative(singular_values)).sum(-1)


def participation_ratio(singular_values: Array) -> Array:
    """(sum sigma^2)^2 / sum sigma^4, [...] in [1, R]; 0 when all are zero."""
    squares = jnp.square(_relative(singular_values))
    return jnp.square(squares.sum(-1)) / _or_one(jnp.square(squares).sum(-1))


def leading_ratio(singular_values: Array) -> Array:
    """sigma_1 / sigma_2, [...] in [1, inf]: inf for rank one and for R = 1; 1, a tie, when all are zero.

    Computed singular values of a circuit of rank one end in about float eps and not in zeros: from 1e6 on, read
    the ratio as infinite.
    """
    first = singular_values[..., 0]
    second = singular_values[..., 1:2].sum(-1)  # 0 for R = 1
    return jnp.where(first == 0, 1.0, first / second)


def energy_curve(singular_values: Array) -> Array:
    """sum_{r<=k} sigma_r^2 / sum sigma^2, [...,R] rising to 1: the share of ||W||_F^2 in k components.

    All 0 when all singular values are zero.
    """
    energy = jnp.cumsum(jnp.square(_relative(singular_values)), -1)
    return energy / _or_one(energy[..., -1:])


def flatness(singular_values: Array) -> Array:
    """ln(effective rank) / ln R, [...] in [0, 1]: 1 for R equal values, 0 for rank one and when all are zero.

    NaN for R = 1: one value is neither flat nor steep. R is the number of values given, zeros included: a flat
    spectrum on few of the K dimensions of a head is not flat.
    """
    return _entropy(singular_values) / jnp.log(float(singular_values.shape[-1]))


def spectral_gaps(singular_values: Array) -> Array:
    """(sigma_r - sigma_{r+1}) / sigma_1, [...,R-1] in [0, 1]: what holds components 1..r apart from the rest.

    Relative to sigma_1 because that is what perturbation theory asks for (Davis & Kahan; Wedin): a change of W by
    eps ||W|| turns the first r singular vectors, as a subspace, by an angle of about eps / gap_r at most. A single
    vector r is as certain as the smaller of gap_{r-1} and gap_r; where that is small, compare subspaces. 0 for a
    tie and when all are zero.
    """
    return -jnp.diff(singular_values, axis=-1) / _or_one(singular_values[..., :1])


def _relative(singular_values: Array) -> Array:
    """sigma_r / sigma_1: no later square can over- or underflow; zeros stay zeros."""
    return singular_values / _or_one(singular_values[..., :1])


def _entropy(singular_values: Array) -> Array:
    """-sum p ln p with p = sigma / sum sigma, [...] in [0, ln R]; 0 when all are zero."""
    relative = _relative(singular_values)
    return entr(relative / _or_one(relative.sum(-1, keepdims=True))).sum(-1)


def _or_one(divisor: Array) -> Array:
    return jnp.where(divisor == 0, 1.0, divisor)


# --- of a circuit ---


def symmetry(circuit: LowRank) -> Array:
    """s = tr(W^2) / ||W||_F^2 = (||sym||^2 - ||anti||^2) / ||W||_F^2, [...] in [-1, 1] (Saponati et al. 2502.10927).

    sym and anti are (W + W^T) / 2 and (W - W^T) / 2: 1 for a symmetric W, -1 for an antisymmetric one, 0 for a zero
    one and about 0 for a random one.

    That a symmetric W_QK is positional and an asymmetric one content is a claim to test and not a label: exact
    matching of the same token has s = 1, an exact previous-token W_QK has s = 0, and the symmetric kernel
    |i - j| = 1 is a previous-token head under a causal mask, with s = 1.

    Raises:
        ValueError: the circuit is not square.
    """
    return _symmetry(_square_svd(circuit))


def directionality(circuit: LowRank) -> Array:
    """d = (C - R) / (C + R), [...] in [-1, 1]: do columns or rows of W stand out (Saponati et al. 2502.10927).

    C is the sum of the norms of the columns whose norm exceeds mean + 2 standard deviations of all column norms; R
    the same over rows. d > 0: a few directions of the right side (keys for QK, what is written for OV) dominate;
    d < 0: a few of the left side (queries, what is read). In the convention of column vectors W is the transpose
    and the sign is the other: compare sides, not signs. d(W^T) = -d(W), so 0 for a symmetric W.

    0 when nothing stands out on either side, as in a zero W and always below D = 6; norms that differ by rounding
    alone do not stand out. Unlike a spectrum it depends on the basis of the space that W reads and writes.

    Raises:
        ValueError: the circuit is not square.
    """
    return _directionality(_square_svd(circuit))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpectralSummary:
    """Everything scale-free that this file says of a square circuit, one number [...] a head; read it against a null.

    Attributes:
        effective_rank, stable_rank, participation_ratio: in [1, R], 0 for a zero circuit.
        leading_ratio: sigma_1 / sigma_2 in [1, inf].
        flatness: in [0, 1].
        positivity: eigenvalue_positivity in [-1, 1].
        symmetry, directionality: in [-1, 1].
        energy_curve: [...,R] rising to 1.
    """

    effective_rank: Array
    stable_rank: Array
    participation_ratio: Array
    leading_ratio: Array
    flatness: Array
    positivity: Array
    symmetry: Array
    directionality: Array
    energy_curve: Array


def summarize(circuit: LowRank) -> SpectralSummary:
    """All summaries of square circuits [...,D,D], from one SVD and one set of eigenvalues.

    A pure shift has only zero eigenvalues and singular values 1: positivity cannot see a positional head, singular
    values can. Of a circuit whose eigenvalues are all zero but for rounding, positivity is noise; symmetry is not.

    Raises:
        ValueError: the circuit is not square.
    """
    svd = _square_svd(circuit)
    return SpectralSummary(
        effective_rank=effective_rank(svd.S),
        stable_rank=stable_rank(svd.S),
        participation_ratio=participation_ratio(svd.S),
        leading_ratio=leading_ratio(svd.S),
        flatness=flatness(svd.S),
        positivity=eigenvalue_positivity(circuit.eigenvalues()),
        symmetry=_symmetry(svd),
        directionality=_directionality(svd),
        energy_curve=energy_curve(svd.S),
    )


def _square_svd(circuit: LowRank) -> SVD:
    if circuit.shape[-2] != circuit.shape[-1]:
        raise ValueError(f"a square circuit is needed; got shape {list(circuit.shape)}")
    return circuit.svd()


def _symmetry(svd: SVD) -> Array:
    """From R x R: tr(W^2) = tr((S V^T U)^2)."""
    relative = _relative(svd.S)
    core = relative[..., None] * matmul(svd.Vh, svd.U)
    return einsum("...rs,...sr->...", core, core) / _or_one(jnp.square(relative).sum(-1))


def _directionality(svd: SVD) -> Array:
    """Row i of W has the norm of row i of U S, column j that of column j of S V^T."""
    relative = _relative(svd.S)
    rows = _sum_of_outliers(jnp.linalg.norm(svd.U * relative[..., None, :], axis=-1))
    columns = _sum_of_outliers(jnp.linalg.norm(relative[..., None] * svd.Vh, axis=-2))
    return (columns - rows) / _or_one(columns + rows)


def _sum_of_outliers(norms: Array) -> Array:
    """Sum of the norms [...,D] beyond mean + 2 standard deviations and beyond rounding; NaN when one is NaN."""
    threshold = (1 + 1e-5) * norms.mean(-1, keepdims=True) + 2 * norms.std(-1, keepdims=True)
    return jnp.where(norms <= threshold, 0.0, norms).sum(-1)  # the comparison that is false for NaN, which so stays
