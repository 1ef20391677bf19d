"""A recurrent call as far as its measurement depends on it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_jacmon.cell.kind import CellKind, CellKinds
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.jacobians.registered_forms import registered_form
from keras_jacmon.model.recording import RecurrentCall
from keras_jacmon.tensors import specs_of

# Inputs, flat initial states, and the mask, which may be None.
SequenceTensors = tuple[tf.Tensor, tuple[tf.Tensor, ...], tf.Tensor | None]


@dataclass(frozen=True, eq=False)
class MeasurableCall:
    """A recurrent call as far as its measurement depends on it.

    Attributes:
        name: String, the key of the call in reports.
        layer: The recurrent layer.
        cell: Its cell, or what stands for it.
        go_backwards: Boolean, True if the steps run from the last position of the inputs to the first.
        states: Structure of the layer's states; only the structure counts.
        specs: Structure of `SequenceTensors`, with the `tf.TensorSpec` of each tensor.
        kind: `CellKind` of its cell.
        notes: Tuple of sentences on this call alone that a reader of the numbers must know.
        wider: A call of the same kind but for more features, whose measurement is that of this one as well; None, the
            default, if there is none.
    """

    name: str
    layer: keras.Layer
    cell: Any
    go_backwards: bool
    states: Any
    specs: Any
    kind: CellKind
    notes: tuple[str, ...]
    wider: "MeasurableCall | None" = None

    @property
    def features(self) -> int:
        """The number of values that it receives at each step."""
        return int(self.specs[0].shape[2:].num_elements())

    @classmethod
    def all_of(
        cls, calls: Sequence[RecurrentCall], sequences: Sequence[UnrollInputs], kinds: CellKinds
    ) -> "list[MeasurableCall]":
        """Makes those of all recorded calls of a model, each with the wider one, if there is one."""
        each = [cls.of(call, sequence, kinds) for call, sequence in zip(calls, sequences, strict=True)]
        return [dataclasses.replace(call, wider=_widest_for(call, each)) for call in each]

    @classmethod
    def of(cls, call: RecurrentCall, sequence: UnrollInputs, kinds: CellKinds) -> "MeasurableCall":
        """Makes it from a recorded call, the tensors that the cell is unrolled along, and the kinds of the cells."""
        specs = specs_of((sequence.inputs, tuple(sequence.states), sequence.mask))
        if registered_form(call.cell) is None:
            first = tf.TensorSpec(sequence.inputs.shape[1:], sequence.inputs.dtype)
            kind = kinds.of(call.cell, call.states, [first, *specs[1]])
        else:
            # A form may read from the cell what its step does not.
            kind = CellKind.own(call.cell)
        states = keras.tree.map_structure(lambda _: 0, call.states)
        return cls(call.name, call.layer, call.cell, call.go_backwards, states, specs, kind, _notes_of(call))


def _widest_for(call: MeasurableCall, calls: Sequence[MeasurableCall]) -> MeasurableCall | None:
    """Returns the call with the most features among those that differ from a call in nothing else; None for itself.

    It has at most twice as many features as there are values in the states, since products with zeros take time too:
    the first layer of a stack is measured as the next ones are, and these are not as a first layer with wide inputs is.
    """
    inputs, states, mask = call.specs
    if call.kind.key_for_any_features is None:
        return None
    most = 2 * sum(int(state.shape[1:].num_elements()) for state in states)

    def is_wider(other: MeasurableCall) -> bool:
        others, *rest = other.specs
        return (
            other.kind.key_for_any_features == call.kind.key_for_any_features
            and (str(other.states), rest) == (str(call.states), [states, mask])
            and others.shape[:-1].as_list() == inputs.shape[:-1].as_list()
            and call.features < other.features <= most
        )

    return max(filter(is_wider, calls), key=lambda other: other.features, default=None)


def _notes_of(call: RecurrentCall) -> tuple[str, ...]:
    """Returns notes on steps that are made, or left out, in another way than a reader may think."""
    notes = []
    if call.is_stepped_by_hand:
        # As in a forecast that feeds itself.
        notes.append("the model also calls its cell outside of the layer; these steps are not measured")
    if call.has_lost_mask:
        # Layers of Keras 3.16 hand no mask on, nor do others that do not support masks.
        notes.append(
            "a mask reached the layer below and not this one: the layer takes all steps, also the padded ones, and all "
            "are measured"
        )
    return tuple(notes)
