"""The report of recover_planted: are labels right, how sure are they, and when does the taxonomy abstain?"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray

from circuits_jax.heads import calibration, nulls, taxonomy
from circuits_jax.heads.calibration import bootstrap_interval, proportion_interval
from circuits_jax.heads.structure import Evidence
from circuits_jax.heads.thresholds import RATE
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.planted_recipes import SENDERS, PlantedHead, Recipe
from circuits_jax.reports import page, plots, results
from circuits_jax.reports.run_folder import Figure, figure_table

TYPES = (*QK_TYPES, *OV_TYPES)
MEASURED = ("diffuse", "inactive")  # types that heads without design can really be
TRUTH = ("qk", "ov", "realised_qk", "realised_ov", "offset", "place")
POSITIONAL = ("previous_token", "fixed_offset", "same_position")
BY_TOKEN = ("duplicate_token", "content")
SIDES = ("weights", "activations")
EQUAL_NOISE = 1.0
NOT_DIFFUSE = 0.9  # entropy on i.i.d. tokens below which calling a head diffuse is wrong
NOT_INACTIVE = 0.02  # share of the residual's length above which calling a head inactive is wrong
READING = """
A label is counted when weights and activations both say so ("supported"); thresholds were fitted on models of other
keys. Truth is what was planted. Noise is the ratio of noise to signal energy in the subspace that a head uses. Random
heads have fan-in weights with W_Q and W_K times 1, 3 or 10; trained ones saw i.i.d. tokens; both kinds have nothing to
find, but diffuse and inactive heads among them are what they are, and such a label counts as false only where a direct
measurement contradicts it.
"""


@dataclasses.dataclass(frozen=True)
class Looked:
    """The evidence on the models of one part.

    Attributes:
        kind: "planted", "random" or "trained".
        labels: positions, norm, recipe.
        arrays: by flat name, with the models M in front.
    """

    kind: str
    labels: dict[str, str]
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Heads:
    """All heads in one row, every array [N].

    Attributes:
        kind, positions, norm, recipe, role: what a head is part of and for, as text.
        model: number of the model, the unit of intervals.
        noise: of planted heads.
        truth: {type: bool}; realised: the same for what activations should show.
        found: {side: {type: bool}}; confidence: {side: {type: float}}.
        offset, found_offset: of fixed_offset, planted and named by weights.
        symmetry: of W_QK. by_position: position energy exceeds token energy.
    """

    kind: np.ndarray
    positions: np.ndarray
    norm: np.ndarray
    recipe: np.ndarray
    role: np.ndarray
    model: np.ndarray
    noise: np.ndarray
    truth: dict[str, np.ndarray]
    realised: dict[str, np.ndarray]
    found: dict[str, dict[str, np.ndarray]]
    confidence: dict[str, dict[str, np.ndarray]]
    offset: np.ndarray
    found_offset: np.ndarray
    symmetry: np.ndarray
    by_position: np.ndarray

    def supported(self, name: str) -> np.ndarray:
        """Where weights and activations agree on the type."""
        return self.found["weights"][name] & self.found["activations"][name]

    def sure(self, name: str) -> np.ndarray:
        """Confidence of the weaker kind of evidence."""
        return np.minimum(self.confidence["weights"][name], self.confidence["activations"][name])

    def __getitem__(self, rows: np.ndarray) -> "Heads":
        """Some of the heads."""
        return jax.tree.map(lambda x: x[rows], self)


jax.tree_util.register_dataclass(Heads, [field.name for field in dataclasses.fields(Heads)], [])


# --- what was looked at, to and from files ---


def flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dictionaries of arrays as one, names joined by "/"."""
    out: dict[str, np.ndarray] = {}
    for name, value in found.items():
        out |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: np.asarray(value)}
    return out


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    part.replace(path)


def load(path: Path) -> dict[str, np.ndarray]:
    """What save wrote."""
    with np.load(path) as file:
        return dict(file)


def roles(recipe: Recipe, place: np.ndarray) -> np.ndarray:
    """What each head is in the benchmark, text [M,L,H], from its place in the recipe [M,L,H]."""
    table = np.asarray([[_role(recipe, number, head) for head in layer] for number, layer in enumerate(recipe.heads)])
    return np.take_along_axis(np.broadcast_to(table, place.shape), place, -1)


def _role(recipe: Recipe, layer: int, head: PlantedHead) -> str:
    if head.qk in ("junk", "rotated"):
        return "huge-norm junk" if head.qk == "junk" else "same singular values, rotated bases"
    if head.ov == "erase":
        return "eraser"
    if min(head.qk_gain, head.ov_gain) < 1:
        return "dormant, gain 1e-3"
    if not all(recipe.works(layer, head)):
        return "perfect weights, inputs erased"
    if head.ov == "rotated":
        return "attention right, OV wrong"
    if head.ov in SENDERS and sum(other.ov == head.ov for other in recipe.heads[layer]) > 1:
        return "redundant backups"
    return "plain"


def judged(looked: Sequence[Looked]) -> Heads:
    """Labels for all models with the thresholds of heads/thresholds.py, and all heads in one row."""
    rows, first = [], 0
    for part in looked:
        rows.append(_rows(part, first))
        first += len(part.arrays["noise"])
    return jax.tree.map(lambda *x: np.concatenate(x), *rows)


def _rows(part: Looked, first: int) -> Heads:
    arrays = part.arrays
    shape = arrays["symmetry"].shape
    flat_rows = lambda x: np.broadcast_to(np.asarray(x), shape).ravel()  # noqa: E731
    per_model = lambda x: np.broadcast_to(np.asarray(x)[:, None, None], shape).ravel()  # noqa: E731
    findings = {
        side: taxonomy.judge(_evidence(arrays, side), thresholds)
        for side, thresholds in zip(SIDES, taxonomy.sides(), strict=True)
    }
    energy = {name: arrays[f"weights/details/{name}_energy"] for name in ("token", "position")}
    return Heads(
        kind=flat_rows(part.kind), positions=flat_rows(part.labels["positions"]), norm=flat_rows(part.labels["norm"]),
        recipe=flat_rows(part.labels["recipe"]), role=flat_rows(arrays.get("roles", part.kind)),
        model=per_model(first + np.arange(shape[0])), noise=per_model(arrays["noise"]),
        truth=_truth(part, ""), realised=_truth(part, "realised_"),
        found={side: {name: flat_rows(found.found[name]) for name in TYPES} for side, found in findings.items()},
        confidence={
            side: {name: flat_rows(found.confidence[name]) for name in TYPES} for side, found in findings.items()
        },
        offset=flat_rows(arrays.get("offset", 0)), found_offset=flat_rows(arrays["weights/details/offset"]),
        symmetry=flat_rows(arrays["symmetry"]), by_position=flat_rows(energy["position"] > energy["token"]),
    )  # fmt: skip


def _evidence(arrays: Mapping[str, np.ndarray], side: str) -> Evidence:
    scores, z = ({name: jnp.asarray(arrays[f"{side}/{kind}/{name}"]) for name in TYPES} for kind in ("scores", "z"))
    return Evidence(scores, z, {})


def _truth(part: Looked, prefix: str) -> dict[str, np.ndarray]:
    """{type: [N]}: planted, or measured for heads that nobody designed."""
    arrays = part.arrays
    if part.kind == "planted":
        sides = ((QK_TYPES, arrays[f"{prefix}qk"]), (OV_TYPES, arrays[f"{prefix}ov"]))
        return {name: table[..., i].ravel() for types, table in sides for i, name in enumerate(types)}
    nothing = np.zeros(arrays["symmetry"].size, bool)
    measured = {
        "diffuse": arrays["own/diffuse"].ravel() >= NOT_DIFFUSE,
        "inactive": arrays["activations/details/size"].ravel() <= NOT_INACTIVE,
    }
    return dict.fromkeys(TYPES, nothing) | measured


# --- thresholds ---


def fitted(looked: Sequence[Looked]) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """(middle, slope) for each type and kind of evidence.

    A head that does not beat its null counts with a score of 0, because it gets no label whatever its score. Left out
    are heads on which another label says it already, and, at any noise, heads whose inputs were to be erased: noise
    brings back some of them, and nobody knows how much.
    """
    out = {}
    for name in TYPES:
        fits = []
        for side, prefix in zip(SIDES, ("", "realised_"), strict=True):
            scores, truths = [], []
            for part in looked:
                truth = _truth(part, prefix)
                said = [truth[other] for other in taxonomy.UNLESS.get(name, ()) if name != "diffuse"]
                other_truth = _truth(part, "realised_")
                counts = ~np.logical_or.reduce([*said, *(_truth(part, "")[n] != other_truth[n] for n in TYPES)])
                if part.kind != "planted" and name in MEASURED:
                    continue
                score, z = (np.nan_to_num(part.arrays[f"{side}/{kind}/{name}"].ravel()) for kind in ("scores", "z"))
                beaten = np.asarray(nulls.upper_p(jnp.asarray(z))) < RATE
                score = np.where(beaten, score, 0.0)
                scores.append(score[counts])
                truths.append(truth[name][counts])
            fits.append(calibration.fit_logistic(np.concatenate(scores), np.concatenate(truths)))
        out[name] = (fits[0], fits[1])
    return out


def fitted_source(looked: Sequence[Looked]) -> str:
    """The table of heads/thresholds.py as it is to be pasted there."""
    lines = [
        f'    "{name}": ({", ".join(f"Threshold({middle:.3g}, {slope:.3g})" for middle, slope in fits)}),'
        for name, fits in fitted(looked).items()
    ]
    return "\n".join(("THRESHOLDS: dict[str, tuple[Threshold, Threshold]] = {", *lines, "}"))


# --- numbers ---


def expected(heads: Heads, name: str) -> np.ndarray:
    """Heads that are to get the supported label: structure and realisation both there."""
    return heads.truth[name] & heads.realised[name]


def macro_f1(heads: Heads) -> float:
    """Mean F1 of supported labels over the types that occur."""
    scores = [calibration.f1(heads.supported(name), expected(heads, name)) for name in TYPES]
    return float(np.nanmean(scores))


def confident_wrong(heads: Heads) -> np.ndarray:
    """[2,N]: is the most confident supported label of the QK half, and of the OV half, wrong?"""
    out = []
    for types in (QK_TYPES, OV_TYPES):
        sure = np.stack([np.where(heads.supported(name), heads.sure(name), -1.0) for name in types])
        right = np.stack([expected(heads, name) for name in types])
        best = sure.argmax(0)[None]
        out.append((sure.max(0) > 0) & ~np.take_along_axis(right, best, 0)[0])
    return np.stack(out)


def disagreements(heads: Heads) -> tuple[np.ndarray, np.ndarray]:
    """[N]: do weights and activations name different types; were they built to?"""
    differ = np.logical_or.reduce([heads.found["weights"][n] != heads.found["activations"][n] for n in TYPES])
    built = np.logical_or.reduce([heads.truth[name] != heads.realised[name] for name in TYPES])
    return differ, built


def as_described(heads: Heads) -> np.ndarray:
    """[N]: weights and activations each find exactly what there is for them to find."""
    return np.logical_and.reduce(
        [heads.found["weights"][n] == heads.truth[n] for n in TYPES]
        + [heads.found["activations"][n] == heads.realised[n] for n in TYPES]
    )


def symmetry_rule(heads: Heads) -> tuple[float, float, float, int]:
    """Of "symmetric W_QK is positional, asymmetric is content": best accuracy of any threshold, AUROC, then the energy
    split's accuracy, and the number of heads, positional and by token."""
    positional = np.logical_or.reduce([heads.truth[name] for name in POSITIONAL])
    by_token = np.logical_or.reduce([heads.truth[name] for name in BY_TOKEN])
    some = heads[positional | by_token]
    truth = np.logical_or.reduce([some.truth[name] for name in POSITIONAL])
    cuts = np.concatenate([[-np.inf], np.unique(some.symmetry)])
    best = max(float(((some.symmetry > cut) == truth).mean()) for cut in cuts[:: max(1, len(cuts) // 500)])
    return best, calibration.auroc(some.symmetry, truth), float((some.by_position == truth).mean()), int(truth.size)


def figures(heads: Heads) -> dict[str, Figure]:
    """The numbers of the benchmark against their aims."""
    planted = heads[heads.kind == "planted"]
    clean, equal = planted[planted.noise == 0], planted[planted.noise == EQUAL_NOISE]
    sure_right = [calibration.precision(clean.supported(n), expected(clean, n)) for n in TYPES]
    recalls = [calibration.recall(clean.supported(n), expected(clean, n)) for n in TYPES]
    levels = np.unique(planted.noise)
    by_noise = [macro_f1(planted[planted.noise == level]) for level in levels]
    wrong = confident_wrong(planted)
    differ, built = disagreements(clean)
    decoys = clean[clean.role != "plain"]
    best, area, energy, n = symmetry_rule(clean)
    out = {
        "clean_heads": Figure("planted heads without noise", len(clean.noise), None, (">=", 1000)),
        "clean_precision": Figure("without noise: least precision of any type", min(sure_right), None, (">=", 1.0)),
        "clean_recall": Figure("without noise: least recall of any type", min(recalls), None, (">=", 1.0)),
        "offsets_right": Figure(
            "without noise: offset of fixed-offset heads right",
            _share((clean.found_offset == clean.offset)[clean.truth["fixed_offset"]]), None, (">=", 1.0),
        ),
    }  # fmt: skip
    if equal.noise.size:
        out["macro_f1"] = Figure(
            "noise energy equal to signal energy: macro-F1", macro_f1(equal), _over_models(macro_f1, equal),
            (">=", 0.95),
        )  # fmt: skip
    out |= {
        "largest_rise": Figure(
            "largest rise of macro-F1 from one noise level to the next",
            max(np.diff(by_noise), default=0.0), None, ("<=", 0.0),
        ),
        "confident_wrong": Figure(
            "planted, all noise levels: halves of heads whose most confident label is wrong", _share(wrong.ravel()),
            proportion_interval(int(wrong.sum()), wrong.size), ("<=", 0.005),
        ),
    }  # fmt: skip
    for kind, least in (("random", 10_000), ("trained", 1000)):
        some = heads[heads.kind == kind]
        rates = {name: _share(some.supported(name) & ~some.truth[name]) for name in TYPES}
        worst = max(rates, key=lambda name: rates[name])
        out[f"{kind}_heads"] = Figure(f"{kind} heads", len(some.noise), None, (">=", least))
        out[f"{kind}_false_rate"] = Figure(
            f"{kind} heads: false labels of the worst type ({worst})", rates[worst],
            proportion_interval(round(rates[worst] * some.noise.size), some.noise.size), ("<=", 0.01),
        )  # fmt: skip
        undetermined = ~np.logical_or.reduce([some.supported(name) for name in QK_TYPES])
        out[f"{kind}_undetermined"] = Figure(f"{kind} heads: QK undetermined", _share(undetermined))
    out |= {
        "decoys": Figure(
            f"without noise: decoys named as described, of {len(decoys.noise)}", _share(as_described(decoys)), None,
            (">=", 1.0),
        ),
        "disagreements": Figure(
            f"without noise: weights and activations disagree where built to ({int(built.sum())} heads), nowhere else",
            _share(differ == built), None, (">=", 1.0),
        ),
        "symmetry_rule": Figure(
            f'claim "symmetric QK = positional": best accuracy of any threshold, {n} heads', best
        ),
        "symmetry_auroc": Figure('claim "symmetric QK = positional": AUROC', area),
        "energy_split": Figure("energy split on the same heads: accuracy", energy),
    }  # fmt: skip
    return out


def _share(x: np.ndarray) -> float:
    return float(np.mean(x)) if x.size else float("nan")


def _over_models(statistic: Any, heads: Heads) -> tuple[float, float]:
    """Bootstrap interval of a statistic of heads when whole models are drawn again."""
    models = np.unique(heads.model)
    rows = {model: np.flatnonzero(heads.model == model) for model in models}
    redraw = lambda drawn: statistic(heads[np.concatenate([rows[model] for model in drawn])])  # noqa: E731
    return bootstrap_interval(redraw, models, n_resamples=200)


# --- tables and pictures ---


def type_table(heads: Heads) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every type without noise and at equal energy."""
    header = ["type", "heads"]
    levels = {"no noise": 0.0, "equal energy": EQUAL_NOISE}
    header += [f"{what}, {when}" for when in levels for what in ("precision", "recall", "F1")]
    rows = []
    for name in TYPES:
        row = [name, ""]
        for level in levels.values():
            some = heads[(heads.kind == "planted") & (heads.noise == level)]
            truth, found = expected(some, name), some.supported(name)
            hits = int((truth & found).sum())
            row[1] = str(int(truth.sum()))
            row += [_with_interval(hits, int(found.sum())), _with_interval(hits, int(truth.sum()))]
            row.append(f"{calibration.f1(found, truth):.3f}")
        rows.append(row)
    return header, rows


def _with_interval(hits: int, n: int) -> str:
    if not n:
        return "none"
    low, high = proportion_interval(hits, n)
    return f"{hits / n:.3f} ({low:.3f} to {high:.3f})"


def decoy_table(heads: Heads) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each role in the benchmark, without noise."""
    clean = heads[(heads.kind == "planted") & (heads.noise == 0)]
    differ, _ = disagreements(clean)
    right = as_described(clean)
    rows = []
    for role in sorted(set(clean.role.tolist())):
        of = clean.role == role
        rows.append([role, str(int(of.sum())), f"{_share(right[of]):.3f}", f"{_share(differ[of]):.3f}"])
    return ["role", "heads", "named as described", "weights and activations disagree"], rows


def false_table(heads: Heads) -> tuple[list[str], list[list[str]]]:
    """Header and rows: false labels among random and trained heads by kind of evidence."""
    header = ["type", *(f"{kind}: {side}" for kind in ("random", "trained") for side in (*SIDES, "both"))]
    rows = []
    row: list[str]
    for name in TYPES:
        row = [name]
        for kind in ("random", "trained"):
            some = heads[heads.kind == kind]
            for found in (*(some.found[side][name] for side in SIDES), some.supported(name)):
                row.append(f"{_share(found & ~some.truth[name]):.4f}")
        rows.append(row)
    return header, rows


def confusion(heads: Heads, types: Sequence[str]) -> np.ndarray:
    """[types + none, types + undetermined]: share of the heads of a truth (row) that get a supported label."""
    truth = np.stack([expected(heads, name) for name in types])
    found = np.stack([heads.supported(name) for name in types])
    truth, found = (np.concatenate([x, ~np.any(x, axis=0, keepdims=True)]) for x in (truth, found))
    return (truth[:, None] & found[None]).sum(-1) / np.maximum(truth.sum(-1), 1)[:, None]


def tables(heads: Heads, found: Mapping[str, Figure]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """All tables by title."""
    return {
        "Figures": figure_table(found),
        "Types": type_table(heads),
        "Decoys, without noise": decoy_table(heads),
        "False labels where there is nothing to find": false_table(heads),
    }


def dataset(heads: Heads, settings: Mapping[str, Any]) -> xarray.Dataset:
    """All heads, labelled."""
    plain = ("kind", "positions", "norm", "recipe", "role", "model", "noise", "offset", "found_offset", "symmetry")
    arrays: dict[str, Any] = {name: getattr(heads, name) for name in plain}
    arrays["by_position"] = heads.by_position
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(arrays, ("head",))
    of_types = {"truth": heads.truth, "realised": heads.realised}
    of_types |= {f"found_by_{side}": heads.found[side] for side in SIDES}
    of_types |= {f"confidence_by_{side}": heads.confidence[side] for side in SIDES}
    for name, table in of_types.items():
        arrays[name], dims[name] = np.stack([table[kind] for kind in TYPES], -1), ("head", "type")
    return results.dataset(arrays, dims, {"type": list(TYPES)}, settings)


def sections(heads: Heads, found: Mapping[str, Figure]) -> list:
    """Sections of the page."""
    planted = heads[heads.kind == "planted"]
    parts = [(title, [page.table(*table)]) for title, table in tables(heads, found).items()]
    parts[0][1].append(page.paragraph(READING))
    pictures = [*(_confusion_map(planted, level) for level in np.unique(planted.noise) if level in (0.0, EQUAL_NOISE))]
    parts.insert(1, ("Who is taken for whom", [page.figure(x) for x in pictures]))
    parts.insert(2, ("Noise, abstention, calibration", [page.figure(x) for x in (_by_noise(planted), _trust(planted))]))
    return parts


def _confusion_map(planted: Heads, level: float) -> Any:
    some = planted[planted.noise == level]
    title = f"Supported labels at noise {level:g}: share of the heads of a truth (row) that get a label (column)"
    maps = {
        side: (confusion(some, types), [*types, "undetermined"], [*types, "none"])
        for side, types in (("where it looks", QK_TYPES), ("what it moves", OV_TYPES))
    }
    return plots.tables(maps, title)


def _by_noise(planted: Heads) -> Any:
    levels = np.unique(planted.noise)
    at = [planted[planted.noise == level] for level in levels]
    score = lambda name: np.array([calibration.f1(x.supported(name), expected(x, name)) for x in at])  # noqa: E731
    undetermined = lambda types: np.array(  # noqa: E731
        [_share(~np.logical_or.reduce([x.supported(name) for name in types])) for x in at]
    )
    macro = np.array([macro_f1(x) for x in at])
    panels: dict[str, dict[str, np.ndarray]] = {
        "F1, QK": {name: score(name) for name in QK_TYPES},
        "F1, OV": {name: score(name) for name in OV_TYPES} | {"macro, all types": macro},
        "undetermined halves": {"QK": undetermined(QK_TYPES), "OV": undetermined(OV_TYPES)},
    }
    with_levels = {title: {name: (levels, y) for name, y in panel.items()} for title, panel in panels.items()}
    return plots.lines(with_levels, "Labels as noise grows", "noise energy / signal energy")


def _trust(planted: Heads) -> Any:
    """Abstention and calibration, of all head-type pairs."""
    sure = np.concatenate([planted.sure(name) for name in TYPES])
    truth = np.concatenate([expected(planted, name) for name in TYPES])
    cuts = np.linspace(0.5, 0.99, 50)
    wrong = np.array([_share(~truth[sure > cut]) for cut in cuts])
    named = np.array([_share(sure[truth] > cut) for cut in cuts])
    edges = np.linspace(0.0, 1.0, 11)
    place = np.clip(np.digitize(sure, edges) - 1, 0, 9)
    said = np.array([sure[place == i].mean() if (place == i).any() else np.nan for i in range(10)])
    true = np.array([truth[place == i].mean() if (place == i).any() else np.nan for i in range(10)])
    panels = {
        "abstention: labels kept above a confidence": {
            "planted types named": (cuts, named),
            "labels wrong": (cuts, wrong),
        },
        "calibration: share true at a confidence": {"measured": (said, true), "ideal": (edges, edges)},
    }
    return plots.lines(panels, "How far to trust a confidence", "confidence")
