"""Pattern scores on hand-built patterns, against slow loops, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.heads import patterns

T = 9
SCORES = {
    "previous_token": lambda pattern, tokens, queries: patterns.previous_token(pattern, queries),
    "same_position": lambda pattern, tokens, queries: patterns.same_position(pattern, queries),
    "first_token": lambda pattern, tokens, queries: patterns.first_token(pattern, queries),
    "duplicate_token": patterns.duplicate_token,
    "induction": patterns.induction,
    "entropy": lambda pattern, tokens, queries: patterns.entropy(pattern, queries),
}


@jax.jit
def all_scores(pattern, tokens, queries):
    return {name: score(pattern, tokens, queries) for name, score in SCORES.items()}


def scores(pattern, tokens, queries=None):
    queries = np.ones(len(tokens), bool) if queries is None else np.asarray(queries)
    return all_scores(jnp.asarray(pattern, jnp.float32), jnp.asarray(tokens), jnp.asarray(queries))


def one_hot_pattern(targets):
    """Query t looks at targets[t] only."""
    return np.eye(len(targets))[np.asarray(targets)]


def uniform_pattern(length):
    return np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]


def random_pattern(rng, length):
    weights = np.tril(rng.gamma(0.5, size=(length, length)) + 1e-6)
    return weights / weights.sum(1, keepdims=True)


def oracle(pattern, tokens, queries):
    """Each score as a loop over its definition."""
    values = {name: [] for name in SCORES}
    for t in range(len(tokens)):
        if not queries[t]:
            continue
        values["same_position"].append(pattern[t, t])
        copies = [j for j in range(t) if tokens[j] == tokens[t]]
        if copies:
            values["duplicate_token"].append(sum(pattern[t, j] for j in copies))
        after = [j + 1 for j in copies if j + 1 != t]
        if after:
            values["induction"].append(sum(pattern[t, j] for j in after))
        if t >= 1:
            values["previous_token"].append(pattern[t, t - 1])
            values["first_token"].append(pattern[t, 0])
            values["entropy"].append(-sum(p * np.log(p) for p in pattern[t] if p > 0) / np.log(t + 1))
    return {name: np.mean(value) if value else np.nan for name, value in values.items()}


@pytest.mark.parametrize("seed", range(6))
def test_scores_agree_with_slow_loops(seed):
    rng = np.random.default_rng(seed)
    pattern, tokens = random_pattern(rng, T), rng.integers(0, 4, T)
    queries = rng.random(T) < 0.7
    expected = oracle(pattern, tokens, queries)
    for name, score in scores(pattern, tokens, queries).items():
        np.testing.assert_allclose(score, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_perfect_previous_token_head():
    tokens = np.arange(T)
    got = scores(one_hot_pattern([0, *range(T - 1)]), tokens)
    assert got["previous_token"] == 1
    assert got["entropy"] == 0
    np.testing.assert_allclose(got["same_position"], 1 / T, rtol=1e-6)  # position 0 has only itself
    np.testing.assert_allclose(got["first_token"], 1 / (T - 1), rtol=1e-6)  # position 1 looks back at it


def test_a_previous_token_head_that_the_rest_would_hide():
    """Looking back at positions below 4 only: a half over all of them, 1 over those that matter."""
    targets = [0, 0, 1, 2, 4, 5, 6]
    tokens = np.arange(7)
    assert scores(one_hot_pattern(targets), tokens)["previous_token"] == 0.5
    assert scores(one_hot_pattern(targets), tokens, np.arange(7) < 4)["previous_token"] == 1


def test_a_perfect_induction_head_scores_one_on_bos_and_two_random_halves():
    rng = np.random.default_rng(0)
    for _ in range(5):
        half = rng.permutation(8)[:4]
        tokens = np.concatenate([[8], half, half])
        targets = [t if t <= 4 else t - 4 + 1 for t in range(9)]
        got = scores(one_hot_pattern(targets), tokens)
        assert got["induction"] == 1
        assert got["duplicate_token"] == 0


def test_induction_with_letters_that_repeat_inside_a_half():
    """Every position after a copy counts, so a head that looks at the one a period back still scores 1."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        half = rng.integers(0, 3, 4)
        tokens = np.concatenate([[8], half, half])
        targets = [t if t <= 4 else t - 4 + 1 for t in range(9)]
        queries = np.arange(9) > 4
        assert scores(one_hot_pattern(targets), tokens, queries)["induction"] == 1


def test_identity_attention():
    got = scores(np.eye(T), np.zeros(T, np.int32))
    assert got["same_position"] == 1
    for name in ("previous_token", "first_token", "duplicate_token", "induction", "entropy"):
        assert got[name] == 0, name


def test_attention_to_the_first_token():
    got = scores(one_hot_pattern([0] * T), np.arange(T))
    assert got["first_token"] == 1
    np.testing.assert_allclose(got["same_position"], 1 / T, rtol=1e-6)
    np.testing.assert_allclose(got["previous_token"], 1 / (T - 1), rtol=1e-6)
    assert got["entropy"] == 0


def test_attention_to_duplicates():
    tokens = np.array([5, 6, 5, 7, 6, 5])
    pattern = np.eye(6)
    pattern[2] = [1, 0, 0, 0, 0, 0]
    pattern[4] = [0, 1, 0, 0, 0, 0]
    pattern[5] = [0.25, 0, 0.75, 0, 0, 0]
    got = scores(pattern, tokens)
    assert got["duplicate_token"] == 1
    assert got["induction"] == 0
    only_first = scores(pattern, tokens, np.array([True, True, False, True, False, False]))
    assert np.isnan(only_first["duplicate_token"])  # those queries have no earlier copy


def test_entropy_is_one_for_uniform_and_zero_for_one_key():
    np.testing.assert_allclose(scores(uniform_pattern(T), np.arange(T))["entropy"], 1.0, rtol=1e-6)
    rng = np.random.default_rng(0)
    targets = [rng.integers(0, t + 1) for t in range(T)]
    assert scores(one_hot_pattern(targets), np.arange(T))["entropy"] == 0
    gradient = jax.jit(jax.grad(patterns.entropy))(jnp.eye(T), jnp.ones(T, bool))
    assert np.isfinite(gradient).all()


def test_uniform_attention_scores_what_the_docstrings_say():
    got = scores(uniform_pattern(T), np.zeros(T, np.int32))
    each = 1 / np.arange(2, T + 1)
    np.testing.assert_allclose(got["previous_token"], each.mean(), rtol=1e-6)
    np.testing.assert_allclose(got["first_token"], each.mean(), rtol=1e-6)
    np.testing.assert_allclose(got["same_position"], np.append(each, 1).mean(), rtol=1e-6)


def test_one_letter_all_the_way():
    """Copies of query t are all of 0..t-1, the positions after them 1..t; t itself is no target, so 1..t-1 are."""
    tokens = np.zeros(5, np.int32)
    uniform = scores(uniform_pattern(5), tokens)
    np.testing.assert_allclose(uniform["induction"], np.mean([1 / 3, 2 / 4, 3 / 5]), rtol=1e-6)
    np.testing.assert_allclose(uniform["duplicate_token"], np.mean([1 / 2, 2 / 3, 3 / 4, 4 / 5]), rtol=1e-6)
    assert scores(one_hot_pattern([0, 0, 1, 2, 3]), tokens)["induction"] == 1
    # Query 1 has a copy, but only its own position after it: it does not count.
    assert np.isnan(scores(uniform_pattern(5), tokens, np.arange(5) == 1)["induction"])
    np.testing.assert_allclose(scores(uniform_pattern(5), tokens, np.arange(5) == 1)["duplicate_token"], 0.5)


def test_nan_when_no_query_counts():
    got = scores(uniform_pattern(T), np.zeros(T, np.int32), np.zeros(T, bool))
    assert all(np.isnan(value) for value in got.values())
    # Query 0 has nothing in front of it.
    got = scores(uniform_pattern(T), np.zeros(T, np.int32), np.arange(T) == 0)
    assert {name for name, value in got.items() if np.isnan(value)} == SCORES.keys() - {"same_position"}
    assert got["same_position"] == 1


def test_one_position():
    got = scores(np.ones((1, 1)), np.array([3]))
    assert got["same_position"] == 1
    assert {name for name, value in got.items() if np.isnan(value)} == SCORES.keys() - {"same_position"}


def test_heads_and_sequences_come_from_vmap():
    rng = np.random.default_rng(0)
    pattern = np.array([[random_pattern(rng, T) for _ in range(2)] for _ in range(3)], np.float32)
    tokens, queries = rng.integers(0, 4, (3, T)), rng.random((3, T)) < 0.8
    together = jax.jit(jax.vmap(jax.vmap(patterns.induction, (0, None, None))))(pattern, tokens, queries)
    for b in range(3):
        for h in range(2):
            expected = oracle(pattern[b, h], tokens[b], queries[b])["induction"]
            np.testing.assert_allclose(together[b, h], expected, rtol=1e-5, atol=1e-6)


def test_earlier_copies():
    copies = np.asarray(jax.jit(patterns.earlier_copies)(jnp.array([1, 2, 1, 1])))
    assert np.argwhere(copies).tolist() == [[2, 0], [3, 0], [3, 2]]


# --- offsets and chance ---

offset_profile = jax.jit(patterns.offset_profile)


@pytest.mark.parametrize("seed", range(3))
def test_the_offset_profile_agrees_with_slow_loops(seed):
    rng = np.random.default_rng(seed)
    pattern, queries = random_pattern(rng, T), rng.random(T) < 0.6
    got = offset_profile(pattern.astype(np.float32), queries)
    for k in range(T):
        back = [pattern[t, t - k] for t in range(k, T) if queries[t]]
        np.testing.assert_allclose(got[k], np.mean(back) if back else np.nan, rtol=1e-5, atol=1e-6)
    named = scores(pattern, np.arange(T), queries)
    np.testing.assert_allclose(got[0], named["same_position"], rtol=1e-6)
    np.testing.assert_allclose(got[1], named["previous_token"], rtol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 3, T - 1])
def test_a_perfect_fixed_offset_is_the_profile_s_one_peak(k):
    pattern = one_hot_pattern([max(t - k, 0) for t in range(T)])
    got = np.asarray(offset_profile(pattern, np.arange(T) >= k))
    assert got[k] == 1
    assert (np.delete(got, k) == 0).all()


def test_uniform_attention_is_what_chance_means():
    np.testing.assert_allclose(patterns.uniform(T), uniform_pattern(T), rtol=1e-6)
    assert patterns.uniform(1).tolist() == [[1.0]]
    chance = offset_profile(patterns.uniform(T), np.ones(T, bool))
    np.testing.assert_allclose(chance, [np.mean(1 / np.arange(k + 1, T + 1)) for k in range(T)], rtol=1e-6)


def test_above_chance_is_zero_for_chance_and_one_for_perfect():
    chance = jnp.array([0.0, 0.2, 0.75, 1.0])
    np.testing.assert_allclose(patterns.above_chance(chance, chance), 0.0, atol=1e-7)
    np.testing.assert_allclose(patterns.above_chance(jnp.ones(4), chance), [1, 1, 1, 0])  # where chance is 1: nothing
    np.testing.assert_allclose(patterns.above_chance(jnp.zeros(3), chance[:3]), [0, -0.25, -3], rtol=1e-6)
    assert np.isnan(patterns.above_chance(jnp.nan, jnp.array(0.3)))  # no query counted
    slope = jax.grad(lambda score: patterns.above_chance(score, jnp.array(1.0)))(0.5)
    assert slope == 0


def test_a_small_alphabet_fakes_induction():
    """Why labels do not rest on the raw score: a perfect previous-token head is no induction head.

    On four letters the position in front of a query often lies behind a copy of it (t - 2 holds the same letter), and
    where letters alternate it always does. Without repeats there is nothing to fake.
    """
    rng = np.random.default_rng(0)
    length = 12
    looks_back = one_hot_pattern([max(t - 1, 0) for t in range(length)])
    raw = jax.jit(jax.vmap(patterns.induction, (None, 0, None)))
    letters, everywhere = rng.integers(0, 4, (300, length)), np.ones(length, bool)
    faked = np.nanmean(raw(looks_back.astype(np.float32), letters, everywhere))
    np.testing.assert_allclose(faked, 0.34, atol=0.04)
    assert faked > 1.2 * np.nanmean(raw(uniform_pattern(length).astype(np.float32), letters, everywhere))
    assert scores(looks_back, np.arange(length) % 2)["induction"] == 1
    far = rng.permutation(length // 2)
    assert scores(looks_back, np.concatenate([far, far]))["induction"] == 0
