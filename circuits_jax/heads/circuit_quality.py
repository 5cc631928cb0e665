"""How good a discovered circuit is, on a batch that it was not searched on.

F is the faithfulness of discovery.py, C the circuit, M the whole model, a - b the edges of a that are not in b:

    sufficiency     F(C)                                             1: C scores what M scores
    necessity       1 - F(M - C)                                     1: nothing outside C does it
    completeness    1 - max over K in C of |F+(C - K) - F+(M - K)|   1: whatever of C is cut, C and M suffer alike
    minimality      min over edges e of C of F(C) - F(C - e)         above 0: every edge is needed

F+ = max(F, 0): by log-likelihood a broken model that is sure of wrong answers is far below one without any edges, and
how far says nothing about skill that is left. Faithfulness, completeness and minimality follow Wang et al. 2211.00593,
with edges in the place of heads. Of a model with backups the minimal circuit is neither necessary nor complete, and the
union of all alternatives is.
"""

import dataclasses

import jax
import numpy as np
from jax import Array

from circuits_jax.heads.discovery import Discovery
from circuits_jax.heads.edge_sets import CHUNK, Circuit, EdgeSet, ends, faithfulness
from circuits_jax.heads.outcomes import Metric, log_likelihood
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import Params
from circuits_jax.tasks.batch import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class SetQuality:
    """How good one set of edges C is; all numbers are shares of what the model gains over no edges at all.

    Attributes:
        sufficiency, necessity, completeness, minimality: as above; about 0 to 1, but no bound holds: cutting may help,
            and what is left may do worse than no edges at all.
        mean_gap: mean over the same K of |F+(C - K) - F+(M - K)|.
        edges: the edges e of C.
        falls: [n] F(C) - F(C - e), whose smallest is the minimality. Of a union of alternatives C_i, the largest of
            F(C_i) - F(C_i - e) over those that hold e: the others can do without it.
        removed: the names of the sets K: every edge of C, every node ("1.0": all edges of C from or to it; the
            embedding too), and random halves of C ("random 0", ...).
        circuit_without, model_without: [m] F(C - K) and F(M - K), not clipped.
    """

    sufficiency: float
    necessity: float
    completeness: float
    mean_gap: float
    minimality: float
    edges: tuple[str, ...]
    falls: np.ndarray
    removed: tuple[str, ...]
    circuit_without: np.ndarray
    model_without: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Quality:
    """Of the minimal circuit, and of the union of all alternatives; the same where there is one."""

    circuit: SetQuality
    union: SetQuality


def quality(
    config: TransformerConfig,
    params: Params,
    batch: Batch,
    found: Circuit | Discovery,
    metric: Metric = log_likelihood,
    reference: Array | None = None,
    n_random: int = 32,
    key: Array | None = None,
    chunk: int = CHUNK,
) -> Quality:
    """Sufficiency, necessity, completeness and minimality, all by one compiled program.

    About 3 forward passes for each edge and each node of the circuit and 2 for each random set.

    Args:
        config, params: the model.
        batch: B sequences, others than the circuit was searched on: there it reaches its target by construction.
        found: a circuit, or a discovery with its alternatives.
        metric: one number that rises with success; see outcomes.Metric.
        reference: what a cut edge carries, of this batch, as in edge_sets.faithfulness.
        n_random: how many random sets K; each edge is in it with a chance of one half.
        key: of these sets; jax.random.key(0) when left out.
        chunk: how many runs are held in memory at once.

    Raises:
        ValueError: a circuit of another model or without edges, n_random below 0, and as in edge_sets.faithfulness.
    """
    circuits = found.alternatives if isinstance(found, Discovery) else (found,)
    union = found.union if isinstance(found, Discovery) else found
    if any(circuit.config != config or not circuit.n_edges for circuit in (*circuits, union)):
        raise ValueError("found must be a circuit of this config that has edges")
    if n_random < 0:
        raise ValueError(f"n_random must be at least 0; got {n_random}")
    halves = _random_halves(config, jax.random.key(0) if key is None else key, n_random)
    asked = [_Asked.of(circuits[:1], circuits[0], halves), _Asked.of(circuits, union, halves)]
    rows = np.concatenate([one.rows() for one in asked])
    distinct, place = np.unique(rows, axis=0, return_inverse=True)
    shares = faithfulness(config, params, batch, distinct, metric, reference, chunk)[place.ravel()]
    of_circuit, of_union = np.split(shares, [len(asked[0].rows())])
    return Quality(asked[0].answer(of_circuit), asked[1].answer(of_union))


def _random_halves(config: TransformerConfig, key: Array, n: int) -> EdgeSet:
    """[n,E] bool."""
    return np.asarray(jax.random.bernoulli(key, 0.5, (n, len(ends(config)[0]))))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The sets of edges whose faithfulness the quality of one circuit needs.

    Attributes:
        circuit: [E] bool.
        alternatives: [a,E] bool, the minimal circuits that it is the union of.
        names, removed: of the sets K, and these [m,E] bool.
        edges, single: names of the edges of the circuit, and [n,E] each of them alone.
    """

    circuit: EdgeSet
    alternatives: EdgeSet
    names: tuple[str, ...]
    removed: EdgeSet
    edges: tuple[str, ...]
    single: EdgeSet

    @classmethod
    def of(cls, circuits: tuple[Circuit, ...], union: Circuit, halves: EdgeSet) -> "_Asked":
        kept, (sender, receiver) = union.kept, ends(union.config)
        edges, nodes, senders = union.edge_names(), union.nodes(), graph.senders(union.config)
        single = np.eye(len(kept), dtype=bool)[kept]
        numbers = np.array([senders.index(node) for node in nodes])[:, None]
        of_nodes = kept & ((sender == numbers) | (receiver == numbers))
        names = (*edges, *nodes, *(f"random {number}" for number in range(len(halves))))
        removed = np.concatenate([single, of_nodes, kept & halves])
        return cls(kept, np.stack([circuit.kept for circuit in circuits]), names, removed, edges, single)

    def rows(self) -> EdgeSet:
        """All sets, one after the other, in the order in which answer takes them apart."""
        without_one = (self.alternatives[:, None] & ~self.single).reshape(-1, len(self.circuit))
        main = np.stack([self.circuit, ~self.circuit])
        return np.concatenate([main, self.circuit & ~self.removed, ~self.removed, self.alternatives, without_one])

    def answer(self, shares: np.ndarray) -> SetQuality:
        """From the faithfulness of the rows."""
        m, n_alternatives = len(self.removed), len(self.alternatives)
        (sufficiency, outside), circuit_without, model_without, whole, without_one = np.split(
            shares, np.cumsum([2, m, m, n_alternatives])
        )
        falls = whole[:, None] - without_one.reshape(n_alternatives, len(self.single))
        held = self.alternatives[:, self.circuit]
        falls = np.where(held, falls, -np.inf).max(0)
        gaps = np.abs(np.maximum(circuit_without, 0.0) - np.maximum(model_without, 0.0))
        return SetQuality(
            sufficiency=float(sufficiency), necessity=float(1.0 - outside), completeness=float(1.0 - gaps.max()),
            mean_gap=float(gaps.mean()), minimality=float(falls.min()), edges=self.edges, falls=falls,
            removed=self.names, circuit_without=circuit_without, model_without=model_without,
        )  # fmt: skip
