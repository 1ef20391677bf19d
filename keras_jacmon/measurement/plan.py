"""The plan of a measurement: probe, targets, layers, measures and options, read and checked once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras

from keras_jacmon.measures.selection import Selection, select_measures
from keras_jacmon.model.inputs import read_probe, read_targets
from keras_jacmon.model.layers import as_list
from keras_jacmon.options import Options


@dataclass(frozen=True, eq=False)
class MeasurementPlan:
    """The plan of a measurement, for any model.

    Attributes:
        probe: NumPy arrays in the structure of the model's inputs.
        targets: Tensors in their own structure; None if the loss is not differentiated.
        layers: List of names of recurrent layers, or layers; None for all.
        selection: Measures by view.
        options: The settings.
    """

    probe: Any
    targets: Any
    layers: list[str | keras.Layer] | None
    selection: Selection
    options: Options

    @classmethod
    def read(
        cls,
        owner: type,
        probe: Any,
        *,
        layers: Iterable[str | keras.Layer] | str | keras.Layer | None,
        targets: Any,
        options: Mapping[str, Any],
    ) -> "MeasurementPlan":
        """Reads and checks what the user gave, before there is a model.

        Args:
            owner: Class, the one that was called, for the error about an unknown option.
            probe: A batch of model inputs, as for `JacobianMeter`.
            layers: Names of recurrent layers, or layers; None for all.
            targets: Targets of the probe's samples; None for none.
            options: Keyword arguments of `Options`.

        Raises:
            TypeError: If an option is unknown.
            ValueError: If the probe, the targets or an option is invalid.
        """
        checked = Options.of(owner, options)
        selection = select_measures(checked.measures)
        arrays = read_probe(probe)
        wanted = as_list(layers)
        return cls(arrays, None if targets is None else read_targets(targets, arrays), wanted, selection, checked)

    def without_a_model(self) -> "MeasurementPlan":
        """Returns the plan with the names of layers instead of layers, for a copy."""
        if self.layers is None:
            return self
        return replace(self, layers=[layer if isinstance(layer, str) else layer.name for layer in self.layers])
