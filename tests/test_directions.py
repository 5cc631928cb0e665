"""Max-activating rows and OV probes against slow loops in float64, ties under rotation, controls, planted answers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from circuits_jax.circuits.attention import qk
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import directions
from circuits_jax.heads.directions import covariance_directions, probe_ov, tied_groups, uniform_directions

L, H, D, K, N, V = 2, 3, 12, 5, 40, 17
KEY = jax.random.key(0)

# Each program runs a few times: LLVM unoptimized compiles them in a fraction of the time.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
max_activating = quick(directions.max_activating, static_argnames=("n", "k", "gap", "control", "n_draws"))
probe = quick(probe_ov, static_argnames="k")


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthonormal(seed, m, r):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(m, r)))[0]


def with_values(values, seed=0):
    """Heads [L,H,D,D] with these singular values [R], whatever their vectors."""
    heads = [
        (orthonormal(seed + i, D, len(values)) * values, orthonormal(seed + 50 + i, D, len(values)).T)
        for i in range(L * H)
    ]
    left, right = (np.stack(x).reshape(L, H, *x[0].shape).astype(np.float32) for x in zip(*heads, strict=True))
    return LowRank(left, right)


TIED = with_values([5.0, 3.0, 3.0, 3.0, 1.0])
APART = with_values([5.0, 4.0, 3.0, 2.0, 1.0])
BY_LAYER = gaussian(1, L, N, D) + 0.5
ROWS = BY_LAYER[0]


def answer(circuit, rows, n=2, k=3, **options):
    return max_activating(circuit, rows, KEY, n=n, k=k, n_draws=5, **options)


# The oracle -----------------------------------------------------------------------------------------------------------


def oracle(circuit, rows, sizes, n, k):
    """Activations [L,H,2,n,N] with the sizes of the groups in order given; a group's members get the same."""
    activations, means = np.zeros((L, H, 2, n, N)), np.zeros((L, H, 2, n))
    for layer, head in np.ndindex(L, H):
        dense = circuit.left[layer, head].astype(np.float64) @ circuit.right[layer, head]
        u, _, vh = np.linalg.svd(dense)
        x = np.asarray(rows[layer] if rows.ndim == 3 else rows, np.float64)
        flip = [np.sign(column[np.abs(column).argmax()]) for column in u.T]
        for side, vectors in enumerate((u * flip, vh.T * flip)):
            first = 0
            for size in sizes:
                basis = vectors[:, first : first + size]
                for r in range(first, min(first + size, n)):
                    for i in range(N):
                        coordinates = (x[i] - x.mean(0)) @ basis
                        activations[layer, head, side, r, i] = (
                            coordinates[0] if size == 1 else np.linalg.norm(coordinates)
                        )
                    common = x.mean(0) @ basis
                    means[layer, head, side, r] = common[0] if size == 1 else np.linalg.norm(common)
                first += size
    return activations, means


@pytest.mark.parametrize(("rows", "n"), [(ROWS, 2), (BY_LAYER, 4)], ids=["tied past n", "tied within n, by layer"])
@pytest.mark.parametrize(("circuit", "sizes"), [(APART, [1] * 5), (TIED, [1, 3, 1])], ids=["apart", "tied"])
def test_agrees_with_slow_loops(circuit, sizes, rows, n):
    """With n = 2 the tied group goes on in the second block of vectors."""
    k = 3
    found = answer(circuit, rows, n, k)
    activations, means = oracle(circuit, rows, sizes, n, k)
    of_direction = np.repeat(sizes, sizes)[:n]
    np.testing.assert_array_equal(found.group_size, np.broadcast_to(of_direction, (L, H, n)))
    np.testing.assert_array_equal(found.group[0, 0], np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)[:n])
    for side, of_side in enumerate((found.query, found.key)):
        expected = activations[:, :, side]
        close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
        close(of_side.mean, means[:, :, side])
        std = np.sqrt((expected**2).mean(-1))
        close(of_side.std, std)
        order = np.argsort(-expected, axis=-1)
        close(of_side.top.values, -np.sort(-expected, axis=-1)[..., :k])
        np.testing.assert_array_equal(of_side.top.rows, order[..., :k])
        close(of_side.extremeness, -np.sort(-np.abs(expected), axis=-1)[..., k - 1] / std)
        single = of_direction == 1
        close(of_side.bottom.values[:, :, single], np.sort(expected, axis=-1)[:, :, single, :k])
        np.testing.assert_array_equal(of_side.bottom.rows[:, :, single], order[:, :, single, ::-1][..., :k])
        assert np.isnan(of_side.bottom.values[:, :, ~single]).all()
        assert (np.asarray(of_side.bottom.rows)[:, :, ~single] == -1).all()
        controlled = np.broadcast_to(of_direction <= n, (L, H, n))
        np.testing.assert_array_equal(np.isfinite(of_side.z), controlled)
        np.testing.assert_array_equal(np.isfinite(of_side.quantile), controlled)


def test_batches_of_rows_and_heads_change_nothing(monkeypatch):
    expected = answer(TIED, BY_LAYER, n=4)
    monkeypatch.setattr(directions, "ENTRIES_AT_ONCE", 1)
    in_blocks = quick(partial(directions.max_activating, n=4, k=3, n_draws=5))(TIED, BY_LAYER, KEY)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), in_blocks, expected)


# Ties -----------------------------------------------------------------------------------------------------------------


def test_ties_chain_up_to_the_gap():
    values = np.array([[10, 9.95, 9.9, 5, 4.9, 0, 0], [3, 2, 1, 0.5, 0.4, 0.3, 0.2]])
    np.testing.assert_array_equal(tied_groups(values, 0.01), [[0, 0, 0, 3, 4, 5, 5], range(7)])
    np.testing.assert_array_equal(tied_groups(values, 0.03), [[0, 0, 0, 3, 3, 5, 5], range(7)])
    np.testing.assert_array_equal(tied_groups(values, 0)[0], [0, 1, 2, 3, 4, 5, 5])
    assert tied_groups(np.array([np.nan, np.nan]))[1] == 1
    for gap in (-0.1, 1):
        with pytest.raises(ValueError, match=rf"gap must be in \[0, 1\).*; got {gap}"):
            tied_groups(values, gap)


def test_rotation_within_a_group_changes_nothing():
    """U diag(5, 3, 3, 3, 1) V^T with U and V turned alike within the three is the same matrix but for its rounding."""
    turn = np.eye(5)
    turn[1:4, 1:4] = orthonormal(9, 3, 3)
    nearly = np.array([5, 3.001, 3, 2.999, 1]) / np.array([5, 3, 3, 3, 1])  # what decides the vectors, not the span
    left = [(TIED.left @ q * nearly).astype(np.float32) for q in (np.eye(5), turn)]
    right = [TIED.right, (turn.T @ TIED.right).astype(np.float32)]
    one, other = (answer(LowRank(*factors), ROWS, n=4) for factors in zip(left, right, strict=True))
    vectors = [np.linalg.svd(a[0, 0] @ b[0, 0])[0][:, 1] for a, b in zip(left, right, strict=True)]
    assert abs(vectors[0] @ vectors[1]) < 0.95  # the vectors themselves do turn
    for side in ("query", "key"):
        a, b = getattr(one, side), getattr(other, side)
        np.testing.assert_allclose(a.top.values, b.top.values, atol=1e-4)
        np.testing.assert_array_equal(a.top.rows, b.top.rows)
        np.testing.assert_allclose(a.extremeness, b.extremeness, atol=1e-4)
        np.testing.assert_array_equal(a.top.rows[:, :, 1], a.top.rows[:, :, 3])


def test_gauge_and_order_of_rows():
    """W_Q G and W_K G^-T are the same head; rows in another order are the same rows."""
    gauge = orthonormal(3, 5, 5) * [0.5, 2, 1, 1.5, 0.7]
    other = LowRank(*(x.astype(np.float32) for x in (APART.left @ gauge, np.linalg.inv(gauge) @ APART.right)))
    order = np.random.default_rng(0).permutation(N)
    before, after = answer(APART, ROWS, n=4), answer(other, ROWS[order], n=4)
    for side in ("query", "key"):
        a, b = getattr(before, side), getattr(after, side)
        for ours, theirs in ((b.top, a.top), (b.bottom, a.bottom)):
            np.testing.assert_allclose(ours.values, theirs.values, atol=1e-4)
            np.testing.assert_array_equal(order[np.asarray(ours.rows)], theirs.rows)
        np.testing.assert_allclose(b.mean, a.mean, atol=1e-4)


# Known answers --------------------------------------------------------------------------------------------------------


def test_planted_tokens_are_found_and_beat_random_directions():
    """One-hot directions among small noise: the query wants rows 3 and 5 (and not 7), the key gives rows 11 and 13."""
    n_rows, d = 200, 30
    rows = 0.1 * gaussian(2, n_rows, d)
    rows[[3, 5], 0] += 4, 3
    rows[7, 0] -= 3
    rows[[11, 13], 1] += 4, 3
    left, right = np.zeros((1, 1, d, 1), np.float32), np.zeros((1, 1, 1, d), np.float32)
    left[0, 0, 0], right[0, 0, 0, 1] = 2, 1
    # Uniform: the rows' covariance would be mostly that of the planted directions.
    found = max_activating(LowRank(left, right), rows, KEY, n=1, k=2, control=uniform_directions, n_draws=200)
    np.testing.assert_array_equal(found.query.top.rows[0, 0, 0], [3, 5])
    assert found.query.bottom.rows[0, 0, 0, 0] == 7
    np.testing.assert_array_equal(found.key.top.rows[0, 0, 0], [11, 13])
    assert min(found.query.quantile, found.key.quantile) > 0.95
    assert min(found.query.z, found.key.z) > 1.5


CALIBRATION = {"n": 2, "k": 3, "n_draws": 400}
MANY_HEADS, HEAVY_TAILED = (20, 30), np.random.default_rng(0).standard_t(4, size=(60, 16)).astype(np.float32)


def assert_calibrated(side):
    """5 % of 600 heads beat 95 % of 400 controls: their share varies by 0.009, and the controls' quantile by 0.011."""
    quantile = np.asarray(side.quantile[..., 0])
    assert abs((quantile > 0.95).mean() - 0.05) < 0.035
    assert abs(quantile.mean() - 0.5) < 0.06
    assert abs(np.asarray(side.z[..., 0]).mean()) < 0.2


@pytest.mark.parametrize("control", [uniform_directions, covariance_directions])
def test_controls_are_calibrated(control):
    """Single directions of heads that read what the controls draw."""
    rows = HEAVY_TAILED * np.linspace(0.3, 2, 16, dtype=np.float32)
    mix = (rows - rows.mean(0)).T if control is covariance_directions else np.eye(16)
    left, right = (np.linalg.qr(mix @ gaussian(seed, *MANY_HEADS, mix.shape[1], 2))[0] for seed in (3, 4))
    circuit = LowRank((left * [2, 1]).astype(np.float32), right.mT.astype(np.float32))
    found = max_activating(circuit, rows, KEY, control=control, **CALIBRATION)
    assert (np.asarray(found.group_size) == 1).all()
    assert_calibrated(found.query)
    assert_calibrated(found.key)


def test_controls_of_groups_are_calibrated():
    """Random planes among random planes, whose activations are less extreme than those of single directions."""
    left, right = (np.linalg.qr(gaussian(seed, *MANY_HEADS, 16, 2))[0] for seed in (3, 4))
    found = max_activating(LowRank(left, right.mT), HEAVY_TAILED, KEY, control=uniform_directions, **CALIBRATION)
    assert (np.asarray(found.group_size) == 2).all()
    assert_calibrated(found.query)
    assert_calibrated(found.key)


def test_covariance_directions_have_the_covariance_of_the_rows():
    """Of one row's worth of variance in three dimensions, the share of each direction; uniform ones know nothing."""
    rows = gaussian(0, 500, 3) * np.array([3, 1, 0], np.float32) + 10
    frames = np.asarray(covariance_directions(jnp.asarray(rows), KEY, 2000, 1))[..., 0]
    assert np.abs(frames[:, 2]).max() < 1e-3
    angle = np.arctan2(frames[:, 0], frames[:, 1])
    expected = np.random.default_rng(1).normal(size=(100_000, 2)) * rows[:, :2].std(0)
    share = lambda a: np.mean(np.abs(np.sin(a)) > 0.9)  # noqa: E731
    np.testing.assert_allclose(share(angle), share(np.arctan2(*expected.T)), atol=0.05)
    uniform = np.asarray(uniform_directions(jnp.asarray(rows), KEY, 2000, 2))
    np.testing.assert_allclose(uniform.mT @ uniform, np.broadcast_to(np.eye(2), (2000, 2, 2)), atol=1e-5)
    np.testing.assert_allclose(np.square(uniform).mean((0, 2)), 1 / 3, atol=0.02)


# Edges ----------------------------------------------------------------------------------------------------------------


def test_zero_and_broken_directions_have_no_answer():
    """Head 0 of layer 0 has rank 2, head 1 is zero, head 2 NaN; layer 1 is as it was."""
    left = APART.left.copy()
    left[0, 0] = left[0, 0] * np.array([1, 1, 0, 0, 0], np.float32)
    left[0, 1], left[0, 2] = 0, np.nan
    found, whole = answer(LowRank(left, APART.right), ROWS, n=4), answer(APART, ROWS, n=4)
    for side in ("query", "key"):
        one = getattr(found, side)
        for ranked in (one.top, one.bottom):
            known = np.asarray(ranked.rows >= 0).all(-1)
            assert known[0].tolist() == [[True, True, False, False], [False] * 4, [False] * 4]
            np.testing.assert_array_equal(np.isfinite(ranked.values).all(-1), known)
            assert known[1].all()
        for values in (one.mean, one.std, one.extremeness, one.z, one.quantile):
            np.testing.assert_array_equal(np.isfinite(values), known)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x[1], y[1], rtol=1e-5, atol=1e-5), one, getattr(whole, side)
        )


def test_rows_that_do_not_differ():
    same = np.broadcast_to(ROWS[:1], ROWS.shape)
    found = answer(APART, same, n=4)
    for side in (found.query, found.key):
        np.testing.assert_allclose(side.top.values, 0, atol=1e-5)
        np.testing.assert_array_equal(side.extremeness, 0)
        np.testing.assert_array_equal(side.z, 0)
        np.testing.assert_array_equal(side.quantile, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"circuit": APART[0]}, r"circuit must be \[L,H,D,D\].*\[3, 12, 12\]"),
        ({"rows": ROWS[:, 1:]}, r"rows must be \[N,12\] or \[2,N,12\]; got \[40, 11\]"),
        ({"rows": BY_LAYER[:1]}, r"rows must be .*; got \[1, 40, 12\]"),
        ({"n": 6}, "n must be between 1 and 5; got 6"),
        ({"k": 41}, "k must be between 1 and 40; got 41"),
        ({"n_draws": 1}, "n_draws must be at least 2.*; got 1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        directions.max_activating(**({"circuit": APART, "rows": ROWS, "key": KEY, "n": 2} | change))


# Probes of OV ---------------------------------------------------------------------------------------------------------


def random_weights(n_groups=1):
    return CircuitWeights(
        W_E=gaussian(0, V, D), W_U=gaussian(1, D, V), W_P=gaussian(2, 6, D), W_Q=gaussian(3, L, H, D, K),
        W_K=gaussian(4, L, n_groups, D, K), W_V=gaussian(5, L, n_groups, D, K), W_O=gaussian(6, L, H, K, D),
        b_V=gaussian(7, L, n_groups, K),
    )  # fmt: skip


@pytest.mark.parametrize("entries_at_once", [1, 2**23])
@pytest.mark.parametrize("n_entries", [3, 9], ids=["fewer than K", "more than K"])
def test_probe_agrees_with_slow_loops(monkeypatch, n_entries, entries_at_once):
    monkeypatch.setattr(directions, "ENTRIES_AT_ONCE", entries_at_once)
    weights, dictionary, k = random_weights(), gaussian(8, n_entries, D), 4
    found = quick(partial(probe_ov, k=k))(weights, dictionary)
    d = dictionary.astype(np.float64)
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    for layer, head in np.ndindex(L, H):
        matrix = weights.W_V[layer, 0].astype(np.float64) @ weights.W_O[layer, head]
        usual = np.linalg.norm(matrix) / np.sqrt(D)
        for i in range(n_entries):
            out = d[i] @ matrix
            of_entry = jax.tree.map(lambda x, at=(layer, head, i): x[at], found)
            gain = np.linalg.norm(out) / np.linalg.norm(d[i])
            cosines, logits = unit @ out / np.linalg.norm(out), out @ weights.W_U
            np.testing.assert_allclose(of_entry.gain, gain, rtol=1e-4)
            np.testing.assert_allclose(of_entry.relative_gain, gain / usual, rtol=1e-4)
            np.testing.assert_allclose(of_entry.own_cosine, cosines[i], atol=1e-5)
            for ranked, values in ((of_entry.nearest, cosines), (of_entry.tokens, logits)):
                order = np.argsort(-values)[:k]
                np.testing.assert_array_equal(ranked.rows, order)
                np.testing.assert_allclose(ranked.values, values[order], rtol=1e-4, atol=1e-5)


def test_relative_gain_is_one_for_random_directions():
    relative = np.asarray(probe(random_weights(), gaussian(9, 1000, D), k=1).relative_gain)
    np.testing.assert_allclose((relative**2).mean(-1), 1, atol=0.1)  # of gains that vary by half of their mean


def test_a_shift_moves_every_entry_to_the_next():
    """Head 0 copies, head 1 suppresses, head 2 writes entry i + 1 for entry i; the tokens are the entries."""
    entries = orthonormal(4, D, D).T
    shift = np.roll(np.eye(D), 1, axis=1)
    inner = np.stack([np.eye(D), -np.eye(D), 2 * shift])
    of_heads = lambda x: np.broadcast_to(x, (L, H, D, D)).astype(np.float32)  # noqa: E731
    same = of_heads(np.eye(D))
    weights = CircuitWeights(
        W_E=entries.astype(np.float32), W_U=entries.T.astype(np.float32), W_Q=same, W_K=same,
        W_V=of_heads(entries.T @ inner), W_O=of_heads(entries), n_context=4, positions="none",
    )  # fmt: skip
    found = probe(weights, 3 * entries.astype(np.float32), k=2)
    np.testing.assert_allclose(found.own_cosine, np.broadcast_to([[1], [-1], [0]], (L, H, D)), atol=1e-5)
    np.testing.assert_allclose(found.gain, np.broadcast_to([[1], [1], [2]], (L, H, D)), rtol=1e-5)
    np.testing.assert_allclose(found.relative_gain, 1, rtol=1e-5)
    following = (np.arange(D) + 1) % D
    for ranked, size in ((found.nearest, 1), (found.tokens, 6)):
        np.testing.assert_array_equal(ranked.rows[:, 2, :, 0], np.broadcast_to(following, (L, D)))
        np.testing.assert_array_equal(ranked.rows[:, 0, :, 0], np.broadcast_to(np.arange(D), (L, D)))
        np.testing.assert_allclose(ranked.values[:, 2, :, 0], size, rtol=1e-5)
    lowered = probe(weights, -3 * entries.astype(np.float32), k=2)
    np.testing.assert_array_equal(lowered.tokens.rows[:, 1, :, 0], np.broadcast_to(np.arange(D), (L, D)))


def test_zero_entries_zero_heads_and_nan():
    weights, dictionary = random_weights(n_groups=H), gaussian(8, 6, D)
    dictionary[2] = 0
    weights.W_O[0, 0], weights.W_O[0, 1] = 0, np.nan
    found = probe(weights, dictionary, k=3)
    values = (
        found.gain,
        found.relative_gain,
        found.own_cosine,
        found.nearest.values[..., 0],
        found.tokens.values[..., 0],
    )
    for x in map(np.asarray, values):
        assert not x[0, 0].any()
        assert not x[1, :, 2].any()
        assert np.isnan(x[0, 1]).all()
        assert x[1][:, [0, 1, 3, 4, 5]].all()
    assert (np.asarray(found.nearest.rows)[1] != 2).any()


def test_probe_is_that_of_any_basis_of_the_head():
    weights = random_weights(n_groups=H)
    gauge = orthonormal(3, K, K) * [0.5, 2, 1, 1.5, 0.7]
    other = dataclasses.replace(
        weights,
        W_V=(weights.W_V @ gauge).astype(np.float32),
        W_O=(np.linalg.inv(gauge) @ weights.W_O).astype(np.float32),
    )
    before, after = (probe(x, gaussian(8, 6, D), k=3) for x in (weights, other))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), after, before)


def test_bad_dictionaries():
    for dictionary, k, message in (
        (ROWS[0], 3, r"dictionary must be \[N,12\]; got \[12\]"),
        (ROWS[:, 1:], 3, r"dictionary must be \[N,12\]; got \[40, 11\]"),
        (ROWS, V + 1, "k must be between 1 and the 17 tokens; got 18"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_ov(random_weights(), dictionary, k)


# Memory and platforms -------------------------------------------------------------------------------------------------


def array(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_activations_come_in_bounded_blocks(monkeypatch):
    """Far less than the activations [L,H,2,n,N] of all heads, 16 MiB."""
    monkeypatch.setattr(directions, "ENTRIES_AT_ONCE", 2**16)
    n_rows, n, circuit = 2**14, 8, LowRank(array(4, 4, 16, 8), array(4, 4, 8, 16))
    function = quick(partial(directions.max_activating, n=n, k=3))
    compiled = function.lower(circuit, array(n_rows, 16), KEY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (16 * 2 * n * n_rows) / 3


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers(platform):
    def everything(weights, rows, key):
        return directions.max_activating(qk(weights), rows, key, n=2, k=3, n_draws=4), probe_ov(weights, rows[0], 3)

    weights = jax.tree.map(lambda x: array(*x.shape), random_weights())
    exported = jax.export.export(jax.jit(everything), platforms=[platform])(weights, array(L, N, D), KEY)
    assert exported.platforms == (platform,)
