"""From evidence to verdicts: is a head what a claim says it is?

Two halves, each asked in three ways. A head is "supported" in its role when all predicates hold, "not supported" when
one is shown not to, and "undetermined" else: a half that is missing is never made up for by the other.

    predicate   holds when                                                                              establishes
    task        the right answer is preferred to the wrong one, LIMITS["task"] of the time              what to ask
    QK          the key is preferred by LIMITS["preference"] logits and beyond permuted labels, or the  structure
                same (or another) class is, beyond heads turned at random too
    OV          what is moved points to its answers beyond heads turned at random and permuted labels,  structure
                or arrives at all beyond permuted labels
    attends     attention from query to key exceeds that to what the key is held against, and chance    realised
    uses QK     with the direction swapped at k (at q), attention to the key falls and so does the      causal
                logit difference, by LIMITS["qk"] of it
    uses OV     with the class at v swapped, the logit difference falls by LIMITS["ov"] of itself       causal

Structure is judged at a false discovery rate of RATE over all heads and roles of the claim; by directions where heads
read them or as the embedding holds them, whichever is clearer (p times two). Effects are judged by 95 % intervals over
prompts; for a claim that a head works against the answer, by rises.

The limits were fixed on seeds that no report uses; see LOG.md. The null of the covariance takes no part in a verdict
(see heads/alignment.py), but in reports/reading_table.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.heads.alignment import Aligned
from circuits_jax.heads.calibration import proportion_interval
from circuits_jax.heads.claims import Claim, Role
from circuits_jax.heads.nulls import benjamini_hochberg
from circuits_jax.heads.role_effects import Seen
from circuits_jax.heads.role_evidence import Behaviour, Structures

Evidence = TypeVar("Evidence")
Outcome = Literal["yes", "no", "undetermined"]
LIMITS = {"task": 0.75, "preference": 0.5, "attention": 0.05, "qk": 0.02, "ov": 0.09}
RATE = 0.05
NORMAL = 1.96
STRUCTURE = ("QK", "OV")
PREDICATES = ("task", *STRUCTURE, "attends", "uses QK", "uses OV")
BLOCKED, MOVED = 0.05, 0.1  # shares of the logit difference from which on a head is held to do a job


@dataclasses.dataclass(frozen=True)
class Finding:
    """Whether a predicate holds, of which value, and its 95 % interval where it has one."""

    outcome: Outcome
    value: float
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one head in one role: {predicate: finding}, the verdict, and what weights alone say."""

    role: str
    layer: int
    head: int
    findings: Mapping[str, Finding]

    @property
    def outcome(self) -> str:
        """ "supported", "not supported" or "undetermined"."""
        return summed_up(self.findings)

    @property
    def structural(self) -> str:
        """The same of both structural halves alone: what no activation has a say in."""
        return summed_up({name: self.findings[name] for name in STRUCTURE})


def summed_up(findings: Mapping[str, Finding]) -> str:
    """Supported when all hold, not supported when one does not."""
    outcomes = {finding.outcome for finding in findings.values()}
    if outcomes == {"yes"}:
        return "supported"
    return "not supported" if "no" in outcomes else "undetermined"


def judge(claim: Claim, evidence: Structures, behaviours: Behaviour, places: np.ndarray) -> list[Verdict]:
    """Verdicts on every claimed head of one model.

    Args:
        claim: what is claimed.
        evidence, behaviours: of its roles, as NumPy arrays.
        places: int [n,2], whose effects were measured; every claimed head among them.
    """
    roles = tuple(claim.roles)
    n_layers, n_heads = evidence.read.preference.value.shape[1:]
    asked = [(r, place) for r, role in enumerate(roles) for place in claim.places(role, n_layers, n_heads)]
    index = {tuple(place): i for i, place in enumerate(places.tolist())}
    halves = {}
    for half in STRUCTURE:
        pairs = [half_evidence(claim.roles[roles[r]], half, evidence, r) for r, _ in asked]
        limits = [least(claim.roles[roles[r]], half) for r, _ in asked]
        best = [
            clearest(pair, place, limit, joins(claim.roles[roles[r]], half))
            for pair, (r, place), limit in zip(pairs, asked, limits, strict=True)
        ]
        p = np.array([min(1.0, 2 * part[1]) for part in best])
        against = np.array([least_p_against(pair, place) for pair, (_, place) in zip(pairs, asked, strict=True)])
        found, opposed = (np.asarray(benjamini_hochberg(jnp.asarray(x), RATE)) for x in (p, against))
        halves[half] = [
            _structural(value, *which) for (value, _), *which in zip(best, limits, found, opposed, strict=True)
        ]
    return [
        Verdict(
            roles[r],
            *place,
            {half: halves[half][i] for half in STRUCTURE}
            | behaviour(claim.roles[roles[r]], of_role(behaviours, r), place, index[place]),
        )
        for i, (r, place) in enumerate(asked)
    ]


def of_role(evidence: Evidence, r: int) -> Evidence:
    """The evidence of one role."""
    return jax.tree.map(lambda x: x[r], evidence)


def half_evidence(role: Role, half: str, evidence: Structures, r: int) -> list[Aligned]:
    """The statistic that decides a half, by directions as read and as embedded."""
    of_keys = "preference" if role.looks == "preference" else "matching"
    name = of_keys if half == "QK" else "moves"
    return [of_role(getattr(part, name), r) for part in (evidence.read, evidence.embedded)]


def least(role: Role, half: str) -> float:
    """The value that a half must reach, whatever its p."""
    return LIMITS["preference"] if half == "QK" and role.looks == "preference" else -np.inf


def joins(role: Role, half: str) -> bool:
    """Whether a half joins classes of two sides, which half of all random heads do beyond permuted labels."""
    return role.looks != "preference" if half == "QK" else role.to == "logits"


def clearest(pair: Sequence[Aligned], place: tuple[int, int], limit: float, joined: bool) -> tuple[float, float]:
    """Value and p of the clearer of two, of one that reaches the limit where there is one.

    The p is that of permuted labels; where classes are joined, that of turned heads if it is larger. What an earlier
    head erases leaves rounding, of whatever p.
    """

    def value_and_p(part: Aligned) -> tuple[float, float]:
        p = max(part.label_p[place], part.rotation_p[place]) if joined else part.label_p[place]
        return float(part.value[place]), float(p)

    return min(map(value_and_p, pair), key=lambda found: (found[0] < limit, found[1]))


def least_p_against(pair: Sequence[Aligned], place: tuple[int, int]) -> float:
    """The smaller p of two of the side that is not claimed, times two; 1 - p stands in for p."""
    return min(1.0, 2 * min(1.0 - float(part.label_p[place]) for part in pair))


def _structural(value: float, limit: float, found: bool, opposed: bool) -> Finding:
    if found and value >= limit:
        return Finding("yes", value)
    return Finding("no" if opposed and not found else "undetermined", value)


def behaviour(role: Role, seen: Behaviour, place: tuple[int, int], i: int) -> dict[str, Finding]:
    """The predicates that need activations, of one head: (layer, head) and its place among those disturbed."""
    n_right, n = int((seen.difference > 0).sum()), len(seen.difference)
    task = Finding(
        _beyond(LIMITS["task"], *proportion_interval(n_right, n)), n_right / n, proportion_interval(n_right, n)
    )
    attention = seen.attention[:, *place]
    advantage = interval(attention - np.maximum(seen.over[:, *place], seen.uniform))
    attends = Finding(_beyond(0.0, *advantage), float(np.mean(advantage)), advantage)
    name = "k" if role.looks == "preference" else "q"
    uses_qk = falls(role, seen, seen.by_direction[name], i)
    attention_falls = interval(attention - seen.by_direction[name].attention[i])
    looks_less = _beyond(LIMITS["attention"] * float(attention.mean()), *attention_falls)
    looks = Finding(_both(_beyond(LIMITS["qk"], *uses_qk), looks_less), float(np.mean(uses_qk)), uses_qk)
    uses_ov = interval(moved(role, seen, seen.by_direction["v"], i))
    moves = Finding(_beyond(LIMITS["ov"], *uses_ov), float(np.mean(uses_ov)), uses_ov)
    return {"task": task, "attends": attends, "uses QK": looks, "uses OV": moves}


def falls(role: Role, seen: Behaviour, changed: Seen, i: int) -> tuple[float, float]:
    """95 % interval of the share of the mean logit difference that is lost (won, where the head works against it)."""
    return interval(lost(role, seen, changed, i))


def lost(role: Role, seen: Behaviour, changed: Seen, i: int) -> np.ndarray:
    """The same of each prompt; NaN for a model that prefers the wrong answer, which loses none."""
    whole = seen.difference.mean()
    return np.asarray(-role.effect * changed.difference[i] / (whole if whole > 0 else np.nan))


def moved(role: Role, seen: Behaviour, changed: Seen, i: int) -> np.ndarray:
    """What a head moves when another class is put for a prompt's, as a share of the mean logit difference.

    To the logits: by how much the class's own logit falls against the other's (rises, for a head that lowers what it
    moves). To others: the fall of the logit difference.
    """
    if role.to != "logits":
        return lost(role, seen, changed, i)
    whole = seen.difference.mean()
    return np.asarray(-role.sign * changed.own[i] / (whole if whole > 0 else np.nan))


def interval(values: np.ndarray | Array) -> tuple[float, float]:
    """95 % interval of a mean over prompts."""
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    return float(mean - NORMAL * error), float(mean + NORMAL * error)


def _beyond(limit: float, low: float, high: float) -> Outcome:
    return "yes" if low > limit else "no" if high <= limit else "undetermined"


def _both(a: Outcome, b: Outcome) -> Outcome:
    return "no" if "no" in (a, b) else "yes" if a == b == "yes" else "undetermined"


def truth(role: Role, seen: Behaviour, place: tuple[int, int], i: int) -> bool:
    """Does the head do the job? By other means than the verdict's: real prompts and blocked attention, no direction.

    True where the model does the task, the head looks at the key more than at what it is held against and than chance,
    blocking that costs BLOCKED of the mean logit difference (wins it, for a head that works against the answer), and
    the value of a real prompt in which the variable differs moves MOVED of it.
    """
    attention = seen.attention[:, *place]
    looks = attention.mean() > max(seen.over[:, *place].mean(), seen.uniform.mean())
    if (seen.difference > 0).mean() < LIMITS["task"] or not looks:
        return False
    blocked = lost(role, seen, seen.blocked, i).mean()
    return bool(blocked >= BLOCKED and moved(role, seen, seen.by_counterfactual, i).mean() >= MOVED)
