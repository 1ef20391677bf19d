"""Probes of every form, and what is refused before the training begins, with the sentence that says why."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import normal
from trainings import BATCH, FEATURES, PROBE, SAMPLES, STEPS, X, Y, assert_refused, compiled

from keras_jacmon import JacobianMonitor, JacobianRegularizer, measure
from keras_jacmon.measures.selection import KEYS, PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


# Probes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_several_inputs(structure: str) -> None:
    inputs = {"a": keras.Input((STEPS, FEATURES), name="a"), "b": keras.Input((2,), name="b")}
    joined = keras.layers.Concatenate()([keras.layers.SimpleRNN(3, name="rnn")(inputs["a"]), inputs["b"]])
    outputs = keras.layers.Dense(1)(joined)
    model = keras.Model(inputs if structure == "dict" else list(inputs.values()), outputs)
    model.compile("sgd", "mse")

    def pack(a: Any, b: Any) -> Any:
        return {"a": a, "b": b} if structure == "dict" else [a, b]

    monitor = JacobianMonitor(pack(PROBE, normal(BATCH, 2)), log_dir=None, measures=["variance"])
    model.fit(pack(X, normal(SAMPLES, 2)), Y, verbose=0, callbacks=[monitor])
    assert set(monitor.reports[0][1].layers) == {"rnn"}


# Bad input ---------------------------------------------------------------------------------------------------------


def invalid(argument: str, sentence: str) -> str:
    return f"^{re.escape(f'Invalid value for argument `{argument}`. {sentence}')}$"


UPDATE_FREQ = "Expected 'epoch', 'batch' or a positive integer. Received: update_freq="
NAMES = [key for key, quantity in KEYS.items() if quantity.measure.kind.selectable]
CHOSEN = "measures of one step such as 'v+a/variance' or '0+1/variance' of chosen states"
MEASURES = f"Expected names out of {list(PRESETS)}, or of {NAMES}, or {CHOSEN}. Received: "
LOGS = f"Expected 'auto', 'all', None or names out of {list(PRESETS['standard'])}. Received: logs="
MAX_ROWS = "Expected a positive integer, or None for all. Received: max_rows="
SEED = "Expected an integer from 0 to 2147483647. Received: seed="
TOLERANCE = "Expected a relative tolerance from 0 up to, not including, 1. Received: tolerance="


@pytest.mark.fast
@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("update_freq", 0, f"{UPDATE_FREQ}0"),
        ("update_freq", -3, f"{UPDATE_FREQ}-3"),
        ("update_freq", 2.5, f"{UPDATE_FREQ}2.5"),
        ("update_freq", True, f"{UPDATE_FREQ}True"),
        ("update_freq", "often", f"{UPDATE_FREQ}'often'"),
        ("update_freq", None, f"{UPDATE_FREQ}None"),
        ("slow_freq", 0, "Expected an integer of at least 1. Received: slow_freq=0"),
        ("max_reports", 1, "Expected an integer of at least 2. Received: max_reports=1"),
        ("max_reports", None, "Expected an integer of at least 2. Received: max_reports=None"),
        ("on_verdict_change", 3, "Expected a function or None. Received: on_verdict_change=3"),
        ("verbose", 2, "Expected 0 or 1. Received: verbose=2"),
        ("log_dir", 5, "Expected a string, a path or None. Received: log_dir=5"),
        ("log_dir", b"logs", "Expected a string, a path or None. Received: log_dir=b'logs'"),
        ("logs", "horizons", f"{LOGS}'horizons'. Did you mean 'joint/horizon'?"),
        ("logs", ["lyapunov"], f"{LOGS}['lyapunov']"),
        ("logs", 3, f"{LOGS}3"),
        ("on_error", "ignore", "Expected 'warn' or 'raise'. Received: on_error='ignore'"),
        ("measures", ["variance", "norm"], f"{MEASURES}['variance', 'norm']"),
        ("measures", "norm", f"{MEASURES}['norm']"),
        ("measures", "00/variance", f"{MEASURES}['00/variance']. Did you mean 'variance'?"),
        ("measures", [], f"{MEASURES}[]"),
        ("measures", {"variance": 1}, f"{MEASURES}{{'variance': 1}}"),
        ("measures", 3, f"{MEASURES}3"),
        ("measures", "varience", f"{MEASURES}['varience']. Did you mean 'variance'?"),
        ("tolerance", -0.1, f"{TOLERANCE}-0.1"),
        ("tolerance", 1, f"{TOLERANCE}1"),
        ("tolerance", float("nan"), f"{TOLERANCE}nan"),
        ("tolerance", False, f"{TOLERANCE}False"),
        ("tolerance", "1e-3", f"{TOLERANCE}'1e-3'"),
        ("seed", 0.5, f"{SEED}0.5"),
        ("seed", -1, f"{SEED}-1"),
        ("seed", 2**31, f"{SEED}2147483648"),
        ("max_bytes", 0, "Expected an integer of at least 1. Received: max_bytes=0"),
        ("max_bytes", float("nan"), "Expected an integer of at least 1. Received: max_bytes=nan"),
        ("max_rows", 0, f"{MAX_ROWS}0"),
        ("max_rows", True, f"{MAX_ROWS}True"),
        ("spectra", 2.0, "Expected an integer of at least 1. Received: spectra=2.0"),
        ("warmup", False, "Expected an integer of at least 0. Received: warmup=False"),
        ("exact_flow", 1, "Expected True or False. Received: exact_flow=1"),
        ("max_entries", -1, "Expected an integer of at least 0. Received: max_entries=-1"),
        ("max_entries", float("inf"), "Expected an integer of at least 0. Received: max_entries=inf"),
    ],
)
def test_a_bad_argument_is_refused_without_a_model(argument: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=invalid(argument, sentence)):
        JacobianMonitor(PROBE, **{argument: value})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("tolerence", ". Did you mean 'tolerance'?"),
        ("slow_frequency", ". Did you mean 'slow_freq'?"),
        ("histogram_freq", ". Did you mean 'update_freq'?"),
        ("log_freq", ". Did you mean 'update_freq'?"),
        ("xyz", ""),
    ],
)
def test_an_unknown_argument_is_refused(argument: str, hint: str) -> None:
    sentence = f"JacobianMonitor() got an unexpected keyword argument '{argument}'{hint}"
    arguments: dict[str, Any] = {argument: 0.1}
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        JacobianMonitor(PROBE, **arguments)


@pytest.mark.fast
def test_arguments_in_the_wrong_order() -> None:
    model = compiled()
    sentence = (
        "Expected a batch of model inputs, after the model if there is one. Received: a Keras layer of the class "
    )
    with pytest.raises(ValueError, match=invalid("probe", f"{sentence}Sequential")):
        measure(PROBE, model)
    for given, name in ((None, "NoneType"), (PROBE, "ndarray")):
        expected = f"Expected a Keras model or layer, before the probe. Received: a {name}"
        with pytest.raises(ValueError, match=invalid("model", expected)):
            measure(given, PROBE)
        with pytest.raises(ValueError, match=invalid("model", expected)):
            JacobianRegularizer().prepare(given, PROBE)


def with_nan() -> Any:
    probe = PROBE.copy()
    probe[1, 2, 0], probe[3, 0, 1] = np.nan, np.inf
    return probe


SHUFFLED = (
    "Expected a dataset that does not shuffle (reading one that does changes the order that training sees); pass a "
    "batch instead, e.g. `x[:32]`, or build the probe before `shuffle()`. Received: a dataset with `shuffle()`"
)
SINGLE_VALUE = (
    "Expected arrays or tensors; of a list of numbers make one by `np.array(probe)`. Received: a single value of type "
)
ITERATOR = (
    "Expected an array, tensor, dict, list or dataset: a batch taken from an iterator would be missing in the training"
    ". Received: "
)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make_probe", "sentence"),
    [
        (lambda: PROBE[:0], "Expected at least one sample and one step. Received: an array of shape (0, 5, 3)"),
        (lambda: PROBE[:, :0], "Expected at least one sample and one step. Received: an array of shape (4, 0, 3)"),
        (lambda: np.float32(1.0), "Expected at least one sample and one step. Received: an array of shape ()"),
        (list, "Expected a batch of model inputs. Received: []"),
        (dict, "Expected a batch of model inputs. Received: {}"),
        (with_nan, "Expected finite numbers. Received: an array of shape (4, 5, 3) with 2 NaN or Inf"),
        (lambda: np.array([None]), "Expected numbers. Received: an array of dtype object"),
        (lambda: None, f"{SINGLE_VALUE}NoneType"),
        (PROBE.tolist, f"{SINGLE_VALUE}float"),
        (lambda: {"inputs": "text"}, f"{SINGLE_VALUE}str"),
        (
            lambda: tf.ragged.constant([[1.0], [1.0, 2.0]]),
            "Expected dense arrays; pad them and mask the padding. Received: RaggedTensor",
        ),
        (
            lambda: [PROBE, PROBE[:2]],
            "Expected the same number of samples in each input. Received: batch sizes [2, 4]",
        ),
        (lambda: tf.data.Dataset.from_tensor_slices(X).shuffle(8).batch(4), SHUFFLED),
        (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(8).batch(4).map(lambda x, _: x).take(1), SHUFFLED),
        (
            lambda: tf.data.Dataset.from_tensor_slices(X).batch(4).take(0),
            "Expected a dataset with at least one batch. Received: an empty dataset",
        ),
        (lambda: iter([PROBE]), f"{ITERATOR}list_iterator"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_bad_probe_is_refused_without_a_model(make_probe: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=invalid("probe", sentence)):
        JacobianMonitor(make_probe())


@pytest.mark.fast
def test_no_recurrent_layer() -> None:
    model = keras.Sequential([keras.Input((STEPS, FEATURES)), keras.layers.Dense(1)], name="flat")
    model.compile("sgd", "mse")
    sentence = (
        "Expected a model with at least one recurrent layer (`keras.layers.RNN` or a subclass). "
        "Received: model=flat (Sequential) with the layers ['Dense', 'InputLayer']"
    )
    assert_refused(model, invalid("model", sentence))


@pytest.mark.fast
def test_no_layer_that_is_called() -> None:
    class Uncalled(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="uncalled")
            self.gru = keras.layers.GRU(2, name="gru")
            self.gru.build((None, STEPS, FEATURES))

        def call(self, inputs: Any) -> Any:
            return inputs

    reason = "ayer `gru`: it is not called when the model runs on the probe"
    sentence = f"No recurrent layer of the model `uncalled` can be measured. L{reason}."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        measure(Uncalled(), PROBE)
    sentence = f"Expected recurrent layers that the model calls on the probe. Received: l{reason}"
    with pytest.raises(ValueError, match=invalid("layers", sentence)):
        measure(Uncalled(), PROBE, layers="gru")


@pytest.mark.parametrize(
    ("layers", "received"),
    [
        (["lstm"], "'lstm'"),
        ("grus", "'grus'. Did you mean 'gru'?"),
        (["gru", "dense"], "'dense'"),
        (keras.layers.LSTM(2, name="foreign"), "foreign (a layer)"),
    ],
    ids=str,
)
def test_unknown_layer(layers: Any, received: str) -> None:
    sentence = f"Expected recurrent layers of the model: ['gru']. Received: {received}"
    assert_refused(compiled(keras.layers.GRU(3, name="gru")), invalid("layers", sentence), layers=layers)


@pytest.mark.parametrize("layers", [{"gru": 1}, 3], ids=str)
def test_layers_that_are_no_names(layers: Any) -> None:
    sentence = f"Expected names of recurrent layers, or layers. Received: layers={layers}"
    with pytest.raises(ValueError, match=invalid("layers", sentence)):
        JacobianMonitor(PROBE, layers=layers)


def test_no_layer_wanted() -> None:
    sentence = "Expected at least one layer, or None for every recurrent layer. Received: layers=[]"
    assert_refused(compiled(keras.layers.GRU(3, name="gru")), invalid("layers", sentence), layers=[])


@pytest.mark.parametrize(
    ("probe", "sentence"),
    [
        (PROBE[..., :2], "Expected shape (None, 5, 3) for input `x`. Received: an array of shape (4, 5, 2)"),
        (PROBE[:, :4], "Expected shape (None, 5, 3) for input `x`. Received: an array of shape (4, 4, 3)"),
        (
            PROBE[0],
            (
                "Expected shape (None, 5, 3) for input `x`. Received: an array of shape (5, 3); if the batch axis is "
                "missing, pass `x[:1]` and not `x[0]`"
            ),
        ),
        (
            (PROBE, Y[:4]),
            (
                "Expected 1 input(s), as the model takes them. Received: 2 array(s); of a pair of inputs and targets, "
                "as `next(iter(dataset))` gives it, pass the inputs alone: `pair[0]`"
            ),
        ),
        ([PROBE, PROBE], "Expected 1 input(s), as the model takes them. Received: 2 array(s)"),
        ({"y": PROBE}, "Expected a dict with the model's inputs ['x']. Received: a dict with ['y']"),
        (
            np.full((4, 5, 3), "word"),
            "Expected dtype float32 for input `x`. Received: an array of dtype <U4",
        ),
    ],
    ids=["features", "steps", "rank", "pair", "number", "names", "dtype"],
)
def test_a_probe_that_does_not_fit(probe: Any, sentence: str) -> None:
    model = keras.Sequential([keras.Input((STEPS, FEATURES), name="x"), keras.layers.GRU(3), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert_refused(model, invalid("probe", sentence), probe)


@pytest.mark.parametrize(
    ("probe", "shapes", "hint"),
    [
        (PROBE[0], "(5, 3)", "; if the batch axis is missing, pass `x[:1]` and not `x[0]`. The model says: "),
        ((PROBE, Y[:4]), "((4, 5, 3), (4, 1))", "; of a pair of inputs and targets, as `next(iter(dataset))` gives "),
    ],
    ids=["rank", "pair"],
)
def test_a_probe_that_a_model_without_declared_inputs_refuses(probe: Any, shapes: str, hint: str) -> None:
    class Subclassed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.gru = keras.layers.GRU(3)

        def call(self, inputs: Any) -> Any:
            return self.gru(inputs)

    expected = "Expected a batch that the model can be built with. Received: shapes "
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'Invalid value for argument `probe`. {expected}{shapes}{hint}')}"
    ):
        measure(Subclassed(), probe)


def test_fractions_for_whole_numbers() -> None:
    model = keras.Sequential(
        [keras.Input((STEPS,), dtype="int32", name="ids"), keras.layers.Embedding(9, 2), keras.layers.GRU(3)]
    )
    model.compile("sgd", "mse")
    sentence = "Expected whole numbers (dtype int32) for input `ids`. Received: fractions of dtype float32"
    assert_refused(model, invalid("probe", sentence), PROBE[..., 0])


def test_a_batch_that_a_stateful_layer_does_not_accept() -> None:
    model = compiled(keras.layers.LSTM(3, stateful=True, name="lstm"), batch_size=BATCH)
    sentence = f"Expected shape (4, 5, 3) for input `{model.inputs[0].name}`. Received: an array of shape (3, 5, 3)"
    assert_refused(model, invalid("probe", sentence), PROBE[:3])


def test_a_batch_that_a_stateful_layer_in_a_subclassed_model_does_not_accept() -> None:
    class Subclassed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = keras.layers.LSTM(3, stateful=True, name="lstm")

        def call(self, inputs: Any) -> Any:
            return self.lstm(inputs)

    model = Subclassed()
    model(PROBE)
    model.compile("sgd", "mse")
    sentence = (
        "Invalid value for argument `probe`. Expected a batch of 4 samples, as the stateful layer `lstm` was built for"
        ". Received: shapes [(3, 5, 3)]. The model says: "
    )
    assert_refused(model, f"^{re.escape(sentence)}", PROBE[:3])


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_log_dir_that_cannot_be_written(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log_dir = tmp_path / below
    sentence = (
        "Invalid value for argument `log_dir`. Expected a directory that can be written to, or None to write no event "
        f"files. Received: log_dir={str(log_dir)!r} ("
    )
    assert_refused(compiled(), f"^{re.escape(sentence)}", log_dir=log_dir)
