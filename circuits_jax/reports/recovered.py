"""All heads of recover_planted in one row: what was planted or measured, what was found, and thresholds from that."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from circuits_jax.heads import calibration, nulls, taxonomy
from circuits_jax.heads.taxonomy import TYPES
from circuits_jax.heads.thresholds import RATE
from circuits_jax.heads.type_evidence import Evidence
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.planted_recipes import SENDERS, PlantedHead, Recipe

MEASURED = ("diffuse", "inactive")  # types that heads without design can really be
TRUTH = ("qk", "ov", "realised_qk", "realised_ov", "offset", "place")
SIDES = ("weights", "activations")
NOT_DIFFUSE = 0.9  # entropy on i.i.d. tokens below which calling a head diffuse is wrong
NOT_INACTIVE = 0.02  # share of the residual's length above which calling a head inactive is wrong


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
    """Labels for all models with the thresholds of heads/thresholds.py, and all heads in one row.

    Heads whose inputs were to be erased are left out where there is noise: it brings back some of what they read, and
    nobody knows how much.
    """
    rows, first = [], 0
    for part in looked:
        rows.append(_rows(part, first))
        first += len(part.arrays["noise"])
    heads: Heads = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    built_to_disagree = np.logical_or.reduce([heads.truth[name] != heads.realised[name] for name in TYPES])
    return heads[(heads.kind != "planted") | (heads.noise == 0) | ~built_to_disagree]


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
