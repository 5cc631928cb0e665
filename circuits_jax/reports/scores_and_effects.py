"""The report of weights_versus_effects: which weight-only score says which causal effect, and why where it does not."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray
from scipy import stats

from circuits_jax.heads import calibration, verdicts
from circuits_jax.heads.calibration import bootstrap_interval, proportion_interval
from circuits_jax.reports import page, plots, results
from circuits_jax.reports.run_folder import Figure, figure_table

FAMILIES = ("trained", "planted")
UNITS = {"heads": "heads", "q": "edges into q", "k": "edges into k", "v": "edges into v"}
ESTIMATES = ("attribution", "integrated gradients")
LEAST_EFFECT = {"loss": 0.1, "direct": 0.1, "own scores": 0.5}  # nats and logits; attention and outputs: THRESHOLD
ASLEEP = 0.1  # of the median norm in its model, below which W_OV or W_QK of a head is dormant
# Below which a head does not read its inputs, does not look anywhere, or an edge does not enter the scores.
READS, FOCUSED, ENTERS = 0.1, 0.1, 0.5
NEAR = 0.1  # a score and an effect in the same units that differ by less are a matter of the threshold
N_RESAMPLES = 100
READING = f"""
An effect counts as there above a number set before: {verdicts.THRESHOLD} of attention (a fall of the receiver's
induction attention, a total variation distance) or of what a head writes, {LEAST_EFFECT["loss"]} nats of loss,
{LEAST_EFFECT["direct"]} logits of the target. The threshold of a score is one number for all models, trained and
planted, of all kinds of positions: the best F1 on one half of the models; precision and recall are those on the other
half. Intervals are 95 % over models. AUROC below .5 says that a score speaks against an effect. Planted models are
asked the same question (repeats), for which many of their heads were not made: what they are made for is in
recover_planted.
"""


# --- what was measured ---


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


# --- figures, tables, pictures ---

K_SCORES = ("predicted fall", "gap x previous token", "diagonal gap", "Frobenius composition", "Frobenius z")
HEAD_QUESTIONS = (
    ("type: previous token", "induction attention of another head"),
    ("type: induction", "all k cut: own induction attention"),
    ("predicted fall, all K-edges cut", "all k cut: own induction attention"),
    ("type: copying", "direct logit of the target"),
    ("eigenvalues: copying", "direct logit of the target"),
)


def figures(compared: Compared) -> dict[str, Figure]:
    """The numbers that matter most."""
    out = {}
    for family in FAMILIES:
        table = compared.tables["k"][family]
        out[f"{family}_models"] = Figure(
            f"{family} models", len(table.fits), None, (">=", 32) if family == "trained" else None
        )
        pair = compared.pair("k", "predicted fall", "own induction attention", family)
        aims = (0.995, 0.95, 0.95) if family == "trained" else (None, None, None)
        for name, value, interval, aim in (
            ("AUROC", pair.auroc, pair.auroc_interval, aims[0]),
            ("precision, other half", pair.precision, None, aims[1]),
            ("recall, other half", pair.recall, None, aims[2]),
            ("rank correlation", pair.correlation, pair.correlation_interval, None),
        ):
            key = f"{family}_k_predicted_{name.split(',')[0].lower().replace(' ', '_')}"
            text = f"{family}: K-edges, predicted fall and measured own induction attention: {name}"
            out[key] = Figure(text, value, interval, None if aim is None else (">=", aim))
        says, there = table.scores["predicted fall"] > verdicts.THRESHOLD, table.effects["own induction attention"]
        there = there > verdicts.THRESHOLD
        for name, statistic in (("precision", calibration.precision), ("recall", calibration.recall)):
            out[f"{family}_k_unfitted_{name}"] = Figure(
                f"{family}: K-edges, predicted fall above {verdicts.THRESHOLD}, nothing fitted: {name}",
                statistic(says, there), bootstrap_interval(statistic, says, there, n_resamples=N_RESAMPLES),
                (">=", 0.95) if family == "trained" else None,
            )  # fmt: skip
        for score in K_SCORES[1:]:
            pair = compared.pair("k", score, "own induction attention", family)
            key = score.lower().replace(" ", "_")
            out[f"{family}_k_{key}_auroc"] = Figure(
                f"{family}: K-edges, {score}: AUROC", pair.auroc, pair.auroc_interval
            )
        for score, effect in HEAD_QUESTIONS:
            pair = compared.pair("heads", score, effect, family)
            out[f"{family}_{score}: {effect}"] = Figure(
                f"{family}: heads, {score} for {effect}: AUROC", pair.auroc, pair.auroc_interval
            )
        for estimate in ESTIMATES:
            values, interval = _estimate(compared.tables, family, estimate)
            out[f"{family}_{estimate}"] = Figure(
                f"{family}: {estimate} and exact loss of all head edges, rank correlation", values, interval
            )
    reasons = disagreements(compared)
    told = [count for row in reasons for reason, count in row[3].items() if reason != "not explained"]
    n = sum(sum(row[3].values()) for row in reasons)
    out["explained"] = Figure(
        f"disagreements of the tables below with a measured reason, of {n}", sum(told) / n if n else float("nan"),
        proportion_interval(sum(told), n),
    )  # fmt: skip
    return out


def _estimate(
    tables: Mapping[str, Mapping[str, Table]], family: str, estimate: str
) -> tuple[float, tuple[float, float]]:
    x, y = (np.concatenate([tables[unit][family].effects[name] for unit in "qkv"], 1) for name in (estimate, "loss"))
    return spearman(x, y), bootstrap_interval(spearman, x, y, n_resamples=N_RESAMPLES)


def disagreements(compared: Compared) -> list[tuple[str, str, str, dict[str, int]]]:
    """(family, question, direction, {reason: count}) on the models that did not choose the thresholds."""
    out = []
    for family in FAMILIES:
        edges, heads = compared.tables["k"][family], compared.tables["heads"][family]
        for score in K_SCORES:
            threshold = compared.pair("k", score, "own induction attention", family).threshold
            for direction, counts in why_edges(edges, score, threshold, ~edges.fits).items():
                out.append((family, f"K-edges: {score}", direction, counts))
        for score, effect in HEAD_QUESTIONS:
            threshold = compared.pair("heads", score, effect, family).threshold
            for direction, counts in why_heads(heads, score, threshold, effect, ~heads.fits).items():
                out.append((family, f"heads: {score} for {effect}", direction, counts))
    return out


def reason_table(compared: Compared) -> tuple[list[str], list[list[str]]]:
    """Header and rows of disagreements."""
    header = ["models", "score", "direction", "all", *REASONS]
    rows = [
        [family, question, direction, str(sum(counts.values())), *(str(counts.get(r, "")) for r in REASONS)]
        for family, question, direction, counts in disagreements(compared)
    ]
    return header, rows


def best_table(compared: Compared) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for every effect the score that says it best, by AUROC."""
    header = ["of", "effect", "models", "there", "best score", "AUROC", "rank correlation"]
    header += ["precision", "recall", "next best"]
    rows = []
    for unit in UNITS:
        for effect in dict.fromkeys(p.effect for p in compared.pairs if p.unit == unit):
            for family in FAMILIES:
                of = [p for p in compared.pairs if (p.unit, p.effect, p.family) == (unit, effect, family)]
                ranked = sorted((p for p in of if np.isfinite(p.auroc)), key=lambda p: -p.auroc)
                if not ranked:
                    continue
                best = ranked[0]
                row = [UNITS[unit], effect, family, f"{best.n_true} of {best.n}", best.score]
                row += [_ranged(best.auroc, best.auroc_interval), _ranged(best.correlation, best.correlation_interval)]
                row += [f"{best.precision:.2f}", f"{best.recall:.2f}"]
                rows.append([*row, ", ".join(f"{p.score} {p.auroc:.2f}" for p in ranked[1:3])])
    return header, rows


def _ranged(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} ({interval[0]:.2f} to {interval[1]:.2f})"


def tables(compared: Compared, found: Mapping[str, Figure]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """All tables by title."""
    return {
        "Figures": figure_table(found),
        "Which score says which effect": best_table(compared),
        "Why they disagree": reason_table(compared),
    }


def datasets(compared: Compared, settings: Mapping[str, Any]) -> dict[str, xarray.Dataset]:
    """Every head and edge with all scores and effects, and every pair of score and effect, labelled."""
    out = {}
    for unit, families in compared.tables.items():
        for family, table in families.items():
            arrays: dict[str, Any] = {"part": table.part, "fits": table.fits, "planted": table.planted}
            dims: dict[str, tuple[str, ...]] = {"part": ("model",), "fits": ("model",), "planted": ("model", "unit")}
            for kind in ("scores", "effects", "conditions"):
                of_kind = getattr(table, kind)
                arrays[kind] = np.stack(list(of_kind.values()), -1)
                dims[kind] = ("model", "unit", kind[:-1])
            names = {kind[:-1]: list(getattr(table, kind)) for kind in ("scores", "effects", "conditions")}
            out[f"{unit}_{family}"] = results.dataset(arrays, dims, names, settings)
    fields = [field.name for field in dataclasses.fields(Pair)]
    columns = {name: np.asarray([getattr(pair, name) for pair in compared.pairs]) for name in fields}
    dims = {name: ("pair", "bound") if name.endswith("interval") else ("pair",) for name in fields}
    out["pairs"] = results.dataset(columns, dims, {"bound": ["low", "high"]}, settings)
    return out


def sections(compared: Compared, found: Mapping[str, Figure]) -> list:
    """Sections of the page."""
    parts = [(title, [page.table(*table)]) for title, table in tables(compared, found).items()]
    parts[0][1].append(page.paragraph(READING))
    pictures = [("K-edges: predicted and measured", [page.figure(_scatter(compared))])]
    pictures.append(("Scores against effects", [page.figure(x) for x in _scatters(compared)]))
    pictures += [
        (
            f"Every score, every effect: {UNITS[unit]}",
            [page.figure(_map(compared, unit, family)) for family in FAMILIES],
        )
        for unit in UNITS
    ]
    return [parts[0], *pictures[:2], *parts[1:], *pictures[2:]]


def _scatter(compared: Compared) -> Any:
    groups = {}
    for family, table in compared.tables["k"].items():
        groups[family] = (table.scores["predicted fall"].ravel(), table.effects["own induction attention"].ravel())
    title = "The fall of the receiver's induction attention when a K-edge is cut"
    return plots.scatter(groups, title, "predicted from weights", "measured")


def _scatters(compared: Compared) -> list[Any]:
    """The other scores, each against the effect that it is meant to say."""
    asked = [("k", score, "own induction attention") for score in K_SCORES[1:4]]
    asked += [("heads", *question) for question in HEAD_QUESTIONS[:1] + HEAD_QUESTIONS[3:]]
    panels = {}
    for unit, score, effect in asked:
        of = compared.tables[unit]
        panels[score, effect] = {f: (t.scores[score].ravel(), t.effects[effect].ravel()) for f, t in of.items()}
    return [plots.scatters(dict(list(panels.items())[i : i + 3]), "") for i in (0, 3)]


def _map(compared: Compared, unit: str, family: str) -> Any:
    """AUROC of every score for every effect."""
    of = [p for p in compared.pairs if (p.unit, p.family) == (unit, family)]
    scores, effects = (list(dict.fromkeys(getattr(p, name) for p in of)) for name in ("score", "effect"))
    values = np.full((len(scores), len(effects)), np.nan)
    for pair in of:
        values[scores.index(pair.score), effects.index(pair.effect)] = pair.auroc
    return plots.tables({family: (values, effects, scores)}, f"AUROC, {UNITS[unit]}, {family} models")
