"""What a head is: from evidence to labels, QK types x OV types, by weights and by activations, or undetermined.

A label needs three things of one kind of evidence: a score beyond the calibrated threshold (thresholds.py), a null
that is beaten at a false discovery rate over the heads of the model, and no more specific label that says the same.
It is supported when weights and activations agree on it; where only one of them says so, the report says which.

Types look back, in encoders too: one that attends ahead is undetermined. In a post-norm model weights say nothing of
heads that serve each other (ideal_inputs.py), and OV types are of what a head writes as W_U would read it
(value_scores.py).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import nulls
from circuits_jax.heads.realisation import on_own_batch, realisation
from circuits_jax.heads.structure import structure
from circuits_jax.heads.thresholds import RATE, THRESHOLDS, Threshold
from circuits_jax.heads.type_evidence import Evidence, Scores
from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.transformer import Params, check_tokens

TYPES = (*QK_TYPES, *OV_TYPES)
# A type is said only where none of these is: they say more, or the opposite.
UNLESS: dict[str, tuple[str, ...]] = {
    "content": ("duplicate_token", "induction"),
    "diffuse": tuple(name for name in QK_TYPES if name != "diffuse"),
    "copying": ("inactive",),
    "suppressing": ("inactive",),
    "transforming": ("inactive", "copying", "suppressing"),
    "extracting": ("inactive",),
}
PATHS = ("query", "key", "value")
DEFAULT_LENGTH = 32
SHORTEST = 8  # sequence on which types can be told apart
ESTABLISHES = {
    "supported": "weights prefer it on ideal inputs, and on designed inputs the head does it; not that the model's own "
    "inputs ask for it, nor that anything downstream depends on it (see ablate_heads and cut_edges)",
    "structure only": "weights prefer it on ideal inputs; on designed inputs the head does not do it, so what it reads "
    "does not reach it",
    "realised only": "on designed inputs the head does it; by what of its inputs, ideal ones do not show",
    "structure": "weights prefer it on ideal inputs; whether real inputs realise it has not been looked at",
}


@dataclasses.dataclass(frozen=True)
class Findings:
    """What one kind of evidence says, {type: [...,L,H]}.

    Attributes:
        confidence: in [0, 1], calibrated on planted heads; 0 where the null is not beaten.
        p: one-sided, against the null.
        found: bool.
    """

    confidence: dict[str, np.ndarray]
    p: dict[str, np.ndarray]
    found: dict[str, np.ndarray]


def judge(evidence: Evidence, thresholds: dict[str, Threshold], rate: float = RATE) -> Findings:
    """Labels from one kind of evidence.

    Args:
        evidence: scores and z, [...,L,H] each, of one model or of many.
        thresholds: for each type.
        rate: false discovery rate over the heads of the model.
    """
    p = {name: np.asarray(nulls.upper_p(jnp.asarray(z))) for name, z in evidence.z.items()}
    beaten = {name: _beaten(x, rate) for name, x in p.items()}
    confidence = {}
    for name, score in evidence.scores.items():
        middle, slope = thresholds[name]
        margin = np.clip(slope * (np.nan_to_num(np.asarray(score, float), nan=-np.inf) - middle), -700.0, 700.0)
        confidence[name] = np.where(beaten[name], 1.0 / (1.0 + np.exp(-margin)), 0.0)
    likely = {name: value > 0.5 for name, value in confidence.items()}
    found = {
        name: value & ~np.logical_or.reduce([likely[other] for other in UNLESS.get(name, ())] or [np.zeros_like(value)])
        for name, value in likely.items()
    }
    return Findings(confidence, p, found)


def _beaten(p: np.ndarray, rate: float) -> np.ndarray:
    """benjamini_hochberg over the heads of each model, [...,L,H]."""
    models = jnp.asarray(p).reshape(-1, p.shape[-2] * p.shape[-1])
    return np.asarray(jax.vmap(lambda x: nulls.benjamini_hochberg(x, rate))(models)).reshape(p.shape)


def sides() -> tuple[dict[str, Threshold], ...]:
    """The thresholds for evidence from weights, and for evidence from activations."""
    return tuple({name: pair[side] for name, pair in THRESHOLDS.items()} for side in (0, 1))


def stacked(by_weights: Evidence, by_activations: Evidence) -> dict[str, Array]:
    """{type_scores, type_z: [2,13,L,H]}, weights first, types in the order of TYPES: for programs over many runs."""
    both = (by_weights, by_activations)
    pick = lambda kind: jnp.stack([jnp.stack([getattr(x, kind)[name] for name in TYPES]) for x in both])  # noqa: E731
    return {"type_scores": pick("scores"), "type_z": pick("z")}


def judge_stacked(scores: np.ndarray, z: np.ndarray) -> tuple[Findings, Findings]:
    """judge of what stacked gave, [...,2,13,L,H] with runs in front, by the thresholds of each kind of evidence."""

    def of_side(side: int, thresholds: dict[str, Threshold]) -> Findings:
        by_score, by_z = (
            {name: jnp.asarray(x[..., side, i, :, :]) for i, name in enumerate(TYPES)} for x in (scores, z)
        )
        return judge(Evidence(by_score, by_z, details={}), thresholds)

    by_weights, by_activations = map(of_side, (0, 1), sides())
    return by_weights, by_activations


@dataclasses.dataclass(frozen=True)
class Score:
    """One type of one head by one kind of evidence: score, its z and one-sided p against the null, confidence."""

    score: float
    z: float
    p: float
    confidence: float
    found: bool


@dataclasses.dataclass(frozen=True)
class Label:
    """A type that was found.

    Attributes:
        name: one of QK_TYPES or OV_TYPES.
        verdict: "supported" by weights and activations; "structure only" or "realised only" where they disagree;
            "structure" where only weights were looked at.
        confidence: of the weaker kind of evidence that says so.
        note: offset, mechanism, source or reader.
    """

    name: str
    verdict: str
    confidence: float
    note: str = ""

    @property
    def establishes(self) -> str:
        """What the verdict establishes and what it does not."""
        return ESTABLISHES[self.verdict]

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        doubt = "" if self.verdict in ("supported", "structure") else f" [{self.verdict}]"
        return f"{self.name}{note}{doubt}"


@dataclasses.dataclass(frozen=True)
class HeadReport:
    """What a head is, with everything that speaks for and against it.

    Attributes:
        head: "layer.head".
        qk: labels of where it looks; empty: undetermined.
        ov: labels of what it moves; empty: undetermined.
        evidence: {type: {"weights" or "activations": Score}}, for every type.
        own_batch: {type: score on the user's batch}, where one was given.
    """

    head: str
    qk: tuple[Label, ...]
    ov: tuple[Label, ...]
    evidence: dict[str, dict[str, Score]]
    own_batch: dict[str, float]

    def __str__(self) -> str:
        halves = (" + ".join(map(str, half)) or "undetermined" for half in (self.qk, self.ov))
        return f"{self.head}: {' × '.join(halves)}"


def classify_heads(
    config: TransformerConfig,
    params: Params,
    tokens: ArrayLike | None = None,
    *,
    queries: ArrayLike | None = None,
    bos: int | None = None,
    key: Array | None = None,
) -> dict[str, HeadReport]:
    """What every head of a model is: structure from weights, realisation on designed inputs, a report for each head.

    Args:
        config, params: the model.
        tokens: [B,T] a batch of the user's own, on which attention scores are reported as well; labels do not rest on
            it, because its alphabet and its periods can fake them.
        queries: [T] bool, which positions count for positional types, and the length of designed sequences; all of
            the first 32 when left out. A head may do its work only where its task needs it.
        bos: token that sequences begin with, if there is one.
        key: draws tokens, null heads and designed inputs; key 0 when left out.

    Returns:
        {"layer.head": HeadReport}.

    Raises:
        ValueError: a model, queries or tokens that cannot be judged.
    """
    queries, bos, key = _checked(config, queries, bos, key)
    batch = None if tokens is None else jnp.atleast_2d(check_tokens(config, tokens))
    by_weights, by_activations = _evidence(config, params, queries, key, bos)
    own = {} if batch is None else on_own_batch(config, params, batch)
    return reports(by_weights, by_activations, own)


def classify_weights(
    config: TransformerConfig,
    params: Params,
    *,
    queries: ArrayLike | None = None,
    bos: int | None = None,
    key: Array | None = None,
) -> dict[str, HeadReport]:
    """classify_heads from weights alone, without a forward pass: structural verdicts only."""
    queries, bos, key = _checked(config, queries, bos, key)
    return reports(_structure(config, params, queries, key, bos), None, {})


def _checked(
    config: TransformerConfig, queries: ArrayLike | None, bos: int | None, key: Array | None
) -> tuple[Array, int | None, Array]:
    counts = np.ones(min(config.n_context, DEFAULT_LENGTH), bool) if queries is None else np.asarray(queries)
    if counts.ndim != 1 or counts.dtype != bool:
        raise ValueError(f"queries must be bool [T]; got {counts.dtype} {list(counts.shape)}")
    if not SHORTEST <= len(counts) <= config.n_context:
        raise ValueError(
            f"queries must cover {SHORTEST} to n_context={config.n_context} positions, types cannot be told apart on "
            f"fewer; got {len(counts)}"
        )
    if bos is not None and not 0 <= bos < config.n_vocab:
        raise ValueError(f"bos must be in [0, n_vocab={config.n_vocab}); got {bos}")
    if config.n_vocab - (bos is not None) < SHORTEST:
        raise ValueError(f"n_vocab must leave at least {SHORTEST} tokens besides bos; got {config.n_vocab}")
    return jnp.asarray(counts), bos, jax.random.key(0) if key is None else key


@partial(jax.jit, static_argnums=(0, 4))
def _structure(config: TransformerConfig, params: Params, queries: Array, key: Array, bos: int | None) -> Evidence:
    return structure(CircuitWeights.from_params(config, params), queries, jax.random.split(key)[0], bos=bos).evidence


@partial(jax.jit, static_argnums=(0, 4))
def _evidence(
    config: TransformerConfig, params: Params, queries: Array, key: Array, bos: int | None
) -> tuple[Evidence, Evidence]:
    return evidence(config, params, queries, key, bos)


def evidence(
    config: TransformerConfig, params: Params, queries: Array, key: Array, bos: int | None = None
) -> tuple[Evidence, Evidence]:
    """From weights and from activations, for one model; jit it, and jax.lax.map it over runs to bound the memory."""
    structure_key, input_key = jax.random.split(key)
    found = structure(CircuitWeights.from_params(config, params), queries, structure_key, bos=bos)
    return found.evidence, realisation(config, params, found, queries, input_key, bos=bos)


def reports(by_weights: Evidence, by_activations: Evidence | None, own: Scores) -> dict[str, HeadReport]:
    """A report for each head of one model."""
    for_weights, for_activations = sides()
    kinds = {"weights": (by_weights, judge(by_weights, for_weights))}
    if by_activations is not None:
        kinds["activations"] = (by_activations, judge(by_activations, for_activations))
    n_layers, n_heads = by_weights.scores["diffuse"].shape

    def score(kind: str, name: str, at: tuple[int, int]) -> Score:
        seen, findings = kinds[kind]
        value, z, p, confidence = (float(x[name][at]) for x in (seen.scores, seen.z, findings.p, findings.confidence))
        return Score(value, z, p, confidence, found=bool(findings.found[name][at]))

    def report(at: tuple[int, int]) -> HeadReport:
        of_head = {name: {kind: score(kind, name, at) for kind in kinds} for name in TYPES}
        labels = {name: _label(name, of_head[name], _note(name, by_weights, at, n_heads)) for name in TYPES}
        qk, ov = (tuple(x for name in types if (x := labels[name])) for types in (QK_TYPES, OV_TYPES))
        own_here = {name: float(value[at]) for name, value in own.items()}
        return HeadReport(f"{at[0]}.{at[1]}", qk, ov, of_head, own_here)

    return {f"{layer}.{head}": report((layer, head)) for layer in range(n_layers) for head in range(n_heads)}


def _label(name: str, scores: dict[str, Score], note: str) -> Label | None:
    says = [score for score in scores.values() if score.found]
    if not says:
        return None
    confidence = min(score.confidence for score in says)
    if "activations" not in scores:
        return Label(name, "structure", confidence, note)
    if len(says) == 2:
        return Label(name, "supported", confidence, note)
    only = "structure only" if scores["weights"].found else "realised only"
    return Label(name, only, confidence, note if scores["weights"].found else "")


def _note(name: str, by_weights: Evidence, at: tuple[int, int], n_heads: int) -> str:
    """What weights add to a label: offset, mechanism, source, reader."""
    details = {key: value[at] for key, value in by_weights.details.items()}
    head = lambda flat: f"{int(flat) // n_heads}.{int(flat) % n_heads}"  # noqa: E731
    if name == "fixed_offset":
        return f"{int(details['offset'])} back"
    if name == "induction":
        return "K-composition" if details["by_k"] else "pointer, Q-composition"
    if name == "transforming" and details["reader"] >= 0:
        return f"read by the {PATHS[int(details['reading_path'])]} of {head(details['reader'])}"
    if name in ("copying", "suppressing", "transforming", "extracting") and details["source"] >= 0:
        return f"of what {head(details['source'])} sends"
    return ""
