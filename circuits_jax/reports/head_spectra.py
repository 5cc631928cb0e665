"""What QK and OV of claimed heads are made of, and what their spectra say: spectra and symmetry.

All of it is of weights. It says what heads prefer, not that inputs get there (heads/claim_verdicts.py asks that).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits import reading as read_by
from circuits_jax.circuits.attention import mean_qk, ov, visible_offsets
from circuits_jax.circuits.linear_algebra import einsum
from circuits_jax.circuits.low_rank import LowRank
from circuits_jax.circuits.spectra import SpectralSummary, eigenvalue_positivity, summarize, symmetry
from circuits_jax.circuits.token_space import token_ov
from circuits_jax.circuits.weights import CircuitWeights
from circuits_jax.heads import ideal_inputs as ideal
from circuits_jax.heads.calibration import auroc
from circuits_jax.heads.directions import covariance_directions
from circuits_jax.heads.nulls import Null, draw, norm_matched, z_score
from circuits_jax.heads.portraits import Dictionary, Directions, Portrait, portrait
from circuits_jax.heads.signatures import double_centred
from circuits_jax.heads.structure import cut_to_tokens, sample_tokens
from circuits_jax.reports.reading_table import Claimed, reading

N_TOKENS = 64  # through which the vocabulary is seen where tokens are scored against each other, as in classify_heads
N_SPECTRA = 64  # random heads; their effective ranks differ by few hundredths, so few tell the mean
N_MIXTURES = 512  # random directions: p down to 0.002, below reading_table.ALPHA for ten variables
SYMMETRIC = 0.5  # from which on a circuit is called symmetric: three quarters of ||W||^2 in its symmetric part
POSITIONAL, CONTENT = 0.67, 0.33  # two thirds of the energy decide what a head scores by; else it is mixed


class _Circuit(NamedTuple):
    """One circuit of a head."""

    portrait: Portrait
    summary: SpectralSummary
    singular_values: Array


def spectra_of_heads(
    weights: CircuitWeights,
    rows: Array,
    labels: Mapping[str, ArrayLike],
    answers: Mapping[str, ArrayLike],
    words: Callable[[int], str],
    claimed: Mapping[tuple[int, int], Sequence[Claimed]],
    length: int,
    key: Array,
    n: int = 4,
    k: int = 5,
) -> list[dict[str, Any]]:
    """Spectra, directions, symmetry and the reading table of some heads, as plain values for JSON (None for NaN).

    QK reads tokens as they are embedded, in a rotary model on average over the offsets within the length; OV reads
    the same and writes to the rows of W_U^T. Variables are the differences of class means of the rows, and for what
    OV writes those of the unembeddings of their answers.

    Args:
        weights: of the model.
        rows: [L,N,D] what each layer reads at the positions of prompts.
        labels: {variable: int [N]} the class of each row's prompt, -1 where the row is not at that variable's
            positions.
        answers: {variable: int [C,m]} tokens that stand for each class, -1 for none; of variables that have some.
        words: a token as text.
        claimed: {(layer, head): roles}, in this order; none for controls.
        length: T of the prompts.
        key: draws tokens and nulls.
        n, k: how many directions, and tokens at either end.

    Returns:
        For each head {"head", "claimed_as", "qk", "ov", "symmetry", "reading"}. A direction has sigma, how many others
        tie with it, and of what it reads and writes the tokens at both ends, {variable: share}, the share of uniform
        directions (chance) and p against random mixtures of what is there. For eigenvectors see heads/portraits.py.

    Raises:
        ValueError: rows, labels, answers or claimed do not fit the model or each other; n or k as portrait.
    """
    _check(weights, rows, labels, claimed)
    null_key, direction_key, symmetry_key = jax.random.split(key, 3)
    variables = {name: _class_means(name, rows, np.asarray(label)) for name, label in labels.items()}
    targets = {name: _answer_means(name, weights.W_U, np.asarray(tokens)) for name, tokens in answers.items()}
    places = np.array(list(claimed), int).reshape(-1, 2)
    measured = _measured(weights, rows, variables, targets, places, direction_key, length, n, k)
    heads, copying, read_nulls, written_null = jax.device_get(measured)
    qk_rank, ov_rank = (null.mean.effective_rank.item() for null in _null(weights, length, null_key))
    splits = symmetries(weights, length, symmetry_key)
    entries = []
    for i, (place, roles) in enumerate(claimed.items()):
        of_qk, of_ov = jax.tree.map(lambda x, i=i: x[i], heads)
        read_null = {name: x[place[0]] for name, x in read_nulls.items()}
        qk_side = _circuit(of_qk, qk_rank, (read_null, read_null), words)
        ov_side = _circuit(of_ov, ov_rank, (read_null, written_null), words) | {"copying_score": _number(copying[i])}
        entries.append(
            {
                "head": f"{place[0]}.{place[1]}",
                "claimed_as": [role.role for role in roles],
                "qk": qk_side,
                "ov": ov_side,
                "symmetry": splits[place],
                "reading": reading(qk_side, ov_side, roles),
            }
        )
    return entries


@partial(jax.jit, static_argnames=("length", "n", "k"))
def _measured(
    weights: CircuitWeights,
    rows: Array,
    variables: dict[str, Array],
    targets: dict[str, Array],
    places: Array,
    key: Array,
    length: int,
    n: int,
    k: int,
) -> tuple[tuple[_Circuit, _Circuit], Array, dict[str, Array], dict[str, Array]]:
    """QK and OV of heads [P], their copying scores [P], and shares of random mixtures of what is read [L,m], written.

    Heads in turn: the projections of all tokens are held of one.
    """
    embedded, unembedded = ideal.token_inputs(weights, length), weights.W_U.T
    asks, moves, on_tokens = _mean_qk(weights, length), ov(weights), token_ov(weights)
    written = Dictionary(unembedded, targets)

    def of_head(place: Array) -> tuple[_Circuit, _Circuit]:
        layer, head = place
        reads = Dictionary(embedded, {name: x[layer] for name, x in variables.items()})
        one, other = asks[layer, head], moves[layer, head]
        return (
            _Circuit(portrait(one, reads, reads, n, k), summarize(one), one.singular_values()),
            _Circuit(portrait(other, reads, written, n, k), summarize(other), other.singular_values()),
        )

    def shares(rows: Array, variables: dict[str, Array], key: Array) -> dict[str, Array]:
        """Of random mixtures of rows, as if heads read nothing else."""
        drawn = covariance_directions(rows, key, N_MIXTURES, 1)
        seen = Dictionary(rows[:1], variables)
        found = portrait(LowRank(drawn, drawn.mT), seen, seen, n=1, k=1).read.shares
        return {name: x[:, 0] for name, x in found.items()}

    written_key, *_ = keys = jax.random.split(key, len(rows) + 1)
    copying = eigenvalue_positivity(on_tokens[places[:, 0], places[:, 1]].eigenvalues())
    of_reads = jax.lax.map(lambda layer: shares(*layer), (rows, variables, keys[1:]))
    return jax.lax.map(of_head, places), copying, of_reads, shares(unembedded, targets, written_key)


def _mean_qk(weights: CircuitWeights, length: int) -> LowRank:
    return mean_qk(dataclasses.replace(weights, n_context=length))


@partial(jax.jit, static_argnames="length")
def _null(weights: CircuitWeights, length: int, key: Array) -> tuple[Null, Null]:
    """SpectralSummary of QK and of OV of random heads: of D, K and, in QK, what a mean over rotary offsets leaves."""
    one = jnp.ones_like(weights.W_Q[:1, :1])
    head = dataclasses.replace(weights, W_Q=one, W_K=one, W_V=one, W_O=one.mT)
    of_qk, of_ov = draw(
        lambda w: (summarize(_mean_qk(w, length)), summarize(ov(w))), head, norm_matched, key, N_SPECTRA
    ).draws
    return Null(of_qk), Null(of_ov)


def _class_means(name: str, rows: Array, labels: np.ndarray) -> Array:
    """Means of rows [L,N,D] over each class that occurs: [L,C,D]."""
    classes = np.unique(labels[labels >= 0])
    if len(classes) < 2:
        raise ValueError(f"labels[{name!r}] must hold at least two classes; got {classes.tolist()}")
    one_hot = (labels == classes[:, None]).astype(np.float32)
    return einsum("cn,lnd->lcd", one_hot / one_hot.sum(1, keepdims=True), rows)


def _answer_means(name: str, W_U: Array, answers: np.ndarray) -> Array:
    """Mean unembedding of the tokens of each class that has some: [C,D]."""
    n_vocab = W_U.shape[1]
    if answers.ndim != 2 or not np.all((answers >= -1) & (answers < n_vocab)):
        raise ValueError(
            f"answers[{name!r}] must be [C,m] of tokens below {n_vocab}, -1 for none; got {answers.tolist()}"
        )
    answers = answers[(answers >= 0).any(1)]
    if len(answers) < 2:
        raise ValueError(f"answers[{name!r}] must hold tokens for at least two classes; got {len(answers)}")
    there = answers >= 0
    share = (there / there.sum(1, keepdims=True)).astype(np.float32)
    return einsum("cm,dcm->cd", share, W_U[:, np.maximum(answers, 0)])


def _circuit(
    circuit: _Circuit,
    null_rank: float,
    null_shares: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    words: Callable[[int], str],
) -> dict[str, Any]:
    """One circuit of one head as plain values."""
    found, summary, singular_values = circuit

    def both(read: Directions, written: Directions, r: int) -> dict[str, Any]:
        sides = zip(("read", "written"), (read, written), null_shares, strict=True)
        return {name: _direction(side, r, shares, words) for name, side, shares in sides}

    eigenvalues = [[_number(value.real), _number(value.imag)] for value in found.eigenvalues]
    return {
        "singular_values": [_number(x) for x in singular_values],
        "effective_rank": _number(summary.effective_rank),
        "flatness": _number(summary.flatness),
        "null_effective_rank": null_rank,
        "directions": [
            {"sigma": _number(sigma), "tied_with": int(found.group_size[r]) - 1} | both(found.read, found.written, r)
            for r, sigma in enumerate(found.singular_values)
        ],
        "eigen": [
            {"value": value, "condition": _number(found.condition[r])} | both(found.eigen_right, found.eigen_left, r)
            for r, value in enumerate(eigenvalues)
        ],
    }


def _direction(
    side: Directions, r: int, null_shares: Mapping[str, np.ndarray], words: Callable[[int], str]
) -> dict[str, Any]:
    named = lambda ranked: [words(int(row)) for row in ranked.rows[r] if row >= 0]  # noqa: E731
    shares = {name: _number(x[r]) for name, x in side.shares.items()}
    return {
        "top": named(side.top),
        "bottom": named(side.bottom),
        "shares": shares,
        "chance": {name: _number(x[r]) for name, x in side.chance.items()},
        "p": {name: _p(share, null_shares[name]) for name, share in shares.items()},
    }


def _p(share: float | None, null: np.ndarray) -> float | None:
    return None if share is None else (1 + int((null >= share).sum())) / (1 + len(null))


def _number(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None


# --- symmetric = positional? ---


def symmetries(weights: CircuitWeights, length: int, key: Array) -> dict[tuple[int, int], dict[str, Any]]:
    """Of every head of the model: symmetry of W_QK, what its scores go by, and whether the rule says the same.

    The rule is the claim under test: symmetric = positional, asymmetric = content. What it is held against is the mean
    square of double-centred scores, position / (position + token), between positions of the mean token and between
    tokens; agree is None where neither kind has two thirds of it.

    Args:
        weights: of the model.
        length: T, the positions 0 ... T - 1.
        key: draws tokens and random heads.
    """
    token_key, null_key = jax.random.split(key)
    null, _ = _null(weights, length, null_key)
    ids = sample_tokens(token_key, len(weights.W_E), N_TOKENS, None)
    score, share = _symmetry_and_share(weights, ids, length)
    arrays = [np.asarray(x) for x in (score, share, z_score(score, Null(null.draws.symmetry[:, 0, 0])))]

    def of_head(place: tuple[int, ...]) -> dict[str, Any]:
        score, share, z = (float(x[place]) for x in arrays)
        rule = "positional" if score > SYMMETRIC else "content"
        energy = "positional" if share > POSITIONAL else "content" if share < CONTENT else "mixed"
        return {
            "score": _number(score),
            "null_z": _number(z),
            "positional_share": _number(share),
            "rule_says": rule,
            "energy_says": energy,
            "agree": None if energy == "mixed" else rule == energy,
        }

    n_layers, n_heads = score.shape
    return {place: of_head(place) for place in product(range(n_layers), range(n_heads))}


@partial(jax.jit, static_argnames="length")
def _symmetry_and_share(weights: CircuitWeights, ids: Array, length: int) -> tuple[Array, Array]:
    """Symmetry [L,H] and the share of positions in the energy [L,H], NaN for a head that scores by neither."""
    some = cut_to_tokens(weights, ids)
    tokens, positions = ideal.token_inputs(some, length), ideal.position_inputs(some, length)
    offsets = visible_offsets(length, weights.causal)
    tables = read_by.token_scores(some, tokens, tokens, offsets), read_by.position_scores(some, positions, positions)
    token, position = (jnp.square(double_centred(table)).mean((-2, -1)) for table in tables)
    return symmetry(_mean_qk(weights, length)), position / (position + token)


def symmetry_rule(splits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How often the rule is right, and how well any threshold on symmetry could do.

    Returns:
        {"heads", "agreement", "auroc"} over the heads whose scores go by one kind; None where there is none, and for
        auroc, the chance that a positional head is more symmetric than one of content, without both kinds.
    """
    decided = [split for split in splits if split["agree"] is not None]
    positional = np.array([split["energy_says"] == "positional" for split in decided], bool)
    score = np.array([split["score"] for split in decided], float)
    return {
        "heads": len(decided),
        "agreement": float(np.mean([split["agree"] for split in decided])) if decided else None,
        "auroc": _number(auroc(score, positional)),
    }


def _check(
    weights: CircuitWeights,
    rows: Array,
    labels: Mapping[str, ArrayLike],
    claimed: Mapping[tuple[int, int], Sequence[Claimed]],
) -> None:
    n_layers, n_heads, d_model = weights.W_Q.shape[:3]
    if rows.ndim != 3 or (rows.shape[0], rows.shape[2]) != (n_layers, d_model):
        raise ValueError(f"rows must be [{n_layers},N,{d_model}]; got {list(rows.shape)}")
    for name, label in labels.items():
        if np.shape(label) != rows.shape[1:2]:
            raise ValueError(f"labels[{name!r}] must be [{rows.shape[1]}], one a row; got {list(np.shape(label))}")
    for layer, head in claimed:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"claimed must name heads of {n_layers} layers of {n_heads}; got {layer}.{head}")
