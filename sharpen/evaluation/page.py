"""The one page a report is: its style, its frame, and how a number or a quoted text is written.

Nothing on the page is fetched or executed; a content security policy in the page says so to the
browser. Text from outside enters through `text` or `quote` only.
"""

import html
import math
import re

# what HTML cannot hold: controls but tab and newline, lone surrogates, noncharacters
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
QUOTE_HEAD, QUOTE_TAIL = 700, 500  # characters of a long text that are shown; a choice
NBSP, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1a1a19; --soft: #63625d; --rule: #dededb; --tint: #f3f3ef;
  --s0: #0072b2; --s1: #c2500a; --s2: #007d5c; --s3: #8250b0; --s4: #846600; --s5: #4a6674;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  --sans: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161615; --ink: #e8e7e2; --soft: #a09f98; --rule: #383834; --tint: #1f1f1d;
    --s0: #5ab4e8; --s1: #f5955a; --s2: #4cc9a0; --s3: #c3a0ea; --s4: #d9b847; --s5: #9db6c2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 4rem clamp(1.1rem, 4vw, 3rem) 5rem; max-width: 74rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans);
  font-variant-numeric: tabular-nums;
}
h1 {
  margin: 0; max-width: 24em; font: 400 clamp(1.7rem, 3.6vw, 2.5rem)/1.2 var(--serif);
  text-wrap: balance;
}
h2 { margin: 4rem 0 1rem; font: 400 1.45rem/1.3 var(--serif); }
h3 { margin: 2.5rem 0 0.4rem; font-size: 1rem; font-weight: 600; }
p { margin: 0.6rem 0; max-width: 44em; text-wrap: pretty; }
.lede { margin-top: 1.1rem; font: 1.15rem/1.55 var(--serif); }
.soft, caption, figcaption span, th { color: var(--soft); }
.note { margin-top: 1rem; max-width: 50em; font-size: 0.94rem; color: var(--soft); }
h3 .soft { font-weight: 400; }
.eyebrow { margin: 0 0 0.9rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; }
th { font-weight: 400; text-align: left; vertical-align: bottom; }
th, td { padding: 0.5rem 0 0.5rem 1.6rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { padding-left: 0; }
.numbers th:not(:first-child), .numbers td:not(:first-child) {
  text-align: right; white-space: nowrap;
}
.own td { font-weight: 600; }
.own td .soft { font-weight: 400; }
.figures {
  display: grid; gap: 2.5rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
}
figure {
  display: flex; flex-direction: column; justify-content: space-between;
  margin: 0; max-width: 38rem; break-inside: avoid;
}
figcaption { margin-bottom: 0.7rem; font-size: 0.94rem; line-height: 1.45; }
figcaption b { display: block; font-weight: 600; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-family: var(--sans) !important; }
.quotes { table-layout: fixed; }
.quotes td, .quotes th { vertical-align: top; }
.quotes th:first-child { width: 24%; }
.quotes pre { margin: 0; font: 0.82rem/1.5 var(--mono); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.quotes tr { break-inside: avoid; }
.grade { margin-bottom: 0.25rem; font-size: 0.82rem; color: var(--soft); }
.right { color: var(--s0); }
.wrong { color: var(--s1); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 2rem; margin: 0;
  font-size: 0.94rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 44rem) {
  body { padding-top: 2rem; }
  .quotes, .quotes tbody, .quotes tr, .quotes td { display: block; width: 100%; }
  .quotes thead { display: none; }
  .quotes tr { padding: 0.9rem 0; border-bottom: 1px solid var(--rule); }
  .quotes td { padding: 0.3rem 0; border: 0; }
  .quotes td:not(:first-child)::before {
    content: attr(data-head); font-size: 0.82rem; color: var(--soft);
  }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #fff; --ink: #000; --soft: #555; --rule: #ccc; --tint: #fff;
    --s0: #0072b2; --s1: #c2500a; --s2: #007d5c; --s3: #8250b0; --s4: #846600; --s5: #4a6674;
  }
  html { font-size: 8pt; }
  body { padding: 0; max-width: none; }
  .scroll { overflow: visible; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1.5rem 2rem; }
  h2, h3 { break-after: avoid; }
}
""".strip()


def page(title: str, body: str) -> str:
    """A whole HTML document; `title` is escaped here, `body` is HTML already."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>
{CSS}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def text(value: object) -> str:
    """`str(value)` as HTML text: escaped, and free of characters that HTML cannot hold."""
    return html.escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def quote(value: str) -> str:
    """A text as it was written, in `<pre>`; of a long one the beginning and the end."""
    hidden = len(value) - QUOTE_HEAD - QUOTE_TAIL
    # a gap shorter than its own notice would save nothing
    if hidden <= 100:
        return f"<pre>{text(value.strip())}</pre>"
    head, tail = text(value[:QUOTE_HEAD].lstrip()), text(value[-QUOTE_TAIL:].rstrip())
    return f'<pre>{head}<span class="soft"> [{hidden:,} characters left out] </span>{tail}</pre>'


def number(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number with a true minus sign; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return NONE
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """A fraction of 1 as percent, with its sign."""
    return NONE if share is None else f"{number(100 * share)}{NBSP}%"


def interval(bounds: list[float] | None, scale: float = 1.0, *, sign: bool = False) -> str:
    """`low to high`."""
    if bounds is None:
        return NONE
    return f"{NBSP}to{NBSP}".join(number(scale * bound, sign=sign) for bound in bounds)


def p_text(p: float | None) -> str:
    """A p-value to two figures; below 0.001 only that it is."""
    if p is None:
        return NONE
    return f"<{NBSP}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def table(heads: list[str], rows: list[tuple[str, list[str]]], kind: str) -> str:
    """A table of cells that are HTML already; each row has a class and its cells."""
    head = "".join(f"<th scope='col'>{cell}</th>" for cell in heads)
    body = "\n".join(
        f"<tr{f' class={name!r}' if name else ''}>"
        + "".join(f"<td data-head='{h}'>{c}</td>" for h, c in zip(heads, cells, strict=True))
        + "</tr>"
        for name, cells in rows
    )
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
