"""`python -m sharpen` and `sharpen` are the command line."""

import os
import sys
from typing import NoReturn

from .cli import main


def entry() -> NoReturn:
    """Run the command line and end the process."""
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code
    distributed = sys.modules.get("torch.distributed")
    if isinstance(code, int) and distributed is not None and distributed.is_initialized():
        # all is written; gloo's threads abort a process that Python takes down around them (11 of
        # 30 runs of PyTorch 2.13)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
