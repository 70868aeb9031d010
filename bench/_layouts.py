"""The same values in memory of another shape."""

import functools
import operator

from torch import Tensor

from bench._cases import FAR


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory, the rest of which holds large numbers."""
    rows, columns = x.shape
    spare = functools.partial(x.new_full, fill_value=50.0)
    if layout == "plain":
        return x
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "huge stride":
        # untouched pages of memory are never there
        step = FAR // (rows - 1) + 8
        view = x.new_empty(step * (rows - 1) + columns).as_strided((rows, columns), (step, 1))
    else:
        wide = {
            "padded head": lambda: spare((rows + 40, columns))[:rows],
            "padded": lambda: spare((rows, columns + 40))[:, :columns],
            "strided": lambda: spare((2 * rows, columns + 8))[::2, :columns],
            "unaligned": lambda: spare((rows * columns + 1,))[1:].view(rows, columns),
        }
        view = wide[layout]()
    return operator.methodcaller("copy_", x)(view)
