"""All ablations and cuts in one program: against one run at a time, and against models for pencil and paper."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effect_oracle import (
    BETA,
    CONFIGS,
    GAMMA,
    SATURATED,
    B,
    T,
    V,
    all_edges,
    close_edges,
    edge_by_edge,
    letters,
    one_hot,
    oracle_induction,
    oracle_loss,
    outcome,
    random_params,
    redundant_example,
    repeats,
    worked_example,
    worked_solution,
)

from circuits_jax import Interventions, TransformerConfig, forward
from circuits_jax.heads.edge_effects import cut_edges, cut_senders, edge_effects
from circuits_jax.heads.effects import ablate, ablate_heads, ablate_pairs, single_heads
from circuits_jax.heads.outcomes import frozen_patterns, induction_attention, log_likelihood, on_repeats
from circuits_jax.models import graph
from circuits_jax.models.interventions import Replacement

TWO = CONFIGS["two-layers"]
# float32 forward passes, of which the loop and the library add up the same numbers in another order.
CLOSE = 2e-5


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def model(request):
    config = CONFIGS[request.param]
    return config, random_params(config), repeats()


@pytest.fixture(scope="module")
def loop(model):
    """What is true of the whole model, and with every edge cut alone: (loss, induction), {edge: (loss, induction)}."""
    config, params, batch = model
    names = graph.edge_names(config)
    return outcome(config, params, batch), {
        name: outcome(config, params, batch, edges=graph.cut(config, [name])) for name in names
    }


@pytest.fixture(scope="module")
def effects(model):
    return edge_effects(*model)


def head_edges(config):
    """(input, sender, receiver) of every edge from head to head, and its name."""
    for i, name in enumerate("qkv"):
        for edge in np.ndindex((config.n_layers, config.n_heads) * 2):
            if edge[0] < edge[2]:
                yield (i, *edge), f"{edge[0]}.{edge[1]}->{edge[2]}.{edge[3]}.{name}"


def test_ablating_heads_one_at_a_time(model):
    config, params, batch = model
    whole_loss, whole_induction = outcome(config, params, batch)
    found = ablate_heads(config, params, batch)
    shape = (config.n_layers, config.n_heads)
    for head in np.ndindex(shape):
        loss, induction = outcome(config, params, batch, head_scale=1 - one_hot(shape, head))
        np.testing.assert_allclose(found.loss[head], loss - whole_loss, atol=CLOSE)
        np.testing.assert_allclose(found.induction[head], whole_induction - induction, atol=CLOSE)
        assert abs(loss - whole_loss) > 1e-3
    assert np.abs(found.induction).max() > 1e-2


def test_cutting_every_edge_of_the_graph(model, loop, effects):
    config, *_ = model
    (whole, _), cut = loop
    expected = edge_by_edge(config, lambda name: cut[name][0] - whole)
    close_edges(config, effects, expected, CLOSE)
    by_name = dict(zip(graph.edge_names(config), np.abs(all_edges(config, expected)), strict=True))
    # Edges into the first keys count too, and so does every kind of receiver.
    assert np.mean([size > 1e-3 for size in by_name.values()]) > 0.9
    assert by_name["embedding->logits"] > 1e-2
    assert by_name["embedding->0.0.k"] > 1e-3
    if config.d_mlp:
        assert min(by_name["0.0->0.mlp"], by_name["0.mlp->1.0.v"], by_name["1.mlp->logits"]) > 1e-3


# The third model is that of test_cutting_sets_of_senders.
@pytest.mark.parametrize("model", ["two-layers", "three-layers-layernorm-bias-mlp"], indirect=True)
def test_cutting_edges_from_head_to_head(model, loop):
    config, params, batch = model
    (whole_loss, whole_induction), cut = loop
    found = cut_edges(config, params, batch)
    shape = (3, *(config.n_layers, config.n_heads) * 2)
    loss, induction = np.zeros(shape), np.zeros(shape)
    for place, name in head_edges(config):
        loss[place] = cut[name][0] - whole_loss
        induction[place] = (whole_induction - cut[name][1])[place[3:]]
    np.testing.assert_allclose(found.loss, loss, atol=CLOSE)
    np.testing.assert_allclose(found.induction, induction, atol=CLOSE)
    exists = np.zeros(shape, bool)
    for place, _ in head_edges(config):
        exists[place] = True
    assert (np.asarray(found.loss)[~exists] == 0).all()
    assert (np.asarray(found.induction)[~exists] == 0).all()
    assert np.abs(induction[:2]).max() > 1e-2
    # What the receiver moves does not change where it looks.
    np.testing.assert_allclose(found.induction[2], 0.0, atol=1e-6)

    joint_loss, joint_induction = np.zeros((2, 3, config.n_layers, config.n_heads))
    for i in range(3):
        for receiver in np.ndindex(joint_loss.shape[1:]):
            if receiver[0] > 0:
                all_of_it = [edge for place, edge in head_edges(config) if place[0] == i and place[3:] == receiver]
                after = outcome(config, params, batch, edges=graph.cut(config, all_of_it))
                joint_loss[i][receiver] = after[0] - whole_loss
                joint_induction[i][receiver] = (whole_induction - after[1])[receiver]
    np.testing.assert_allclose(found.joint_loss, joint_loss, atol=CLOSE)
    np.testing.assert_allclose(found.joint_induction, joint_induction, atol=CLOSE)
    assert (np.asarray(found.joint_loss)[:, 0] == 0).all()
    assert (np.abs(joint_loss[:, 1:]) > 1e-4).all()


def test_cutting_sets_of_senders():
    """Sets that mix kinds of senders; own is about the receiving head, and total about the model."""
    config = CONFIGS["rms-rotary-grouped-mlp"]
    params, batch = random_params(config), repeats()
    names = graph.senders(config)
    sets = np.zeros((5, len(names)), bool)
    sets[0, [0, 2]] = sets[1, 1:4] = True  # the embedding and a head; senders of more than one layer
    sets[2, -1] = True  # read by the logits alone, or by the last MLP too
    sets[3, graph.head_senders(config)] = True
    found = jax.jit(
        lambda params: cut_senders(config, params, batch, log_likelihood, sets, chunk=2, own=induction_attention)
    )(params)
    whole_loss, whole_induction = outcome(config, params, batch)
    for receiver, (field, place) in graph.receivers(config).items():
        total = np.asarray(getattr(found.total, field))
        assert total.shape[0] == len(sets)
        for c, chosen in enumerate(sets):
            read = [names[n] for n in np.flatnonzero(chosen) if n < graph.n_read(config, receiver)]
            edges = graph.cut(config, [f"{name}->{receiver}" for name in read])
            loss, induction = outcome(config, params, batch, edges=edges) if read else (whole_loss, whole_induction)
            np.testing.assert_allclose(total[(c, *place)], loss - whole_loss, atol=CLOSE)
            assert read or total[(c, *place)] == 0
            if field in "qkv":
                own = found.own["qkv".index(field), c][place]
                np.testing.assert_allclose(own, (whole_induction - induction)[place], atol=CLOSE)


def test_chunk_changes_memory_and_not_numbers():
    """Below the number of heads, of edges into a layer, and of sets; the default is above all of them."""
    params, batch = random_params(TWO), repeats()
    for chunk in (1, 3):
        one, other = ablate_heads(TWO, params, batch, chunk), ablate_heads(TWO, params, batch)
        jax.tree.map(partial(np.testing.assert_allclose, atol=CLOSE), one, other)
    close_edges(TWO, edge_effects(TWO, params, batch, chunk=1), edge_effects(TWO, params, batch), CLOSE)


def test_cut_edges_carry_what_they_carried_in_another_run():
    """One reference for all sequences, and a metric with axes; test_patching has a reference for each."""
    params, batch = random_params(TWO), repeats()
    _, other = forward(TWO, params, np.random.default_rng(8).integers(0, V, (B, T)))
    mean = np.asarray(graph.outputs(TWO, other)).mean(0)
    whole_loss, whole_induction = outcome(TWO, params, batch)
    found = edge_effects(TWO, params, batch, on_repeats, reference=mean, chunk=3)
    assert found.logits.loss.shape == (5,)
    assert found.q.induction.shape == (5, 2, 2, 2, 2)
    for name in graph.edge_names(TWO):
        field, index = graph.index_of(TWO, name)
        edges, into = graph.cut(TWO, [name]), getattr(found, field)
        loss, induction = outcome(TWO, params, batch, edges=edges, edge_outputs=mean)
        np.testing.assert_allclose(into.loss[index], whole_loss - loss, atol=CLOSE, err_msg=name)
        np.testing.assert_allclose(into.induction[index], whole_induction - induction, atol=CLOSE, err_msg=name)
        assert abs(loss - outcome(TWO, params, batch, edges=edges)[0]) > 1e-5, name


def test_only_the_mask_counts():
    params, batch = random_params(TWO), repeats()
    other = dataclasses.replace(batch, mask=batch.mask.at[:, 6].set(~batch.mask[:, 6]))
    first, second = cut_edges(TWO, params, batch), cut_edges(TWO, params, other)
    whole_loss, whole_induction = outcome(TWO, params, other)
    loss, induction = outcome(TWO, params, other, edges=graph.cut(TWO, ["0.1->1.0.k"]))
    np.testing.assert_allclose(second.loss[1, 0, 1, 1, 0], loss - whole_loss, atol=CLOSE)
    np.testing.assert_allclose(second.induction[1, 0, 1, 1, 0], (whole_induction - induction)[1, 0], atol=CLOSE)
    assert abs(second.loss[1, 0, 1, 1, 0] - first.loss[1, 0, 1, 1, 0]) > 1e-4


def test_a_model_of_one_layer_has_no_edges_from_head_to_head():
    config = TransformerConfig(V, T, n_layers=1, n_heads=2, d_model=8)
    effects = cut_edges(config, random_params(config), repeats())
    assert [leaf.shape for leaf in jax.tree.leaves(effects)] == [(3, 1, 2, 1, 2)] * 2 + [(3, 1, 2)] * 2
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(effects))


def test_many_runs_come_from_vmap():
    batch, params = repeats(), random_params(TWO)
    halved = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, halved)
    for function in (ablate_heads, edge_effects):
        together = jax.jit(jax.vmap(lambda params, f=function: f(TWO, params, batch)))(runs)
        for i, alone in enumerate((params, halved)):
            expected = function(TWO, alone, batch)
            jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, atol=CLOSE), together, expected)


# Sets of heads, references, interventions that are in place all the time ----------------------------------------------


SETS = np.array([[[0, 0], [0, 0]], [[1, 0], [0, 1]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]], bool)


def other_outputs(params):
    """Head outputs [B,L,H,T,D] of another batch."""
    _, other = forward(TWO, params, np.random.default_rng(4).integers(0, V, (B, T)))
    return np.asarray(other.head_outputs)


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_ablating_sets_of_heads(kind):
    params, batch = random_params(TWO), repeats()
    reference = {"zero": None, "mean": other_outputs(params).mean(0), "resample": other_outputs(params)}[kind]
    found = ablate(TWO, params, batch, SETS, on_repeats, reference, chunk=3)
    whole = outcome(TWO, params, batch)
    for i, heads in enumerate(SETS.astype(np.float32)):
        if reference is None:
            change = {"head_scale": 1 - heads}
        else:
            mask = np.repeat(heads[..., None], T, -1)
            change = {"head_outputs": Replacement(jnp.asarray(reference), jnp.asarray(mask))}
        loss, induction = outcome(TWO, params, batch, **change)
        np.testing.assert_allclose(found.loss[i], whole[0] - loss, atol=CLOSE)
        np.testing.assert_allclose(found.induction[i], whole[1] - induction, atol=CLOSE)
        assert i == 0 or abs(whole[0] - loss) > 1e-2
    assert abs(found.loss[0]) < 1e-6  # nothing is ablated


def test_mean_and_resample_ablation_differ_from_zero_ablation():
    """As one weighted sum: with the head's own outputs as the reference nothing falls, and with zeros all of it."""
    params, batch = random_params(TWO), repeats()
    _, seen = forward(TWO, params, batch.tokens)
    own = ablate(TWO, params, batch, SETS, reference=seen.head_outputs)
    np.testing.assert_allclose(own, 0.0, atol=CLOSE)
    zeros = ablate(TWO, params, batch, SETS, reference=jnp.zeros_like(seen.head_outputs[0]))
    np.testing.assert_allclose(zeros, ablate(TWO, params, batch, SETS), atol=CLOSE)
    assert np.abs(zeros[1:]).min() > 1e-2


def both(logits, seen, batch):
    """A metric that is no number."""
    return {"value": log_likelihood(logits, seen, batch), "patterns": seen.patterns}


def test_pattern_preserving_ablation():
    params, batch = random_params(TWO), repeats()
    _, seen = forward(TWO, params, batch.tokens)
    frozen = frozen_patterns(seen)
    found = ablate(TWO, params, batch, SETS, both, within=frozen)
    assert (np.asarray(found["patterns"]) == 0).all()
    plain = ablate(TWO, params, batch, SETS, both)
    assert np.abs(plain["patterns"][1:, :, 1]).max(axis=(1, 2, 3, 4)).min() > 1e-2
    whole = outcome(TWO, params, batch, patterns=frozen.patterns)[0]
    for i, heads in enumerate(SETS.astype(np.float32)):
        loss, _ = outcome(TWO, params, batch, patterns=frozen.patterns, head_scale=1 - heads)
        np.testing.assert_allclose(found["value"][i], loss - whole, atol=CLOSE)
    assert np.abs(found["value"] - plain["value"])[1:3].min() > 1e-3


def test_within_is_in_place_in_the_whole_model_too():
    """The fall is counted from the model with the other intervention, not from the untouched one."""
    params, batch = random_params(TWO), repeats()
    edges = graph.cut(TWO, ["embedding->1.1.v", "0.0->logits"])
    found = ablate(TWO, params, batch, SETS, within=Interventions(edges=edges))
    whole = outcome(TWO, params, batch, edges=edges)[0]
    for i, heads in enumerate(SETS.astype(np.float32)):
        loss = outcome(TWO, params, batch, edges=edges, head_scale=1 - heads)[0]
        np.testing.assert_allclose(found[i], loss - whole, atol=CLOSE)
    untouched = ablate(TWO, params, batch, SETS)
    assert np.abs(found - untouched)[1:].min() > 1e-3


def test_ablation_of_nothing_that_fits():
    params, batch = random_params(TWO), repeats()
    run = partial(ablate, TWO, params, batch)
    with pytest.raises(ValueError, match=r"sets must be \[n,L,H\] with \[L,H\] = \[2, 2\]; got \[2, 2\]"):
        run(SETS[0])
    with pytest.raises(ValueError, match=r"sets must be .* got \[4, 2, 3\]"):
        run(np.ones((4, 2, 3), bool))
    for taken in (
        Interventions(head_scale=jnp.ones((2, 2))),
        Interventions(head_outputs=Replacement(jnp.zeros((2, 2, T, 8)), jnp.zeros((2, 2, T)))),
    ):
        with pytest.raises(ValueError, match="within must leave head_scale and head_outputs"):
            run(SETS, within=taken)
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        run(SETS, chunk=0)
    with pytest.raises(ValueError, match=r"head_outputs\.value must have shape"):
        run(SETS, reference=jnp.zeros((2, 2, T, 7)))
    outside = dataclasses.replace(batch, tokens=batch.tokens.at[0, 0].set(V))
    for function in (ablate_heads, cut_edges, edge_effects, ablate_pairs):
        with pytest.raises(ValueError, match="tokens must be in"):
            function(TWO, params, outside)
    with pytest.raises(ValueError, match="edge_outputs must have shape"):
        edge_effects(TWO, params, batch, reference=jnp.zeros((4, T, 8)))
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        cut_edges(TWO, params, batch, chunk=0)


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zero", "resample"])
def test_ablating_pairs_of_heads(kind):
    params, batch = random_params(TWO), repeats()
    reference = None if kind == "zero" else other_outputs(params)
    found = ablate_pairs(TWO, params, batch, on_repeats, reference, chunk=3)
    heads, shape = list(np.ndindex(2, 2)), (2, 2, 2, 2)
    for part, tail in (("loss", ()), ("induction", (2, 2))):
        single, joint, synergy = (np.asarray(getattr(x, part)) for x in (found.single, found.joint, found.synergy))
        assert (single.shape, joint.shape, synergy.shape) == ((2, 2, *tail), shape + tail, shape + tail)
        for a in heads:
            np.testing.assert_array_equal(joint[a][a], single[a])
            assert (synergy[a][a] == 0).all()
            for b in heads:
                np.testing.assert_array_equal(joint[a][b], joint[b][a])
                np.testing.assert_allclose(synergy[a][b], synergy[b][a], atol=2e-7)
                if a != b:
                    np.testing.assert_allclose(synergy[a][b], joint[a][b] - single[a] - single[b], atol=1e-6)
    whole = outcome(TWO, params, batch)
    for a in heads:
        for b in heads:
            chosen = np.maximum(one_hot((2, 2), a), one_hot((2, 2), b))
            change = {"head_scale": 1 - chosen}
            if reference is not None:
                mask = jnp.asarray(np.repeat(chosen[..., None], T, -1))
                change = {"head_outputs": Replacement(jnp.asarray(reference), mask)}
            loss, induction = outcome(TWO, params, batch, **change)
            np.testing.assert_allclose(found.joint.loss[a][b], whole[0] - loss, atol=CLOSE)
            np.testing.assert_allclose(found.joint.induction[a][b], whole[1] - induction, atol=CLOSE)
    assert np.abs(found.synergy.loss).max() > 1e-2


def test_single_heads_is_every_head_once():
    sets = np.asarray(single_heads(CONFIGS["three-layers-layernorm-bias-mlp"]))
    assert sets.shape == (6, 3, 2)
    assert [tuple(np.argwhere(one)[0]) for one in sets] == list(np.ndindex(3, 2))
    assert (sets.sum((1, 2)) == 1).all()


# Pencil and paper -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper():
    config, params = worked_example()
    return config, params, letters()


def closed_form(off=()):
    """Loss, and the induction attention of head 1.0, of the worked example without some edges."""
    batch, losses, inductions = letters(), [], []
    for tokens, mask in zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True):
        attention, logits = worked_solution(tokens, frozenset(off))
        queries = np.flatnonzero(mask)
        losses += [np.log(np.exp(logits[t]).sum()) - logits[t, tokens[t + 1]] for t in queries]
        inductions += [attention[t, t - 2] for t in queries]  # three letters: the one after the copy is at t - 3 + 1
    return np.mean(losses), np.mean(inductions)


def edges_from(config, *heads):
    return [name for name in graph.edge_names(config) if name.split("->")[0] in heads]


def test_the_worked_example_does_what_is_on_paper(paper):
    """The attention of the induction head at query t = i + 3, of which the copy is at i and the right key at i + 1."""
    config, params, batch = paper
    logits, seen = forward(config, params, batch.tokens)
    e, gamma = np.exp(BETA), GAMMA
    np.testing.assert_allclose(seen.patterns[0, 0, 0, 5, 4], e / (e + 5), atol=1e-6)
    np.testing.assert_allclose(seen.patterns[0, 0, 0, 5, :4], 1 / (e + 5), atol=1e-6)
    for i in (1, 2, 3):
        t = i + 3
        right = np.exp(gamma * e / (e + i + 1))
        # Keys before i hold nothing of the letter; i and i + 2 saw it with weight 1/(e + j); t saw it twice.
        others = i + np.exp(gamma / (e + i)) + np.exp(gamma / (e + i + 2)) + np.exp(2 * gamma / (e + t))
        np.testing.assert_allclose(seen.patterns[0, 1, 0, t, i + 1], right / (right + others), atol=1e-6)
        attention, _ = worked_solution(np.asarray(batch.tokens)[0], frozenset())
        np.testing.assert_allclose(attention[t, i + 1], right / (right + others), rtol=1e-12)
        assert 0.8 < right / (right + others) < 0.95
    np.testing.assert_allclose(logits[0], worked_solution(np.asarray(batch.tokens)[0], frozenset())[1], atol=1e-5)
    np.testing.assert_allclose(oracle_loss(logits, batch), closed_form()[0], atol=1e-6)


def test_ablations_of_the_worked_example(paper):
    config, params, batch = paper
    found, (loss, induction) = ablate_heads(config, params, batch), closed_form()
    for head in np.ndindex(2, 2):
        after_loss, after_induction = closed_form(edges_from(config, "{}.{}".format(*head)))
        np.testing.assert_allclose(found.loss[head], after_loss - loss, atol=1e-5)
        np.testing.assert_allclose(found.induction[(*head, 1, 0)], induction - after_induction, atol=1e-5)
        assert abs(after_loss - loss) > 0.01
    # Without its sender, or without a query, the induction head looks everywhere alike.
    chance = np.mean([1 / 5, 1 / 6, 1 / 7])
    np.testing.assert_allclose(found.induction[0, :, 1, 0], induction - chance, atol=1e-5)
    np.testing.assert_allclose(found.induction[1, :, 1, 0], 0.0, atol=1e-5)


def test_joint_ablations_of_the_worked_example(paper):
    config, params, batch = paper
    found, (loss, induction) = ablate_pairs(config, params, batch, on_repeats), closed_form()
    falls = {}
    for a in np.ndindex(2, 2):
        for b in np.ndindex(2, 2):
            after = closed_form(edges_from(config, "{}.{}".format(*a), "{}.{}".format(*b)))
            falls[a, b] = loss - after[0], induction - after[1]
            np.testing.assert_allclose(found.joint.loss[a][b], falls[a, b][0], atol=1e-5)
            np.testing.assert_allclose(found.joint.induction[a][b][1, 0], falls[a, b][1], atol=1e-5)
    for a, b in falls:
        if a != b:
            expected = np.array(falls[a, b]) - falls[a, a] - np.array(falls[b, b])
            np.testing.assert_allclose(found.synergy.loss[a][b], expected[0], atol=1e-5)
            np.testing.assert_allclose(found.synergy.induction[a][b][1, 0], expected[1], atol=1e-5)
    # Sender and query side need each other: the loss of one is the loss of both, and counted twice.
    fall = induction - np.mean([1 / 5, 1 / 6, 1 / 7])
    np.testing.assert_allclose(found.synergy.induction[0, 0, 0, 1, 1, 0], -fall, atol=1e-5)


def test_every_cut_edge_of_the_worked_example(paper):
    """Most of its edges carry nothing that anybody reads: their effects are 0 on paper, too."""
    config, params, batch = paper
    loss, induction = closed_form()
    after = {name: closed_form([name]) for name in graph.edge_names(config)}
    found = edge_effects(config, params, batch)
    close_edges(config, found, edge_by_edge(config, lambda name: after[name][0] - loss), 1e-5)
    matter = {name for name, (other, _) in after.items() if abs(other - loss) > 1e-3}
    assert matter == {
        "embedding->0.0.q", "embedding->0.0.k", "embedding->0.0.v", "embedding->0.1.q", "embedding->0.1.k",
        "embedding->0.1.v", "0.1->1.0.q", "0.0->1.0.k", "embedding->1.0.v", "0.0->1.1.v", "embedding->logits",
        "0.0->logits", "0.1->logits", "1.0->logits", "1.1->logits",
    }  # fmt: skip
    own = cut_edges(config, params, batch)
    for place, name in head_edges(config):
        np.testing.assert_allclose(own.loss[place], after[name][0] - loss, atol=1e-5)
        if place[3:] == (1, 0):
            np.testing.assert_allclose(own.induction[place], induction - after[name][1], atol=1e-5)
    np.testing.assert_allclose(own.joint_loss[1, 1, 0], after["0.0->1.0.k"][0] - loss, atol=1e-5)


# Redundancy: two identical senders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redundant():
    config, params = redundant_example()
    return config, params, letters()


CHANCE = np.mean([1 / 5, 1 / 6, 1 / 7])
# Without one of two senders the right key keeps score SATURATED over at most 6 others at 0.
UNSEEN = 6 * np.exp(-SATURATED) + 2e-6  # float32 rounding of numbers near 1


def redundant_losses():
    """On paper: whole, and with uniform attention: logits 5 times the share of a token, mean over the queries."""
    batch, chance = letters(), []
    for tokens in np.asarray(batch.tokens):
        for t in (4, 5, 6):
            logits = 5 * np.bincount(tokens[: t + 1], minlength=V) / (t + 1)
            chance.append(np.log(np.exp(logits).sum()) - logits[tokens[t + 1]])
    return np.log(np.exp(5) + V - 1) - 5, np.mean(chance)


def test_single_ablations_do_not_see_redundant_senders(redundant):
    config, params, batch = redundant
    logits, seen = forward(config, params, batch.tokens)
    whole, _ = redundant_losses()
    np.testing.assert_allclose(oracle_loss(logits, batch), whole, atol=1e-6)
    np.testing.assert_allclose(oracle_induction(seen.patterns[:, 1, 0], batch), 1.0, atol=1e-6)
    found = ablate_heads(config, params, batch)
    assert np.abs(found.loss[0]).max() <= 5 * UNSEEN
    assert np.abs(found.induction[0, :, 1, 0]).max() <= UNSEEN
    edges = edge_effects(config, params, batch)
    falls = dict(zip(graph.edge_names(config), all_edges(config, edges), strict=True))
    of_senders = [name for name in falls if "0.0" in name or "0.1" in name]
    assert len(of_senders) == 20
    assert max(abs(falls[name]) for name in of_senders) <= 5 * UNSEEN
    assert min(falls[name] for name in ("embedding->1.0.q", "embedding->1.0.v", "1.0->logits")) > 1
    assert np.abs(cut_edges(config, params, batch).induction[:, 0, :, 1, 0]).max() <= UNSEEN


def test_joint_ablation_of_redundant_senders_is_total(redundant):
    config, params, batch = redundant
    whole, chance = redundant_losses()
    found = ablate_pairs(config, params, batch, on_repeats)
    np.testing.assert_allclose(found.joint.induction[0, 0, 0, 1, 1, 0], 1 - CHANCE, atol=1e-5)
    np.testing.assert_allclose(found.joint.loss[0, 0, 0, 1], whole - chance, atol=1e-5)
    np.testing.assert_allclose(found.synergy.induction[0, 0, 0, 1, 1, 0], 1 - CHANCE, atol=1e-5)
    np.testing.assert_allclose(found.synergy.loss[0, 0, 0, 1], whole - chance, atol=1e-5)
    # A sender and its reader are no such pair.
    np.testing.assert_allclose(found.synergy.loss[0, :, 1, 0], 0.0, atol=1e-5)
    edges = cut_edges(config, params, batch)
    np.testing.assert_allclose(edges.joint_induction[1, 1, 0], 1 - CHANCE, atol=1e-5)
    np.testing.assert_allclose(edges.joint_loss[1, 1, 0], chance - whole, atol=1e-5)
    np.testing.assert_allclose(edges.joint_induction[0, 1, 0], 0.0, atol=1e-5)
    assert chance - whole > 1
