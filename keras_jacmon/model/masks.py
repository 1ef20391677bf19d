"""Masks that a layer below received and that are not handed on."""

from collections.abc import Collection

import tensorflow as tf

# Operations behind which a step of the result is made from several steps of the operand: a mask has no meaning there.
_MIXING = frozenset(
    {"BatchMatMulV2", "Conv2D", "Einsum", "Max", "Mean", "Min", "Softmax", "StatelessWhile", "Sum", "Tile", "While"}
)


def made_step_by_step(tensor: tf.Tensor, sequences: Collection[str]) -> bool:
    """True if a tensor is made from one of some sequences without an operation that mixes its steps.

    Args:
        tensor: Tensor of a graph, the input of a layer.
        sequences: Names of tensors of the graph, the outputs of layers below.
    """
    pending, met = [tensor], set[str]()
    while sequences and pending:
        tensor = pending.pop()
        if tensor.name in sequences:
            return True
        if tensor.name not in met and tensor.op.type not in _MIXING:
            met.add(tensor.name)
            pending.extend(tensor.op.inputs)
    return False
