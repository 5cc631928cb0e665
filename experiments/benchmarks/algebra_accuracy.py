"""How exact the numbers of algebra.py are: a slow float64 oracle, and errors relative to the largest value of a head.

An outcome is a list of NumPy arrays with the heads that were done on axis 0: singular values or eigenvalues [heads,K];
U [heads,D,K], S, V for an SVD; and for composition one array [3,L,H,L,H] with Q, K and V.
"""

from collections.abc import Sequence

import numpy as np
from algebra_contenders import Outcome
from scipy.optimize import linear_sum_assignment

import circuits_jax as cj

Factors = tuple[np.ndarray, np.ndarray]


def oracle(task: str, weights: cj.CircuitWeights, heads: Sequence[int]) -> np.ndarray:
    """The truth in float64, head by head and plainly: [heads,K], or [3,heads,heads] for composition."""
    if task == "composition":
        return _composition(weights, heads)
    circuits = (_factors(task, weights, head) for head in heads)
    if task.startswith("full_"):
        read = np.asarray(weights.W_E, np.float64)
        write = np.asarray(weights.W_U, np.float64) if "ov" in task else read.T
        circuits = ((read @ left, right @ write) for left, right in circuits)
    if "eigenvalue" in task:
        return np.stack([np.linalg.eigvals(right @ left) for left, right in circuits])
    triangles = ((np.linalg.qr(left)[1], np.linalg.qr(right.T)[1]) for left, right in circuits)
    return np.stack([np.linalg.svd(a @ b.T, compute_uv=False) for a, b in triangles])


def _factors(task: str, weights: cj.CircuitWeights, head: int) -> Factors:
    place = divmod(head, weights.W_Q.shape[1])
    left, right = (weights.W_Q, weights.W_K.mT) if "qk" in task else (weights.W_V, weights.W_O)
    return np.asarray(left[place], np.float64), np.asarray(right[place], np.float64)


def _composition(weights: cj.CircuitWeights, heads: Sequence[int]) -> np.ndarray:
    """D x D matrices, as the definition has them."""
    truth = np.zeros((3, len(heads), len(heads)))
    whole = {task: [np.matmul(*_factors(task, weights, head)) for head in heads] for task in ("ov", "qk")}
    layers = [head // weights.W_Q.shape[1] for head in heads]
    for a, sends in enumerate(whole["ov"]):
        for b in range(len(heads)):
            if layers[a] < layers[b]:
                for mode, reads in enumerate((whole["qk"][b], whole["qk"][b].T, whole["ov"][b])):
                    lengths = np.linalg.norm(sends) * np.linalg.norm(reads)
                    truth[mode, a, b] = np.linalg.norm(sends @ reads) / lengths
    return truth


def errors(
    task: str,
    outcome: Outcome,
    done: Sequence[int],
    truth: np.ndarray,
    heads: Sequence[int],
    weights: cj.CircuitWeights,
) -> np.ndarray:
    """The largest error of each head of the oracle that was done; for composition, of each sender.

    For an SVD the errors of singular values, of the entries of U S V^T, and of the orthonormality of U and V.
    """
    if task == "composition":
        places = [divmod(head, weights.W_Q.shape[1]) for head in heads]
        values = np.array([[outcome[0][(slice(None), *a, *b)] for b in places] for a in places]).transpose(2, 0, 1)
        return np.abs(values - truth).max((0, 2)) / truth.max()
    row_of = {head: row for row, head in enumerate(done)}
    rows = [row_of[head] for head in heads if head in row_of]
    worst = distances(_values(task, outcome)[rows], truth[[head in row_of for head in heads]])
    if not task.endswith("svd"):
        return worst
    for place, row in enumerate(rows):
        u, s, v = (x[row].astype(np.float64) for x in outcome)
        whole = np.matmul(*_factors(task, weights, done[row]))
        skew = (np.abs(x.T @ x - np.eye(len(s))).max() for x in (u, v))
        worst[place] = max(worst[place], np.abs(u * s @ v.T - whole).max() / s[0], *skew)
    return worst


def difference(task: str, ours: Outcome, theirs: Outcome, heads: Sequence[int]) -> float:
    """Largest difference on all heads that they did, which are these; ours are all."""
    if task == "composition":
        return float(np.abs(ours[0] - theirs[0]).max() / theirs[0].max())
    return float(distances(_values(task, ours)[list(heads)], _values(task, theirs)).max())


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest |a - b| / max |b| of each head, for [heads,K]; eigenvalues, which have no order, matched one to one."""
    found = []
    for x, y in zip(a, b, strict=True):
        gap = np.abs(x - y)
        if np.iscomplexobj(x):
            gaps = np.abs(x[:, None] - y)
            gap = gaps[linear_sum_assignment(gaps)]
        found.append(gap.max() / np.abs(y).max())
    return np.array(found)


def _values(task: str, outcome: Outcome) -> np.ndarray:
    return outcome[1 if task.endswith("svd") else 0]
