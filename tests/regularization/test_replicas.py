"""`JacobianRegularizer` with several replicas, in a process that has two devices."""

from __future__ import annotations

import pytest
import two_devices

DEFINITIONS = """
    options = {"measures": ["variance"], "log_dir": None, "on_error": "raise"}
    x, y = np.random.default_rng(0).normal(size=(32, 5, 3)).astype("float32"), np.ones((32, 1), "float32")

    def compiled():
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((5, 3)), keras.layers.SimpleRNN(3), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.05), "mse")
        return model

    def fit(model, *callbacks):
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=list(callbacks)).history
        assert not model.losses
        return history["loss"], [w.numpy() for w in model.trainable_variables]

    def assert_alike(one, two):
        np.testing.assert_allclose(one[0], two[0], rtol=1e-4)
        for left, right in zip(one[1], two[1]):
            np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)
"""

TRAIN_AS_ONE = """
    def trained(strategy):
        with strategy.scope():
            model = compiled()
            # A monitor that is made in the scope of a strategy.
            schedule = JacobianRegularizer(1.0, lambda step: 2.0 + step, measure="spectral_norm", refresh=3)
            scheduled = JacobianMonitor(x[:4], regularizer=schedule, **options)
        auto = JacobianRegularizer(1.0, "auto", states="fresh", refresh=3)
        found = fit(model, JacobianMonitor(x[:4], targets=y[:4], regularizer=auto, **options), scheduled)
        assert auto.strength > 0
        assert schedule.strength == 2.0 + 7
        return found

    assert_alike(trained(default), trained(mirrored))
"""

WITHIN_THE_SCOPE = """
    with mirrored.scope():
        model = compiled()
        observing = JacobianMonitor(x[:4], **options)
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[observing])
        assert [step for step, _ in observing.reports] == [0, 4]
        held = JacobianMonitor(x[:4], regularizer=JacobianRegularizer(1.0, 1.0), **options)
        sentence = refusal(lambda: model.fit(x, y, verbose=0, callbacks=[held]))
    assert "outside of the scope of a strategy; making and compiling" in sentence, sentence

    workers = tf.distribute.MultiWorkerMirroredStrategy()
    with workers.scope():
        model = keras.Sequential([keras.Input((5, 3)), keras.layers.SimpleRNN(3)])
    sentence = refusal(lambda: JacobianRegularizer(1.0).attached(model, x[:4]).__enter__())
    assert "in the scope of a `MirroredStrategy` or `OneDeviceStrategy`. Received" in sentence, sentence
"""


STABILIZED = """
    from keras_jacmon import stabilize

    with mirrored.scope():
        model = compiled()
    history = stabilize(model, x[:4], 0.5, steps=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    for weight in model.layers[0].weights:
        one, other = weight.value.values
        np.testing.assert_array_equal(one, other)
    with mirrored.scope():
        sentence = refusal(lambda: stabilize(model, x[:4], verbose=0))
    assert "Expected `stabilize` by gradient outside of the scope of a strategy" in sentence, sentence
"""


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    """The tracebacks of the scripts, run in one process."""
    parts = {"train as one": TRAIN_AS_ONE, "within the scope": WITHIN_THE_SCOPE, "stabilized": STABILIZED}
    return two_devices.run(DEFINITIONS, parts)


def test_two_replicas_train_as_one(outcome: dict[str, str]) -> None:
    """The penalty counts once, and its gradient reaches the weights of each replica."""
    assert outcome["train as one"] == ""


def test_within_the_scope_of_a_strategy(outcome: dict[str, str]) -> None:
    assert outcome["within the scope"] == ""


def test_stabilize_gives_each_replica_the_same_weights(outcome: dict[str, str]) -> None:
    assert outcome["stabilized"] == ""
