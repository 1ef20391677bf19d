"""Explanation of the way in which the Jacobians of a model are taken, block by block."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras

from keras_jacmon.jacobians.cell_jacobian import Choice
from keras_jacmon.meter import JacobianMeter


@dataclass(frozen=True)
class Explanation:
    """The way in which each block of each Jacobian is taken; `print` shows a table.

    Attributes:
        choices: Dict by layer, named as in reports, of dicts by view: a `Choice` for each new and old state.
    """

    choices: dict[str, dict[str, list[Choice]]]

    def __str__(self) -> str:
        return "\n".join(
            line
            for layer, views in self.choices.items()
            for line in (
                f"{layer}:",
                *(
                    f"  {view:<6}  d state {choice.new} / d {_name(choice.old)}  {choice.how}: {choice.why}"
                    for view, choices in views.items()
                    for choice in choices
                ),
            )
        )


def _name(old: int | None) -> str:
    return "inputs" if old is None else f"state {old}"


def explain(
    model: keras.Layer, probe: Any, layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None
) -> Explanation:
    """Explains how the Jacobians of a model's recurrent layers are taken, block by block.

    A block is the derivative of one new state by one old state. Where every operation between the products of a cell
    acts unit by unit or moves units, the block is made of diagonals and kernels, and its statistics cost about as much
    as a forward pass. Otherwise it is left to automatic differentiation, and the reason is given.

    Example:

    ```python
    print(keras_jacmon.explain(model, x[:32]))
    ```

    Args:
        model: A Keras model, compiled or not.
        probe: A batch of model inputs.
        layers: Names of recurrent layers, or layers; None for all.

    Returns:
        The explanation.

    Raises:
        ValueError: As for `JacobianMeter`.
    """
    return Explanation(JacobianMeter(model, probe, layers=layers, measures=["variance", "inputs/variance"]).choices)
