"""The head atlas of models whose circuits are known, because they were planted: it says what is there."""

import dataclasses
import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.circuits.weights import CircuitWeights, params_from_weights
from circuits_jax.heads.effects import ablate_heads
from circuits_jax.models.head_types import OV_TYPES, QK_TYPES
from circuits_jax.models.planted import plant
from circuits_jax.models.planted_recipes import recipes
from circuits_jax.models.transformer import forward
from circuits_jax.reports.atlas import atlas
from circuits_jax.reports.atlas_page import atlas_json, atlas_page
from circuits_jax.reports.material import Material
from circuits_jax.reports.studied_model import StudiedModel, open_model
from circuits_jax.tasks.batch import Batch

FIXTURES = Path(__file__).parent / "fixtures" / "pretrained"
RECIPES = {name: recipes("learned")[name] for name in ("basic", "k_induction")}
CONFIG = RECIPES["basic"].config
V, L, H, D, K = CONFIG.n_vocab, CONFIG.n_layers, CONFIG.n_heads, CONFIG.d_model, CONFIG.d_head
BOS = V - 1
NAMES = [f"t{token}" for token in range(V)]
PLACES = [(layer, head) for layer in range(L) for head in range(H)]


@pytest.fixture(scope="module")
def planted():
    return {name: plant(recipe, jax.random.key(0)) for name, recipe in RECIPES.items()}


@pytest.fixture(scope="module")
def model(planted):
    states = [(name, lambda name=name: planted[name].params) for name in RECIPES]
    return StudiedModel("planted", "arrays", CONFIG, states, bos=BOS, notes=("by hand",))


@pytest.fixture(scope="module")
def material(planted):
    half = np.random.default_rng(0).integers(BOS, size=(3, 11))
    tokens = np.concatenate([np.full((3, 1), BOS), half, half], axis=1)
    dictionary = np.asarray(planted["basic"].params["W_E"])[[4, 7, 9]]
    predicted = np.broadcast_to(np.arange(23) % 22 > 10, tokens.shape)  # of the second half, not the last
    return Material(NAMES, tokens, predicted, "repeats", " ", ["four", "seven", "nine"], dictionary)


@pytest.fixture(scope="module")
def parts():
    return []


@pytest.fixture(scope="module")
def made(model, material, parts):
    return atlas(model, material, jax.random.key(1), parts.append)


@pytest.fixture(scope="module")
def from_weights(planted):
    model = StudiedModel("planted", "arrays", CONFIG, [("", lambda: planted["basic"].params)], bos=BOS)
    return atlas(model, Material(NAMES), jax.random.key(1))


@pytest.fixture(scope="module")
def circuits(planted):
    """W_QK and W_OV [L,H,D,D] in float64."""
    weights = CircuitWeights.from_params(CONFIG, planted["basic"].params)
    w_e, w_u, w_q, w_k, w_v, w_o = (
        np.asarray(getattr(weights, name), np.float64) for name in ("W_E", "W_U", "W_Q", "W_K", "W_V", "W_O")
    )
    return w_e, w_u, w_q @ w_k.swapaxes(-1, -2), w_v @ w_o


def heads_of(atlas, planted, side, name):
    """(place, head) of all heads in which this type was planted."""
    types = {"qk": QK_TYPES, "ov": OV_TYPES}[side]
    is_type = np.asarray(getattr(planted["basic"].truth, side))[..., types.index(name)]
    found = [(at, head) for at, head in zip(PLACES, atlas["states"][0]["heads"], strict=True) if is_type[at]]
    assert found
    return found


# --- what is said of a head is what was planted in it


@pytest.mark.parametrize(("kind", "verdict"), [("made", "supported"), ("from_weights", "structure")])
def test_labels_are_the_truth(request, planted, kind, verdict):
    truth = planted["basic"].truth
    for at, head in zip(PLACES, request.getfixturevalue(kind)["states"][0]["heads"], strict=True):
        for side, types in (("qk", QK_TYPES), ("ov", OV_TYPES)):
            wanted = [name for name, there in zip(types, np.asarray(getattr(truth, side))[at], strict=True) if there]
            assert [label["name"] for label in head[side]] == wanted, at
            assert {label["verdict"] for label in head[side]} == {verdict}
            assert all(label["confidence"] > 0.5 and label["establishes"] for label in head[side])
        if truth.offset[at]:
            assert head["qk"][0]["note"] == f"{truth.offset[at]} back"


def test_evidence_of_every_type_speaks_for_the_labels(made):
    for head in made["states"][0]["heads"]:
        assert [(one["type"], one["side"]) for one in head["evidence"]] == [
            *((name, "qk") for name in QK_TYPES), *((name, "ov") for name in OV_TYPES),
        ]  # fmt: skip
        for one in head["evidence"]:
            found = [one[kind]["found"] for kind in ("weights", "activations")]
            assert found == [one["type"] in [label["name"] for label in head[one["side"]]]] * 2


def test_the_strongest_pairs_are_those_of_the_full_circuits(made, planted, circuits):
    w_e, w_u, w_qk, w_ov = circuits
    for at, head in heads_of(made, planted, "ov", "copying"):
        entries = w_e @ w_ov[at] @ w_u
        assert len(head["pairs"]["ov"]) == 12  # none is lowered
        for attended, raised, logit in head["pairs"]["ov"]:
            assert attended == raised
            np.testing.assert_allclose(logit, entries[NAMES.index(attended), NAMES.index(raised)], rtol=1e-4)
    for at, head in heads_of(made, planted, "qk", "duplicate_token"):
        scores = w_e @ w_qk[at] @ w_e.T / K**0.5
        for query, key, score in head["pairs"]["qk"]:
            assert query == key
            np.testing.assert_allclose(score, scores[NAMES.index(query), NAMES.index(key)], rtol=1e-4)
    maps = np.asarray(planted["basic"].truth.token_maps["transforming"])
    for at, head in heads_of(made, planted, "ov", "transforming"):
        assert all(raised == NAMES[maps[at][NAMES.index(attended)]] for attended, raised, _ in head["pairs"]["ov"])


def test_suppressing_heads_lower_their_own_tokens(made, planted, circuits):
    w_e, w_u, _, w_ov = circuits
    for at, head in heads_of(made, planted, "ov", "suppressing"):
        entries = w_e @ w_ov[at] @ w_u
        assert len(head["pairs"]["ov"]) == 12
        for attended, lowered, logit in head["pairs"]["ov"]:
            assert attended == lowered
            assert logit < 0
            np.testing.assert_allclose(logit, entries[NAMES.index(attended), NAMES.index(lowered)], rtol=1e-4)


@pytest.mark.parametrize("name", ["extracting", "inactive"])
def test_heads_that_change_no_token_have_no_pairs_of_rounding(made, planted, name):
    for _, head in heads_of(made, planted, "ov", name):
        assert head["pairs"]["ov"] == []


def test_the_positional_kernel_of_a_previous_token_head_peaks_one_back(made, planted):
    for at, head in heads_of(made, planted, "qk", "previous_token"):
        kernel = head["kernel"]
        assert kernel["offset"].tolist() == list(range(CONFIG.n_context // 2))
        uniform = [np.mean(1 / np.arange(k + 1, CONFIG.n_context + 1)) for k in range(CONFIG.n_context // 2)]
        np.testing.assert_allclose(kernel["chance"], uniform, rtol=1e-5)
        assert np.argmax(kernel["value"]) == 1
        assert kernel["value"][1] > 0.99
        overview = {one["name"]: one["values"] for one in made["states"][0]["maps"]}
        assert overview["previous position"][at] == kernel["value"][1]


def test_tied_directions_are_one_subspace(made, planted, circuits):
    _, _, w_qk, _ = circuits
    for at, head in heads_of(made, planted, "qk", "duplicate_token"):
        sigma = np.linalg.svd(w_qk[at], compute_uv=False)
        np.testing.assert_allclose(sigma[V - 1], sigma[0], rtol=1e-5)
        (one,) = head["directions"]
        np.testing.assert_allclose(one["sigma"], sigma[0], rtol=1e-4)
        assert one["size"] == V
        assert one["query"]["bottom"] == one["key"]["bottom"] == []
        assert len(one["query"]["top"]) == 8
        assert np.isnan(one["query"]["control"])  # larger than the controls


def test_directions_in_which_no_tokens_differ_name_none(made, planted):
    for _, head in heads_of(made, planted, "qk", "previous_token"):
        for direction in head["directions"]:
            assert direction["query"]["top"] == direction["key"]["top"] == []


def test_spectra_are_those_of_the_circuits(made, circuits):
    _, _, *both = circuits
    for at, head in zip(PLACES, made["states"][0]["heads"], strict=True):
        for side, matrices in zip(("qk", "ov"), both, strict=True):
            spectrum = head["spectra"][side]
            sigma = np.linalg.svd(matrices[at], compute_uv=False)[:K]
            np.testing.assert_allclose(spectrum["sigma"], sigma, rtol=1e-4, atol=1e-4 * max(1e-3, sigma[0]))
            assert (spectrum["low"] <= spectrum["high"]).all()
            size = np.linalg.norm(sigma)
            for name in ("low", "high"):  # a share of the energy each, whose whole is 1
                assert 0.9 < np.linalg.norm(spectrum[name]) / size < 1.1 if size else not spectrum[name].any()


def test_random_circuits_lie_within_the_band():
    """A model of random weights is its own null: about 95 % of its singular values are inside."""
    rng = np.random.default_rng(3)
    shapes = {"W_E": (V, D), "W_Q": (L, H, D, K), "W_K": (L, H, D, K), "W_V": (L, H, D, K), "W_O": (L, H, K, D),
              "W_U": (D, V), "W_P": (CONFIG.n_context, D)}  # fmt: skip
    weights = CircuitWeights(**{name: jnp.asarray(rng.normal(size=x), jnp.float32) for name, x in shapes.items()})
    _, params = params_from_weights(weights)
    random = StudiedModel("random", "arrays", CONFIG, [("", lambda: params)], bos=BOS)
    found = atlas(random, Material(NAMES), jax.random.key(1))
    heads = found["states"][0]["heads"]
    spectra = [head["spectra"][side] for head in heads for side in ("qk", "ov")]
    inside = [(one["low"] <= one["sigma"]) & (one["sigma"] <= one["high"]) for one in spectra]
    assert 0.9 < np.mean(inside) < 0.99
    z = [value for one in spectra for *_, value in one["summary"]]
    assert np.nanmedian(np.abs(z)) < 1.5  # the copying score has none
    assert max(map(len, (head["qk"] for head in heads))) <= 1
    assert all(len(head["probes"]) == 0 for head in heads)


def test_probes_say_what_a_head_makes_of_known_directions(made, planted, circuits):
    _, w_u, _, w_ov = circuits
    dictionary = np.asarray(planted["basic"].params["W_E"], np.float64)[[4, 7, 9]]
    for at, head in heads_of(made, planted, "ov", "copying"):
        for probe, token, row in zip(head["probes"], (4, 7, 9), dictionary, strict=True):
            written = row @ w_ov[at]
            usual = np.linalg.norm(w_ov[at]) / D**0.5
            np.testing.assert_allclose(probe["gain"], np.linalg.norm(written) / np.linalg.norm(row) / usual, rtol=1e-4)
            assert probe["name"] in ("four", "seven", "nine")
            assert probe["tokens"][0][0] == NAMES[token]
            np.testing.assert_allclose(probe["tokens"][0][1], (written @ w_u)[token], rtol=1e-4)
            cosine = written @ row / (np.linalg.norm(written) * np.linalg.norm(row))
            np.testing.assert_allclose(probe["own"], cosine, atol=1e-5)
            assert len(probe["nearest"]) == 3


# --- on text


def test_effects_and_patterns_are_those_of_the_library(made, planted, material):
    batch = Batch(jnp.asarray(material.tokens), jnp.asarray(material.predicted), {})
    for state in made["states"]:
        params = planted[state["name"]].params
        loss = ablate_heads(CONFIG, params, batch).loss
        patterns = np.asarray(forward(CONFIG, params, material.tokens)[1].patterns)
        for at, head in zip(PLACES, state["heads"], strict=True):
            (_, effect), *of_sequences = head["effects"]
            np.testing.assert_allclose(effect, loss[at], atol=1e-5)
            np.testing.assert_allclose(np.mean([value for _, value in of_sequences]), effect, atol=1e-6)
            assert len(of_sequences) == len(material.tokens)
            assert state["maps"][0]["values"][at] == effect
            np.testing.assert_allclose(head["patterns"] / 255, patterns[:, *at], atol=0.51 / 255)
    induction = planted["k_induction"].truth.qk[..., QK_TYPES.index("induction")]
    effects = made["states"][1]["maps"][0]["values"]
    assert effects[np.asarray(induction)].max() > 10 * np.abs(effects[0, ~np.asarray(induction)[0]]).max() / H


def test_contexts_name_positions_with_what_stands_before_them(made, material):
    sequences = [[NAMES[token] for token in tokens] for tokens in material.tokens]
    known = {
        ("".join(f"{name} " for name in sequence[max(0, place - 6) : place]), sequence[place])
        for sequence in sequences for place in range(len(sequence))
    }  # fmt: skip
    shown = {
        (before, token)
        for head in made["states"][0]["heads"] for direction in head["contexts"]
        for side in ("query", "key") for end in ("top", "bottom") for before, token, _ in direction[side][end]
    }  # fmt: skip
    assert shown
    assert shown <= known


# --- composition


def test_composition_shows_the_planted_edges_before_all_others(made, planted):
    basic, induction = made["states"]
    assert basic["edges"].pop("total") == 0  # nothing but rounding
    assert all(len(values) == 0 for values in basic["edges"].values())
    edges = induction["edges"]
    found = list(zip(edges["path"], *np.divmod(edges["sender"], H), *np.divmod(edges["receiver"], H), strict=True))
    wanted = {tuple(edge) for edge in np.argwhere(planted["k_induction"].truth.edges)}
    assert {tuple(map(int, edge)) for edge in found[: len(wanted)]} == wanted
    assert (np.diff(edges["z"]) <= 0).all()
    assert edges["z"][len(wanted) - 1] > 2 * edges["z"][len(wanted)]
    assert (edges["score"] > 1e-6).all()
    assert (edges["sender"] // H < edges["receiver"] // H).all()


def test_partners_of_a_head_are_its_strongest_edges(made):
    state = made["states"][1]
    edges = list(zip(*(state["edges"][name] for name in ("sender", "receiver", "path", "score", "z")), strict=True))
    for index, head in enumerate(state["heads"]):
        sends = [(b, "qkv"[path], score, z) for a, b, path, score, z in edges if a == index]
        receives = [(a, "qkv"[path], score, z) for a, b, path, score, z in edges if b == index]
        for way, wanted in (("sends", sends), ("receives", receives)):
            assert head["partners"][way] == sorted(wanted, key=lambda edge: -edge[-1])[:8]


# --- the whole


def test_every_state_is_there_and_every_part_is_told(made, parts):
    assert [state["name"] for state in made["states"]] == ["basic", "k_induction"]
    assert made["title"] == "Head atlas: planted"
    assert made["notes"] == ["by hand"]
    facts = dict(made["facts"])
    assert facts["layers × heads"] == "2 × 8"
    assert facts["sequences begin with"] == f"t{BOS}"
    assert facts["shown"] == "repeats"
    assert parts[0] == "basic: labels from weights and activations"
    assert parts[-1] == "k_induction: composition"
    assert len(set(parts)) == len(parts) == 16


def test_from_weights_alone_all_is_there_but_what_text_shows(from_weights, made):
    assert from_weights["samples"] == []
    assert dict(from_weights["facts"])["shown"] == "nothing: weights alone"
    assert from_weights["notes"][0].startswith("From weights alone: labels are structural")
    (state,) = from_weights["states"]
    assert [one["name"] for one in state["maps"]] == [one["name"] for one in made["states"][0]["maps"][1:]]
    for head, with_text in zip(state["heads"], made["states"][0]["heads"], strict=True):
        assert head["contexts"] == head["probes"] == head["effects"] == []
        assert head["patterns"].size == 0
        assert all(one["activations"] is None and one["own"] is None for one in head["evidence"])
        for part in ("pairs", "partners"):
            assert head[part] == with_text[part]
        np.testing.assert_array_equal(head["kernel"]["value"], with_text["kernel"]["value"])
        np.testing.assert_array_equal(head["spectra"]["ov"]["sigma"], with_text["spectra"]["ov"]["sigma"])


@pytest.mark.parametrize("kind", ["made", "from_weights"])
def test_page_and_json_take_it(request, kind):
    found = request.getfixturevalue(kind)
    page = atlas_page(found)
    assert found["title"] in page
    again = json.loads(atlas_json(found))
    assert len(again["states"]) == len(found["states"])
    head, shown = again["states"][0]["heads"][3], found["states"][0]["heads"][3]
    np.testing.assert_allclose(head["spectra"]["qk"]["sigma"], shown["spectra"]["qk"]["sigma"], rtol=1e-3)
    assert [label["name"] for label in head["qk"]] == [label["name"] for label in shown["qk"]]


# --- other families


@pytest.fixture(scope="module")
def encoder():
    tokens = np.random.default_rng(0).integers(48, size=(2, 12))
    model = open_model(str(FIXTURES / "bert"))
    return atlas(
        model, Material(list(map(str, range(48))), tokens, np.ones((2, 12), bool), "random"), jax.random.key(0)
    )


def test_an_encoder_of_post_norm_layers_has_neither_composition_nor_effects(encoder):
    said = " ".join(encoder["notes"])
    for note in (
        "No tokenizer in bert",
        "No causal effects: an encoder",
        "No composition: in a post-norm",
        "transform",
    ):
        assert note in said
    assert "Rotary" not in said
    (state,) = encoder["states"]
    assert state["edges"].pop("total") == 0
    assert all(len(values) == 0 for values in state["edges"].values())
    for head in state["heads"]:
        assert head["partners"] == {"sends": [], "receives": []}
        assert head["effects"] == []
        assert head["patterns"].shape == (2, 12, 12)
    later = np.triu(np.ones((12, 12), bool), 1)
    assert any(head["patterns"][:, later].any() for head in state["heads"])
    assert atlas_page(encoder)


def test_what_rotary_positions_and_qk_norm_leave_out_is_said():
    model = dataclasses.replace(open_model(str(FIXTURES / "qwen3")), states=())
    found = atlas(model, Material(list(map(str, range(48)))), jax.random.key(0))
    said = " ".join(found["notes"])
    for note in ("Queries and keys are divided by their size", "Rotary positions"):
        assert note in said
    assert dict(found["facts"])["layers × heads"] == "2 × 4, 2 key/value heads"


def test_parameters_are_let_go_before_what_needs_the_attention_weights_alone(planted):
    """Of a model that nobody else holds, the embedding would otherwise be in memory twice."""
    held = [jax.tree.map(jnp.array, planted["basic"].params)]
    alive = weakref.ref(held[0]["W_E"])
    seen = {}
    model = StudiedModel("planted", "arrays", CONFIG, [("", held.pop)], bos=BOS)
    atlas(model, Material(NAMES), jax.random.key(1), lambda part: seen.setdefault(part, alive() is not None))
    assert not any(seen.values())
