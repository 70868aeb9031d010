"""Our two ops as contenders."""

import importlib
from unittest import mock

from bench.peers.finding import Peer
from sharpen_kernels import linear_logprob, token_logprob

FOUR = ("logprob", "entropy", "self_certainty", "is_greedy")
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


def _our_pytorch_route():
    """Our route without the C++ kernel: what a machine without a compiler runs."""
    native = importlib.import_module("sharpen_kernels._linear_logprob_cpu")

    def refused(call):
        def run(*args):
            with mock.patch.object(native, "takes", return_value=False):
                return call(*args)

        return run

    return {name: refused(call) for name, call in _our_hidden().items()}


ANYWHERE = ("cpu", "cuda", "interpreter")
LOGITS = (Peer("ours", _our_logits, ANYWHERE),)
HIDDEN = (
    Peer("ours", _our_hidden, ANYWHERE, takes_bias=True),
    Peer("ours, PyTorch route", _our_pytorch_route, ("cpu",), takes_bias=True),
)
