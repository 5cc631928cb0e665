"""The report of recover_planted on made-up evidence whose figures are known."""

import numpy as np
import pytest

from circuits_jax.heads import taxonomy
from circuits_jax.models.planted_recipes import PlantedHead, Recipe, recipes
from circuits_jax.reports import parts, recovered, recovery, results

TYPES, QK, OV = taxonomy.TYPES, taxonomy.QK_TYPES, taxonomy.OV_TYPES
SHAPE = (20, 2, 4)  # models, layers, heads


def made_up(kind="planted", noise=(0.0, 1.0), seed=0):
    """Every head is of one random type on each side, and both kinds of evidence are sure of it."""
    random = np.random.default_rng(seed)
    sides = {"qk": random.integers(0, len(QK), SHAPE), "ov": random.integers(0, len(OV), SHAPE)}
    truth = {name: np.eye(n, dtype=bool)[sides[name]] for name, n in (("qk", len(QK)), ("ov", len(OV)))}
    of_type = dict(zip(TYPES, np.moveaxis(np.concatenate([truth["qk"], truth["ov"]], -1), -1, 0), strict=True))
    if kind != "planted":
        of_type = dict.fromkeys(TYPES, np.zeros(SHAPE, bool))
    # Far above every threshold: inactive is measured in powers of ten.
    high = {name: 5.0 if name == "inactive" else 1.0 for name in TYPES}
    arrays = {
        "noise": np.resize(noise, SHAPE[0]), "symmetry": random.uniform(-1, 1, SHAPE),
        "own/diffuse": np.full(SHAPE, 0.5), "activations/details/size": np.full(SHAPE, 0.5),
        "weights/details/offset": np.full(SHAPE, 3), "offset": np.where(of_type["fixed_offset"], 3, 3),
        "weights/details/token_energy": np.where(of_type["content"] | of_type["duplicate_token"], 2.0, 0.0),
        "weights/details/position_energy": np.ones(SHAPE),
        "roles": np.where(np.arange(SHAPE[2]) == 0, "junk", "plain") + np.zeros(SHAPE, "U1"),
    }  # fmt: skip
    arrays |= truth | {f"realised_{name}": value for name, value in truth.items()}
    for side in recovered.SIDES:
        for name, here in of_type.items():
            arrays[f"{side}/scores/{name}"] = np.where(here, high[name], 0.0)
            arrays[f"{side}/z/{name}"] = np.where(here, 50.0, 0.0)
    labels = {"positions": "learned", "norm": "none", "recipe": kind}
    return recovered.Looked(kind, labels, arrays)


def everything():
    return [made_up(), made_up("random", seed=1), made_up("trained", seed=2)]


def test_perfect_labels_have_perfect_figures():
    heads = recovered.judged(everything())
    assert len(heads.noise) == 3 * np.prod(SHAPE)
    assert set(heads.model) == set(range(60))
    figures = recovery.figures(heads)
    for name in (
        "clean_precision",
        "clean_recall",
        "macro_f1",
        "decoys",
        "disagreements",
        "offsets_right",
        "energy_split",
    ):
        assert figures[name].value == 1.0, name
    for name in ("confident_wrong", "largest_rise", "random_false_rate", "trained_false_rate"):
        assert figures[name].value == 0.0, name
    assert figures["random_undetermined"].value == 1.0
    assert figures["symmetry_rule"].value < 1.0


def test_a_false_label_in_a_random_head_is_counted():
    looked = everything()
    for side in recovered.SIDES:
        looked[1].arrays[f"{side}/scores/copying"][0, 0, 0] = 1.0
        looked[1].arrays[f"{side}/z/copying"][0, 0, 0] = 50.0
    figures = recovery.figures(recovered.judged(looked))
    assert figures["random_false_rate"].value == pytest.approx(1 / np.prod(SHAPE))
    assert "(copying)" in figures["random_false_rate"].text


def test_a_diffuse_label_counts_as_false_only_where_attention_is_not():
    looked = everything()
    for side in recovered.SIDES:
        looked[1].arrays[f"{side}/scores/diffuse"][0] = 1.0
        looked[1].arrays[f"{side}/z/diffuse"][0] = np.inf
    looked[1].arrays["own/diffuse"][0, 0] = 0.99
    heads = recovered.judged(looked)
    assert recovery.figures(heads)["random_false_rate"].value == pytest.approx(4 / np.prod(SHAPE))


def test_a_missed_type_costs_recall_and_a_wrong_one_precision():
    looked = [made_up(noise=(0.0,)), *everything()[1:]]
    arrays = looked[0].arrays
    at = tuple(np.argwhere(arrays["qk"][..., QK.index("content")])[0])
    arrays["activations/scores/content"][at] = 0.0  # weights alone still say so
    heads = recovered.judged(looked)
    n = int(arrays["qk"][..., QK.index("content")].sum())
    figures = recovery.figures(heads)
    assert figures["clean_recall"].value == pytest.approx(1 - 1 / n)
    assert figures["clean_precision"].value == 1.0
    assert figures["disagreements"].value == pytest.approx(1 - 1 / np.prod(SHAPE))
    arrays["activations/scores/previous_token"][at] = arrays["weights/scores/previous_token"][at] = 1.0
    arrays["activations/z/previous_token"][at] = arrays["weights/z/previous_token"][at] = 50.0
    figures = recovery.figures(recovered.judged(looked))
    assert figures["clean_precision"].value < 1.0
    assert figures["confident_wrong"].value == pytest.approx(1 / (2 * np.prod(SHAPE)))


def test_confusion_rows_say_where_each_truth_goes():
    heads = recovered.judged([made_up()])
    np.testing.assert_array_equal(recovery.confusion(heads, QK)[:-1, :-1], np.eye(len(QK)))
    assert not recovery.confusion(heads, QK)[:-1, -1].any()


def test_thresholds_lie_between_planted_scores_and_those_without():
    fits = recovered.fitted(everything())
    for name, ((middle, slope), _) in fits.items():
        assert 0 < middle < (5.0 if name == "inactive" else 1.0), name
        assert slope > 0
    source = recovered.fitted_source(everything())
    table = eval(source.split("= ", 1)[1], {"Threshold": taxonomy.Threshold})
    assert table.keys() == taxonomy.THRESHOLDS.keys()


def test_a_score_that_does_not_beat_its_null_does_not_move_a_threshold():
    looked = everything()
    looked[1].arrays["weights/scores/copying"][:] = 0.99  # z stays 0
    plain, moved = recovered.fitted(everything())["copying"][0], recovered.fitted(looked)["copying"][0]
    assert moved == pytest.approx(plain, rel=1e-3)


def test_page_and_results_hold_everything(tmp_path):
    heads = recovered.judged(everything())
    found = recovery.figures(heads)
    titles = [title for title, _ in recovery.sections(heads, found)]
    assert titles[:3] == ["Figures", "Who is taken for whom", "Noise, abstention, calibration"]
    for header, rows in recovery.tables(heads, found).values():
        assert {len(row) for row in rows} == {len(header)}
    results.save(tmp_path / "r.zarr", {"heads": recovery.dataset(heads, {})})
    back = results.load(tmp_path / "r.zarr", "heads")
    assert back.truth.sel(type="copying").values.tolist() == heads.truth["copying"].tolist()
    assert back.kind.values[-1] == "trained"


def test_parts_survive_the_disk(tmp_path):
    arrays = parts.flat({"a": {"b": np.arange(3)}, "roles": np.array(["x", "yy"])})
    parts.save(tmp_path / "parts" / "one.npz", arrays)
    back = parts.load(tmp_path / "parts" / "one.npz")
    assert back.keys() == {"a/b", "roles"}
    assert back["roles"].tolist() == ["x", "yy"]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["one.npz"]


def test_roles_follow_the_heads_through_permutation():
    recipe = Recipe(((PlantedHead("same_position", "erase"), PlantedHead("junk")), (PlantedHead("content"),) * 2))
    place = np.array([[[1, 0], [0, 1]]])
    assert recovered.roles(recipe, place)[0].tolist() == [
        ["huge-norm junk", "eraser"], ["perfect weights, inputs erased"] * 2,
    ]  # fmt: skip
    every = [
        recovered.roles(recipe, np.tile(np.arange(8), (1, 2, 1))).ravel() for recipe in recipes("learned").values()
    ]
    assert set(np.concatenate(every)) == {
        "plain", "huge-norm junk", "same singular values, rotated bases", "perfect weights, inputs erased", "eraser",
        "dormant, gain 1e-3", "attention right, OV wrong", "redundant backups",
    }  # fmt: skip
