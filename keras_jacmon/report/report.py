"""Report of all monitored layers at one moment of a training, in plain NumPy."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keras_jacmon.dashboard.one_file import write_page
from keras_jacmon.errors import did_you_mean, invalid_argument
from keras_jacmon.report import archive
from keras_jacmon.report.chosen import key_of
from keras_jacmon.report.curve import FALL, RISE
from keras_jacmon.report.frame import to_dataframe
from keras_jacmon.report.html import as_html
from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.packing import moments_of
from keras_jacmon.report.plots import plot
from keras_jacmon.report.records import from_record, to_record
from keras_jacmon.report.table import table
from keras_jacmon.report.verdict import Verdicts

# The number of layers that a short description names.
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Report(Mapping[str, LayerReport]):
    """The measures of all monitored layers at one moment of the training, a mapping from layers to their reports.

    `report["lstm"]["variance"]` is an array `(time, batch)`; `print(report)` shows the verdicts and the means.

    Attributes:
        layers: Dict of `LayerReport`, one for each recurrent call, by the call's key.

    Example:

    ```python
    import keras, numpy as np, keras_jacmon

    model = keras.Sequential([keras.Input((20, 3)), keras.layers.LSTM(8, name="lstm")])
    report = keras_jacmon.measure(model, np.ones((4, 20, 3), "float32"))
    print(report)
    print(report.verdict["lstm"].state)     # "vanishing", "stable" or "exploding"
    report.save("report.npz")
    again = keras_jacmon.Report.load("report.npz")
    ```
    """

    layers: dict[str, LayerReport]

    def __getitem__(self, name: str) -> LayerReport:
        if name not in self.layers:
            raise KeyError(
                f"No layer '{name}' in this report. Measured: {list(self.layers)}{did_you_mean(name, self.layers)}"
            )
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        layers = [f"{name} ({layer.cell})" for name, layer in self.layers.items()]
        more = [f"{len(layers) - _SHOWN} more"] if len(layers) > _SHOWN else []
        return f"<Report: {', '.join([*layers[:_SHOWN], *more]) or 'no layers'}>"

    def scalars(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Returns one number for each key, named as in Keras' `logs`.

        Args:
            names: Iterable of strings, the names of the measures. `"growth"` also stands for `"joint/growth"` of a cell
                that has no growth of the hidden view. Defaults to None, for all.

        Returns:
            Dict of floats, such as `lstm_jac_variance` and `lstm_jac_joint_growth`; see `LayerReport.scalars`.
        """
        prefixes = _log_names(list(self.layers))
        wanted = None if names is None else list(names)
        return {
            f"{prefixes[name]}_jac_{key.replace('/', '_')}": value
            for name, layer in self.layers.items()
            for key, value in layer.scalars().items()
            if wanted is None or key in {key_of(one, layer) for one in wanted}
        }

    @property
    def verdict(self) -> Verdicts:
        """Dict of `Verdict`, for the layers whose joint `flow` was measured; a `KeyError` says why one is missing."""
        return self.judge()

    def judge(self, fall: float = FALL, rise: float = RISE) -> Verdicts:
        """Judges the layers whose joint `flow` was measured, with thresholds of one's own.

        Args:
            fall: Float in (0, 1), the gain at which a gradient has vanished. Defaults to 0.01.
            rise: Float above 1, the gain at which a gradient has exploded. Defaults to 100.

        Returns:
            Dict of `Verdict`, by layer. Asking it for a layer without one raises a `KeyError` that says why.

        Raises:
            ValueError: If not 0 < fall < 1 < rise.
        """
        verdicts = {name: layer.judge(fall, rise) for name, layer in self.layers.items()}
        return Verdicts(
            {name: verdict for name, verdict in verdicts.items() if verdict is not None},
            {name: self.layers[name].why_no_verdict() for name, verdict in verdicts.items() if verdict is None},
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole report in types that JSON has: dicts, lists, strings and numbers.

        NaN and inf become the strings `"nan"`, `"inf"` and `"-inf"`, and eigenvalues pairs of real and imaginary part.

        Returns:
            Dict with the entries `verdict`, `scalars` and `layers`.
        """
        layers = {name: to_record(layer) for name, layer in self.layers.items()}
        verdict = {name: dataclasses.asdict(verdict) for name, verdict in self.verdict.items()}
        found: dict[str, Any] = archive.plain({"verdict": verdict, "scalars": self.scalars(), "layers": layers})
        return found

    def save(self, path: str | os.PathLike[str]) -> str:
        """Writes the report to an `.npz` file, without pickle; its arrays have names such as `lstm/values/variance`.

        Args:
            path: String or path of the file. The ending `.npz` is added if it is missing and there is no file of this
                name. A file that is there is replaced and keeps its mode; links, devices and pipes are written through.

        Returns:
            String, the path of the file.

        Raises:
            OSError: If the file cannot be written; one that was there stays as it was.
        """
        return archive.write(path, {name: to_record(layer) for name, layer in self.layers.items()})

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the page of the Jacobian tab with this report as one file, which opens without a network.

        Args:
            path: String or path of the file; one that is there is replaced.

        Raises:
            OSError: If the file cannot be written.
        """
        write_page(path, {"report": moments_of([(0, self.layers)])})

    def _repr_html_(self) -> str:
        return as_html(self.layers)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Report":
        """Reads a report that `save` has written.

        Args:
            path: String or path of the file, as `save` was given it.

        Returns:
            `Report`.

        Raises:
            OSError: If there is no such file.
            ValueError: If it is no report, or one of another version.
        """
        try:
            return Report({name: from_record(record) for name, record in archive.read(path).items()})
        except TypeError as error:
            raise invalid_argument("path", "a report of this version", f"path={os.fspath(path)!r} ({error})") from error

    def to_dataframe(self) -> Any:
        """Returns every number of the report as a `pandas.DataFrame` in the long form, one number in each line.

        The columns are

        - `layer`, `measure`: the keys in the report,
        - `step`, `sample`: the position in the input and the sample; a measure of whole sequences has no step,
        - `index`: of a flow the span, of exponents and spectra the number of the value, all from 1 on; none for
          measures with one value,
        - `value`, `imaginary`: the value, and the imaginary part of an eigenvalue, 0 for all else,
        - `uncertainty`: as in `LayerReport.uncertainties`; NaN without one.

        Raises:
            ImportError: If pandas is not installed.
        """
        return to_dataframe([(None, self.layers)])

    def plot(self, kind: str = "curve", *, layer: str | None = None, measure: str | None = None, ax: Any = None) -> Any:
        """Draws a measure of a layer, in a size that fits a column of a paper.

        Example:

        ```python
        report.plot("flow", layer="lstm").savefig("flow.pdf")
        ```

        Args:
            kind: String. `"curve"`: the mean over samples by position in the input, in a band of 80 % of the samples.
                `"heatmap"`: the values by sample and position. `"flow"`: the gain of a gradient by the number of steps
                that it goes back, with the horizon. `"spectrum"`: eigenvalues with the unit circle, or singular values.
                Defaults to `"curve"`.
            layer: String, the key of a layer. Defaults to None, the first layer.
            measure: String, the key of a measure. Defaults to None: the variance of the joint view, or the first
                measure of the kind.
            ax: `matplotlib.axes.Axes` to draw into. Defaults to None, a new figure.

        Returns:
            `matplotlib.figure.Figure`.

        Raises:
            ImportError: If Matplotlib is not installed.
            ValueError: If the kind, the layer or the measure is unknown, or was not measured.
        """
        return plot([(None, self.layers)], kind=kind, layer=layer, measure=measure, ax=ax)

    def __str__(self) -> str:
        found = self.verdict
        verdicts = [
            f"{name}: {found[name]}" if name in found else f"{name}: no verdict: {found.reasons[name]}"
            for name in self.layers
        ]
        tables = [table(name, layer) for name, layer in self.layers.items()]
        return "\n\n".join([*(["\n".join(verdicts)] if verdicts else []), *tables])


def _log_names(names: list[str]) -> dict[str, str]:
    """Returns a name without `/` and `:` for each layer; layers that would share one are numbered."""
    taken: dict[str, str] = {}
    for name in names:
        base = name.replace("/", "_").replace(":", "_")
        candidate, count = base, 1
        while candidate in taken.values():
            candidate, count = f"{base}_{count}", count + 1
        taken[name] = candidate
    return taken
