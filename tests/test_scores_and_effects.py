"""Statistics and reasons of weights_versus_effects on tables made by hand."""

import numpy as np
import pytest
from scipy import stats

from circuits_jax.heads import calibration
from circuits_jax.reports import compared as data
from circuits_jax.reports import scores_and_effects as report

M, L, H = 6, 2, 3
N_EDGES = H * H


def brute_threshold(scores, truth):
    cuts = np.unique(scores)
    middles = np.concatenate([[cuts[0] - 1], (cuts[1:] + cuts[:-1]) / 2])
    return max(calibration.f1(scores > cut, truth) for cut in middles)


@pytest.mark.parametrize("ties", [False, True])
def test_best_threshold_has_the_largest_f1(ties):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.normal(size=20)
        scores = np.round(scores) if ties else scores
        truth = rng.random(20) < 0.4
        truth[0] = True
        cut = data.best_threshold(scores, truth)
        assert calibration.f1(scores > cut, truth) == pytest.approx(brute_threshold(scores, truth))


def test_best_threshold_at_its_ends():
    assert data.best_threshold(np.arange(3.0), np.zeros(3, bool)) == np.inf
    everything = data.best_threshold(np.arange(3.0), np.ones(3, bool))
    assert (np.arange(3.0) > everything).all()
    with_unknown = data.best_threshold(np.array([1.0, 2.0, np.nan]), np.array([False, True, False]))
    assert with_unknown == 1.5


def test_spearman_is_scipys():
    rng = np.random.default_rng(1)
    x, y = np.round(rng.normal(size=(2, 30)), 1)
    assert data.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(data.spearman(np.ones(4), np.arange(4.0)))
    assert data.spearman(np.array([0.0, 1, 2, np.nan]), np.array([0.0, 1, 2, -9])) == pytest.approx(1.0)


def test_units_and_ends_of_edges_go_together():
    """Receivers and senders get their own conditions: unit (a, b) holds what belongs to the heads a and b."""
    heads = np.arange(M * L * H).reshape(M, L, H)
    edges = heads[:, :, :, None, None] * 1000 + heads[:, None, None]
    units = data._units(edges)
    assert units.shape == (M, N_EDGES)
    looked = data.Looked("x", "trained", {"conditions/gain": heads})
    values = data._condition(looked, "k", "gain")
    sender, receiver = (data._units(data._spread(values, end)) for end in ("sender", "receiver"))
    np.testing.assert_array_equal(units, sender * 1000 + receiver)


def arrays(rng, n_models, signal):
    """What comparison.py gives, with one score that says one effect."""
    heads, edges = (n_models, L, H), (n_models, L, H, L, H)
    true = rng.random(edges) < 0.4
    own = np.where(true, 0.5, 0.05) + 0.01 * rng.normal(size=edges)
    out = {"planted_edges": np.zeros((n_models, 3, L, H, L, H), bool)}
    for unit in "qkv":
        names = ["Frobenius composition", "Frobenius product", "Frobenius z", "projection kernel"]
        names += ["diagonal gap", "gap x previous token", "predicted fall"] if unit == "k" else []
        out |= {f"edge_scores/{unit}/{name}": rng.normal(size=edges) for name in names}
        for name in ("loss", "own induction attention", "own attention", "own output", "own scores"):
            out[f"edge_effects/{unit}/{name}"] = own if unit != "v" or name == "own output" else np.zeros(edges)
        out |= {f"edge_effects/{unit}/{name}": own for name in data.ESTIMATES}
        out[f"head_effects/all {unit} cut: loss"] = rng.random(heads)
        out[f"head_effects/all {unit} cut: own induction attention"] = rng.random(heads)
    out["edge_scores/k/predicted fall"] = own + signal * rng.normal(size=edges)
    for name in ("OV norm", "QK norm", "type: copying", "eigenvalues: copying", "type: previous token"):
        out[f"head_scores/{name}"] = rng.random(heads) + 0.5
    for name in ("type: induction", "predicted fall, all K-edges cut"):
        out[f"head_scores/{name}"] = out["head_effects/all k cut: own induction attention"]
    for name in ("loss, zero ablation", "loss, once another head is gone", "direct logit of the target"):
        out[f"head_effects/{name}"] = rng.random(heads)
    out["head_effects/induction attention of another head"] = rng.random(heads)
    return out | {f"conditions/{name}": rng.random(heads) + 0.2 for name in ("gain", "focus", "induction")}


@pytest.fixture(scope="module")
def compared():
    rng = np.random.default_rng(2)
    looked = [
        data.Looked("trained-a", "trained", arrays(rng, M, 0.01)),
        data.Looked("trained-b", "trained", arrays(rng, M, 0.01)),
        data.Looked("planted-a", "planted", arrays(rng, M, 0.3)),
    ]
    return data.compare(looked)


def test_a_score_that_says_an_effect_stands_out(compared):
    good = compared.pair("k", "predicted fall", "own induction attention", "trained")
    worse = compared.pair("k", "predicted fall", "own induction attention", "planted")
    useless = compared.pair("k", "diagonal gap", "own induction attention", "trained")
    assert good.auroc == 1
    assert good.precision == good.recall == 1
    assert worse.threshold == good.threshold
    assert 0.7 < worse.auroc < 1
    assert abs(useless.auroc - 0.5) < 0.2
    assert good.n == 2 * M * N_EDGES
    low, high = worse.auroc_interval
    assert low < worse.auroc < high


def test_what_never_happens_is_not_asked(compared):
    assert not [p for p in compared.pairs if p.unit == "v" and p.effect == "own induction attention"]
    assert [p for p in compared.pairs if p.unit == "v" and p.effect == "own output"]


def test_thresholds_are_fitted_on_one_half(compared):
    table = compared.tables["k"]["trained"]
    assert table.fits.tolist() == [True, False] * M
    x, y = table.scores["predicted fall"], table.effects["own induction attention"] > 0.2
    pair = compared.pair("k", "predicted fall", "own induction attention", "trained")
    held = ~table.fits
    assert pair.recall == calibration.recall(x[held] > pair.threshold, y[held])


def edge_table(**changed):
    """One model of one edge that its score takes to be there and whose cut does nothing."""
    ones = np.ones((1, 1))
    conditions = {
        "sender OV size": ones, "receiver QK size": ones, "sender gain": ones, "receiver all cut": 0 * ones,
        "receiver induction": ones,
    }  # fmt: skip
    effects = {"own induction attention": 0 * ones, "own scores": ones, "own attention": 0 * ones}
    for name, value in changed.items():
        name = name.replace("_", " ")
        (conditions if name in conditions else effects)[name] = value * ones
    return data.Table({"score": 9 * ones}, effects, conditions, np.array(["x"]), np.array([False]), ones == 0)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "not explained"),
        ({"sender_OV_size": 0.01}, "dormant"),
        ({"receiver_QK_size": 0.01}, "dormant"),
        ({"sender_gain": 0.01}, "out of subspace"),
        ({"own_scores": 0.1}, "out of subspace"),
        ({"receiver_all_cut": 0.6}, "redundant"),
        ({"receiver_induction": 0.1}, "another function"),
        ({"sender_OV_size": 0.01, "receiver_all_cut": 0.6}, "dormant"),
    ],
)
def test_reasons(changed, reason):
    counts = data.why_edges(edge_table(**changed), "score", 1.0, np.array([True]))
    assert {name: n for name, n in counts["score, no effect"].items() if n} == {reason: 1}
    assert sum(counts["effect, no score"].values()) == 0
    assert not any(data.why_edges(edge_table(), "score", 1.0, np.array([False]))["score, no effect"].values())


def test_an_effect_without_its_score_is_counted():
    counts = data.why_edges(edge_table(own_induction_attention=0.5), "score", 10.0, np.array([True]))
    assert counts["effect, no score"]["not explained"] == 1
    assert not any(counts["score, no effect"].values())


def test_tables_page_and_data_are_made(compared):
    figures = report.figures(compared)
    assert figures["trained_k_predicted_auroc"].met
    assert figures["trained_models"].value == 2 * M
    header, rows = report.reason_table(compared)
    assert all(len(row) == len(header) for row in rows)
    headings = [title for title, _ in report.sections(compared, figures)]
    assert headings[0] == "Figures"
    data = report.datasets(compared, {"seeds": 2})
    assert data["k_trained"].scores.sel(score="predicted fall").shape == (2 * M, N_EDGES)
    assert len(data["pairs"].pair) == len(compared.pairs)
