"""Our two ops as contenders."""

import importlib
from unittest import mock

from torch.nn.functional import pad

from bench.peers.finding import Peer
from sharpen_kernels import linear_logprob, token_logprob

FOUR = ("logprob", "entropy", "self_certainty", "is_greedy")
PADDING, LARGE = 40, 50.0  # columns, their logits or weights
TEN = (*FOUR, "lse", "varentropy", "sum_p2", "top1", "margin", "rank")


def picked(stats, names):
    """The named statistics as a tuple."""
    return tuple(getattr(stats, name) for name in names)


def _our_logits():
    return {
        "logprob": lambda z, t: token_logprob(z, t).logprob,
        "entropy": lambda z, t: picked(token_logprob(z, t, stats=FOUR[:2]), FOUR[:2]),
        "statistics": lambda z, t: picked(token_logprob(z, t, stats=FOUR), FOUR),
        "ten": lambda z, t: picked(token_logprob(z, t, stats=TEN), TEN),
    }


def _our_hidden():
    def asked(stats):
        return lambda x, w, t, b=None: picked(linear_logprob(x, w, t, bias=b, stats=stats), stats)

    return {
        "logprob": lambda x, w, t, b=None: linear_logprob(x, w, t, bias=b).logprob,
        "entropy": asked(FOUR[:2]),
        "statistics": asked(FOUR),
    }


def _without_kernel(op, calls):
    """Our route without the C++ kernel: what a machine without a compiler runs."""
    native = importlib.import_module(f"sharpen_kernels._{op}_cpu")

    def refused(call):
        def run(*args):
            with mock.patch.object(native, "takes", return_value=False):
                return call(*args)

        return run

    return {name: refused(call) for name, call in calls.items()}


def _our_logits_in_pytorch():
    return _without_kernel("token_logprob", _our_logits())


def _our_hidden_in_pytorch():
    return _without_kernel("linear_logprob", _our_hidden())


def _our_logits_by_options():
    """Logits padded with large ones, masked columns by `vocab_mask`."""

    def asked(stats):
        def run(z, t):
            kept = (z != float("-inf")).any(0) | (len(z) == 0)
            wide = pad(z.masked_fill(~kept, LARGE), (0, PADDING), value=LARGE)
            mask = pad(kept, (0, PADDING), value=True)
            found = token_logprob(wide, t, stats=stats, vocab_size=z.shape[1], vocab_mask=mask)
            return picked(found, stats)

        return run

    return {"logprob": lambda *args: asked(FOUR[:1])(*args)[0], "entropy": asked(FOUR[:2])}


def _our_hidden_by_options():
    """A head padded with large rows, masked columns by `vocab_mask`."""

    def asked(stats):
        def run(x, w, t, b=None):
            wide = pad(w, (0, 0, 0, PADDING), value=LARGE)
            mask = None if b is None else pad(b == 0, (0, PADDING), value=True)
            found = linear_logprob(x, wide, t, stats=stats, vocab_size=len(w), vocab_mask=mask)
            return picked(found, stats)

        return run

    return {"logprob": lambda *args: asked(FOUR[:1])(*args)[0], "entropy": asked(FOUR[:2])}


ANYWHERE = ("cpu", "cuda", "interpreter")
BY_OPTIONS = "ours, vocab_size and vocab_mask"
LOGITS = (
    Peer("ours", _our_logits, ANYWHERE),
    Peer(BY_OPTIONS, _our_logits_by_options, ANYWHERE, timed=False),
    Peer("ours, PyTorch route", _our_logits_in_pytorch, ("cpu",)),
)
HIDDEN = (
    Peer("ours", _our_hidden, ANYWHERE, takes_bias=True),
    Peer(BY_OPTIONS, _our_hidden_by_options, ANYWHERE, takes_bias=True, timed=False),
    Peer("ours, PyTorch route", _our_hidden_in_pytorch, ("cpu",), takes_bias=True),
)
