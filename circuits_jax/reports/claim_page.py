"""Does the circuit match the claim? What experiments/weight_spectra.py found, as sections of a page and on a terminal.

Both take the dict of results.json. A number that could not be measured is None there, and "–" here.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from rich.console import Console
from rich.markup import escape

from circuits_jax.heads.claim_verdicts import PREDICATES
from circuits_jax.reports import page, plots
from circuits_jax.reports.console import print_table

OUTCOMES = ("supported", "undetermined", "not supported")  # in the order in which they are shown
MARKS = {"yes": "yes", "no": "no", "undetermined": "?"}  # on a terminal
SIDES = ("qk", "ov")
WORDS = {True: "yes", False: "no", None: "–"}
LONG = 12  # rows of a table; in a longer one, what is plainly not supported is folded
MOST_LINES = 7  # heads with a line of their own in a figure
MOST_ROWS = 40  # on a terminal, over all analyses

Json = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]


def sections(results: Json) -> list[tuple[str, list[str]]]:
    """The page: verdicts, what they establish and spectra of every analysis, then the instrument against the truth.

    Args:
        results: of the experiment, as results.json holds it.

    Returns:
        (heading, HTML parts), for page.page.
    """
    parts = []
    for found in results["analyses"]:
        name = f"{found['task']}, {found['model']}"
        parts += [
            (f"{name}: verdicts", _verdicts(found)),
            (f"{name}: what the verdicts establish", _establishes(found["heads"])),
        ]
        if found["spectra"]:
            parts.append((f"{name}: spectra", _spectra(found)))
        if found.get("published"):
            parts.append((f"{name}: what was published", [page.table(*_published_table(found["published"]))]))
    if results["instrument"]:
        parts.append(("The instrument against causal truth", _instrument(results["instrument"])))
    return parts


def terminal(console: Console, results: Json) -> None:
    """Prints a row for each role and head, the rest counted, what was published, and the instrument's table."""
    most = max(1, MOST_ROWS // max(1, len(results["analyses"])))
    for found in results["analyses"]:
        heads = _sorted(found["heads"])
        rows = [
            [head["role"], head["head"], head["outcome"], head["structural"], *_marks(head["findings"])]
            for head in heads[:most]
        ]
        title = f"{found['task']}, {found['model']}: {found['claim']}"
        _print(console, title, (["role", "head", "verdict", "weights alone", *PREDICATES], rows))
        if rest := [head["outcome"] for head in heads[most:]]:
            said = ", ".join(f"{rest.count(name)} {name}" for name in OUTCOMES if name in rest)
            console.print(f"and {len(rest)} more: {said}")
        if found.get("published"):
            _print(console, f"{found['model']}: what was published", _published_table(found["published"]))
    if results["instrument"]:
        _print(console, "The instrument against causal truth", _instrument_table(results["instrument"]))


VERDICTS = """
A head is supported in its role when all six predicates hold, not supported when one is shown not to. Task: the right
answer is preferred. QK and OV: the weights read and write what the role says, beyond permuted labels and, where they
join classes, beyond the same head turned at random. Attends: by how much attention there exceeds that elsewhere and
chance. Uses QK, uses OV: the share of the logit difference that is lost when the direction is swapped. Each with its
value and, over prompts, its 95 % interval. "Weights alone" is the verdict of QK and OV. "Truth" is measured by
other means: real prompts and blocked attention.
"""
ALIGNMENT = """
Each statistic, where it has nulls with its p against directions drawn from the covariance of what the layer reads,
against permuted labels and (of joined classes; else 1) against the head turned at random, and its place among the heads
of its layer. Directions as heads read them, and as the embedding
holds them. (E), the causal one, is "uses QK" above.
"""
EDGES = """
Edges by weights alone: do the classes that a sender moves reach the receiver's query, key or value the direct way, on
the claimed side? With p as above. How much of what the receiver reads that is, and whether inputs make it happen, is
not said.
"""
SPECTRA = """
Claimed heads beside the other heads of their layers. A random head's effective rank is in brackets. Tested here: is a
symmetric QK (score above 0.5) positional? Energies tell: how much QK makes of positions, as a share of what it makes of
positions and tokens.
"""
DIRECTIONS = """
Head by head: the reading, and what the first directions read and write; in QK, "writes" is what keys are asked for. In
rows marked + and −, what stands on the left brings what stands on the right; with a negative eigenvalue it takes it
away. A subspace (of singular values that tie, of a complex pair) has no sign. Beside the share of a direction that lies
in a task variable: that of a uniform direction, and p against random mixtures of what is there.
"""
INSTRUMENT = """
Every head of every model is asked for every role. True: the head does the job by measurement. Supported: the verdict
says so. Weights alone: what structure would say without activations. Shuffled and untrained models have nothing to
find.
"""


# --- verdicts ---


def _verdicts(found: Json) -> list[str]:
    said = f"Claim: {found['claim']} ({found['source']}). The model prefers the right answer in"
    parts = [page.paragraph(f"{said} {_number(found['does_task'])} of the prompts."), page.paragraph(VERDICTS)]
    heads = _sorted(found["heads"])
    plain = [head for head in heads if head["outcome"] == "not supported"] if len(heads) > LONG else []
    if shown := heads[: len(heads) - len(plain)]:
        parts.append(page.table(*_verdict_table(shown)))
    if plain:
        parts.append(_folded(f"{len(plain)} more, not supported", [page.table(*_verdict_table(plain))]))
    alignment = [page.paragraph(ALIGNMENT), page.table(*_alignment_table(heads))]
    parts.append(_folded("Alignment, statistic by statistic", alignment))
    if edges := found.get("edges"):
        said = f"Edges: {sum(edge['supported'] for edge in edges)} of {len(edges)} pairs of heads supported"
        parts.append(_folded(said, [page.paragraph(EDGES), page.table(*_edge_table(edges))]))
    return parts


def _sorted(heads: Iterable[Json]) -> list[Json]:
    return sorted(heads, key=lambda head: OUTCOMES.index(head["outcome"]))


def _verdict_table(heads: Sequence[Json]) -> Table:
    header = ["role", "head", "verdict", "weights alone", "truth", *PREDICATES]
    return header, [
        [head["role"], head["head"], head["outcome"], head["structural"], WORDS[head["truth"]]]
        + [_finding(head["findings"][name]) for name in PREDICATES]
        for head in heads
    ]


def _finding(finding: Json) -> str:
    return f"{finding['outcome']} {_with_interval(finding['value'], finding['interval'])}"


def _marks(findings: Json) -> list[str]:
    return [f"{MARKS[findings[name]['outcome']]} {_number(findings[name]['value'], 2)}" for name in PREDICATES]


def _alignment_table(heads: Sequence[Json]) -> Table:
    statistics = list(dict.fromkeys(name for head in heads for name in head["alignment"]))
    rows = [
        [head["role"], head["head"], said, *(_aligned(head[kind].get(name, {})) for name in statistics)]
        for head in heads
        for said, kind in (("read", "alignment"), ("embedded", "alignment_embedded"))
    ]
    return ["role", "head", "directions as", *statistics], rows


def _aligned(statistic: Json) -> str:
    said = [f"p {_number(statistic[f'{null}_p'], 2)} ({null})" for null in ("covariance", "label", "rotation")
            if f"{null}_p" in statistic]  # fmt: skip
    if statistic.get("rank") is not None:
        said.append(f"place {statistic['rank'] + 1}")
    return ", ".join([_number(statistic.get("value")), *said])


def _edge_table(edges: Iterable[Json]) -> Table:
    """The supported ones first."""
    header = [
        "sender",
        "role",
        "receiver",
        "role",
        "input",
        "side",
        "value",
        "p (covariance)",
        "p (label)",
        "p (turned)",
        "z",
    ]
    return [*header, "supported"], [
        [edge["sender"], edge["sender_role"], edge["receiver"], edge["receiver_role"], edge["input"]]
        + ["+" if edge["sign"] > 0 else "−"]
        + [_number(edge[name]) for name in ("value", "covariance_p", "label_p", "rotation_p", "z")]
        + [WORDS[edge["supported"]]]
        for edge in sorted(edges, key=lambda edge: not edge["supported"])
    ]


def _establishes(heads: Iterable[Json]) -> list[str]:
    """Said once for all heads of which the same is said; what is plainly not supported is folded."""
    groups: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for head in _sorted(heads):
        said = (head["outcome"], tuple(head["establishes"]), tuple(head["does_not_establish"]))
        groups.setdefault(said, []).append(f"{head['role']} {head['head']}")
    parts: dict[bool, list[str]] = {False: [], True: []}
    for (outcome, does, does_not), names in groups.items():
        parts[outcome == "not supported"] += [
            page.paragraph(f"{', '.join(names)} ({outcome})"),
            _list("Establishes:", does),
            _list("Does not establish:", does_not),
        ]
    return parts[False] + ([_folded("Of what is not supported", parts[True])] if parts[True] else [])


# --- spectra ---


def _spectra(found: Json) -> list[str]:
    """Heads in the order of the best that is said of them."""
    verdicts = {
        spectrum["head"]: [head for head in found["heads"] if head["head"] == spectrum["head"]]
        for spectrum in found["spectra"]
    }
    heads = {
        _title(spectrum, verdicts[spectrum["head"]]): spectrum
        for spectrum in sorted(found["spectra"], key=lambda spectrum: _best(verdicts[spectrum["head"]]))
    }
    rule = found["symmetry_rule"]
    said = f'"Symmetric is positional" is right for {_number(rule["agreement"])} of {rule["heads"]} heads'
    return [
        page.paragraph(SPECTRA),
        page.table(*_spectrum_table(heads.values())),
        page.paragraph(f"{said} that score by one of both; area under its ROC curve {_number(rule['auroc'])}."),
        page.figure(_singular_values(heads)),
        *(page.figure(_eigenvalues(heads, side)) for side in SIDES),
        page.paragraph(DIRECTIONS),
        *(_folded(title, _head_parts(spectrum)) for title, spectrum in heads.items()),
    ]


def _best(verdicts: Sequence[Json]) -> int:
    return min((OUTCOMES.index(head["outcome"]) for head in verdicts), default=len(OUTCOMES))


def _title(spectrum: Json, verdicts: Sequence[Json]) -> str:
    """A head, and the best that is said of it."""
    if not verdicts:
        return f"{spectrum['head']}: control"
    outcome = OUTCOMES[_best(verdicts)]
    roles = [head["role"] for head in verdicts if head["outcome"] == outcome]
    return f"{spectrum['head']}: {outcome}" + (f" as {', '.join(roles)}" if outcome != "not supported" else "")


def _spectrum_table(heads: Iterable[Json]) -> Table:
    header = ["head", "claimed as", "QK effective rank", "QK flatness", "OV effective rank", "OV flatness"]
    header += ["OV copying score", "QK symmetry", "z", "positional share", "symmetry says", "energy says", "agree"]
    rows = []
    for spectrum in heads:
        symmetry = spectrum["symmetry"]
        row = [spectrum["head"], ", ".join(spectrum["claimed_as"]) or "control"]
        for side in (spectrum["qk"], spectrum["ov"]):
            rank = f"{_number(side['effective_rank'])} ({_number(side['null_effective_rank'])})"
            row += [rank, _number(side["flatness"])]
        row.append(_number(spectrum["ov"]["copying_score"], 2))
        row += [_number(symmetry[name], 2) for name in ("score", "null_z", "positional_share")]
        rows.append([*row, symmetry["rule_says"], symmetry["energy_says"], WORDS[symmetry["agree"]]])
    return header, rows


def _singular_values(heads: Mapping[str, Json]) -> go.Figure:
    """One line for each of the first heads, and the median of the others; {title: head}."""
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for side in SIDES:
        values = [np.array(spectrum[side]["singular_values"], float) for spectrum in heads.values()]
        shares = [s / max(float(s.max()), np.finfo(float).tiny) for s in values]
        drawn = dict(zip(map(html.escape, heads), shares[:MOST_LINES], strict=False))
        if rest := shares[MOST_LINES:]:
            drawn[f"median of {len(rest)} others"] = np.median(rest, axis=0)
        panels[f"σ / largest σ, {side.upper()}"] = {name: (np.arange(1, len(s) + 1), s) for name, s in drawn.items()}
    figure = plots.lines(panels, "Singular values", "number")
    figure.update_traces(showlegend=False, col=2)  # the lines of both panels have the same names
    return _legend_below(figure)


def _eigenvalues(heads: Mapping[str, Json], side: str) -> go.Figure:
    points = {}
    for title, spectrum in list(heads.items())[:MOST_LINES]:
        values = [complex(*eigen["value"]) for eigen in spectrum[side]["eigen"] if None not in eigen["value"]]
        if values:
            points[html.escape(title)] = np.array(values)
    return _legend_below(plots.complex_plane(points, f"Leading eigenvalues, {side.upper()}"))


def _legend_below(figure: go.Figure) -> go.Figure:
    """A legend beside the figure leaves no room for it on a phone."""
    return figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, margin={"b": 120})


def _head_parts(spectrum: Json) -> list[str]:
    parts = [_list("Reading:", [f"{r['outcome']}: {r['predicate']}. {r['evidence']}" for r in spectrum["reading"]])]
    for side in SIDES:
        directions = [(_number(d["sigma"]), str(d["tied_with"] or ""), d) for d in spectrum[side]["directions"]]
        eigen = [(_complex(e["value"]), _number(e["condition"]), e) for e in spectrum[side]["eigen"]]
        parts += [
            page.table(*_direction_table([f"{side.upper()}: σ", "others that tie"], directions)),
            page.table(*_direction_table([f"{side.upper()}: λ", "condition"], eigen)),
        ]
    return parts


def _direction_table(first: Sequence[str], directions: Iterable[tuple[str, str, Json]]) -> Table:
    """Two rows for a direction, one for a subspace, none for one that is not known."""
    rows = []
    for value, note, direction in directions:
        read, written = direction["read"], direction["written"]
        if read["top"]:
            cells = [_words(read["top"]), _words(written["top"]), _shares(read), _shares(written)]
            rows.append([value, note, "+" if read["bottom"] else "", *cells])
        if read["bottom"]:
            rows.append(["", "", "−", _words(read["bottom"]), _words(written["bottom"]), "", ""])
    return [*first, "", "reads", "writes", "share of what is read", "of what is written"], rows


def _words(words: Iterable[str]) -> str:
    """Quoted, so that spaces and line ends show."""
    return " ".join(map(repr, words))


def _shares(side: Json) -> str:
    return ", ".join(
        f"{name} {_number(share, 2)} ({_number(side['chance'][name], 2)}, p {_number(side['p'][name], 2)})"
        for name, share in side["shares"].items()
    )


# --- the instrument ---


def _instrument(arms: Sequence[Json]) -> list[str]:
    trained = [arm for arm in arms if arm["kind"] == "trained"]
    header = ["models", "role", "true", "supported", "both"]
    by_role = [
        [f"{arm['arm']}, {arm['kind']}", role, *(str(counts[name]) for name in header[2:])]
        for arm in arms
        for role, counts in arm["by_role"].items()
    ]
    return [
        page.paragraph(INSTRUMENT),
        page.table(*_instrument_table(arms)),
        *([page.figure(_precision_and_recall(trained))] if trained else []),
        _folded("Role by role", [page.table(header, by_role)]),
    ]


def _instrument_table(arms: Iterable[Json]) -> Table:
    header = ["models", "number", "asked", "true", "supported", "of asked", "precision", "recall"]
    header += ["weights alone", "precision", "recall"]
    rows = []
    for arm in arms:
        share = arm["supported"] / arm["candidates"] if arm["candidates"] else None
        counts = [str(arm[name]) for name in ("models", "candidates", "true", "supported")]
        quality = [_with_interval(arm[name], arm.get(f"{name}_interval")) for name in ("precision", "recall")]
        structural = [str(arm["structural"])]
        structural += [_number(arm[f"structural_{name}"], 2) for name in ("precision", "recall")]
        rows.append([f"{arm['arm']}, {arm['kind']}", *counts, _number(share, 2), *quality, *structural])
    return header, rows


def _precision_and_recall(arms: Sequence[Json]) -> go.Figure:
    figure = go.Figure()
    said = {"": "", "structural_": ", weights alone"}
    for number, (prefix, whose) in enumerate(said.items()):
        for name, opacity in (("precision", 1.0), ("recall", 0.5)):
            values = np.array([arm[prefix + name] for arm in arms], float)
            ends = [
                arm.get(f"{prefix}{name}_interval") or (value, value) for arm, value in zip(arms, values, strict=True)
            ]
            low, high = np.array(ends, float).T
            figure.add_bar(
                x=[html.escape(arm["arm"]) for arm in arms], y=values, name=name + whose, opacity=opacity,
                marker={"color": plots.COLOURS[number]},
                error_y={"type": "data", "array": high - values, "arrayminus": values - low},
            )  # fmt: skip
    figure.update_yaxes(range=[0, 1.05])
    figure.update_layout(
        template="plotly_white", height=420, title="Over trained models", margin={"l": 50, "r": 20, "t": 60},
        font={"family": "system-ui, sans-serif", "size": 13},
    )  # fmt: skip
    return _legend_below(figure)


def _published_table(published: Iterable[Json]) -> Table:
    rows = [
        [
            one["score"],
            ", ".join(one["heads"]),
            _number(one["value"]),
            one["expected"],
            one["source"],
            WORDS[one["met"]],
        ]
        for one in published
    ]
    return ["score", "heads", "value", "published", "source", "met"], rows


# --- parts ---


def _folded(summary: str, parts: Iterable[str]) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>"


def _list(title: str, items: Iterable[str]) -> str:
    return page.paragraph(title) + f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _with_interval(value: float | None, interval: Sequence[float | None] | None) -> str:
    return _number(value, 2) + ("" if interval is None else f" [{_number(interval[0], 2)}, {_number(interval[1], 2)}]")


def _complex(value: Sequence[float | None]) -> str:
    real, imaginary = value
    return _number(real) if not imaginary else f"{_number(real)} {imaginary:+.3g}i"


def _print(console: Console, title: str, table: Table) -> None:
    """As plain text: a name may hold what rich takes for markup."""
    header, rows = table
    print_table(console, escape(title), header, [[escape(cell) for cell in row] for row in rows])
