"""Claims about circuits as data: which heads do what in a task, and how that should show in their weights.

A claim is a JSON file (claims/ has the shipped ones, load_claim reads any), for example:

    {
      "name": "Two roles of my own model",
      "task": "ioi",
      "model": "runs/mine",
      "source": "a look at attention patterns",
      "variables": {
        "IO": {"classes": "io_name", "positions": ["io"]},
        "S": {"classes": "s_name", "positions": ["s1", "s2"]}
      },
      "roles": {
        "S-inhibition": {"query": "end", "key": "s2", "moves": "S", "to": "heads"},
        "name mover": {
          "query": "end", "key": "io", "over": "s1", "looks": "avoiding", "matches": "S", "moves": "IO"
        }
      },
      "heads": {"S-inhibition": ["0.1"], "name mover": ["1.0", "1.3"]},
      "edges": [{"sender": "S-inhibition", "receiver": "name mover", "input": "q", "sign": -1}],
      "published": [
        {"score": "copying", "heads": ["1.0", "1.3"], "at_least": 0.95, "source": "as in GPT-2 small"}
      ]
    }

What is left out has the value that Role, Edge, Published and Claim give it.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

Task = Literal["ioi", "sva"]
Looks = Literal["preference", "matching", "avoiding"]
Target = Literal["logits", "stream", "heads"]
Input = Literal["q", "k", "v"]
Sign = Literal[1, -1]
Score = Literal["copying", "negative copying", "previous token", "duplicate token", "induction"]
EVERY = "every"
AVERAGE = "average"
Places = tuple[tuple[int, int], ...]
FOLDER = Path(__file__).parent.parent / "claims"


@dataclasses.dataclass(frozen=True)
class Variable:
    """A causal variable of the task.

    Attributes:
        classes: its name in Batch.positions, where each prompt's class stands, 0 to C - 1.
        positions: the names of the positions at which the prompt says it.
    """

    classes: str
    positions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Role:
    """What a head is said to do, half by half.

    Attributes:
        query, key: names of positions: from where it looks to where.
        over: the position that it is said to prefer the key to; "elsewhere" for the mean of all other visible ones.
        looks: what decides: "preference", something that the key has and the other position has not; "matching", the
            same class of a variable at query and key; "avoiding", another class.
        matches: the variable of "matching" and "avoiding".
        moves: the variable whose class at the key the head writes to the query.
        to: who reads it: "logits", the classes' own answer tokens; "heads", those of the claim's edges; "stream",
            whoever.
        sign: 1 where the class's own logit is raised, -1 where it is lowered. Of "heads" the edges say it.
        effect: 1 where the head helps the right answer, -1 where it works against it.
    """

    query: str
    key: str
    moves: str
    over: str = "elsewhere"
    looks: Looks = "preference"
    matches: str = ""
    to: Target = "logits"
    sign: Sign = 1
    effect: Sign = 1


@dataclasses.dataclass(frozen=True)
class Edge:
    """The senders' output is said to reach this input of the receivers; sign as of what it does to their scores."""

    sender: str
    receiver: str
    input: Input
    sign: Sign = 1


@dataclasses.dataclass(frozen=True)
class Published:
    """What has been reported of heads, for published.published_scores to find again.

    Attributes:
        score: which.
        heads: (layer, head) of those that each lie within the bounds; "average" for the mean over the model's heads.
        source: where that is reported, and what in it is our reading.
        at_least, at_most: bounds in [0, 1], both included.
    """

    score: Score
    heads: Places | str
    source: str
    at_least: float = 0.0
    at_most: float = 1.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """Roles, who is said to have them, and what is said to pass between them.

    Attributes:
        name, source: for people.
        task: indirect object identification or subject-verb agreement.
        model: of which it is claimed.
        variables, roles: by name.
        heads: (layer, head) by role; "every" asks each head of the model.
        edges: between roles.
        constructions: of subject-verb agreement: the sentences on which it is tested; all if empty.
        published: numbers that are known of the model.
    """

    name: str
    task: Task
    model: str
    source: str
    variables: Mapping[str, Variable]
    roles: Mapping[str, Role]
    heads: Mapping[str, Places | str]
    edges: tuple[Edge, ...] = ()
    constructions: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()

    def places(self, role: str, n_layers: int, n_heads: int) -> Places:
        """The (layer, head) that are said to have this role in a model of this size; ValueError for one outside."""
        return places_in(f"the claim {self.name!r} names as {role}", self.heads[role], n_layers, n_heads)


def places_in(what: str, named: Places | str, n_layers: int, n_heads: int) -> Places:
    """The (layer, head) that are named, all for "every" and "average"; ValueError for one that the model has not."""
    if isinstance(named, str):
        return tuple((layer, head) for layer in range(n_layers) for head in range(n_heads))
    for layer, head in named:
        if layer >= n_layers or head >= n_heads:
            raise ValueError(f"{what} head {layer}.{head}, but the model has {n_layers} layers of {n_heads} heads")
    return named


def shipped() -> dict[str, Path]:
    """The claims that come with the package, by file name without .json."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def load_claim(where: str | Path) -> Claim:
    """Reads a claim: the name of a shipped one, or a JSON file.

    Raises:
        ValueError: there is none, or something in it is missing, unknown or contradicts the rest; says what and where.
    """
    path = shipped().get(str(where), Path(where).expanduser())
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there is no claim {where}: give a JSON file or one of {', '.join(shipped())}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the claim {path} cannot be read: {error}") from error
    try:
        claim = _claim(data)
        _check(claim)
    except ValueError as error:
        raise ValueError(f"the claim {path}: {error}") from error
    return claim


def _claim(data: Any) -> Claim:
    entries = _entries("the claim", data, Claim)
    for name, kind in (("variables", dict), ("roles", dict), ("heads", dict), ("edges", list), ("published", list)):
        if not isinstance(entries.setdefault(name, kind()), kind):
            wanted = "an object with an entry for each name" if kind is dict else "a list of objects"
            raise ValueError(f"{name} must be {wanted}; got {entries[name]!r}")
    of = {
        "variables": {
            name: Variable(**_entries(f"variable {name!r}", x, Variable)) for name, x in entries["variables"].items()
        },
        "roles": {name: Role(**_entries(f"role {name!r}", x, Role)) for name, x in entries["roles"].items()},
        "heads": {name: _places(f"heads of {name!r}", x, EVERY) for name, x in entries["heads"].items()},
        "edges": tuple(Edge(**_entries("edge", x, Edge)) for x in entries["edges"]),
        "published": tuple(_published(x) for x in entries["published"]),
    }
    return Claim(**(entries | of))


def _published(data: Any) -> Published:
    entries = _entries("published", data, Published)
    places = _places(f"heads of the published {entries['score']} score", entries["heads"], AVERAGE)
    return Published(**(entries | {"heads": places}))


def _entries(what: str, data: Any, of: type) -> dict[str, Any]:
    """The entries of a JSON object, if they are those of the dataclass."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be an object; got {data!r}")
    fields = {field.name: field for field in dataclasses.fields(of)}
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in data]:
        raise ValueError(f"{what} needs {', '.join(needed)}; {', '.join(missing)} not found")
    if unknown := sorted(data.keys() - fields.keys()):
        raise ValueError(f"{what} may hold {', '.join(fields)}; got {', '.join(unknown)}")
    return {name: _value(f"{name} of {what}", value, fields[name].type) for name, value in data.items()}


def _value(what: str, value: Any, kind: Any) -> Any:
    """A value of an entry, if it is of the kind of the dataclass's field; objects and heads are left to others."""
    wanted, fits = "", True
    if get_origin(kind) is Literal:
        wanted, fits = f"one of {', '.join(map(str, get_args(kind)))}", value in get_args(kind) and value is not True
    elif kind is str:
        wanted, fits = "a text", isinstance(value, str)
    elif kind is float:
        wanted, fits = "a number from 0 to 1", type(value) in (int, float) and 0 <= value <= 1
    elif kind == tuple[str, ...]:
        wanted, fits = "a list of texts", isinstance(value, list) and all(isinstance(x, str) for x in value)
    if not fits:
        raise ValueError(f"{what} must be {wanted}; got {value!r}")
    return tuple(value) if kind == tuple[str, ...] else value


def _places(what: str, named: Any, all_of_them: str) -> Places | str:
    if named == all_of_them:
        return all_of_them
    texts = isinstance(named, list) and all(isinstance(name, str) for name in named)
    if not named or not texts or not all(re.fullmatch(r"\d+\.\d+", name, re.ASCII) for name in named):
        raise ValueError(f"{what} must be a list such as ['9.9', '10.0'], or {all_of_them!r}; got {named!r}")
    places = tuple((int(layer), int(head)) for layer, head in (name.split(".") for name in named))
    if len(set(places)) < len(places):
        raise ValueError(f"{what} must be distinct; got {named!r}")
    return places


def _check(claim: Claim) -> None:
    """Raises ValueError where parts of a claim contradict each other."""

    def known(what: str, name: str, names: Mapping[str, Any]) -> None:
        if name not in names:
            raise ValueError(f"{what} must be one of {', '.join(names) or 'none'}; got {name!r}")

    if not claim.roles:
        raise ValueError("roles must name at least one role; got none")
    for name in claim.heads:
        known("a role with heads", name, claim.roles)
    for name, role in claim.roles.items():
        if name not in claim.heads:
            raise ValueError(f"heads must say who has the role {name!r}; it has {', '.join(claim.heads) or 'none'}")
        known(f"moves of {name!r}", role.moves, claim.variables)
        if role.looks != "preference":
            known(f"matches of {name!r}", role.matches, claim.variables)
        elif role.matches:
            raise ValueError(f"matches of {name!r} needs looks 'matching' or 'avoiding'; got {role.matches!r}")
        if role.over == role.key:
            raise ValueError(f"over of {name!r} must be another position than its key; got {role.over!r}")
        if role.to == "heads" and not any(edge.sender == name for edge in claim.edges):
            raise ValueError(f"{name!r} moves its variable to heads, but no edge says to which")
    for edge in claim.edges:
        known("sender of an edge", edge.sender, claim.roles)
        known("receiver of an edge", edge.receiver, claim.roles)
        which = f"the edge {edge.sender} -> {edge.receiver}"
        senders, receivers = claim.heads[edge.sender], claim.heads[edge.receiver]
        if edge.input in "qk" and claim.roles[edge.receiver].looks == "preference":
            raise ValueError(
                f"{which} ends in {edge.input}, but what {edge.receiver} prefers does not depend on a variable: give "
                "it looks 'matching' or 'avoiding'"
            )
        if isinstance(receivers, str):
            raise ValueError(f"{which} needs receivers by name, not 'every' head")
        first = 0 if isinstance(senders, str) else min(senders)[0]
        if max(receivers)[0] <= first:
            raise ValueError(
                f"{which} needs a receiver in a later layer than a sender; they are {senders}, {receivers}"
            )
    for entry in claim.published:
        if entry.at_least > entry.at_most or (entry.at_least, entry.at_most) == (0, 1):
            raise ValueError(
                f"the published {entry.score} score needs at_least, at_most or both, the first not above the second; "
                f"got {entry.at_least} and {entry.at_most}"
            )
