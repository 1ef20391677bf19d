"""Choice of the numbers that go into the logs of Keras."""

from collections.abc import Collection, Iterable, Mapping

from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.reductions import REDUCTIONS

# More layers than these would fill the progress line.
_FEW = 3
_OF_FEW = ("variance", "spectral_norm", "joint/growth")

# The first of them that was measured.
_OF_MANY = ("joint/growth", "variance", "spectral_norm")


def key_of(name: str, layer: LayerReport) -> str | None:
    """Returns the key in `LayerReport.scalars` that a name of a measure stands for; None if it was not measured.

    Args:
        name: String, the key of a measure. It also stands for the measure of this name in the joint view if there is
            none in the hidden view, and for a cell with one state `joint/` may be left out or not.
        layer: `LayerReport`.
    """
    keys = {key: key for key in layer.values}
    keys |= {key: key + REDUCTIONS[reduction].suffix for key, reduction in layer.reductions.items()}
    candidates = (name, f"{layer.joint}{name.removeprefix('joint/')}")
    return next((keys[candidate] for candidate in candidates if candidate in keys), None)


def names_in_logs(logs: str | Collection[str] | None, layers: Mapping[str, LayerReport]) -> Iterable[str] | None:
    """Returns the names of the measures that go into the logs; None for all.

    Args:
        logs: `"auto"` for `default_names`, `"all"`, names of measures, or None for none.
        layers: Mapping from keys of layers to their reports.
    """
    if logs is None:
        return ()
    if isinstance(logs, str):
        return None if logs == "all" else default_names(layers)
    return logs


def default_names(layers: Mapping[str, LayerReport]) -> Iterable[str]:
    """Returns the measures that a progress line has room for.

    Up to three layers these are the variance, the spectral norm and the growth, and beyond that the growth. If none of
    them was measured, all that was measured is returned.

    Args:
        layers: Mapping from keys of layers to their reports.
    """
    wanted = _OF_FEW if len(layers) <= _FEW else _OF_MANY
    measured = [name for name in wanted if _is_measured(name, layers.values())]
    everything = dict.fromkeys(key for layer in layers.values() for key in (*layer.values, *layer.reductions))
    return (measured if wanted is _OF_FEW else measured[:1]) or everything


def _is_measured(name: str, layers: Collection[LayerReport]) -> bool:
    return any(key_of(name, layer) is not None for layer in layers)
