"""Planted heads do what their truth says: attention on its target, OV circuits, edges, noise, gauge, validation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.planted import plant
from circuits_jax.models.planted_recipes import PlantedHead, Recipe, recipes
from circuits_jax.models.transformer import forward, init_params

# Each kind of recipe, of positions, norm and pairing at least once; each one costs seconds of compilation.
CASES = {
    "basic learned none": recipes("learned")["basic"],
    "basic rotary rms": recipes("rotary", "rms")["basic"],
    "k_induction shortformer layer": recipes("shortformer", "layer")["k_induction"],
    "k_induction rotary none": dataclasses.replace(recipes("rotary")["k_induction"], rotary_pairs="interleaved"),
    "q_induction sinusoidal none": recipes("sinusoidal")["q_induction"],
    "virtual rotary layer": recipes("rotary", "layer")["virtual"],
    "decoys learned none": recipes("learned")["decoys"],
}
KEY = jax.random.key(3)
# A small model, so weak that no softmax is saturated: a wrong strength or a wrong count of keys shows.
SMALL = Recipe(
    (
        (PlantedHead("previous_token", "send_previous"), PlantedHead("rotated", "rotated")),
        (PlantedHead("induction", "copying"), PlantedHead("first_token", "extracting")),
    ),
    n_vocab=6,
    n_context=6,
    d_head=8,
    strength=2.0,
)


@functools.cache
def model(name):
    """The recipe, its planted model with NumPy leaves, tokens [BOS, random] and [BOS, r, r], their activations."""
    recipe = CASES[name]
    # Compilation costs more than the run: without optimisation a third of it.
    planted = plant.lower(recipe, KEY, 0.0).compile({"xla_backend_optimization_level": 0})(KEY, 0.0)
    rng = np.random.default_rng(0)
    start = recipe.n_vocab - 1
    half = rng.permutation(start)[:11]
    random = rng.integers(0, start, 22)
    tokens = np.concatenate([np.full((2, 1), start), [random, np.tile(half, 2)]], 1)
    _, activations = forward(recipe.config, planted.params, tokens)
    return recipe, jax.tree.map(np.asarray, planted), tokens, jax.tree.map(np.asarray, activations)


def heads(planted):
    return np.ndindex(planted.truth.qk.shape[:2])


def label(table, names, at):
    found = [name for name, value in zip(names, table[at], strict=True) if value]
    assert len(found) <= 1
    return found[0] if found else None


def circuits(planted, at):
    """W_QK and W_OV of one head, in float64."""
    attention = planted.params[f"layer_{at[0]}"]["attention"]
    w_q, w_k, w_v, w_o = (np.asarray(attention[name][at[1]], float) for name in ("W_Q", "W_K", "W_V", "W_O"))
    return w_q @ w_k.T, w_v @ w_o


def targets(kind, tokens, offset, content):
    """[T,T] bool: the keys that a query of this kind of head looks at."""
    i, j = np.indices((len(tokens), len(tokens)))
    previous = np.append(-1, tokens[:-1])
    wanted = {
        "previous_token": j == i - 1,
        "fixed_offset": j == i - offset,
        "first_token": j == 0,
        "same_position": j == i,
        "duplicate_token": tokens[i] == tokens[j],
        "induction": previous[j] == tokens[i],
        "content": content[tokens[i]] == tokens[j],
    }[kind]
    return wanted & (j <= i)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_config(name):
    recipe, planted, _, _ = model(name)
    expected = jax.eval_shape(lambda: init_params(recipe.config, jax.random.key(0)))
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (expected, planted.params)]
    assert shapes[0] == shapes[1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(planted.params))


@pytest.mark.parametrize("name", CASES)
def test_attention_falls_on_the_targets(name):
    _, planted, tokens, activations = model(name)
    truth = planted.truth
    for at in heads(planted):
        kind = label(truth.realised_qk, QK_TYPES, at)
        for sequence in range(2):
            pattern = activations.patterns[sequence][at]
            uniform = np.tril(np.ones_like(pattern)) / np.arange(1, len(pattern) + 1)[:, None]
            if kind is None:
                continue
            if kind == "diffuse":
                np.testing.assert_allclose(pattern, uniform, atol=0.02)
                continue
            wanted = targets(kind, tokens[sequence], truth.offset[at], truth.token_maps["content"][at])
            rows = wanted.any(1) & (np.arange(len(wanted)) > 0)
            assert rows.sum() >= (5 if sequence else 1)
            assert (pattern * wanted).sum(1)[rows].min() > 0.9, (at, kind)
            idle = ~wanted.any(1)
            if kind in ("content", "induction"):
                np.testing.assert_allclose(pattern[idle], uniform[idle], atol=0.02)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("none")])
def test_closed_form_attention_is_the_measured_one(name):
    recipe, planted, _, activations = model(name)
    length = activations.patterns.shape[-1]
    checked = 0
    for at in heads(planted):
        closed, offset = planted.truth.scores["attention"][at], int(planted.truth.offset[at])
        kind = label(planted.truth.qk, QK_TYPES, at)
        assert np.isnan(closed) != (kind in ("previous_token", "fixed_offset", "first_token", "same_position"))
        if np.isnan(closed):
            continue
        queries = np.arange(max(1, offset), recipe.n_context)
        if recipe.positions != "rotary":
            slow = np.mean(np.exp(recipe.strength) / (np.exp(recipe.strength) + queries))
            np.testing.assert_allclose(closed, slow, rtol=1e-6)
        wanted = targets(kind, np.zeros(length, int), offset, np.zeros(1, int))
        measured = (activations.patterns[0][at] * wanted).sum(1)[max(1, offset) :].mean()
        np.testing.assert_allclose(measured, closed, atol=2e-6)
        checked += 1
    assert checked >= 1


def test_closed_form_attention_of_a_weak_head():
    planted = plant(SMALL, KEY)
    at = tuple(int(i[0]) for i in np.nonzero(planted.truth.qk[..., QK_TYPES.index("previous_token")]))
    _, activations = forward(SMALL.config, planted.params, np.array([5, 0, 1, 2, 3, 4]))
    measured = np.diagonal(np.asarray(activations.patterns[at]), -1)
    np.testing.assert_allclose(measured, np.exp(2.0) / (np.exp(2.0) + np.arange(1, 6)), rtol=1e-4)
    np.testing.assert_allclose(planted.truth.scores["attention"][at], measured.mean(), rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("none")])
def test_token_circuits_are_the_planted_ones(name):
    _, planted, _, _ = model(name)
    params, truth = planted.params, planted.truth
    n_vocab = len(params["W_E"])
    seen = set()
    for at in heads(planted):
        score, kind = truth.scores["copying"][at], label(truth.ov, OV_TYPES, at)
        circuit = params["W_E"] @ circuits(planted, at)[1] @ params["W_U"]
        size = np.linalg.norm(circuit) / np.sqrt(n_vocab)
        if np.isnan(score):
            assert size < 1e-5 or kind in (None, "copying"), (at, kind)
            continue
        image = truth.token_maps["transforming"][at] if kind == "transforming" else np.arange(n_vocab)
        assert (image != np.arange(n_vocab)).all() or kind != "transforming"
        sign = -1.0 if score < 0 else 1.0
        np.testing.assert_allclose(circuit, sign * size * np.eye(n_vocab)[image], atol=2e-4 * size)
        values = np.linalg.eigvals(circuit)
        np.testing.assert_allclose(values.real.sum() / np.abs(values).sum(), score, atol=1e-4)
        seen.add(kind)
    assert "copying" in seen


def test_extracting_writes_a_sign_of_each_token():
    _, planted, _, _ = model("basic learned none")
    signs = planted.truth.token_maps["extracting"]
    found = planted.truth.ov[..., OV_TYPES.index("extracting")]
    assert found.sum() == 3
    np.testing.assert_array_equal((signs != 0).all(-1), found)
    np.testing.assert_array_equal(signs.sum(-1), 0)
    at = tuple(np.argwhere(found)[0])
    written = planted.params["W_E"] @ circuits(planted, at)[1]
    np.testing.assert_allclose(written @ written.T, 0.01 * np.outer(signs[at], signs[at]), atol=1e-6)


def test_inputs_that_were_erased():
    """Structure yes, realised no: a layer-1 head that reads tokens keeps its weights and neither looks nor moves."""
    recipe, planted, _, activations = model("decoys learned none")
    truth = planted.truth
    differ = (truth.qk != truth.realised_qk).any(-1)
    assert not differ[0].any()
    assert differ[1].sum() == sum(head.qk in ("duplicate_token", "content") for head in recipe.heads[1]) == 4
    for head in np.flatnonzero(differ[1]):
        assert label(truth.realised_qk, QK_TYPES, (1, head)) == "diffuse"
        qk = planted.params["W_E"] @ circuits(planted, (1, head))[0] @ planted.params["W_E"].T / np.sqrt(recipe.d_head)
        content = truth.token_maps["content"][1, head]
        image = np.where(content < 0, np.arange(len(qk)), content)[:-1]
        np.testing.assert_allclose(qk[:-1], recipe.strength * np.eye(len(qk))[image], atol=1e-3)
    idle = truth.realised_ov[1, :, OV_TYPES.index("inactive")]
    assert (idle & ~truth.ov[1, :, OV_TYPES.index("inactive")]).sum() == 6
    sizes = np.linalg.norm(activations.head_outputs[:, 1], axis=-1).max((0, 2))
    assert sizes[idle].max() < 1e-3  # unerased they would write 0.1


def test_nothing_else_is_unrealised():
    for name in CASES:
        truth = model(name)[1].truth
        if "decoys" not in name:
            np.testing.assert_array_equal(truth.qk, truth.realised_qk)
            np.testing.assert_array_equal(truth.ov, truth.realised_ov)


def test_benchmark_recipes_hold_every_type():
    for positions in ("learned", "sinusoidal", "shortformer", "rotary"):
        models = recipes(positions)
        assert ("q_induction" in models) == (positions in ("learned", "sinusoidal"))
        heads_of_all = [head for recipe in models.values() for layer in recipe.heads for head in layer]
        assert {head.qk for head in heads_of_all} >= {*QK_TYPES, "rotated", "junk"}
        assert {head.ov for head in heads_of_all} >= {*OV_TYPES, "rotated", "erase"}


@pytest.mark.parametrize("name", CASES)
def test_edges_are_what_the_weights_compose(name):
    """The product of the two circuits is not zero for an edge, and zero for all others of heads that have a label."""
    planted = model(name)[1]
    truth = planted.truth
    assert not truth.edges[:, 1].any()
    assert not truth.edges[:, :, :, 0].any()
    maps = {at: circuits(planted, at) for at in heads(planted)}
    blank = {at: (truth.qk[at].any(), truth.ov[at].any()) for at in maps}
    for a, b in ((a, b) for a in maps for b in maps if (a[0], b[0]) == (0, 1)):
        sent, (qk, ov) = maps[a][1], maps[b]
        # Rotary positions turn what rotated components read, but never from one subspace to another.
        for kind, (read, side) in enumerate(((qk, 0), (qk.T, 0), (ov, 1))):
            weak = min(np.linalg.norm(sent), np.linalg.norm(read)) < 1e-2
            score = 0.0 if weak else np.linalg.norm(sent @ read) / np.linalg.norm(sent) / np.linalg.norm(read)
            if truth.edges[kind, *a, *b]:
                assert score > 0.1, (kind, a, b)
            elif blank[a][1] and blank[b][side]:
                assert score < 1e-4, (kind, a, b)
    expected = {"basic": (0, 0, 0), "k_induction": (0, 8, 0), "q_induction": (4, 0, 0), "virtual": (0, 0, 3)}
    if name.split()[0] in expected:
        assert tuple(truth.edges.sum((1, 2, 3, 4))) == expected[name.split()[0]]
    else:
        # The eraser writes tokens: Q- and K-composition with all heads that match tokens, V- with all that move them.
        assert tuple(truth.edges.sum((1, 2, 3, 4))) == (4, 4, 6)


def test_heads_are_permuted_with_their_truth():
    orders = []
    for seed in range(3):
        truth = plant(SMALL, jax.random.key(seed)).truth
        orders.append(np.asarray(truth.qk[1, :, QK_TYPES.index("induction")]).tolist())
        sender = np.asarray(truth.qk[0, :, QK_TYPES.index("previous_token")])
        receiver = np.asarray(truth.qk[1, :, QK_TYPES.index("induction")])
        edges = np.zeros((3, 2, 2, 2, 2), bool)
        edges[1, 0, :, 1, :] = np.outer(sender, receiver)
        np.testing.assert_array_equal(truth.edges, edges)
    assert [True, False] in orders
    assert [False, True] in orders


@pytest.mark.parametrize("name", ["basic learned none", "basic rotary rms"])
def test_the_gauge_is_random_and_not_orthogonal(name):
    """The circuits do not depend on it, as the tests above show; the factors do."""
    recipe, planted, _, _ = model(name)
    attention = planted.params["layer_0"]["attention"]
    head = int(np.flatnonzero(planted.truth.qk[0, :, QK_TYPES.index("duplicate_token")])[0])
    w_q, w_k = (attention[name][head].astype(float) for name in ("W_Q", "W_K"))
    values = np.linalg.svd(w_q, compute_uv=False)[: recipe.n_vocab]
    assert 1.1 < values[0] / values[-1] < 3.0
    # A same-token head has W_Q = W_K up to the gauge: a random one leaves little of that.
    assert np.linalg.norm(w_q - w_k) > 0.3 * np.linalg.norm(w_q)
    start = 16 if recipe.positions == "rotary" else 0
    assert (np.abs(w_q[:, start:]).sum(0) > 0).all()
    np.testing.assert_allclose(w_q[:, :start], 0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["basic learned none", "k_induction shortformer layer"])
def test_noise_energy_is_its_ratio_to_the_signal(name):
    recipe, planted, _, _ = model(name)
    params, truth = planted.params, planted.truth
    ratio = 0.5
    noisy = jax.tree.map(np.asarray, plant(recipe, KEY, ratio))
    basis = {"token": np.linalg.qr((params["W_E"][1:] - params["W_E"][0]).T)[0], "position": params["W_P"].T}
    basis["const"] = (params["W_E"].mean(0) - params["W_E"].mean(0) @ basis["token"] @ basis["token"].T)[:, None]
    basis["const"] /= np.linalg.norm(basis["const"])
    measured = []
    for at in heads(planted):
        (qk, ov), (noisy_qk, noisy_ov) = circuits(planted, at), circuits(noisy, at)
        kind = label(truth.qk, QK_TYPES, at)
        if kind == "diffuse":
            np.testing.assert_array_equal(noisy_qk, 0.0)
        if label(truth.ov, OV_TYPES, at) == "inactive":
            np.testing.assert_array_equal(noisy_ov, 0.0)
        spaces = {"duplicate_token": "token", "previous_token": "position", "same_position": "position"}
        if kind in spaces:
            # The signal's own spaces: of duplicate_token heads the V dimensions of tokens, from its singular vectors.
            left = right = basis["position"]
            if kind == "duplicate_token":
                u, s, v = np.linalg.svd(qk)
                left, right = u[:, s > 1e-3 * s[0]], v[s > 1e-3 * s[0]].T
                assert left.shape[1] == recipe.n_vocab
            measured.append(_energy(left.T @ (noisy_qk - qk) @ right) / _energy(qk))
        if label(truth.ov, OV_TYPES, at) in ("copying", "suppressing"):
            u, s, v = np.linalg.svd(ov)
            used = s > 1e-3 * s[0]
            measured.append(_energy(u[:, used].T @ (noisy_ov - ov) @ v[used].T) / _energy(ov))
    # One head scatters by about 2 / sqrt(entries of its factors), some 5 %: many heads are the Monte Carlo.
    assert len(measured) >= 6
    np.testing.assert_allclose(np.mean(measured), ratio, rtol=0.1)
    np.testing.assert_allclose(measured, ratio, rtol=0.35)


def _energy(x):
    return np.square(x).sum()


def test_noise_of_rotary_heads_against_the_offset_averaged_signal():
    """const -> const through eight pairs, many draws: energy of the noise at one offset, of the signal over many."""
    recipe = dataclasses.replace(SMALL, heads=((PlantedHead("previous_token"),),), positions="rotary", d_head=24)
    keys = jax.random.split(KEY, 400)
    clean, noisy = (
        jax.tree.map(np.asarray, jax.vmap(functools.partial(plant, recipe, noise=noise))(keys)) for noise in (0.0, 0.5)
    )
    extra, signal = [], []
    for run in range(len(keys)):
        q, k = (clean.params["layer_0"]["attention"][name][run, 0].astype(float) for name in ("W_Q", "W_K"))
        const = q @ np.linalg.svd(q)[2][0]
        const /= np.linalg.norm(const)
        # Both sides have one dimension: noise counts in all that embeddings span.
        room = np.linalg.qr(clean.params["W_E"][run].astype(float).T)[0]
        room = np.linalg.qr(np.concatenate([const[:, None], room], 1))[0][:, : recipe.n_vocab + 1]
        noisy_q, noisy_k = (noisy.params["layer_0"]["attention"][name][run, 0] for name in ("W_Q", "W_K"))
        extra.append(_energy((room.T @ noisy_q) @ (room.T @ noisy_k).T - (room.T @ q) @ (room.T @ k).T))
        q_pairs, k_pairs = (np.square((const @ x)[:16].reshape(2, 8)).sum(0) for x in (q, k))
        signal.append(0.5 * (q_pairs * k_pairs).sum())
    np.testing.assert_allclose(np.mean(extra), 0.5 * np.mean(signal), rtol=0.25)


def test_vmapped_runs_are_the_single_ones():
    keys, noise = jax.random.split(KEY, 2), np.array([0.0, 0.3])
    together = jax.vmap(functools.partial(plant, SMALL))(keys, noise)
    for run in range(2):
        alone = plant(SMALL, keys[run], noise[run])
        one = jax.tree.map(lambda x: x[run], together)  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one, alone)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_plant_lowers_for_every_platform(positions):
    recipe = dataclasses.replace(SMALL, positions=positions, d_head=24, norm="layer")
    key = jax.eval_shape(lambda: jax.random.key(0))
    noise = jax.ShapeDtypeStruct((), np.float32)
    exported = jax.export.export(jax.jit(functools.partial(plant, recipe)), platforms=("cpu", "cuda", "tpu"))
    assert exported(key, noise).platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk": "next_token"}, "qk must be one of previous_token"),
        ({"ov": "moving"}, "ov must be one of copying"),
        ({"mechanism": "v"}, "mechanism must be one of k, q"),
        ({"offset": 1}, "offset must be an integer of at least 2; got 1"),
        ({"qk_gain": 0.0}, "qk_gain must be a positive finite number; got 0"),
        ({"ov_gain": float("nan")}, "ov_gain must be a positive finite number; got nan"),
        ({"qk": "diffuse", "ov": "erase"}, "an erase head must be same_position with gains of 1"),
    ],
)
def test_heads_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        PlantedHead(**fields)


HEAD, SENDER = PlantedHead("previous_token"), PlantedHead("previous_token", "send_previous")
INDUCTION = PlantedHead("induction", "copying")
ERASER = PlantedHead("same_position", "erase")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": ()}, "heads must be a tuple of layers"),
        ({"heads": ([HEAD],)}, "heads must be a tuple of layers"),
        ({"heads": ((HEAD,), (HEAD, HEAD))}, r"heads must be equally many in each layer; got \[1, 2\]"),
        ({"positions": "none"}, "positions must be one of learned"),
        ({"norm": "batch"}, "norm must be one of none"),
        ({"rotary_pairs": "third"}, "rotary_pairs must be one of half"),
        ({"strength": -1.0}, "strength must be a positive finite number"),
        ({"n_vocab": 2}, "n_vocab must be an integer of at least 3; got 2"),
        ({"n_context": 1}, "n_context must be an integer of at least 2; got 1"),
        ({"d_head": 23}, "d_head must be an integer of at least 24; got 23"),
        ({"d_head": 39, "positions": "rotary"}, "d_head must be an integer of at least 40; got 39"),
        ({"heads": ((PlantedHead("fixed_offset", offset=24),),)}, "offset must be less than 24; got 24"),
        ({"heads": ((PlantedHead("duplicate_token", "send_pointer"),),), "positions": "rotary"}, "positions must be"),
        ({"heads": ((SENDER,), (PlantedHead("induction", mechanism="q"),))}, r"layer 1 must be \('duplicate_token'"),
        ({"heads": ((INDUCTION,), (SENDER,))}, r"a head in front of layer 0 must be \('previous_token'"),
        ({"heads": ((ERASER,), (SENDER,), (INDUCTION,))}, "a head in front of layer 2"),
        ({"heads": ((HEAD,), (PlantedHead("same_position", "receive_virtual"),))}, "send_virtual"),
    ],
)
def test_recipes_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"heads": ((HEAD,),)} | fields))
