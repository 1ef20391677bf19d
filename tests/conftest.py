"""Before the first operation: one thread for each operation.

The tests run in parallel processes on graphs that are too small to share, and sums in one order are equal to the bit.
"""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Sets TensorFlow up where tests run; the process that only starts the others need not wait for it."""
    if config.getoption("numprocesses") and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import keras  # noqa: PLC0415 - see above
    import tensorflow as tf  # noqa: PLC0415

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 16):
        # From 3.16 on Keras says that recurrent layers hand no mask on.
        config.addinivalue_line(
            "filterwarnings", "ignore:Layer '.*was passed an input with a mask attached:UserWarning"
        )
