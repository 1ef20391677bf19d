"""What do the Jacobians of a model look like at one moment? Plain NumPy; nothing here needs TensorFlow."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True)
class LayerReport:
    """The measures of one call of a recurrent layer.

    Attributes:
        cell: Class of the cell.
        units: Size of the hidden state.
        values: `(time, batch)` for each key, `"variance"` (the hidden view) or `"joint/variance"`; NaN at masked steps.
            Time is the position in the input, also for `go_backwards`.
        mask: `(time, batch)`, False at the steps that the layer skips.
        uncertainties: `(time, batch)` for the keys that have one: the standard error of an estimate, or the residual
            of `spectral_norm`.
        estimated: The keys whose values are unbiased estimates from random vectors.
        sampled: By key, for those that were measured at some rows only (`max_rows`), where: `(time, batch)`.
        certificate: If the Jacobians rest on a structure that was found in the cell: the largest relative difference
            between products with them and autodiff, on the rows that were compared this time, but for one in twenty.
        notes: What a reader of the numbers must know, e.g. a state without influence.
    """

    cell: str
    units: int
    values: dict[str, FloatArray]
    mask: npt.NDArray[np.bool_]
    uncertainties: dict[str, FloatArray] = field(default_factory=dict)
    estimated: frozenset[str] = frozenset()
    sampled: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    certificate: float | None = None
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> FloatArray:
        if key not in self.values:
            raise KeyError(f"No measure '{key}' in this report. Measured: {list(self.values)}")
        return self.values[key]

    def measured(self, key: str) -> npt.NDArray[np.bool_]:
        """Where the key was measured, `(time, batch)`: at the unmasked steps, or some of them."""
        return self.sampled.get(key, self.mask)

    def valid(self, key: str) -> FloatArray:
        """The values where it was measured, flat; NaN among them comes from the network."""
        return self[key][self.measured(key)]

    def mean(self, key: str) -> float:
        """The mean over samples and steps where it was measured; NaN if a value is NaN, or if there is none."""
        return _mean(self.valid(key))

    def standard_error(self, key: str) -> float:
        """The standard error of `mean(key)` if it is an estimate, and 0 if it is exact."""
        if key not in self.estimated:
            return 0.0
        errors = self.uncertainties[key][self.measured(key)]
        # The rows are estimated with independent random vectors.
        return float(np.sqrt(np.sum(errors.astype(np.float64) ** 2)) / max(errors.size, 1))

    def over_time(self, key: str) -> FloatArray:
        """The mean over the measured samples of each step, `(time,)`; NaN where there is none."""
        rows = zip(self[key], self.measured(key), strict=True)
        return np.array([_mean(values[valid]) for values, valid in rows], dtype=np.float64)

    def extremes(self, key: str) -> tuple[float, float]:
        """The least and the greatest of `over_time(key)`, over the steps that have a measured sample."""
        steps = self.over_time(key)[self.measured(key).any(axis=1)]
        return (float(np.min(steps)), float(np.max(steps))) if steps.size else (np.nan, np.nan)

    def nonfinite(self) -> dict[str, int]:
        """How many of the measured values are NaN or Inf, for the keys that have any."""
        counts = {key: int((~np.isfinite(self.valid(key))).sum()) for key in self.values}
        return {key: count for key, count in counts.items() if count}


@dataclass(frozen=True)
class Report:
    """The measures of all monitored layers at one moment of the training.

    `report["lstm"]["variance"]` is an array `(time, batch)`; `print(report)` shows the means.

    Attributes:
        layers: A `LayerReport` for each recurrent call, by its key.
    """

    layers: dict[str, LayerReport]

    def __getitem__(self, name: str) -> LayerReport:
        if name not in self.layers:
            raise KeyError(f"No layer '{name}' in this report. Measured: {list(self.layers)}")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def scalars(self) -> dict[str, float]:
        """The means, named as in Keras' `logs`: `lstm_jac_variance`, `lstm_jac_joint_spectral_norm`."""
        prefixes = _log_names(list(self.layers))
        return {
            f"{prefixes[name]}_jac_{key.replace('/', '_')}": layer.mean(key)
            for name, layer in self.layers.items()
            for key in layer.values
        }

    def __str__(self) -> str:
        return "\n\n".join(_table(name, layer) for name, layer in self.layers.items())


def _mean(values: FloatArray) -> float:
    return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")


def _log_names(names: list[str]) -> dict[str, str]:
    """A name without `/` and `:` for each layer; layers that would share one are numbered."""
    taken: dict[str, str] = {}
    for name in names:
        base = name.replace("/", "_").replace(":", "_")
        candidate, count = base, 1
        while candidate in taken.values():
            candidate, count = f"{base}_{count}", count + 1
        taken[name] = candidate
    return taken


def _table(name: str, layer: LayerReport) -> str:
    time, batch = layer.mask.shape
    measured = int(layer.mask.sum())
    head = f"{name}: {layer.cell}, {layer.units} units, {time} steps x {batch} samples"
    if measured < layer.mask.size:
        head += f" ({layer.mask.size - measured} masked)"
    rows = [("", "mean", "least step", "greatest step", "")]
    for key in layer.values:
        low, high = layer.extremes(key)
        remarks = [f"estimate, ± {layer.standard_error(key):.2g}"] if key in layer.estimated else []
        count = layer.measured(key).sum()
        remarks += [f"at {count} of {measured}"] if count < measured else []
        rows.append((key, f"{layer.mean(key):.4g}", f"{low:.4g}", f"{high:.4g}", ", ".join(remarks)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{row[c]:>{widths[c]}}" for c in (1, 2, 3)) + f"  {row[4]}".rstrip()
        for row in rows
    ]
    return "\n".join([head, *lines, *(f"  note: {note}" for note in layer.notes)])
