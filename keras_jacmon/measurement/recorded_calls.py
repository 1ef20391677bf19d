"""The recorded calls of a model, ready to be measured."""

from dataclasses import dataclass

from keras_jacmon.cell.kind import CellKinds
from keras_jacmon.cell.outputs import OutputDifferences, compare_outputs
from keras_jacmon.cell.trajectory import UnrollInputs
from keras_jacmon.measurement.measurable_call import MeasurableCall, SequenceTensors
from keras_jacmon.model.recording import Recording

# What each call receives, and by name of a call the differences of a registered recurrence from its layer.
RecordedTensors = tuple[list[SequenceTensors], dict[str, OutputDifferences]]


@dataclass(frozen=True)
class RecordedCalls:
    """The recorded calls of a model, known when its pass on the probe is traced.

    Attributes:
        calls: List of the calls.
        recording: The recorded tensors of the model; must live as long as the graph.
        refusals: Dict by name of a call, the reason why the steps of its registered recurrence cannot be taken.
    """

    calls: list[MeasurableCall]
    recording: Recording
    refusals: dict[str, str]

    @classmethod
    def of(cls, recording: Recording, kinds: CellKinds) -> "tuple[RecordedTensors, RecordedCalls]":
        """Returns the tensors of a recording, and its calls, in the graph that is being traced."""
        sequences = [UnrollInputs.of(call) for call in recording.calls]
        calls = MeasurableCall.all_of(recording.calls, sequences, kinds)
        differences, refusals = compare_outputs(recording.calls)
        tensors = [(part.inputs, part.states, part.mask) for part in sequences]
        return (tensors, differences), cls(calls, recording, refusals)
