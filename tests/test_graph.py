"""The graph of a model: its nodes and edges by brute force, and that they are what the forward pass reads."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import Interventions, TransformerConfig, forward, init_params
from circuits_jax.models import graph
from circuits_jax.models.interventions import Edges, Replacement, n_senders

V, T = 9, 6
CONFIGS = {
    "attention-only": TransformerConfig(V, T, n_layers=3, n_heads=2, d_model=8),
    "mlp-layernorm-bias": TransformerConfig(
        V, T, n_layers=2, n_heads=3, d_model=8, d_head=4, d_mlp=10, norm="layer", bias=True
    ),
}
PLAIN = CONFIGS["attention-only"]
TOKENS = np.array([3, 1, 4, 1, 5, 8])


def random_params(config):
    """Every leaf random, also the biases and gains that init_params leaves at 0 and 1."""
    rng = np.random.default_rng(7)

    def fill(path, leaf):
        gain = 1.0 if path[-1].key == "scale" else 0.0
        return (gain + 0.5 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda k: init_params(config, k), jax.random.key(0)))


@pytest.fixture(scope="module", params=CONFIGS, ids=list(CONFIGS))
def config(request):
    return CONFIGS[request.param]


def computation(config):
    """Everything that happens to the residual stream, in its order."""
    events = [("writes", "embedding")]
    for layer in range(config.n_layers):
        for head in range(config.n_heads):
            events += [("reads", f"{layer}.{head}.{name}") for name in ("q", "k", "v")]
        events += [("writes", f"{layer}.{head}") for head in range(config.n_heads)]
        events += [("reads", f"{layer}.mlp"), ("writes", f"{layer}.mlp")] if config.d_mlp else []
    return [*events, ("reads", "logits")]


def stacked(edges):
    return jax.tree.map(lambda *xs: np.stack(xs), *edges)


# Names ------------------------------------------------------------------------------------------------------------


def test_every_receiver_reads_every_sender_that_wrote_before(config):
    written, edges, read = [], [], []
    for kind, name in computation(config):
        if kind == "writes":
            written.append(name)
        else:
            read.append(name)
            edges += [f"{sender}->{name}" for sender in written]
            assert graph.n_read(config, name) == len(written)
    assert graph.senders(config) == tuple(written)
    assert tuple(graph.receivers(config)) == tuple(read)
    assert graph.edge_names(config) == tuple(edges)
    assert n_senders(config) == len(written)


@pytest.mark.parametrize(("name", "n_edges"), [("attention-only", 61), ("mlp-layernorm-bias", 9 + 4 + 9 * 5 + 8 + 9)])
def test_the_number_of_edges(name, n_edges):
    assert len(graph.edge_names(CONFIGS[name])) == n_edges


def test_heads_stand_among_the_senders_where_head_senders_says(config):
    at = graph.head_senders(config)
    for layer, head in itertools.product(range(config.n_layers), range(config.n_heads)):
        assert graph.senders(config)[at[layer, head]] == f"{layer}.{head}"


def test_an_index_stands_for_the_names_at_its_ends(config):
    names = {place: name for name, place in graph.receivers(config).items()}
    assert len(names) == len(graph.receivers(config))
    for edge in graph.edge_names(config):
        field, (sender, *receiver) = graph.index_of(config, edge)
        assert f"{graph.senders(config)[sender]}->{names[field, tuple(receiver)]}" == edge


def test_existing_marks_the_edges_that_have_a_name(config):
    named = {graph.index_of(config, edge) for edge in graph.edge_names(config)}
    marked = {
        (field, tuple(map(int, place)))
        for field, there in vars(graph.existing(config)).items()
        if there is not None
        for place in np.argwhere(there)
    }
    assert marked == named
    assert (graph.existing(config).mlp is None) == (config.d_mlp == 0)


@pytest.mark.parametrize(
    ("edge", "why"),
    [
        ("0.2->1.0.q", "no sender '0.2'"),
        ("0.mlp->1.0.q", "no sender '0.mlp'"),
        ("3.0->logits", "no sender '3.0'"),
        ("0.0->1.2.q", "no receiver '1.2.q'"),
        ("0.0->1.0", "no receiver '1.0'"),
        ("0.0->1.mlp", "no receiver '1.mlp'"),
        ("0.0->1.0.o", "no receiver '1.0.o'"),
        ("0.0->0.1.v", "0.1.v is computed before 0.0"),
        ("0.1->0.1.q", "0.1.q is computed before 0.1"),
        ("2.0->1.0.k", "1.0.k is computed before 2.0"),
        ("0.0", "no receiver ''"),
        ("0.0->", "no receiver ''"),
        ("0.0 -> 1.0.q", "no sender '0.0 '"),
        ("0.0->1.0.q->logits", "no receiver '1.0.q->logits'"),
        ("", "no sender ''"),
    ],
)
def test_what_is_no_edge_is_refused(edge, why):
    for refuses in (graph.index_of, lambda config, edge: graph.cut(config, [edge])):
        with pytest.raises(ValueError, match="is no edge") as error:
            refuses(PLAIN, edge)
        assert repr(edge) in str(error.value)
        assert why in str(error.value)


def test_an_mlp_reads_the_heads_of_its_layer_but_not_itself():
    config = CONFIGS["mlp-layernorm-bias"]
    assert graph.index_of(config, "0.2->0.mlp") == ("mlp", (3, 0))
    for edge in ("0.mlp->0.mlp", "1.mlp->1.0.q", "1.0->0.mlp"):
        with pytest.raises(ValueError, match="is computed before"):
            graph.index_of(config, edge)


# What the forward pass reads --------------------------------------------------------------------------------------


def test_entries_that_are_no_edges_are_never_read(config):
    params = random_params(config)
    full = graph.full(config, 1.0)
    nans = jax.tree.map(lambda there: np.where(there, 1.0, np.nan).astype(np.float32), graph.existing(config))
    runs = [forward(config, params, TOKENS, Interventions(edges=edges)) for edges in (full, nans)]
    jax.tree.map(np.testing.assert_array_equal, *runs)


def test_every_edge_matters(config):
    params, names = random_params(config), graph.edge_names(config)
    logits = jax.vmap(lambda edges: forward(config, params, TOKENS, Interventions(edges=edges))[0])
    kept, *cuts = logits(stacked([graph.cut(config, []), *(graph.cut(config, [edge]) for edge in names)]))
    for edge, cut in zip(names, cuts, strict=True):
        assert np.abs(cut - kept).max() > 1e-4, edge


def test_cut_and_keep_only_are_complementary(config):
    some = graph.edge_names(config)[::7]
    places = {graph.index_of(config, edge) for edge in some}
    cut, kept = graph.cut(config, some), graph.keep_only(config, some)
    for field, array in vars(cut).items():
        if array is not None:
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array + getattr(kept, field), 1.0)
            assert {(field, tuple(map(int, place))) for place in np.argwhere(array == 0)} == {
                place for place in places if place[0] == field
            }
    jax.tree.map(np.testing.assert_array_equal, graph.cut(config, []), graph.full(config, 1.0))
    jax.tree.map(np.testing.assert_array_equal, graph.keep_only(config, []), graph.full(config, 0.0))


def test_what_the_senders_wrote_adds_up_to_the_residual_stream(config):
    params, batch = random_params(config), np.stack([TOKENS, TOKENS[::-1]])
    biases = sum(params[f"layer_{layer}"]["attention"].get("b_O", 0.0) for layer in range(config.n_layers))
    seen = forward(config, params, batch)[1]
    outputs = graph.outputs(config, seen)
    np.testing.assert_allclose(outputs.sum(1) + biases, seen.residual[:, -1], atol=1e-5)
    np.testing.assert_array_equal(outputs[1], graph.outputs(config, jax.tree.map(lambda x: x[1], seen)))
    for number, name in enumerate(graph.senders(config)):
        layer, _, node = name.partition(".")
        if name == "embedding":
            expected = seen.residual[:, 0]
        elif node == "mlp":
            expected = seen.mlp_outputs[:, int(layer)]
        else:
            expected = seen.head_outputs[:, int(layer), int(node)]
        np.testing.assert_array_equal(outputs[:, number], expected)


@pytest.mark.parametrize("last", [(), (4,)])
def test_between_heads_picks_the_edges_between_heads(config, last):
    rng = np.random.default_rng(0)
    edges = jax.tree.map(lambda x: rng.normal(size=x.shape + last).astype(np.float32), graph.full(config, 0.0))
    shape = (config.n_layers, config.n_heads)
    expected = np.zeros((3, *shape, *shape, *last), np.float32)
    for name, a, g, b, h in itertools.product("qkv", *map(range, shape * 2)):
        if a < b:
            field, index = graph.index_of(config, f"{a}.{g}->{b}.{h}.{name}")
            expected["qkv".index(name), a, g, b, h] = getattr(edges, field)[index]
    np.testing.assert_array_equal(graph.between_heads(config, edges), expected)
    assert (expected != 0).any()


# Paths ------------------------------------------------------------------------------------------------------------


def frozen(config, params):
    """Every pattern as it is without interventions."""
    patterns = forward(config, params, TOKENS)[1].patterns
    return Replacement(patterns, jnp.ones(patterns.shape[:-1]))


def test_a_path_with_frozen_patterns_is_a_product_of_matrices():
    params = random_params(PLAIN)
    patterns, seen = frozen(PLAIN, params), forward(PLAIN, params, TOKENS)[1]
    p = jax.tree.map(np.float64, params)

    def moved(x, layer, head):
        w = p[f"layer_{layer}"]["attention"]
        return np.float64(seen.patterns[layer, head]) @ x @ w["W_V"][head] @ w["W_O"][head]

    for h, g in itertools.product(range(2), range(2)):
        path = [f"embedding->0.{h}.v", f"0.{h}->1.{g}.v", f"1.{g}->logits"]
        edges = graph.keep_only(PLAIN, path)
        logits = forward(PLAIN, params, TOKENS, Interventions(patterns=patterns, edges=edges))[0]
        x = p["W_E"][TOKENS] + p["W_P"]
        expected = moved(moved(x, 0, h), 1, g) @ p["W_U"]
        assert np.abs(expected).max() > 0.1
        # Everything else is there and then subtracted: that leaves rounding error.
        np.testing.assert_allclose(logits, expected, atol=5e-5)


def test_all_paths_together_are_the_model():
    params = random_params(PLAIN)
    patterns, paths = frozen(PLAIN, params), []
    for heads in itertools.product([None, 0, 1], repeat=PLAIN.n_layers):
        nodes = ["embedding", *(f"{layer}.{head}" for layer, head in enumerate(heads) if head is not None)]
        to_heads = [f"{a}->{b}.v" for a, b in itertools.pairwise(nodes)]
        paths.append(graph.keep_only(PLAIN, [*to_heads, f"{nodes[-1]}->logits"]))

    def along(edges: Edges):
        return forward(PLAIN, params, TOKENS, Interventions(patterns=patterns, edges=edges))[0]

    each = jax.vmap(along)(stacked(paths))
    assert len(each) == 27
    np.testing.assert_allclose(each.sum(0), forward(PLAIN, params, TOKENS)[0], atol=5e-4)
