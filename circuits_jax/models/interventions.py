"""What a forward pass may change, as a pytree of arrays.

Because it is a pytree, one vmap ablates every head at once and one grad gives the attribution of every edge.
"""

import dataclasses

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interventions:
    """Changes to one forward pass; a field left as None changes nothing and costs nothing.

    Attributes:
        head_scale: [L,H] factor on each head's output; 0 is zero ablation, 1 no change.
        q_edges, k_edges, v_edges: [L,H,L,H] factor on what the receiving head (last two axes) reads, through its q, k
            or v input, of the sending head (first two axes); 0 cuts the edge, 1 keeps it. Only edges from an
            earlier to a later layer exist; the other entries are ignored. The sender's effect on everything else
            stays, and its output is the one after head_scale.
    """

    head_scale: Array | None = None
    q_edges: Array | None = None
    k_edges: Array | None = None
    v_edges: Array | None = None
