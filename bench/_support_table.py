"""What `bench/support.py` found, as a page reads it."""

import transformers

from bench._examine import Found


def table(found: list[Found]) -> str:
    """Markdown: what is supported, then what could not be tried."""
    names = ("type", "shares prompts in scoring", "head", "sampling", "largest error", "own noise")
    lines = [f"| {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    for f in found:
        if f.verdict in ("right", "wrong"):
            error = f"{f.error:.0e}" + (f" **{f.why} wrong**" if f.verdict == "wrong" else "")
            cells = (f.model_type, f.sharing, f.head, f.sampling, error, f"{f.noise:.0e}")
            lines.append(f"| {' | '.join(cells)} |")
    refused = [f"`{f.model_type}` ({f.why})" for f in found if f.verdict == "refused"]
    lost = [f"`{f.model_type}` ({f.why})" for f in found if f.verdict == "not built"]
    counts = {v: sum(f.verdict == v for f in found) for v in ("right", "wrong")}
    head = (
        f"transformers {transformers.__version__}: {len(found)} types, {counts['right']} right, "
        f"{counts['wrong']} silently wrong, {len(refused)} refused with an error, "
        f"{len(lost)} of which no tiny model could be built.\n\n"
    )
    tail = (
        f"\n\nRefused: {', '.join(refused) or 'none'}.\n\nNot built: {', '.join(lost) or 'none'}."
    )
    return head + "\n".join(lines) + tail
