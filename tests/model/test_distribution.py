"""Models of several replicas: the values are right, there is one writer, and what is not supported is refused."""

from __future__ import annotations

import pytest
import two_devices

DEFINITIONS = """
    SAMPLES, STEPS = 5, 6
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, STEPS, 3)).astype("float32"), rng.normal(size=(32, 1)).astype("float32")
    probe, targets = x[:SAMPLES], y[:SAMPLES]

    class CountingCell(keras.layers.SimpleRNNCell):
        '''Has a tf.Variable of its own.'''
        def build(self, shape):
            super().build(shape)
            self.calls = tf.Variable(0.0, trainable=False)

        def call(self, inputs, states, training=False):
            self.calls.assign_add(1.0)
            return super().call(inputs, states)

    def make(strategy):
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = keras.Sequential([
                keras.Input((STEPS, 3)),
                keras.layers.Masking(),
                keras.layers.LSTM(3, return_sequences=True, dropout=0.2, name="lstm"),
                keras.layers.RNN(CountingCell(3), name="rnn"),
                keras.layers.Dense(1),
            ])
            model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
        return model
"""

VALUES = """
    padded = probe.copy()
    padded[1, 4:] = 0
    one, two = make(default), make(mirrored)
    two.set_weights(one.get_weights())
    options = {
        "layers": ["lstm", "rnn"],
        "measures": ["variance", "joint/spectral_norm", "joint/growth", "joint/singular_values"],
        "targets": targets,
        "tolerance": 1e-3,
    }
    expected = measure(one, padded, **options)
    meter = JacobianMeter(two, padded, **options)

    def on_each_replica():
        variables = [*(variable.value for variable in two.trainable_variables), two.get_layer("rnn").cell.calls]
        return [part.numpy() for variable in variables for part in variable.values]

    before = on_each_replica()
    assert len(before) == 2 * (len(two.trainable_variables) + 1)
    found = meter()
    # The own variable of a cell, which counts its calls, is put back.
    for left, right in zip(before, on_each_replica(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert list(found) == list(expected)
    for name, layer in expected.layers.items():
        assert list(found[name].values) == list(layer.values)
        assert list(found[name].sequences) == list(layer.sequences)
        assert (found[name].certificate or 0) < 1e-5
        np.testing.assert_array_equal(found[name].mask, layer.mask)
        for key, values in layer.values.items():
            np.testing.assert_allclose(found[name][key], values, rtol=1e-3, atol=1e-6, err_msg=key)
        for key, values in layer.sequences.items():
            np.testing.assert_allclose(found[name][key], values, rtol=1e-3, atol=1e-6, err_msg=key)
        spectra = found[name].spectra[layer.joint + "singular_values"]
        assert len({sample for _, sample in found[name].spectra_at}) == SAMPLES
        for (step, sample), row in zip(found[name].spectra_at, spectra, strict=True):
            largest = expected[name][layer.joint + "spectral_norm"][step, sample]
            np.testing.assert_allclose(row.max(), largest, rtol=1e-3)
"""

FIT = """
    directory, measures = pathlib.Path(sys.argv[1]), ["variance", "joint/variance"]

    def train(*callbacks):
        model = make(mirrored)
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks).history
        left = [*model.variables, *model.optimizer.variables, model.layers[2].cell.calls]
        return model, history, [np.array(value) for value in left]

    _, history, without = train()
    monitor = JacobianMonitor(
        probe, measures=measures, targets=targets, log_dir=directory, update_freq=3, logs="all", on_error="raise",
    )
    model, seen, with_monitor = train(monitor)
    for left, right in zip(without, with_monitor, strict=True):
        np.testing.assert_array_equal(left, right)
    assert seen["loss"] == history["loss"]
    assert [step for step, _ in monitor.reports] == [0, 3, 6, 8]
    assert len(list((directory / "jacobian").glob("*.tfevents.*"))) == 1
    alone = make(default)
    alone.set_weights(model.get_weights())
    expected = measure(alone, probe, measures=measures, targets=targets)
    last = monitor.reports[-1][1].scalars()
    assert set(last) < set(seen)
    for key, value in expected.scalars().items():
        np.testing.assert_allclose(last[key], value, rtol=1e-4, err_msg=key)
"""

REFUSED = """
    def make(strategy):
        with strategy.scope():
            model = keras.Sequential([keras.Input((STEPS, 3)), keras.layers.SimpleRNN(3), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
        return model

    workers = tf.distribute.MultiWorkerMirroredStrategy()
    monitor = JacobianMonitor(probe, measures=["variance"], log_dir=None, on_error="raise")
    sentence = refusal(lambda: make(workers).fit(x, y, callbacks=[monitor]))
    assert sentence.startswith(
        "Invalid value for argument `model`. Expected a model made without a strategy of `tf.distribute`, or in "
        "the scope of a `MirroredStrategy` or `OneDeviceStrategy`. Received: model=sequential"
    ), sentence
    one = make(tf.distribute.OneDeviceStrategy("CPU:1"))
    one.fit(x, y, verbose=0, callbacks=[monitor])

    with keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]).scope():
        sentence = refusal(lambda: make(default).fit(x, y, callbacks=[monitor]))
    assert sentence == (
        "Expected no `keras.distribution`: on TensorFlow Keras does not distribute anything with it. Use "
        "`tf.distribute.MirroredStrategy`. Received: DataParallel"
    ), sentence
"""

STABILIZED = """
    from keras_jacmon import stabilize

    found = []
    for strategy in (default, mirrored):
        keras.utils.set_random_seed(1)
        with strategy.scope():
            model = keras.Sequential([keras.Input((STEPS, 3)), keras.layers.SimpleRNN(3), keras.layers.Dense(1)])
            model.compile("adam", "mse")
        result = stabilize(model, probe, target=0.5, steps=10, verbose=0)
        assert result.history["loss"][1] < result.history["loss"][0]
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    (values,) = ({part.numpy().tobytes() for part in weight.value.values} for weight in model.weights[1:2])
    assert len(values) == 1
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tracebacks of the scripts, run in one process."""
    parts = {"fit": FIT, "refused": REFUSED, "stabilized": STABILIZED}
    return two_devices.run(DEFINITIONS, parts, str(tmp_path_factory.mktemp("logs")))


# Of other measures; those of the variance are compared after a training, below.
@pytest.mark.soak
def test_values_are_those_without_a_strategy() -> None:
    assert two_devices.run(DEFINITIONS, {"values": VALUES}) == {"values": ""}


def test_fit_with_two_replicas(outcome: dict[str, str]) -> None:
    assert outcome["fit"] == ""


def test_what_is_not_supported_is_refused(outcome: dict[str, str]) -> None:
    assert outcome["refused"] == ""


def test_a_mirrored_model_is_stabilized_as_one_without_a_strategy(outcome: dict[str, str]) -> None:
    assert outcome["stabilized"] == ""
