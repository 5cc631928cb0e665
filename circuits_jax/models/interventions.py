"""What a forward pass may change, as a pytree of arrays.

Because it is a pytree, one vmap ablates every head at once and one grad gives the attribution of every edge.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from circuits_jax.models.config import TransformerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replacement:
    """(1 - mask) x + mask value for what the model computed, x: 0 keeps and 1 replaces, both exactly.

    Fractions interpolate, and the gradient with respect to the mask at 0 attributes the replacement. Where the mask
    is 0 the value still has to be finite.

    Attributes:
        value: what to put in place of x.
        mask: without the last axis of value.
    """

    value: Array
    mask: Array

    def of(self, x: Array) -> Array:
        """x, where the mask is 1 replaced."""
        mask = self.mask[..., None]
        return (1.0 - mask) * x + mask * self.value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edges:
    """One number for each edge of the graph of a model, the N senders in front; see graph.senders for their order.

    Arrays, here; results of effects may hold a pytree of arrays in each place.

    Only edges from an earlier to a later node exist (graph.existing); the other entries are ignored. A field that is
    None changes nothing and costs nothing.

    Attributes:
        q, k, v: [N,L,H] into what a head reads through its q, k or v input.
        mlp: [N,L] into what an MLP reads.
        logits: [N] into what is unembedded.
    """

    q: Any = None
    k: Any = None
    v: Any = None
    mlp: Any = None
    logits: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Interventions:
    """Changes to one forward pass; a field left as None changes nothing and costs nothing.

    For a batch, a field may hold one array for all sequences or have B in front: one for each.

    Attributes:
        head_scale: [L,H] factor on each head's output; 0 is zero ablation, 1 no change.
        head_outputs: value [L,H,T,D], mask [L,H,T]: what a head writes, after head_scale. With the outputs of another
            run: activation patching; with their mean over a batch: mean ablation.
        scores_added: [L,H,T,T] added to the attention scores, query first, in front of softmax.
        patterns: value [L,H,T,T], mask [L,H,T] over queries: where a head looks. With the patterns of the same tokens
            in a run without interventions: frozen patterns.
        mlp_outputs: value [L,T,D], mask [L,T]: what an MLP writes.
        residual: value [L+1,T,D], mask [L+1,T]: the residual stream, in the order of Activations.residual. Where it is
            replaced, nothing that was written before is left in it, and edges from there carry nothing.
        residual_added: [L+1,T,D] added to the residual stream, after residual.
        q_added, k_added, v_added: [L,H,T,D] added to what one head reads through one input, in front of the norm.
        edges: factor on what a receiver reads of a sender: x - sum_n (1 - e_n) (o_n - r_n), in front of the norm. 0
            cuts the edge, 1 keeps it. The sender's effect on everything else stays.
        edge_outputs: [N,T,D] the r_n above: what a cut edge carries in place of the sender's output o_n; nothing
            (zeros) when left out. With the outputs of another run: edge patching.
    """

    head_scale: Array | None = None
    head_outputs: Replacement | None = None
    scores_added: Array | None = None
    patterns: Replacement | None = None
    mlp_outputs: Replacement | None = None
    residual: Replacement | None = None
    residual_added: Array | None = None
    q_added: Array | None = None
    k_added: Array | None = None
    v_added: Array | None = None
    edges: Edges | None = None
    edge_outputs: Array | None = None

    def at_layer(self, layer: int) -> "Interventions":
        """The fields that are about the heads and the MLP of one layer, without L."""
        return Interventions(**jax.tree.map(lambda x: x[layer], {name: getattr(self, name) for name in OF_LAYERS}))


OF_LAYERS = ("head_scale", "head_outputs", "scores_added", "patterns", "mlp_outputs", "q_added", "k_added", "v_added")


def n_senders(config: TransformerConfig) -> int:
    """N: the embedding, then of each layer its heads and its MLP, if there is one."""
    return 1 + config.n_layers * (config.n_heads + bool(config.d_mlp))


def _shapes(config: TransformerConfig, length: int) -> dict[str, tuple[int, ...]]:
    """The shape of every array for a sequence of this length, by the path of its field."""
    layers, heads, d_model = config.n_layers, config.n_heads, config.d_model
    n = n_senders(config)
    replaced = {
        "head_outputs": (layers, heads, length, d_model),
        "patterns": (layers, heads, length, length),
        "mlp_outputs": (layers, length, d_model),
        "residual": (layers + 1, length, d_model),
    }
    return {
        "head_scale": (layers, heads),
        "scores_added": (layers, heads, length, length),
        **{f"{name}.value": shape for name, shape in replaced.items()},
        **{f"{name}.mask": shape[:-1] for name, shape in replaced.items()},
        "residual_added": (layers + 1, length, d_model),
        **{f"{name}_added": (layers, heads, length, d_model) for name in "qkv"},
        **{f"edges.{name}": (n, layers, heads) for name in "qkv"},
        "edges.mlp": (n, layers),
        "edges.logits": (n,),
        "edge_outputs": (n, length, d_model),
    }


def with_inputs(config: TransformerConfig, interventions: Interventions, inputs: Array | None) -> Interventions:
    """The interventions, and inputs [...,T,D] added to the residual stream where it starts; None adds nothing."""
    if inputs is None:
        return interventions
    added = jnp.pad(inputs[..., None, :, :], [(0, 0)] * (inputs.ndim - 2) + [(0, config.n_layers), (0, 0), (0, 0)])
    if interventions.residual_added is not None:
        added = added + interventions.residual_added
    return dataclasses.replace(interventions, residual_added=added)


def check(config: TransformerConfig, interventions: Interventions, length: int) -> None:
    """Raises ValueError that names the first array that one sequence of this length cannot take."""
    _with_wanted(config, interventions, length, None)


def batch_axes(config: TransformerConfig, interventions: Interventions, length: int, n_sequences: int) -> Interventions:
    """For vmap over sequences: 0 for an array with B in front, None for one that all sequences share.

    Raises:
        ValueError: an array has neither of the two shapes.
    """
    return _with_wanted(config, interventions, length, n_sequences)


def _with_wanted(
    config: TransformerConfig, interventions: Interventions, length: int, n_sequences: int | None
) -> Interventions:
    shapes = _shapes(config, length)

    def axis(path: tuple, array: Array) -> int | None:
        name = ".".join(entry.name for entry in path)
        if config.norm_position == "post" and "edge" in name:
            raise ValueError(
                f"{name}: edges need norm_position 'pre': a post-norm model rescales what was written, layer by layer, "
                "so that its residual stream is no sum of what senders wrote"
            )
        wanted, given = shapes[name], jnp.shape(array)
        if not config.d_mlp and "mlp" in name:
            raise ValueError(f"{name}: this model has no MLPs (d_mlp=0)")
        if given == wanted:
            return None
        if n_sequences is not None and given == (n_sequences, *wanted):
            return 0
        batched = "" if n_sequences is None else f", or {[n_sequences, *wanted]} for one of each sequence"
        raise ValueError(f"{name} must have shape {list(wanted)}{batched}; got {list(given)}")

    return jax.tree_util.tree_map_with_path(axis, interventions)
