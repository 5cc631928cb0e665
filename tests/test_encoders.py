"""What only some checkpoints have: encoders, post-norm, qk-norm, parallel MLPs, large vocabularies, long contexts."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from effect_oracle import TIED, all_edges, edge_by_edge, oracle_difference, oracle_loss, random_params, repeats

from circuits_jax import CircuitWeights, TransformerConfig, forward, init_params, params_from_weights
from circuits_jax.circuits import attention, reading, spectra
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.heads import (
    attribution,
    direct_effects,
    edge_effects,
    effects,
    ideal_inputs,
    mechanism,
    outcomes,
    patching,
    patterns,
    realisation,
    recall,
    signatures,
    trajectory,
    type_evidence,
    value_scores,
)
from circuits_jax.heads.structure import structure
from circuits_jax.heads.taxonomy import classify_heads
from circuits_jax.models import graph
from circuits_jax.models.config import Rotary
from circuits_jax.models.interventions import Interventions

T = V = 16
D = 3 * V
TOKEN, SENT, PLACE = slice(0, V), slice(V, 2 * V), slice(2 * V, D)


def by_hand(heads, n_layers=1, **fields):
    """Heads {(layer, head): (query part, key part, score, offset, written part)}; all values are the token."""
    n_heads = 1 + max(head for _, head in heads)
    w = {name: np.zeros((n_layers, n_heads, D, V), np.float32) for name in ("W_Q", "W_K", "W_V", "W_O")}
    for head, (query, key, score, offset, to) in heads.items():
        w["W_Q"][head][query] = np.sqrt(V) * score * np.eye(V, k=offset)
        w["W_K"][head][key] = np.eye(V)
        w["W_V"][head][TOKEN] = np.eye(V)
        w["W_O"][head][to] = np.eye(V)
    w["W_O"] = w["W_O"].swapaxes(-1, -2)
    w |= {"W_E": np.eye(D, dtype=np.float32)[TOKEN], "W_U": np.eye(D, dtype=np.float32)[:, TOKEN]}
    w["W_P"] = np.eye(D, dtype=np.float32)[PLACE]
    return CircuitWeights(**{name: jnp.asarray(x) for name, x in w.items()}, **fields)


def dense(circuit):
    return np.asarray(circuit.left) @ np.asarray(circuit.right)


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_chance_in_an_encoder_is_one_of_all_keys():
    even = patterns.uniform(T, causal=False)
    np.testing.assert_array_equal(even, np.full((T, T), 1 / T, np.float32))
    everywhere = jnp.ones(T, bool)
    np.testing.assert_allclose(patterns.entropy(even, everywhere, causal=False), 1.0, rtol=1e-6)
    profile, first = type_evidence.above_chance_profiles(even, everywhere, causal=False)
    np.testing.assert_allclose(profile[: T - 3], 0.0, atol=1e-6)
    np.testing.assert_allclose(first, 0.0, atol=1e-6)
    for z in realisation.positional_z(even, everywhere, jnp.asarray(3), causal=False).values():
        np.testing.assert_allclose(z, 0.0, atol=1e-3)


def test_positional_z_in_an_encoder_is_that_of_all_permutations_of_the_keys():
    pattern = np.random.default_rng(0).dirichlet(np.full(T, 0.3), T)
    z = realisation.positional_z(jnp.asarray(pattern, jnp.float32), jnp.ones(T, bool), jnp.asarray(2), causal=False)
    hit = np.array([pattern[t, t - 1] for t in range(1, T)])
    variance = np.array([np.mean(pattern[t] ** 2) - np.mean(pattern[t]) ** 2 for t in range(1, T)])
    np.testing.assert_allclose(z["previous_token"], (hit - 1 / T).sum() / np.sqrt(variance.sum()), rtol=1e-4)


def test_heads_of_an_encoder_are_called_what_they_are():
    heads = {
        (0, 0): (PLACE, PLACE, 20.0, -1, SENT),  # t asks for t - 1
        (0, 1): (PLACE, PLACE, 20.0, 1, SENT),  # t asks for t + 1
        (0, 2): (TOKEN, TOKEN, 0.0, 0, SENT),
        (0, 3): (TOKEN, TOKEN, 8.0, 0, SENT),
    }
    config, params = params_from_weights(by_hand(heads, causal=False))
    assert not config.causal
    _, seen = forward(config, params, np.arange(T))
    np.testing.assert_allclose(np.diagonal(seen.patterns[0, 0], -1), 1.0, atol=1e-4)
    np.testing.assert_allclose(np.diagonal(seen.patterns[0, 1], 1), 1.0, atol=1e-4)
    found = {name: {label.name for label in report.qk} for name, report in classify_heads(config, params).items()}
    assert found == {"0.0": {"previous_token"}, "0.1": set(), "0.2": {"diffuse"}, "0.3": {"duplicate_token"}}


def test_own_batch_of_an_encoder_is_held_against_its_own_chance():
    config, params = params_from_weights(by_hand({(0, 0): (TOKEN, TOKEN, 0.0, 0, SENT)}, causal=False))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, T)))
    scores = realisation.on_own_batch(config, params, tokens)
    for name in ("previous_token", "first_token", "same_position", "duplicate_token", "induction"):
        np.testing.assert_allclose(scores[name], 0.0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(scores["diffuse"], 1.0, rtol=1e-5)


def test_previous_recall_of_an_encoder_is_among_all_positions():
    heads = {(0, 0): (PLACE, PLACE, 20.0, -1, SENT), (0, 1): (PLACE, PLACE, 20.0, 1, SENT)}
    weights = by_hand(heads, causal=False)
    weights = dataclasses.replace(weights, W_Q=weights.W_Q.at[0, 1].add(0.5 * weights.W_Q[0, 0]))
    np.testing.assert_allclose(recall.previous_recall(weights, jnp.ones(T, bool)), [[1.0, 1 / (T - 1)]], rtol=1e-6)
    decoder = dataclasses.replace(weights, causal=True)
    np.testing.assert_allclose(recall.previous_recall(decoder, jnp.ones(T, bool)), [[1.0, 1.0]])


def test_offsets_of_an_encoder_go_both_ways():
    rng = np.random.default_rng(0)
    shape = {"W_E": (5, 6), "W_Q": (1, 1, 6, 4), "W_K": (1, 1, 6, 4), "W_V": (1, 1, 6, 4), "W_O": (1, 1, 4, 6)}
    arrays = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in (shape | {"W_U": (6, 5)}).items()}
    weights = CircuitWeights(**arrays, positions="rotary", n_context=4, causal=False)
    both = np.mean([dense(attention.qk(weights, offset)) for offset in range(-3, 4)], axis=0)
    np.testing.assert_allclose(dense(attention.mean_qk(weights)), both, rtol=1e-4, atol=1e-5)
    back = np.mean([dense(attention.qk(weights, offset)) for offset in range(4)], axis=0)
    decoder = dataclasses.replace(weights, causal=True)
    np.testing.assert_allclose(dense(attention.mean_qk(decoder)), back, rtol=1e-4, atol=1e-5)


ENCODER = TransformerConfig(5, 8, n_layers=2, n_heads=2, d_model=8, causal=False)


def test_effects_in_an_encoder_need_a_metric_of_ones_own():
    params, batch = random_params(ENCODER), repeats()
    asked = outcomes.logit_difference
    sets = effects.single_heads(ENCODER)
    got = effects.ablate(ENCODER, params, batch, sets, asked)
    whole = oracle_difference(forward(ENCODER, params, batch.tokens)[0], batch)
    for heads, fall in zip(np.asarray(sets), got, strict=True):
        logits, _ = forward(ENCODER, params, batch.tokens, Interventions(head_scale=jnp.asarray(1.0 - heads)))
        np.testing.assert_allclose(fall, whole - oracle_difference(logits, batch), atol=1e-4)
    edges = edge_effects.edge_effects(ENCODER, params, batch, asked)

    def cut(name):
        keep = jax.tree.map(jnp.asarray, graph.cut(ENCODER, [name]))
        return whole - oracle_difference(forward(ENCODER, params, batch.tokens, Interventions(edges=keep))[0], batch)

    expected = all_edges(ENCODER, edge_by_edge(ENCODER, cut))
    np.testing.assert_allclose(all_edges(ENCODER, edges), expected, atol=1e-4)


@pytest.mark.parametrize(
    "effect",
    [
        effects.ablate_heads,
        effects.ablate_pairs,
        edge_effects.edge_effects,
        edge_effects.cut_edges,
        attribution.attribute_edges,
        direct_effects.term_importance,
        direct_effects.direct_target_logits,
        trajectory.behaviour,
        lambda config, params, batch: patching.patch_heads(config, params, batch, batch),
        lambda config, params, batch: patching.knock_out_direction(config, params, batch, jnp.ones(8)),
        lambda config, params, batch: outcomes.values_under(
            config, params, batch, outcomes.on_repeats, Interventions(head_scale=jnp.ones((1, 2, 2)))
        ),
    ],
)
def test_next_tokens_are_not_asked_of_an_encoder(effect):
    with pytest.raises(ValueError, match=r"metric must be one of your own.*causal=False"):
        effect(ENCODER, random_params(ENCODER), repeats())


# --- post-norm --------------------------------------------------------------------------------------------------------

PAIR = {(0, 0): (PLACE, PLACE, 20.0, -1, SENT), (1, 0): (TOKEN, SENT, 40.0, 0, TOKEN)}
POST = TransformerConfig(
    12, 8, n_layers=2, n_heads=2, d_model=8, d_mlp=6, norm="layer", norm_position="post", bias=True, causal=False,
    n_segments=2, unembed_transform=True, activation="gelu",
)  # fmt: skip


@jax.jit
def found_in(weights):
    return structure(weights, jnp.ones(T, bool), jax.random.key(0), n_draws=2)


def induction_by_weights(weights):
    found = found_in(weights)
    return float(found.evidence.scores["induction"][1, 0]), found


def test_nothing_of_earlier_heads_reaches_later_ones_in_a_post_norm_model():
    pre = by_hand(PAIR, n_layers=2, norm="rms")
    score, found = induction_by_weights(pre)
    assert score > 0.8
    assert np.abs(found.inputs.sent[1]).max() > 0.1
    score, found = induction_by_weights(dataclasses.replace(pre, norm_position="post"))
    assert score == pytest.approx(0, abs=1e-6)
    for name in ("sent", "pointers"):
        assert not np.any(getattr(found.inputs, name)), name
    np.testing.assert_array_equal(found.inputs.mixed[1], found.inputs.mixed[0])
    np.testing.assert_allclose(found.inputs.raw_size, np.sqrt(D), rtol=1e-3)
    assert (np.asarray(found.evidence.details["source"]) == -1).all()
    tokens, places = (reading.values(found.weights, x) for x in (found.inputs.tokens, found.inputs.places))
    for leaf in jax.tree.leaves(value_scores.relays(found.weights, tokens, places, tokens, places)):
        assert leaf.shape == (2, 1, 2, 1)
        assert not np.any(leaf)


def test_a_post_norm_encoder_with_a_transform_is_classified():
    params = random_params(POST)
    reports = classify_heads(POST, params)
    assert len(reports) == 4
    for report in reports.values():
        assert not {"induction"} & {label.name for label in report.qk}
        for kinds in report.evidence.values():
            assert all(np.isfinite(score.score) for score in kinds.values()), report.head


@pytest.mark.parametrize(
    "refused",
    [
        lambda weights: signatures.k_composition(weights),
        lambda weights: signatures.induction(weights, jnp.ones(T, bool), 5.0),
        lambda weights: recall.match_recall(weights, jnp.arange(3)),
    ],
)
def test_composition_of_a_post_norm_model_is_refused(refused):
    with pytest.raises(ValueError, match="composition needs norm_position 'pre'"):
        refused(by_hand(PAIR, n_layers=2, norm="rms", norm_position="post"))


@pytest.mark.parametrize("changes", [{"norm_position": "post", "norm": "rms"}, {"unembed_transform": True}])
def test_what_sums_to_the_logits_is_refused_where_it_does_not(changes):
    config = TransformerConfig(5, 8, n_layers=2, n_heads=2, d_model=8, **changes)
    params, batch = random_params(config), repeats()
    with pytest.raises(ValueError, match="direct logit attribution needs"):
        direct_effects.direct_logit_attribution(config, params, batch.tokens, jnp.eye(5))
    with pytest.raises(ValueError, match="direct logit attribution needs"):
        direct_effects.direct_target_logits(config, params, batch)
    with pytest.raises(ValueError, match="mechanisms need a decoder"):
        mechanism.mechanisms(config, params, jnp.ones(8, bool), batch)


def test_edges_of_a_post_norm_model_are_refused():
    config = TransformerConfig(5, 8, n_layers=2, n_heads=2, d_model=8, norm="rms", norm_position="post")
    params, batch = random_params(config), repeats()
    for refused in (edge_effects.edge_effects, attribution.attribute_edges, direct_effects.term_importance):
        with pytest.raises(ValueError, match="edges need norm_position 'pre'"):
            refused(config, params, batch)


# --- qk-norm ----------------------------------------------------------------------------------------------------------


def with_qk_norm(weights, gain):
    n_layers, d_head = weights.W_Q.shape[0], weights.W_Q.shape[-1]
    gains = jnp.broadcast_to(jnp.asarray(gain)[..., None], (n_layers, d_head))
    folded = {name: gains[:, None, None] * getattr(weights, name) for name in ("W_Q", "W_K")}
    return dataclasses.replace(weights, **folded, q_gain=gains, k_gain=gains, norm_epsilon=1e-6)


@pytest.mark.parametrize("by_layer", [False, True])
def test_size_of_rows_is_the_root_mean_square_of_their_queries_and_keys(by_layer):
    rng = np.random.default_rng(0)
    sizes = {"W_E": (5, 6), "W_Q": (2, 4, 6, 3), "W_K": (2, 2, 6, 3), "W_V": (2, 2, 6, 3), "W_O": (2, 4, 3, 6)}
    sizes |= {"W_U": (6, 5), "W_P": (7, 6), "b_Q": (2, 4, 3), "b_K": (2, 2, 3), "q_gain": (2, 3), "k_gain": (2, 3)}
    w = {name: rng.normal(size=size) for name, size in sizes.items()}
    weights = CircuitWeights(**{name: jnp.asarray(x, jnp.float32) for name, x in w.items()}, norm_epsilon=0.1)
    rows = rng.normal(size=(2, 9, 6) if by_layer else (9, 6))
    plain = ideal_inputs.at_size_of(weights, jnp.asarray(rows, jnp.float32))
    assert plain.q_gain is None
    assert plain.k_gain is None
    for layer in range(2):
        x = rows[layer] if by_layer else rows
        for side, n_heads in (("Q", 4), ("K", 2)):
            gain = w[f"{side.lower()}_gain"][layer]
            for head in range(n_heads):
                matrix, bias = w[f"W_{side}"][layer, head], w[f"b_{side}"][layer, head]
                size = np.sqrt(np.mean(((x @ matrix + bias) / gain) ** 2) + 0.1)
                np.testing.assert_allclose(getattr(plain, f"W_{side}")[layer, head], matrix / size, rtol=1e-4)
                np.testing.assert_allclose(getattr(plain, f"b_{side}")[layer, head], bias / size, rtol=1e-4)


def test_what_a_sender_hardly_brings_makes_no_induction_however_qk_norm_scales_it():
    """The key holds the token too, so that qk-norm cannot make the little that was sent as large as a key."""
    scores = {}
    weights = by_hand(PAIR, n_layers=2)
    weights = dataclasses.replace(weights, W_K=weights.W_K.at[1, 0, TOKEN].set(0.5 * jnp.eye(V)))
    for sharpness in (2.0, 0.5):  # of the sender: attention to t - 1 is 1, and about .25
        normed = with_qk_norm(weights, [sharpness, 1.5])
        looks_back = float(signatures.previous_token(normed, jnp.ones(T, bool))[0, 0])
        scores[sharpness], _ = induction_by_weights(normed)
    assert 0.15 < looks_back < 0.4
    assert scores[2.0] > 0.7
    assert scores[0.5] < 0.3


def test_k_composition_with_qk_norm_is_the_gap_of_its_scores():
    """Where all queries are equally large, and all keys, the gap is that of the exact scores of whole keys."""
    weights = with_qk_norm(by_hand(PAIR, n_layers=2), 1.5)
    weights = dataclasses.replace(weights, W_K=weights.W_K.at[1, 0, TOKEN].set(1.5 * jnp.eye(V)))
    sent = weights.W_E @ weights.W_V[0, 0] @ weights.W_O[0, 0]
    everything = np.asarray(reading.token_scores(weights, weights.W_E, weights.W_E, jnp.arange(1))[1, 0], np.float64)
    size = everything[0, 0]  # a key of the size that tokens give it, which matches
    got = signatures.k_composition(weights)[0, 0, 1, 0]
    np.testing.assert_allclose(got, size, rtol=1e-4)
    np.testing.assert_allclose(sent, np.eye(D)[SENT])


# --- parallel MLPs ----------------------------------------------------------------------------------------------------

PARALLEL = TransformerConfig(
    5, 8, n_layers=2, n_heads=2, d_model=8, d_mlp=6, parallel=True, gated=True, activation="silu"
)  # fmt: skip


def parallel_logits(config, params, tokens, cut):
    """The model in float64, node by node; each receiver reads the sum of the senders whose edges are not cut."""
    p = jax.tree.map(np.float64, params)
    sent = {"embedding": p["W_E"][tokens] + p["W_P"]}

    def read(receiver, senders):
        return sum((sent[name] for name in senders if f"{name}->{receiver}" not in cut), np.zeros((len(tokens), 8)))

    for layer in range(config.n_layers):
        before, a, m = tuple(sent), p[f"layer_{layer}"]["attention"], p[f"layer_{layer}"]["mlp"]
        for head in range(config.n_heads):
            q, k, v = (read(f"{layer}.{head}.{i.lower()}", before) @ a[f"W_{i}"][head] for i in "QKV")
            scores = np.where(np.tri(len(tokens)) == 1, q @ k.T / np.sqrt(config.d_head), -np.inf)
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            sent[f"{layer}.{head}"] = weight / weight.sum(-1, keepdims=True) @ v @ a["W_O"][head]
        x = read(f"{layer}.mlp", before)
        gate = x @ m["W_gate"]
        sent[f"{layer}.mlp"] = (gate / (1 + np.exp(-gate)) * (x @ m["W_in"])) @ m["W_out"]
    return read("logits", tuple(sent)) @ p["W_U"]


def test_effects_of_edges_around_a_parallel_mlp():
    params, batch = random_params(PARALLEL), repeats()

    def loss(*cut):
        return oracle_loss([parallel_logits(PARALLEL, params, x, cut) for x in np.asarray(batch.tokens)], batch)

    whole = loss()
    names = graph.edge_names(PARALLEL)
    assert not {"0.0->0.mlp", "1.1->1.mlp"} & set(names)
    assert {"0.0->1.mlp", "0.mlp->1.mlp", "0.mlp->1.0.q"} <= set(names)
    expected = all_edges(PARALLEL, edge_by_edge(PARALLEL, lambda name: loss(name) - whole))
    got = edge_effects.edge_effects(PARALLEL, params, batch)
    np.testing.assert_allclose(all_edges(PARALLEL, got), expected, atol=2e-4)
    for layer in range(2):
        assert not np.any(got.mlp[graph.head_senders(PARALLEL)[layer], layer])
    attributed = attribution.attribute_edges(PARALLEL, params, batch, n_steps=64)
    for layer in range(2):
        assert not np.any(attributed.mlp[graph.head_senders(PARALLEL)[layer], layer])
    total = all_edges(PARALLEL, attributed).sum()
    np.testing.assert_allclose(total, loss(*names) - whole, rtol=0.02)


def test_direct_attribution_of_a_parallel_model_sums_to_the_logits():
    params, batch = random_params(PARALLEL), repeats()
    terms = direct_effects.direct_logit_attribution(PARALLEL, params, batch.tokens, jnp.eye(5))
    logits = np.stack([parallel_logits(PARALLEL, params, x, ()) for x in np.asarray(batch.tokens)])
    np.testing.assert_allclose(terms.total(), logits, rtol=1e-3, atol=1e-3)


# --- long contexts and large vocabularies -----------------------------------------------------------------------------


def long_rotary(n_context):
    rng = np.random.default_rng(0)
    size = {"W_E": (5, 6), "W_Q": (1, 2, 6, 4), "W_K": (1, 1, 6, 4), "W_V": (1, 1, 6, 4), "W_O": (1, 2, 4, 6)}
    arrays = {name: jnp.asarray(rng.normal(size=x), jnp.float32) for name, x in (size | {"W_U": (6, 5)}).items()}
    return CircuitWeights(**arrays, positions="rotary", n_context=n_context, rotary=Rotary(frequencies=(1.0, 1e-4)))


def test_mean_over_a_long_context():
    n = 131072
    weights = long_rotary(n)
    angles = np.arange(n)[:, None] * np.array([1.0, 1e-4])
    cos, sin = np.cos(angles).mean(0), np.sin(angles).mean(0)
    turn = np.block([[np.diag(cos), np.diag(sin)], [-np.diag(sin), np.diag(cos)]])
    expected = np.float64(weights.W_Q[0]) @ turn @ np.float64(weights.W_K[0]).mT
    np.testing.assert_allclose(dense(attention.mean_qk(weights))[0], expected, atol=1e-3)


def test_profile_over_a_long_context_asks_for_offsets():
    with pytest.raises(ValueError, match=r"offsets must be given for a context longer than 8192.*n_context=131072"):
        attention.offset_profile(long_rotary(131072))
    offsets = np.array([0, 7, 131071])
    profile = attention.offset_profile(long_rotary(131072), offsets)
    norms = [attention.qk(long_rotary(131072), int(offset)).frobenius_norm() for offset in offsets]
    np.testing.assert_allclose(profile, np.stack(norms, -1), rtol=1e-5)
    np.testing.assert_allclose(attention.offset_profile(long_rotary(9))[..., 7], profile[..., 1], rtol=1e-5)


def test_gap_and_variance_of_a_large_vocabulary():
    """Of V (V - 1) entries, more than int32 counts: the identity on one token."""
    n = 50_257
    circuit = LowRank(jnp.zeros((n, 1)).at[7].set(1.0), jnp.zeros((1, n)).at[0, 7].set(1.0))
    np.testing.assert_allclose(spectra.diagonal_gap(circuit), 1 / n, rtol=1e-4)
    on, off = spectra.entry_variance(circuit)
    np.testing.assert_allclose(on, 1 / n - 1 / n**2, rtol=1e-3)
    np.testing.assert_allclose(off, 0, atol=1e-9)


@pytest.mark.parametrize("config", [TIED, PARALLEL], ids=["tied-layernorm", "parallel"])
def test_target_logits_are_the_part_of_direct_attribution_about_the_next_token(config):
    params, batch = random_params(config), repeats()
    terms = direct_effects.direct_logit_attribution(config, params, batch.tokens, jnp.eye(5)).heads
    tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
    found = [
        np.float64(terms[b, :, :, t, tokens[b, t + 1]]) - np.float64(terms[b, :, :, t]).mean(-1)
        for b, t in zip(*np.nonzero(mask[:, :-1]), strict=True)
    ]
    got = direct_effects.direct_target_logits(config, params, batch)
    np.testing.assert_allclose(got, np.mean(found, 0), rtol=1e-4, atol=1e-5)


def test_signatures_of_a_large_vocabulary_hold_no_table_of_it():
    config = TransformerConfig(50_257, 8, n_layers=2, n_heads=2, d_model=4)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    program = jax.make_jaxpr(lambda p: trajectory.weight_signatures(config, p, jnp.ones(8, bool), 3.0))(params)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(sub)

    assert max(sizes(program.jaxpr)) <= 4 * trajectory.MOST_TOKENS**2
