"""Which heads are previous-token and induction heads: by weights, by attention, by causal effect, each on its own.

By weights and by attention the taxonomy says what a head is; an induction head by weights also has to copy. By
effect, an edge is true when cutting it lowers the receiver's own induction attention by more than THRESHOLD; a sender
with such an edge is a previous-token head, and a receiver whose edges together do so is an induction head. Edges by
weights are held against the same threshold, with the fall that signatures.induction predicts. Nothing is fitted here.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from circuits_jax.heads import taxonomy

Evidence = Mapping[str, np.ndarray]
"""What heads.evidence.everything gives, with the runs S in front; NaN for a run that cannot be judged."""

THRESHOLD = 0.2  # of induction attention; fixed before on other runs, where it separates real edges from none
K_INPUT = 1  # place of k in the q, k, v axis of an edge effect
KINDS = ("weights", "attention", "effect")
TYPES = ("previous_token", "induction")


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Verdicts on every head and edge of S runs.

    Attributes:
        heads: {type: {kind of evidence: bool [S,L,H]}}.
        edges: {"weights", "effect": bool [S,L,H,L,H]}, sender first.
        types: {type: {"weights", "attention": bool [S,L,H]}}, all that the taxonomy says.
    """

    heads: dict[str, dict[str, np.ndarray]]
    edges: dict[str, np.ndarray]
    types: dict[str, dict[str, np.ndarray]]

    def agreed(self, head_type: str) -> np.ndarray:
        """Where all three kinds of evidence say so: bool [S,L,H]. Only such a head is reported without a caveat."""
        return np.logical_and.reduce([self.heads[head_type][kind] for kind in KINDS])


def judge(evidence: Evidence) -> Verdicts:
    """Verdicts on runs of any kind."""
    truth = causal(evidence)
    by_weights, by_attention = taxonomy.judge_stacked(evidence["type_scores"], evidence["type_z"])
    types = {
        name: {"weights": by_weights.found[name], "attention": by_attention.found[name]} for name in taxonomy.TYPES
    }
    heads = {name: types[name] | {"effect": truth[name]} for name in TYPES}
    heads["induction"]["weights"] = types["induction"]["weights"] & types["copying"]["weights"]
    edges = {"weights": np.greater(evidence["edge_weights"], THRESHOLD), "effect": edge_truth(evidence)}
    return Verdicts(heads, edges, types)


def causal(evidence: Evidence) -> dict[str, np.ndarray]:
    """The truth about heads, {type: bool [S,L,H]}."""
    return {
        "previous_token": np.any(edge_truth(evidence), axis=(-2, -1)),
        "induction": np.greater(evidence["joint_effect"][:, K_INPUT], THRESHOLD),
    }


def edge_truth(evidence: Evidence) -> np.ndarray:
    """The truth about K-edges, bool [S,L,H,L,H]."""
    return np.greater(evidence["edge_effect"][:, K_INPUT], THRESHOLD)


def earlier(edges: np.ndarray) -> np.ndarray:
    """The pairs of edges [...,L,H,L,H] whose sender is in an earlier layer: bool [L,H,L,H]."""
    n_layers, n_heads = edges.shape[-2:]
    layer = np.arange(n_layers)
    pairs = layer[:, None, None, None] < layer[:, None]
    return np.broadcast_to(pairs, (n_layers, n_heads, n_layers, n_heads))


def sound(evidence: Evidence) -> np.ndarray:
    """Runs that can be judged: bool [S]."""
    return np.all(np.isfinite(evidence["induction_attention"]), axis=(-2, -1))


def partners_right(evidence: Evidence) -> np.ndarray:
    """For every induction head (by effect) with a true edge: is its strongest sender by weights the one by effect?

    Returns:
        Float [S,L,H]: 1, 0, or NaN where the question does not arise.
    """
    weights, effects = evidence["edge_weights"], evidence["edge_effect"][:, K_INPUT]
    runs, layers, heads = weights.shape[:3]
    best = [edges.reshape(runs, layers * heads, layers, heads).argmax(1) for edges in (weights, effects)]
    asked = causal(evidence)["induction"] & edge_truth(evidence).any((1, 2))
    return np.where(asked, best[0] == best[1], np.nan)
