"""Claims as files: the shipped ones, the example in the docs, and one clear error for each thing that can be wrong."""

import copy
import dataclasses
import json
import textwrap
from collections import Counter

import pytest

from circuits_jax.heads import claims
from circuits_jax.heads.claims import Edge, Published, load_claim, shipped

DOCS = claims.__doc__
EXAMPLE = json.loads(DOCS[DOCS.index("{") : DOCS.rindex("}") + 1])
STRAY = {"sender": "x", "receiver": "name mover", "input": "q"}
ROLE, EDGE, PUBLISHED = ("roles", "name mover"), ("edges", 0), ("published", 0)


def write(folder, data):
    path = folder / "claim.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def as_data(claim):
    """The JSON that says the same, every default written out."""
    names = lambda places: places if isinstance(places, str) else [f"{a}.{b}" for a, b in places]  # noqa: E731
    data = dataclasses.asdict(claim)
    data["heads"] = {role: names(places) for role, places in claim.heads.items()}
    for entry in data["published"]:
        entry["heads"] = names(entry["heads"])
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_claim_loads_by_name_and_by_path_and_comes_back_whole(name, tmp_path):
    claim = load_claim(name)
    assert load_claim(shipped()[name]) == claim
    data = as_data(claim)
    for role in data["roles"].values():  # an empty text is a default, but no name of a variable
        if not role["matches"]:
            del role["matches"]
    assert load_claim(write(tmp_path, data)) == claim


def test_the_example_in_the_docs_is_a_claim(tmp_path):
    path = write(tmp_path, textwrap.dedent(DOCS[DOCS.index("{") : DOCS.rindex("}") + 1]))
    claim = load_claim(path)
    assert claim == load_claim(str(path))
    assert claim.heads == {"S-inhibition": ((0, 1),), "name mover": ((1, 0), (1, 3))}
    assert claim.variables["S"].positions == ("s1", "s2")
    assert claim.roles["name mover"].looks == "avoiding"
    assert (claim.roles["S-inhibition"].over, claim.roles["S-inhibition"].sign) == ("elsewhere", 1)
    assert claim.edges == (Edge("S-inhibition", "name mover", "q", -1),)
    assert claim.published == (Published("copying", ((1, 0), (1, 3)), "as in GPT-2 small", at_least=0.95),)
    assert claim.constructions == ()


def test_the_circuit_of_gpt2_small_has_26_heads():
    claim = load_claim("ioi_gpt2_small")
    places = [place for role in claim.roles for place in claim.places(role, 12, 12)]
    assert len(places) == len(set(places)) == 26
    assert Counter({role: len(heads) for role, heads in claim.heads.items()}) == {
        "name mover": 3, "backup name mover": 8, "negative name mover": 2, "S-inhibition": 4, "induction": 4,
        "duplicate token": 3, "previous token": 2,
    }  # fmt: skip
    against = {name for name, role in claim.roles.items() if role.effect < 0}
    assert against == {name for name, role in claim.roles.items() if role.sign < 0} == {"negative name mover"}
    assert {(edge.receiver, edge.input, edge.sign) for edge in claim.edges if edge.sender == "S-inhibition"} == {
        (role, "q", -1) for role in claim.roles if role.endswith("name mover")
    }
    # What is written has to be written before it is read, by every pair that the claim lets speak to each other.
    for edge in claim.edges:
        assert max(claim.heads[edge.sender])[0] < min(claim.heads[edge.receiver])[0]
    for entry in claim.published:
        named = {place for role in claim.roles for place in claim.heads[role]}
        assert entry.heads == "average" or set(entry.heads) <= named


def test_every_head_is_every_head_of_the_model():
    assert load_claim("ioi_words").places("name mover", 2, 3) == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))


@pytest.mark.parametrize(("n_layers", "n_heads", "missing"), [(9, 12, "9.9"), (12, 9, "9.9"), (10, 12, "10.0")])
def test_a_head_outside_the_model_is_refused(n_layers, n_heads, missing):
    with pytest.raises(
        ValueError, match=rf"names as name mover head {missing}, but the model has {n_layers} layers of"
    ):
        load_claim("ioi_gpt2_small").places("name mover", n_layers, n_heads)


def changed(*where, to):
    """The example with one entry set, or left out."""

    def change(data):
        for step in where[:-1]:
            data = data[step]
        if to is None:
            del data[where[-1]]
        else:
            data[where[-1]] = to

    return change


def two(*changes):
    return lambda data: [change(data) for change in changes]


BAD = [
    (changed("task", to="sum"), "task of the claim must be one of ioi, sva; got 'sum'"),
    (changed("name", to=3), "name of the claim must be a text; got 3"),
    (
        changed("source", to=None),
        "the claim needs name, task, model, source, variables, roles, heads; source not found",
    ),
    (changed("seeds", to=3), "the claim may hold name, .*, published; got seeds"),
    (changed("constructions", to="simple"), "constructions of the claim must be a list of texts; got 'simple'"),
    (changed("variables", to=["IO"]), "variables must be an object with an entry for each name; got .'IO'"),
    (changed("roles", to="every"), "roles must be an object with an entry for each name; got 'every'"),
    (changed("heads", to=["1.0"]), "heads must be an object with an entry for each name; got .'1.0'"),
    (changed("edges", to={}), "edges must be a list of objects; got {}"),
    (changed("published", to=3), "published must be a list of objects; got 3"),
    (
        two(changed("roles", to={}), changed("heads", to={}), changed("edges", to=[])),
        "roles must name at least one role",
    ),
    (changed("variables", "IO", to="io_name"), "variable 'IO' must be an object; got 'io_name'"),
    (changed("variables", "IO", "positions", to="io"), "positions of variable 'IO' must be a list of texts; got 'io'"),
    (changed("variables", "IO", "positions", to=[1]), r"positions of variable 'IO' must be a list of texts; got \[1\]"),
    (changed(*ROLE, "query", to=None), "role 'name mover' needs query, key, moves; query not found"),
    (changed(*ROLE, "strength", to=2), "role 'name mover' may hold query, .*, effect; got strength"),
    (changed(*ROLE, "key", to=["io"]), r"key of role 'name mover' must be a text; got \['io'\]"),
    (changed(*ROLE, "looks", to="away"), "looks of .* must be one of preference, matching, avoiding; got 'away'"),
    (changed(*ROLE, "to", to="end"), "to of .* must be one of logits, stream, heads; got 'end'"),
    (changed(*ROLE, "sign", to=0), "sign of .* must be one of 1, -1; got 0"),
    (changed(*ROLE, "effect", to=True), "effect of .* must be one of 1, -1; got True"),
    (changed(*ROLE, "moves", to="O"), "moves of 'name mover' must be one of IO, S; got 'O'"),
    (two(changed("variables", to={}), changed(*ROLE, "moves", to="O")), "moves of .* must be one of none; got 'S'"),
    (changed(*ROLE, "matches", to=None), "matches of 'name mover' must be one of IO, S; got ''"),
    (changed("roles", "S-inhibition", "matches", to="S"), "matches of 'S-inhibition' needs looks .*; got 'S'"),
    (changed(*ROLE, "over", to="io"), "over of 'name mover' must be another position than its key; got 'io'"),
    (changed("edges", to=[]), "'S-inhibition' moves its variable to heads, but no edge says to which"),
    (changed("heads", "S-inhibition", to=None), "heads must say who has the role 'S-inhibition'; it has name mover"),
    (changed("heads", "mover", to=["0.0"]), "a role with heads must be one of S-inhibition, name mover; got 'mover'"),
    (
        changed("heads", "name mover", to="all"),
        "heads of 'name mover' must be a list such as .*, or 'every'; got 'all'",
    ),
    (changed("heads", "name mover", to="9.9"), "heads of 'name mover' must be a list such as .*; got '9.9'"),
    (changed("heads", "name mover", to={"9.9": 1}), "heads of 'name mover' must be a list such as .*; got {'9.9': 1}"),
    (changed("heads", "name mover", to=[]), r"heads of 'name mover' must be a list such as .*; got \[\]"),
    (changed("heads", "name mover", to=[9.9]), r"heads of 'name mover' must be a list such as .*; got \[9.9\]"),
    (changed("heads", "name mover", to=["9.9.1"]), "heads of 'name mover' must be a list such as .*; got"),
    (changed("heads", "name mover", to=["-1.0"]), "heads of 'name mover' must be a list such as .*; got"),
    (changed("heads", "name mover", to=["1.0", "1.00"]), "heads of 'name mover' must be distinct; got"),
    (changed(*EDGE, to="q"), "edge must be an object; got 'q'"),
    (changed(*EDGE, "input", to=None), "edge needs sender, receiver, input; input not found"),
    (changed(*EDGE, "input", to="o"), "input of edge must be one of q, k, v; got 'o'"),
    (changed(*EDGE, "sign", to=2), "sign of edge must be one of 1, -1; got 2"),
    (changed("edges", to=[*EXAMPLE["edges"], STRAY]), "sender of an edge must be one of .*; got 'x'"),
    (changed(*EDGE, "receiver", to="x"), "receiver of an edge must be one of S-inhibition, name mover; got 'x'"),
    (
        two(changed(*ROLE, "looks", to="preference"), changed(*ROLE, "matches", to=None)),
        "the edge S-inhibition -> name mover ends in q, but what name mover prefers does not depend on a variable",
    ),
    (changed("heads", "name mover", to="every"), "the edge S-inhibition -> name mover needs receivers by name"),
    (
        changed("heads", "name mover", to=["0.3"]),
        "the edge S-inhibition -> name mover needs a receiver in a later layer",
    ),
    (
        two(changed("heads", "S-inhibition", to="every"), changed("heads", "name mover", to=["0.3"])),
        "the edge S-inhibition -> name mover needs a receiver in a later layer than a sender; they are every",
    ),
    (changed(*PUBLISHED, to=[]), r"published must be an object; got \[\]"),
    (changed(*PUBLISHED, "source", to=None), "published needs score, heads, source; source not found"),
    (changed(*PUBLISHED, "score", to="skill"), "score of published must be one of copying, .*, induction; got 'skill'"),
    (changed(*PUBLISHED, "at_least", to=95), "at_least of published must be a number from 0 to 1; got 95"),
    (changed(*PUBLISHED, "at_most", to="1"), "at_most of published must be a number from 0 to 1; got '1'"),
    (changed(*PUBLISHED, "at_most", to=True), "at_most of published must be a number from 0 to 1; got True"),
    (
        changed(*PUBLISHED, "heads", to="every"),
        "heads of the published copying score must be .*, or 'average'; got 'every'",
    ),
    (changed(*PUBLISHED, "at_least", to=None), "copying score needs at_least, at_most or both, .*; got 0.0 and 1.0"),
    (changed(*PUBLISHED, "at_most", to=0.5), "copying score needs .* first not above the second; got 0.95 and 0.5"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_claim_is_refused_with_what_and_where(change, message, tmp_path):
    data = copy.deepcopy(EXAMPLE)
    change(data)
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=f"the claim {path}: .*{message}"):
        load_claim(path)


def test_a_claim_that_is_no_object_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the claim must be an object; got \[1\]"):
        load_claim(write(tmp_path, [1]))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"claim\.json cannot be read: Expecting value: line 1"):
        load_claim(write(tmp_path, "no json"))
    with pytest.raises(ValueError, match=r"cannot be read: .*directory"):
        load_claim(tmp_path)
    (tmp_path / "claim.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"cannot be read: .*decode"):
        load_claim(tmp_path / "claim.json")


def test_a_claim_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=f"there is no claim mine: give a JSON file or one of {', '.join(shipped())}"):
        load_claim("mine")


def test_every_head_may_be_a_sender(tmp_path):
    data = copy.deepcopy(EXAMPLE)
    data["heads"]["S-inhibition"] = "every"
    assert load_claim(write(tmp_path, data)).heads["S-inhibition"] == "every"
