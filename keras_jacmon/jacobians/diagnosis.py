"""Results of the checks, and the assumption that fails."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import tensorflow as tf

from keras_jacmon.jacobians.cell_jacobian import Assumptions


class CheckResults(NamedTuple):
    """The results of the checks: scalars, each a relative difference that is 0 where its check does not apply.

    Attributes:
        structure_residual: Distance of a structured Jacobian, or of a registered form, from autodiff.
        products: Distance of the products with J from those with Jᵀ.
        columns: Distance of products with several vectors at once from those with one vector.
        dependence: Distance of the new states of some points from those that the cell gave them among others.
        influence: Size of the derivatives of a point by the states of other points of its step.
        influence_of_inputs: Size of its derivatives by the inputs of other points, where these are measured.
    """

    structure_residual: tf.Tensor | float
    products: tf.Tensor | float
    columns: tf.Tensor | float
    dependence: tf.Tensor | float
    influence: tf.Tensor | float
    influence_of_inputs: tf.Tensor | float

    @classmethod
    def zero(cls, dtype: tf.DType) -> "CheckResults":
        """The results of no check at all."""
        nothing = tf.zeros([], dtype)
        return cls(*[nothing] * len(cls._fields))

    def worst(self, other: "CheckResults") -> "CheckResults":
        """The larger of both results of each check, or NaN if one of them is NaN."""
        return CheckResults(
            *(tf.where(tf.math.is_nan(b) | (b > a), b, a) for a, b in zip(self, other, strict=True)),
        )

    def floats(self) -> "CheckResults":
        """The results as numbers of Python."""
        return CheckResults(*map(float, self))


# Relative. Rounding in float32 leaves about 1e-6, and of the influence nothing.
TOLERANCES = CheckResults(
    structure_residual=1e-3, products=1e-3, columns=1e-3, dependence=1e-3, influence=1e-6, influence_of_inputs=1e-6
)


@dataclass(frozen=True)
class Diagnosis:
    """The consequence of a check that failed.

    Attributes:
        assumptions: The assumptions that remain; None if there is no Jacobian.
        reason: The assumption that does not hold, in words.
        consequence: The way in which the Jacobian is taken instead, in words.
    """

    assumptions: Assumptions | None
    reason: str
    consequence: str = ""


def diagnose(results: CheckResults, assumptions: Assumptions) -> Diagnosis | None:
    """Finds the assumption that fails.

    Args:
        results: Numbers of Python.
        assumptions: The assumptions that the Jacobians rested on.

    Returns:
        The diagnosis of the most important check that failed; None if no check failed.
    """
    # Not the other way round: NaN fails too.
    failed = {
        name: f"(relative difference {result:.2g}, allowed is {tolerance:.0e})"
        for name, result, tolerance in zip(CheckResults._fields, results, TOLERANCES, strict=True)
        if not result <= tolerance
    }
    of_samples = _of_samples(failed, assumptions)
    if of_samples is not None:
        return of_samples
    if "structure_residual" in failed:
        return Diagnosis(
            replace(assumptions, structure=False),
            f"the structure of its Jacobian differs from autodiff {failed['structure_residual']}",
            "It is measured by autodiff",
        )
    if "products" in failed:
        return Diagnosis(
            replace(assumptions, products=False),
            f"products with its Jacobian, by the tape applied twice, differ from those with its transpose "
            f"{failed['products']}",
            "The Jacobian is formed for them",
        )
    if "columns" in failed:
        return Diagnosis(
            replace(assumptions, products=False),
            "products of its Jacobian with several vectors at once, by `tf.vectorized_map`, differ from those with one "
            f"vector {failed['columns']}",
            "The Jacobian is formed by one gradient for each unit",
        )
    return None


def _of_samples(failed: Mapping[str, str], assumptions: Assumptions) -> Diagnosis | None:
    """Finds the assumption on the samples of a batch that fails, from differences in words."""
    checks = ("dependence", "influence", "influence_of_inputs")
    difference = next((failed[name] for name in checks if name in failed), None)
    if assumptions.independent and difference is not None:
        return Diagnosis(
            replace(assumptions, independent=False),
            f"what its cell makes of a sample depends on the other samples of the batch {difference}",
            "It is measured by autodiff, step by step,",
        )
    if "influence" in failed:
        return Diagnosis(
            None, "The new states of a sample depend on the old states of others, so it has no Jacobian of its own"
        )
    if "influence_of_inputs" in failed:
        return Diagnosis(
            replace(assumptions, inputs=False),
            "the new states of a sample depend on the inputs of others",
            "The inputs view is left out",
        )
    return None
