"""Spectra of heads against plain float64; planted, random, copying, zero and broken heads; the reading table."""

import json

import jax
import numpy as np
import pytest

import circuits_jax as cj
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.reports import head_spectra, reading_table
from circuits_jax.reports.reading_table import Claimed

L, H, D, K, V, T, N = 2, 3, 24, 4, 40, 10, 600
KEY = jax.random.key(0)
PLANTED, RANDOM, BROKEN, COPYING, ZERO, OTHER = [(layer, head) for layer in range(L) for head in range(H)]
LABELS = {"name": np.resize([0, 2, -1], N), "role": np.resize([0, 0, 0, 1, 1, 1, 5], N)}
ANSWERS = {"name": np.array([[0, 1], [-1, -1], [2, -1]])}
CLAIMED = {place: [] for place in (OTHER, PLANTED, RANDOM, BROKEN, COPYING, ZERO)} | {
    PLANTED: [Claimed("mover", "yes", 0.01, "yes", 0.04), Claimed("other", "no", 0.5, "yes", 0.01)]
}
close = lambda a, b, atol=1e-4: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)  # noqa: E731


def gaussian(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x)


def model():
    """Head 0.0 reads "name" and writes its answers, and asks by "name" for "role"; 1.0 copies K embeddings."""
    axes = np.linalg.qr(gaussian(0, D, D))[0].T
    rows = gaussian(1, L, N, D)
    for label, axis in ((LABELS["name"], axes[0]), (LABELS["role"] > 0, axes[1])):
        rows[0] += np.where(label > 0, 1, -1)[:, None] * axis
    W_E, W_U = gaussian(2, V, D), gaussian(3, D, V)
    copied = axes[:K]
    W_E[:K] = W_U.T[:K] = 3 * copied
    W_Q, W_K, W_V, W_O = (gaussian(seed, L, H, *shape) for seed, shape in enumerate([(D, K)] * 3 + [(K, D)], 4))
    for w in (W_Q, W_K, W_V, W_O):
        w[PLANTED] *= 0.01
    answer = unit(W_U[:, :2].mean(1) - W_U[:, 2])
    W_Q[PLANTED][:, 0], W_K[PLANTED][:, 0] = axes[0], axes[1]
    W_V[PLANTED][:, 0], W_O[PLANTED][0] = axes[0], answer
    W_V[COPYING], W_O[COPYING] = copied.T, copied
    for w in (W_Q, W_K, W_V, W_O):
        w[ZERO] = 0
    W_Q[BROKEN][0, 0] = W_O[BROKEN][0, 0] = np.nan
    return CircuitWeights(W_E=W_E, W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O, W_U=W_U, W_P=gaussian(10, T, D)), rows


WEIGHTS, ROWS = model()


def spectra(weights=WEIGHTS, rows=ROWS, labels=LABELS, answers=ANSWERS, claimed=CLAIMED, **more):
    arguments = {"length": T, "key": KEY, "n": 3, "k": 2} | more
    return head_spectra.spectra_of_heads(weights, rows, labels, answers, "t{}".format, claimed, **arguments)


@pytest.fixture(scope="module")
def found():
    return {tuple(map(int, entry["head"].split("."))): entry for entry in spectra()}


# The oracle -----------------------------------------------------------------------------------------------------------


def dense(place, side):
    left, right = ((WEIGHTS.W_Q, WEIGHTS.W_K), (WEIGHTS.W_V, WEIGHTS.W_O))[side == "ov"]
    return left[place].astype(np.float64) @ (right[place].T if side == "qk" else right[place]).astype(np.float64)


def contrasts(layer):
    """The span of what class means differ in, by loops, as orthonormal columns; of what is read and of answers."""
    read = {}
    for name, label in LABELS.items():
        means = [ROWS[layer][label == c].astype(np.float64).mean(0) for c in sorted(set(label.tolist()) - {-1})]
        read[name] = np.linalg.qr(np.stack([mean - means[0] for mean in means[1:]], 1))[0]
    written = {"name": unit(WEIGHTS.W_U[:, :2].mean(1) - WEIGHTS.W_U[:, 2]).astype(np.float64)[:, None]}
    return read, written


def effective_rank(s):
    p = s / s.sum()
    return np.exp(-(p * np.log(p)).sum())


def check_side(side, direction, rows, spans):
    projections = (rows - rows.mean(0)) @ direction
    order = np.argsort(projections)
    ends = [[f"t{i}" for i in order[::-1][:2]], [f"t{i}" for i in order[:2]]]
    assert [side["top"], side["bottom"]] in (ends, ends[::-1])
    assert side["shares"].keys() == spans.keys()
    for name, span in spans.items():
        close(side["shares"][name], np.square(span.T @ direction).sum())
        close(side["chance"][name], span.shape[1] / D)


@pytest.mark.parametrize("place", [RANDOM, OTHER])
@pytest.mark.parametrize("side", ["qk", "ov"])
def test_circuits_agree_with_plain_float64(found, place, side):
    u, s, vh = np.linalg.svd(dense(place, side))
    circuit, (read, written) = found[place][side], contrasts(place[0])
    close(circuit["singular_values"], s[:K])
    close(circuit["effective_rank"], effective_rank(s[:K]))
    close(circuit["flatness"], np.log(effective_rank(s[:K])) / np.log(K))
    embedded, unembedded = WEIGHTS.W_E.astype(np.float64), WEIGHTS.W_U.T.astype(np.float64)
    for r, direction in enumerate(circuit["directions"]):
        assert direction["tied_with"] == 0
        close(direction["sigma"], s[r])
        check_side(direction["read"], u[:, r], embedded, read)
        check_side(direction["written"], vh[r], *((embedded, read) if side == "qk" else (unembedded, written)))
    values = np.linalg.eigvals(dense(place, side))
    largest = values[np.argsort(-np.abs(values))[:3]]
    close(np.hypot(*np.transpose([eigen["value"] for eigen in circuit["eigen"]])), np.abs(largest))
    if side == "ov":
        on_tokens = np.linalg.eigvals(WEIGHTS.W_E.astype(np.float64) @ dense(place, side) @ WEIGHTS.W_U)
        close(circuit["copying_score"], on_tokens.real.sum() / np.abs(on_tokens).sum(), 1e-3)


def test_random_heads_are_the_null_of_effective_rank(found):
    products = (gaussian(1000 + seed, D, K) @ gaussian(2000 + seed, K, D) for seed in range(200))
    ranks = [effective_rank(np.linalg.svd(product, compute_uv=False)[:K]) for product in products]
    for side in ("qk", "ov"):
        assert abs(found[RANDOM][side]["null_effective_rank"] - np.mean(ranks)) < 4 * np.std(ranks) / 7


def test_p_is_that_of_random_mixtures(found):
    """Shares of Gaussian vectors with the covariance of the rows: as often beyond a head's share, to sampling error."""
    read, _ = contrasts(1)
    centred = ROWS[1].astype(np.float64) - ROWS[1].mean(0)
    drawn = np.random.default_rng(0).normal(size=(4000, N)) @ centred
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    for direction in found[OTHER]["qk"]["directions"]:
        for name, span in read.items():
            null = np.square(drawn @ span).sum(1)
            expected = (null >= direction["read"]["shares"][name]).mean()
            assert abs(direction["read"]["p"][name] - expected) < 4 * np.sqrt(0.25 / head_spectra.N_MIXTURES) + 0.01


# What it says of planted heads ----------------------------------------------------------------------------------------


def outcomes(entry):
    return {row["predicate"]: row["outcome"] for row in entry["reading"]}


def test_reading_of_planted_heads(found):
    planted, copying = outcomes(found[PLANTED]), outcomes(found[COPYING])
    assert planted[reading_table.OV_ALIGNS] == planted[reading_table.QK_SIMPLE] == "supported"
    assert planted[reading_table.OV_FLAT] == "not supported"
    for place in (RANDOM, OTHER):
        random = outcomes(found[place])
        assert random[reading_table.OV_ALIGNS] != "supported"
        assert random[reading_table.QK_SIMPLE] == "not supported"  # for its rank alone
    assert copying[reading_table.OV_FLAT] == "not supported"
    close(found[COPYING]["ov"]["flatness"], 1)
    assert found[COPYING]["ov"]["copying_score"] > reading_table.COPIES
    assert {direction["tied_with"] for direction in found[COPYING]["ov"]["directions"]} == {K - 1}


def test_roles_and_order(found):
    assert list(found) == list(CLAIMED)
    assert found[PLANTED]["claimed_as"] == ["mover", "other"]
    assert found[RANDOM]["claimed_as"] == []
    joint = [row for row in found[PLANTED]["reading"] if row["predicate"] == reading_table.BOTH_ALIGN]
    assert [row["outcome"] for row in joint] == ["supported", "not supported"]
    assert reading_table.BOTH_ALIGN not in outcomes(found[RANDOM])


def test_zero_and_broken_heads(found):
    json.dumps(list(found.values()), allow_nan=False)
    assert outcomes(found[ZERO])[reading_table.OV_ALIGNS] == outcomes(found[ZERO])[reading_table.QK_SIMPLE]
    assert outcomes(found[ZERO])[reading_table.OV_FLAT] == outcomes(found[ZERO])[reading_table.OV_ALIGNS]
    assert set(outcomes(found[ZERO]).values()) == {"not supported"}
    assert set(outcomes(found[BROKEN]).values()) == {"undetermined"}
    for place in (ZERO, BROKEN):
        assert found[place]["symmetry"]["agree"] is None
        assert found[place]["qk"]["directions"][0]["read"]["top"] == []
    assert found[BROKEN]["ov"]["singular_values"] == [None] * K


def test_same_key_same_answer(found):
    assert spectra() == list(found.values())


def test_grouped_biased_rotary_models():
    """QK is that of the mean offset, with the keys of the group, and so is its null: pairs (i, i + K/2) turn."""
    config = cj.TransformerConfig(
        n_layers=L, n_heads=4, d_model=D, d_head=K, n_vocab=V, n_context=2 * T, positions="rotary",
        n_kv_heads=2, bias=True, norm="layer", qk_norm=True,
    )  # fmt: skip
    weights = CircuitWeights.from_params(config, cj.init_params(config, KEY))
    (entry,) = spectra(weights, claimed={(1, 3): []}, n=1)
    json.dumps(entry, allow_nan=False)
    angles = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(K // 2) / K)
    c, s = np.cos(angles).mean(0), np.sin(angles).mean(0)

    def spectrum(w_q, w_k):
        a, b = np.split(np.asarray(w_q, np.float64), 2, axis=1)
        turned = np.concatenate([a * c - b * s, b * c + a * s], 1)
        return np.linalg.svd(turned @ np.asarray(w_k, np.float64).T, compute_uv=False)[:K]

    close(entry["qk"]["singular_values"], spectrum(weights.W_Q[1, 3], weights.W_K[1, 1]))
    ranks = [effective_rank(spectrum(gaussian(seed, D, K), gaussian(seed + 500, D, K))) for seed in range(200)]
    assert abs(entry["qk"]["null_effective_rank"] - np.mean(ranks)) < 4 * np.std(ranks) / 7
    assert entry["qk"]["null_effective_rank"] < 0.95 * entry["ov"]["null_effective_rank"]


# Symmetry -------------------------------------------------------------------------------------------------------------


def with_qk(*matrices):
    """One layer of heads with these W_QK over orthogonal tokens (the first half of the stream) and positions."""
    basis = np.eye(2 * T, dtype=np.float32)
    w_q = np.stack(matrices)[None].astype(np.float32)
    identity = np.broadcast_to(basis, w_q.shape)
    return CircuitWeights(
        W_E=basis[:T], W_P=basis[T:], W_U=basis[:, :T], W_Q=w_q, W_K=identity, W_V=identity, W_O=identity
    )


def test_the_rule_is_put_to_the_test():
    """Matching of tokens is symmetric, the previous position is not: wrong twice. |i - j| = 1 is: right once."""
    zeros, eye, shift = np.zeros((T, T)), np.eye(T), np.eye(T, k=-1)
    kinds = {
        "same token": (np.block([[eye, zeros], [zeros, zeros]]), "positional", "content"),
        "previous": (np.block([[zeros, zeros], [zeros, shift]]), "content", "positional"),
        "neighbours": (np.block([[zeros, zeros], [zeros, shift + shift.T]]), "positional", "positional"),
        "cyclic map": (np.block([[np.roll(eye, 1, 0), zeros], [zeros, zeros]]), "content", "content"),
        "both": (np.block([[eye, zeros], [zeros, eye]]), "positional", "mixed"),
    }
    weights = with_qk(*(matrix for matrix, *_ in kinds.values()))
    splits = head_spectra.symmetries(weights, T, KEY)
    for split, (matrix, rule, energy) in zip(splits.values(), kinds.values(), strict=True):
        close(split["score"], np.trace(matrix @ matrix) / np.square(matrix).sum())
        assert (split["rule_says"], split["energy_says"]) == (rule, energy)
        assert split["agree"] == (None if energy == "mixed" else rule == energy)
    assert head_spectra.symmetry_rule(splits.values()) | {"auroc": None} == {
        "heads": 4, "agreement": 0.5, "auroc": None,
    }  # fmt: skip
    assert head_spectra.symmetry_rule([splits[0, 4]]) == {"heads": 0, "agreement": None, "auroc": None}
    assert head_spectra.symmetry_rule([splits[0, 0]]) == {"heads": 1, "agreement": 0.0, "auroc": None}


def test_auroc_is_that_of_symmetry_for_positional_heads():
    kinds = [(0.9, "positional"), (0.3, "positional"), (0.5, "content"), (0.1, "content"), (-1.0, "mixed")]
    splits = [{"score": x, "energy_says": kind, "agree": None if kind == "mixed" else True} for x, kind in kinds]
    assert head_spectra.symmetry_rule(splits) == {"heads": 4, "agreement": 1.0, "auroc": 0.75}  # three of four pairs


def test_share_of_positions_agrees_with_plain_float64(found):
    embedded, w_p = WEIGHTS.W_E.astype(np.float64), WEIGHTS.W_P.astype(np.float64)

    def energy(rows, place):
        table = rows @ dense(place, "qk") @ rows.T
        return np.square(table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()).mean()

    for place in (RANDOM, OTHER):
        position, token = energy(embedded.mean(0) + w_p, place), energy(embedded, place)
        close(found[place]["symmetry"]["positional_share"], position / (position + token))


# The reading table, entry by entry ------------------------------------------------------------------------------------


def circuit(rank=2.0, share=0.9, p=0.004, written_p=0.004, sigma=1.0, copying=0.0):
    side = lambda p: {"shares": {"a": share, "b": 0.1}, "chance": {"a": 0.2, "b": 0.2}, "p": {"a": p, "b": 0.9}}  # noqa: E731
    return {
        "effective_rank": rank, "null_effective_rank": 10.0, "copying_score": copying,
        "directions": [{"sigma": sigma, "read": side(p), "written": side(written_p)}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("qk", "ov", "expected"),
    [
        ({}, {}, ("supported", "supported", "not supported")),
        ({"rank": 5.1}, {"rank": 5.1}, ("supported", "undetermined", "undetermined")),
        ({"rank": 9.1}, {"rank": 9.1}, ("supported", "not supported", "supported")),
        ({"rank": 4.9}, {"rank": 9.1, "copying": 0.6}, ("supported", "supported", "not supported")),
        ({"p": 0.03}, {"p": 0.03}, ("undetermined", "undetermined", "not supported")),  # twice .03 is above .05
        ({"written_p": 0.03}, {"written_p": 0.03}, ("undetermined", "undetermined", "not supported")),
        ({"share": 0.19, "p": 0.6}, {"share": 0.19, "p": 0.6}, ("not supported", "not supported", "not supported")),
        ({"share": 0.21, "p": 0.6}, {"copying": -0.6}, ("supported", "undetermined", "not supported")),
    ],
)
def test_reading_table(qk, ov, expected):
    rows = reading_table.reading(circuit(**qk), circuit(**ov), [])
    assert tuple(row["outcome"] for row in rows) == expected
    assert all(row["evidence"] for row in rows)


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (Claimed("r", "yes", 0.05, "yes", 0.05), "supported"),
        (Claimed("r", "yes", 0.051, "yes", 0.001), "undetermined"),
        (Claimed("r", "yes", 0.001, "undetermined", 0.001), "undetermined"),
        (Claimed("r", "undetermined", 0.001, "no", 0.001), "not supported"),
    ],
)
def test_both_halves_have_to_align_and_to_stand_out(role, expected):
    assert reading_table.reading(circuit(), circuit(), [role])[-1]["outcome"] == expected


def test_bad_input():
    for arguments, message in (
        ({"rows": ROWS[0]}, r"rows must be \[2,N,24\]; got \[600, 24\]"),
        ({"labels": {"name": LABELS["name"][:-1]}}, r"labels\['name'\] must be \[600\], one a row; got \[599\]"),
        ({"labels": {"name": np.zeros(N, int)}}, r"labels\['name'\] must hold at least two classes; got \[0\]"),
        ({"answers": {"name": np.array([[V], [0]])}}, r"answers\['name'\] must be \[C,m\] of tokens below 40"),
        ({"answers": {"name": np.array([[1], [-1]])}}, r"answers\['name'\] must hold tokens for at least two classes"),
        ({"claimed": {(0, H): []}}, "claimed must name heads of 2 layers of 3; got 0.3"),
        ({"n": K + 1}, "n must be between 1 and 4; got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            spectra(**arguments)
