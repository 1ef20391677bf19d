"""`python -m keras_jacmon model.keras probe.npy`: the report of a saved model."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from keras_jacmon.options import Options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures a saved model and prints its report.

    Args:
        arguments: Arguments of the command line. Defaults to None, those of `sys.argv`.

    Returns:
        0; 2 if something given is wrong, with a sentence on standard error.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    # What TensorFlow says of itself is no part of a report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        report = _measured(options)
        if options.save:
            report.save(options.save)
    except (ValueError, OSError, TypeError, ImportError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    sys.stdout.write(json.dumps(report.to_dict()) if options.json else str(report))
    sys.stdout.write("\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keras_jacmon", description="Prints how a saved Keras model carries its states and gradients."
    )
    parser.add_argument("model", help="a file that `model.save()` has written (.keras)")
    parser.add_argument("probe", help="a batch of its inputs: .npy, or .npz with an array for each input, by name")
    for option in dataclasses.fields(Options):
        _add_option(parser, option)
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="names of recurrent layers; all if not given")
    parser.add_argument("--save", metavar="PATH", help="write the report there, for `Report.load`")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _add_option(parser: argparse.ArgumentParser, option: "dataclasses.Field[Any]") -> None:
    """Adds the argument of an option; one that is not given is left out, so that its default holds."""
    given: dict[str, Any] = {"metavar": "NUMBER"}
    if option.name == "measures":
        given = {"nargs": "+", "metavar": "NAME"}
    elif option.type is bool:
        given = {"action": "store_true"}
    elif type(None) in get_args(option.type):
        given |= {"type": _number_or_none}
    else:
        given |= {"type": option.type}
    flag, text = f"--{option.name.replace('_', '-')}", option.metadata["help"]
    parser.add_argument(flag, dest=option.name, default=argparse.SUPPRESS, help=text, **given)


def _number_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def _measured(options: argparse.Namespace) -> Any:
    for path in (options.model, options.probe):
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
    import keras  # noqa: PLC0415 - `--help` shall not wait for it
    import numpy as np  # noqa: PLC0415

    from keras_jacmon.meter import measure  # noqa: PLC0415

    # Never code out of a file: no pickle in the probe, no lambdas in the model.
    try:
        with Path(options.probe).open("rb") as file:
            probe = np.load(file, allow_pickle=False)
            if isinstance(probe, np.lib.npyio.NpzFile):
                probe = {name: probe[name] for name in probe.files}
    except Exception as error:
        # A damaged file fails in many ways.
        raise ValueError(f"{options.probe} is no array that can be read: {error}") from error
    try:
        model = keras.saving.load_model(options.model, compile=False, safe_mode=True)
    except Exception as error:
        raise ValueError(f"{options.model} is no model that can be read: {type(error).__name__}: {error}") from error
    chosen = {field.name for field in dataclasses.fields(Options)} & vars(options).keys()
    return measure(model, probe, layers=options.layers, **{name: vars(options)[name] for name in chosen})


if __name__ == "__main__":
    sys.exit(main())
