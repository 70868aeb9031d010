"""From scored and graded samples to the numbers of `summary.json` and one `report.html`.

`sharpen.evaluation.report` is imported where a report is written: it brings matplotlib.
"""

from .outcome import Outcome as Outcome
from .outcome import Texts as Texts
from .summary import summarize as summarize
