"""Products of Triton's interpreter, the same for a row wherever in its tile it is."""

import numpy as np


def install():
    """Sum in fp64 and round once: BLAS may round a row by its place in a tile, a GPU does not."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *_):
        out = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return TensorHandle(out.astype(d.data.dtype), d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
