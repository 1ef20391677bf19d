"""The graph of a function, and what the function says about itself while it is traced."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.eager import context

from keras_jacmon.graphs.trace import optimized_briefly, trace
from keras_jacmon.graphs.traced_graph import TracedGraph

pytestmark = pytest.mark.fast


def test_a_traced_function_hands_out_its_python_object_and_runs_without_being_traced_again() -> None:
    calls = []

    def function(x: tf.Tensor, pair: dict[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], object]:
        calls.append(x)
        return {"sum": tf.reduce_sum(x) + pair["a"]}, {"rank": x.shape.rank}

    traced = trace(function, [tf.TensorSpec([None, 3]), {"a": tf.TensorSpec([])}])
    assert traced.static == {"rank": 2}
    for count in (2, 5):
        assert float(traced(tf.ones([count, 3]), {"a": tf.constant(1.0)})["sum"]) == 3 * count + 1
    assert len(calls) == 1


def test_a_run_leaves_the_settings_of_tensorflow_as_they_are() -> None:
    """A graph is optimized by settings of its own, so that its first run is short; they hold in this run alone."""
    present = context.context()
    before, attributes = present.function_call_options, present.function_call_options.as_attrs()
    checked = trace(lambda x: (tf.debugging.check_numerics(x, ""), None), [tf.TensorSpec([])])
    with optimized_briefly():
        assert float(checked(tf.constant(1.0))) == 1.0
    with pytest.raises(tf.errors.InvalidArgumentError), optimized_briefly():
        checked(tf.constant(float("nan")))
    assert present.function_call_options is before
    assert before.as_attrs() == attributes


@pytest.mark.parametrize("devices", [[], ["a GPU"]])
def test_what_speeds_up_convolutions_on_a_gpu_is_left_out_without_one(
    monkeypatch: pytest.MonkeyPatch, devices: list[str]
) -> None:
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda _: devices)
    with optimized_briefly():
        serialized = context.context().function_call_options.config_proto_serialized
    passes = config_pb2.ConfigProto.FromString(serialized).graph_options.rewrite_options
    assert (passes.layout_optimizer == passes.OFF) == (not devices)
    assert passes.constant_folding == passes.OFF


def test_an_error_while_tracing_is_raised_as_it_is() -> None:
    def function() -> tuple[tf.Tensor, None]:
        raise KeyError("a message")

    with pytest.raises(KeyError, match="a message"):
        trace(function)


def test_the_names_in_a_copy_stay_different_when_they_are_numbered() -> None:
    """Without this TensorFlow refuses the derivative of some branches: `Duplicated ret name: cond/copy/add_2_0:z`."""

    def function(x: tf.Tensor) -> tf.Tensor:
        return tf.add(tf.add(x, 1.0, name="add"), tf.add(x, 2.0, name="add_2"), name="add_2_0")

    graph = TracedGraph(function, [tf.TensorSpec([None])])
    with tf.Graph().as_default() as here:
        (total,) = graph.replay(graph.outputs, {graph.inputs[0].name: tf.zeros([3])})
    assert total.shape.rank == 1
    names = [operation.name.split("/")[-1] for operation in here.get_operations() if operation.type == "AddV2"]
    assert len(names) == 3
    assert all(name.endswith("AddV2") for name in names)


@pytest.mark.fast
def test_what_has_no_effect_is_traced_without_an_order_of_effects() -> None:
    orders = [trace(lambda x: (x + 1.0, None), [tf.TensorSpec([2])], ordered=ordered) for ordered in (True, False)]
    # An identity waits for all effects.
    assert [traced.graph.graph.outputs[0].op.type for traced in orders] == ["Identity", "AddV2"]
    for traced in orders:
        np.testing.assert_array_equal(traced(tf.zeros([2])), np.ones(2, np.float32), strict=True)
