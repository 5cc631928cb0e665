"""One self-contained HTML page: text, tables and figures, no network."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; color: #1c2128; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } p { max-width: 75ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #d8dee4; padding: .3rem .7rem; text-align: left; white-space: nowrap; }
th { background: #f6f8fa; } .met { color: #1a7f37; } .missed { color: #b62324; font-weight: 600; }
"""


def page(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The page.

    Args:
        title: heading and title of the page.
        sections: (heading, parts); a part is HTML, as paragraph, table and figure make it.
    """
    body = "\n".join(
        f"<section><h2>{html.escape(heading)}</h2>\n{''.join(parts)}</section>" for heading, parts in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head>\n<body><main><h1>{html.escape(title)}</h1>\n{body}\n"
        "</main></body></html>\n"
    )


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text cells; "yes" and "no" in the last column are coloured as an aim met or missed."""
    marks = {"yes": ' class="met"', "no": ' class="missed"'}
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = [
        "".join(f"<td>{html.escape(cell)}</td>" for cell in row[:-1])
        + f"<td{marks.get(row[-1], '')}>{html.escape(row[-1])}</td>"
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(drawn: go.Figure) -> str:
    """A figure that can be hovered and zoomed."""
    return drawn.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
