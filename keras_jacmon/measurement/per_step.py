"""The Jacobians at the points of a trajectory, measured step by step and sample by sample."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from keras_jacmon.jacobians.cell_jacobian import CellJacobian
from keras_jacmon.jacobians.checks import check_independence, check_points
from keras_jacmon.jacobians.diagnosis import CheckResults
from keras_jacmon.jacobians.points import PointBatch
from keras_jacmon.jacobians.views import View, size
from keras_jacmon.measurement.chunks import PointSource, measure_points
from keras_jacmon.measurement.results import MeasuredArray
from keras_jacmon.measurement.subsampling import Subsample, indices_of
from keras_jacmon.measures.context import MeasureContext, Purpose
from keras_jacmon.measures.kinds import PerStep, Spectrum
from keras_jacmon.measures.selection import Quantity, Selection, filtered, of_kind, views_of
from keras_jacmon.options import ViewName
from keras_jacmon.tensors import ChosenPoints, aligned

# More (point, vector) pairs at once than this do not fit a cache and are no faster.
_MOST_POINTS = 2**14

# Number of points at which a structure is compared with autodiff; other points at each measurement.
CHECKED_POINTS = 16

# Each segment has this number of streams of random numbers, one for each of its chunks.
_STREAMS = 2**12


@dataclass(frozen=True)
class StepMeasurement:
    """Measurement of the Jacobians at the points of a trajectory.

    Attributes:
        jacobian: The Jacobians of the cell.
        quantities: The quantities of single points, including spectra.
        views: The views whose structure is checked.
        context: Settings of the measures.
        bytes_allowed: Integer, memory for the derivatives.
        bytes_per_point: Integer, memory of one evaluation of the cell with its derivative.
        draw: Integer scalar, number of measurements before this one.
        independent: Boolean, False if the points of a step must stay together.
        samples: Integer, number of points of a step.
    """

    jacobian: CellJacobian
    quantities: Selection
    views: tuple[ViewName, ...]
    context: MeasureContext
    bytes_allowed: int
    bytes_per_point: int
    draw: tf.Tensor
    independent: bool
    samples: int | tf.Tensor

    def evaluated(self, points: PointBatch) -> PointBatch:
        """Returns the points with their structured operators evaluated, if there is memory for all points at once."""
        count = points.inputs.shape[0]
        at_once = self.independent and count is not None and count <= self._chunk(points, ())
        return self.jacobian.evaluated(self.views, points) if at_once else points

    def measure(
        self,
        points: PointBatch,
        last: Sequence[tf.Tensor],
        subsample: Subsample,
        segment: tf.Tensor | int,
    ) -> tuple[list[MeasuredArray], CheckResults]:
        """Measures all quantities, and checks the assumptions.

        Args:
            points: The points.
            last: The states after the last step.
            subsample: Masks of the points that are measured.
            segment: Integer, number of segments before this one.

        Returns:
            The values of each quantity, `(time * batch,)`, spectra `(points, values)`; and the results of the checks.
        """
        # Dependent points stay together: all samples of a step, masked ones included.
        valid = None if subsample.mask is None or not self.independent else indices_of(subsample.mask)
        context = dataclasses.replace(self.context, stream=segment * _STREAMS)
        found: dict[Quantity, MeasuredArray] = {}
        for quantities, chosen, place in self._groups(valid, subsample.expensive):
            points = points.after(_tensors(found)) if found else points
            source = self._source(points, views_of(quantities), chosen)
            chunk = self._chunk(points, quantities) if self.independent else self.samples
            arrays = measure_points(source, quantities, context, chunk)
            arrays = arrays if place is None else [_where(place, array) for array in arrays]
            found |= zip(quantities, arrays, strict=True)
        points = points.after(_tensors(found))
        if subsample.spectra is not None:
            spectra = of_kind(self.quantities, Spectrum)
            values = self._spectra(spectra, points, indices_of(subsample.spectra), context)
            count = tf.math.count_nonzero(subsample.spectra)
            found |= zip(spectra, [MeasuredArray.of(value[:count]) for value in values], strict=True)
        checks = self._checked(points, last, valid)
        if subsample.mask is not None:
            # A placeholder point (everything is masked) has no meaningful next state: ignore its checks.
            exists = tf.reduce_any(subsample.mask)
            checks = CheckResults(*(tf.where(exists, check, tf.zeros_like(check)) for check in checks))
        return [found[quantity] for quantity in self.quantities], checks

    def _groups(
        self, valid: tf.Tensor | None, expensive: tf.Tensor | None
    ) -> list[tuple[Selection, tf.Tensor | None, tf.Tensor | None]]:
        """Returns quantities with the indices of their points, and with the mask `(time, batch)` of a subsample."""
        of_steps = of_kind(self.quantities, PerStep)
        if expensive is None:
            return [(of_steps, valid, None)] if of_steps else []
        groups = [
            (filtered(of_steps, lambda measure: not measure.expensive), valid, None),
            # The indices of a mask that is known are exactly its points.
            (
                filtered(of_steps, lambda measure: measure.expensive),
                indices_of(expensive),
                expensive if tf.get_static_value(expensive) is None else None,
            ),
        ]
        return [group for group in groups if group[0]]

    def _spectra(
        self, spectra: Selection, points: PointBatch, indices: tf.Tensor, context: MeasureContext
    ) -> list[tf.Tensor]:
        """Returns the spectra `(k, values)` at indices `(k,)`, one by one, since each takes a matrix."""

        def at(chosen: tf.Tensor) -> list[tf.Tensor]:
            operators = self.jacobian.operators(views_of(spectra), points.take(chosen))
            return [measure.function(operators[view], context) for view, measure in spectra]

        if not self.independent:
            return at(indices)
        widths = [measure.kind.width(self._shape(view, points)) for view, measure in spectra]
        types = [measure.kind.dtype(context.dtype) for _, measure in spectra]
        return tf.map_fn(
            lambda index: [values[0] for values in at(index[None])],
            indices,
            fn_output_signature=[tf.TensorSpec([width], dtype) for width, dtype in zip(widths, types, strict=True)],
            parallel_iterations=1,
        )

    def width(self, quantity: Quantity, points: PointBatch) -> int | None:
        """Returns the number of values of a quantity at each point; None for a single number."""
        return quantity.measure.kind.width(self._shape(quantity.view, points))

    def _shape(self, name: ViewName, points: PointBatch) -> tuple[int, int]:
        """Returns the number of rows and columns of the Jacobians of a view."""
        view = View.of(name, points.states)
        return sum(size(points.states[new]) for new in view.outputs), view.columns(points.inputs, points.states)

    def _chunk(self, points: PointBatch, quantities: Selection) -> int:
        """Returns the maximum number of points at once."""
        kept = []
        for measure in dict.fromkeys(measure for _, measure in quantities):
            of_views = [measure.numbers_kept(*self._shape(view, points)) for view, m in quantities if m is measure]
            at_once = len(of_views) if isinstance(measure.kind, PerStep) and measure.kind.of_several else 1
            kept.append(at_once * max(of_views))
        if not self.jacobian.assumptions.products:
            # J is formed.
            kept += [math.prod(self._shape(view, points)) for view in self.views]
        bytes_per_point = self.bytes_per_point + max(kept, default=0) * self.context.dtype.size
        return max(1, min(self.bytes_allowed // bytes_per_point, _MOST_POINTS))

    def _source(self, points: PointBatch, views: Sequence[ViewName], valid: tf.Tensor | None) -> PointSource:
        return PointSource(
            points.count,
            lambda start, stop: self.jacobian.operators(
                views, points if start is None else points.between(start, stop)
            ),
            lambda chosen: self.jacobian.operators(views, points.take(chosen)),
            valid,
        )

    def _checked(self, points: PointBatch, last: Sequence[tf.Tensor], valid: tf.Tensor | None) -> CheckResults:
        """Checks the assumptions behind the Jacobians: at some points the structure, at all points the independence.

        Args:
            points: The points.
            last: The states after the last step.
            valid: Integer `(k,)`, indices of the points to check; None for all.
        """
        if not self.views:
            # No gradient connects the states, and there is nothing to measure.
            return CheckResults.zero(self.context.dtype)
        total = points.count if valid is None else tf.size(valid)
        # Half as many points as are measured at once, since autodiff takes its memory beside them.
        most = max(1, self._chunk(points, ()) // 2) if self.independent else self.samples
        seed = tf.random.experimental.stateless_fold_in([self.context.options.seed, Purpose.CHECKS], self.draw)

        def at(indices: tf.Tensor) -> tuple[PointBatch, list[tf.Tensor]]:
            chosen = tf.cast(indices if valid is None else tf.gather(valid, indices), tf.int32)
            return points.take(chosen), self._following(points, last, chosen)

        chosen = self._turn(total, most) if self.independent else self._step_in_turn(points.count)
        checks = check_points(self.jacobian, self.views, *at(chosen), seed)
        if self.jacobian.point_by_point:
            return checks

        # Independence is checked at all points, at each measurement.
        def body(start: tf.Tensor, worst: CheckResults) -> tuple[tf.Tensor, CheckResults]:
            here = tf.range(start, tf.minimum(start + most, total))
            own = tf.random.experimental.stateless_fold_in(seed, start)
            return start + most, worst.worst(check_independence(self.jacobian, self.views, *at(here), own))

        _, worst = tf.while_loop(
            lambda start, _: start < total,
            body,
            [tf.constant(0), checks],
            parallel_iterations=1,
        )
        return worst

    def _turn(self, total: int | tf.Tensor, most: int | tf.Tensor) -> tf.Tensor:
        """Returns the indices of the points whose turn it is: as many as possible the first time, then a few.

        The few are spread over all points, and others each time: after enough measurements each point has had its turn.
        """
        if isinstance(total, int) and isinstance(most, int):
            numbers = [min(total, most), min(total, CHECKED_POINTS)]
            number, stride = tf.unstack(
                tf.where(self.draw == 0, *([number, -(-total // number)] for number in numbers))
            )
        else:
            number = tf.minimum(total, tf.where(self.draw == 0, most, CHECKED_POINTS))
            stride = tf.maximum(-(-total // tf.maximum(number, 1)), 1)
        return (tf.range(number) * stride + self.draw % stride) % tf.maximum(total, 1)

    def _step_in_turn(self, count: int | tf.Tensor) -> tf.Tensor:
        """Returns the indices of the points of one step, another step each time."""
        return tf.range(self.samples) + self.draw * self.samples % count

    def _following(self, points: PointBatch, last: Sequence[tf.Tensor], chosen: tf.Tensor) -> list[tf.Tensor]:
        """Returns the states after the chosen points: the old states of the next step, or the last states."""
        count, samples = points.count, self.samples
        following = chosen + samples
        within = following < count
        inside, beyond = ChosenPoints(tf.minimum(following, count - 1)), ChosenPoints(chosen % samples)
        return [
            tf.where(
                aligned(within, end),
                inside.of(states),
                beyond.of(end),
            )
            for states, end in zip(points.states, last, strict=True)
        ]


def _tensors(found: Mapping[Quantity, MeasuredArray]) -> list[tf.Tensor]:
    return [tensor for array in found.values() for tensor in (array.value, array.uncertainty)]


def _where(mask: tf.Tensor, array: MeasuredArray) -> MeasuredArray:
    """Returns the values `(time * batch,)` where a mask `(time, batch)` is True, and NaN elsewhere."""
    nothing = tf.constant(float("nan"), array.value.dtype)
    flat = tf.reshape(mask, [-1])
    value, uncertainty = (tf.where(flat, part, nothing) for part in (array.value, array.uncertainty))
    return MeasuredArray(value, uncertainty, array.is_exact)
