"""Evidence from weights: its null against rotations done in full, virtual heads, and every shape of model."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from circuits_jax import CircuitWeights, TransformerConfig, init_params
from circuits_jax.heads import ideal_inputs, nulls, structure, type_evidence, value_scores
from circuits_jax.heads.value_scores import Matches, Relays
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.planted import plant
from circuits_jax.models.planted_recipes import PlantedHead, Recipe

QUICK = {"xla_backend_optimization_level": 0}
T = 12
QUERIES = jnp.ones(T, bool)
SMALL = TransformerConfig(n_vocab=14, n_context=T, n_layers=2, n_heads=2, d_model=16, d_head=6)


def random_model(config, seed=0, gain=2.0):
    """Random weights, sharp enough to look somewhere; biases and norm gains drawn too."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(params)
    noisy = [gain * x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(tree, noisy)


def random_weights(config, seed=0):
    return CircuitWeights.from_params(config, random_model(config, seed))


# The null ----------------------------------------------------------------------------------------------------------

NULLS = {
    "learned": SMALL,
    "rotary, biases, groups, K > D": dataclasses.replace(
        SMALL, positions="rotary", bias=True, n_kv_heads=1, d_model=6, d_head=8
    ),
}


@pytest.mark.parametrize("kind", NULLS)
def test_null_is_that_of_heads_rotated_in_full(kind):
    weights, n_draws = random_weights(NULLS[kind]), 300

    @partial(jax.jit, compiler_options=QUICK)
    def both_ways(keys):
        inputs = structure._inputs(weights, QUERIES, None, keys[0])

        def slowly(key):
            turned = nulls.random_rotation(weights, key)
            values = ideal_inputs.values(turned, inputs.tokens)
            return structure._positional_and_content(turned, QUERIES, inputs, inputs)[0] | {
                "mapping": value_scores.value_scores(values, turned.W_O, turned.W_U).mapping
            }

        slow = jax.lax.map(slowly, jax.random.split(keys[1], n_draws))
        return slow, structure._null(weights, inputs, QUERIES, keys[2], n_draws)

    slow, fast = both_ways(jax.random.split(jax.random.key(0), 3))
    assert set(fast) == {*slow, "extracting"}
    for name, one in slow.items():
        one, two = np.asarray(one), np.asarray(fast[name])
        assert one.shape == two.shape == (n_draws, 2, 2)
        # Five standard errors, over 56 comparisons.
        error = np.sqrt((one.var(0) + two.var(0)) / n_draws)
        assert np.all(np.abs(one.mean(0) - two.mean(0)) <= 5 * error + 1e-6), name
        assert np.all(one.std(0) <= 1.5 * two.std(0) + 1e-6), name
        assert np.all(two.std(0) <= 1.5 * one.std(0) + 1e-6), name


# Tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 0, 7, 19])
def test_sampled_tokens_are_distinct_and_never_the_start_token(bos):
    for seed in range(5):
        ids = np.asarray(structure.sample_tokens(jax.random.key(seed), 20, 15, bos))
        assert len(ids) == len(set(ids)) == 15
        assert bos not in ids
        assert set(ids) <= set(range(20))


@pytest.mark.parametrize("bos", [None, 3])
def test_all_tokens_are_taken_where_they_are_few(bos):
    wanted = [i for i in range(6) if i != bos]
    for n_tokens in (len(wanted), 64):
        assert structure.sample_tokens(jax.random.key(0), 6, n_tokens, bos).tolist() == wanted


@pytest.mark.parametrize("bias", [False, True])
def test_cut_to_tokens_keeps_heads_and_picks_rows(bias):
    weights = random_weights(dataclasses.replace(SMALL, bias=bias))
    ids = jnp.asarray([5, 0, 9])
    cut = structure.cut_to_tokens(weights, ids)
    np.testing.assert_array_equal(cut.W_E, np.asarray(weights.W_E)[[5, 0, 9]])
    np.testing.assert_array_equal(cut.W_U, np.asarray(weights.W_U)[:, [5, 0, 9]])
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_P"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(weights, name))
    if bias:
        np.testing.assert_array_equal(cut.b_U, np.asarray(weights.b_U)[[5, 0, 9]])
    else:
        assert cut.b_U is None


# Virtual heads -----------------------------------------------------------------------------------------------------


def test_source_is_whichever_table_is_larger():
    direct = jnp.asarray([[1.0, 2.0], [3.0, 0.5]])
    through = np.zeros((2, 2, 2, 2), np.float32)
    through[0, :, 1, 0] = 2.0, 2.9
    through[0, :, 1, 1] = 0.6, 0.9
    assert structure._source(jnp.asarray(through), direct).tolist() == [[-1, -1], [-1, 1]]
    assert structure._source(jnp.zeros((2, 2, 2, 2)), jnp.zeros((2, 2))).tolist() == [[-1, -1], [-1, -1]]


def test_source_is_the_embedding_where_both_tables_are_equal_up_to_rounding():
    through = np.zeros((2, 1, 2, 1), np.float32)
    through[0, 0, 1, 0] = 1.0 + 3e-7
    assert structure._source(jnp.asarray(through), jnp.ones((2, 1))).tolist() == [[-1], [-1]]


CHAIN = Recipe(
    (
        (PlantedHead("previous_token", "send_virtual"), PlantedHead("fixed_offset", "copying", offset=2)),
        (PlantedHead("same_position", "receive_virtual"), PlantedHead("diffuse", "copying")),
    ),
    n_vocab=10, n_context=10, d_head=12,
)  # fmt: skip


def test_tokens_of_a_virtual_head_come_through_its_sender():
    planted = jax.jit(partial(plant, CHAIN), compiler_options=QUICK)(jax.random.key(0))
    weights = CircuitWeights.from_params(CHAIN.config, planted.params)
    place = np.asarray(planted.truth.place)
    sender, receiver = int(np.argmax(place[0] == 0)), int(np.argmax(place[1] == 0))

    @partial(jax.jit, compiler_options=QUICK)
    def look(weights):
        inputs = structure._inputs(weights, jnp.ones(10, bool), None, jax.random.key(1))
        values = ideal_inputs.values(weights, inputs.tokens)
        sent_on = type_evidence.relay_scores(weights, inputs, values, ideal_inputs.values(weights, inputs.places))
        direct = value_scores.token_match(values, weights.W_O, weights.W_U).norm
        source = structure._source(sent_on.v.norm / inputs.embedded_size, direct)
        return values, source, structure._through(weights, inputs, values, source), inputs.tokens

    values, source, moved, tokens = (np.asarray(x, np.float64) for x in look(weights))
    wanted = np.full((2, 2), -1)
    wanted[1, receiver] = sender
    np.testing.assert_array_equal(source, wanted)
    for at in np.ndindex(2, 2):
        through = tokens @ np.asarray(weights.W_V[0, sender]) @ np.asarray(weights.W_O[0, sender])
        expected = through @ np.asarray(weights.W_V[at]) if at == (1, receiver) else values[at]
        np.testing.assert_allclose(moved[at], expected, atol=1e-4)
    # The receiver's own value vectors of tokens say nothing; those that come through the sender copy.
    copying = value_scores.value_scores(jnp.asarray(moved, jnp.float32), weights.W_O, weights.W_U).copying
    assert copying[1, receiver] > 0.99


def relays_of(cosine, z):
    """From {path: [L,H,L,H]}."""
    return Relays(*(Matches(jnp.asarray(cosine[p]), jnp.asarray(z[p]), jnp.ones_like(cosine[p])) for p in range(3)))


def test_best_relay_names_path_and_reader_and_pays_for_having_looked_at_all_pairs():
    n_layers, n_heads = 3, 2
    cosine, z = np.zeros((2, 3, n_layers, n_heads, n_layers, n_heads), np.float32)
    cosine[1, 0, 1, 2, 0], z[1, 0, 1, 2, 0] = 0.8, 5.0
    cosine[2, 0, 1, 1, 0], z[2, 0, 1, 1, 0] = 0.7, 9.0
    cosine[0, 1, 0, 2, 1], z[0, 1, 0, 2, 1] = 0.6, 4.0
    best, corrected, path, reader = type_evidence._best_relay(relays_of(cosine, z))
    assert best[0, 1] == pytest.approx(0.8)
    assert (int(path[0, 1]), int(reader[0, 1])) == (1, 2 * n_heads + 0)
    assert (int(path[1, 0]), int(reader[1, 0])) == (0, 2 * n_heads + 1)
    # Three paths to every head of each later layer: 12 pairs from the first layer, 6 from the second one.
    np.testing.assert_allclose(corrected[0, 1], norm.isf(12 * norm.sf(5.0)), rtol=1e-3)
    np.testing.assert_allclose(corrected[1, 0], norm.isf(6 * norm.sf(4.0)), rtol=1e-3)
    assert np.all(corrected[2] >= 0)  # nothing later: nothing to beat
    assert np.all(np.isfinite(np.asarray(best)))
    assert np.all(np.asarray(best)[2] == 0)


def test_relay_of_the_last_layer_beats_no_null():
    """Bonferroni over no pair at all must not make p 0."""
    zero = np.zeros((3, 1, 2, 1, 2), np.float32)
    best, corrected, _, _ = type_evidence._best_relay(relays_of(zero, zero))
    assert np.all(np.asarray(best) == 0)
    relabelled = structure.nulls.upper_p(corrected)
    assert np.all((np.asarray(relabelled) > 0.4) | (np.asarray(best) == 0))


# Profiles ----------------------------------------------------------------------------------------------------------


def test_offsets_with_too_few_queries_are_nan_and_never_the_best():
    queries = jnp.arange(T) >= T - 3
    even = jnp.tril(jnp.ones((2, T, T))) / jnp.arange(1, T + 1)[:, None]
    profile, first = type_evidence.above_chance_profiles(even, queries)
    assert np.all(np.isnan(profile))
    np.testing.assert_allclose(first, 0.0, atol=1e-6)
    profile, _ = type_evidence.above_chance_profiles(even, QUERIES)
    assert np.isfinite(profile[:, : T - type_evidence.FEWEST_QUERIES + 1]).all()
    assert np.isnan(profile[:, T - type_evidence.FEWEST_QUERIES + 1 :]).all()


def test_positional_scores_pick_the_best_offset_of_at_least_two_and_at_most_half_the_length():
    profile = np.full(T, 0.01, np.float32)
    profile[[0, 1, 2, 4, 7]] = 0.9, 0.8, 0.3, 0.5, 0.99
    scores, offset = type_evidence.positional_scores(jnp.asarray(profile), jnp.asarray(0.2))
    assert int(offset) == 4
    wanted = {"same_position": 0.9, "previous_token": 0.8, "fixed_offset": 0.5, "first_token": 0.2}
    assert {name: pytest.approx(float(x)) for name, x in scores.items()} == wanted


# Every shape of model --------------------------------------------------------------------------------------------

SHAPES: dict[str, dict] = {
    "learned, layer, biases, groups, mlp": {"norm": "layer", "bias": True, "n_kv_heads": 1, "d_mlp": 8},
    "shortformer, rms": {"positions": "shortformer", "norm": "rms"},
    "rotary interleaved, partial, groups": {
        "positions": "rotary", "rotary_pairs": "interleaved", "rotary_dim": 4, "n_kv_heads": 1,
    },
    "none, tied, scaled": {"positions": "none", "norm": "rms", "tied": True, "embedding_scale": 3.0, "n_layers": 1},
    "one layer, one head, rotary half, layer, biases": {
        "n_layers": 1, "n_heads": 1, "positions": "rotary", "norm": "layer", "bias": True,
    },
}  # fmt: skip
ONE_HEAD = dataclasses.replace(SMALL, **SHAPES["one layer, one head, rotary half, layer, biases"])


@pytest.fixture(scope="module")
def programs():
    """structure of a config, compiled once."""
    made = {}

    def of(config, bos=None, n_tokens=10):
        def look(params, queries, key):
            weights = CircuitWeights.from_params(config, params)
            return structure.structure(weights, queries, key, n_tokens=n_tokens, n_draws=4, bos=bos)

        return made.setdefault((config, bos, n_tokens), jax.jit(look, compiler_options=QUICK))

    return of


@pytest.mark.parametrize("kind", SHAPES)
def test_every_shape_of_model_gets_finite_evidence(programs, kind):
    config = dataclasses.replace(SMALL, **SHAPES[kind])
    found = programs(config, 13)(random_model(config), QUERIES, jax.random.key(0))
    heads = (config.n_layers, config.n_heads)
    assert found.ids.shape == (10,)
    assert 13 not in found.ids
    assert found.weights.W_E.shape == (10, 16)
    evidence = found.evidence
    assert set(evidence.scores) == set(evidence.z) == {*QK_TYPES, *OV_TYPES}
    for name, x in (*evidence.scores.items(), *evidence.details.items()):
        assert x.shape == heads
        assert np.all(np.isfinite(x)), name
    endless = {name for name, x in evidence.z.items() if np.isinf(x).all()}
    assert {"diffuse", "inactive"} <= endless
    for name, x in evidence.z.items():
        assert x.shape == heads
        assert not np.any(np.isnan(x)), name
    assert all(np.all(np.isfinite(x)) for x in found.null.values())
    for name in ("previous_token", "fixed_offset", "first_token", "same_position", "duplicate_token", "induction"):
        assert np.all(evidence.scores[name] <= 1 + 1e-5), name
    np.testing.assert_allclose(evidence.scores["copying"], -evidence.scores["suppressing"])
    assert np.all((evidence.scores["diffuse"] > 0) & (evidence.scores["diffuse"] <= 1 + 1e-5))


def test_the_same_key_gives_the_same_evidence_and_another_another_null(programs):
    look, params = programs(ONE_HEAD, 13), random_model(ONE_HEAD)
    one, two, other = (look(params, QUERIES, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(one.null["content"], other.null["content"])


def test_a_layer_without_anyone_behind_it_has_no_reader_and_one_without_anyone_before_it_no_source(programs):
    details = programs(ONE_HEAD, 13)(random_model(ONE_HEAD), QUERIES, jax.random.key(0)).evidence.details
    assert details["source"].tolist() == details["reader"].tolist() == [[-1]]


def test_a_model_of_zeros_has_evidence_too(programs):
    zeros = jax.tree.map(jnp.zeros_like, random_model(ONE_HEAD))
    evidence = programs(ONE_HEAD, 13)(zeros, QUERIES, jax.random.key(0)).evidence
    np.testing.assert_allclose(evidence.scores["diffuse"], 1.0, rtol=1e-6)
    for name in {*QK_TYPES, *OV_TYPES} - {"diffuse", "inactive"}:
        assert np.all(np.abs(evidence.scores[name]) < 1e-5), name
        assert not np.any(evidence.z[name] > 3), name
