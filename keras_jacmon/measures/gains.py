"""The gains of a flow by span, read off the numbers that its graph gives for each step, in plain NumPy."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from keras_jacmon.measures.flow import FlowPlan
from keras_jacmon.report.arrays import FloatArray

# The relative variance that rounding may leave where there is none.
_NO_SPREAD = 1e-12

# Two standard errors of a normal distribution hold 95 %.
_NORMAL_95 = 1.96


class Gains(NamedTuple):
    """Natural logarithms of the gains by span and sample, `(spans, samples)`, and their standard errors."""

    log_gain: FloatArray
    standard_error: FloatArray


def gains_by_span(numbers: FloatArray, mask: npt.NDArray[np.bool_] | None, plan: FlowPlan) -> Gains:
    """The RMS gain of the product of the last k steps, `‖P_k‖_F / sqrt(n)`, for each span k = 1..time.

    n is the number of units in which the flow begins, and the norm that of the rows of P_k that belong to them. The
    mean square over m random orthonormal vectors is unbiased. Its relative variance follows from the vectors' Gram
    matrix, which shows how unlike the gains of different directions are. A beta distribution of this mean and variance,
    the true one for a product of rank one, gives the bias of the logarithm, which is taken off, and its standard error.

    Args:
        numbers: Float64 array `(time, 2, samples)`, from `flow_segment`, all segments one after the other in the order
            of time.
        mask: Boolean array `(time, samples)`, False for the steps that a sample skips; None for no mask.
        plan: `FlowPlan`, the vectors that the flow began with.

    Returns:
        The logarithms: -inf where nothing is left, NaN or inf from where a Jacobian holds such. The standard error is
        wider than the beta distribution's: the relative variance is itself estimated from few vectors, and two standard
        errors are to hold 95 %. A span counts the steps that the sample does not skip; NaN for those longer than its
        sequence.
    """
    logs, spread = numbers[:, 0] - math.log(plan.vectors) / 2, numbers[:, 1]
    if plan.is_exact:
        return Gains(by_span(logs, mask), by_span(np.zeros_like(logs), mask))
    share = plan.vectors / plan.units
    # The factor makes the variance unbiased, and that of a product of rank one exact.
    factor = 2 * plan.vectors * (1 - share) / ((plan.vectors + 2) * (plan.vectors - 1))
    relative = factor * np.clip(spread, _NO_SPREAD, 1 - 1 / plan.vectors)
    # The first parameter of the beta distribution, and the sum of both.
    alpha = (1 - share) * (1 - relative) / relative - share
    bias, variance = (at - of for at, of in zip(_log_gamma(alpha), _log_gamma(alpha / share), strict=True))
    error = np.where(spread <= _NO_SPREAD, 0.0, _widening(plan.vectors) / 2 * np.sqrt(variance))
    return Gains(by_span(logs - bias / 2, mask), by_span(error, mask))


def _log_gamma(shape: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Returns the bias and the variance of the logarithm of a gamma distribution, for shapes of at least 1.

    By the asymptotic series of `digamma(shape) - log(shape)` and `trigamma(shape)`, to 1 %.
    """
    u = 1 / shape
    square = u * u
    bias = -u / 2 - square / 12 + square * square / 120
    return bias, u + square / 2 + u * square / 6 - u * square * square / 30


def _widening(vectors: int) -> float:
    """Returns the factor by which a standard error grows as its square is estimated from a few vectors.

    It is the 97.5 % quantile of Student's t distribution over that of the normal one, by a series in the degrees of
    freedom: those of a symmetric matrix `(vectors, vectors)` without trace.
    """
    freedom, z = (vectors - 1) * (vectors + 2) / 2, _NORMAL_95
    series = ((z**2 + 1) / 4, (5 * z**4 + 16 * z**2 + 3) / 96, (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384)
    return 1 + sum(term / freedom**power for power, term in enumerate(series, 1))


def by_span(values: FloatArray, mask: npt.NDArray[np.bool_] | None) -> FloatArray:
    """Sorts the values of the steps by their distance from the end of the sample's sequence.

    Args:
        values: Float array `(time, samples)`, in the order of time.
        mask: Boolean array `(time, samples)`, False for steps that do not count; None for no mask.

    Returns:
        `(spans, samples)`: in place k - 1 the value of the k-th real step from the end, NaN if there are fewer.
    """
    if mask is None:
        return values[::-1]
    spans = np.cumsum(mask[::-1], axis=0)[::-1]
    steps, samples = np.nonzero(mask)
    found = np.full_like(values, np.nan)
    found[spans[steps, samples] - 1, samples] = values[steps, samples]
    return found
