"""The report of recover_planted: are labels right, how sure are they, and when does the taxonomy abstain?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray

from circuits_jax.heads import calibration
from circuits_jax.heads.calibration import bootstrap_interval, proportion_interval
from circuits_jax.heads.taxonomy import TYPES
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.reports import page, plots, results
from circuits_jax.reports.recovered import SIDES, Heads
from circuits_jax.reports.run_folder import Figure, figure_table

POSITIONAL = ("previous_token", "fixed_offset", "same_position")
BY_TOKEN = ("duplicate_token", "content")
EQUAL_NOISE = 1.0
READING = """
A label is counted when weights and activations both say so ("supported"); thresholds were fitted on models of other
keys. Truth is what was planted. Noise is the ratio of noise to signal energy in the subspace that a head uses. Random
heads have fan-in weights with W_Q and W_K times 1, 3 or 10; trained ones saw i.i.d. tokens; both kinds have nothing to
find, but diffuse and inactive heads among them are what they are, and such a label counts as false only where a direct
measurement contradicts it.
"""


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
        false = {name: int((some.supported(name) & ~some.truth[name]).sum()) for name in TYPES}
        worst = max(TYPES, key=lambda name: false[name])
        out[f"{kind}_heads"] = Figure(f"{kind} heads", len(some.noise), None, (">=", least))
        out[f"{kind}_false_rate"] = Figure(
            f"{kind} heads: false labels of the worst type ({worst})",
            false[worst] / some.noise.size if some.noise.size else float("nan"),
            proportion_interval(false[worst], some.noise.size), ("<=", 0.01),
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
    """Abstention and calibration, of all pairs of head and type but those that a more specific label silences."""
    sure = np.concatenate([planted.sure(name) for name in TYPES])
    spoken = np.concatenate([planted.supported(name) for name in TYPES]) | (sure <= 0.5)
    truth = np.concatenate([expected(planted, name) for name in TYPES])[spoken]
    sure = sure[spoken]
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
