"""Structure of roles against D x D matrices in float64, against scores of the forward pass, and on planted heads."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax import CircuitWeights, TransformerConfig, forward, init_params
from circuits_jax.heads.role_rows import Asked, Pairs, Questions, read_rows
from circuits_jax.heads.role_structure import TOP, Changes, structure

L, H, D, K, V, T, B, P, C = 2, 4, 12, 6, 11, 8, 9, 20, 4

MODELS = {
    "learned": {"norm": "layer", "bias": True},
    "shortformer": {"norm": "rms", "positions": "shortformer", "bias": True, "n_kv_heads": 2},
    "rotary": {
        "norm": "layer", "positions": "rotary", "rotary_dim": 4, "rotary_pairs": "interleaved", "bias": True,
        "qk_norm": True, "n_kv_heads": 2,
    },
}  # fmt: skip


def config_of(name):
    return TransformerConfig(V, T, n_layers=L, n_heads=H, d_model=D, d_head=K, **MODELS[name])


def params_of(name):
    """Gains and biases are not those that they begin with."""
    leaves, tree = jax.tree.flatten(init_params(config_of(name), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return tree.unflatten([x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) for x in leaves])


@partial(jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
def structure_of(weights, n_draws, known, matched, moved, questions, key):
    return structure(weights, known, Changes(*matched), Changes(*moved), questions, n_draws, key)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def questions(matches=True, to_logits=True, sign=1, matching_sign=1):
    rng = np.random.default_rng(1)
    query = rng.integers(4, T, B)
    key = rng.integers(1, 4, B)
    over = np.where(np.arange(B) % 2, -1, query)
    asked = Asked(*(jnp.asarray(x) for x in (query, key, over, rng.integers(0, 3, B))))

    def pairs():
        was = rng.integers(0, C - 1, P)  # the last class never comes
        becomes = (was + rng.integers(1, C - 1, P)) % (C - 1)
        return Pairs(*(jnp.asarray(x) for x in (0, 0, was, becomes, 0, 0)))

    answers = np.array([[1, 4], [2, -1], [7, 5], [-1, -1]])
    return Questions(
        known=asked, judged=asked, matched=pairs(), moved=pairs(), changed=pairs(), matches=jnp.asarray(matches),
        to_logits=jnp.asarray(to_logits), sign=jnp.asarray(sign), matching_sign=jnp.asarray(matching_sign),
        answers=jnp.asarray(answers), judged_matched=jnp.zeros(B, int),
    )  # fmt: skip


def changes(seed):
    return tuple(normal([seed, i], L, P, D) for i in range(3))


@cache
def inputs(name, seed=2):
    """Weights, the rows of prompts [L,B,T,D], and what the forward pass saw."""
    tokens = np.random.default_rng(seed).integers(0, V, (B, T))
    with jax.default_matmul_precision("highest"):
        seen = forward(config_of(name), params_of(name), tokens)[1]
    weights = jax.jit(CircuitWeights.from_params, static_argnums=0)(config_of(name), params_of(name))
    return weights, read_rows(weights, seen.residual[:, :-1]), seen


def found(weights, known, asked):
    return structure_of(weights, 19, known, changes(3), changes(4), asked, jax.random.key(0))


# The oracle -------------------------------------------------------------------------------------------------------


def matrix(weights, name):
    x = np.asarray(getattr(weights, name), np.float64)
    return np.repeat(x, H // x.shape[1], 1)


def rotation(weights, offset):
    """R with q R k^T the score of a query that far behind its key."""
    out, rotary = np.eye(K), weights.rotary
    dim = (rotary.dim or K) if weights.positions == "rotary" else 0
    for i in range(dim // 2):
        angle = offset * rotary.base ** (-2 * i / dim)
        a, b = {"half": (i, i + dim // 2), "interleaved": (2 * i, 2 * i + 1)}[rotary.pairs]
        out[a, a] = out[b, b] = np.cos(angle)
        out[a, b], out[b, a] = np.sin(angle), -np.sin(angle)
    return out


def slow_effects(x, pairs):
    x, was, becomes = np.float64(x), np.asarray(pairs.was), np.asarray(pairs.becomes)
    out = np.zeros((C, D))
    for c in range(C - 1):
        towards = [(1 if becomes[b] == c else -1) * x[b] for b in range(P) if c in (was[b], becomes[b])]
        out[c] = np.mean(towards, 0) * (C - 2) / (C - 1)
    return out


def slow_answers(weights, answers):
    means = [np.mean([np.float64(weights.W_U[:, t]) for t in row if t >= 0], 0) for row in np.asarray(answers)[:-1]]
    return np.array([*(means - np.mean(means, 0)), np.zeros(D)])


def norm(x):
    return np.sqrt(np.sum(np.square(x)))


def slow_trace(x, w, y):
    return np.trace(x @ w @ y.T) * D**0.5 / norm(x) / norm(y) / norm(w)


def slow_gain(x, w):
    return D * norm(x @ w) ** 2 / norm(x) ** 2 / norm(w) ** 2


def held(asked, b):
    """What the key of a prompt is held against."""
    query, key, over = (int(x[b]) for x in (asked.query, asked.key, asked.over))
    return [over] if over >= 0 else [t for t in range(1, query + 1) if t != key]


def slow_contrasts(rows, asked):
    """Of one layer, [B,T,D] -> [B,D]: the mean over prompts of the frame."""
    frame = np.asarray(asked.frame)
    each = [rows[b, int(asked.key[b])] - rows[b, held(asked, b)].mean(0) for b in range(B)]
    return np.array([np.mean([each[c] for c in range(B) if frame[c] == frame[b]], 0) for b in range(B)])


@pytest.mark.parametrize("name", MODELS)
def test_structure_is_that_of_slow_matrices(name):
    weights, known, seen = inputs(name)
    asked = questions()
    got = found(weights, known, asked)
    query, key = np.asarray(asked.known.query), np.asarray(asked.known.key)
    offset = round(np.mean(query - key))
    for layer, h in np.ndindex(L, H):
        at = (layer, h)
        w_qk = matrix(weights, "W_Q")[at] @ rotation(weights, offset) @ matrix(weights, "W_K")[at].T
        w_ov = matrix(weights, "W_V")[at] @ matrix(weights, "W_O")[at]
        x, y, v = (
            slow_effects(c[layer], pairs)
            for c, pairs in (
                (changes(3)[0], asked.matched), (changes(4)[1], asked.moved), (changes(4)[2], asked.moved),
            )
        )  # fmt: skip
        np.testing.assert_allclose(got.matching.value[at], slow_trace(x, w_qk, y), rtol=2e-3, atol=2e-5)
        answers = slow_answers(weights, asked.answers)
        np.testing.assert_allclose(got.moves.value[at], slow_trace(v, w_ov, answers), rtol=2e-3, atol=2e-5)

        rows = np.float64(known.qk[layer])
        contrast = slow_contrasts(rows, asked.known)
        u, s, vh = np.linalg.svd(w_qk)
        np.testing.assert_allclose(got.gain[at], slow_gain(contrast, w_qk.T), rtol=1e-3)
        inside = norm(contrast @ vh[:TOP].T) ** 2 / norm(contrast) ** 2
        np.testing.assert_allclose(got.overlap[at], inside, rtol=2e-3)
        by_component = [
            np.mean([(rows[b, query[b]] @ u[:, r]) * s[r] * (vh[r] @ contrast[b]) for b in range(B)]) for r in range(K)
        ]
        np.testing.assert_allclose(
            got.top_share[at], np.sum(by_component[:TOP]) / np.sum(by_component), rtol=5e-3, atol=5e-3
        )

        scores = np.float64(seen.scores[:, layer, h])  # of the forward pass: norms, biases, rotary, groups and qk-norm
        preferred = [scores[b, query[b], key[b]] - scores[b, query[b], held(asked.known, b)].mean() for b in range(B)]
        np.testing.assert_allclose(got.preference.value[at], np.mean(preferred), rtol=1e-3, atol=2e-5)
    for part in (got.preference, got.matching, got.moves):
        falling = np.argsort(np.argsort(-np.asarray(part.value), 1), 1)
        np.testing.assert_array_equal(part.rank, falling)


def test_of_roles_that_ask_for_less_there_is_nothing_or_a_gain():
    weights, known, _ = inputs("learned")
    asked = questions(matches=False, to_logits=False, sign=-1)
    got = found(weights, known, asked)
    assert not np.any([got.matching.value, got.matching.z, got.matching.rank])
    np.testing.assert_array_equal([got.matching.covariance_p, got.matching.label_p], np.ones((2, L, H)))
    for at in np.ndindex(L, H):
        w_ov = matrix(weights, "W_V")[at] @ matrix(weights, "W_O")[at]
        wanted = slow_gain(slow_effects(changes(4)[2][at[0]], asked.moved), w_ov)
        np.testing.assert_allclose(got.moves.value[at], wanted, rtol=1e-3)
    np.testing.assert_array_equal(got.moves.rank, np.argsort(np.argsort(-np.asarray(got.moves.value), 1), 1))


def test_roles_in_turn_are_each_alone():
    weights, known, _ = inputs("learned")
    roles = [questions(), questions(matches=False, to_logits=False), questions(sign=-1, matching_sign=-1)]
    keys = jax.random.split(jax.random.key(0), len(roles))

    @jax.jit
    def in_turn(weights, known, roles):
        def one(role):
            return structure(weights, known, Changes(*changes(3)), Changes(*changes(4)), role[0], 19, role[1])

        return jax.lax.map(one, (roles, keys))

    together = in_turn(weights, known, jax.tree.map(lambda *x: jnp.stack(x), *roles))
    for r, role in enumerate(roles):
        alone = structure_of(weights, 19, known, changes(3), changes(4), role, keys[r])
        jax.tree.map(lambda a, b, r=r: np.testing.assert_allclose(a[r], b, rtol=1e-3, atol=1e-4), together, alone)


def invertible(seed, *shape):
    """Of condition 4."""
    u, v = (np.linalg.qr(normal([seed, i], *shape, K, K))[0] for i in range(2))
    return jnp.asarray((u * np.linspace(0.5, 2, K)) @ v, jnp.float32)


@pytest.mark.parametrize("n_groups", [H, 2])
def test_nothing_depends_on_the_gauge(n_groups):
    """W_Q G, W_K G^-T and W_V G, G^-1 W_O, biases with them, G one for each group: not even p values change."""
    weights, known, _ = inputs("learned")
    halves = ("W_K", "W_V", "b_K", "b_V")
    weights = dataclasses.replace(weights, **{name: getattr(weights, name)[:, :n_groups] for name in halves})
    g, f = invertible(5, L, n_groups), invertible(6, L, n_groups)
    inverse = lambda x: jnp.asarray(np.linalg.inv(x))  # noqa: E731
    each = lambda x: jnp.repeat(x, H // n_groups, 1)  # noqa: E731
    turned = lambda bias, x: jnp.einsum("lhk,lhkj->lhj", bias, x)  # noqa: E731
    other = dataclasses.replace(
        weights, W_Q=weights.W_Q @ each(g), b_Q=turned(weights.b_Q, each(g)), W_K=weights.W_K @ inverse(g).mT,
        b_K=turned(weights.b_K, inverse(g).mT), W_V=weights.W_V @ f, b_V=turned(weights.b_V, f),
        W_O=inverse(each(f)) @ weights.W_O,
    )  # fmt: skip
    asked = questions()
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4),
        found(weights, known, asked), found(other, known, asked),
    )  # fmt: skip


def test_with_qk_norm_the_size_of_keys_does_not_matter():
    """Not for values, and not for draws of the covariance, which have to be of their size."""
    weights, known, _ = inputs("rotary")
    asked = questions()
    one, other = (
        found(dataclasses.replace(weights, W_K=scale * weights.W_K, b_K=scale * weights.b_K), known, asked)
        for scale in (1.0, 30.0)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), one, other)


def test_zero_heads_have_p_of_one_and_no_nan():
    weights, known, _ = inputs("learned")
    weights = dataclasses.replace(
        weights, W_Q=weights.W_Q.at[0, 1].set(0), b_Q=weights.b_Q.at[0, 1].set(0), W_K=weights.W_K.at[1, 0].set(0),
        W_V=weights.W_V.at[0, 2].set(0), W_O=weights.W_O.at[1, 3].set(0),
    )  # fmt: skip
    for asked in (questions(), questions(to_logits=False), questions(sign=-1, matching_sign=-1)):
        got = found(weights, known, asked)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        silent = {(0, 1): (got.preference, got.matching), (1, 0): (got.preference, got.matching)}
        silent |= {(0, 2): (got.moves,), (1, 3): (got.moves,)}
        for at, parts in silent.items():
            for part in parts:
                assert part.value[at] == part.z[at] == 0
                assert part.label_p[at] == part.covariance_p[at] == 1
        for at in ((0, 1), (1, 0)):
            assert got.gain[at] == got.top_share[at] == 0
            assert 0 <= got.overlap[at] <= 1


# planted ----------------------------------------------------------------------------------------------------------

NAMES, ROOM = 6, 32


def name_movers():
    """One layer: a name mover, its negative, and two random heads, on rows that say "name" and which one.

    Prompts: a name at 1 ... 3, other words elsewhere, and a query at 5 that asks for names, or for the same name.
    """
    basis = jnp.linalg.qr(normal(7, ROOM, ROOM))[0]
    names, of_names, asks = basis[:NAMES], basis[NAMES], basis[NAMES + 1]
    W_U = normal(8, ROOM, NAMES)
    reads = jnp.concatenate([asks[:, None], names.T], 1)  # asks for names, and each name for itself
    finds = jnp.concatenate([of_names[:, None], names.T], 1)
    random = lambda seed, *shape: 0.3 * normal(seed, *shape)  # noqa: E731
    size = NAMES + 1
    w_v = jnp.pad(names.T, ((0, 0), (0, 1)))
    w_o = jnp.pad((W_U - W_U.mean(1, keepdims=True)).T, ((0, 1), (0, 0)))
    heads = lambda a, b, seed: jnp.stack([a, b, *random(seed, 2, *a.shape)])[None]  # noqa: E731
    weights = CircuitWeights(
        W_E=normal(9, NAMES, ROOM), W_U=W_U, W_Q=10 * heads(reads, -reads, 10), W_K=heads(finds, finds, 11),
        W_V=heads(w_v, w_v, 12), W_O=heads(w_o, -w_o, 13), positions="none", n_context=T,
    )  # fmt: skip
    assert weights.W_Q.shape == (1, H, ROOM, size)

    rng, n = np.random.default_rng(14), 40
    who, where = rng.integers(0, NAMES, n), rng.integers(1, 4, n)
    rows = (0.2 * normal(15, n, T, ROOM)).at[np.arange(n), where].add(of_names + names[who]).at[:, 5].add(asks)
    was = jnp.asarray(who)
    becomes = jnp.asarray((who + rng.integers(1, NAMES, n)) % NAMES)
    change = (names[becomes] - names[was] + 0.05 * normal(16, n, ROOM))[None]
    pairs = Pairs(0, 0, was, becomes, 0, 0)
    asked = Asked(jnp.full(n, 5), jnp.asarray(where), jnp.full(n, -1), jnp.zeros(n, int))
    role = Questions(
        known=asked, judged=asked, matched=pairs, moved=pairs, changed=pairs, matches=jnp.asarray(True),
        to_logits=jnp.asarray(True), sign=jnp.asarray(1), matching_sign=jnp.asarray(1),
        answers=jnp.arange(NAMES)[:, None], judged_matched=was,
    )  # fmt: skip
    return weights, read_rows(weights, rows[:, None]), (change,) * 3, role


def test_a_name_mover_and_its_negative_stand_out_each_on_its_side():
    weights, rows, change, role = name_movers()
    least = 1 / 200
    avoids = dataclasses.replace(role, sign=jnp.asarray(-1), matching_sign=jnp.asarray(-1))
    positive, negative = (
        structure_of(weights, 199, rows, change, change, x, jax.random.key(0)) for x in (role, avoids)
    )
    mover, opposite = (0, 0), (0, 1)
    for part, other in ((positive.moves, negative.moves), (positive.matching, negative.matching)):
        assert part.value[mover] > 1
        np.testing.assert_allclose(part.value[opposite], -part.value[mover], rtol=1e-4)
        for p, other_p in ((part.label_p, other.label_p), (part.covariance_p, other.covariance_p)):
            np.testing.assert_allclose([p[mover], other_p[opposite]], least, rtol=1e-4)
            np.testing.assert_allclose([p[opposite], other_p[mover]], 1, atol=0.01)
        assert part.rank[mover] == other.rank[opposite] == 0
        assert part.rank[opposite] == other.rank[mover] == H - 1
    preference = positive.preference
    assert preference.value[mover] > 1
    np.testing.assert_allclose(preference.label_p[mover], least, rtol=1e-4)
    np.testing.assert_allclose(preference.label_p[opposite], 1, atol=0.01)
    assert positive.gain[mover] > 2
    assert positive.overlap[mover] > 0.2
    assert np.abs(positive.matching.value[0, 2:]).max() < 0.7 * positive.matching.value[mover]


@pytest.mark.parametrize("name", ["learned", "rotary"])
def test_structure_lowers_for_every_platform(name):
    weights, known, _ = inputs(name)
    platforms = ("cpu", "cuda", "tpu")
    lowered = jax.export.export(
        jax.jit(lambda w, known, x, role, key: structure(w, known, Changes(*x), Changes(*x), role, 3, key)),
        platforms=platforms,
    )(weights, known, changes(3), questions(), jax.random.key(0))
    assert lowered.platforms == platforms
