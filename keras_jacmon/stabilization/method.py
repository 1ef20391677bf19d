"""The contract of a method that stabilizes."""

from typing import Protocol

from keras_jacmon.stabilization.goals import Standing


class Method(Protocol):
    """Changes the weights of a model, round by round; between two rounds the model is measured.

    Attributes:
        notes: List of sentences about what it cannot do, each of them warned of when it was found.
    """

    notes: list[str]

    def advance(self, standing: Standing, updates: int) -> bool:
        """Changes the weights, and returns False if there is nothing that it could change.

        Args:
            standing: The `Standing` of the model with the present weights.
            updates: Integer, the number of updates of the weights in this round.
        """
