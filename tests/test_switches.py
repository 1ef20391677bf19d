"""The global switches of TensorFlow and Keras: monitor and regularizer work with all that Keras itself trains with."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import sys, warnings
    import keras, numpy as np, tensorflow as tf
    from keras_jacmon import JacobianMonitor, JacobianRegularizer

    switches = {
        "check_numerics": tf.debugging.enable_check_numerics,
        "numpy_behavior": tf.experimental.numpy.experimental_enable_numpy_behavior,
        "determinism": tf.config.experimental.enable_op_determinism,
        "no_soft_placement": lambda: tf.config.set_soft_device_placement(False),
        "whole_tracebacks": keras.config.disable_traceback_filtering,
        "eager_functions": lambda: tf.config.run_functions_eagerly(True),
        "float16": lambda: keras.config.set_floatx("float16"),
        "bfloat16": lambda: keras.config.set_floatx("bfloat16"),
    }
    keras.utils.set_random_seed(0)
    for switch in sys.argv[1:]:
        switches[switch]()
    warnings.filterwarnings("error", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*run_functions_eagerly")
    # Masked steps are NaN in a report.
    x, y = np.random.normal(size=(16, 5, 3)), np.random.normal(size=(16, 1))
    x[::2, 3:] = 0
    # Not orthogonal, which Keras cannot initialize in bfloat16.
    rnn = keras.layers.SimpleRNN(3, recurrent_initializer="glorot_uniform", name="rnn")
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.Masking(), rnn, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    monitor = JacobianMonitor(
        x[:4], log_dir=None, measures="variance", on_error="raise", regularizer=JacobianRegularizer(1.0, 1.0)
    )
    history = model.fit(x, y, batch_size=4, verbose=0, callbacks=[monitor]).history
    assert len(monitor.reports) == 2
    assert np.isfinite(history["rnn_jac_variance"]).all() and history["jac_penalty"][0] > 0, history
"""


@pytest.mark.parametrize(
    ("switches", "flags"),
    [
        ("check_numerics numpy_behavior determinism no_soft_placement whole_tracebacks", ""),
        ("float16 eager_functions", ""),
        pytest.param("float16", "--tf_xla_auto_jit=2", marks=pytest.mark.soak),
        pytest.param("bfloat16", "", marks=pytest.mark.soak),
    ],
)
def test_monitor_and_regularizer_work_under_each_switch(switches: str, flags: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *switches.split()]
    environment = os.environ | {"TF_XLA_FLAGS": flags}
    finished = subprocess.run(  # noqa: S603 - our own words
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
