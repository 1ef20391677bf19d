"""Report of one recurrent call: the measured arrays and the numbers that sum them up."""

from collections.abc import ItemsView, Iterator, KeysView
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.errors import did_you_mean, invalid_argument
from keras_jacmon.report.arrays import FloatArray, same
from keras_jacmon.report.curve import FALL, RISE
from keras_jacmon.report.reductions import REDUCTIONS, mean
from keras_jacmon.report.suggestion import Suggestion
from keras_jacmon.report.verdict import Verdict, judge


@dataclass(frozen=True, eq=False)
class LayerReport:
    """The measures of one call of a recurrent layer, to be read like a dict.

    Arrays by key: `"variance"` is a measure of the hidden view, `"joint/variance"` one of the joint view. Time is the
    position in the input, also for `go_backwards`. `batch` counts the samples of the probe.

    Attributes:
        cell: String, the class of the cell.
        units: Integer, the size of the hidden state.
        values: Dict of float arrays `(time, batch)`: the measures of single steps, NaN at masked steps. Units are those
            of the measure, mostly dimensionless.
        mask: Boolean array `(time, batch)`, False at the steps that the layer skips.
        uncertainties: Dict of float arrays of the shape of the values, for the keys that have one: the standard error
            of an estimate, or the residual of a value found iteratively. Defaults to none.
        estimated: Frozenset of the keys whose values are unbiased estimates from random vectors. Defaults to none.
        sampled: Dict of boolean arrays `(time, batch)` for the keys that were measured at some of the unmasked steps
            only (`max_rows`): True where they were. Defaults to none.
        certificate: Float, dimensionless. If the Jacobians rest on a structure that was found in the cell: the largest
            relative difference between products with them and autodiff at the points that were compared this time,
            except for one point in 200, where it is largest. None without such a structure. Defaults to None.
        sequences: Dict of float arrays, the measures of whole sequences: `"flow"` `(span, batch)`, in nats, the natural
            logarithm of the gain over the last 1, 2, ... steps; `"lyapunov"` `(exponent, batch)`, in nats per step;
            `"growth"` (nats per step), `"horizon"` (steps) and `"kaplan_yorke"` (dimensionless), `(batch,)`;
            `"sensitivity"` `(span, batch)`, to the weights as they act in the last 1, 2, ... steps, and
            `"relative_sensitivity"` and `"state_norm"`, `(batch,)`. Their standard errors are among the
            `uncertainties`. Defaults to none.
        spectra: Dict of arrays `(point, value)`, dimensionless, `"eigenvalues"` (complex) and `"singular_values"`, the
            largest first. Defaults to none.
        spectra_at: Integer array `(point, 2)`, the step and the sample of each spectrum. Defaults to none.
        joint: String, the prefix of the keys of the joint view: `"joint/"`, or `""` for a cell with one state. Defaults
            to `""`.
        suggestions: Tuple of `Suggestion`, the changes that were tried and make the verdict better. Defaults to none.
        weight_size: Float, the root mean square of the recurrent weights. Defaults to None, not measured.
        go_backwards: Boolean, True if the layer reads its input from the end. Defaults to False.
        notes: Tuple of sentences that a reader of the numbers must know, such as a state without influence. Defaults to
            none.
        methods: Dict of strings, the method behind the values of a key: `"exact"`, `"Arnoldi, to 0.01"`,
            `"3 random vectors"`. Defaults to none, read as `"exact"`.
        reductions: Dict of strings, by key of `sequences` the reduction to one number over the samples: `"mean"`,
            `"first"` (the mean of the first value of each sample), `"growth"` or `"horizon"` (of the flow's mean over
            the samples), `"root_mean_square"`, `"whole"` (the root mean square at each sample's longest span) or
            `"relative"` (the root mean square of the sensitivity over that of the last state). A key without one has no
            number. Defaults to none.
        may_be_infinite: Frozenset of the keys of `values` in which inf is a regular value. Defaults to none.
        targets: Dict of floats, by key of `values` the target of a `JacobianRegularizer` at this moment. Defaults to
            none.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((20, 3)), keras.layers.LSTM(8, name="lstm")])
    layer = keras_jacmon.measure(model, np.ones((4, 20, 3), "float32"))["lstm"]
    print(layer["variance"].shape)          # (20, 4): steps and samples
    print(layer.mean("variance"), layer.scalars()["joint/growth"])
    ```
    """

    cell: str
    units: int
    values: dict[str, FloatArray]
    mask: npt.NDArray[np.bool_]
    uncertainties: dict[str, FloatArray] = field(default_factory=dict)
    estimated: frozenset[str] = frozenset()
    sampled: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    certificate: float | None = None
    sequences: dict[str, FloatArray] = field(default_factory=dict)
    spectra: dict[str, npt.NDArray[np.inexact]] = field(default_factory=dict)
    spectra_at: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    joint: str = ""
    suggestions: tuple[Suggestion, ...] = ()
    weight_size: float | None = None
    go_backwards: bool = False
    notes: tuple[str, ...] = ()
    methods: dict[str, str] = field(default_factory=dict)
    reductions: dict[str, str] = field(default_factory=dict)
    may_be_infinite: frozenset[str] = frozenset()
    targets: dict[str, float] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return same(vars(self), vars(other)) if isinstance(other, LayerReport) else NotImplemented

    # It holds arrays and dicts.
    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        everything = dict(self.items())
        if key not in everything:
            hint = did_you_mean(key, everything)
            raise KeyError(f"No measure '{key}' in this report. Measured: {list(everything)}{hint}")
        return everything[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __repr__(self) -> str:
        time, batch = self.mask.shape
        size = f"{self.units} units, {time} steps x {batch} samples"
        return f"<LayerReport: {self.cell}, {size}, {len(self.keys())} measures>"

    def keys(self) -> KeysView[str]:
        """Returns the keys of all arrays: of single steps, of whole sequences and of spectra."""
        return {**self.values, **self.sequences, **self.spectra}.keys()

    def items(self) -> ItemsView[str, npt.NDArray[Any]]:
        """Returns the pairs of keys and arrays; the attribute `values` has those of single steps alone."""
        return {**self.values, **self.sequences, **self.spectra}.items()

    def measured(self, key: str) -> npt.NDArray[np.bool_]:
        """Returns where the key was measured: at the unmasked steps, or at some of them.

        Args:
            key: String, a key of `values`.

        Returns:
            Boolean array `(time, batch)`.

        Raises:
            KeyError: If the report has no such key.
            ValueError: If it is a key of `sequences` or `spectra`, which have no value for each step.
        """
        if key not in self.values:
            shape = self[key].shape
            axes = "(point, value)" if key in self.spectra else "(batch,)" if len(shape) == 1 else "(value, batch)"
            raise invalid_argument(
                "key",
                f"a measure of single steps, of {list(self.values)}",
                f"key={key!r}, with an array {axes} of shape {shape}: read it as `layer[{key!r}]`, "
                "and its number, if it has one, in `layer.scalars()`",
            )
        return self.sampled.get(key, self.mask)

    def valid(self, key: str) -> FloatArray:
        """Returns the measured values, flat; a NaN among them comes from the network.

        Args:
            key: String, a key of `values`; or one of `sequences` with one value for each sample, such as
                `"joint/growth"`: then the values of the samples that have one.

        Returns:
            Float array `(points,)`, or `(samples,)`, in the unit of the measure.

        Raises:
            ValueError: If the key has neither.
        """
        if self._is_of_samples(key):
            return self.sequences[key][~np.isnan(self.sequences[key])]
        return self[key][self.measured(key)]

    def mean(self, key: str) -> float:
        """Returns the mean of the measured values; NaN if a value is NaN, or if there is none.

        Args:
            key: String, a key of `values`; or one of `sequences` with one value for each sample, such as
                `"joint/growth"`: then its number in `scalars()`.

        Returns:
            Float, in the unit of the measure.

        Raises:
            ValueError: If the key has neither.
        """
        if self._is_of_samples(key) and key in self.reductions:
            return self.scalars()[key]
        return mean(self.valid(key))

    def standard_error(self, key: str) -> float:
        """Returns the standard error of `mean(key)` if it is an estimate, and 0 if it is exact.

        Args:
            key: String, a key of `values`; or the sensitivity, or the relative one: then the standard error of its
                number in `scalars()`.

        Returns:
            Float, in the unit of the measure.

        Raises:
            ValueError: If it is another key of `sequences` or `spectra`.
        """
        reduction = REDUCTIONS.get(self.reductions.get(key, ""))
        if reduction is not None and reduction.error is not None:
            sources = reduction.source_keys(key)
            if sources[0] not in self.uncertainties:
                return 0.0
            return reduction.error(self.uncertainties[sources[0]], *(self.sequences[source] for source in sources))
        measured = self.measured(key)
        if key not in self.estimated:
            return 0.0
        errors = self.uncertainties[key][measured]
        # The points are estimated with independent random vectors.
        return float(np.sqrt(np.sum(errors.astype(np.float64) ** 2)) / max(errors.size, 1))

    def over_time(self, key: str) -> FloatArray:
        """Returns the mean over the measured samples of each step; NaN where there is none.

        Args:
            key: String, a key of `values`.

        Returns:
            Float array `(time,)`, in the unit of the measure.

        Raises:
            ValueError: If it is a key of `sequences` or `spectra`.
        """
        measured = self.measured(key)
        # inf and -inf have no mean, nor has a step without samples: NaN, and no warning of NumPy's.
        with np.errstate(invalid="ignore"):
            sums = np.where(measured, self[key], 0).sum(axis=1, dtype=np.float64)
            return np.asarray(sums / measured.sum(axis=1))

    def extremes(self, key: str) -> tuple[float, float]:
        """Returns the least and the greatest of `over_time(key)`, over the steps that have a measured sample.

        Args:
            key: String, a key of `values`; or one of `sequences` with one value for each sample, such as
                `"joint/growth"`: then the least and the greatest of these.

        Returns:
            Two floats, in the unit of the measure; NaN if nothing was measured.

        Raises:
            ValueError: If the key has neither.
        """
        if self._is_of_samples(key):
            samples = self.valid(key)
            return (float(np.min(samples)), float(np.max(samples))) if samples.size else (np.nan, np.nan)
        steps = self.over_time(key)[self.measured(key).any(axis=1)]
        return (float(np.min(steps)), float(np.max(steps))) if steps.size else (np.nan, np.nan)

    def scalars(self) -> dict[str, float]:
        """Returns one number for each key that has one.

        Returns:
            Dict of floats: the means of the `values`, and the `sequences` after their `reductions`: growth and horizon
            of the flow's mean over the samples, as in the verdict; of the Lyapunov exponents the mean of the largest,
            as `lyapunov_1`; of the sensitivity root mean squares; means over the samples of the others.
        """
        found = {key: self.mean(key) for key in self.values}
        for key, name in self.reductions.items():
            reduction = REDUCTIONS[name]
            found[key + reduction.suffix] = reduction.reduce(
                *(self.sequences[source] for source in reduction.source_keys(key))
            )
        return found

    def judge(self, fall: float = FALL, rise: float = RISE) -> Verdict | None:
        """Judges whether a gradient vanishes or explodes on its way through the probe, and what could be done.

        Rests on the joint flow over each sample's real length. The suggestions were tried with the default thresholds.

        Args:
            fall: Float in (0, 1), the gain at which a gradient has vanished. Defaults to 0.01.
            rise: Float above 1, the gain at which a gradient has exploded. Defaults to 100.

        Returns:
            `Verdict`; None if no joint flow was measured, or if it is NaN.

        Raises:
            ValueError: If not 0 < fall < 1 < rise.
        """
        key = f"{self.joint}flow"
        if key not in self.sequences:
            return None
        return judge(
            self.sequences[key],
            self.mask,
            suggestions=self.suggestions,
            relative_sensitivity=self._relative_sensitivity(),
            weight_size=self.weight_size,
            log_gain_of_all=self.sequences.get(f"{self.joint}flow_of_all"),
            cell=self.cell,
            go_backwards=self.go_backwards,
            fall=fall,
            rise=rise,
        )

    def _relative_sensitivity(self) -> float | None:
        """Returns that of the hidden state, or else of all states; None if it was not measured."""
        scalars = self.scalars()
        return scalars.get("relative_sensitivity", scalars.get("joint/relative_sensitivity"))

    def why_no_verdict(self) -> str:
        """Returns the reason why `judge` returns None; `""` if there is a verdict."""
        if self.judge() is not None:
            return ""
        key = f"{self.joint}flow"
        if key not in self.sequences:
            return f"`{key}`, on which it rests, was not measured"
        if not self.mask.any():
            return "all steps of the probe are masked"
        return f"`{key}` is NaN, because weights, states or Jacobians are not finite"

    def verdict_in_a_line(self) -> str:
        """Returns the verdict without its advice, or the reason why there is none."""
        verdict = self.judge()
        return str(verdict).partition("\n")[0] if verdict else f"no verdict: {self.why_no_verdict()}"

    def _is_of_samples(self, key: str) -> bool:
        """True for a measure of whole sequences with one value for each sample."""
        return key in self.sequences and self.sequences[key].ndim == 1

    def nonfinite(self) -> dict[str, int]:
        """Counts NaN and inf among the values of single steps.

        Of the keys that `may_be_infinite` only NaN counts.

        Returns:
            Dict of positive integers, for the keys that have any.
        """
        counts = {key: int(self._is_broken(key).sum()) for key in self.values}
        return {key: count for key, count in counts.items() if count}

    def _is_broken(self, key: str) -> npt.NDArray[np.bool_]:
        values = self.valid(key)
        return np.isnan(values) if key in self.may_be_infinite else ~np.isfinite(values)
