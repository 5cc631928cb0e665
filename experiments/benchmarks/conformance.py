"""How far are our logits, attention patterns and folded circuits from the reference implementation's, family by family?

    python experiments/benchmarks/conformance.py

Every folder of tests/fixtures/pretrained is a tiny random checkpoint with logits and patterns that the reference made
of it (make_pretrained.py there). Printed are the largest absolute errors in float32: of the logits, of the attention
patterns, and of the folded weights: the score of every query and key from their QK circuit at that offset, biases and
rotary positions in it, against the score in the forward pass. No download, a minute on two CPU cores.

AIM all of them at most 1e-4.
"""

import os

# Before jax is imported: the threads of OpenBLAS would spin against those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from rich.console import Console

from circuits_jax.circuits.attention import qk_with_bias
from circuits_jax.circuits.reading import normalized
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.models.interventions import Interventions, with_inputs
from circuits_jax.models.pretrained import load_pretrained
from circuits_jax.models.transformer import forward, segment_inputs
from circuits_jax.reports import run_folder
from circuits_jax.reports.console import print_table
from circuits_jax.reports.run_folder import Figure

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "pretrained"
N_CONTEXT = {"llama_longrope": 32}  # its frequencies change beyond the length that it was trained on
FAMILIES = {
    "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX, Pythia", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "gemma": "Gemma", "bert": "BERT", "roberta": "RoBERTa",
}  # fmt: skip
KINDS = ("logits", "patterns", "folded scores")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where to write."""

    runs_dir: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where run folders are."""


def cases() -> list[str]:
    """Every stored checkpoint."""
    return sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))


def errors(case: str) -> dict[str, float]:
    """Largest absolute error of each kind for one checkpoint."""
    expected = np.load(FIXTURES / case / "expected.npz")
    config, params = load_pretrained(FIXTURES / case, n_context=N_CONTEXT.get(case))
    changes = Interventions()
    if "segments" in expected:
        changes = with_inputs(config, changes, segment_inputs(params, expected["segments"]))
    logits, seen = forward(config, params, expected["tokens"], changes)
    weights = CircuitWeights.from_params(config, params)
    folded = np.asarray(jax.jit(jax.vmap(lambda residual: folded_scores(weights, residual)))(seen.residual[:, :-1]))
    visible = np.tril(np.ones(folded.shape[-2:], bool)) if config.causal else np.ones(folded.shape[-2:], bool)
    return {
        "logits": float(np.abs(logits - expected["logits"]).max()),
        "patterns": float(np.abs(seen.patterns - expected["patterns"]).max()),
        "folded scores": float(np.abs((folded - seen.scores)[..., visible]).max()),
    }


def folded_scores(weights: CircuitWeights, residual: Array) -> Array:
    """[x_i, 1] M_(i-j) [x_j, 1]^T / sqrt(K) with M of cj.qk_with_bias, of residuals [L,T,D]: [L,H,T,T].

    With qk-norm over the root mean squares of q and k, which are no circuit.
    """
    rows = normalized(weights, residual)
    rows = jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1))], -1)[:, None]
    length, d_head = residual.shape[1], weights.W_Q.shape[-1]
    place = jnp.arange(length)

    def at(offset: Array) -> Array:
        circuit = qk_with_bias(weights, offset)
        scores = (rows @ circuit.left) @ (rows @ circuit.right.mT).mT / d_head**0.5
        return jnp.where(place[:, None] - place == offset, scores, 0.0)

    scores = jax.lax.map(at, jnp.arange(1 - length, length)).sum(0)
    if weights.q_gain is None or weights.k_gain is None:
        return scores
    circuit = qk_with_bias(dataclasses.replace(weights, positions="none"))
    q, k = rows @ circuit.left, rows @ circuit.right.mT
    q_size, k_size = (
        jnp.sqrt(jnp.square(x / gain[:, None, None]).mean(-1) + weights.norm_epsilon)
        for x, gain in ((q, weights.q_gain), (k, weights.k_gain))
    )
    return scores / (q_size[..., :, None] * k_size[..., None, :])


def main(settings: Settings) -> None:
    """Prints the table and writes summary.json."""
    console = Console()
    found = {case: errors(case) for case in cases()}
    kinds = {case: json.loads((FIXTURES / case / "config.json").read_text())["model_type"] for case in found}
    rows, figures = [], {}
    for kind, family in FAMILIES.items():
        of_family = [case for case in found if kinds[case] == kind]
        worst = {name: max(found[case][name] for case in of_family) for name in KINDS}
        rows.append([family, str(len(of_family)), *(f"{worst[name]:.1e}" for name in KINDS)])
        for name in KINDS:
            figures[f"{kind}_{name.replace(' ', '_')}"] = Figure(f"{family}: {name}", worst[name], aim=("<=", 1e-4))
    print_table(console, "Largest absolute error", ["family", "checkpoints", *KINDS], rows)
    folder = settings.runs_dir / "benchmark_conformance"
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_summary(folder, figures)


if __name__ == "__main__":
    run_folder.run_command(lambda: tyro.cli(Settings, description=__doc__), main)
