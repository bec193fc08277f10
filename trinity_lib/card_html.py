"""An audit card as one page that loads nothing: for paper, a phone, light and dark."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root{--ink:#1b1f24;--paper:#fff;--faint:#667078;--line:#d5dade;--mark:#0b5cad;--warn:#8a5a00;
--soft:#f3f5f7}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#15181b;--faint:#9aa4ad;
--line:#3a4249;--mark:#7db7f0;--warn:#e0b252;--soft:#1e2327}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1rem;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
.notice{border-left:.3rem solid var(--warn);background:var(--soft);padding:.6rem .9rem;margin:0}
.faint{color:var(--faint)}code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem .3rem 0;
border-bottom:1px solid var(--line)}
th.id{min-width:8rem}
td.number{font-variant-numeric:tabular-nums;white-space:nowrap}
a{color:var(--mark)}.chance{color:var(--warn);white-space:nowrap}
svg{display:block;width:11rem;height:1.4rem}
svg .bar{stroke:var(--mark);stroke-width:3}svg .dot{fill:var(--mark)}
svg .chance{stroke:var(--faint);stroke-dasharray:2 2}svg .truth{fill:none;stroke:var(--ink);
stroke-width:1.5}
@media (max-width:44rem){thead{display:none}tr{display:block;padding:.4rem 0;
border-bottom:1px solid var(--line)}td,tbody th{display:block;border:0;padding:.05rem 0}
td.number{display:inline-block;margin-right:1rem}
td[data-label]::before{content:attr(data-label) ": ";color:var(--faint)}}
@media print{:root{--ink:#000;--paper:#fff;--faint:#444;--line:#999;--mark:#000;--warn:#000;
--soft:#fff}body{max-width:none;font-size:10pt;padding:0}tr{break-inside:avoid}
h2,h3{break-after:avoid}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing."""


def page(card: Mapping[str, Any]) -> str:
    """The card's HTML. Every text of the card is escaped."""
    name, stage = card["checkpoint"]["name"], card["stage"]
    title = f"Audit card: {name} ({stage})"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="notice">{_text(card["NOTICE"])}</p>',
        _identity(card),
        _findings(card["findings"]),
        _list("limitations", "What the figures do not show", card["limitations"]),
        _not_asked(card["not-asked"]),
        _frameworks(card),
        _details(card),
        _files(card["checkpoint"]["files"]),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def number(value: Any) -> str:
    """A figure in three digits; a dash where there is none."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3g}"


def _text(value: Any) -> str:
    return escape(str(value), quote=True)


def _row(cells: Iterable[tuple[str, str]]) -> str:
    """Cells of (label, HTML); the first is the row's own heading."""
    (_, first), *rest = cells
    tail = "".join(
        f'<td class="number" data-label="{_text(n)}">{c}</td>' if n else f"<td>{c}</td>"
        for n, c in rest
    )
    return f'<tr><th scope="row">{first}</th>{tail}</tr>'


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _pairs(pairs: Mapping[str, Any]) -> str:
    rows = (_row([("", _text(n)), ("", f"<code>{_text(v)}</code>")]) for n, v in pairs.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _identity(card: Mapping[str, Any]) -> str:
    code, checkpoint = card["code"], card["checkpoint"]
    edited = ", edited" if code["git_dirty"] else ""
    shown = {
        "audited at": card["created_at"],
        "code": code["git_commit"] + edited,
        "weights, SHA-256": checkpoint["weights"],
        "tokenizer, SHA-256": checkpoint["tokenizer"] or "none",
        "all files, SHA-256": checkpoint["everything"],
        "this card, SHA-256": card["digest"],
    }
    return '<h2 id="weights">What was audited</h2>' + _pairs(shown)


def _findings(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table a family, a row an item, measure and stage; one scale for those of a measure."""
    parts = [
        '<h2 id="findings">What was found</h2>',
        '<p class="faint">Bar: 95% interval. Dot: estimate. Diamond: truth, where it is known. '
        "Dashed: what a model that knows nothing would show. Units: independent clusters that "
        "an interval rests on.</p>",
    ]
    if not rows:
        parts.append("<p>No findings.</p>")
    head = ("item", "stage", "truth", "chance", "estimate", "95% interval", "", "units", "")
    for family in dict.fromkeys(row["family"] for row in rows):
        parts.append(f'<h3 id="{_text(family)}">{_text(family)}</h3>')
        own = [row for row in rows if row["family"] == family]
        for measure in dict.fromkeys(row["measure"] for row in own):
            same = _by_item([row for row in own if row["measure"] == measure])
            scale = _scale(same)
            lines = [_row(_cells(row, scale)) for row in same]
            parts += [f'<p class="faint">{_text(measure)}</p>', _table(head, lines)]
    return "\n".join(parts)


def _by_item(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Stages of an item one under the other, items in the order they came in."""
    items = list(dict.fromkeys(row["item"] for row in rows))
    return sorted(rows, key=lambda row: items.index(row["item"]))


def _cells(row: Mapping[str, Any], scale: tuple[float, float]) -> list[tuple[str, str]]:
    interval = f"{number(row['low'])} to {number(row['high'])}"
    note = '<span class="chance">at chance</span>' if row["at_chance"] else ""
    if row["recovered"] is False:
        note += " <span>truth outside</span>"
    return [
        ("item", _text(row["item"])),
        ("stage", _text(row["stage"])),
        ("truth", _text(number(row["truth"]))),
        ("chance", _text(number(row["chance"]))),
        ("estimate", _text(number(row["estimate"]))),
        ("95% interval", _text(interval)),
        ("", _picture(row, scale)),
        ("units", _text(number(row["units"]))),
        ("", note),
    ]


SHOWN = ("low", "high", "estimate", "truth", "chance")


def _scale(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The range that a picture spans, a twelfth wider on either side."""
    known = [row[n] for row in rows for n in SHOWN if isinstance(row[n], int | float)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    room = (high - low) / 12 or 1.0
    return low - room, high + room


def _picture(row: Mapping[str, Any], scale: tuple[float, float]) -> str:
    """A finding drawn, 176 by 22; what is not finite is left out."""
    low, high = scale
    at = {
        name: 176 * (row[name] - low) / (high - low)
        for name in SHOWN
        if isinstance(row[name], int | float)
    }
    parts = []
    if "chance" in at:
        x = at["chance"]
        parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="1" y2="21"/>')
    if {"low", "high"} <= set(at):
        parts.append(
            f'<line class="bar" x1="{at["low"]:.1f}" x2="{at["high"]:.1f}" y1="11" y2="11"/>'
        )
    if "estimate" in at:
        parts.append(f'<circle class="dot" cx="{at["estimate"]:.1f}" cy="11" r="4"/>')
    if "truth" in at:
        parts.append(f'<path class="truth" d="M{at["truth"]:.1f} 4l6 7-6 7-6-7z"/>')
    said = f"estimate {number(row['estimate'])}, {number(row['low'])} to {number(row['high'])}"
    head = f'<svg viewBox="0 0 176 22" role="img" aria-label="{_text(said)}">'
    return head + "".join(parts) + "</svg>"


def _list(anchor: str, title: str, items: Sequence[str]) -> str:
    inner = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f'<h2 id="{anchor}">{title}</h2><ul>{inner}</ul>'


def _not_asked(reasons: Mapping[str, str]) -> str:
    said = [f"{what}: {why}" for what, why in reasons.items()]
    return _list("not-asked", "What was not asked, and why", said or ["Nothing is stated."])


def _frameworks(card: Mapping[str, Any]) -> str:
    """Headings with evidence in a table, the others in a list of their own."""
    parts = ["<h2>Where the evidence belongs</h2>"]
    for each in card["frameworks"]:
        with_some = [h for h in each["headings"] if h["evidence"]]
        without = [h for h in each["headings"] if not h["evidence"]]
        parts.append(f"<h3>{_text(each['name'])}</h3>")
        parts.append(f'<p class="faint">{_text(each["source"])}. {_text(each["note"])}</p>')
        rows = [
            f'<tr><th scope="row" class="id">{_text(h["id"])}</th>'
            f"<td>{_text(h['wording'])}</td>"
            f"<td>{_links(card, h)}</td></tr>"
            for h in with_some
        ]
        parts.append(_table(("heading", "wording", "evidence in this card"), rows))
        parts.append(f"<p><b>No evidence in this card</b> ({len(without)} headings):</p>")
        listed = (f"<li>{_text(h['id'])}: {_text(h['wording'])}</li>" for h in without)
        parts.append(f'<ul class="faint">{"".join(listed)}</ul>')
    return "\n".join(parts)


ANCHORS = {
    "tokenizer": "weights", "code": "weights", "truth": "findings", "stages": "findings",
    "environment": "details", "run": "details", "seeds": "details", "data": "details",
    "records": "details", "configuration": "details",
}  # fmt: skip
"""Where evidence stands on the page, if not under its own name."""


def _links(card: Mapping[str, Any], heading: Mapping[str, Any]) -> str:
    links = ", ".join(
        f'<a href="#{_text(ANCHORS.get(name, name))}" title="{_text(card["evidence"][name])}">'
        f"{_text(name)}</a>"
        for name in heading["evidence"]
    )
    part = f' <span class="faint">({_text(heading["part"])})</span>' if heading["part"] else ""
    return links + part


def _details(card: Mapping[str, Any]) -> str:
    """Data, seeds, run, environment, records and configuration, as they are recorded."""
    parts = ['<h2 id="details">Data, run, environment, configuration</h2>']
    for name in ("data", "seeds", "run", "environment", "records", "configuration"):
        content = card[name]
        parts.append(f"<h3>{name}</h3>")
        if not content:
            parts.append("<p>Nothing is recorded.</p>")
            continue
        plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in content.items()}
        parts.append(_pairs(plain))
    return "\n".join(parts)


def _files(files: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        _row(
            [
                ("", f"<code>{_text(name)}</code>"),
                ("role", _text(about["role"])),
                ("bytes", f"{about['bytes']:,}"),
                ("", f"<code>{about['sha256']}</code>"),
            ]
        )
        for name, about in sorted(files.items())
    )
    return "<h2>Files</h2>" + _table(("file", "role", "bytes", "SHA-256"), rows)
