"""Labels: planted heads get theirs and no other, decoys and random heads do not, and nothing hangs on the gauge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import TransformerConfig, init_params
from circuits_jax.heads import taxonomy
from circuits_jax.heads.thresholds import THRESHOLDS, Threshold
from circuits_jax.heads.type_evidence import Evidence
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.planted import plant
from circuits_jax.models.planted_recipes import recipes

QUICK = {"xla_backend_optimization_level": 0}
T, V = 24, 24
BOS = V - 1
QUERIES = jnp.ones(T, bool)
RECIPES = recipes("sinusoidal")
CONFIG = RECIPES["k_induction"].config  # the same for all of them, and so is the compiled program
ROTARY = recipes("rotary", "rms")["k_induction"]


quick_plant = jax.jit(plant, static_argnums=0, compiler_options=QUICK)
quick_evidence = jax.jit(taxonomy.evidence, static_argnums=(0, 4), compiler_options=QUICK)
quick_structure = jax.jit(taxonomy._structure, static_argnums=(0, 4), compiler_options=QUICK)


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """classify_heads takes the program that is compiled here anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taxonomy, "_evidence", quick_evidence)
        patch.setattr(taxonomy, "_structure", quick_structure)
        yield


def evidence(config, params, seed=3):
    return quick_evidence(config, params, QUERIES, jax.random.key(seed), BOS)


def look(params):
    """Evidence by weights and by activations, and what is found in each."""
    both = evidence(CONFIG, params)
    return both, judged(both)


def judged(both):
    return tuple(taxonomy.judge(*x) for x in zip(both, taxonomy.sides(), strict=True))


@pytest.fixture(scope="module")
def models():
    """{recipe: planted, evidence, findings}; key 1, with which the ties of decoys (see _source) fall right."""
    names = ("k_induction", "q_induction", "virtual", "decoys")
    planted = {name: quick_plant(RECIPES[name], jax.random.key(1)) for name in names}
    return {name: (model, *look(model.params)) for name, model in planted.items()}


def truths(truth):
    """By weights, by activations: [L,H,13] bool in the order of TYPES."""
    pairs = ((truth.qk, truth.ov), (truth.realised_qk, truth.realised_ov))
    return tuple(np.concatenate([np.asarray(x) for x in pair], -1) for pair in pairs)


def stack(findings):
    return np.stack([findings.found[name] for name in taxonomy.TYPES], -1)


def place_of(recipe, truth, layer, number):
    """Where the head that is `number` in its layer of the recipe has gone."""
    return layer, int(np.argmax(np.asarray(truth.place)[layer] == number))


# Planted models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k_induction", "q_induction", "virtual", "decoys"])
def test_every_planted_head_gets_its_labels_and_no_other(models, name):
    planted, _, findings = models[name]
    for found, truth in zip(findings, truths(planted.truth), strict=True):
        wrong = [(str(at), taxonomy.TYPES[at[-1]]) for at in np.argwhere(stack(found) != truth)]
        assert not wrong


def test_rotary_model_with_norms_gets_its_labels():
    planted = quick_plant(ROTARY, jax.random.key(1))
    findings = judged(evidence(ROTARY.config, planted.params))
    for found, truth in zip(findings, truths(planted.truth), strict=True):
        assert np.array_equal(stack(found), truth)


def test_weights_and_activations_disagree_exactly_where_tokens_were_erased(models):
    planted, both, findings = models["decoys"]
    by_weights, by_activations = map(stack, findings)
    structural, realised = truths(planted.truth)
    disagree = (by_weights != by_activations).any(-1)
    assert np.array_equal(disagree, (structural != realised).any(-1))
    assert disagree.sum() > 2
    # An erased half is idle, whatever its weights: both names are reported, each with what it rests on.
    verdicts = {label.verdict for report in taxonomy.reports(*both, {}).values() for label in (*report.qk, *report.ov)}
    assert verdicts == {"supported", "structure only", "realised only"}


@pytest.mark.parametrize("seed", [3])
def test_heads_after_an_exact_eraser_get_the_labels_of_their_own_weights(seed):
    planted = quick_plant(RECIPES["decoys"], jax.random.key(seed))
    assert np.array_equal(stack(look(planted.params)[1][0]), truths(planted.truth)[0])


def test_every_confidence_is_a_share_and_beyond_a_half_where_a_type_is_found(models):
    for _, _, findings in models.values():
        for found in findings:
            for name in taxonomy.TYPES:
                assert np.all((found.confidence[name] >= 0) & (found.confidence[name] <= 1))
                assert np.all(found.confidence[name][found.found[name]] > 0.5)
                p = found.p[name]
                assert np.all((p[~np.isnan(p)] >= 0) & (p[~np.isnan(p)] <= 1))


def label(models, name, layer, number, label_name):
    planted, both, _ = models[name]
    at = place_of(RECIPES[name], planted.truth, layer, number)
    report = taxonomy.reports(*both, {})["{}.{}".format(*at)]
    return at, next(x for x in (*report.qk, *report.ov) if x.name == label_name), report


def test_notes_name_offset_and_mechanism(models):
    _, found, report = label(models, "k_induction", 0, 6, "fixed_offset")
    assert found.note == "3 back"
    assert "fixed_offset (3 back) × suppressing" in str(report)
    for number in range(4):
        assert label(models, "k_induction", 1, number, "induction")[1].note == "K-composition"
        assert label(models, "q_induction", 1, number, "induction")[1].note == "pointer, Q-composition"


@pytest.mark.parametrize(
    ("name", "path", "word"), [("q_induction", 0, "query"), ("k_induction", 1, "key"), ("virtual", 2, "value")]
)
def test_notes_name_the_reader_of_what_a_head_sends(models, name, path, word):
    planted = models[name][0]
    at, found, report = label(models, name, 0, 0, "transforming")
    readers = np.argwhere(np.asarray(planted.truth.edges)[path][at])
    assert found.note in {f"read by the {word} of {layer}.{head}" for layer, head in readers}
    assert f"transforming ({found.note})" in str(report)


def test_notes_name_the_sender_of_a_virtual_head(models):
    planted = models["virtual"][0]
    sender = "{}.{}".format(*place_of(RECIPES["virtual"], planted.truth, 0, 0))
    for number in range(3):
        assert label(models, "virtual", 1, number, "copying")[1].note == f"of what {sender} sends"
    assert label(models, "virtual", 1, 4, "copying")[1].note == ""  # copies what it sees itself


def test_labels_say_what_they_establish(models):
    found = label(models, "k_induction", 1, 0, "induction")[1]
    assert found.verdict == "supported"
    assert "not that" in found.establishes
    assert str(taxonomy.Label("copying", "structure only", 0.9)) == "copying [structure only]"
    assert str(taxonomy.HeadReport("1.2", (), (found,), {}, {})).startswith("1.2: undetermined × induction")


# Heads with nothing to find ------------------------------------------------------------------------------------------


def scaled(params, **gains):
    """The matrices of all heads, times a gain."""
    layers = {}
    for name, layer in params.items():
        if name.startswith("layer_"):
            attention = {key: gains.get(key, 1.0) * matrix for key, matrix in layer["attention"].items()}
            layer = layer | {"attention": attention}
        layers[name] = layer
    return layers


@pytest.mark.parametrize("seed", [0, 1])
def test_sharp_random_heads_get_no_qk_label(seed):
    params = scaled(jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(seed)), W_Q=10.0, W_K=10.0)
    _, findings = look(params)
    for found in findings:
        assert not [name for name in QK_TYPES if found.found[name].any()]


def test_heads_of_zeros_are_diffuse_and_inactive(models):
    both, findings = look(scaled(models["k_induction"][0].params, W_Q=0.0, W_O=0.0))
    for found in findings:
        assert {name for name in taxonomy.TYPES if found.found[name].any()} == {"diffuse", "inactive"}
        assert found.found["diffuse"].all()
        assert found.found["inactive"].all()
    for report in taxonomy.reports(*both, {}).values():
        assert str(report) == f"{report.head}: diffuse × inactive"


def test_labels_and_scores_do_not_depend_on_the_gauge(models):
    planted, both, findings = models["k_induction"]
    rng = np.random.default_rng(0)
    params = dict(planted.params)
    k = CONFIG.d_head
    for layer in range(CONFIG.n_layers):
        # Singular values within a factor of two of 1.
        turns = np.linalg.qr(rng.normal(size=(4, CONFIG.n_heads, k, k)))[0]
        stretch = np.exp(rng.uniform(-0.7, 0.7, (2, CONFIG.n_heads, 1, k)))
        for_qk, for_ov = (turns[:2] * stretch) @ turns[2:]
        inverse = np.linalg.inv
        old = {name: np.asarray(x, np.float64) for name, x in params[f"layer_{layer}"]["attention"].items()}
        new = {
            "W_Q": old["W_Q"] @ for_qk,
            "W_K": old["W_K"] @ inverse(for_qk).swapaxes(-1, -2),
            "W_V": old["W_V"] @ for_ov,
            "W_O": inverse(for_ov) @ old["W_O"],
        }
        attention = {name: jnp.asarray(x, jnp.float32) for name, x in new.items()}
        params[f"layer_{layer}"] = params[f"layer_{layer}"] | {"attention": attention}
    turned, turned_findings = look(params)
    for before, after in zip(findings, turned_findings, strict=True):
        assert np.array_equal(stack(before), stack(after))
    logits = np.vectorize(lambda name: name not in ("extracting", "send_previous"))(moves("k_induction", planted))
    for before, after in zip(both, turned, strict=True):
        for name in taxonomy.TYPES:
            # content is relative to the mean of its null, whose draws (not their distribution) follow the gauge. What
            # heads do to logits, or send to readers, that they do not touch is rounding: see below.
            error = {"content": 0.02, "transforming": 0.1}.get(name, 2e-3)
            counts = logits if name in ("copying", "suppressing", "transforming") else np.ones_like(logits)
            one, two = np.asarray(before.scores[name])[counts], np.asarray(after.scores[name])[counts]
            np.testing.assert_allclose(one, two, atol=error, err_msg=name)


def moves(name, planted):
    """[L,H]: what each head was planted to move, by the word of the recipe."""
    place = np.asarray(planted.truth.place)
    return np.array([[RECIPES[name].heads[at][i].ov for i in row] for at, row in enumerate(place)])


def test_a_head_that_does_not_touch_logits_neither_copies_nor_suppresses(models):
    planted, both, _ = models["k_induction"]
    extracting = moves("k_induction", planted) == "extracting"
    for side in both:
        assert np.all(np.abs(np.asarray(side.scores["copying"])[extracting]) < 0.5)


# judge -------------------------------------------------------------------------------------------------------------

THRESHOLD = {name: Threshold(0.5, 20.0) for name in taxonomy.TYPES}


def hand_made(z=50.0, shape=(2, 4), **scores):
    """Scores of 0 but for those given; the null is beaten everywhere."""
    full = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)  # noqa: E731
    return Evidence(
        {name: full(scores.get(name, 0.0)) for name in taxonomy.TYPES},
        {name: full(z) for name in taxonomy.TYPES},
        {},
    )


def random_evidence(seed, *shape):
    rng = np.random.default_rng(seed)
    draw = lambda spread: {name: jnp.asarray(spread * rng.normal(size=shape), jnp.float32) for name in taxonomy.TYPES}  # noqa: E731
    return Evidence(draw(1.0), draw(4.0), {})


def test_confidence_is_one_half_at_the_threshold_and_logistic_around_it():
    scores = jnp.asarray([[0.4, 0.5, 0.6, 50.0]])
    found = taxonomy.judge(hand_made(shape=(1, 4), copying=scores), THRESHOLD)
    wanted = [1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-2)), 1.0]
    np.testing.assert_allclose(found.confidence["copying"][0], wanted, rtol=1e-4)
    assert found.found["copying"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("where", ["scores", "z"])
def test_nan_never_labels(where):
    nan = hand_made(**dict.fromkeys(taxonomy.TYPES, 1.0))
    nan = dataclasses.replace(nan, **{where: jax.tree.map(lambda x: x * jnp.nan, getattr(nan, where))})
    found = taxonomy.judge(nan, THRESHOLD)
    assert not stack(found).any()
    assert all(np.all(x < 1e-6) for x in found.confidence.values())


def test_a_score_without_a_beaten_null_labels_nothing():
    found = taxonomy.judge(hand_made(z=0.0, **dict.fromkeys(taxonomy.TYPES, 1.0)), THRESHOLD)
    assert not stack(found).any()


def test_the_null_is_beaten_at_a_false_discovery_rate_over_the_heads_of_a_model():
    """z of p = 0.0008 alone among 100 heads is not enough at a rate of 0.01; among 100 such heads it is."""
    z = np.zeros((10, 10), np.float32)
    z[0, 0] = 3.156
    alone = dataclasses.replace(hand_made(shape=(10, 10), copying=1.0), z={name: jnp.asarray(z) for name in THRESHOLD})
    assert not taxonomy.judge(alone, THRESHOLD, 0.01).found["copying"].any()
    together = hand_made(z=3.156, shape=(10, 10), copying=1.0)
    assert taxonomy.judge(together, THRESHOLD, 0.01).found["copying"].all()
    one_head = dataclasses.replace(together, scores=jax.tree.map(lambda x: x[:1, :1], together.scores),
                                   z=jax.tree.map(lambda x: x[:1, :1], together.z))  # fmt: skip
    assert taxonomy.judge(one_head, THRESHOLD, 0.01).found["copying"].all()
    assert not taxonomy.judge(one_head, THRESHOLD, 0.0001).found["copying"].any()


@pytest.mark.parametrize("name", sorted(taxonomy.UNLESS))
def test_less_is_not_said_where_more_is(name):
    assert taxonomy.judge(hand_made(**{name: 1.0}), THRESHOLD).found[name].all()
    for other in taxonomy.UNLESS[name]:
        found = taxonomy.judge(hand_made(**{name: 1.0, other: 1.0}), THRESHOLD)
        assert not found.found[name].any()
    rest = set(taxonomy.TYPES) - {name, *taxonomy.UNLESS[name]}
    both = taxonomy.judge(hand_made(**dict.fromkeys((name, *rest), 1.0)), THRESHOLD)
    assert both.found[name].all()


def test_several_labels_may_stand_together():
    found = taxonomy.judge(hand_made(duplicate_token=1.0, previous_token=1.0, copying=1.0, extracting=1.0), THRESHOLD)
    assert stack(found).sum(-1).tolist() == [[4] * 4] * 2


def test_many_models_at_once_are_as_one_at_a_time():
    many = random_evidence(0, 3, 2, 4)
    together = taxonomy.judge(many, taxonomy.sides()[0])
    for run in range(3):
        one = taxonomy.judge(jax.tree.map(lambda x, run=run: x[run], many), taxonomy.sides()[0])
        for field in ("confidence", "p", "found"):
            for name in taxonomy.TYPES:
                np.testing.assert_array_equal(getattr(together, field)[name][run], getattr(one, field)[name])


def test_stacked_evidence_is_judged_as_it_was():
    """Runs stand in front: of two, the second has both kinds of evidence the other way round."""
    pair = random_evidence(1, 2, 4), random_evidence(2, 2, 4)
    arrays = taxonomy.stacked(*pair)
    assert {name: x.shape for name, x in arrays.items()} == dict.fromkeys(("type_scores", "type_z"), (2, 13, 2, 4))
    scores, z = (np.stack([x, x[::-1]]) for x in map(np.asarray, (arrays["type_scores"], arrays["type_z"])))
    for side, findings in enumerate(taxonomy.judge_stacked(scores, z)):
        for run, order in enumerate([(0, 1), (1, 0)]):
            wanted = taxonomy.judge(pair[order[side]], taxonomy.sides()[side])
            for field in ("confidence", "p", "found"):
                for name in taxonomy.TYPES:
                    np.testing.assert_array_equal(getattr(findings, field)[name][run], getattr(wanted, field)[name])


def test_every_type_has_thresholds_for_both_kinds_of_evidence():
    assert set(THRESHOLDS) == set(taxonomy.TYPES) == {*QK_TYPES, *OV_TYPES}
    assert [set(side) for side in taxonomy.sides()] == [set(taxonomy.TYPES)] * 2
    assert all(pair[side].slope > 0 for pair in THRESHOLDS.values() for side in (0, 1))


# classify_heads ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(models):
    return models["k_induction"][0]


@pytest.fixture(scope="module")
def classified(planted):
    """On sequences of four letters."""
    letters = np.random.default_rng(0).integers(0, 4, (16, T))
    return taxonomy.classify_heads(CONFIG, planted.params, letters, bos=BOS), letters


def test_classify_heads_supports_what_was_planted(planted, classified):
    reports, _ = classified
    structural, _ = truths(planted.truth)
    assert list(reports) == [f"{layer}.{head}" for layer in range(2) for head in range(8)]
    for at in np.ndindex(2, 8):
        report = reports["{}.{}".format(*at)]
        labels = (*report.qk, *report.ov)
        assert {x.name for x in labels} == {taxonomy.TYPES[i] for i in np.flatnonzero(structural[at])}
        assert {x.verdict for x in labels} == {"supported"}
        assert {x.name for x in report.qk} <= set(QK_TYPES)
        for x in labels:
            sides = report.evidence[x.name]
            assert x.confidence == min(score.confidence for score in sides.values())
        assert set(report.evidence) == set(taxonomy.TYPES)
        assert all(set(sides) == {"weights", "activations"} for sides in report.evidence.values())


def test_own_batch_of_few_letters_does_not_make_an_induction_head(planted, classified):
    reports, _ = classified
    head = "{}.{}".format(*place_of(RECIPES["k_induction"], planted.truth, 0, 0))
    own = reports[head].own_batch
    assert own["previous_token"] > 0.95
    assert np.isnan(own["induction"]) or own["induction"] < 0.02


def test_classify_weights_finds_the_same_structure(planted, classified):
    reports = taxonomy.classify_weights(CONFIG, planted.params, bos=BOS)
    for head, report in reports.items():
        labels = (*report.qk, *report.ov)
        assert {x.verdict for x in labels} == {"structure"}
        both = {x.name: x.note for x in (*classified[0][head].qk, *classified[0][head].ov)}
        assert {x.name: x.note for x in labels} == both
        assert all(set(sides) == {"weights"} for sides in report.evidence.values())
        assert report.own_batch == {}


SMALL = TransformerConfig(n_vocab=12, n_context=10, n_layers=1, n_heads=1, d_model=8)


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({}, {"queries": np.ones(10)}, "queries must be bool"),
        ({}, {"queries": np.ones((2, 10), bool)}, r"queries must be bool \[T\]; got bool \[2, 10\]"),
        ({}, {"queries": np.ones(7, bool)}, "queries must cover 8 to n_context=10 .* got 7"),
        ({}, {"queries": np.ones(11, bool)}, "queries must cover 8 to n_context=10 .* got 11"),
        ({"n_context": 6}, {}, "queries must cover 8 to n_context=6"),
        ({}, {"bos": 12}, r"bos must be in \[0, n_vocab=12\); got 12"),
        ({}, {"bos": -1}, "bos must be .* got -1"),
        ({"n_vocab": 7}, {}, "n_vocab must leave at least 8 .* got 7"),
        ({"n_vocab": 8}, {"bos": 0}, "n_vocab must leave at least 8 .* got 8"),
    ],
)
def test_bad_input_gets_one_clear_error(changed, arguments, message):
    config = dataclasses.replace(SMALL, **changed)
    for classify in (taxonomy.classify_heads, taxonomy.classify_weights):
        with pytest.raises(ValueError, match=message):
            classify(config, {}, **arguments)


@pytest.mark.parametrize("tokens", [[[0, 12, 1]], [[-1, 0]], [[0.5, 1.0]], [[0] * 11]])
def test_bad_tokens_get_one_clear_error(monkeypatch, tokens):
    monkeypatch.setattr(taxonomy, "_evidence", lambda *_: (hand_made(shape=(1, 1)), hand_made(shape=(1, 1))))
    with pytest.raises(ValueError, match="token"):
        taxonomy.classify_heads(SMALL, {}, tokens)


def test_bad_tokens_are_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(taxonomy, "_evidence", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match="token"):
        taxonomy.classify_heads(SMALL, {}, [[0, 12, 1]])
