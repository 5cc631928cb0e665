"""Circuits that were discovered in trained models: how small, how good on other data, and what backs them up."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from circuits_jax.heads import calibration, verdicts
from circuits_jax.heads.calibration import bootstrap_interval, proportion_interval
from circuits_jax.heads.edge_sets import edges_of
from circuits_jax.models import graph
from circuits_jax.models.config import TransformerConfig
from circuits_jax.reports.run_folder import Figure

QUALITIES = ("sufficiency", "necessity", "completeness", "minimality")
READING = """
Greedy discovery on one batch to a faithfulness of .9, numbers from another batch. The circuit is minimal: none of its
edges can be missed. The union also holds what takes over where the circuit is cut. Sufficiency: what is left of the
model's gain with these edges alone. Necessity: what is lost without them. Completeness: 1 minus the largest difference
that cutting the same part makes between the model and the edges found. Minimality: the least loss when an edge is cut.
"""


def figures(configs: Sequence[TransformerConfig], found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Figure]:
    """Of models of one part each: config, and {name: [M,...]} as weights_versus_effects keeps it."""
    out = {}
    all_of = {name: np.concatenate([part[name] for part in found]) for name in found[0] if name != "predicted"}
    sizes = all_of["circuit"].sum(-1)
    n = len(sizes)
    out["circuits"] = Figure("trained models in which circuits were searched", n)
    out["circuit_edges"] = Figure("median number of edges of a minimal circuit", *_median(sizes.astype(float)))
    out["union_edges"] = Figure("median number of edges with all backups", *_median(all_of["union"].sum(-1) * 1.0))
    for which in ("circuit", "union"):
        for quality in QUALITIES:
            text = f"{quality} of the {'minimal circuit' if which == 'circuit' else 'union'} on other data, median"
            out[f"{which}_{quality}"] = Figure(text, *_median(all_of[f"{which}_{quality}"]))
    backed = all_of["n_alternatives"] > 1
    out["backed_up"] = Figure("models with backups", float(backed.mean()), proportion_interval(int(backed.sum()), n))
    pairs = [_k_edges(config, part) for config, part in zip(configs, found, strict=True)]
    kept, named = (np.concatenate(x) for x in zip(*pairs, strict=True))
    for name, statistic, text in (
        ("k_edges_named", calibration.precision, "K-edges between heads in the union that weights name"),
        ("k_edges_found", calibration.recall, "K-edges that weights name that are in the union"),
    ):
        out[name] = Figure(text, statistic(kept, named), bootstrap_interval(statistic, kept, named))
    return out


def _median(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    return float(np.median(values)), bootstrap_interval(lambda x: float(np.median(x)), values)


def _k_edges(config: TransformerConfig, part: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[M,L,H,L,H] each: K-edges between heads that are in the union, and those that weights name."""
    unions = [edges_of(config, jnp.asarray(kept)) for kept in part["union"]]
    into_k = [graph.between_heads(config, edges)[graph.INPUTS.index("k")] for edges in unions]
    return np.stack(into_k).astype(bool), part["predicted"] > verdicts.THRESHOLD


def table(
    configs: Sequence[TransformerConfig], names: Sequence[str], found: Sequence[Mapping[str, np.ndarray]], most: int = 8
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the first circuits of each part, edge by edge."""
    header = ["models", "number", "minimal circuit", "sufficiency", "necessity", "with backups: heads", "necessity"]
    rows = []
    for config, name, part in zip(configs, names, found, strict=True):
        edges = np.array(graph.edge_names(config))
        for i in range(min(most, len(part["circuit"]))):
            heads = {e.split("->")[0] for e in edges[part["union"][i]]} - {"embedding"}
            row = [name, str(part["number"][i]), ", ".join(edges[part["circuit"][i]])]
            row += [f"{part['circuit_sufficiency'][i]:.2f}", f"{part['circuit_necessity'][i]:.2f}"]
            rows.append([*row, ", ".join(sorted(heads)), f"{part['union_necessity'][i]:.2f}"])
    return header, rows
