"""`sharpen theory --study NAME`: a small study without a model.

Writes into its run directory: `rows.jsonl` (a line a case, as it is measured), `table.md` and
`figure.svg`.
"""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from sharpen.evaluation.theory.chart import chart_svg
from sharpen.evaluation.theory.studies import STUDIES
from sharpen.records import write_text
from sharpen.runs import Journal, Run

ROWS, TABLE, FIGURE, TIMINGS = "rows.jsonl", "table.md", "figure.svg", "timings.jsonl"


def run_study(name: str, out: Path, *, seed: int, quick: bool) -> None:
    """Run the study, or go on with it."""
    study = STUDIES[name](quick=quick)
    settings = {"command": "theory", "study": name, "seed": seed, "quick": quick}
    with Run(out / "run.json", settings, [out / file for file in (ROWS, TABLE, FIGURE)]):
        journal, timings = Journal(out / ROWS), Journal(out / TIMINGS)
        rows = list(journal.rows)
        n = len(study.cases)
        for i in tqdm(range(len(rows), n), initial=len(rows), total=n, desc=name, unit="case"):
            started = time.monotonic()
            row = study.row(i, seed)
            journal.append([row])
            timings.append([{"stage": name, "seconds": time.monotonic() - started}])
            rows.append(row)
        text = study.table(rows)
        write_text(out / TABLE, text)
        write_text(out / FIGURE, chart_svg(study.panels(rows), name))
    sys.stdout.write(f"{text}\ntheory: {out / TABLE}, {out / FIGURE}\n")
