"""Models that are hard to hold: a penalty may do no harm, whatever the cell, the training or the strategy."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import trainings
from helpers import SeedCell, WeightedCell
from keras import layers as L  # noqa: N812 - as in the other tests
from trainings import (
    FEATURES,
    PROBE,
    STEPS,
    CountedDense,
    CountingCell,
    X,
    Y,
    assert_equal,
    compiled,
    holding,
    values_of,
)

from keras_jacmon import JacobianRegularizer, measure

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fit(model: Any, *callbacks: Any, **arguments: Any) -> Any:
    keras.utils.set_random_seed(8)
    return trainings.fit(model, *callbacks, **({"epochs": 2, "shuffle": False} | arguments))


class NormCell(WeightedCell):
    """Its second derivative is NaN at the zeros that a sequence begins with."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        (h,) = states
        new_h = tf.tanh(self.preactivation(inputs, h / (1.0 + tf.norm(h, axis=-1, keepdims=True))))
        return new_h, [new_h]


# The tape applied twice gives NaN there, where J has none.
@pytest.mark.filterwarnings("ignore:Layer `rnn`. products with its Jacobian")
@pytest.mark.parametrize(
    ("measured", "states"),
    # Of cached states, `test_states_that_are_not_finite_do_not_count` says the same.
    [
        ("variance", "fresh"),
        *(pytest.param(measured, "cached", marks=pytest.mark.soak) for measured in ("spectral_norm", "variance")),
    ],
)
def test_points_without_a_finite_penalty_are_left_out(measured: str, states: Any) -> None:
    model = compiled(L.RNN(NormCell(4), name="rnn"))
    regularizer = JacobianRegularizer(1.0, 1.0, measure=measured, states=states)
    monitor = holding(regularizer, measures=[measured])
    with pytest.warns(UserWarning, match="the penalty is not finite") as caught:
        history = fit(model, monitor, epochs=1).history
    (sentence,) = [str(w.message) for w in caught if "the penalty" in str(w.message)]
    assert sentence == (
        "Layer `rnn`: at 4 points of its trajectory the penalty is not finite. Such points are left out; later ones of "
        "this layer are not warned of."
    )
    assert np.isfinite(history["loss"]).all()
    assert np.isfinite(np.concatenate([variable.ravel() for variable in values_of(model.variables)])).all()
    values = monitor.reports[-1][1]["rnn"][measured]
    np.testing.assert_allclose(history["jac_penalty"][-1], np.mean((values[1:] - 1) ** 2), rtol=0.05)


def test_a_layer_that_had_no_penalty_is_still_warned_of_for_points_that_are_left_out() -> None:
    model = compiled(L.RNN(NormCell(4), name="rnn"))
    weights = model.get_weights()
    model.set_weights([np.full_like(weight, np.nan) for weight in weights])
    regularizer = JacobianRegularizer(1.0, 1.0, refresh=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with regularizer.attached(model, PROBE) as regularized:
            regularized.begin(0)
            model.set_weights(weights)
            for step in (1, 2):
                regularized.begin(step)
    sentences = [str(warning.message) for warning in caught if "penalty" in str(warning.message)]
    assert [("has no penalty" in one, "Such points are left out" in one) for one in sentences] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.filterwarnings("ignore:Layer `rnn`. at .* points")
@pytest.mark.filterwarnings("ignore:Layer `rnn` has NaN or Inf")
def test_strength_zero_changes_no_bit_where_the_penalty_overflows() -> None:
    def trained(*callbacks: Any) -> list[NDArray[Any]]:
        keras.utils.set_random_seed(1)
        model = compiled(L.SimpleRNN(3, activation="linear", name="rnn"), optimizer=keras.optimizers.SGD(0.0))
        model.layers[0].cell.recurrent_kernel.assign(1e15 * np.eye(3, dtype=np.float32)[::-1])
        fit(model, *callbacks, epochs=1)
        return values_of(model.variables)

    assert_equal(trained(holding(JacobianRegularizer(1.0, 0.0))), trained())


class MixingCell(WeightedCell):
    """Takes the mean of the batch away."""

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        (h,) = states
        new_h = tf.tanh(self.preactivation(inputs - tf.reduce_mean(inputs, axis=0), h))
        return new_h, [new_h]


@pytest.mark.filterwarnings("ignore:Layer `rnn`. what its cell .* It is measured")
def test_a_cell_that_mixes_samples_has_no_penalty_and_one_warning() -> None:
    model = compiled(L.RNN(MixingCell(4), name="rnn"))
    with pytest.warns(UserWarning, match="It has no penalty") as caught:
        history = fit(model, holding(JacobianRegularizer(3.0, 1.0, refresh=2))).history
    assert len([w for w in caught if "It has no penalty" in str(w.message)]) == 1
    assert set(history["jac_penalty"]) == {0.0}


@pytest.mark.parametrize(
    ("states", "run_eagerly"),
    [
        ("cached", False),
        *(pytest.param(*p, marks=pytest.mark.soak) for p in (("cached", True), ("fresh", True), ("fresh", False))),
    ],
)
def test_strength_zero_changes_no_bit_and_what_a_cell_writes_is_put_back(states: Any, run_eagerly: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    def trained(*callbacks: Any) -> tuple[Any, list[NDArray[Any]]]:
        model = compiled(L.RNN(CountingCell(3), name="rnn"), run_eagerly=run_eagerly)
        history = fit(model, *callbacks, epochs=1).history
        return history, values_of([model.layers[0].cell.calls, *model.variables])

    history, held = trained(holding(JacobianRegularizer(1.0, 0.0, states=states, refresh=3)))
    assert history["jac_penalty"][0] > 0
    assert_equal(held, trained()[1])


def test_later_trainings_are_not_traced_again() -> None:
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), L.SimpleRNN(3, name="rnn"), CountedDense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    regularizer = JacobianRegularizer(1.0, 2.0)
    monitor = holding(regularizer)
    variances = measure(model, PROBE, measures=["variance"])["rnn"]["variance"]
    penalty = 2.0 * np.mean((variances - 1) ** 2)
    plain = float(np.mean((model.predict(X, verbose=0) - Y) ** 2))
    traces = []
    for _ in range(3):
        history = fit(model, monitor, epochs=1, validation_data=(X, Y)).history
        np.testing.assert_allclose([history["loss"], history["val_loss"]], plain + penalty, rtol=1e-4)
        # Without the penalty in between.
        np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), plain, rtol=1e-4)
        np.testing.assert_allclose(fit(model, epochs=1).history["loss"], plain, rtol=1e-4)
        traces.append(CountedDense.traces)
    assert traces[1:] == traces[1:2] * 2
    model.compile(keras.optimizers.SGD(0.0), "mae")
    history = fit(model, monitor, epochs=1, validation_data=(X, Y)).history
    plain = float(np.mean(np.abs(model.predict(X, verbose=0) - Y)))
    np.testing.assert_allclose([history["loss"], history["val_loss"]], plain + penalty, rtol=1e-4)
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), plain, rtol=1e-4)


def test_several_monitors_share_a_model_and_have_a_key_each() -> None:
    model = compiled(L.SimpleRNN(3, name="rnn"), optimizer=keras.optimizers.SGD(0.0))
    held = {1.0: 2.0, 5.0: 0.5}
    monitors = [holding(JacobianRegularizer(target, strength, states="fresh")) for target, strength in held.items()]
    history = fit(model, *monitors, epochs=1).history
    variances = monitors[0].reports[-1][1]["rnn"]["variance"]
    penalties = [np.mean((variances - target) ** 2) for target in held]
    for key, penalty in zip(("jac_penalty", "monitor_1_jac_penalty"), penalties, strict=True):
        np.testing.assert_allclose(history[key][-1], penalty, rtol=1e-5)
    # Each adds its own to the loss.
    alone = np.mean((model.predict(X, verbose=0) - Y) ** 2)
    np.testing.assert_allclose(history["loss"][-1], alone + np.dot(list(held.values()), penalties), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:(?s).*was called on layer 'seed_cell")
def test_a_model_that_is_not_built_is_built_and_held() -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = L.RNN(SeedCell(3), name="rnn")

        def call(self, inputs: Any) -> Any:
            return self.rnn(inputs)

    model = Model()
    with JacobianRegularizer(1.0, 1.0).attached(model, PROBE) as held:
        (report,) = measure(model, PROBE, measures=["variance"]).layers.values()
        variances = report["variance"]
        np.testing.assert_allclose(held.penalty(), np.mean((variances - 1) ** 2), rtol=1e-5)


class Mapped(keras.Model):
    """Calls its recurrent layer for each sample by itself, where it cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = L.GRU(3, name="rnn")

    def call(self, inputs: Any) -> Any:
        return tf.map_fn(lambda x: self.rnn(x[None])[0], inputs, fn_output_signature=tf.float32)


def test_what_cannot_be_held_is_said_before_the_training() -> None:
    model = compiled(L.SimpleRNN(3, name="rnn"))
    with (
        pytest.raises(ValueError, match=r"recurrent layers out of \['rnn'\]. Received: target=\['rnn:7'\]"),
        JacobianRegularizer({"rnn:7": 1.0}).attached(model, PROBE),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match=r"^No recurrent layer of the model can have a penalty. Layer `rnn`: .*of its own"
        ),
        JacobianRegularizer(1.0).attached(Mapped(), PROBE),
    ):
        pass
    assert not model.losses
