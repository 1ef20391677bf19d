"""What do the Jacobians of a model look like at one moment? Plain NumPy; nothing here needs TensorFlow."""

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_jacmon.report import archive
from keras_jacmon.report.verdict import FALL, RISE, FloatArray, Verdict, judge


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
        sequences: What is measured over the whole sequence, by key: `"flow"` `(span, batch)`, the natural logarithm of
            the gain over the last 1, 2, ... steps; `"lyapunov"` `(exponent, batch)`; `"growth"`, `"horizon"` and
            `"kaplan_yorke"` `(batch,)`. The `uncertainties` have those of the flow.
        spectra: `"eigenvalues"` and `"singular_values"`, `(row, value)`, the largest first.
        spectra_at: The step and sample of each row of them, `(row, 2)`.
        joint: What stands in front of the keys of the joint view: `"joint/"`, or nothing for a cell with one state.
        facts: What the verdict's suggestions are computed from.
        go_backwards: Whether the layer reads its input from the end.
        notes: What a reader of the numbers must know, e.g. a state without influence.
        methods: By key how the values were found, in words: `"exact"`, `"Arnoldi, to 0.01"`, `"3 random vectors"`.
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
    facts: dict[str, float] = field(default_factory=dict)
    go_backwards: bool = False
    notes: tuple[str, ...] = ()
    methods: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        everything = {**self.values, **self.sequences, **self.spectra}
        if key not in everything:
            raise KeyError(f"No measure '{key}' in this report. Measured: {list(everything)}")
        return everything[key]

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

    def scalars(self) -> dict[str, float]:
        """One number for each key that has one: means over samples, of the horizon the median.

        Of the Lyapunov exponents the largest, as `lyapunov_1`.
        """
        found = {key: self.mean(key) for key in self.values}
        for key, array in self.sequences.items():
            name = key.split("/")[-1]
            if name == "horizon":
                found[key] = _median(array)
            elif name == "lyapunov":
                found[f"{key}_1"] = _mean(array[0][~np.isnan(array[0])])
            elif name != "flow":
                found[key] = _mean(array[~np.isnan(array)])
        return found

    def judge(self, fall: float = FALL, rise: float = RISE) -> Verdict | None:
        """Whether a gradient vanishes or explodes on its way through the probe, and what could be done.

        From the joint flow, over each sample's real length; the thresholds are gains.

        Args:
            fall: A gradient that has fallen to this has vanished.
            rise: A gradient that has grown to this has exploded.

        Returns:
            The verdict; None if no joint flow was measured, or it is NaN.

        Raises:
            ValueError: If not 0 < fall < 1 < rise.
        """
        key = f"{self.joint}flow"
        if key not in self.sequences:
            return None
        return judge(
            self.sequences[key].astype(np.float64),
            self.mask,
            self.facts,
            go_backwards=self.go_backwards,
            fall=fall,
            rise=rise,
        )

    def nonfinite(self) -> dict[str, int]:
        """How many of the values at single steps are NaN or Inf, for the keys that have any.

        A condition number may well be infinite: only its NaN count.
        """
        counts = {
            key: int((np.isnan if key.endswith("condition_number") else _nonfinite)(self.valid(key)).sum())
            for key in self.values
        }
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
        """A number for each key, named as in Keras' `logs`: `lstm_jac_variance`, `lstm_jac_joint_growth`."""
        prefixes = _log_names(list(self.layers))
        return {
            f"{prefixes[name]}_jac_{key.replace('/', '_')}": value
            for name, layer in self.layers.items()
            for key, value in layer.scalars().items()
        }

    @property
    def verdict(self) -> dict[str, Verdict]:
        """By layer, what becomes of a gradient; for the layers whose joint `flow` was measured."""
        return self.judge()

    def judge(self, fall: float = FALL, rise: float = RISE) -> dict[str, Verdict]:
        """The verdict with thresholds of one's own.

        Args:
            fall: A gradient that has fallen to this has vanished.
            rise: A gradient that has grown to this has exploded.

        Raises:
            ValueError: If not 0 < fall < 1 < rise.
        """
        verdicts = {name: layer.judge(fall, rise) for name, layer in self.layers.items()}
        return {name: verdict for name, verdict in verdicts.items() if verdict is not None}

    def to_dict(self) -> dict[str, Any]:
        """Everything in what JSON knows: dicts, lists, strings and numbers.

        NaN and inf become the strings `"nan"`, `"inf"` and `"-inf"`, and eigenvalues pairs of real and imaginary part.
        """
        layers = {name: _record(layer) for name, layer in self.layers.items()}
        verdict = {name: dataclasses.asdict(verdict) for name, verdict in self.verdict.items()}
        found: dict[str, Any] = archive.plain({"verdict": verdict, "scalars": self.scalars(), "layers": layers})
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report to an `.npz` file, without pickle.

        Raises:
            OSError: If the file cannot be written; one that was there stays as it was.
        """
        archive.write(path, {name: _record(layer) for name, layer in self.layers.items()})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Report":
        """Reads what `save` has written.

        Raises:
            OSError: If there is no such file.
            ValueError: If it is no report, or one of another version.
        """
        try:
            return Report({name: _layer(record) for name, record in archive.read(path).items()})
        except TypeError as error:
            raise ValueError(
                "Invalid value for argument `path`. Expected a report of this version. Received: "
                f"path={os.fspath(path)!r} ({error})"
            ) from error

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` with a row for each layer, measure, step and sample that was measured.

        Its columns are `layer`, `measure`, `step`, `sample`, `value` and `uncertainty`. What belongs to whole sequences
        and spectra is not in it.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("`to_dataframe` needs pandas: pip install 'keras-jacmon[dataframe]'") from error
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for name, layer in self.layers.items():
            for key, array in layer.values.items():
                at = layer.measured(key)
                steps, samples = np.nonzero(at)
                uncertainty = layer.uncertainties.get(key, np.full_like(array, np.nan))
                columns["layer"] += [name] * steps.size
                columns["measure"] += [key] * steps.size
                for column, part in zip(_COLUMNS[2:], (steps, samples, array[at], uncertainty[at]), strict=True):
                    columns[column] += part.tolist()
        return pandas.DataFrame(columns)

    def __str__(self) -> str:
        verdicts = [f"{name}: {verdict}" for name, verdict in self.verdict.items()]
        tables = [_table(name, layer) for name, layer in self.layers.items()]
        return "\n\n".join([*(["\n".join(verdicts)] if verdicts else []), *tables])


_COLUMNS = ("layer", "measure", "step", "sample", "value", "uncertainty")


def _record(layer: LayerReport) -> dict[str, Any]:
    return {field.name: getattr(layer, field.name) for field in dataclasses.fields(LayerReport)}


def _layer(record: Mapping[str, Any]) -> LayerReport:
    """The opposite of `_record`.

    Raises:
        TypeError: If fields are missing, unknown or of another type.
    """
    layer, empty = LayerReport(**record), LayerReport("", 0, {}, np.ones((0, 0), bool), certificate=0.0)
    for name, value in _record(layer).items():
        expected = type(getattr(empty, name))
        if not isinstance(value, expected) and not (name == "certificate" and value is None):
            raise TypeError(f"{name} is of type {type(value).__name__} and not {expected.__name__}")
    shape, step_and_sample = layer.mask.shape, 2
    _check("mask", [layer.mask], "b", lambda array: array.ndim == step_and_sample)
    _check("values", layer.values.values(), "f", lambda array: array.shape == shape)
    _check("sampled", layer.sampled.values(), "b", lambda array: array.shape == shape)
    _check("uncertainties", layer.uncertainties.values(), "f", lambda array: array.shape[-1:] == shape[-1:])
    _check("sequences", layer.sequences.values(), "f", lambda array: array.shape[-1:] == shape[-1:])
    _check("spectra", layer.spectra.values(), "fc", lambda array: array.shape[:-1] == layer.spectra_at.shape[:1])
    _check("spectra_at", [layer.spectra_at], "iu", lambda array: array.shape[1:] == (step_and_sample,))
    for name, texts in (("estimated", layer.estimated), ("notes", layer.notes), ("methods", layer.methods.values())):
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name} are not all text")
    if not layer.uncertainties.keys() >= layer.estimated & layer.values.keys():
        raise TypeError("estimated are values without an uncertainty")
    if not all(isinstance(fact, (int, float)) for fact in layer.facts.values()):
        raise TypeError("facts are not all numbers")
    return layer


def _check(name: str, arrays: Iterable[Any], kinds: str, fits: Callable[[npt.NDArray[Any]], bool]) -> None:
    """Holds arrays that were read against their types and shapes.

    Raises:
        TypeError: If one of them is none, or another one than it can be.
    """
    for array in arrays:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or not fits(array):
            found = f"dtype {array.dtype} and shape {array.shape}" if isinstance(array, np.ndarray) else repr(array)
            raise TypeError(f"{name} do not fit: {found}")


def _nonfinite(values: FloatArray) -> npt.NDArray[np.bool_]:
    return ~np.isfinite(values)


def _mean(values: FloatArray) -> float:
    # inf and -inf have no mean: NaN, and no warning of NumPy's.
    with np.errstate(invalid="ignore"):
        return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")


def _median(values: FloatArray) -> float:
    """The median without NaN; inf counts."""
    known = values[~np.isnan(values)]
    return float(np.quantile(known, 0.5, method="lower")) if known.size else float("nan")


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


def _method(layer: LayerReport, key: str) -> list[str]:
    return [method for method in [layer.methods.get(key, "exact")] if method != "exact"]


def _table(name: str, layer: LayerReport) -> str:
    time, batch = layer.mask.shape
    measured = int(layer.mask.sum())
    head = f"{name}: {layer.cell}, {layer.units} units, {time} steps x {batch} samples"
    if measured < layer.mask.size:
        head += f" ({layer.mask.size - measured} masked)"
    rows = [("", "mean", "least step", "greatest step", "")]
    for key in layer.values:
        low, high = layer.extremes(key)
        remarks = _method(layer, key)
        if key in layer.estimated:
            remarks = [f"estimate, ± {layer.standard_error(key):.2g}", *remarks]
        count = layer.measured(key).sum()
        remarks += [f"at {count} of {measured}"] if count < measured else []
        rows.append((key, f"{layer.mean(key):.4g}", f"{low:.4g}", f"{high:.4g}", ", ".join(remarks)))
    over_time = [(key, value) for key, value in layer.scalars().items() if key not in layer.values]
    if over_time:
        rows.append(("", "", "least sample", "greatest sample", ""))
    for key, value in over_time:
        array = layer.sequences[key.removesuffix("_1")]
        samples = array[0] if array.ndim > 1 else array
        known = samples[~np.isnan(samples)]
        low, high = (known.min(), known.max()) if known.size else (np.nan, np.nan)
        remarks = [*(["median"] if key.endswith("horizon") else []), *_method(layer, key.removesuffix("_1"))]
        rows.append((key, f"{value:.4g}", f"{low:.4g}", f"{high:.4g}", ", ".join(remarks)))
    if layer.spectra:
        rows.append(("", "", "least modulus", "greatest modulus", ""))
    for key, spectrum in layer.spectra.items():
        moduli = np.abs(spectrum)[~np.isnan(spectrum)]
        edges = (f"{moduli.min():.4g}", f"{moduli.max():.4g}") if moduli.size else ("nan", "nan")
        remarks = [*_method(layer, key), f"at {len(layer.spectra_at)} of {measured}"]
        rows.append((key, "", *edges, ", ".join(remarks)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{row[c]:>{widths[c]}}" for c in (1, 2, 3)) + f"  {row[4]}".rstrip()
        for row in rows
    ]
    return "\n".join([head, *lines, *(f"  note: {note}" for note in layer.notes)])
