"""The graph of a function, and what the function says about itself while it is traced."""

import pytest
import tensorflow as tf

from keras_jacmon.traced_graph import trace

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


def test_an_error_while_tracing_is_raised_as_it_is() -> None:
    def function() -> tuple[tf.Tensor, None]:
        raise KeyError("a message")

    with pytest.raises(KeyError, match="a message"):
        trace(function)
