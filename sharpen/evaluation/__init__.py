"""From scored and graded samples to the numbers of `summary.json` and one `report.html`.

`sharpen.evaluation.report` is imported where a report is written: it brings matplotlib.
"""

from .metrics import Outcome as Outcome
from .metrics import Texts as Texts
from .summary import summarize as summarize
