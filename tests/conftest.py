"""Before the first operation: one thread for each operation.

The tests run in parallel processes on graphs that are too small to share, and sums in one order are equal to the bit.
"""

import keras
import pytest
import tensorflow as tf

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Lets Keras say, from 3.16 on, that recurrent layers hand no mask on."""
    if tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 16):
        config.addinivalue_line(
            "filterwarnings", "ignore:Layer '.*was passed an input with a mask attached:UserWarning"
        )
