"""Portraits against slow loops in float64; planted contrasts, copies, rotations; ties, gauge, zero and broken heads."""

from functools import partial

import jax
import numpy as np
import pytest
import scipy.linalg

from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.heads import portraits
from circuits_jax.heads.portraits import Dictionary

D, R, N, M = 12, 5, 40, 30
N_DIRECTIONS, TOP = 4, 3

portrait = partial(jax.jit, static_argnames=("n", "k"))(portraits.portrait)
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def orthonormal(seed, m, r):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(m, r)))[0]


def circuit(left, right):
    return LowRank(np.asarray(left, np.float32), np.asarray(right, np.float32))


def with_values(values, n_heads=6):
    """Heads [H,D,D] with these singular values [R], whatever their vectors."""
    left = [orthonormal(i, D, len(values)) * values for i in range(n_heads)]
    return circuit(np.stack(left), np.stack([orthonormal(50 + i, D, len(values)).T for i in range(n_heads)]))


def dictionary(seed, n_rows):
    """A variable of three classes, one whose four class means are on a plane and far from zero, one without effect."""
    planar = 5 + gaussian(seed + 1, 4, 2) @ gaussian(seed + 2, 2, D)
    return Dictionary(
        gaussian(seed, n_rows, D) + 0.5,
        {"three": gaussian(seed + 3, 3, D), "planar": planar, "none": np.repeat(gaussian(seed + 4, 1, D), 3, 0)},
    )


RANKS = {"three": 2, "planar": 2, "none": 0}
READS, WRITES = dictionary(100, N), dictionary(200, M)
APART = with_values([5.0, 4.0, 3.0, 2.0, 1.0])
TIED = with_values([5.0, 3.0, 3.0, 3.0, 1.0])


def answer(heads, reads=READS, writes=WRITES, n=N_DIRECTIONS, k=TOP):
    return portrait(heads, reads, writes, n=n, k=k)


def of_head(tree, i):
    return jax.tree.map(lambda x: np.asarray(x[i]), tree)


# The oracle -----------------------------------------------------------------------------------------------------------


def share_of(classes, basis):
    """Mean squared length of orthonormal basis vectors [D,b] within the span of the class contrasts."""
    contrasts = classes.astype(np.float64) - classes.astype(np.float64).mean(0)
    span = scipy.linalg.orth(contrasts.T, rcond=1e-5) if np.abs(contrasts).max() > 1e-5 else np.zeros((D, 1))
    return np.mean([np.linalg.norm(span.T @ b) ** 2 for b in basis.T])


def check_direction(found, r, side, basis):
    """Direction r of a head's Directions is that of the basis [D,b] over this side's dictionary."""
    rows = side.rows.astype(np.float64)
    projections = np.array([(x - rows.mean(0)) @ basis for x in rows])
    single = basis.shape[1] == 1
    projections = projections[:, 0] if single else np.linalg.norm(projections, axis=1)
    order = np.argsort(-projections)
    close(found.top.values[r], projections[order[:TOP]])
    np.testing.assert_array_equal(found.top.rows[r], order[:TOP])
    if single:
        close(found.bottom.values[r], projections[order[::-1][:TOP]])
        np.testing.assert_array_equal(found.bottom.rows[r], order[::-1][:TOP])
    else:
        assert np.isnan(found.bottom.values[r]).all()
        assert (found.bottom.rows[r] == -1).all()
    for name, classes in side.variables.items():
        close(found.shares[name][r], share_of(classes, basis))
        close(found.chance[name][r], RANKS[name] / D)


@pytest.mark.parametrize(("heads", "sizes"), [(APART, [1] * 5), (TIED, [1, 3, 1])], ids=["apart", "tied"])
def test_singular_side_agrees_with_slow_loops(heads, sizes):
    found = answer(heads, n=3)  # the tied group goes on behind the first n
    for i, dense in enumerate(heads.left.astype(np.float64) @ heads.right):
        u, s, vh = np.linalg.svd(dense)
        close(found.singular_values[i], s[:3])
        flip = np.array([np.sign(column[np.abs(column).argmax()]) for column in u.T])
        first = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        for r in range(3):
            size = np.repeat(sizes, sizes)[r]
            assert (found.group[i, r], found.group_size[i, r]) == (first[r], size)
            for side, vectors, seen in ((found.read, u * flip, READS), (found.written, vh.T * flip, WRITES)):
                check_direction(of_head(side, i), r, seen, vectors[:, first[r] : first[r] + size])


def test_eigen_side_agrees_with_slow_loops():
    found, kinds = answer(APART), set()
    for i, dense in enumerate(APART.left.astype(np.float64) @ APART.right):
        values, left, right = scipy.linalg.eig(dense, left=True)
        order = np.argsort(-np.abs(values), kind="stable")[:N_DIRECTIONS]
        close(np.abs(found.eigenvalues[i]), np.abs(values[order]))
        for r, value in enumerate(np.asarray(found.eigenvalues[i])):
            same = np.abs(values - value).argmin()
            close(value, values[same])
            x, y = left[:, same], right[:, same]
            np.testing.assert_allclose(found.condition[i, r], 1 / abs(x.conj() @ y), rtol=1e-3)
            kinds.add(value.imag != 0)
            if value.imag != 0:
                x, y = (scipy.linalg.orth(np.stack([z.real, z.imag], 1)) for z in (x, y))
            else:
                x, y = x.real, y.real
                y = y * np.sign(y[np.abs(y).argmax()])
                x, y = (x * np.sign(x @ y))[:, None], y[:, None]
            check_direction(of_head(found.eigen_right, i), r, READS, y)
            check_direction(of_head(found.eigen_left, i), r, WRITES, x)
    assert kinds == {False, True}


# What the directions stand for ----------------------------------------------------------------------------------------


def test_planted_contrasts_have_share_one():
    """A head that reads the contrast of one variable and writes that of another: each share 1, of all others 0."""
    axes = orthonormal(3, D, 3).T.astype(np.float32)
    variables = {name: 2 + np.stack([axis, -axis]) for name, axis in zip("abc", axes, strict=True)}
    seen = Dictionary(gaussian(0, N, D), variables)
    found = answer(circuit(7 * axes[0][:, None], axes[1][None]), seen, seen, n=1)
    for side, planted in ((found.read, "a"), (found.written, "b")):
        for name in variables:
            close(side.shares[name], [float(name == planted)])
            close(side.chance[name], [1 / D])


def test_random_directions_have_the_share_of_chance():
    found = answer(circuit(gaussian(1, 2000, D, 1), gaussian(2, 2000, 1, D)), n=1)
    for side in (found.read, found.written):
        for name, rank in RANKS.items():
            close(side.shares[name].mean(), rank / D, atol=0.01)
            close(side.chance[name], rank / D)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_copying_head_writes_the_token_that_it_reads(sign):
    """One token, unembedded not quite as it is embedded: the ends that hold it on either side, copied or suppressed.

    The singular pair goes up together, whatever the sign; the eigenvalue has the sign, and its vectors go together.
    """
    embed = orthonormal(4, D, D).T.astype(np.float32)
    unembed = (embed @ (np.eye(D) + 0.1 * gaussian(5, D, D))).astype(np.float32)
    head = circuit(sign * embed[2][:, None], unembed[2][None])
    found = answer(head, Dictionary(embed, {}), Dictionary(unembed, {}), n=1)
    close(found.eigenvalues, [sign * embed[2] @ unembed[2]])

    def is_top(side):
        ends = [ranked.rows[0, 0] == 2 for ranked in (side.top, side.bottom)]
        assert sum(ends) == 1
        return ends[0]

    assert (is_top(found.read) == is_top(found.written)) == (sign > 0)
    assert is_top(found.eigen_right) == is_top(found.eigen_left)


def test_a_rotation_is_its_plane():
    """Scaled rotation within two known axes: whatever the phase of the vectors, the plane, in both directions."""
    plane = orthonormal(6, D, 2)
    for angle in (0.3, np.pi / 2, 2.5):
        turn = 3 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        found = answer(circuit(plane @ turn, plane.T), n=2)
        close(np.sort_complex(found.eigenvalues), np.sort_complex(3 * np.exp([1j * angle, -1j * angle])))
        close(found.condition, 1)
        for r in range(2):
            check_direction(found.eigen_right, r, READS, plane)
            check_direction(found.eigen_left, r, WRITES, plane)
        assert found.group_size.tolist() == [2, 2]
        check_direction(found.read, 1, READS, plane)


# What must not matter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [APART, TIED], ids=["apart", "tied"])
def test_any_basis_of_the_head_is_as_good(heads):
    gauge = orthonormal(3, R, R) * [0.5, 2, 1, 1.5, 0.7]
    before, after = answer(heads), answer(circuit(heads.left @ gauge, np.linalg.inv(gauge) @ heads.right))
    eigenvalues = (np.sort_complex(x.eigenvalues) for x in (before, after))
    close(*eigenvalues)
    for name in ("singular_values", "group", "group_size", "read", "written", "eigen_right", "eigen_left"):
        jax.tree.map(close, getattr(after, name), getattr(before, name))


def test_leading_axes_and_vmap_change_nothing():
    expected = answer(APART)
    grid = answer(jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), APART))
    mapped = jax.jit(jax.vmap(lambda head: portraits.portrait(head, READS, WRITES, N_DIRECTIONS, TOP)))(APART)
    alone = answer(APART[4])
    jax.tree.map(close, jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), grid), expected)
    jax.tree.map(close, mapped, expected)
    jax.tree.map(close, alone, of_head(expected, 4))


# Where there is no answer ---------------------------------------------------------------------------------------------


def unknown(directions, head):
    found = of_head(directions, head)
    assert np.isfinite(found.chance["three"]).all()
    no_values = [np.isnan(x.values).all(-1) & (x.rows == -1).all(-1) for x in (found.top, found.bottom)]
    no_shares = np.isnan(found.shares["three"])
    np.testing.assert_array_equal(no_shares, no_values[0])
    return no_shares


def test_zero_low_rank_and_broken_heads():
    """A zero head, one of rank 2, one with NaN, and one untouched by the others."""
    left, right = APART.left.copy(), APART.right.copy()
    left[0], left[1, :, 2:], left[2, 0, 0] = 0, 0, np.nan
    found, clean = answer(LowRank(left, right)), answer(APART)
    everything = np.ones(N_DIRECTIONS, bool)
    for side in (found.read, found.written, found.eigen_right, found.eigen_left):
        np.testing.assert_array_equal(unknown(side, 0), everything)
        np.testing.assert_array_equal(unknown(side, 1), [False, False, True, True])
        np.testing.assert_array_equal(unknown(side, 2), everything)
    assert not np.any(found.singular_values[0])
    assert not np.any(found.eigenvalues[0])
    assert np.isnan(found.eigenvalues[2]).all()
    jax.tree.map(close, of_head(found, 3), of_head(clean, 3))


def test_a_nilpotent_head_has_no_eigenvectors_to_show():
    """A chain of axes, each moved to the next: singular values 1 and no eigenvalue but zero."""
    axes = orthonormal(7, D, R + 1)
    found = answer(circuit(axes[:, :-1], axes[:, 1:].T))
    close(found.singular_values, 1)
    for side in (found.eigen_right, found.eigen_left):
        assert np.isnan(side.top.values).all()
    assert np.isfinite(found.read.top.values).all()


def test_bad_input():
    some = Dictionary(READS.rows, {})
    for arguments, message in (
        (
            (circuit(gaussian(0, D, R), gaussian(0, R, D + 1)), some, some),
            r"circuit must be \[...,D,D\]; got \[12, 13\]",
        ),
        ((APART, some, Dictionary(READS.rows[0], {})), r"writes.rows must be \[N,12\]; got \[12\]"),
        ((APART, Dictionary(READS.rows[:, 1:], {}), some), r"reads.rows must be \[N,12\]; got \[40, 11\]"),
        (
            (APART, Dictionary(READS.rows, {"number": gaussian(0, 1, D)}), some),
            r"reads.variables\['number'\] must be \[C,12\] of C >= 2 classes; got \[1, 12\]",
        ),
        ((APART, some, some, R + 1), "n must be between 1 and 5; got 6"),
        ((APART, READS, WRITES, 2, M + 1), "k must be between 1 and 30; got 31"),
    ):
        with pytest.raises(ValueError, match=message):
            portraits.portrait(*arguments)


# Memory and platforms -------------------------------------------------------------------------------------------------


def array(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_heads_meet_the_rows_in_turn():
    """Far less than the projections [H,N,n] of all heads, 64 MiB for each of four sides."""
    n_heads, n_rows, n = 128, 2**15, 4
    seen = Dictionary(array(n_rows, D), {})
    lowered = portrait.lower(LowRank(array(n_heads, D, R), array(n_heads, R, D)), seen, seen, n=n, k=3)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 4 * n_heads * n_rows * n / 4


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers(platform):
    shapes = jax.tree.map(lambda x: array(*x.shape), (APART, READS, WRITES))
    function = jax.jit(partial(portraits.portrait, n=N_DIRECTIONS, k=TOP))
    exported = jax.export.export(function, platforms=[platform])(*shapes)
    assert exported.platforms == (platform,)
