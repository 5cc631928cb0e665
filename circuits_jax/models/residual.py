"""The residual stream under interventions: what was written to it, by node, and what each receiver reads of that."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.models.interventions import Interventions, Replacement

Read = tuple[Array, Array | None]
"""What is read through one input: [T,D], and what interventions add to that, [H,T,D] head by head ([T,D] for one).

They are kept apart and multiplied apart, so that an intervention that changes nothing changes no bit.
"""


@dataclasses.dataclass(frozen=True)
class Senders:
    """What was written to the residual stream so far, by node, less what a cut edge would carry instead of it.

    Attributes:
        written: arrays [n,T,D] of o - r, in the order of graph.senders.
        references: r [N,T,D], zero where None.
    """

    written: tuple[Array, ...]
    references: Array | None

    def followed_by(self, outputs: Array) -> "Senders":
        """With the outputs [n,T,D] of the next n nodes."""
        if self.references is not None:
            first = sum(map(len, self.written))
            outputs = outputs - self.references[first : first + len(outputs)]
        return dataclasses.replace(self, written=(*self.written, outputs))

    def read(self, x: Array, edges: Array | None, *receiver: int) -> Array:
        """x - sum_n (1 - e_n) (o_n - r_n): [T,D], or [H,T,D] for edges into the heads of a layer.

        Args:
            x: [T,D] the residual stream.
            edges: [N,...] factors, or None for x itself.
            receiver: index of the receiving layer in edges.
        """
        if edges is None:
            return x
        written = jnp.concatenate(self.written)
        return x - jnp.tensordot(1.0 - edges[: len(written), *receiver], written, (0, 0))


def change_residual(x: Array, senders: Senders, changes: Interventions, layer: int) -> tuple[Array, Senders]:
    """The residual stream [T,D] with the interventions in front of a layer in it, and what is left of its senders."""
    if changes.residual is not None:
        here = Replacement(changes.residual.value[layer], changes.residual.mask[layer])
        x, left = here.of(x), 1.0 - here.mask[:, None]
        senders = dataclasses.replace(senders, written=tuple(left * o for o in senders.written))
    return (x if changes.residual_added is None else x + changes.residual_added[layer]), senders


def plus(x: Array, added: Array | None) -> Array:
    """x + added, or x."""
    return x if added is None else x + added


def replaced(x: Array, replacement: Replacement | None) -> Array:
    """x with the replacement in it, or x."""
    return x if replacement is None else replacement.of(x)


def read_through(function: Callable[[Array], Array], x: Array, changed: Array) -> Read:
    """What a function, say a norm, makes of x [T,D] of which interventions leave `changed`, [T,D] or [H,T,D]."""
    shared = function(x)
    if changed is x:
        return shared, None
    own = function(changed) - shared
    # XLA may round the two differently. Rows that are as they were get exactly 0, and keep their gradient.
    same = (changed == x).all(-1, keepdims=True)
    return shared, own - jax.lax.stop_gradient(jnp.where(same, own, 0.0))


def times(read: Read, weights: Array) -> Array:
    """What one receiver reads, times its weights: [T,D] x [D,N]."""
    shared, own = read
    return shared @ weights if own is None else shared @ weights + own @ weights
