"""The settings of a penalty, apart from the numbers that may change while a model trains."""

from dataclasses import dataclass
from typing import Any, Literal

from keras_jacmon.errors import check_whole, invalid_argument
from keras_jacmon.measures.differentiable import DIFFERENTIABLE
from keras_jacmon.measures.differentiable_over_time import DIFFERENTIABLE_OVER_TIME
from keras_jacmon.measures.registry import MEASURES
from keras_jacmon.options import LARGEST_SEED, VIEWS, ChosenStates, label_of


@dataclass(frozen=True)
class PenaltyConfig:
    """The measure in a penalty, and the points and estimates that it is computed with.

    Args:
        measure: String, a measure that can be differentiated.
        view: String, one of `VIEWS`; or a tuple of chosen states, by position or by name.
        scale: `"linear"` or `"log"`, the scale on which the measure is compared with its target.
        side: `"both"`, `"at_most"` or `"at_least"`, the side of the target on which there is a penalty.
        states: `"cached"` for constant states, or `"fresh"` for states that are computed at each batch.
        through_states: Boolean, True if gradients flow through fresh states.
        refresh: Integer, the number of batches after which other points are taken.
        rows: Integer, the maximum number of (step, sample) points of a call.
        vectors: Integer, the number of random vectors that stand for the rows of a block without structure.
        seed: Integer, the seed of the random vectors.

    Raises:
        ValueError: If a setting is invalid.
    """

    measure: str
    view: str | ChosenStates
    scale: Literal["linear", "log"]
    side: Literal["both", "at_most", "at_least"]
    states: Literal["cached", "fresh"]
    through_states: bool
    refresh: int
    rows: int
    vectors: int
    seed: int

    def key(self, joint: str) -> str:
        """Returns the key of the measure in a report.

        Args:
            joint: String, the prefix of the joint view there.
        """
        prefix = {"hidden": "", "joint": joint}.get(label_of(self.view), f"{label_of(self.view)}/")
        return f"{prefix}{self.measure}"

    @property
    def is_over_time(self) -> bool:
        """Boolean, True if the measure is one of whole trajectories."""
        return self.measure in DIFFERENTIABLE_OVER_TIME

    @property
    def suits_xla(self) -> bool:
        """Boolean, True if XLA can compile the measure and its gradient."""
        return not self.is_over_time and self.measure != "spectral_radius"

    def __post_init__(self) -> None:
        differentiable = [*DIFFERENTIABLE, *DIFFERENTIABLE_OVER_TIME]
        if self.measure not in differentiable:
            expected = f"a measure with a derivative: {differentiable}"
            known = f"{self.measure!r}, which is none of them" if self.measure in MEASURES else repr(self.measure)
            raise invalid_argument("measure", expected, f"measure={known}")
        choices: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
            # A flow, a growth and an exponent are logarithms.
            ("scale", self.scale, ("linear",) if self.is_over_time else ("linear", "log")),
            ("side", self.side, ("both", "at_most", "at_least")),
            ("states", self.states, ("cached", "fresh")),
            ("through_states", self.through_states, (True, False)),
        )
        views = ("hidden", "joint") if self.is_over_time else VIEWS
        # Whether a cell has chosen states shows when there is one.
        if self.is_over_time or isinstance(self.view, str):
            choices = (("view", self.view, views), *choices)
        for name, choice, known_choices in choices:
            # Equal and of the same type: 1 is not True.
            if not any(type(choice) is type(known) and choice == known for known in known_choices):
                raise invalid_argument(name, f"one of {list(known_choices)}", f"{name}={choice}")
        for name, number, least in (("refresh", self.refresh, 1), ("rows", self.rows, 1), ("vectors", self.vectors, 2)):
            check_whole(name, number, least)
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        if self.through_states and self.states != "fresh":
            expected = "False with `states='cached'`, whose states are constants"
            raise invalid_argument("through_states", expected, f"through_states={self.through_states}")
