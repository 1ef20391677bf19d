"""The contract of a method that stabilizes."""

from typing import Protocol

from keras_jacmon.stabilization.goals import Standing


class Method(Protocol):
    """Changes the weights of a model, round by round; between two rounds the model is measured."""

    def advance(self, standing: Standing, updates: int) -> None:
        """Changes the weights.

        Args:
            standing: The `Standing` of the model with the present weights.
            updates: Integer, the number of updates of the weights in this round.
        """
