"""`sharpen lm-eval`: lm-evaluation-harness's own command line, with the model type `sharpen`.

Every argument goes to it as it is, and its exit code comes back.
"""

import importlib
import sys
from collections.abc import Sequence

from sharpen.integrations.lm_eval import register

HELP = """\
sharpen lm-eval ARGUMENTS: lm-eval's own command line with one more model type, `sharpen`.
Every argument goes to lm-eval as it is. `--model sharpen` takes the --model_args of `hf`, and
  max_tokens=N     tokens of one forward (default: batch size x longest request, at least 4096)
  sharing=WAY      auto, tree, cache or none: how continuations share their contexts
  sharpen lm-eval --model sharpen --model_args pretrained=gpt2 --tasks arc_easy
What follows is lm-eval's own help.

"""


def forward(argv: Sequence[str]) -> int:
    """Register the model type, run lm-eval on `argv`, and return its exit code.

    Raises:
        InputError: If lm-eval is not installed, or the model type refuses an argument.
    """
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        sys.stdout.flush()
    register()
    ours = sys.argv
    # where lm-eval reads its arguments
    sys.argv = ["lm-eval", *argv]
    try:
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except SystemExit as ended:
        # what a shell would see
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    except KeyboardInterrupt:
        # what a shell sees of lm-eval; only --use_cache lets the same command go on
        return 130
    finally:
        sys.argv = ours
    return 0
