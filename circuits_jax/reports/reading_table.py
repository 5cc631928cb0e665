"""The reading table: what spectra of a head are commonly read as, as predicates that can hold or not.

All of it is of weights: no predicate says that inputs make a head do anything (heads/claim_verdicts.py asks that).
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

ALPHA = 0.05
LOW_RANK = 0.5  # of a random head's effective rank: half of what it could use is left unused
FLAT = 0.9  # of a random head's effective rank: as good as flat; random heads stay above it
COPIES = 0.5  # size of the copying score: of real eigenvalues, three quarters have its sign

OV_ALIGNS = "OV top direction aligns with task tokens: structurally encodes the copy or suppress claim"
QK_SIMPLE = "QK is of low rank with interpretable directions: a simple attention rule"
OV_FLAT = "OV spectrum is flat: distributed, unless it copies on its K dimensions"
BOTH_ALIGN = "QK and OV both align: strong structural corroboration"


class Claimed(NamedTuple):
    """What weights say of a head in a claimed role, half by half.

    Attributes:
        role: its name.
        qk, ov: "yes", "no" or "undetermined".
        qk_p, ov_p: against directions drawn from the covariance of what the layer reads.
    """

    role: str
    qk: str
    qk_p: float
    ov: str
    ov_p: float


def reading(qk: Mapping[str, Any], ov: Mapping[str, Any], claimed: Sequence[Claimed]) -> list[dict[str, str]]:
    """What spectra are commonly read as, predicate by predicate, with what speaks for it.

    A direction is aligned where its share of a variable, on both sides, exceeds those of random mixtures (ALPHA over
    the number of variables), and is not where it does not even exceed that of uniform directions. Only the first
    direction is judged.

    Args:
        qk, ov: of one head, as in spectra_of_heads.
        claimed: its roles; the last predicate is asked once for each.

    Returns:
        [{"predicate", "outcome": "supported", "not supported" or "undetermined", "evidence"}].
    """
    of_ov, seen_ov = _aligned(ov["directions"][0], same=True)
    of_qk, seen_qk = _aligned(qk["directions"][0], same=False)
    (qk_rank, qk_null), (ov_rank, ov_null) = (
        (_value(side["effective_rank"]), side["null_effective_rank"]) for side in (qk, ov)
    )
    copying = _value(ov["copying_score"])
    low = _outcome(qk_rank <= LOW_RANK * qk_null, qk_rank >= FLAT * qk_null)
    copies = abs(copying) >= COPIES
    flat = _outcome(ov_rank >= FLAT * ov_null and not copies, ov_rank <= LOW_RANK * ov_null or copies)
    rows = [
        (OV_ALIGNS, of_ov, seen_ov),
        (QK_SIMPLE, _all(low, of_qk), f"effective rank {qk_rank:.1f}, random heads {qk_null:.1f}; {seen_qk}"),
        (OV_FLAT, flat, f"effective rank {ov_rank:.1f}, random heads {ov_null:.1f}; copying score {copying:.2f}"),
    ]
    for role in claimed:
        stands_out = _outcome(max(role.qk_p, role.ov_p) <= ALPHA, never=False)
        halves = (_outcome(half == "yes", half == "no") for half in (role.qk, role.ov))
        p = f"p {role.qk_p:.3f} and {role.ov_p:.3f} against the covariance of what is read"
        rows.append((BOTH_ALIGN, _all(*halves, stands_out), f"{role.role}: QK {role.qk}, OV {role.ov}; {p}"))
    return [dict(zip(("predicate", "outcome", "evidence"), row, strict=True)) for row in rows]


def _aligned(direction: Mapping[str, Any], same: bool) -> tuple[str, str]:
    """Whether both sides of a direction are aligned, with the same variable or any, and with which."""
    read, written = direction["read"], direction["written"]
    pairs = [pair for pair in product(read["shares"], written["shares"]) if not same or pair[0] == pair[1]]
    if not pairs:
        return "undetermined", "no variable is known on both sides"
    if not direction["sigma"]:
        return ("undetermined", "weights are not finite") if direction["sigma"] is None else ("not supported", "zero")
    p = {(a, b): max(read["p"][a], written["p"][b]) for a, b in pairs}
    n_variables = len({a for a, _ in pairs})
    above = any(read["shares"][a] > read["chance"][a] and written["shares"][b] > written["chance"][b] for a, b in pairs)
    best = min(pairs, key=lambda pair: p[pair])
    said = [
        f"{verb} {name} with share {side['shares'][name]:.2f} (chance {side['chance'][name]:.2f})"
        for verb, side, name in zip(("reads", "writes"), (read, written), best, strict=True)
    ]
    outcome = _outcome(p[best] * n_variables <= ALPHA, not above)
    return outcome, f"first direction {' and '.join(said)}; p {p[best]:.3f} (times {n_variables})"


def _outcome(holds: bool, never: bool) -> str:
    return "supported" if holds else "not supported" if never else "undetermined"


def _all(*outcomes: str) -> str:
    return _outcome(set(outcomes) == {"supported"}, "not supported" in outcomes)


def _value(number: float | None) -> float:
    return float("nan") if number is None else number
