"""Report of all monitored layers at one moment of a training, in plain NumPy."""

import dataclasses
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_jacmon.errors import invalid_argument
from keras_jacmon.report import archive
from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.records import from_record, to_record
from keras_jacmon.report.table import table
from keras_jacmon.report.verdict import FALL, RISE, Verdict

_COLUMNS = ("layer", "measure", "step", "sample", "value", "uncertainty")


@dataclass(frozen=True)
class Report:
    """The measures of all monitored layers at one moment of the training.

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
            raise KeyError(f"No layer '{name}' in this report. Measured: {list(self.layers)}")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def scalars(self) -> dict[str, float]:
        """Returns one number for each key, named as in Keras' `logs`.

        Returns:
            Dict of floats, such as `lstm_jac_variance` and `lstm_jac_joint_growth`; see `LayerReport.scalars`.
        """
        prefixes = _log_names(list(self.layers))
        return {
            f"{prefixes[name]}_jac_{key.replace('/', '_')}": value
            for name, layer in self.layers.items()
            for key, value in layer.scalars().items()
        }

    @property
    def verdict(self) -> dict[str, Verdict]:
        """Dict of `Verdict`, for the layers whose joint `flow` was measured."""
        return self.judge()

    def judge(self, fall: float = FALL, rise: float = RISE) -> dict[str, Verdict]:
        """Judges the layers whose joint `flow` was measured, with thresholds of one's own.

        Args:
            fall: Float in (0, 1), the gain at which a gradient has vanished. Defaults to 0.01.
            rise: Float above 1, the gain at which a gradient has exploded. Defaults to 100.

        Returns:
            Dict of `Verdict`, by layer.

        Raises:
            ValueError: If not 0 < fall < 1 < rise.
        """
        verdicts = {name: layer.judge(fall, rise) for name, layer in self.layers.items()}
        return {name: verdict for name, verdict in verdicts.items() if verdict is not None}

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report to an `.npz` file, without pickle.

        Args:
            path: String or path of the file; one that is there is replaced.

        Raises:
            OSError: If the file cannot be written; one that was there stays as it was.
        """
        archive.write(path, {name: to_record(layer) for name, layer in self.layers.items()})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Report":
        """Reads a report that `save` has written.

        Args:
            path: String or path of the file.

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
        """Returns the values of single steps as a `pandas.DataFrame`.

        It has one line for each layer, measure, step and sample that was measured, without the measures of whole
        sequences and without spectra.

        Returns:
            `pandas.DataFrame` with the columns `layer`, `measure`, `step`, `sample`, `value` and `uncertainty`.

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
