"""Planted circuits in the coordinates of the stream's subspaces, before any basis, noise or gauge; static NumPy."""

import math

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from circuits_jax.models.planted_recipes import OV_MOVES, ROTARY_BASE, ROTARY_DIM, SENDERS, PlantedHead, Recipe

Matrix = NDArray[np.float64]

# What a head writes that later heads need has length 1; the rest is small, so that a model full of heads stays clean.
BYSTANDER_LENGTH = 0.1


def spaces_of(recipe: Recipe) -> dict[str, slice]:
    """The coordinates of each subspace."""
    ends = np.cumsum(list(recipe.sizes.values()))
    return {name: slice(end - size, end) for (name, size), end in zip(recipe.sizes.items(), ends, strict=True)}


def touches(recipe: Recipe, head: PlantedHead) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
    """The subspaces of both factors of the QK and of the OV side; those of a rotated side before it is rotated."""
    qk = ("token", "token") if head.qk == "rotated" else recipe.reads(head)
    ov = ("token", "output") if head.ov == "rotated" else OV_MOVES.get(head.ov)
    return qk, ov


def factors_of(recipe: Recipe) -> Matrix:
    """Factors [2,2,L,H,N,K] of all heads, before token maps and rotations."""
    spaces, k = spaces_of(recipe), recipe.d_head
    n_layers, n_heads = len(recipe.heads), len(recipe.heads[0])
    core = np.zeros((2, 2, n_layers, n_heads, sum(recipe.sizes.values()), k))
    for layer, head in np.ndindex(n_layers, n_heads):
        planted = recipe.heads[layer][head]
        sizes = recipe.strength * planted.qk_gain * math.sqrt(k), _length(recipe, layer, planted)
        # Under rotary positions tokens keep to the components that are not rotated.
        touched = touches(recipe, planted)
        start = ROTARY_DIM if recipe.positions == "rotary" and touched[0] != ("const", "const") else 0
        for side, names in enumerate(touched):
            if names is None:
                continue
            blocks = _ov_blocks(recipe, planted) if side else _qk_blocks(recipe, planted)
            for factor, (name, block) in enumerate(zip(names, blocks, strict=True)):
                first = 0 if side else start
                columns = slice(first, first + block.shape[1])
                core[side, factor, layer, head, spaces[name], columns] = math.sqrt(sizes[side]) * block
    return core


def _qk_blocks(recipe: Recipe, head: PlantedHead) -> tuple[Matrix, Matrix]:
    """What the two subspaces are read with, [r_q,n] and [r_k,n]: the score of a target is 1, of all else 0."""
    tokens, positions = np.eye(recipe.n_vocab), np.eye(recipe.sizes["position"])
    if head.qk == "content":
        tokens[-1] = 0.0
    if head.qk in ("duplicate_token", "content", "rotated") or (head.qk, head.mechanism) == ("induction", "k"):
        return tokens, tokens
    if head.qk == "induction":
        # A pointer is the mean of the own position and of the copy's: each counts half.
        return 2.0 * _shift(recipe, -1), positions
    if head.qk == "first_token":
        start = tokens[-1:] if recipe.positions == "rotary" else position_vectors(recipe)[:1]
        return np.ones((1, 1)), start.T
    if recipe.positions == "rotary":
        return _rotary_vectors(recipe, offset_of(head))
    return _shift(recipe, offset_of(head)), positions


def _ov_blocks(recipe: Recipe, head: PlantedHead) -> tuple[Matrix, Matrix]:
    """What moves one subspace into another, [r_v,n] and [r_o,n]: by unit length."""
    if head.ov == "extracting":
        return np.ones((recipe.n_vocab, 1)), np.ones((1, 1))
    identity = np.eye(recipe.sizes["position" if head.ov == "send_pointer" else "token"])
    return identity, -identity if head.ov in ("suppressing", "erase") else identity


def _length(recipe: Recipe, layer: int, head: PlantedHead) -> float:
    """How long a head writes a unit vector: senders of one kind in a layer share one length of 1."""
    if head.ov not in SENDERS or not head.moves:
        return BYSTANDER_LENGTH * head.ov_gain
    return head.ov_gain / sum(other.ov == head.ov and other.moves for other in recipe.heads[layer])


def offset_of(head: PlantedHead) -> int:
    """How many positions back a positional head looks."""
    return {"same_position": 0, "previous_token": 1}.get(head.qk, head.offset)


def _frequencies(recipe: Recipe) -> Matrix:
    """pi (f + 1/2) / F, f < F: (1/F) sum_f cos(w_f d) is 1 at d = 0 and exactly 0 at all other |d| < 2F."""
    n = recipe.sizes["position"] // 2
    return np.pi * (np.arange(n) + 0.5) / n


def position_vectors(recipe: Recipe) -> Matrix:
    """[T, dimensions of the position subspace], orthonormal rows: one-hot or sinusoidal."""
    if recipe.positions != "sinusoidal":
        return np.eye(recipe.n_context)
    angles = np.outer(np.arange(recipe.n_context), _frequencies(recipe))
    return np.concatenate([np.cos(angles), np.sin(angles)], 1) / math.sqrt(angles.shape[1])


def _shift(recipe: Recipe, offset: int) -> Matrix:
    """The matrix that takes the vector of position i to that of i - offset, or to 0 where there is no such position.

    Sinusoidal ones have no end: there it takes position 0 to a vector that is minus the one of position 2F - offset.
    """
    if recipe.positions != "sinusoidal":
        return np.eye(recipe.n_context, k=-offset)
    angles = _frequencies(recipe) * offset
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


def rotary_waves(recipe: Recipe) -> Matrix:
    """[T,dim]: (cos w_p d, -sin w_p d) of the pairs p at the offsets d < T."""
    frequencies = ROTARY_BASE ** (-np.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)
    angles = np.outer(np.arange(recipe.n_context), frequencies)
    return np.concatenate([np.cos(angles), -np.sin(angles)], 1)


def rotary_weights(recipe: Recipe, offset: int) -> Matrix:
    """[dim]: the smallest c for which the profile waves @ c is higher by 1 or more at the offset than at all others.

    Least distance programming through non-negative least squares (Lawson & Hanson 1974, chapter 23).
    """
    waves = rotary_waves(recipe)
    margins = np.delete(waves[offset] - waves, offset, axis=0)
    system = np.vstack([margins.T, np.ones(len(margins))])
    target = np.append(np.zeros(ROTARY_DIM), 1.0)
    residual = system @ scipy.optimize.nnls(system, target)[0] - target
    return -residual[:-1] / residual[-1]


def _rotary_vectors(recipe: Recipe, offset: int) -> tuple[Matrix, Matrix]:
    """What const is read with by q and k, [1,dim] each: sum_p (q_p turned by w_p d) k_p is the profile at offset d."""
    real, imaginary = rotary_weights(recipe, offset).reshape(2, -1)
    size = np.sqrt(np.hypot(real, imaginary))
    pairs = np.stack([real, imaginary]) / np.maximum(size, 1e-12), np.stack([size, np.zeros_like(size)])
    q, k = (x.reshape(1, -1) if recipe.rotary_pairs == "half" else x.T.reshape(1, -1) for x in pairs)
    return q, k
