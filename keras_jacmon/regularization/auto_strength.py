"""The strength of a penalty, chosen by the gradient of the loss."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.graphs.trace import Traced, trace
from keras_jacmon.model.guard import foreign_put_back, shielded
from keras_jacmon.model.loss_gradient import gradients_by_weights
from keras_jacmon.tensors import spec_of

# The norm of the penalty's gradient over that of the loss's.
SHARE = 0.1

# Below this fraction of the target a distance counts as small.
_NEAR = 0.05


class AutoStrength:
    """Chooses the strength of a penalty, so that its gradient has a share of the gradient of the loss.

    The strength is `SHARE * ‖dLoss/dw‖ / ‖dPenalty/dw‖`, where w are the trained weights of the recurrent layers. As
    the measure comes nearer to its target than it has been, the share falls in proportion: the gradient of the penalty
    vanishes at the target, so that a fixed share would ask for an infinite strength, and the training would diverge.

    Args:
        model: Compiled Keras model, without a penalty among its losses.
        inputs: Structure of tensors, the probe as the model takes it.
        targets: Structure of tensors, the targets of the probe.
        weights: Sequence of Keras variables, the weights w.
        penalty: Callable that returns the penalty with the present weights, not scaled by the strength.

    Raises:
        ValueError: If the loss cannot be computed from these targets.
    """

    def __init__(
        self,
        model: keras.Model,
        inputs: Any,
        targets: Any,
        weights: Sequence[keras.Variable],
        penalty: Callable[[], tf.Tensor],
    ) -> None:
        self._model, self._weights, self._penalty = model, weights, penalty
        self._given = keras.tree.flatten([inputs, targets])
        self._structure = keras.tree.map_structure(lambda _: 0, [inputs, targets])
        self._loss: Traced[None] = trace(self._of_loss, list(map(spec_of, self._given)))
        # The largest distance of the measure from its target so far.
        self._farthest = 0.0

    def __call__(self, target: float) -> float | None:
        """Returns the strength for the present weights; None if one of the gradients is zero or not finite.

        Args:
            target: Number, the typical target of the measure; 1 on a logarithmic scale.
        """
        with foreign_put_back(self._loss.graph.graph, self._model):
            of_loss = float(self._loss(*self._given))
        with tf.GradientTape() as tape:
            penalty = self._penalty()
        of_penalty = float(_norm(tape.gradient(penalty, [weight.value for weight in self._weights])))
        distance = math.sqrt(float(penalty))
        if not all(math.isfinite(x) and x > 0 for x in (of_loss, of_penalty, distance)):
            return None
        self._farthest = max(self._farthest, distance)
        return SHARE * of_loss / of_penalty * min(1.0, distance / max(self._farthest, _NEAR * target))

    def _of_loss(self, *flat: tf.Tensor) -> tuple[tf.Tensor, None]:
        inputs, targets = keras.tree.pack_sequence_as(self._structure, list(flat))
        with shielded(self._model):
            return _norm(gradients_by_weights(self._model, inputs, targets, self._weights)), None


def _norm(gradients: Sequence[tf.Tensor | None]) -> tf.Tensor:
    """Returns the norm of all gradients together."""
    return tf.linalg.global_norm([None if g is None else tf.cast(g, tf.float32) for g in gradients])
