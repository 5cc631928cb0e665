"""What a head's circuit is made of: its first singular and eigenvectors, shown as tokens and as task variables.

In row vectors x, M = sum_r sigma_r u_r v_r^T reads x . u_r and writes v_r; for QK, "writes" is what keys are asked for.
With eigenvectors, M = sum_r lambda_r y_r x_r^H / (x_r^H y_r) reads along the right ones, M y = lambda y, and writes the
left ones, x M = lambda x: what comes back as itself, which a head that copies has with lambda > 0.

Where a single direction is not determined, a subspace is shown: of singular values that nearly tie the span of their
vectors, of a complex pair of eigenvalues the plane of the vector's real and imaginary part.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.circuits import linear_algebra
from circuits_jax.circuits.linear_algebra import matmul
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.heads.directions import ROUNDING, Ranked, tied_groups


class Dictionary(NamedTuple):
    """What one side of a circuit is described with.

    Attributes:
        rows: [N,D] as that side sees them, such as all token inputs for what is read and W_U^T for what OV writes.
        variables: {name: [C,D]} of task variables, the mean of what that side sees for each of C >= 2 classes, or
            for what OV writes of the classes' rows of W_U^T.
    """

    rows: Array
    variables: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    """One side of each head's first n directions, over rows x of mean m.

    The projection is (x - m) . d on a single direction d and ||(x - m) B|| on a subspace with orthonormal basis B.

    Attributes:
        top: [...,n,k] the rows of largest projection.
        bottom: [...,n,k] of smallest, in rising order; NaN and -1 for a subspace, which has no sign.
        shares: {variable: [...,n]} in [0, 1], ||P d||^2 with P the projection on the span of the differences between
            its class means, or ||P B||_F^2 over the dimensions of B. 0 for a variable whose classes do not differ.
        chance: {variable: [...,n]} the rank of P over D: the share of a uniformly random direction, on average.
    """

    top: Ranked
    bottom: Ranked
    shares: dict[str, Array]
    chance: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Portrait:
    """Each head's first n singular values and eigenvalues, and what their directions stand for.

    Attributes:
        singular_values: [...,n] in falling order.
        group, group_size: int [...,n], see heads.directions.tied_groups: the first direction of the group that a
            direction belongs to, and its members beyond the first n included. Members share one answer.
        read, written: of the left and the right singular vectors. Their signs go together: top rows raise
            top rows and lower bottom rows.
        eigenvalues: complex [...,n], in falling order of magnitude; NaN where they did not converge.
        condition: [...,n] >= 1, what an error of the matrix is multiplied with in the eigenvalue.
        eigen_right, eigen_left: of what is read and what is written. Signs as above where the eigenvalue is positive;
            where it is negative, top rows lower top rows.
    """

    singular_values: Array
    group: Array
    group_size: Array
    read: Directions
    written: Directions
    eigenvalues: Array
    condition: Array
    eigen_right: Directions
    eigen_left: Directions


def portrait(circuit: LowRank, reads: Dictionary, writes: Dictionary, n: int = 4, k: int = 5) -> Portrait:
    """The first n singular and eigenvectors of each head, as rows of a dictionary and as shares of task variables.

    It says what the weights prefer, not that inputs get there; and among many rows some are extreme in any direction
    (heads.directions.max_activating has the controls). Vectors of eigenvalues that nearly repeat are arbitrary within
    their span, as all vectors of a head that copies every direction alike are: there the singular values tell more.

    Args:
        circuit: [...,D,D], such as some heads of qk(weights) or ov(weights).
        reads: what is read, queries for QK or attended residuals for OV; with left singular, right eigenvectors.
        writes: keys for QK or rows of W_U^T for OV; with right singular, left eigenvectors.
        n, k: how many directions, and rows at either end.

    Returns:
        NaN and -1 in the directions of a value that cannot be told from zero: a singular value up to 1e-6 of the
        largest, or an eigenvalue up to condition times that. Heads in turn meet the rows: [N,R] is held of one.

    Raises:
        ValueError: circuit, a dictionary, n or k of the wrong shape or size.
    """
    _check(circuit, reads, writes, n, k)
    u, s, vh = circuit.svd()
    group = tied_groups(s)
    tied = group[..., :n, None] == group[..., None, :]
    known = (s > ROUNDING * s[..., :1])[..., :n]

    eigen = circuit.eigenvectors()
    values, condition = eigen.values[..., :n], eigen.condition[..., :n]
    right, left = _with_signs(*(_plane(vectors[..., :n]) for vectors in (eigen.right, eigen.left)))
    each = jnp.broadcast_to(jnp.eye(n, dtype=bool), (*values.shape, n))
    in_plane = jnp.concatenate([each, each & (values.imag != 0)[..., None]], -1)
    eigen_known = jnp.abs(values) > ROUNDING * condition * s[..., :1]

    return Portrait(
        singular_values=s[..., :n],
        group=group[..., :n],
        group_size=tied.sum(-1),
        read=_directions(reads, u, tied, known, k),
        written=_directions(writes, vh.mT, tied, known, k),
        eigenvalues=values,
        condition=condition,
        eigen_right=_directions(reads, right, in_plane, eigen_known, k),
        eigen_left=_directions(writes, left, in_plane, eigen_known, k),
    )


def _directions(dictionary: Dictionary, vectors: Array, members: Array, known: Array, k: int) -> Directions:
    """Of heads' orthonormal vectors [...,D,C], the first n the directions, whose subspaces have members [...,n,C]."""
    rows, mean = dictionary.rows, dictionary.rows.mean(0)
    spans = {name: _span(classes) for name, classes in dictionary.variables.items()}
    chance = {name: jnp.any(span != 0, -1).sum() / span.shape[-1] for name, span in spans.items()}

    def of_head(head: tuple[Array, Array, Array]) -> tuple[Ranked, Ranked, dict[str, Array]]:
        vectors, members, known = head
        weights, size = members.T.astype(vectors.dtype), members.sum(-1)
        coordinates = matmul(rows, vectors) - matmul(mean, vectors)
        length = jnp.sqrt(matmul(jnp.square(coordinates), weights))
        projection = jnp.where(size == 1, coordinates[:, : len(members)], length).T

        def extreme(sign: float, known: Array) -> Ranked:
            values, places = jax.lax.top_k(sign * projection, k)
            return Ranked(jnp.where(known, sign * values, jnp.nan), jnp.where(known, places, -1))

        inside = {name: jnp.square(matmul(span, vectors)).sum(0) for name, span in spans.items()}
        shares = {name: jnp.where(known, matmul(x, weights) / size, jnp.nan) for name, x in inside.items()}
        return extreme(1.0, known[:, None]), extreme(-1.0, (known & (size == 1))[:, None]), shares

    batch = known.shape[:-1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), (vectors, members, known))
    top, bottom, shares = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), jax.lax.map(of_head, flat))
    return Directions(top, bottom, shares, {name: jnp.broadcast_to(x, known.shape) for name, x in chance.items()})


def _span(classes: Array) -> Array:
    """Orthonormal rows that span the differences between class means [C,D], the others zero: [min(C,D),D]."""
    _, s, basis = linear_algebra.svd(classes - classes.mean(0))
    differ = ~(s <= ROUNDING * jnp.linalg.norm(classes))  # NaN stays
    return jnp.where(differ[:, None], basis, 0)


def _plane(vectors: Array) -> tuple[Array, Array]:
    """Orthonormal [...,D,n] and [...,D,n] with the span of the real and the imaginary part of complex [...,D,n].

    Turned so that y^T y is real and positive, the parts are orthogonal and the real one is the longer; of a vector
    that is real but for its phase it is all, and the second is zero or rounding.
    """
    turned = vectors * jnp.exp(-0.5j * jnp.angle(jnp.square(vectors).sum(-2, keepdims=True)))
    return _unit(turned.real), _unit(turned.imag)


def _unit(vectors: Array) -> Array:
    length = jnp.linalg.norm(vectors, axis=-2, keepdims=True)
    return vectors / jnp.where(length == 0, 1.0, length)


def _with_signs(right: tuple[Array, Array], left: tuple[Array, Array]) -> tuple[Array, Array]:
    """Both planes as [...,D,2n], the first right vectors' entry of largest magnitude positive, left . right >= 0."""
    largest = right[0].max(-2, keepdims=True) >= -right[0].min(-2, keepdims=True)
    alike = (left[0] * right[0]).sum(-2, keepdims=True) >= 0
    return (
        jnp.concatenate([jnp.where(largest, right[0], -right[0]), right[1]], -1),
        jnp.concatenate([jnp.where(largest == alike, left[0], -left[0]), left[1]], -1),
    )


def _check(circuit: LowRank, reads: Dictionary, writes: Dictionary, n: int, k: int) -> None:
    if circuit.shape[-2] != circuit.shape[-1]:
        raise ValueError(f"circuit must be [...,D,D]; got {list(circuit.shape)}")
    d_model = circuit.shape[-1]
    for side, (rows, variables) in (("reads", reads), ("writes", writes)):
        if rows.ndim != 2 or rows.shape[-1] != d_model:
            raise ValueError(f"{side}.rows must be [N,{d_model}]; got {list(rows.shape)}")
        for name, classes in variables.items():
            if classes.ndim != 2 or classes.shape[-1] != d_model or len(classes) < 2:
                raise ValueError(
                    f"{side}.variables[{name!r}] must be [C,{d_model}] of C >= 2 classes; got {list(classes.shape)}"
                )
    for name, value, most in (
        ("n", n, min(d_model, circuit.left.shape[-1])),
        ("k", k, min(len(reads.rows), len(writes.rows))),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be between 1 and {most}; got {value}")
