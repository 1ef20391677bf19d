"""Before the first operation: one thread for each operation.

The tests run in parallel processes on graphs that are too small to share, and sums in one order are equal to the bit.
"""

import tensorflow as tf

tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
