"""The tables of who returns what."""

from pathlib import Path

from bench._cases import CASES

Verdict = tuple[str, str]  # what it is, and what that rests on
Verdicts = dict[str, dict[str, dict[str, Verdict]]]  # op, implementation, case
BEGIN, END = "<!-- conformance: python -m bench.conformance --write -->", "<!-- end -->"


def tables(verdicts: Verdicts, titles: dict[str, str]) -> str:
    """One Markdown table an op, a row a case; then why an implementation is absent."""
    parts = []
    for op, by_name in verdicts.items():
        here = {name: v for name, v in by_name.items() if _absence(v) is None}
        absent = {name: _absence(v) for name, v in by_name.items() if name not in here}
        rows = [["", *here], ["---"] * (len(here) + 1)]
        for case in CASES:
            rows.append([case.name, *(_cell(*found[case.name]) for found in here.values())])
        right = (sum(v == "right" for v, _ in found.values()) for found in here.values())
        of = (sum(v != "-" for v, _ in found.values()) for found in here.values())
        rows.append(["**right**", *(f"{n} of {m}" for n, m in zip(right, of, strict=True))])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(f"{titles[op]}:\n\n" + "\n".join(lines))
        parts += [f"Not run: {name} ({why})." for name, why in absent.items()]
    return "\n\n".join(parts)


def _absence(found: dict[str, Verdict]) -> str | None:
    reasons = [why for verdict, why in found.values() if verdict == "absent"]
    return reasons[0] if reasons else None


def _cell(verdict: str, why: str) -> str:
    if verdict == "wrong":
        return f"**wrong**, {why}"
    return {"right": "right", "-": ""}.get(verdict, f"**{verdict}**")


def write_into(path: Path, text: str) -> None:
    """Replace what stands between the marks in `path`."""
    old = path.read_text()
    before, _, rest = old.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path} lacks the marks {BEGIN} and {END}.")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
