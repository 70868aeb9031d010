"""Seconds against N, beside what the numbers of tokens say."""

from pathlib import Path

from bench._rows import Row

# of every way, in the order of the legend: colour, marker
STYLES = {
    "padded batch": ("#c44e52", "s"),
    "DynamicCache": ("#8172b3", "D"),
    "ours, cache": ("#64b5cd", "^"),
    "ours, tree": ("#1f6fb4", "o"),
}


def chart(rows: list[Row], path: Path) -> None:
    """One SVG; both models pass through the padded batch at the least N."""
    import matplotlib

    matplotlib.use("svg")
    # text as text, and the same ids in every run
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "sharpen"}
    from matplotlib import pyplot

    P, C = (int(part[2:]) for part in rows[0].shape.split()[:2])
    counts = sorted({_n(row) for row in rows})
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained", facecolor="white")
    for name, (color, marker) in STYLES.items():
        own = sorted((row for row in rows if row.impl == name), key=_n)
        seconds = [row.median_us / 1e6 for row in own]
        axes.plot([_n(r) for r in own], seconds, color=color, marker=marker, ms=5, label=name)
    start = next(r.median_us / 1e6 for r in rows if r.impl == "padded batch" and _n(r) == counts[0])
    per_token = start / (counts[0] * (P + C))
    grid = [counts[0] * (counts[-1] / counts[0]) ** (i / 40) for i in range(41)]
    models = {"N (P + C) tokens": (":", lambda n: n * (P + C))}
    models["P + N C tokens"] = ("--", lambda n: P + n * C)
    for label, (line, tokens) in models.items():
        seconds = [tokens(n) * per_token for n in grid]
        axes.plot(grid, seconds, color="#555555", ls=line, lw=1.2, label=label, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="completions of one prompt, N")
    axes.set_ylabel("seconds to score them all")
    facts = rows[0].machine
    threads = "1 thread" if facts["threads"] == "1" else f"{facts['threads']} threads"
    title = f"Prompt of P = {P} tokens, completions of C = {C}"
    axes.set_title(f"{title}\n{facts['device']}, {threads}, fp32", fontsize=10)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _n(row: Row) -> int:
    return int(row.shape.rpartition("=")[2])
