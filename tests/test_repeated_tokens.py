"""What random-period repeats promise of every sequence, and how they are distributed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.tasks.batch import sample_batch
from circuits_jax.tasks.repeated_tokens import RepeatedTokens

TASK = RepeatedTokens(min_period=3, max_period=7, n_vocab=10, n_context=12)
BOS_TASK = dataclasses.replace(TASK, bos=True)
MANY = 4000
draw = jax.jit(sample_batch, static_argnums=3)


@pytest.fixture(scope="module")
def key():
    return jax.random.key(11)


@pytest.fixture(scope="module", params=[TASK, BOS_TASK], ids=["no-bos", "bos"])
def drawn(request, key):
    return request.param, jax.tree.map(np.asarray, draw(request.param, key, 0, MANY))


def within_five_sigma(count, n, p):
    """Whether counts are within five standard deviations of a binomial(n, p); the key is fixed, so no flicker."""
    return np.all(np.abs(np.asarray(count) - n * p) < 5 * np.sqrt(n * p * (1 - p)))


def test_a_block_of_distinct_tokens_is_tiled_exactly(drawn):
    task, batch = drawn
    assert batch.tokens.shape == (MANY, 12)
    assert batch.tokens.dtype == np.int32
    for row, period in zip(batch.tokens[:300, int(task.bos) :], batch.positions["period"][:300], strict=True):
        block = row[:period]
        assert len(set(block.tolist())) == period
        assert ((block >= 0) & (block < task.n_vocab - task.bos)).all()
        assert row.tolist() == [block[i % period] for i in range(len(row))]


def test_mask_and_source_point_at_the_earlier_copy(drawn):
    _, batch = drawn
    for tokens, mask, source in zip(
        batch.tokens[:300].tolist(), batch.mask[:300], batch.positions["source"][:300], strict=True
    ):
        for t, token in enumerate(tokens):
            has_copy = token in tokens[:t]
            assert mask[t] == (has_copy and t + 1 < len(tokens))
            if has_copy:
                last_copy = max(s for s in range(t) if tokens[s] == token)
                assert source[t] == last_copy + 1
                if mask[t]:
                    assert tokens[source[t]] == tokens[t + 1]
            else:
                assert source[t] == -1


def test_source_is_one_period_back_and_one_on(drawn):
    _, batch = drawn
    t = np.broadcast_to(np.arange(12), batch.tokens.shape)
    has = batch.positions["source"] >= 0
    back = t - batch.positions["period"][:, None] + 1
    np.testing.assert_array_equal(batch.positions["source"][has], back[has])


def test_periods_are_uniform_within_their_bounds(drawn):
    _, batch = drawn
    values, counts = np.unique(batch.positions["period"], return_counts=True)
    assert values.tolist() == [3, 4, 5, 6, 7]
    assert within_five_sigma(counts, MANY, 1 / 5)


def test_period_and_tokens_are_independent(drawn):
    task, batch = drawn
    n_tokens, first = task.n_vocab - task.bos, int(task.bos)
    for t in (first, first + 1, first + 2):
        joint = np.histogram2d(
            batch.positions["period"], batch.tokens[:, t], [np.arange(3, 9), np.arange(n_tokens + 1)]
        )
        assert within_five_sigma(joint[0], MANY, 1 / (5 * n_tokens))


def test_every_token_is_as_likely_at_every_position(drawn):
    task, batch = drawn
    n_tokens = task.n_vocab - task.bos
    for column in batch.tokens[:, int(task.bos) :].T:
        assert within_five_sigma(np.bincount(column, minlength=n_tokens), MANY, 1 / n_tokens)


def test_bos_is_the_last_id_at_position_zero_only(drawn):
    task, batch = drawn
    if task.bos:
        assert (batch.tokens[:, 0] == 9).all()
        assert (batch.tokens[:, 1:] < 9).all()
        assert not batch.mask[:, 0].any()
        assert (batch.positions["source"][:, 0] == -1).all()
        assert (batch.mask.argmax(1) == batch.positions["period"] + 1).all()
    else:
        assert (batch.tokens == 9).any()
        assert (batch.mask.argmax(1) == batch.positions["period"]).all()


def test_fixed_period(key):
    fixed = dataclasses.replace(TASK, min_period=4, max_period=4)
    batch = draw(fixed, key, 0, MANY)
    assert (np.asarray(batch.positions["period"]) == 4).all()
    assert (np.asarray(batch.mask) == (np.arange(12) >= 4) & (np.arange(12) < 11)).all()


def test_period_one_is_one_token_all_the_way(key):
    batch = draw(dataclasses.replace(TASK, min_period=1, max_period=1), key, 0, MANY)
    tokens = np.asarray(batch.tokens)
    assert (tokens == tokens[:, :1]).all()
    assert len(np.unique(tokens)) > 1
    # The position after the copy at t - 1 is t itself.
    np.testing.assert_array_equal(batch.positions["source"][0], [-1, *range(1, 12)])


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_noise_one_is_independent_uniform_tokens_with_the_same_targets(key, bos):
    quiet = dataclasses.replace(TASK, bos=bos)
    batch = draw(dataclasses.replace(quiet, noise=1.0), key, 0, MANY)
    np.testing.assert_array_equal(batch.mask, draw(quiet, key, 0, MANY).mask)
    tokens, n_tokens = np.asarray(batch.tokens), 10 - bos
    if bos:
        assert (tokens[:, 0] == 9).all()
        tokens = tokens[:, 1:]
    for column in tokens.T:
        assert within_five_sigma(np.bincount(column, minlength=n_tokens), MANY, 1 / n_tokens)
    length = tokens.shape[1]
    for i in range(length):
        for j in range(i):
            assert within_five_sigma((tokens[:, i] == tokens[:, j]).sum(), MANY, 1 / n_tokens), (i, j)
    # Nor does the period, which decides what is asked for, say anything about the tokens.
    period = np.asarray(batch.positions["period"])
    for column in tokens.T[:3]:
        joint = np.histogram2d(period, column, [np.arange(3, 9), np.arange(n_tokens + 1)])
        assert within_five_sigma(joint[0], MANY, 1 / (5 * n_tokens))
    # Three positions at once, so that pairwise independence alone does not pass.
    same = (tokens[:, 0] == tokens[:, 4]) & (tokens[:, 4] == tokens[:, 8])
    assert within_five_sigma(same.sum(), MANY, 1 / n_tokens**2)


def test_noise_replaces_that_share_of_the_tokens(key):
    noise = 0.3
    batch = jax.tree.map(np.asarray, draw(dataclasses.replace(TASK, noise=noise), key, 0, MANY))
    quiet = np.asarray(draw(TASK, key, 0, MANY).tokens)
    # A replaced token is by chance the old one in a tenth of the cases.
    assert within_five_sigma((batch.tokens != quiet).sum(0), MANY, noise * 0.9)
    row, t = np.nonzero(batch.mask)
    repeats = batch.tokens[row, t] == batch.tokens[row, t - batch.positions["period"][row]]
    clean = (1 - noise) ** 2
    # Neighbouring repeats share tokens, so five sigma of independent ones is doubled.
    expected, spread = clean + (1 - clean) / 10, np.sqrt(0.25 / len(row))
    assert abs(repeats.mean() - expected) < 10 * spread


def test_a_batch_is_a_function_of_seed_and_step_alone(key):
    first, again, other_step = draw(TASK, key, 5, MANY), draw(TASK, key, 5, MANY), draw(TASK, key, 6, MANY)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (np.asarray(first.tokens) != np.asarray(other_step.tokens)).any(1).mean() > 0.99
    other_seed = draw(TASK, jax.random.key(12), 5, MANY)
    assert (np.asarray(first.tokens) != np.asarray(other_seed.tokens)).any(1).mean() > 0.99
    # A shortest block is one of 10 x 9 x 8, so a few rows may be equal, but not many.
    assert len({tuple(row) for row in np.asarray(first.tokens[:100]).tolist()}) > 90


def test_layout_changes_nothing(key):
    """One sequence after the other, or many steps at once: the same tokens as the batch of a step."""
    expected = draw(TASK, key, 5, MANY)
    one_by_one = jax.jit(lambda keys: jax.lax.map(TASK.sample, keys))
    rows = one_by_one(jax.random.split(jax.random.fold_in(key, 5), MANY)[:8])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[:8]), rows, expected)
    steps = jax.jit(jax.vmap(lambda step: sample_batch(TASK, key, step, MANY)))(jnp.arange(4, 7))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y), steps, expected)


def test_vmap_over_settings_is_each_setting_alone(key):
    sweep = RepeatedTokens(
        min_period=jnp.array([2, 3, 6]), max_period=jnp.array([4, 3, 9]), noise=jnp.array([0.0, 1.0, 0.4]),
        n_vocab=10, n_context=12,
    )  # fmt: skip
    together = jax.jit(jax.vmap(lambda task: sample_batch(task, key, 2, MANY)))(sweep)
    for i, (low, high, noise) in enumerate([(2, 4, 0.0), (3, 3, 1.0), (6, 9, 0.4)]):
        alone = draw(RepeatedTokens(low, high, noise, n_vocab=10, n_context=12), key, 2, MANY)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), together, alone)
    periods = np.asarray(together.positions["period"])
    assert [periods.min(1).tolist(), periods.max(1).tolist()] == [[2, 3, 6], [4, 3, 9]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_period": 0}, r"periods must satisfy 1 <= min_period <= max_period; got 0 and 7"),
        ({"min_period": 8}, r"periods must satisfy 1 <= min_period <= max_period; got 8 and 7"),
        ({"max_period": 11, "n_context": 30}, r"max_period must be at most the 10 tokens there are.* got 11"),
        (
            {"max_period": 10, "n_context": 30, "bos": True},
            r"max_period must be at most the 9 tokens there are.* got 10",
        ),
        ({"max_period": 7, "n_context": 8}, r"max_period must be at most n_context - 2 .* got 7, n_context=8"),
        (
            {"max_period": 7, "n_context": 9, "bos": True},
            r"max_period must be at most n_context - 3 .* got 7, n_context=9",
        ),
        ({"noise": -0.1}, r"noise must be in \[0, 1\]; got -0.1"),
        ({"noise": 1.5}, r"noise must be in \[0, 1\]; got 1.5"),
        ({"noise": float("nan")}, r"noise must be in \[0, 1\]; got nan"),
    ],
)
def test_settings_without_a_solvable_target_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(TASK, **changes).validate()


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
def test_the_longest_period_that_validate_allows_leaves_one_target(key, bos):
    longest = 10 - bos
    task = dataclasses.replace(TASK, min_period=longest, max_period=longest, bos=bos)
    task.validate()
    assert (np.asarray(draw(task, key, 0, MANY).mask).sum(1) == 1).all()


def test_the_defaults_are_valid():
    RepeatedTokens().validate()
    RepeatedTokens(noise=1.0, bos=True).validate()
