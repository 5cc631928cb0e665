"""Scores and effects of all heads and edges of weights_versus_effects: how well each says the other, and why not."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from circuits_jax.heads import calibration, verdicts
from circuits_jax.heads.calibration import bootstrap_interval

FAMILIES = ("trained", "planted")
UNITS = {"heads": "heads", "q": "edges into q", "k": "edges into k", "v": "edges into v"}
ESTIMATES = ("attribution", "integrated gradients")
LEAST_EFFECT = {"loss": 0.1, "direct": 0.1, "own scores": 0.5}  # nats and logits; attention and outputs: THRESHOLD
ASLEEP = 0.1  # of the median norm in its model, below which W_OV or W_QK of a head is dormant
# Below which a head does not read its inputs, does not look anywhere, or an edge does not enter the scores.
READS, FOCUSED, ENTERS = 0.1, 0.1, 0.5
NEAR = 0.1  # a score and an effect in the same units that differ by less are a matter of the threshold
N_RESAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Looked:
    """What was measured on the M models of a part, {path: [M,...]} with the names of heads/comparison.py."""

    name: str
    family: str
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Table:
    """Heads or edges of one family, [M,U]: the U of each of M models.

    Attributes:
        scores, effects: {name: [M,U]}.
        conditions: {name: [M,U]}; of edges: "sender ..." and "receiver ...".
        part: [M] names.
        fits: [M] bool, the models on which thresholds are fitted.
        planted: [M,U] bool, edges that were planted.
    """

    scores: dict[str, np.ndarray]
    effects: dict[str, np.ndarray]
    conditions: dict[str, np.ndarray]
    part: np.ndarray
    fits: np.ndarray
    planted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """How well one score says one effect in one family of models.

    Attributes:
        unit, score, effect, family: what is compared.
        n, n_true: how many there are, and of how many the effect counts as there.
        auroc, correlation: with intervals over models; the correlation is Spearman's.
        threshold: of the score, shared by all families.
        precision, recall: on the models that did not choose the threshold.
    """

    unit: str
    score: str
    effect: str
    family: str
    n: int
    n_true: int
    auroc: float
    auroc_interval: tuple[float, float]
    correlation: float
    correlation_interval: tuple[float, float]
    threshold: float
    precision: float
    recall: float


@dataclasses.dataclass(frozen=True)
class Compared:
    """All tables, {unit: {family: Table}}, and all pairs of score and effect."""

    tables: dict[str, dict[str, Table]]
    pairs: list[Pair]

    def pair(self, unit: str, score: str, effect: str, family: str) -> Pair:
        """One of the pairs."""
        wanted = (unit, score, effect, family)
        return next(p for p in self.pairs if (p.unit, p.score, p.effect, p.family) == wanted)


def compare(looked: Sequence[Looked]) -> Compared:
    """Every score with every effect."""
    tables = {
        unit: {family: _table(unit, [x for x in looked if x.family == family]) for family in FAMILIES} for unit in UNITS
    }
    return Compared(tables, [pair for unit in UNITS for pair in _pairs(unit, tables[unit])])


def _table(unit: str, looked: Sequence[Looked]) -> Table:
    def under(prefix: str) -> dict[str, np.ndarray]:
        names = [path for path in looked[0].arrays if path.startswith(prefix)]
        return {p.removeprefix(prefix): np.concatenate([_units(x.arrays[p]) for x in looked]) for p in names}

    n_models = [len(x.arrays["planted_edges"]) for x in looked]
    part = np.repeat([x.name for x in looked], n_models)
    fits = np.concatenate([np.arange(n) % 2 == 0 for n in n_models])
    if unit == "heads":
        scores, effects = under("head_scores/"), under("head_effects/")
        conditions = {name: np.concatenate([_units(_condition(x, unit, name)) for x in looked]) for name in OF_HEADS}
        planted = np.zeros_like(next(iter(scores.values())), bool)
    else:
        scores, effects = under(f"edge_scores/{unit}/"), under(f"edge_effects/{unit}/")
        conditions = {
            f"{end} {name}": np.concatenate([_units(_spread(_condition(x, unit, name), end)) for x in looked])
            for end in ("sender", "receiver")
            for name in (*OF_HEADS, "all cut")
        }
        number = "qkv".index(unit)
        planted = np.concatenate([_units(x.arrays["planted_edges"][:, number]) for x in looked])
    return Table(scores, effects, conditions, part, fits, planted)


def _units(values: np.ndarray) -> np.ndarray:
    """[M,L,H] -> [M,LH]; edges [M,L,H,L,H] -> [M,U], those to a later layer."""
    if values.ndim == 3:
        return values.reshape(len(values), -1)
    return values[:, verdicts.earlier(values)]


OF_HEADS = ("gain", "focus", "induction", "OV size", "QK size")


def _condition(looked: Looked, unit: str, name: str) -> np.ndarray:
    """Something about each head, [M,L,H]; sizes are norms over the median norm in the model."""
    if name == "all cut":
        return looked.arrays[f"head_effects/all {unit} cut: own induction attention"]
    if name.endswith("size"):
        norms = looked.arrays[f"head_scores/{name.replace('size', 'norm')}"]
        return norms / np.median(norms, axis=(1, 2), keepdims=True)
    return looked.arrays[f"conditions/{name}"]


def _spread(values: np.ndarray, end: str) -> np.ndarray:
    """[M,L,H] of the sending or the receiving head of every edge, [M,L,H,L,H]."""
    n_models, n_layers, n_heads = values.shape
    values = values[:, :, :, None, None] if end == "sender" else values[:, None, None]
    return np.broadcast_to(values, (n_models, n_layers, n_heads, n_layers, n_heads))


# --- how well scores say effects ---


def least(effect: str) -> float:
    """From what size on an effect counts as there."""
    name = effect.split(": ")[-1]
    return next((value for start, value in LEAST_EFFECT.items() if name.startswith(start)), verdicts.THRESHOLD)


def _pairs(unit: str, tables: Mapping[str, Table]) -> list[Pair]:
    out = []
    some = next(iter(tables.values()))
    for score in some.scores:
        for effect in some.effects:
            if effect in ESTIMATES or _never(tables, effect):
                continue
            fitted = [
                (t.scores[score][t.fits].ravel(), t.effects[effect][t.fits].ravel() > least(effect))
                for t in tables.values()
            ]
            threshold = best_threshold(*map(np.concatenate, zip(*fitted, strict=True)))
            for family, table in tables.items():
                x, y = table.scores[score], table.effects[effect]
                there = y > least(effect)
                held = ~table.fits
                found = x[held] > threshold
                out.append(
                    Pair(
                        unit=unit,
                        score=score,
                        effect=effect,
                        family=family,
                        n=x.size,
                        n_true=int(there.sum()),
                        auroc=calibration.auroc(x, there),
                        auroc_interval=bootstrap_interval(calibration.auroc, x, there, n_resamples=N_RESAMPLES),
                        correlation=spearman(x, y),
                        correlation_interval=bootstrap_interval(spearman, x, y, n_resamples=N_RESAMPLES),
                        threshold=threshold,
                        precision=calibration.precision(found, there[held]),
                        recall=calibration.recall(found, there[held]),
                    )
                )
    return out


def _never(tables: Mapping[str, Table], effect: str) -> bool:
    """Whether an effect is nowhere there: what a head moves does not change where it looks."""
    return not any((table.effects[effect] > least(effect)).any() for table in tables.values())


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold with the largest F1, in the middle between two scores; infinite where nothing is true.

    Args:
        scores: [n], NaN counts as below every threshold.
        truth: [n] bool.
    """
    if not truth.any():
        return float("inf")
    known = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-known, kind="stable")
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    sorted_scores = known[order]
    ends = np.append(sorted_scores[1:] < sorted_scores[:-1], True)  # a threshold cannot part ties
    last = int(np.argmax(np.where(ends, f1, -1.0)))
    if last + 1 == len(order) or not np.isfinite(sorted_scores[last + 1]):
        return float(np.nextafter(sorted_scores[last], -np.inf))
    return float((sorted_scores[last] + sorted_scores[last + 1]) / 2)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of everything with everything; NaN where one does not vary."""
    x, y = np.ravel(x), np.ravel(y)
    sound = np.isfinite(x) & np.isfinite(y)
    x, y = x[sound], y[sound]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


# --- why they disagree ---

REASONS = ("near the threshold", "dormant", "out of subspace", "redundant", "another function", "not explained")


def why_edges(table: Table, score: str, threshold: float, rows: np.ndarray) -> dict[str, dict[str, int]]:
    """K-edges whose score and effect on the receiver's induction attention disagree, counted by reason.

    Args:
        table: K-edges of one family.
        score, threshold: the score says that the edge is there above the threshold.
        rows: [M] bool, which models.

    Returns:
        {"score, no effect" and "effect, no score": {reason: count}}. The first reason that holds counts; all but the
        first two are measured on the batch: score and effect are in the same units and differ by less than .1 (near the
        threshold); W_OV of the sender or W_QK of the receiver has less than a tenth of the median norm (dormant); the
        sender writes less than a tenth of what its W_OV makes of random inputs, or the receiver's scores move by less
        than half a logit without the edge (out of subspace); cutting all K-edges at once has the effect (redundant);
        the receiver's induction attention is below the threshold to begin with (another function).
    """
    effect = table.effects["own induction attention"]
    says, there = table.scores[score] > threshold, effect > verdicts.THRESHOLD
    c = table.conditions
    near = np.abs(table.scores[score] - effect) < NEAR if score == "predicted fall" else np.zeros_like(there)
    reasons = {
        "near the threshold": near,
        "dormant": (c["sender OV size"] < ASLEEP) | (c["receiver QK size"] < ASLEEP),
        "out of subspace": (c["sender gain"] < READS) | (table.effects["own scores"] < ENTERS),
        "redundant": c["receiver all cut"] > verdicts.THRESHOLD,
        "another function": c["receiver induction"] < verdicts.THRESHOLD,
    }
    return {
        "score, no effect": _count(says & ~there & rows[:, None], reasons),
        "effect, no score": _count(there & ~says & rows[:, None], {"near the threshold": near}),
    }


def why_heads(table: Table, score: str, threshold: float, effect: str, rows: np.ndarray) -> dict[str, dict[str, int]]:
    """Heads whose score and effect disagree, counted by reason, as in why_edges.

    Out of subspace: the head writes less than a tenth of what its W_OV makes of random inputs. Redundant: zero
    ablation costs no loss, but does once another head is gone. Another function: ablation costs loss, or the head
    attends to something, which is not what the effect asks for.
    """
    says, there = table.scores[score] > threshold, table.effects[effect] > least(effect)
    alone = table.effects["loss, zero ablation"] > least("loss")
    backed = table.effects["loss, once another head is gone"] > least("loss")
    reasons = {
        "dormant": table.conditions["OV size"] < ASLEEP,
        "out of subspace": table.conditions["gain"] < READS,
        "redundant": ~alone & backed,
        "another function": alone | (table.conditions["focus"] > FOCUSED),
    }
    return {
        "score, no effect": _count(says & ~there & rows[:, None], reasons),
        "effect, no score": _count(there & ~says & rows[:, None], {}),
    }


def _count(which: np.ndarray, reasons: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many of `which` have each reason, the first of which counts."""
    counts, left = {}, which
    for name, holds in reasons.items():
        counts[name] = int((left & holds).sum())
        left = left & ~holds
    return counts | {"not explained": int(left.sum())}
