"""Do circuits read and write what a claim says? Statistics of directions, each against nulls.

    gain    D ||X W||^2 / (||X||^2 ||W||_F^2) of directions X: 1 for random ones, 0 for those that W does not read
    trace   tr(X W Y^T) sqrt(D) / (||X|| ||Y|| ||W||_F), X and Y [C,D] centred effects of classes: > 0 where W joins
            what means the same class on both sides, < 0 where it keeps it apart. Of two classes it is
            x W y^T sqrt(D) / ||W||_F for the unit contrasts x and y.

The nulls: the same of directions drawn from the covariance of all words that the layer reads; the same with the labels
of prompts permuted; of traces the same head turned at random; and the other heads of the layer, of which all is
measured alike.

Effects of permuted classes lie in the same directions as the true ones (they are mixtures of the same words) and are
shorter. So that chance shows, they are measured at the length of the true ones. This null is of what chance makes of
labels, not of weights: where the classes are told well, it is beaten by every gain, and by the traces of half of all
random heads, those of the claimed sign. That weights fit the classes is for the others to say. The null of the
covariance is strict where training made rows vary along what heads read: a head that reads the leading direction of
their variance beats few of its draws, and yet reads it.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import orthonormalisation
from circuits_jax.circuits.linear_algebra import einsum, matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.heads.nulls import ROUNDING, upper_p
from circuits_jax.heads.role_rows import Asked, class_effects, others, words_up_to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aligned:
    """A statistic of every head and what stands against it.

    Attributes:
        value: [L,H].
        covariance_p, label_p: [L,H] in [1/(1+n), 1], one-sided: how often a draw of that null is as far on the claimed
            side. 1 for a head of zero weights.
        z: [L,H] the value in standard deviations of the null of the labels; 0 where that does not vary.
        rank: int [L,H], its place among the heads of its layer on the claimed side, 0 for the first.
        rotation_p: [L,H] in [0, 1], one-sided, of traces: against the same head turned at random; 1 for others.
    """

    value: Array
    covariance_p: Array
    label_p: Array
    z: Array
    rank: Array
    rotation_p: Array


def covariance_root(rows: Array, query: Array) -> Array:
    """R [L,D,D] such that R^T R is the covariance of the words up to the query, in rows [L,B,T,D]; [L,BT,D] of few."""
    there = words_up_to(query, rows.shape[2])[None, :, :, None]
    n = there.sum()
    mean = jnp.where(there, rows, 0.0).sum((1, 2), keepdims=True) / n
    centred = jnp.where(there, rows - mean, 0.0).reshape(len(rows), -1, rows.shape[-1])
    return orthonormalisation.triangle(centred) / jnp.sqrt(n)


# --- statistics of the heads of one layer ---


def gain(directions: Array, circuit: LowRank, size: Array | None = None) -> Array:
    """D ||X W||^2 / (size^2 ||W||_F^2) of X [C,D] for W [H,D,D]: [H]; size is ||X|| when left out. 0 for 0 / 0."""
    size = jnp.linalg.norm(directions) if size is None else size
    moved = matmul(matmul(directions, circuit.left), orthonormalisation.triangle(circuit.right.mT).mT)
    whole = jnp.square(size * circuit.frobenius_norm())
    return _ratio(directions.shape[-1] * jnp.square(moved).sum((-2, -1)), whole)


def trace(x: Array, circuit: LowRank, size: Array | None = None, *, y: Array) -> Array:
    """tr(X W Y^T) sqrt(D) / (size ||Y|| ||W||_F) of X and Y [C,D] for W [H,D,D]: [H]; size is ||X|| when left out."""
    size = jnp.linalg.norm(x) if size is None else size
    joined = (matmul(x, circuit.left) * matmul(y, circuit.right.mT)).sum((-2, -1))
    return _ratio(joined * x.shape[-1] ** 0.5, size * jnp.linalg.norm(y) * circuit.frobenius_norm())


def top_overlap(directions: Array, vectors: Array) -> Array:
    """Share of the energy of X [C,D] within the span of orthonormal vectors [H,D,r]: [H] in [0, 1]."""
    return _ratio(jnp.square(matmul(directions, vectors)).sum((-2, -1)), jnp.square(directions).sum())


def rotation_z(value: Array, x: Array, y: Array) -> Array:
    """A trace in standard deviations of the same head turned at random: value sqrt(D) ||X|| ||Y|| / ||X^T Y||.

    For W turned at random tr(X W Y^T) has mean 0 and mean square ||X^T Y||^2 ||W||^2 / D^2 (nulls.random_rotation); it
    is about normal.
    """
    joint = jnp.sqrt(jnp.abs(jnp.sum(matmul(x, x.T) * matmul(y, y.T))))
    return _ratio(value * x.shape[-1] ** 0.5 * jnp.linalg.norm(x) * jnp.linalg.norm(y), joint)


def _ratio(x: Array, by: Array) -> Array:
    return jnp.where(by == 0, 0.0, x / jnp.where(by == 0, 1.0, by))


# --- statistics against their nulls ---


def of_classes(
    changes: Array, was: Array, becomes: Array, n_classes: int, root: Array, circuits: LowRank, other: Array | None,
    sign: Array | int, key: Array, n_draws: int,
) -> Aligned:  # fmt: skip
    """How circuits join the effects of classes with those on another side, or read them at all, of every head.

    Args:
        changes: [L,B,D] what changes in what each layer reads at a position when one class becomes another.
        was, becomes: int [B], those classes, of C.
        root: [L,D,D], as of covariance_root.
        circuits: [L,H,D,D], the changes' side first.
        other: [L,C,D] effects of the classes on the other side, for trace; None for gain.
        sign: 1 or -1, the claimed side.
        key: draws the nulls.
        n_draws: n, of each null.
    """
    covariance_key, label_key = jax.random.split(key)
    order = jax.vmap(lambda key: jax.random.permutation(key, len(was)))(jax.random.split(label_key, n_draws))
    # What the estimate makes of effects: draws have to be of classes that occur, or their size and rank are others.
    unit = jnp.eye(n_classes)
    mixed = class_effects(unit[becomes] - unit[was], was, becomes, n_classes)

    def of_layer(layer: tuple[Array, Array, LowRank, Array | None, Array]) -> tuple[Array, Array, Array]:
        changes, root, heads, other, key = layer
        statistic = partial(gain, circuit=heads) if other is None else partial(trace, circuit=heads, y=other)
        own = class_effects(changes, was, becomes, n_classes)
        size = jnp.linalg.norm(own)
        drawn = matmul(mixed, matmul(jax.random.normal(key, (n_draws, n_classes, len(root))), root))
        by_covariance = jax.lax.map(statistic, drawn, batch_size=64)

        if other is None:
            of_permuted = lambda order: gain(class_effects(changes, was[order], becomes[order], n_classes), heads, size)  # noqa: E731
        else:
            # A trace is linear in the changes: each has its part for each class, and labels weigh the parts.
            weights = class_effects(jnp.eye(len(was)), was, becomes, n_classes).T
            parts = einsum("hbk,hck->hbc", matmul(changes, heads.left), matmul(other, heads.right.mT))
            whole = size * jnp.linalg.norm(other) * heads.frobenius_norm()
            of_permuted = lambda order: _ratio(einsum("bc,hbc->h", weights[order], parts) * len(root[0]) ** 0.5, whole)  # noqa: E731
        return statistic(own), by_covariance, jax.lax.map(of_permuted, order, batch_size=64)

    keys = jax.random.split(covariance_key, len(changes))
    found = against(sign, *jax.lax.map(of_layer, (changes, root, circuits, other, keys)))
    if other is None:
        return found
    own = class_effects(changes, was, becomes, n_classes)
    turned = upper_p(sign * jax.vmap(rotation_z)(found.value, own, other))
    return dataclasses.replace(found, rotation_p=jnp.where(found.value == 0, 1.0, turned))


def preference(
    scores: Array, reading: Array, contrast: Array, root: Array, asked: Asked, key: Array, n_draws: int
) -> Aligned:
    """The score of the key less that of what it is held against, in logits, mean over prompts.

    Permuted labels: another word is the key; of two positions either one. Draws of the covariance stand for the
    contrast of all frames, at their lengths.

    Args:
        scores: [L,H,B,T] of the query with every position.
        reading: [L,H,B,D] what one unit of a key's row adds to the score.
        contrast: [L,B,D] the key's row less that of what it is held against, as prompts of the same frame tell it.
        root: [L,D,D], as of covariance_root.
        asked: of the B prompts.
        key: draws the nulls.
        n_draws: n, of each null.
    """
    length = scores.shape[-1]
    scores = scores - scores[..., :1]  # where they are all the same, exactly zero
    covariance_key, label_key = jax.random.split(key)

    def mean_preference(asked: Asked) -> Array:
        chosen = (jnp.arange(length) == asked.key[:, None]) - others(asked, length)
        return einsum("lhbt,bt->lh", scores, chosen) / len(chosen)

    def permuted(draw: Array) -> Array:
        word = 1 + jax.random.randint(draw, asked.query.shape, 0, asked.query)
        swap = (asked.over >= 0) & jax.random.bernoulli(draw, shape=asked.query.shape)
        key = jnp.where(asked.over < 0, word, jnp.where(swap, asked.over, asked.key))
        return mean_preference(dataclasses.replace(asked, key=key, over=jnp.where(swap, asked.key, asked.over)))

    def of_layer(layer: tuple[Array, Array, Array, Array]) -> Array:
        reading, contrast, root, key = layer
        drawn = matmul(jax.random.normal(key, (n_draws, len(root))), root)
        unit = _ratio(drawn, jnp.linalg.norm(drawn, axis=-1, keepdims=True))
        return matmul(unit, einsum("hbd,b->hd", reading, jnp.linalg.norm(contrast, axis=-1)).T) / contrast.shape[0]

    keys = jax.random.split(covariance_key, len(contrast))
    by_covariance = jax.lax.map(of_layer, (reading, contrast, root, keys))
    by_labels = jax.lax.map(permuted, jax.random.split(label_key, n_draws), batch_size=64)
    return against(1, mean_preference(asked), by_covariance, jnp.moveaxis(by_labels, 0, 1))


def against(sign: Array | int, value: Array, by_covariance: Array, by_labels: Array) -> Aligned:
    """A statistic [L,H] of every head against n draws [L,n,H] of both nulls."""
    covariance_p, label_p = (upper_share(sign * value, sign * draws) for draws in (by_covariance, by_labels))
    spread = by_labels.std(1, ddof=1)
    z = _ratio(value - by_labels.mean(1), jnp.where(spread <= ROUNDING * jnp.abs(by_labels).max(1), 0.0, spread))
    rank = (sign * value[:, None, :] > sign * value[:, :, None]).sum(-1)
    return Aligned(value, covariance_p, label_p, z, rank, jnp.ones_like(value))


def nothing(shape: tuple[int, ...]) -> Aligned:
    """Of a statistic that is not asked for: zeros, and p of 1."""
    zeros, ones = jnp.zeros(shape), jnp.ones(shape)
    return Aligned(zeros, ones, ones, zeros, jnp.zeros(shape, int), ones)


def upper_share(value: Array, draws: Array) -> Array:
    """One-sided p of values [L,H] among draws [L,n,H]: (1 + #{draw >= value}) / (1 + n); ties count, up to rounding."""
    below = draws < (value - ROUNDING * jnp.abs(draws).max(1))[:, None]
    return (1 + (~below).sum(1)) / (1 + draws.shape[1])
