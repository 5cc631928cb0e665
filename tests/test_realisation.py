"""What heads do on designed inputs: brute-force permutations, loops in float64, and patterns made by hand."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.heads import patterns, realisation
from circuits_jax.tasks.designed import designed_inputs

T, N_IDS, BOS = 24, 30, 30


def random_patterns(seed, *shape, sharpness=2.0):
    """Causal attention [...,T,T]."""
    scores = sharpness * np.random.default_rng(seed).normal(size=shape)
    visible = np.tril(np.ones(shape[-2:], bool))
    weights = np.where(visible, np.exp(scores), 0.0)
    return np.float32(weights / weights.sum(-1, keepdims=True))


token_score = jax.jit(realisation._token_score, static_argnums=0)
shuffled_z = jax.jit(realisation._shuffled_z, static_argnums=0)
on_targets = jax.jit(realisation._on_targets, static_argnums=0)
mean_values = jax.jit(realisation.mean_values)
agreement = jax.jit(realisation.agreement)
positional_z = jax.jit(realisation.positional_z)


def even_where(allowed):
    """Attention to all allowed keys alike; to all visible ones where none is allowed."""
    length = allowed.shape[-1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    allowed = allowed & visible
    allowed = jnp.where(allowed.any(-1, keepdims=True), allowed, visible)
    return allowed / allowed.sum(-1, keepdims=True)


def looks_back(offset, length=T):
    place = jnp.arange(length)
    return even_where(place[:, None] - place == offset)


@pytest.fixture(scope="module")
def inputs():
    return jax.jit(lambda key: designed_inputs(key, jnp.arange(N_IDS), T, 32, BOS))(jax.random.key(7))


def of_batch(one, tokens):
    """Patterns [B,1,1,T,T] of a head that depends on tokens."""
    return jax.vmap(one)(tokens)[:, None, None]


def perfect(name):
    return lambda tokens: even_where(realisation.TARGETS[name](tokens))


# positional_z -----------------------------------------------------------------------------------------------------


def oracle_positional_z(pattern, queries, target_of):
    """The keys of each row dealt out in every order: mean and variance of what the target gets, rows independent."""
    excess, variance = 0.0, 0.0
    for t in range(1, len(pattern)):
        target = target_of(t)
        if not queries[t] or target < 0:
            continue
        dealt = [order[target] for order in itertools.permutations(np.float64(pattern[t, : t + 1]))]
        excess += pattern[t, target] - np.mean(dealt)
        variance += np.var(dealt)
    return excess / np.sqrt(variance)


@pytest.mark.parametrize("queries", [[1] * 7, [0, 1, 0, 1, 1, 1, 0]])
def test_positional_z_is_that_of_all_permutations_of_the_keys(queries):
    queries, pattern = np.asarray(queries, bool), random_patterns(0, 2, 3, 7, 7)
    offset = np.asarray([[2, 3, 2], [4, 2, 3]])
    z = positional_z(jnp.asarray(pattern), jnp.asarray(queries), jnp.asarray(offset))
    assert set(z) == {"previous_token", "fixed_offset", "first_token", "same_position"}
    for at in np.ndindex(2, 3):
        targets = {
            "previous_token": lambda t: t - 1,
            "fixed_offset": lambda t, k=offset[at]: t - k,
            "first_token": lambda t: 0,
            "same_position": lambda t: t,
        }
        for name, target_of in targets.items():
            wanted = oracle_positional_z(pattern[at], queries, target_of)
            np.testing.assert_allclose(z[name][at], wanted, rtol=2e-4, atol=2e-4, err_msg=name)


def test_positional_z_of_uniform_attention_is_zero():
    z = positional_z(patterns.uniform(T), jnp.ones(T, bool), jnp.asarray(3))
    assert all(float(x) == 0 for x in z.values())


def test_positional_z_of_a_perfect_head_is_large_for_its_own_type_alone():
    z = positional_z(looks_back(1), jnp.ones(T, bool), jnp.asarray(3))
    assert z["previous_token"] > 10
    assert max(float(z[name]) for name in ("fixed_offset", "same_position", "first_token")) < 2


# content_share ----------------------------------------------------------------------------------------------------


def oracle_share(scores, tokens, first):
    """One head: scores [2,B,T,T], tokens [2,B,T], distinct ones. Least squares of what rows and columns give alone."""
    n_tokens = tokens.shape[-1] - first
    pairs = [(u, w) for u in range(n_tokens) for w in range(n_tokens) if u != w]
    design = np.zeros((len(pairs), 2 * n_tokens))
    for i, (u, w) in enumerate(pairs):
        design[i, u] = design[i, n_tokens + w] = 1.0
    residuals = np.zeros((*tokens.shape[:2], len(pairs)))
    for at in np.ndindex(*tokens.shape[:2]):
        place = first + np.argsort(tokens[at][first:])  # by token, not by position
        given = np.asarray([scores[at][place[u], place[w]] for u, w in pairs], np.float64)
        residuals[at] = given - design @ np.linalg.lstsq(design, given)[0]
    return max(np.mean(residuals[0] * residuals[1]), 0.0) / (np.mean(residuals**2) + 1.0)


def placed_scores(seed, of_token, of_place, cross, noise, n_sequences=48, n_ids=12, length=12):
    """Scores [2,B,1,1,T,T] with a part for each pair of tokens, of places, of (token, place), and of nothing."""
    rng = np.random.default_rng(seed)
    centred = lambda x: x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()  # noqa: E731
    unit = lambda x: x / np.sqrt(np.mean(np.square(x)))  # noqa: E731
    tables = {
        "token": of_token * unit(centred(rng.normal(size=(n_ids, n_ids)))),
        "place": of_place * unit(centred(rng.normal(size=(length, length)))),
        "cross": cross * unit(centred(rng.normal(size=(n_ids, length)))),
    }
    tokens = np.stack([[rng.permutation(n_ids)[:length] for _ in range(n_sequences)] for _ in range(2)])
    place = np.arange(length)
    scores = (
        tables["token"][tokens[..., :, None], tokens[..., None, :]]
        + tables["place"][place[:, None], place]
        + tables["cross"][tokens[..., :, None], place]
        + noise * rng.normal(size=(2, n_sequences, length, length))
    )
    return np.float32(scores)[:, :, None, None], tokens


def share(scores, tokens, first):
    ids = np.unique(tokens[..., first:])
    return jax.jit(realisation.content_share, static_argnums=3)(scores, tokens, ids, first)


@pytest.mark.parametrize(("of_token", "of_place", "cross", "noise"), [(2, 1, 0.5, 0.5), (1, 2, 0, 1), (0.3, 0, 0, 0)])
@pytest.mark.parametrize("first", [0, 1])
def test_content_share_is_that_of_a_loop(of_token, of_place, cross, noise, first):
    scores, tokens = placed_scores(1, of_token, of_place, cross, noise, n_sequences=6)
    # In front of everything a start token, that would drown the rest.
    tokens = np.pad(tokens, ((0, 0), (0, 0), (first, 0)), constant_values=99)
    scores = np.pad(scores, [(0, 0)] * 4 + [(first, 0)] * 2, constant_values=50.0)
    wanted = oracle_share(scores[:, :, 0, 0], tokens, first)
    np.testing.assert_allclose(share(scores, tokens, first)[0, 0], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("of_token", "of_place", "cross", "noise"), [(4, 0, 0, 0), (3, 3, 0, 0), (2, 1, 2, 1)])
def test_content_share_finds_the_share_that_tokens_were_given(of_token, of_place, cross, noise):
    wanted = of_token**2 / (of_token**2 + of_place**2 + cross**2 + noise**2 + 1)
    got = share(*placed_scores(2, of_token, of_place, cross, noise), 0)[0, 0]
    # Off the diagonal only, so that a table of unit energy is not one of exactly 1 there.
    assert got == pytest.approx(wanted, abs=0.06)


@pytest.mark.parametrize(("of_place", "cross", "noise"), [(4, 0, 0), (0, 0, 4), (4, 3, 1)])
def test_content_share_of_what_tokens_do_not_decide_is_about_zero(of_place, cross, noise):
    assert share(*placed_scores(3, 0, of_place, cross, noise), 0)[0, 0] < 0.03


def test_content_share_does_not_care_which_order_comes_first():
    scores, tokens = placed_scores(4, 2, 1, 1, 1)
    np.testing.assert_allclose(share(scores, tokens, 0), share(scores[::-1], tokens[::-1], 0), rtol=1e-5)


@pytest.mark.parametrize("n_copies", [1, 2])
def test_content_share_leaves_copies_out(n_copies):
    """A head that matches a token with itself, on sequences that hold every token so often (few ids: see placed)."""
    rng = np.random.default_rng(5)
    tokens = np.stack([[rng.permutation(np.arange(12) // n_copies) for _ in range(8)] for _ in range(2)])
    scores = np.float32(14.0 * (tokens[..., :, None] == tokens[..., None, :]))[:, :, None, None]
    assert share(scores, tokens, 0)[0, 0] < 1e-6


# values -----------------------------------------------------------------------------------------------------------


def test_mean_values_are_those_of_a_loop_and_the_overall_mean_for_tokens_that_never_came():
    rng = np.random.default_rng(6)
    n_sequences, n_layers, n_heads, length, n_tokens, k = 3, 2, 2, 5, 4, 3
    values = rng.normal(size=(n_sequences, n_layers, n_heads, length, k))
    attended = rng.random((n_sequences, n_layers, n_heads, length)) + 0.1
    content = rng.random((n_sequences, n_layers, n_heads, length, n_tokens))
    content[..., -1] = 0.0
    got = mean_values(*(jnp.asarray(x, jnp.float32) for x in (values, attended, content)))
    for layer, head, token in np.ndindex(n_layers, n_heads, n_tokens):
        total, weight = np.zeros(k), 0.0
        for b, t in np.ndindex(n_sequences, length):
            share_of = attended[b, layer, head, t] * (
                1.0 if token == n_tokens - 1 else content[b, layer, head, t, token]
            )
            total, weight = total + share_of * values[b, layer, head, t], weight + share_of
        np.testing.assert_allclose(got[layer, head, token], total / weight, rtol=1e-4, atol=1e-5)


def test_agreement_is_the_cosine_of_what_is_written():
    rng = np.random.default_rng(7)
    one, two, w_o = rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 4, 8))
    two = two + one
    for head in range(2):
        x, y = ((v[head] - v[head].mean(0)) @ w_o[head] for v in (one, two))
        wanted = np.sum(x * y) / (np.linalg.norm(x) * np.linalg.norm(y))
        got = agreement(*(jnp.asarray(v, jnp.float32) for v in (one, two, w_o)))[head]
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert agreement(jnp.asarray(one), -jnp.asarray(one), jnp.asarray(w_o)).max() == 0
    assert agreement(jnp.zeros((9, 4)), jnp.zeros((9, 4)), jnp.asarray(w_o[0])) == 0


@pytest.mark.parametrize("by_token", [True, False])
def test_agreement_of_two_halves_tells_tokens_from_chance(by_token):
    rng = np.random.default_rng(8)
    n_sequences, n_tokens, k = 32, 12, 6
    tokens = rng.integers(0, n_tokens, (n_sequences, T))
    values = rng.normal(size=(n_tokens, k))[tokens] if by_token else rng.normal(size=(n_sequences, T, k))
    values, holds = (
        jnp.asarray(x, jnp.float32) for x in (values[:, None, None], np.eye(n_tokens)[tokens][:, None, None])
    )
    attended = jnp.ones((n_sequences, 1, 1, T))
    halves = [mean_values(values[i::2], attended[i::2], holds[i::2]) for i in (0, 1)]
    got = float(agreement(*halves, jnp.asarray(rng.normal(size=(1, 1, k, 16)), jnp.float32))[0, 0])
    assert got > 0.9999 if by_token else got < 0.35


def test_content_is_of_the_own_token_or_of_what_the_source_attends_to():
    rng = np.random.default_rng(9)
    tokens, pattern = rng.integers(0, 5, (2, 6)), random_patterns(9, 2, 2, 2, 6, 6)
    holds = np.float32(np.eye(5)[tokens])
    source = np.asarray([[-1, -1], [1, -1]])  # head 1.0 moves what 0.1 brings
    got = realisation._content(jnp.asarray(holds), jnp.asarray(pattern), jnp.asarray(source))
    for layer, head in np.ndindex(2, 2):
        wanted = holds if source[layer, head] < 0 else np.stack([pattern[b, 0, 1] @ holds[b] for b in range(2)])
        np.testing.assert_allclose(got[:, layer, head], wanted, rtol=1e-5, atol=1e-6)


# token types ------------------------------------------------------------------------------------------------------


def test_on_targets_is_the_mean_over_queries_that_have_any(inputs):
    tokens = np.asarray(inputs.repeats)[:4]
    pattern = random_patterns(10, 4, 1, 2, T, T)
    for name, got_there in (("duplicate_token", 0), ("induction", 1)):
        got = on_targets(name, jnp.asarray(pattern), jnp.asarray(tokens))
        for b, head in np.ndindex(4, 2):
            hits = []
            for t in range(T):
                targets = [j + got_there for j in range(t) if tokens[b, j] == tokens[b, t] and j + got_there < t]
                if targets:
                    hits.append(sum(pattern[b, 0, head, t, j] for j in targets))
            np.testing.assert_allclose(got[b, 0, head], np.mean(hits), rtol=1e-5)
    assert on_targets("induction", jnp.asarray(pattern), jnp.tile(jnp.arange(T), (4, 1))).max() == 0


@pytest.mark.parametrize("name", ["duplicate_token", "induction"])
def test_a_perfect_head_scores_one_and_the_other_kind_nothing(inputs, name):
    other = {"duplicate_token": "induction", "induction": "duplicate_token"}[name]
    pattern = of_batch(perfect(name), inputs.repeats)
    assert token_score(name, pattern, inputs.repeats)[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert token_score(other, pattern, inputs.repeats)[0, 0] < 0.05
    assert shuffled_z(name, pattern, inputs.repeats)[0, 0] > 6


@pytest.mark.parametrize("name", ["duplicate_token", "induction"])
def test_positional_heads_hit_targets_only_by_accident(inputs, name):
    tokens = inputs.repeats
    back_by = jnp.stack([looks_back(k) for k in range(T)])
    pattern = jnp.broadcast_to(back_by, (len(tokens), 1, *back_by.shape))
    scores, z = (f(name, pattern, tokens)[0] for f in (token_score, shuffled_z))
    assert scores[1] < 0.01  # of a previous-token head: below what even attention hits
    assert scores.max() < 0.5  # periods differ between sequences, so that no offset serves all of them
    assert jnp.abs(z).max() < 1e-3  # the same attention on every sequence cannot know its targets
    even = jnp.broadcast_to(patterns.uniform(T), (len(tokens), 1, 1, T, T))
    np.testing.assert_allclose(token_score(name, even, tokens), 0.0, atol=1e-6)


# on_own_batch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_scores(monkeypatch):
    """on_own_batch of one layer of heads that are functions tokens -> pattern."""

    def of(heads, tokens):
        def apply(config, params, sequence):
            return None, SimpleNamespace(patterns=jnp.stack([head(sequence) for head in heads])[None])

        monkeypatch.setattr(realisation, "apply", apply)
        config = SimpleNamespace(causal=True)
        return jax.jit(lambda tokens: realisation.on_own_batch(config, {}, tokens))(jnp.asarray(tokens))

    return of


def test_own_batch_counts_no_query_that_a_simpler_head_would_serve(own_scores):
    rng = np.random.default_rng(11)
    tokens, fixed = rng.integers(0, 4, (8, 16)), random_patterns(11, 16, 16)
    got = own_scores([lambda sequence: jnp.asarray(fixed)], tokens)
    for name, shift in (("duplicate_token", 0), ("induction", 1)):
        hits, chances = [], []
        for sequence in tokens:
            for t in range(16):
                targets = [j + shift for j in range(t) if sequence[j] == sequence[t] and j + shift < t]
                if targets and t - 1 not in targets and 0 not in targets:
                    hits.append(sum(fixed[t, j] for j in targets))
                    chances.append(len(targets) / (t + 1))
        chance = np.mean(chances)
        np.testing.assert_allclose(got[name][0, 0], (np.mean(hits) - chance) / (1 - chance), rtol=1e-4, atol=1e-6)
    everywhere = jnp.ones(16, bool)
    np.testing.assert_allclose(got["diffuse"][0, 0], patterns.entropy(jnp.asarray(fixed), everywhere), rtol=1e-5)
    chance = np.mean([1 / (t + 1) for t in range(1, 16)])
    wanted = (np.mean([fixed[t, t - 1] for t in range(1, 16)]) - chance) / (1 - chance)
    np.testing.assert_allclose(got["previous_token"][0, 0], wanted, rtol=1e-4)


def test_own_batch_of_few_letters_does_not_make_a_previous_token_head_one_of_induction(own_scores):
    tokens = np.random.default_rng(12).integers(0, 4, (16, T))
    got = own_scores([lambda sequence: looks_back(1)], tokens)
    naive = np.mean([patterns.induction(looks_back(1), jnp.asarray(s), jnp.ones(T, bool)) for s in tokens])
    assert naive > 0.2
    assert got["previous_token"][0, 0] == pytest.approx(1.0, abs=1e-6)
    for name in ("induction", "duplicate_token"):
        assert np.isnan(got[name][0, 0]) or got[name][0, 0] < 0.01


def test_own_batch_gives_a_perfect_head_one(own_scores):
    half = np.stack([np.random.default_rng(i).permutation(N_IDS)[:11] for i in range(4)])
    tokens = np.concatenate([np.full((4, 1), BOS), half, half], 1)
    got = own_scores([perfect("induction"), perfect("duplicate_token")], tokens)
    assert got["induction"][0, 0] == pytest.approx(1.0, abs=1e-6)
    assert got["duplicate_token"][0, 1] == pytest.approx(1.0, abs=1e-6)
    assert max(got["induction"][0, 1], got["duplicate_token"][0, 0]) < 0.05


def test_own_batch_without_a_single_copy_says_nothing_of_copies(own_scores):
    got = own_scores([lambda sequence: looks_back(1, 12)], np.arange(12)[None])
    assert np.isnan(got["induction"]).all()
    assert np.isnan(got["duplicate_token"]).all()
    assert np.isfinite(got["previous_token"]).all()
