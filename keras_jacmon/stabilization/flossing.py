"""Gradient flossing: the leading Lyapunov exponents as a loss, differentiated through the QR decompositions."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.cell.step import CellStep
from keras_jacmon.cell.trajectory import UnrollInputs, unroll
from keras_jacmon.graphs.trace import Traced, trace
from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import floating_states
from keras_jacmon.measures.context import Purpose
from keras_jacmon.measures.differentiable_exponents import differentiable_exponents
from keras_jacmon.measures.lyapunov import start_lyapunov
from keras_jacmon.measures.steps import Steps
from keras_jacmon.model.guard import foreign_put_back, shielded
from keras_jacmon.model.layers import RecurrentLayer
from keras_jacmon.model.recording import Recording, RecurrentCall, record_calls
from keras_jacmon.operators.contract import JacobianOperator
from keras_jacmon.options import default_warmup
from keras_jacmon.stabilization.gradient import slopes_of
from keras_jacmon.tensors import PointRange, known_sizes

# Jacobians are formed if they have no more columns than this many times the exponents.
_FORMED = 4


class ExponentsObjective:
    """The mean of `(exponent - target)²` over calls, samples and the leading exponents.

    The gradient passes the products of Jacobians, their QR decompositions, and the states.

    Args:
        model: A built Keras model.
        inputs: The tensors of the probe.
        layers: Sequence of its recurrent layers.
        count: Integer, maximum number of exponents of a call.
        target: Float, nats per step.
        seed: Integer, the seed of the first directions.

    References:
        R. Engelken, "Gradient flossing: improving gradient descent through dynamic control of Jacobians", 2023.
    """

    def __init__(
        self,
        model: keras.Layer,
        inputs: Any,
        layers: Sequence[RecurrentLayer],
        *,
        count: int,
        target: float,
        seed: int,
    ) -> None:
        self._model, self._inputs, self._layers = model, inputs, layers
        self._count, self._target, self._seed = count, target, seed
        self._weights = [weight for item in layers for weight in item.layer.trainable_variables]
        self._traced = trace(self._value_and_slopes)

    def renew(self) -> None:
        """Takes other points: there are none, since every step counts."""

    def begin(self, step: int) -> None:
        """Prepares an update: the first directions stay the same."""

    def gradients(self, weights: Sequence[keras.Variable]) -> list[tf.Tensor]:
        """Returns the derivatives of the loss by the weights."""
        slopes = {id(weight): slope for weight, slope in zip(self._weights, self.value_and_slopes()[1], strict=True)}
        return [slopes[id(weight)] for weight in weights]

    def value_and_slopes(self) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the loss with the present weights, and its derivatives by all trained weights of the layers."""
        with foreign_put_back(self._traced.graph.graph, self._model):
            return self._traced()

    def _value_and_slopes(self) -> tuple[tuple[tf.Tensor, list[tf.Tensor]], Traced[Any]]:
        loss = trace(self._value)
        with tf.GradientTape() as tape:
            # A tape must know them before it meets a function that reads them.
            for weight in self._weights:
                tf.convert_to_tensor(weight)
            value = loss()
        return (value, slopes_of(value, tape, self._weights)), loss

    def _value(self) -> tuple[tf.Tensor, tuple[Recording, list[CellJacobian]]]:
        losses: list[tf.Tensor] = []
        jacobians: list[CellJacobian] = []
        with shielded(self._model):
            recording = record_calls(self._model, self._inputs, self._layers)
            for call in recording.calls:
                exponents, jacobian = self._exponents(call)
                losses.append(tf.cast(tf.reduce_mean((exponents - self._target) ** 2), tf.float64))
                jacobians.append(jacobian)
        return tf.add_n(losses) / len(losses), (recording, jacobians)

    def _exponents(self, call: RecurrentCall) -> tuple[tf.Tensor, CellJacobian]:
        """Returns the exponents of a call by sample, and the Jacobian, which must live as long as the graph."""
        sequence, step = UnrollInputs.of(call), CellStep(call.cell, call.states)
        jacobian = CellJacobian(step, sequence.inputs[0], sequence.states)
        view = "joint" if len(floating_states(sequence.states)) > 1 else "hidden"
        points = PointBatch.of(unroll(step, sequence, jacobian.unroll_plan()))
        time, samples = known_sizes(sequence.inputs)[:2]
        whole = jacobian.operators([view], points)[view]

        def at(t: tf.Tensor) -> JacobianOperator:
            taken = whole.take(PointRange(t * samples, samples))
            if taken is None:
                raise ValueError(f"The Jacobians of layer `{call.name}` cannot be told apart by step.")
            return taken

        size = int(whole.shape[-1])
        steps = Steps(time, at, sequence.mask, samples, size, whole.dtype, lambda: whole)
        start = start_lyapunov(
            samples, size, min(self._count, size), (self._seed, Purpose.EXPONENTS), whole.dtype
        ).vectors
        formed = _FORMED * int(start.shape[-1]) >= size
        warmup = default_warmup(time)
        exponents = differentiable_exponents(steps, start, warmup=warmup, formed=formed)
        if sequence.mask is not None:
            # Other samples have no step after the warm-up.
            counts = tf.math.count_nonzero(sequence.mask, axis=0, dtype=tf.int32) > warmup
            exponents = tf.boolean_mask(exponents, counts, axis=1)
        return exponents, jacobian
