"""The page and the table of a claim's verdicts, of made-up results: what is shown, in which order, and as text."""

import copy
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from circuits_jax.reports import claim_page, page

HOSTILE = "</script><b>"
PREDICATES = ("task", "QK", "OV", "attends", "uses QK", "uses OV")


def made_finding(outcome, value, interval):
    return {"outcome": outcome, "value": value, "interval": interval}


def made_head(role, head, outcome, truth):
    said = {"supported": "yes", "not supported": "no", "undetermined": "undetermined"}[outcome]
    findings = {name: made_finding("yes", 0.99, [0.97, 1.0]) for name in PREDICATES}
    findings["QK"] = made_finding("yes", 3.21, None)
    findings["uses OV"] = made_finding(said, None if said == "undetermined" else 0.345678, [0.25, 0.5])
    against = {"value": 1.5, "covariance_p": 0.2, "label_p": 0.004, "z": 3.0, "rank": 0}
    alignment = {
        "A gain": {"value": 2.25}, "B overlap": {"value": 0.5}, "C matching": against, "D top share": {"value": None},
        "preference": {"value": 3.21, "covariance_p": 0.01, "label_p": 0.002, "z": 4.0, "rank": 2}, "F moves": against,
    }  # fmt: skip
    return {
        "role": role, "head": head, "outcome": outcome, "structural": "supported", "truth": truth,
        "findings": findings, "alignment": alignment, "alignment_embedded": alignment,
        "establishes": [f"its weights prefer io <on these words>, {outcome}"],
        "does_not_establish": ["that another head could not do it"],
    }  # fmt: skip


def made_side(rng, words, sigma):
    def ends(with_bottom):
        drawn = rng.choice(words, (2, 5)).tolist()
        return {"top": drawn[0], "bottom": drawn[1] if with_bottom else [],
                "shares": {"IO": float(rng.random()), "place": 0.05}, "chance": {"IO": 0.1, "place": 0.05},
                "p": {"IO": 0.002, "place": 1.0}}  # fmt: skip

    values = (sigma * np.sort(rng.random(4))[::-1]).tolist()
    directions = [
        {"sigma": s, "tied_with": int(i == 1), "read": ends(i != 1), "written": ends(i != 1)}
        for i, s in enumerate(values)
    ]
    angles = [0.0, np.pi, 1.0, -1.0]
    eigen = [
        {"value": [s * np.cos(a), s * np.sin(a) * (a in (1, -1))], "condition": 1.5, "read": ends(a in (0, np.pi)),
         "written": ends(a in (0, np.pi))}
        for s, a in zip(values, angles, strict=True)
    ]  # fmt: skip
    unknown = {"top": [], "bottom": [], "shares": {"IO": None}, "chance": {"IO": 0.1}, "p": {"IO": None}}
    eigen[-1] |= {"value": [None, None], "read": unknown, "written": unknown}
    return {"singular_values": values, "effective_rank": 2.5, "flatness": 0.7, "null_effective_rank": 3.75,
            "directions": directions, "eigen": eigen, "copying_score": -0.25}  # fmt: skip


def made_spectrum(rng, head, claimed_as):
    words = ["Anna", " Bob", "\n", "<i>", HOSTILE, "é", "  ", "\u202e"]
    symmetry = {"score": 0.625, "null_z": 3.0, "positional_share": 0.8125, "rule_says": "positional",
                "energy_says": "mixed", "agree": None}  # fmt: skip
    reading = [
        {"predicate": "QK is of low rank: a simple attention rule", "outcome": "undetermined", "evidence": "rank < 3"},
        {"predicate": "OV top direction aligns with task tokens", "outcome": "supported", "evidence": "IO .9 > .1"},
    ]
    return {"head": head, "claimed_as": claimed_as, "qk": made_side(rng, words, 3.0), "ov": made_side(rng, words, 9.0),
            "symmetry": symmetry, "reading": reading}  # fmt: skip


def made_results(n_layers=2, n_heads=4):
    """One model of which every head is asked for both roles, and one of which two are claimed and published."""
    rng = np.random.default_rng(0)
    places = [f"{layer}.{head}" for layer in range(n_layers) for head in range(n_heads)]
    outcomes = {("name mover", "1.0"): "supported", ("duplicate token", "0.2"): "supported",
                ("name mover", "1.3"): "undetermined"}  # fmt: skip
    every = [
        made_head(role, head, outcomes.get((role, head), "not supported"), (role, head) in outcomes)
        for role in ("duplicate token", "name mover")
        for head in places
    ]
    rule = {"heads": len(places), "agreement": 0.75, "auroc": None}
    roles = ["duplicate token", "name mover"]
    toy = {
        "task": "ioi", "model": "ioi_two, seed 0", "claim": "name movers and more", "source": "2211.00593",
        "does_task": 0.9921875, "heads": every, "symmetry_rule": rule,
        "spectra": [made_spectrum(rng, head, roles) for head in places],
    }  # fmt: skip
    claimed = [
        made_head("S-inhibition [bold]", "0.1", "not supported", None),
        made_head("negative <i>", "1.2", "supported", None),
    ]
    spectra = [made_spectrum(rng, head, []) for head in ("0.0", "1.0")]
    spectra += [made_spectrum(rng, one["head"], [one["role"]]) for one in claimed]
    published = [
        {"score": "copying", "heads": ["1.2", "1.3"], "expected": ">= 0.95", "value": 0.97, "met": True, "source": "a"},
        {"score": "attention", "heads": ["0.1"], "expected": ">= 0.5", "value": None, "met": False, "source": "b"},
    ]
    other = {**toy, "model": f"gpt {HOSTILE}", "heads": claimed, "spectra": spectra, "published": published}
    return {"provenance": {}, "analyses": [toy, other], "instrument": made_instrument()}


def made_instrument():
    return [
        {
            "arm": arm, "kind": kind, "models": 16, "candidates": 448, "true": 60 * trained, "supported": 56 * trained,
            "precision": 0.964 if trained else None, "recall": 0.9 if trained else None,
            "precision_interval": [0.88, 0.99] if trained else None, "structural": 213,
            "structural_precision": 0.28 if trained else None, "structural_recall": 0.95 if trained else None,
            "by_role": {"name mover": {"true": 32 * trained, "supported": 31 * trained, "both": 30 * trained}},
        }
        for arm in ("ioi_one", "ioi_two", "sva")
        for kind, trained in (("trained", True), ("shuffled", False), ("untrained", False))
    ]  # fmt: skip


class Read(HTMLParser):
    """Tables as rows of cells, all text outside scripts, and the summary of each table's innermost fold."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.folds, self.texts, self.tags = [], [], [], []
        self._open, self._summaries = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.folds.append(self._summaries[-1] if self._summaries else "")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "summary":
            self._summaries.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "details":
            self._summaries.pop()

    def handle_data(self, data):
        if "script" in self._open:
            return
        self.texts.append(data)
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data
        elif "summary" in self._open:
            self._summaries[-1] += data


@pytest.fixture(scope="module")
def shown():
    """{heading: Read}"""
    return {heading: Read("".join(parts)) for heading, parts in claim_page.sections(made_results())}


def printed(results, width=200):
    out = io.StringIO()
    claim_page.terminal(Console(file=out, width=width), results)
    return out.getvalue()


def test_sections(shown):
    toy, other = "ioi, ioi_two, seed 0", f"ioi, gpt {HOSTILE}"
    kinds = ("verdicts", "what the verdicts establish", "spectra")
    assert list(shown) == [
        *(f"{toy}: {kind}" for kind in kinds), *(f"{other}: {kind}" for kind in kinds),
        f"{other}: what was published", "The instrument against causal truth",
    ]  # fmt: skip


def test_supported_come_first_and_what_is_not_supported_is_folded_in_a_long_table(shown):
    read = shown["ioi, ioi_two, seed 0: verdicts"]
    header, *rows = read.tables[0]
    assert header == ["role", "head", "verdict", "weights alone", "truth", *PREDICATES]
    assert [row[:3] for row in rows] == [
        ["duplicate token", "0.2", "supported"], ["name mover", "1.0", "supported"],
        ["name mover", "1.3", "undetermined"],
    ]  # fmt: skip
    finding = dict(zip(header, rows[1], strict=True))
    assert [finding[name] for name in ("truth", "task", "QK")] == ["yes", "yes 0.99 [0.97, 1]", "yes 3.2"]
    assert [row[-1] for row in rows] == ["yes 0.35 [0.25, 0.5]"] * 2 + ["undetermined – [0.25, 0.5]"]
    assert read.folds[:2] == ["", "13 more, not supported"]
    assert [row[2] for row in read.tables[1][1:]] == ["not supported"] * 13
    short = shown[f"ioi, gpt {HOSTILE}: verdicts"]
    assert [row[1:5] for row in short.tables[0][1:]] == [
        ["1.2", "supported", "supported", "–"], ["0.1", "not supported", "supported", "–"],
    ]  # fmt: skip
    assert short.folds == ["", "Alignment, statistic by statistic"]


def test_alignment_is_shown_with_its_nulls(shown):
    header, read, embedded, *_ = shown["ioi, ioi_two, seed 0: verdicts"].tables[-1]
    assert read[:3] == ["duplicate token", "0.2", "read"]
    assert embedded[:3] == ["duplicate token", "0.2", "embedded"]
    cells = dict(zip(header, read, strict=True))
    assert (cells["A gain"], cells["D top share"]) == ("2.25", "–")
    assert cells["preference"] == "3.21, p 0.01 (covariance), p 0.002 (label), place 3"


def test_edges_are_shown_where_there_are_some():
    edge = {"sender": "0.1", "sender_role": "induction <i>", "receiver": "1.0", "receiver_role": "name mover",
            "input": "q", "sign": -1, "value": -1.234, "covariance_p": 0.3, "label_p": 0.001, "rotation_p": 0.002,
            "z": -7.5, "supported": True}  # fmt: skip
    decoy = edge | {"sender": "0.0", "input": "v", "sign": 1, "value": None, "supported": False}
    found = made_results()["analyses"][0] | {"edges": [decoy, edge]}
    read = Read("".join(claim_page.sections({"analyses": [found], "instrument": []})[0][1]))
    assert read.folds[-1] == "Edges: 1 of 2 pairs of heads supported"
    assert read.tables[-1][1:] == [
        ["0.1", "induction <i>", "1.0", "name mover", "q", "−", "-1.23", "0.3", "0.001", "0.002", "-7.5", "yes"],
        ["0.0", "induction <i>", "1.0", "name mover", "v", "+", "–", "0.3", "0.001", "0.002", "-7.5", "no"],
    ]
    assert {len(row) for row in read.tables[-1]} == {12}
    assert "i" not in read.tags
    without = claim_page.sections({"analyses": [found | {"edges": []}], "instrument": []})[0][1]
    assert len(Read("".join(without)).tables) == len(read.tables) - 1


def test_the_same_words_are_said_once(shown):
    texts = shown["ioi, ioi_two, seed 0: what the verdicts establish"].texts
    assert texts.count("its weights prefer io <on these words>, supported") == 1
    assert "duplicate token 0.2, name mover 1.0 (supported)" in texts
    fold = texts.index("Of what is not supported")
    assert texts.index("its weights prefer io <on these words>, undetermined") < fold
    assert texts.index("its weights prefer io <on these words>, not supported") > fold


def test_heads_are_ordered_by_what_is_said_of_them(shown):
    read = shown[f"ioi, gpt {HOSTILE}: spectra"]
    header, *rows = read.tables[0]
    assert [row[:2] for row in rows] == [
        ["1.2", "negative <i>"], ["0.1", "S-inhibition [bold]"], ["0.0", "control"], ["1.0", "control"],
    ]  # fmt: skip
    cells = dict(zip(header, rows[0], strict=True))
    assert cells["OV effective rank"] == "2.5 (3.75)"
    assert [cells[name] for name in header[-4:]] == ["0.81", "positional", "mixed", "–"]
    assert list(dict.fromkeys(read.folds)) == [
        "", "1.2: supported as negative <i>", "0.1: not supported", "0.0: control", "1.0: control",
    ]  # fmt: skip
    text = " ".join(read.texts)
    assert "is right for 0.75 of 8 heads that score by one of both; area under its ROC curve –" in text
    assert "supported: OV top direction aligns with task tokens. IO .9 > .1" in text


def test_directions_show_tokens_as_they_are_and_subspaces_without_a_sign(shown):
    side = made_results()["analyses"][1]["spectra"][3]["qk"]
    singular, eigen = shown[f"ioi, gpt {HOSTILE}: spectra"].tables[1:3]
    first, second, subspace, after = singular[1:5]
    direction = side["directions"][0]
    for row, end in ((first, "top"), (second, "bottom")):
        assert row[3] == " ".join(map(repr, direction["read"][end]))
        assert row[4] == " ".join(map(repr, direction["written"][end]))
    assert first[5] == f"IO {direction['read']['shares']['IO']:.2g} (0.1, p 0.002), place 0.05 (0.05, p 1)"
    assert [row[1:3] for row in (first, second, subspace, after)] == [["", "+"], ["", "−"], ["1", ""], ["", "+"]]
    real, negative, complex_one = (row[0] for row in eigen[1:] if row[0])  # and not the one that is not known
    assert real == f"{side['eigen'][0]['value'][0]:.3g}"
    assert negative == f"-{side['eigen'][1]['value'][0]:.3g}".replace("--", "-")
    assert complex_one == "{:.3g} {:+.3g}i".format(*side["eigen"][2]["value"])


def test_lines_of_the_first_heads_and_the_median_of_the_others():
    rng = np.random.default_rng(1)
    heads = [made_spectrum(rng, f"0.{i}", []) for i in range(10)]
    drawn = claim_page._singular_values({f"{head['head']} <b>": head for head in heads})
    of_qk = drawn.data[: claim_page.MOST_LINES + 1]
    assert (of_qk[0].name, of_qk[-1].name) == ("0.0 &lt;b&gt;", "median of 3 others")
    shares = [np.array(head["qk"]["singular_values"]) / max(head["qk"]["singular_values"]) for head in heads]
    np.testing.assert_allclose(of_qk[6].y, shares[6])
    np.testing.assert_allclose(of_qk[-1].y, np.median(shares[7:], axis=0))
    np.testing.assert_array_equal(of_qk[0].x, [1, 2, 3, 4])


def test_instrument():
    read = Read("".join(claim_page.sections(made_results())[-1][1]))
    header, first, second, *rest = read.tables[0]
    assert first == ["ioi_one, trained", "16", "448", "60", "56", "0.12", "0.96 [0.88, 0.99]", "0.9", "213", "0.28",
                     "0.95"]  # fmt: skip
    assert second[3:] == ["0", "0", "0", "–", "–", "213", "–", "–"]
    assert (len(header), len(rest)) == (11, 7)
    assert read.tables[1][1] == ["ioi_one, trained", "name mover", "32", "31", "30"]
    drawn = claim_page._precision_and_recall([arm for arm in made_instrument() if arm["kind"] == "trained"])
    assert [bar.name for bar in drawn.data] == [
        "precision", "recall", "precision, weights alone", "recall, weights alone"
    ]  # fmt: skip
    np.testing.assert_allclose(drawn.data[0].error_y.array, 0.99 - 0.964)
    np.testing.assert_allclose(drawn.data[0].error_y.arrayminus, 0.964 - 0.88)
    np.testing.assert_array_equal(drawn.data[3].y, [0.95] * 3)
    np.testing.assert_array_equal(drawn.data[3].error_y.array, 0.0)


def test_published(shown):
    _, first, second = shown[f"ioi, gpt {HOSTILE}: what was published"].tables[0]
    assert first == ["copying", "1.2, 1.3", "0.97", ">= 0.95", "a", "yes"]
    assert second[2:] == ["–", ">= 0.5", "b", "no"]


def test_nothing_is_markup(shown):
    for read in shown.values():
        assert not {"b", "i"} & set(read.tags)
    whole = page.page("t", claim_page.sections(made_results()))
    assert whole.count("</script><b>") == 0


def test_an_analysis_without_spectra_and_no_instrument():
    results = made_results()
    found = {**results["analyses"][0], "spectra": [], "heads": []}
    sections = claim_page.sections({"analyses": [found], "instrument": []})
    assert len(sections) == 2
    assert claim_page.sections({"analyses": [], "instrument": []}) == []


def test_terminal_shows_the_best_and_counts_the_rest():
    results = made_results()
    results["analyses"] *= 2  # 16 and 2 candidates, twice: ten rows each
    text = printed(results)
    assert text.count("and 6 more: 6 not supported") == 2
    assert all(said in text for said in ("S-inhibition [bold]", HOSTILE, "0.96 [0.88, 0.99]", ">= 0.95"))
    (row,) = [line for line in text[: text.index("and 6")].splitlines() if "name mover " in line and " 1.0 " in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "name mover", "1.0", "supported", "supported", "yes 0.99", "yes 3.2", "yes 0.99", "yes 0.99", "yes 0.99",
        "yes 0.35",
    ]  # fmt: skip
    first = text[: text.index("and 6")]
    assert first.index("0.2") < first.index("1.3")
    assert "? –" in first


def test_a_number_that_is_not_there_is_not_made_up():
    results = copy.deepcopy(made_results())
    results["analyses"][0]["does_task"] = None
    assert "the right answer in – of the prompts" in claim_page.sections(results)[0][1][0]
