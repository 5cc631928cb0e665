"""What a head's directions stand for: the rows that activate QK directions most, and what OV makes of known directions.

A singular direction is an answer only where its singular value stands apart. Singular values that nearly tie leave the
span of their vectors determined and nothing within it, so such a group is answered as one subspace.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import orthonormalisation
from circuits_jax.circuits.attention import ov
from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.low_rank import ENTRIES_AT_ONCE, LowRank
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads.nulls import Null, z_score

ROUNDING = 1e-6  # singular values below this share of the largest are zero
Control = Callable[[Array, Array, int, int], Array]


class Ranked(NamedTuple):
    """The k first rows of a ranking: values [...,k] and which rows [...,k]; NaN and -1 where there is no answer."""

    values: Array
    rows: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """How rows x activate one side of each head's first n directions, over rows of mean m.

    The activation is (x - m) . u of a single direction u and ||(x - m) B|| of a tied group with orthonormal basis B.

    Attributes:
        mean: [L,H,n] m . u, or ||m B||: what all rows have in common, and what single activations are relative to.
        std: [L,H,n] root mean square of the activations.
        top: [L,H,n,k] the largest activations.
        bottom: [L,H,n,k] the smallest, in rising order; NaN and -1 for a tied group, which has no sign.
        extremeness: [L,H,n] the k-th largest |activation| over std.
        z: [L,H,n] extremeness in standard deviations of the control's.
        quantile: [L,H,n] in [0, 1], the share of the controls that are less extreme.
    """

    mean: Array
    std: Array
    top: Ranked
    bottom: Ranked
    extremeness: Array
    z: Array
    quantile: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaxActivating:
    """Both sides of each head's first n singular directions; the members of a tied group share one answer.

    Attributes:
        singular_values: [L,H,n].
        group: int [L,H,n], the first direction of the group that a direction belongs to; its own place if single.
        group_size: int [L,H,n], members beyond the first n included; 1 for a single direction.
        query, key: the left and the right singular vectors. Their signs go together: top queries want top keys and
            bottom queries bottom keys.
    """

    singular_values: Array
    group: Array
    group_size: Array
    query: Side
    key: Side


def tied_groups(singular_values: Array, gap: float = 0.01) -> Array:
    """The first member of each singular value's group of ties, int [...,R], for values [...,R] in falling order.

    Neighbours are tied where s_(r+1) >= (1 - gap) s_r, and ties chain: a group is a span of singular vectors that
    stands apart from the rest by more than the gap. An error of size e in the matrix turns it by about e / (gap s),
    so that at 0.01 an answer is good for weights in bfloat16. Of a flat spectrum much is tied: half of the first 8
    directions of Gaussian heads with D = 768, K = 64, in groups of at most 4.

    Raises:
        ValueError: gap is not in [0, 1).
    """
    if not 0 <= gap < 1:
        raise ValueError(f"gap must be in [0, 1), relative to the larger singular value; got {gap}")
    place = jnp.arange(singular_values.shape[-1])
    apart = ~(singular_values[..., 1:] >= (1 - gap) * singular_values[..., :-1])
    starts = jnp.concatenate([jnp.ones_like(singular_values[..., :1], bool), apart], -1)
    return jax.lax.cummax(jnp.where(starts, place, 0), axis=singular_values.ndim - 1)


# --- which rows activate a direction ---


def uniform_directions(rows: Array, key: Array, n_draws: int, n: int) -> Array:
    """Orthonormal [N,D] -> [C,D,n], uniform over all directions: what a random head reads."""
    return orthonormalisation.qr(jax.random.normal(key, (n_draws, rows.shape[-1], n), rows.dtype))[0]


def covariance_directions(rows: Array, key: Array, n_draws: int, n: int) -> Array:
    """Orthonormal [N,D] -> [C,D,n], spanned by Gaussian vectors of the rows' covariance: random mixtures of the rows.

    The stricter control: a head that merely reads where rows vary most beats uniform directions, and not these.
    """
    mean = rows.mean(0)

    def mixture(key: Array) -> Array:
        weights = jax.random.normal(key, (n, len(rows)), rows.dtype)
        return (matmul(weights, rows) - weights.sum(-1, keepdims=True) * mean).T

    return orthonormalisation.qr(jax.lax.map(mixture, jax.random.split(key, n_draws)))[0]


def max_activating(
    circuit: LowRank,
    rows: Array,
    key: Array,
    n: int = 8,
    k: int = 10,
    gap: float = 0.01,
    control: Control = covariance_directions,
    n_draws: int = 100,
) -> MaxActivating:
    """The rows that activate both sides of each head's first n singular directions most and least.

    Rows are centred first: what all rows share, and a bias with it, tells none from another; on the key side it drops
    out of softmax, on the query side it is what all queries ask for (Side.mean, without b_Q). The control asks the
    same of random directions, and of random subspaces of a group's size: among many rows, some are extreme in any
    direction.

    Args:
        circuit: [L,H,D,D], such as qk(weights), at one rotary offset, or mean_qk(weights).
        rows: [N,D] as every layer reads them, such as heads.ideal_inputs.token_inputs, or [L,N,D] as each layer does,
            such as heads.ideal_inputs.normalized of residuals.
        key: draws the controls, once a layer where rows have layers, else once.
        n, k: how many directions, and rows at either end.
        gap: see tied_groups.
        control: uniform_directions, covariance_directions or another such function of (rows, key, n_draws, n).
        n_draws: C, how many controls; no quantile is finer than 1/C.

    Returns:
        NaN and -1 for a direction of singular value zero (or NaN), which reads nothing. z and quantile are NaN for a
        group of more than n members; ask for a larger n. Where rows do not differ in a direction, extremeness is 0.

    Raises:
        ValueError: circuit, rows, n, k or n_draws of the wrong shape or size.
    """
    _check(circuit, rows, n, k, n_draws)
    n_layers, n_heads = circuit.shape[:2]
    u, s, vh = circuit.svd()
    group = tied_groups(s, gap)
    zero = ~(s > ROUNDING * s[..., :1])[..., :n]
    members = group[..., :n, None] == group[..., None, :]
    # In blocks of n vectors, so that a head costs no more than its n directions unless a group goes on behind them.
    blocks = -(-s.shape[-1] // n)
    vectors, members = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * n - x.shape[-1])])
        for x in (jnp.stack([u, vh.mT], 2), members)
    )
    needed = 1 + jnp.max(members[..., -1, :] * jnp.arange(blocks * n), axis=-1) // n
    size = members.sum(-1)

    def of_layer(layer: Array) -> tuple[Array, Array, Ranked, Ranked, Array]:
        rows_read = rows[layer] if rows.ndim == 3 else rows
        at_once = max(1, min(n_heads, ENTRIES_AT_ONCE // (2 * n * len(rows_read))))
        heads = vectors[layer], members[layer], needed[layer], zero[layer]
        return jax.lax.map(lambda head: _of_head(rows_read, k, *head), heads, batch_size=at_once)

    mean, std, top, bottom, extremeness = jax.lax.map(of_layer, jnp.arange(n_layers))

    def of_controls(rows: Array, key: Array) -> Array:
        return _extremeness_of_controls(rows, control(rows, key, n_draws, n), k)

    if rows.ndim == 3:
        draws = jax.lax.map(lambda layer: of_controls(*layer), (rows, jax.random.split(key, n_layers)))
    else:
        draws = jnp.broadcast_to(of_controls(rows, key), (n_layers, n_draws, n))
    # Each direction is compared with random subspaces of its own size.
    draws = jnp.take_along_axis(draws.swapaxes(0, 1)[:, :, None], size[None] - 1, axis=-1, mode="fill")[:, :, :, None]
    unknown = jnp.isnan(draws).any(0) | jnp.isnan(extremeness)
    quantile = jnp.where(unknown, jnp.nan, (draws < extremeness).mean(0))
    both = Side(mean, std, top, bottom, extremeness, z_score(extremeness, Null(draws)), quantile)
    query, key_side = (jax.tree.map(lambda x, i=i: x[:, :, i], both) for i in range(2))
    return MaxActivating(s[..., :n], group[..., :n], size, query, key_side)


def _of_head(
    rows: Array, k: int, vectors: Array, members: Array, needed: Array, zero: Array
) -> tuple[Array, Array, Ranked, Ranked, Array]:
    """Of both sides of one head: rows [N,D], vectors [2,D,R], members [n,R], how many blocks of n are needed."""
    n = len(members)
    common = einsum("d,sdr->sr", rows.mean(0), vectors)

    def block(i: Array | int) -> tuple[Array, Array]:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * n, slice_size=n, axis=-1)
        activation = einsum("nd,sdr->nsr", rows, cut(vectors)) - cut(common)
        return activation, einsum("nsr,gr->nsg", jnp.square(activation), cut(members).astype(rows.dtype))

    first, square = block(0)
    square = jax.lax.fori_loop(1, needed, lambda i, total: total + block(i)[1], square)
    single = members.sum(-1) == 1
    activation = jnp.where(single, first, jnp.sqrt(square))
    shared = jnp.sqrt(einsum("sr,gr->sg", jnp.square(common), members.astype(rows.dtype)))
    mean = jnp.where(zero, jnp.nan, jnp.where(single, common[:, :n], shared))
    std = jnp.where(zero, jnp.nan, jnp.sqrt(square.mean(0)))

    activation = jnp.moveaxis(activation, 0, -1)
    top, (lowest, lowest_rows) = Ranked(*jax.lax.top_k(activation, k)), jax.lax.top_k(-activation, k)
    bottom = Ranked(-lowest, lowest_rows)
    largest = jax.lax.top_k(jnp.concatenate([top.values, lowest], -1), k)[0][..., -1]
    return mean, std, _where(~zero, top), _where(single & ~zero, bottom), _relative(largest, std, rows)


def _extremeness_of_controls(rows: Array, frames: Array, k: int) -> Array:
    """The same of random frames [C,D,n]: [C,n], at place m - 1 of the subspace that the first m vectors span."""
    common = rows.mean(0)

    def of_frame(frame: Array) -> Array:
        square = jnp.cumsum(jnp.square(matmul(rows, frame) - matmul(common, frame)), -1)
        largest = jnp.sqrt(jax.lax.top_k(square.T, k)[0][..., -1])
        return _relative(largest, jnp.sqrt(square.mean(0)), rows)

    return jax.lax.map(of_frame, frames, batch_size=max(1, ENTRIES_AT_ONCE // (frames.shape[-1] * len(rows))))


def _relative(largest: Array, std: Array, rows: Array) -> Array:
    """largest / std, 0 where rows differ by no more than rounding."""
    flat = std <= ROUNDING * jnp.sqrt(jnp.square(rows).sum(-1).mean())
    return jnp.where(flat, 0.0, largest / jnp.where(flat, 1.0, std))


def _where(known: Array, ranked: Ranked) -> Ranked:
    known = known[..., None]
    return Ranked(jnp.where(known, ranked.values, jnp.nan), jnp.where(known, ranked.rows, -1))


def _check(circuit: LowRank, rows: Array, n: int, k: int, n_draws: int) -> None:
    if len(circuit.shape) != 4 or circuit.shape[2] != circuit.shape[3]:
        raise ValueError(f"circuit must be [L,H,D,D], all heads of a model; got {list(circuit.shape)}")
    n_layers, _, d_model, _ = circuit.shape
    if rows.ndim not in (2, 3) or rows.shape[-1] != d_model or rows.shape[:-2] not in ((), (n_layers,)):
        raise ValueError(f"rows must be [N,{d_model}] or [{n_layers},N,{d_model}]; got {list(rows.shape)}")
    rank = min(d_model, circuit.left.shape[-1])
    for name, value, most in (("n", n, rank), ("k", k, rows.shape[-2])):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be between 1 and {most}; got {value}")
    if n_draws < 2:
        raise ValueError(f"n_draws must be at least 2, for a spread; got {n_draws}")


# --- what a head makes of known directions ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OVProbe:
    """What each head's W_OV makes of the N entries d of a dictionary: d W_OV.

    Attributes:
        gain: [L,H,N] ||d W_OV|| / ||d||; 0 for a zero entry.
        relative_gain: [L,H,N] gain over ||W_OV||_F / sqrt(D), the root mean square gain of a random direction: about
            1 where the head treats the entry like any direction. 0 for a zero head.
        own_cosine: [L,H,N] in [-1, 1], of d W_OV with d: 1 copied, -1 suppressed.
        nearest: [L,H,N,k] the entries, d included, of largest cosine with d W_OV.
        tokens: [L,H,N,k] the tokens of largest logit d W_OV W_U.
    """

    gain: Array
    relative_gain: Array
    own_cosine: Array
    nearest: Ranked
    tokens: Ranked


def probe_ov(weights: CircuitWeights, dictionary: Array, k: int = 10) -> OVProbe:
    """What every head writes where it attends to each of a set of known directions.

    The linear part alone: without b_V W_O, which is written whatever is attended to, and without b_U. What an entry
    lowers is what its negative raises: probe -d.

    Args:
        weights: of the model.
        dictionary: [N,D] directions as heads read them, of any length; zero entries have gain 0, all cosines 0.
        k: how many entries (N if there are fewer) and tokens.

    Returns:
        Cosines with a d W_OV of zero are 0, too. In Ranked, rows are places in the dictionary, or token ids.

    Raises:
        ValueError: dictionary is not [N,D], or k not between 1 and V.
    """
    d_model, n_vocab = weights.W_U.shape
    if dictionary.ndim != 2 or dictionary.shape[-1] != d_model:
        raise ValueError(f"dictionary must be [N,{d_model}]; got {list(dictionary.shape)}")
    if not 1 <= k <= n_vocab:
        raise ValueError(f"k must be between 1 and the {n_vocab} tokens; got {k}")
    n_entries = len(dictionary)
    length, unit = _length_and_unit(dictionary)
    at_once = max(1, min(n_entries, ENTRIES_AT_ONCE // max(n_entries, n_vocab)))

    def of_head(circuit: LowRank) -> OVProbe:
        moved = matmul(dictionary, circuit.left)
        # The cheaper order of d W_V W_O W_U: few entries are written out, many find W_O W_U made once.
        few = n_entries < circuit.left.shape[-1]
        before, after = (
            (matmul(moved, circuit.right), weights.W_U) if few else (moved, matmul(circuit.right, weights.W_U))
        )

        def of_entry(entry: Array) -> tuple[Array, Array, Ranked, Ranked]:
            size, direction = _length_and_unit(matmul(moved[entry], circuit.right))
            cosines = matmul(unit, direction)
            nearest = Ranked(*jax.lax.top_k(cosines, min(k, n_entries)))
            return size, cosines[entry], nearest, Ranked(*jax.lax.top_k(matmul(before[entry], after), k))

        size, own, nearest, tokens = jax.lax.map(of_entry, jnp.arange(n_entries), batch_size=at_once)
        gain = _ratio(size, length)
        usual = circuit.frobenius_norm() / d_model**0.5
        return OVProbe(gain, _ratio(gain, usual), own, nearest, tokens)

    return ov(weights).one_by_one(of_head)


def _length_and_unit(vectors: Array) -> tuple[Array, Array]:
    length = jnp.linalg.norm(vectors, axis=-1)
    return length, _ratio(vectors, length[..., None])


def _ratio(value: Array, by: Array) -> Array:
    """value / by, 0 for 0 / 0."""
    return value / jnp.where(by == 0, 1.0, by)
