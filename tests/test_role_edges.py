"""Edges between roles: planted senders that reach a receiver, decoys that do not, and values against dense float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted_claims import norm_of, numpy_forward, turned, unit_rows

from circuits_jax import CircuitWeights, TransformerConfig, init_params, params_from_weights
from circuits_jax.heads import role_edges
from circuits_jax.heads.claims import Claim, Edge, Role, Variable
from circuits_jax.heads.role_rows import Asked, Pairs, Prompts, Questions, class_effects
from circuits_jax.tasks.batch import Batch

C, T, B, N_DRAWS = 6, 5, 36, 199
BOS, FILLER, V = C, C + 1, C + 2

# Sentences <bos> name name filler name. Senders move the name at 1 to 3; the q-reader looks from there to the name at
# 2, the k-reader from the name at 4 to 3, and values are read at 3.
PLACES = {"sender": (3, 1), "q": (3, 2), "k": (4, 3), "v": (4, 3), "relay": (4, 3)}
CHANGED = {"sender": (1, 1), "q": (2, 1), "k": (1, 4), "v": (1, 1), "relay": (1, 1)}  # by moved, by matched
VARIABLES = {"X": Variable("x", ("x",))}


def role(looks="preference", to="logits"):
    return Role("a", "b", "X", looks=looks, matches="X" if looks == "matching" else "", to=to)


ROLES = {
    "sender": role(to="heads"), "q": role("matching"), "k": role("matching"), "v": role(), "relay": role(to="stream"),
}  # fmt: skip


def claim_of(heads, *edges):
    return Claim("c", "ioi", "m", "s", VARIABLES, {name: ROLES[name] for name in PLACES}, heads, tuple(edges))


def prompts_of(seed=0, places=PLACES, n=B):
    """Known and judged sentences, and pairs that differ in the name at one place."""
    rng = np.random.default_rng(seed)

    def sentences():
        names = rng.integers(0, C, (n, 3)).T
        return np.stack([np.full(n, BOS), names[0], names[1], np.full(n, FILLER), names[2]], 1)

    def pairs(place, query, key):
        before, was = sentences(), np.arange(n) % C
        becomes = (was + 1 + rng.integers(0, C - 1, n)) % C
        after = before.copy()
        before[:, place], after[:, place] = was, becomes
        return Pairs(*(jnp.asarray(x) for x in (before, after, was, becomes, np.full(n, query), np.full(n, key))))

    def stacked(parts):
        return jax.tree.map(lambda *x: jnp.stack(x), *parts)

    asked = [Asked(*(jnp.full(n, x) for x in (query, key, -1, 0))) for query, key in (places[name] for name in PLACES)]
    moved, matched = (
        stacked([pairs(CHANGED[name][i], *places[name]) for name in PLACES]) for i in range(2)
    )  # fmt: skip
    r, ones = len(PLACES), jnp.ones(len(PLACES), int)
    questions = Questions(
        known=stacked(asked), judged=stacked(asked), matched=matched, moved=moved, changed=moved,
        matches=jnp.array([ROLES[name].looks == "matching" for name in PLACES]),
        to_logits=jnp.array([ROLES[name].to == "logits" for name in PLACES]),
        sign=ones, matching_sign=ones, answers=jnp.broadcast_to(jnp.arange(C)[:, None], (r, C, 1)),
        judged_matched=jnp.zeros((r, n), int),
    )  # fmt: skip
    known, judged = (Batch(jnp.asarray(x), jnp.asarray(x >= 0), {}) for x in (sentences(), sentences()))
    return Prompts(known, judged, questions)


# planted ----------------------------------------------------------------------------------------------------------

PARTS = ("name", "moved", "unread", "out")
D, K = len(PARTS) * C + T, C
SAME = np.eye(C)
# All classes but one are taken for another: of no sign, as each class's own less the mean of all adds up to zero.
SHUFFLED = SAME[[0, *np.roll(np.arange(1, C), 1)]]


def block(part):
    """[D,K] that reads a part of the stream."""
    out = np.zeros((D, K))
    start = PARTS.index(part) * C
    out[start : start + C] = SAME
    return out


def planted():
    """Senders 0.0 real, 0.1 shuffles classes, 0.2 turns the sign, 0.3 writes where no one reads, 0.4 reads no names.

    Receivers 1.0, 1.1, 1.2 read what is moved through q, k and v, the others nothing.
    """
    w_q, w_k, w_v, w_o = (np.zeros((2, 5, D, K)) for _ in range(4))
    places = np.zeros((D, K))
    places[-T:, :T] = np.eye(T)
    for head, (reads, to, matrix) in enumerate([
        (block("name"), "moved", SAME), (block("name"), "moved", SHUFFLED), (block("name"), "moved", -SAME),
        (block("name"), "unread", SAME), (places, "moved", SAME),
    ]):  # fmt: skip
        w_v[0, head], w_o[0, head] = reads, block(to) @ matrix
    w_q[1, 0], w_k[1, 0] = block("moved"), block("name")
    w_q[1, 1], w_k[1, 1] = block("name"), block("moved")
    w_v[1, 2], w_o[1, 2] = block("moved"), block("out")
    w_e, w_p, w_u = np.zeros((V, D)), np.zeros((T, D)), np.zeros((D, V))
    w_e[:C] = block("name").T
    w_p[:, -T:] = np.eye(T)
    w_u[:, :C] = block("out")
    arrays = {"W_E": w_e, "W_Q": w_q, "W_K": w_k, "W_V": w_v, "W_O": np.swapaxes(w_o, -1, -2), "W_U": w_u, "W_P": w_p}
    return params_from_weights(CircuitWeights(**{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}))


HEADS = {
    "sender": tuple((0, h) for h in range(5)), "q": ((1, 0), (1, 3)), "k": ((1, 1), (0, 1)), "v": ((1, 2),),
    "relay": ((1, 2),),
}  # fmt: skip
EDGES = (
    Edge("sender", "q", "q"), Edge("sender", "q", "q", -1), Edge("sender", "k", "k"), Edge("sender", "v", "v"),
    Edge("sender", "v", "v", -1), Edge("sender", "relay", "v", -1),
)  # fmt: skip
REAL = {
    ("0.0", "1.0", "q", "q", 1), ("0.2", "1.0", "q", "q", -1), ("0.0", "1.1", "k", "k", 1),
    ("0.0", "1.2", "v", "v", 1), ("0.2", "1.2", "v", "v", -1),
    # Whoever passes names on, in whatever order and with whatever sign: a gain has none.
    *((sender, "1.2", "relay", "v", -1) for sender in ("0.0", "0.1", "0.2")),
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return role_edges.edge_evidence(
        *planted(), claim_of(HEADS, *EDGES), prompts_of(), jax.random.key(0), n_draws=N_DRAWS
    )


def test_real_edges_are_found_and_decoys_are_not(found):
    supported = {
        (row["sender"], row["receiver"], row["receiver_role"], row["input"], row["sign"])
        for row in found
        if row["supported"]
    }
    assert supported == REAL


def test_rows_are_all_pairs_with_the_receiver_in_a_later_layer(found):
    assert len(found) == 5 * (2 + 2 + 1 + 1 + 1 + 1)  # and none into 0.1
    assert all(row["sender_role"] == "sender" for row in found)
    for row in found:
        assert set(row) == {
            "sender", "sender_role", "receiver", "receiver_role", "input", "sign", "value", "covariance_p", "label_p",
            "rotation_p", "z", "supported",
        }  # fmt: skip
        assert type(row["value"]) is float
        assert type(row["supported"]) is bool
        assert 0.99 / (1 + N_DRAWS) <= row["label_p"] <= 1


def test_the_sign_is_a_side_of_the_same_value(found):
    (plus, minus), (reversed_plus, reversed_minus) = (
        [row for row in found if row["sender"] == sender and row["receiver"] == "1.0"] for sender in ("0.0", "0.2")
    )
    assert plus["value"] == pytest.approx(minus["value"], rel=1e-5)
    assert plus["value"] == pytest.approx(-reversed_minus["value"], rel=1e-5)
    assert plus["label_p"] == pytest.approx(1 / (1 + N_DRAWS))
    assert minus["label_p"] > 0.9
    assert reversed_plus["label_p"] > 0.9
    assert plus["z"] > 3


def test_what_does_not_get_through_is_nothing(found):
    for row in found:
        if row["sender"] in ("0.3", "0.4") or row["receiver"] == "1.3":
            assert (row["value"], row["label_p"], row["z"]) == (0, 1, 0)


# values -----------------------------------------------------------------------------------------------------------

SPREAD = {"sender": (3, 1), "q": (4, 2), "k": (4, 1), "v": (4, 3), "relay": (4, 3)}  # offsets of 2 and 3


def dense_value(config, params, prompts, edge, sender, receiver):
    """The statistic with D x D matrices, from the parameters as they are."""
    names = tuple(PLACES)
    s, r = names.index(edge.sender), names.index(edge.receiver)
    questions = jax.tree.map(np.asarray, prompts.questions)
    centre = np.eye(config.d_model) - (1 / config.d_model if config.norm == "layer" else 0)

    def effects(pairs, role, layer, position):
        pairs = jax.tree.map(lambda x: x[role], pairs)

        def rows(tokens):
            return np.stack([
                unit_rows(config, numpy_forward(config, params, one)[0][layer])[place]
                for one, place in zip(tokens, getattr(pairs, position), strict=True)
            ])  # fmt: skip

        changes = rows(pairs.after) - rows(pairs.before)
        # test_role_rows has the loop of which this is the algebra.
        return np.float64(class_effects(jnp.asarray(changes, jnp.float32), pairs.was, pairs.becomes, C))

    def reads(layer, head, kind):
        gain = norm_of(config, params, (f"layer_{layer}", "attention_norm"))[0] * np.ones(config.d_model)
        of = head if kind == "Q" else head // (config.n_heads // config.n_groups)
        w = np.float64(params[f"layer_{layer}"]["attention"][f"W_{kind}"][of])
        return centre @ (gain[:, None] * w)

    def moves(layer, head):
        return reads(layer, head, "V") @ np.float64(params[f"layer_{layer}"]["attention"]["W_O"][head]) @ centre

    x = effects(questions.moved, s, sender[0], "key")
    offset = int((questions.known.query[r] - questions.known.key[r]).mean())
    w_q = np.stack([turned(config, row, offset) for row in reads(*receiver, "Q")])
    scores = w_q @ reads(*receiver, "K").T
    if edge.input == "v":
        w, y = moves(*sender) @ moves(*receiver), None
        if ROLES[edge.receiver].to == "logits":
            w_u = centre @ (norm_of(config, params, ("final_norm",))[0][:, None] * np.float64(params["W_U"]))
            y = w_u.T[:C] - w_u.T[:C].mean(0)
    else:
        w = moves(*sender) @ (scores if edge.input == "q" else scores.T)
        pairs, position = (questions.moved, "key") if edge.input == "q" else (questions.matched, "query")
        y = effects(pairs, r, receiver[0], position)
    size, norm = config.d_model, np.linalg.norm
    if y is None:
        return size * norm(x @ w) ** 2 / norm(x) ** 2 / norm(w) ** 2
    return np.trace(x @ w @ y.T) * size**0.5 / norm(x) / norm(y) / norm(w)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_values_are_those_of_dense_matrices(norm):
    config = TransformerConfig(
        V, T, n_layers=3, n_heads=2, d_model=8, d_head=4, n_kv_heads=1, norm=norm, positions="rotary", bias=False
    )
    params = init_params(config, jax.random.key(1))
    rng = np.random.default_rng(1)
    for name in ("layer_0", "layer_1", "layer_2"):
        params[name]["attention_norm"]["scale"] = jnp.asarray(1 + 0.3 * rng.normal(size=8), jnp.float32)
    params["final_norm"]["scale"] = jnp.asarray(1 + 0.3 * rng.normal(size=8), jnp.float32)
    prompts = prompts_of(2, SPREAD, 7)
    heads = {"sender": ((0, 1), (1, 0)), "q": ((2, 1),), "k": ((1, 1), (2, 0)), "v": ((2, 0),), "relay": ((2, 1),)}
    edges = [Edge("sender", name, name[0].replace("r", "v")) for name in ("q", "k", "v", "relay")]
    before = role_edges._aligned._cache_size()
    got = role_edges.edge_evidence(config, params, claim_of(heads, *edges), prompts, jax.random.key(0), n_draws=3)
    assert len(got) == 9
    assert role_edges._aligned._cache_size() == before + 3  # one program per input serves all pairs
    for row in got:
        edge = next(edge for edge in edges if edge.receiver == row["receiver_role"])
        sender, receiver = (tuple(map(int, row[name].split("."))) for name in ("sender", "receiver"))
        wanted = dense_value(config, params, prompts, edge, sender, receiver)
        assert row["value"] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        assert abs(wanted) > 1e-3


# what is asked for ------------------------------------------------------------------------------------------------


def test_a_claim_without_edges_has_none():
    assert role_edges.edge_evidence(*planted(), claim_of(HEADS), prompts_of(), jax.random.key(0), n_draws=3) == []


def test_the_same_key_gives_the_same():
    claim = claim_of({**HEADS, "sender": ((0, 0),)}, EDGES[0])
    first, again = (
        role_edges.edge_evidence(*planted(), claim, prompts_of(), jax.random.key(3), n_draws=9) for _ in range(2)
    )
    assert first == again


def test_post_norm_and_heads_that_are_not_there_are_refused():
    config, params = planted()
    post = dataclasses.replace(config, norm="layer", norm_position="post")
    claim = claim_of(HEADS, *EDGES)
    with pytest.raises(ValueError, match="post-norm"):
        role_edges.edge_evidence(post, params, claim, prompts_of(), jax.random.key(0), n_draws=3)
    claim = claim_of({**HEADS, "q": ((7, 0),)}, *EDGES)
    with pytest.raises(ValueError, match=r"head 7\.0, but the model has 2 layers"):
        role_edges.edge_evidence(config, params, claim, prompts_of(), jax.random.key(0), n_draws=3)
