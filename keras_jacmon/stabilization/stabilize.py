"""The public function: weights of recurrent layers whose Jacobians have a chosen size, before a training begins."""

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras

from keras_jacmon.errors import check_whole, invalid_argument, is_number
from keras_jacmon.measures.differentiable import DIFFERENTIABLE
from keras_jacmon.meter import JacobianMeter
from keras_jacmon.model.building import build
from keras_jacmon.model.distribution import check_distribution, check_outside_of_scopes
from keras_jacmon.model.inputs import fit_probe, read_probe
from keras_jacmon.model.layers import check_model, find_recurrent_layers, select_layers
from keras_jacmon.options import LARGEST_SEED, label_of, states_in
from keras_jacmon.stabilization.best_weights import BestWeights, are_finite, changeable_weights
from keras_jacmon.stabilization.flossing import ExponentsObjective
from keras_jacmon.stabilization.goals import (
    GROWTH,
    LYAPUNOV,
    TIME,
    GivenView,
    Standing,
    Target,
    goals_in,
    measured_keys,
    targets_of,
    view_of,
)
from keras_jacmon.stabilization.gradient import Gradient, Objective, PenaltyObjective, penalty_config
from keras_jacmon.stabilization.history import History
from keras_jacmon.stabilization.method import Method
from keras_jacmon.stabilization.rescale import Rescale
from keras_jacmon.stabilization.result import StabilizeResult

# Points of a layer that each check measures.
_CHECKED_POINTS = 32


@dataclass(frozen=True)
class _MethodFacts:
    """The limits of a method.

    Attributes:
        updates_per_check: Integer, updates between two checks.
        most_updates: Integer, maximum number of updates, if the user gives none.
        measures: List of the measures that it knows, its default first.
    """

    updates_per_check: int
    most_updates: int
    measures: list[str]


_OF_ONE_STEP = ["spectral_radius", *(name for name in DIFFERENTIABLE if name != "spectral_radius")]

# An update of a rescaling is a whole round.
_METHODS = {
    "gradient": _MethodFacts(5, 500, [*_OF_ONE_STEP, GROWTH, LYAPUNOV]),
    "rescale": _MethodFacts(1, 20, [*_OF_ONE_STEP, GROWTH]),
    "flossing": _MethodFacts(10, 500, [LYAPUNOV]),
}


@dataclass(frozen=True)
class _Settings:
    """The arguments of `stabilize` that are no objects of a model, checked."""

    targets: dict[str, float]
    measure: str
    method: str
    view: GivenView
    tolerance: float
    patience: int
    steps: int
    rows: int
    exponents: int
    seed: int

    def __post_init__(self) -> None:
        known = _METHODS[self.method].measures
        if self.measure not in known:
            raise invalid_argument("measure", f"one of {known}", f"measure={self.measure!r}")
        is_named = isinstance(self.view, tuple) and states_in(label_of(self.view)) == self.view
        is_chosen = is_named and self.measure not in (GROWTH, LYAPUNOV)
        if self.view not in ("hidden", "joint") and not is_chosen:
            expected = "one of ['hidden', 'joint'], or chosen states such as `(0, 1)` for a measure of one step"
            raise invalid_argument("view", expected, f"view={self.view!r}")
        if not is_number(self.tolerance) or not self.tolerance > 0:
            raise invalid_argument("tolerance", "a number above 0", f"tolerance={self.tolerance!r}")
        for name, number, least in (
            ("patience", self.patience, 1),
            ("steps", self.steps, 0),
            ("rows", self.rows, 1),
            ("exponents", self.exponents, 1),
        ):
            check_whole(name, number, least)
        check_whole("seed", self.seed, 0, LARGEST_SEED)


def stabilize(
    model: keras.Layer,
    probe: Any,
    target: Target | None = None,
    measure: str | None = None,
    method: Literal["gradient", "rescale", "flossing"] = "gradient",
    *,
    view: str | Sequence[int | str] = "joint",
    layers: Iterable[str | keras.Layer] | str | keras.Layer | None = None,
    tolerance: float = 0.08,
    patience: int = 3,
    steps: int | None = None,
    rows: int = 8,
    exponents: int = 16,
    optimizer: Any = None,
    seed: int = 0,
    verbose: int = 1,
) -> StabilizeResult:
    """Brings a measure of the Jacobians of a model's recurrent layers to a target, before the training.

    Minimizes the mean of `(measure - target)²` over layers and points of their trajectories on a probe, and changes
    nothing but the weights of the recurrent layers: no optimizer, no state, no seed, no statistics. The best weights
    are kept, so the model is never worse than before, also when the call is interrupted.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((20, 3)), keras.layers.SimpleRNN(16, name="rnn"), keras.layers.Dense(1)])
    result = keras_jacmon.stabilize(model, np.random.default_rng(0).normal(size=(8, 20, 3)), target=0.8)
    print(result)
    result.after["rnn"].mean("spectral_radius")
    ```

    Args:
        model: Keras model, compiled or not. A model that is not built is built by a call on the probe.
        probe: A batch of model inputs, as for `JacobianMeter`.
        target: Number that the measure should have through time; or a dict of numbers for `"time"`, `"depth"`, or
            both. Depth is the view of the inputs, `dh_t/dx_t`; its spectral radius is that of the layers with as many
            inputs as units. For deep stacks the article proposes `{"time": 0.5, "depth": 0.5}`. Defaults to None: 1,
            or 0 for growth and exponents.
        measure: String, `"spectral_radius"`, `"variance"`, `"rms_singular_value"`, `"spectral_norm"` or `"growth"`;
            `"lyapunov"` for `"gradient"` and `"flossing"`, which are then the same. Defaults to None,
            `"spectral_radius"`, or `"lyapunov"` for `"flossing"`.
        method: String. `"gradient"`: an optimizer changes all trainable weights of the layers. `"rescale"`: the
            recurrent kernels, and for the depth the input kernels, are multiplied by a number for each gate, without an
            optimizer; a layer whose target no factor reaches stays as it is, with a warning. `"flossing"`: the
            optimizer brings the leading Lyapunov exponents to the target, through the QR decompositions and the
            states. Defaults to `"gradient"`.
        view: The view through time, a string: `"joint"`, all states together, or `"hidden"`. For a cell with one state,
            the joint view is the hidden one. Or chosen states, such as `(0, 2)` or, where the states are in a dict,
            `("v", "a")`, for the measures of one step. Defaults to `"joint"`.
        layers: Names of recurrent layers, or layers. Defaults to None, all of them.
        tolerance: Float above 0. It ends when the mean of the measure over the points of each layer is within this
            distance of its target, `patience` times in a row. A model that is so already is left as it is. Defaults to
            0.08.
        patience: Integer, number of checks. A check follows 5 updates, 10 of flossing, or one rescaling. Defaults to 3.
        steps: Integer, maximum number of updates. Defaults to None, 500, or 20 rescalings.
        rows: Integer, number of (step, sample) points of a layer in an update of `"gradient"`; they change with each
            check. A check measures up to 32 points, always the same ones. For growth, that of some samples along all
            of their steps, up to 32 times as many points, and one sample at least. Defaults to 8.
        optimizer: Keras optimizer, or its name or configuration, for `"gradient"` and `"flossing"`. A copy of it is
            used. Defaults to None: Adam, which moves each weight by 3 % of its size and has a gain of each weight among
            its variables; its learning rate is halved when the loss has become larger.
        exponents: Integer, number of leading Lyapunov exponents, as far as a layer has them. The first tenth of the
            steps of the probe is left out, and samples without further steps are, too. Of the exponents the root mean
            square distance from the target is compared with `tolerance`; one of -inf counts as log 1e-12. Defaults to
            16.
        seed: Integer, the seed of the random vectors. Defaults to 0.
        verbose: Integer, 1 for a progress bar, 0 for silence. Defaults to 1.

    Returns:
        `StabilizeResult`: the reports before and after, and the history of the checks.

    Raises:
        ValueError: If an argument is invalid, a layer has no such Jacobian, or no weight may be changed.

    References:
        L. Herranz-Celotti, J. Rouat, "Stabilizing RNN Gradients through Pre-training", arXiv 2308.12075.
        R. Engelken, "Gradient flossing: improving gradient descent through dynamic control of Jacobians", arXiv
        2312.17306.
    """
    if method not in list(_METHODS):
        raise invalid_argument("method", f"one of {list(_METHODS)}", f"method={method!r}")
    facts = _METHODS[method]
    measure = facts.measures[0] if measure is None else measure
    settings = _Settings(
        targets_of(target, measure),
        measure,
        method,
        view if isinstance(view, str) or not isinstance(view, Iterable) else tuple(view),
        tolerance,
        patience,
        facts.most_updates if steps is None else steps,
        rows,
        exponents,
        seed,
    )
    if verbose not in (0, 1):
        raise invalid_argument("verbose", "0 or 1", f"verbose={verbose!r}")
    own = _own_optimizer(optimizer, method)
    return _Stabilizer(model, read_probe(probe), layers, settings).run(own, verbose=verbose)


class _Stabilizer:
    """A model that is measured and changed in turns."""

    def __init__(self, model: keras.Layer, arrays: Any, layers: Any, settings: _Settings) -> None:
        self._begin = time.monotonic()
        check_model(model)
        check_distribution(model)
        if settings.method != "rescale":
            check_outside_of_scopes(f"`stabilize` by {settings.method}")
        build(model, arrays)
        self._model, self._settings = model, settings
        found = select_layers(find_recurrent_layers(model), layers)
        self._weights = changeable_weights(model, found)
        self._layers = [item for item in found if self._weights[item.name]]
        self._inputs = fit_probe(model, arrays)
        self._meter = JacobianMeter(
            model,
            arrays,
            layers=layers,
            measures=[*measured_keys(settings.targets, settings.measure, settings.view), "joint/growth"],
            seed=settings.seed,
            max_rows=_CHECKED_POINTS,
            exponents=settings.exponents,
        )
        report = self._meter(suggestions=False)
        goals = goals_in(report, settings.targets, settings.measure, settings.view)
        self._by_layer = {item.name: [goal for goal in goals if goal.is_of(item.name)] for item in self._layers}
        self._goals = [goal for goal in goals if any(goal.is_of(item.name) for item in self._layers)]
        lost = [item.name for item in self._layers if not are_finite(self._weights[item.name])]
        if lost:
            raise invalid_argument("model", "finite weights", f"NaN or Inf in the layers {lost}")
        frozen = [item.name for item in found if not self._weights[item.name]]
        if not self._goals:
            raise invalid_argument("layers", "a recurrent layer with a goal and a weight that is trained", f"{frozen}")
        masked = [goal.call for goal in self._goals if not report[goal.call].mask.any()]
        if masked:
            received = f"a probe that is masked throughout for the layers {masked}"
            raise invalid_argument("probe", "a probe with steps that are not masked", received)
        if frozen:
            warnings.warn(f"The layers {frozen} have no weight that is trained, and stay as they are.", stacklevel=3)
        self._before = Standing.of(report, self._goals, settings.tolerance)

    def run(self, optimizer: keras.optimizers.Optimizer | None, *, verbose: int) -> StabilizeResult:
        """Changes the weights until the goals are reached, and leaves the best ones, also if it is interrupted."""
        history = History(self._settings.steps, verbose)
        history.add(0, self._before)
        if self._before.is_within:
            return self._result(self._before, history, ())
        method = self._method(optimizer)
        best = self._changed(method, history)
        history.close()
        return self._result(best, history, method.notes)

    def _result(self, after: Standing, history: History, notes: Iterable[str]) -> StabilizeResult:
        return StabilizeResult(
            before=self._before.report,
            after=after.report,
            history=history.values,
            goals=tuple(self._goals),
            converged=after.is_within,
            notes=tuple(notes),
            seconds=time.monotonic() - self._begin,
        )

    def _changed(self, method: Method, history: History) -> Standing:
        """Changes the weights in rounds, and returns the `Standing` of the best ones, which the model then has."""
        settings, standing = self._settings, self._before
        weights = [weight for of_layer in self._weights.values() for weight in of_layer]
        best = BestWeights(weights, standing)
        updates, within = 0, 0
        try:
            while updates < settings.steps and within < settings.patience:
                count = min(_METHODS[settings.method].updates_per_check, settings.steps - updates)
                if not method.advance(standing, count):
                    break
                updates += count
                standing = self._standing()
                best.offer(standing)
                within = within + 1 if standing.is_within else 0
                history.add(updates, standing)
                if not are_finite(weights):
                    method.notes.append(f"It ended there, since a weight was no finite number after {updates} updates.")
                    break
        finally:
            best.put_back()
        return best.standing

    def _standing(self) -> Standing:
        return Standing.of(self._meter(suggestions=False), self._goals, self._settings.tolerance)

    def _method(self, optimizer: keras.optimizers.Optimizer | None) -> Method:
        settings = self._settings
        if settings.method == "rescale":
            goals = {layer: goals for layer, goals in self._by_layer.items() if goals}
            return Rescale(self._weights, goals, settings.measure, settings.tolerance, self._standing)
        weights = [weight for item in self._layers for weight in self._weights[item.name]]
        return Gradient(self._losses(), weights, optimizer)

    def _losses(self) -> list[Objective]:
        settings, of_model = self._settings, (self._model, self._inputs, self._layers)
        if settings.measure == LYAPUNOV:
            target = settings.targets[TIME]
            return [ExponentsObjective(*of_model, count=settings.exponents, target=target, seed=settings.seed)]
        losses: list[Objective] = []
        for direction in dict.fromkeys(goal.direction for goal in self._goals):
            goals = [goal for goal in self._goals if goal.direction == direction]
            view = view_of(direction, settings.view)
            config = penalty_config(settings.measure, view, settings.rows, settings.seed)
            losses.append(PenaltyObjective(*of_model, goals, config))
        return losses


def _own_optimizer(optimizer: Any, method: str) -> keras.optimizers.Optimizer | None:
    """Returns an optimizer that nothing else uses; None for None."""
    if optimizer is None:
        return None
    if method == "rescale":
        raise invalid_argument("optimizer", 'None for the method "rescale", which needs none', repr(optimizer))
    try:
        given = keras.optimizers.get(optimizer)
    except ValueError as error:
        expected = "a Keras optimizer, or its name or configuration"
        raise invalid_argument("optimizer", expected, repr(optimizer)) from error
    if isinstance(given, keras.optimizers.LossScaleOptimizer):
        # What Keras makes of the optimizer of a model in `mixed_float16`; no loss is scaled here.
        given = given.inner_optimizer
    return type(given).from_config(given.get_config())
