"""Circuits that were built by hand are found edge for edge, backups too, and the numbers agree with plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import Batch, Interventions, TransformerConfig, forward, init_params
from circuits_jax.heads import circuit_quality, discovery, edge_sets
from circuits_jax.heads.attribution import attribute_edges
from circuits_jax.heads.discovery import discover, discover_by_attribution, discover_greedy
from circuits_jax.heads.edge_sets import circuit_of, faithfulness
from circuits_jax.heads.outcomes import log_likelihood
from circuits_jax.models import graph
from circuits_jax.models.planted import plant
from circuits_jax.models.planted_recipes import PlantedHead, Recipe
from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.repeated_tokens import RepeatedTokens

V, T, B = 10, 12, 8
# Strong enough for one sender to saturate the induction heads.
LAYERS = (
    (*[PlantedHead("previous_token", "send_previous", qk_gain=2.0)] * 3, PlantedHead("duplicate_token", "copying")),
    (
        *[PlantedHead("induction", "copying", qk_gain=6.0, ov_gain=80.0)] * 2,
        PlantedHead("first_token", "inactive"),
        PlantedHead("diffuse", "extracting"),
    ),
)
RECIPE = Recipe(LAYERS, n_vocab=V, n_context=T, d_head=14)
CONFIG = RECIPE.config


def sequences(seed, noise=0.0):
    """Repeats behind [BOS]; with noise=1 nothing repeats."""
    return sample_batch(RepeatedTokens(3, 5, noise, n_vocab=V, n_context=T, bos=True), jax.random.key(seed), 0, B)


SEARCHED, HELD_OUT, CORRUPTED = sequences(1), sequences(2), sequences(3, noise=1.0)


@pytest.fixture(scope="module")
def planted():
    # It runs once: without optimizations it compiles in a tenth of the time.
    key, options = jax.random.key(0), {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return plant.lower(RECIPE, key).compile(compiler_options=options)(key)


class Model:
    """What is left of the planted heads when only so many senders and induction heads write anything."""

    def __init__(self, planted, n_senders, n_induction=1, qk_gain=1.0, ov_gain=1.0):
        edges, self.params = np.asarray(planted.truth.edges), jax.tree.map(np.array, planted.params)
        heads = np.flatnonzero(edges[:, 0].any((0, 2, 3))), np.flatnonzero(edges[:, :, :, 1].any((0, 1, 2)))
        first, second = (self.params[f"layer_{layer}"]["attention"] for layer in range(2))
        first["W_O"][heads[0][n_senders:]] = 0.0
        second["W_O"][heads[1][n_induction:]] = 0.0
        second["W_Q"][heads[1]] *= qk_gain
        second["W_O"][heads[1]] *= ov_gain
        self.senders = [f"0.{head}" for head in heads[0][:n_senders]]
        self.induction = [f"1.{head}" for head in heads[1][:n_induction]]

    def circuit(self, senders, induction):
        """The names of all edges that K-composition between these heads needs."""
        into_senders = {f"embedding->{a}.{into}" for a in senders for into in "qkv"}
        into_induction = {f"embedding->{b}.{into}" for b in induction for into in "qv"}
        between = {f"{a}->{b}.k" for a, b in itertools.product(senders, induction)}
        return into_senders | into_induction | between | {f"{b}->logits" for b in induction}

    def reference(self):
        return graph.outputs(CONFIG, forward(CONFIG, self.params, CORRUPTED.tokens)[1])


def names(circuit):
    return set(circuit.edge_names())


@pytest.fixture(scope="module")
def single(planted):
    return Model(planted, 1)


@pytest.fixture(scope="module")
def backups(planted):
    return Model(planted, 3)


# --- planted circuits ---


def test_a_planted_circuit_is_found_edge_for_edge(single):
    found = discover_greedy(CONFIG, single.params, SEARCHED)
    assert names(found) == single.circuit(single.senders, single.induction)
    assert found.heads() == (*single.senders, *single.induction)
    assert found.nodes() == ("embedding", *found.heads())
    assert found.n_edges == 7
    share = faithfulness(CONFIG, single.params, HELD_OUT, found.kept)
    np.testing.assert_allclose(share, 1.0, atol=0.02)


def test_with_a_corrupted_run_positions_need_no_edges(single):
    reference = single.reference()
    found = discover_greedy(CONFIG, single.params, SEARCHED, reference=reference)
    # Both runs hold the same positions: the sender looks back either way.
    (sender,) = single.senders
    positions = {f"embedding->{sender}.q", f"embedding->{sender}.k"}
    assert names(found) == single.circuit(single.senders, single.induction) - positions
    by_attribution = discover_by_attribution(CONFIG, single.params, SEARCHED, reference=reference)
    assert names(by_attribution) == names(found)


def test_attribution_holds_the_planted_circuit_and_little_else(single):
    found = discover_by_attribution(CONFIG, single.params, SEARCHED)
    assert names(found) >= single.circuit(single.senders, single.induction)
    assert found.n_edges <= 8
    assert found.heads() == (*single.senders, *single.induction)
    left = discover_greedy(CONFIG, single.params, SEARCHED, within=found)
    assert names(left) == single.circuit(single.senders, single.induction)


def test_the_gradient_at_the_model_alone_is_blind_to_saturated_attention(single):
    blind = attribute_edges(CONFIG, single.params, SEARCHED)
    assert discover_by_attribution(CONFIG, single.params, SEARCHED, attribution=blind).n_edges > 20
    # Greedy search is not misled: it measures.
    found = discover_greedy(CONFIG, single.params, SEARCHED, attribution=blind)
    assert names(found) == single.circuit(single.senders, single.induction)


def test_three_backups_of_which_each_suffices(backups):
    params = backups.params
    found = discover(CONFIG, params, SEARCHED)
    assert found.ended
    assert found.circuit is found.alternatives[0]
    wanted = [backups.circuit([sender], backups.induction) for sender in backups.senders]
    assert sorted(map(sorted, wanted)) == sorted(sorted(names(one)) for one in found.alternatives)
    assert found.union.heads() == (*backups.senders, *backups.induction)
    assert names(found.union) == set().union(*wanted)

    judged = circuit_quality.quality(CONFIG, params, HELD_OUT, found)
    assert judged.circuit.sufficiency > 0.95
    assert judged.union.sufficiency > 0.95
    # Both hold the only induction head, without which nothing works; the senders alone tell them apart.
    shares = dict(zip(judged.circuit.removed, judged.circuit.model_without, strict=True))
    assert shares[found.circuit.heads()[0]] > 0.95
    assert judged.circuit.completeness < 0.05
    # Not quite 1: with uniform attention the circuit gets a little right, where other edges of the model hinder it.
    assert judged.union.completeness > 0.8
    assert judged.union.necessity > 0.95
    assert min(judged.circuit.minimality, judged.union.minimality) > 0.5


def test_necessity_of_redundant_circuits(planted):
    model = Model(planted, 2, n_induction=2)
    found = discover(CONFIG, model.params, SEARCHED)
    pairs = [model.circuit([a], [b]) for a, b in itertools.product(model.senders, model.induction)]
    assert all(names(one) in pairs for one in found.alternatives)
    assert names(found.union) == model.circuit(model.senders, model.induction)
    judged = circuit_quality.quality(CONFIG, model.params, HELD_OUT, found)
    assert abs(judged.circuit.necessity) < 0.05
    assert judged.union.necessity > 0.95
    assert judged.union.completeness > 0.8


def test_any_two_of_three(planted):
    model = Model(planted, 3, qk_gain=0.5 / 6, ov_gain=0.5)
    found = discover(CONFIG, model.params, SEARCHED)
    pairs = [model.circuit(two, model.induction) for two in itertools.combinations(model.senders, 2)]
    assert len(found.alternatives) == 2
    assert all(names(one) in pairs for one in found.alternatives)
    assert found.union.heads() == (*model.senders, *model.induction)


def test_at_most_max_alternatives(backups):
    found = discover(CONFIG, backups.params, SEARCHED, max_alternatives=2)
    assert len(found.alternatives) == 2
    assert not found.ended


def test_copying_through_a_virtual_head():
    """Two heads look one back, and the second moves what the first wrote; the layer between them does nothing."""
    v, t = 6, 8
    token, position, virtual, output = np.split(np.eye(3 * v + t, dtype=np.float32), np.cumsum([v, t, v]))
    config = TransformerConfig(v, t, n_layers=3, n_heads=2, d_model=3 * v + t, d_head=t)
    rng = np.random.default_rng(0)
    params = {"W_E": token, "W_P": position, "W_U": output.T}
    for layer in range(3):
        shapes = {"W_Q": (2, 26, 8), "W_K": (2, 26, 8), "W_V": (2, 26, 8), "W_O": (2, 8, 26)}
        weights = {name: 0.01 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        params[f"layer_{layer}"] = {"attention": weights}
    for layer, head, reads, writes in ((0, 1, token, virtual), (2, 0, virtual, 10 * output)):
        w = params[f"layer_{layer}"]["attention"]
        w["W_Q"][head], w["W_K"][head] = 60 * position.T @ np.eye(t, k=-1), position.T
        w["W_V"][head], w["W_O"][head] = reads.T @ np.eye(v, t), np.eye(t, v) @ writes
    batch = sample_batch(RepeatedTokens(3, 3, n_vocab=v, n_context=t), jax.random.key(0), 0, B)
    ties = graph.full(config, 0.0)
    found = discover(config, params, batch, attribution=ties)
    wanted = {"embedding->0.1.q", "embedding->0.1.k", "embedding->0.1.v", "embedding->2.0.q", "embedding->2.0.k"}
    assert names(found.circuit) == wanted | {"0.1->2.0.v", "2.0->logits"}
    assert len(found.alternatives) == 1


def test_backups_behind_backups(monkeypatch):
    """Heads 0 and 1 suffice, 2 and 3, and 0 and 4: with 0 and 1 cut, 2 and 3 hide head 4, until head 0 is spared."""
    config = TransformerConfig(5, 6, n_layers=1, n_heads=5, d_model=10)
    read, told = (
        np.array([graph.edge_names(config).index(f"{a}->{b}") for a, b in pairs])
        for pairs in (
            [("embedding", f"0.{head}.v") for head in range(5)],
            [(f"0.{head}", "logits") for head in range(5)],
        )
    )

    def prune(kept, order):
        for edge in order:
            left = np.where(np.arange(len(order)) == edge, False, kept)
            works = left[read] & left[told]
            if any(works[list(pair)].all() for pair in ((0, 1), (2, 3), (0, 4))):
                kept = left
        return kept

    monkeypatch.setattr(discovery, "_pruner", lambda *_: prune)
    strengths = np.zeros(len(graph.edge_names(config)))
    strengths[told] = 3, 5, 1, 1, 0
    found = discover(config, {}, SEARCHED, attribution=edge_sets.edges_of(config, jnp.asarray(strengths)))
    assert found.circuit.heads() == ("0.0", "0.1")
    assert found.union.heads() == ("0.0", "0.1", "0.2", "0.3", "0.4")
    assert found.ended


# --- small random models that predict what they say themselves ---

SMALL = TransformerConfig(5, 6, n_layers=2, n_heads=2, d_model=8, d_head=4, d_mlp=6, norm="layer", bias=True)


def random_params(config):
    """Every leaf random."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + 0.6 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))


@pytest.fixture(scope="module")
def talker():
    """Random parameters, two batches, and a reference run of the second one."""
    params, rng = random_params(SMALL), np.random.default_rng(0)

    def said():
        tokens = rng.integers(0, 5, (4, 6))
        for t in range(2, 6):
            tokens[:, t] = np.argmax(forward(SMALL, params, tokens)[0][:, t - 1], -1)
        mask = np.broadcast_to(np.arange(6) >= 1, tokens.shape)
        return Batch(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), positions={})

    first, second = said(), said()
    seen = forward(SMALL, params, np.flip(second.tokens, 1))[1]
    return params, first, second, graph.outputs(SMALL, seen)


def random_attribution(config):
    """With ties."""
    n_edges = len(graph.edge_names(config))
    return edge_sets.edges_of(config, jnp.asarray(np.random.default_rng(1).integers(-4, 4, n_edges) / 4))


def value(params, batch, kept, reference):
    """The log-likelihood with these edges, by their names, alone."""
    edges = graph.keep_only(SMALL, kept)
    reference = np.zeros((4, 7, 6, 8), np.float32) if reference is None else reference
    logits, _ = forward(SMALL, params, batch.tokens, Interventions(edges=edges, edge_outputs=reference))
    log_p, total = jax.nn.log_softmax(np.float32(logits)), []
    for row, tokens, mask in zip(log_p, np.asarray(batch.tokens), np.asarray(batch.mask), strict=True):
        total += [float(row[t, tokens[t + 1]]) for t in range(len(tokens) - 1) if mask[t]]
    return np.mean(total)


def share(params, batch, kept, reference):
    """Faithfulness, as it is written down."""
    empty, whole = (value(params, batch, edges, reference) for edges in ((), graph.edge_names(SMALL)))
    return (value(params, batch, kept, reference) - empty) / (whole - empty)


def alive(kept):
    """Edges on a path: edges are taken away that nothing comes to or that nothing goes on from, until none is."""
    node = {edge: (edge.split("->")[0], edge.split("->")[1].removesuffix(".q")) for edge in kept}
    node = {edge: (a, b.removesuffix(".k").removesuffix(".v")) for edge, (a, b) in node.items()}
    while True:
        sources = {b for _, b in node.values()} | {"embedding"}
        sinks = {a for a, _ in node.values()} | {"logits"}
        left = {edge: (a, b) for edge, (a, b) in node.items() if a in sources and b in sinks}
        if len(left) == len(node):
            return set(left)
        node = left


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_minimal_circuit_of_a_model_with_mlps_and_norms(talker, with_reference):
    params, batch, _, reference = talker
    reference = reference if with_reference else None
    # With a reference by its own attribution, without one by any other one.
    attribution = None if with_reference else random_attribution(SMALL)
    settings = {"reference": reference, "target": 0.8, "attribution": attribution}
    found = discover_greedy(SMALL, params, batch, **settings)
    kept = names(found)
    assert alive(kept) == kept
    assert 0 < len(kept) < len(graph.edge_names(SMALL))
    assert share(params, batch, kept, reference) >= 0.8 - 1e-4
    for edge in kept:
        assert share(params, batch, alive(kept - {edge}), reference) < 0.8
    by_attribution = discover_by_attribution(SMALL, params, batch, **settings)
    assert alive(names(by_attribution)) == names(by_attribution)
    assert share(params, batch, names(by_attribution), reference) >= 0.8 - 1e-4


@pytest.mark.parametrize("chunk", [1, 5])
def test_greedy_search_is_trying_one_edge_after_the_other(talker, chunk):
    params, batch, _, _ = talker
    every = graph.edge_names(SMALL)
    attribution = random_attribution(SMALL)
    strengths = np.abs(edge_sets.flat(SMALL, attribution))
    # Weakest first, and the last of those that tie.
    order = sorted(range(len(every)), key=lambda edge: (strengths[edge], -edge))
    kept, before = set(every), None
    while before != kept:
        before = kept
        for edge in order:
            left = alive(kept - {every[edge]})
            if every[edge] in kept and share(params, batch, left, None) >= 0.85:
                kept = left
    found = discover_greedy(SMALL, params, batch, target=0.85, attribution=attribution, chunk=chunk)
    assert names(found) == kept


def test_a_target_of_one_loses_nothing(talker):
    params, batch, _, _ = talker
    found = discover_greedy(SMALL, params, batch, target=1.0, attribution=random_attribution(SMALL))
    assert share(params, batch, names(found), None) >= 1.0 - 1e-4


@pytest.mark.parametrize("with_reference", [False, True])
def test_quality_is_what_it_says(talker, with_reference):
    params, _, batch, reference = talker
    reference = reference if with_reference else None
    every = set(graph.edge_names(SMALL))
    rng = np.random.default_rng(5)
    circuits = [circuit_of(SMALL, rng.random(len(every)) < chance) for chance in (0.5, 0.6)]
    union = circuit_of(SMALL, circuits[0].kept | circuits[1].kept)
    found = discovery.Discovery(circuits[0], tuple(circuits), union, ended=True)
    judged = circuit_quality.quality(SMALL, params, batch, found, reference=reference, n_random=3)
    halves = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.5, (3, len(every))))

    known = {}

    def f(kept):
        if frozenset(kept) not in known:
            known[frozenset(kept)] = share(params, batch, kept, reference)
        return known[frozenset(kept)]

    def touches(edge, node):
        a, b = edge.split("->")
        return a == node or b == node or b.rpartition(".")[0] == node

    for whole, parts, got in ((circuits[0], circuits[:1], judged.circuit), (union, circuits, judged.union)):
        c = names(whole)
        sets = [{edge} for edge in whole.edge_names()]
        sets += [{edge for edge in c if touches(edge, node)} for node in whole.nodes()]
        sets += [c & set(np.array(graph.edge_names(SMALL))[half].tolist()) for half in halves]
        circuit_without, model_without = [f(c - k) for k in sets], [f(every - k) for k in sets]
        gaps = [abs(max(a, 0) - max(b, 0)) for a, b in zip(circuit_without, model_without, strict=True)]
        falls = [
            max(f(names(one)) - f(names(one) - {edge}) for one in parts if edge in names(one))
            for edge in whole.edge_names()
        ]
        assert got.edges == whole.edge_names()
        assert got.removed == (*got.edges, *whole.nodes(), "random 0", "random 1", "random 2")
        for name, wanted in {
            "sufficiency": f(c),
            "necessity": 1 - f(every - c),
            "completeness": 1 - max(gaps),
            "mean_gap": np.mean(gaps),
            "minimality": min(falls),
            "falls": falls,
            "circuit_without": circuit_without,
            "model_without": model_without,
        }.items():
            np.testing.assert_allclose(getattr(got, name), wanted, atol=2e-4, err_msg=name)
        assert isinstance(got.completeness, float)


def test_a_bare_circuit_is_its_own_union(talker):
    params, batch, _, _ = talker
    circuit = circuit_of(SMALL, np.ones(len(graph.edge_names(SMALL)), bool))
    judged = circuit_quality.quality(SMALL, params, batch, circuit, n_random=0)
    assert judged.circuit.sufficiency == pytest.approx(1.0)
    assert judged.circuit.necessity == pytest.approx(1.0)
    assert judged.circuit.completeness == pytest.approx(1.0)
    np.testing.assert_array_equal(judged.circuit.falls, judged.union.falls)


# --- sets of edges ---


def test_edges_on_no_path_are_dropped():
    kept = {"embedding->0.0.v", "0.0->0.mlp", "0.mlp->1.1.q", "1.1->logits", "embedding->0.1.k", "1.0->logits"}
    circuit = circuit_of(SMALL, kept)
    assert names(circuit) == kept - {"embedding->0.1.k", "1.0->logits"}
    assert circuit.nodes() == ("embedding", "0.0", "0.mlp", "1.1")
    assert circuit.heads() == ("0.0", "1.1")
    assert names(circuit_of(SMALL, {"0.0->logits", "embedding->0.1.v"})) == set()
    rng = np.random.default_rng(0)
    for chance in (0.2, 0.4, 0.7):
        kept = rng.random(len(graph.edge_names(SMALL))) < chance
        chosen = {edge for edge, there in zip(graph.edge_names(SMALL), kept, strict=True) if there}
        assert names(circuit_of(SMALL, kept)) == alive(chosen)


def test_sets_of_edges_and_edges():
    every = graph.edge_names(SMALL)
    circuit = circuit_of(SMALL, every)
    assert circuit.edge_names() == every
    jax.tree.map(np.testing.assert_array_equal, circuit.edges, graph.existing(SMALL))
    values = jnp.arange(1.0, len(every) + 1)
    edges = edge_sets.edges_of(SMALL, values)
    np.testing.assert_array_equal(edge_sets.flat(SMALL, edges), values)
    for number, name in enumerate(every):
        field, index = graph.index_of(SMALL, name)
        assert getattr(edges, field)[index] == number + 1
        sender, receiver = (ends[number] for ends in edge_sets.ends(SMALL))
        a, b = name.split("->")
        assert graph.senders(SMALL)[sender] == a
        assert (*graph.senders(SMALL), "logits")[receiver] in (b, b.rpartition(".")[0])


# --- errors, programs ---


def test_no_skill_is_an_error(talker):
    params, batch, _, _ = talker
    params = params | {"W_U": -params["W_U"]}
    for search in (discover_greedy, discover_by_attribution, discover):
        with pytest.raises(ValueError, match="nothing to explain"):
            search(SMALL, params, batch)
    with pytest.raises(ValueError, match="nothing to explain"):
        faithfulness(SMALL, params, batch, np.ones(len(graph.edge_names(SMALL)), bool))


def test_errors(talker):
    params, batch, _, _ = talker
    n_edges = len(graph.edge_names(SMALL))
    for target in (0.0, -1.0, 1.5, float("nan")):
        for search in (discover_greedy, discover_by_attribution, discover):
            with pytest.raises(ValueError, match="target must be above 0"):
                search(SMALL, params, batch, target=target)
    with pytest.raises(ValueError, match="max_alternatives"):
        discover(SMALL, params, batch, max_alternatives=0)
    with pytest.raises(ValueError, match="chunk"):
        faithfulness(SMALL, params, batch, np.ones(n_edges, bool), chunk=0)
    with pytest.raises(ValueError, match="chunk"):
        discover_greedy(SMALL, params, batch, chunk=0)
    with pytest.raises(ValueError, match=f"E = {n_edges} edges"):
        faithfulness(SMALL, params, batch, np.ones(3, bool))
    with pytest.raises(ValueError, match="is no edge"):
        circuit_of(SMALL, ["0.0->0.1.q"])
    with pytest.raises(ValueError, match="within must reach"):
        discover_greedy(SMALL, params, batch, within=circuit_of(SMALL, ["embedding->0.0.v", "0.0->logits"]))
    with pytest.raises(ValueError, match="one number"):
        faithfulness(SMALL, params, batch, np.ones(n_edges, bool), lambda logits, seen, batch: logits.mean(0))
    with pytest.raises(ValueError, match="has edges"):
        circuit_quality.quality(SMALL, params, batch, circuit_of(SMALL, ()))
    with pytest.raises(ValueError, match="n_random"):
        circuit_quality.quality(SMALL, params, batch, circuit_of(SMALL, graph.edge_names(SMALL)), n_random=-1)


def test_other_sets_targets_and_orders_compile_nothing_new():
    config = TransformerConfig(5, 6, n_layers=1, n_heads=2, d_model=8)
    params, traced = random_params(config), []

    def energy(logits, seen, batch):
        traced.append(1)
        return (logits**2).mean()

    def batch(seed):
        tokens = np.random.default_rng(seed).integers(0, 5, (4, 6))
        return Batch(tokens=jnp.asarray(tokens), mask=jnp.ones((4, 6), bool), positions={})

    attribution = random_attribution(config)
    found = discover(config, params, batch(0), energy, target=0.8, attribution=attribution, chunk=4)
    by_attribution = discover_by_attribution(config, params, batch(0), energy, attribution=attribution, chunk=4)
    n = len(traced)
    reverse = jax.tree.map(lambda x: 1.0 / (1.0 + abs(x)), attribution)
    discover(config, params, batch(1), energy, target=0.7, attribution=reverse, chunk=4)
    discover_greedy(config, params, batch(0), energy, within=by_attribution, attribution=attribution, chunk=4)
    circuit_quality.quality(config, params, batch(1), found, energy, n_random=5, chunk=4)
    faithfulness(config, params, batch(1), np.stack([found.union.kept] * 7), energy, chunk=4)
    assert len(traced) == n > 0


def test_the_search_lowers_for_all_platforms(talker):
    params, batch, _, reference = talker
    n_edges = len(graph.edge_names(SMALL))
    arguments = params, batch, reference, np.ones(n_edges, bool), np.arange(n_edges), np.float32(0.0)
    platforms = "cpu", "cuda", "tpu"
    # The metric and the config are closed over: exported programs take arrays only.
    search = jax.jit(lambda *arrays: discovery._prune(SMALL, log_likelihood, 4, *arrays))
    assert jax.export.export(search, platforms=platforms)(*arguments).platforms == platforms
