"""The prompts on which a claim is judged, and its roles as arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from circuits_jax.heads.claims import Claim, Role
from circuits_jax.heads.role_rows import Asked, Pairs, Prompts, Questions
from circuits_jax.tasks.agreement import CONSTRUCTIONS, Agreement
from circuits_jax.tasks.batch import Batch, sample_batch
from circuits_jax.tasks.ioi import IOI

Task = IOI | Agreement


def claim_prompts(task: Task, claim: Claim, key: Array, n: int, n_estimation: int) -> Prompts:
    """Draws n prompts to judge and n_estimation of each other kind; roles are in the order of claim.roles.

    Half of the names or nouns is held out: what sets a position apart, and a number, is estimated with words that are
    never judged. In judged sentences of subject-verb agreement the attractor has the other number, so that nothing but
    the subject tells the answer.

    Raises:
        ValueError: the claim asks for a position, a variable or a construction that the task does not have.
    """
    if isinstance(task, Agreement):
        task = with_constructions(task, claim.constructions)
    elif claim.constructions:
        raise ValueError(f"constructions are of subject-verb agreement; the claim {claim.name!r} is about {claim.task}")
    outside, inside = task.halves()
    known_key, pairs_key, judged_key, change_key = jax.random.split(key, 4)
    known = sample_batch(outside, known_key, 0, n_estimation)
    judged = sample_batch(_judged_task(inside), judged_key, 0, n)
    roles = tuple(claim.roles.items())
    for name, variable in claim.variables.items():
        if unknown := [position for position in variable.positions if position not in judged.positions]:
            raise ValueError(f"positions of {name!r} must be positions of {claim.task}; got {', '.join(unknown)}")
    for name, role in roles:
        _check(claim, name, role, inside, judged)
    classes = {name: variable.classes for name, variable in claim.variables.items()}
    tables = [inside.answers.get(classes[role.moves]) for _, role in roles]
    n_classes = max(n for name in classes.values() for n in (_n_classes(inside, name), _n_classes(outside, name)))
    width = max([table.shape[1] for table in tables if table is not None], default=1)

    def padded(table: Array | None) -> np.ndarray:
        out = np.full((n_classes, width), -1)
        if table is not None:
            out[: table.shape[0], : table.shape[1]] = table
        return out

    def pairs(role: Role, variable: str) -> Pairs:
        of = inside if classes[variable] in inside.word_classes else outside
        before = sample_batch(of, pairs_key, 0, n_estimation)
        return _pairs(of, before, classes[variable], role, jax.random.fold_in(pairs_key, 1))

    questions = Questions(
        known=_stacked([_asked(role, known) for _, role in roles]),
        judged=_stacked([_asked(role, judged) for _, role in roles]),
        matched=_stacked([pairs(role, role.matches or role.moves) for _, role in roles]),
        moved=_stacked([pairs(role, role.moves) for _, role in roles]),
        changed=_stacked([_pairs(inside, judged, classes[role.moves], role, change_key) for _, role in roles]),
        matches=jnp.array([role.looks != "preference" for _, role in roles]),
        to_logits=jnp.array([role.to == "logits" for _, role in roles]),
        sign=jnp.array([role.sign for _, role in roles]),
        matching_sign=jnp.array([-1 if role.looks == "avoiding" else 1 for _, role in roles]),
        answers=jnp.array([padded(table) for table in tables]),
        judged_matched=jnp.stack([judged.positions[classes[role.matches or role.moves]] for _, role in roles]),
    )
    return Prompts(known, judged, questions)


def _judged_task(task: Task) -> Task:
    return dataclasses.replace(task, congruent=0.0) if isinstance(task, Agreement) else task


def _pairs(task: Task, before: Batch, classes: str, role: Role, key: Array) -> Pairs:
    """Sentences, and the same with another class of one variable."""
    after = jax.vmap(lambda one, key: task.changed(one, classes, key))(
        before, jax.random.split(key, len(before.tokens))
    )
    where = before.positions
    return Pairs(
        before.tokens, after.tokens, where[classes], after.positions[classes], where[role.query], where[role.key]
    )


def with_constructions(task: Agreement, names: tuple[str, ...]) -> Agreement:
    """The task with the templates of these constructions alone; all if there are none."""
    if unknown := set(names) - set(CONSTRUCTIONS):
        raise ValueError(f"constructions must be some of {', '.join(CONSTRUCTIONS)}; got {', '.join(sorted(unknown))}")
    chosen = np.isin(task.construction, [CONSTRUCTIONS.index(name) for name in names or CONSTRUCTIONS])
    return dataclasses.replace(task, templates=task.templates[chosen], construction=task.construction[chosen])


def _n_classes(task: Task, classes: str) -> int:
    if classes in task.word_classes:
        return task.word_classes[classes]
    return len(task.answers[classes]) if classes in task.answers else 2


def _asked(role: Role, batch: Batch) -> Asked:
    where = batch.positions
    over = jnp.full_like(where[role.query], -1) if role.over == "elsewhere" else where[role.over]
    return Asked(where[role.query], where[role.key], over, where["template"])


def _stacked(asked: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *asked)


def _check(claim: Claim, name: str, role: Role, task: Task, batch: Batch) -> None:
    where = batch.positions
    for variable in (role.moves, role.matches):
        classes = claim.variables[variable].classes if variable else None
        if classes is not None and classes not in {*task.answers, *task.word_classes}:
            known = ", ".join({**task.answers, **task.word_classes})
            raise ValueError(f"classes of {variable!r} must be one of {known} in {claim.task}; got {classes!r}")
    if role.to == "logits" and claim.variables[role.moves].classes not in task.answers:
        raise ValueError(f"{name!r} moves {role.moves!r} to the logits, but no answers stand for its classes")
    for what in ("query", "key", "over"):
        position = getattr(role, what)
        if what == "over" and position == "elsewhere":
            continue
        if position not in where:
            raise ValueError(f"{what} of {name!r} must be a position of {claim.task}; got {position!r}")
        if (np.asarray(where[position]) < 0).any():
            raise ValueError(
                f"{what} of {name!r}: some sentences have no {position!r}; name constructions that have it"
            )
    if (np.asarray(where[role.key]) > np.asarray(where[role.query])).any():
        raise ValueError(f"{name!r} would look ahead, from {role.query} to {role.key}")
