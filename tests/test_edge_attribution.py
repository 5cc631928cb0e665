"""Edge attribution: finite differences, models in which it is exact, what integrated gradients sum to, agreement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effect_oracle import (
    CONFIGS,
    B,
    T,
    V,
    all_edges,
    close_edges,
    corrupted,
    letters,
    oracle_difference,
    oracle_loss,
    random_params,
    redundant_example,
    repeats,
)
from scipy import stats

from circuits_jax import Interventions, forward
from circuits_jax.heads.attribution import agreement, attribute_edges
from circuits_jax.heads.edge_effects import edge_effects
from circuits_jax.heads.outcomes import induction_attention, log_likelihood, logit_difference
from circuits_jax.models import graph

TWO, GROUPED = CONFIGS["two-layers"], CONFIGS["rms-rotary-grouped-mlp"]
ORACLES = {log_likelihood: lambda logits, batch: -oracle_loss(logits, batch), logit_difference: oracle_difference}


def clean_outputs(config, params):
    """What all senders wrote in a run on other tokens, [B,N,T,D]."""
    return np.asarray(graph.outputs(config, forward(config, params, corrupted().tokens)[1]))


def slopes(config, params, batch, metric, reference, names, step=1e-5):
    """Central differences of the metric in the factor of one edge, computed in float64."""
    found = []
    with jax.enable_x64(True):
        params, reference = jax.tree.map(np.float64, (params, reference))
        for name in names:
            field, index = graph.index_of(config, name)
            sides = []
            for sign in (1, -1):
                edges = jax.tree.map(np.float64, graph.full(config, 1.0))
                getattr(edges, field)[index] += sign * step
                logits, _ = forward(config, params, batch.tokens, Interventions(edges=edges, edge_outputs=reference))
                assert logits.dtype == np.float64
                sides.append(ORACLES[metric](logits, batch))
            found.append((sides[0] - sides[1]) / (2 * step))
    return np.array(found)


@pytest.mark.parametrize(
    ("name", "metric", "kind"),
    [("two-layers", log_likelihood, None), ("rms-rotary-grouped-mlp", logit_difference, "one for each sequence")],
)
def test_attribution_is_the_slope_at_the_model_as_it_is(name, metric, kind):
    config = CONFIGS[name]
    params, batch = random_params(config), repeats()
    reference = None if kind is None else clean_outputs(config, params)
    found = attribute_edges(config, params, batch, metric, reference)
    names = graph.edge_names(config)[:: 1 if config is TWO else 3]
    by_name = dict(zip(graph.edge_names(config), all_edges(config, found), strict=True))
    expected = slopes(config, params, batch, metric, reference, names)
    np.testing.assert_allclose([by_name[name] for name in names], expected, rtol=1e-4, atol=1e-5)
    assert np.median(np.abs(expected)) > 1e-3
    close_edges(config, found, found, 0)  # exactly 0 where there is no edge


def test_edges_into_the_logits_are_exact_for_logit_differences():
    params, batch = random_params(TWO), repeats()
    for reference in (None, clean_outputs(TWO, params)):
        found = attribute_edges(TWO, params, batch, logit_difference, reference)
        exact = edge_effects(TWO, params, batch, logit_difference, reference)
        np.testing.assert_allclose(found.logits, exact.logits, rtol=1e-5, atol=1e-5)
        # Values of the last layer go to the logits alone, with patterns that do not know of them.
        np.testing.assert_allclose(found.v[:, 1], exact.v[:, 1], rtol=1e-5, atol=1e-5)
        assert np.abs(exact.logits).min() > 1e-3
        assert np.abs(exact.v[:3, 1]).min() > 1e-3
        # And nothing else is: what a query reads goes through a softmax.
        assert np.abs(found.q[:3, 1] - exact.q[:3, 1]).max() > 1e-2


def test_value_edges_are_exact_where_patterns_do_not_change():
    """Heads that look everywhere alike: every single edge is linear, those into q and k carry nothing."""
    params, batch = random_params(TWO), repeats()
    blind = {
        name: {"attention": params[name]["attention"] | {"W_Q": 0 * params[name]["attention"]["W_Q"]}}
        for name in ("layer_0", "layer_1")
    }
    found = attribute_edges(TWO, params | blind, batch, logit_difference)
    close_edges(TWO, found, edge_effects(TWO, params | blind, batch, logit_difference), 1e-5)
    assert np.abs(found.v[0]).min() > 1e-3
    assert np.abs(found.q).max() == 0


@pytest.mark.parametrize("kind", ["zeros", "reference"])
def test_integrated_gradients_sum_to_what_all_edges_carry(kind):
    """The midpoint rule is wrong by a term in 1 / n_steps^2."""
    params, batch = random_params(TWO), repeats()
    reference = None if kind == "zeros" else clean_outputs(TWO, params)
    whole = -oracle_loss(forward(TWO, params, batch.tokens)[0], batch)
    none = Interventions(edges=graph.full(TWO, 0.0), edge_outputs=reference)
    gap = whole + oracle_loss(forward(TWO, params, batch.tokens, none)[0], batch)
    total = lambda n: all_edges(TWO, attribute_edges(TWO, params, batch, reference=reference, n_steps=n)).sum()  # noqa: E731
    error = abs(total(64) - gap)
    assert error < 2e-3 * abs(gap) + 1e-4
    assert abs(gap) > 0.1
    if reference is None:
        assert abs(total(8) - gap) > 5 * error
        assert abs(total(0) - gap) > 0.05  # the slope alone does not sum to it


def test_one_step_of_integrated_gradients_is_the_slope_half_way():
    params, batch, step = random_params(TWO), repeats(), 1e-5
    name = "embedding->1.0.v"
    with jax.enable_x64(True):
        wide, sides = jax.tree.map(np.float64, params), []
        for sign in (1, -1):
            edges = jax.tree.map(np.float64, graph.full(TWO, 0.5))
            edges.v[0, 1, 0] += sign * step
            sides.append(-oracle_loss(forward(TWO, wide, batch.tokens, Interventions(edges=edges))[0], batch))
    found = attribute_edges(TWO, params, batch, n_steps=1)
    np.testing.assert_allclose(found.v[0, 1, 0], (sides[0] - sides[1]) / (2 * step), rtol=1e-4, err_msg=name)
    assert abs(found.v[0, 1, 0]) > 1e-3


@pytest.mark.parametrize(("kind", "n_steps", "chunk"), [("shared", 2, 1), ("one for each sequence", 0, 2)])
def test_sequences_in_turn_give_the_same(kind, n_steps, chunk):
    """Two at a time do not divide a batch of three."""
    params, batch = random_params(TWO), repeats()
    each = clean_outputs(TWO, params)
    reference = each.mean(0) if kind == "shared" else each
    whole = attribute_edges(TWO, params, batch, reference=reference, n_steps=n_steps, chunk=3)
    parts = attribute_edges(TWO, params, batch, reference=reference, n_steps=n_steps, chunk=chunk)
    close_edges(TWO, parts, whole, 1e-5)
    assert np.abs(whole.logits).min() > 1e-3


def test_saturated_attention_hides_its_senders_from_the_slope_alone():
    """Two identical senders, of which each saturates the induction head alone (exp(-20) is left to the other keys)."""
    config, params = redundant_example()
    batch = letters()

    def found_letter(logits, seen, batch):
        return induction_attention(logits, seen, batch)[1, 0]

    slope = attribute_edges(config, params, batch, found_letter)
    assert max(np.abs(x).max() for x in (slope.q, slope.k, slope.v)) < 1e-6
    integrated = attribute_edges(config, params, batch, found_letter, n_steps=200)
    np.testing.assert_allclose(integrated.k[1, 1, 0], integrated.k[2, 1, 0], rtol=1e-4)
    assert integrated.k[1, 1, 0] > 0.05
    # All edges of the circuit have a share, and together they have it all: 1 less the attention of a blind head.
    chance = np.mean([1 / 5, 1 / 6, 1 / 7])
    np.testing.assert_allclose(all_edges(config, integrated).sum(), 1 - chance, atol=5e-3)
    np.testing.assert_allclose(integrated.v[:, 1], 0.0, atol=1e-6)
    np.testing.assert_allclose(integrated.logits, 0.0, atol=1e-6)


def test_attribution_of_nothing_that_fits():
    params, batch = random_params(TWO), repeats()
    with pytest.raises(ValueError, match="n_steps must be at least 0; got -1"):
        attribute_edges(TWO, params, batch, n_steps=-1)
    outside = dataclasses.replace(batch, tokens=batch.tokens.at[0, 0].set(V))
    with pytest.raises(ValueError, match="tokens must be in"):
        attribute_edges(TWO, params, outside)
    with pytest.raises(ValueError, match="edge_outputs must have shape"):
        attribute_edges(TWO, params, batch, reference=jnp.zeros((4, T, 8)))
    with pytest.raises(ValueError, match="edge_outputs must have shape"):
        attribute_edges(TWO, params, batch, reference=jnp.zeros((B + 1, 5, T, 8)))


def test_a_reference_of_another_batch_is_named_also_where_sequences_go_in_turn():
    params, batch = random_params(TWO), repeats()
    with pytest.raises(ValueError, match="edge_outputs must have shape"):
        attribute_edges(TWO, params, batch, reference=jnp.zeros((B + 1, 5, T, 8)), chunk=2)


@pytest.mark.parametrize("chunk", [0, -1])
def test_attribution_needs_a_chunk(chunk):
    """As everywhere else (outcomes.in_chunks)."""
    params, batch = random_params(TWO), repeats()
    with pytest.raises(ValueError, match=f"chunk must be at least 1; got {chunk}"):
        attribute_edges(TWO, params, batch, chunk=chunk)


# Agreement ------------------------------------------------------------------------------------------------------------


def random_edges(config, seed):
    """Numbers everywhere, also where there is no edge."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape), graph.full(config, 0.0))


def at_names(config, edges, kind):
    """The numbers of the edges into one kind of receiver, name by name."""
    names = [name for name in graph.edge_names(config) if kind in ("all", graph.index_of(config, name)[0])]
    return np.array(
        [getattr(edges, graph.index_of(config, name)[0])[graph.index_of(config, name)[1]] for name in names]
    )


@pytest.mark.parametrize("name", ["two-layers", "three-layers-layernorm-bias-mlp"])
def test_agreement_is_that_of_the_edges_alone(name):
    config = CONFIGS[name]
    exact, noise = random_edges(config, 0), random_edges(config, 1)
    estimates = jax.tree.map(lambda x, y: x + 0.5 * y, exact, noise)
    found = agreement(config, estimates, exact)
    kinds = ["q", "k", "v", "logits", "all"] + (["mlp"] if config.d_mlp else [])
    assert sorted(found) == sorted(kinds)
    for kind in kinds:
        x, y = at_names(config, estimates, kind), at_names(config, exact, kind)
        one = found[kind]
        assert one.n == len(x)
        np.testing.assert_allclose(one.pearson, np.corrcoef(x, y)[0, 1], rtol=1e-9)
        np.testing.assert_allclose(one.spearman, stats.spearmanr(x, y).statistic, rtol=1e-9)
        top = max(1, len(x) // 10)
        largest = [set(sorted(range(len(z)), key=lambda i, z=z: abs(z[i]))[-top:]) for z in (x, y)]
        np.testing.assert_allclose(one.largest, len(largest[0] & largest[1]) / top)
    assert found["all"].n == len(graph.edge_names(config))
    assert 0.5 < found["all"].pearson < 0.97
    assert 0 < found["all"].largest < 1


def test_agreement_of_the_same_numbers_and_of_their_ranks():
    exact = random_edges(TWO, 0)
    for one in agreement(TWO, exact, exact).values():
        np.testing.assert_allclose([one.pearson, one.spearman, one.largest], 1.0)
    # Signs count, sizes decide what is largest; a monotone change keeps ranks.
    for one in agreement(TWO, jax.tree.map(np.negative, exact), exact).values():
        np.testing.assert_allclose([one.pearson, one.spearman, one.largest], [-1.0, -1.0, 1.0])
    for one in agreement(TWO, jax.tree.map(lambda x: x**3, exact), exact).values():
        np.testing.assert_allclose([one.spearman, one.largest], 1.0)
        assert one.pearson < 0.999
    # What is no edge is not looked at.
    there = graph.existing(TWO)
    elsewhere = jax.tree.map(lambda x, y: np.where(y, x, 99.0), exact, there)
    assert agreement(TWO, elsewhere, exact)["q"].pearson == agreement(TWO, exact, exact)["q"].pearson


@pytest.mark.parametrize("which", ["estimates", "exact"])
def test_what_does_not_vary_has_no_correlation(which):
    some, constant = random_edges(TWO, 0), graph.full(TWO, 0.25)
    pair = (constant, some) if which == "estimates" else (some, constant)
    for one in agreement(TWO, *pair).values():
        assert np.isnan([one.pearson, one.spearman]).all()
        assert 0 <= one.largest <= 1
    silent = dataclasses.replace(some, q=constant.q)
    found = agreement(TWO, *((silent, some) if which == "estimates" else (some, silent)))
    assert np.isnan(found["q"].pearson)
    assert found["all"].pearson < 1 - 1e-3


def test_agreement_of_estimates_and_exact_effects():
    """Float32 arrays from the library itself, and a model with one edge of a kind."""
    params, batch = random_params(TWO), repeats()
    estimates = attribute_edges(TWO, params, batch, logit_difference)
    exact = edge_effects(TWO, params, batch, logit_difference)
    x, y = all_edges(TWO, estimates), all_edges(TWO, exact)
    found = agreement(TWO, estimates, exact)
    np.testing.assert_allclose(found["all"].pearson, np.corrcoef(np.float64(x), np.float64(y))[0, 1], rtol=1e-5)
    one = dataclasses.replace(TWO, n_layers=1, n_heads=1)
    lonely = agreement(one, random_edges(one, 0), random_edges(one, 1))
    assert lonely["q"].n == 1
    assert np.isnan(lonely["q"].pearson)
    assert lonely["logits"].n == 2
