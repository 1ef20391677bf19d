"""The global switches of TensorFlow and Keras: monitor and regularizer work with all that Keras itself trains with."""

from __future__ import annotations

import processes
import pytest

SCRIPT = """
    import sys, warnings
    import keras, numpy as np, tensorflow as tf
    from keras_jacmon import JacobianMonitor, JacobianRegularizer

    def train():
        keras.utils.set_random_seed(0)
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

    warnings.filterwarnings("ignore", message=".*run_functions_eagerly")
    floatx, *others = sys.argv[1:]
    keras.config.set_floatx(floatx)
    tf.config.run_functions_eagerly("eager" in others)
    train()
    if "switches" in others:
        keras.config.set_floatx("float32")
        tf.config.run_functions_eagerly(False)
        tf.debugging.enable_check_numerics()
        tf.experimental.numpy.experimental_enable_numpy_behavior()
        tf.config.experimental.enable_op_determinism()
        tf.config.set_soft_device_placement(False)
        keras.config.disable_traceback_filtering()
        train()
"""


@pytest.mark.parametrize(
    ("switches", "flags"),
    [
        ("float16 eager switches", ""),
        pytest.param("float16", "--tf_xla_auto_jit=2", marks=pytest.mark.soak),
        pytest.param("bfloat16", "", marks=pytest.mark.soak),
    ],
)
def test_monitor_and_regularizer_work_under_each_switch(switches: str, flags: str) -> None:
    finished = processes.run(SCRIPT, *switches.split(), environment={"TF_XLA_FLAGS": flags})
    assert finished.returncode == 0, finished.stderr[-3000:]
