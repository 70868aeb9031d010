"""What a command says beside its result: its own messages, one line each, on stderr."""

import logging
import sys

from tqdm import tqdm


class _BesideProgressBars(logging.Handler):
    """Writes to stderr without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_stderr() -> None:
    """Our own messages, one line each; once, however often a process calls it."""
    for name in ("sharpen", "sharpen_kernels"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            handler = _BesideProgressBars()
            handler.setFormatter(logging.Formatter("sharpen: %(message)s"))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def quiet_libraries() -> None:
    """A checkpoint's own advice, loading bars and retries are not news to the user of a command."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
