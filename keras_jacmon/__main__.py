"""`python -m keras_jacmon model.keras probe.npy`: the report of a saved model."""

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from keras_jacmon import __version__, commands
from keras_jacmon.errors import message_of
from keras_jacmon.options import Options
from keras_jacmon.standard_output import write_line

# The endings of files with a model or a probe.
_ENDINGS = (".keras", ".npy", ".npz")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures a saved model and prints its report.

    Args:
        arguments: Arguments of the command line. Defaults to None, those of `sys.argv`.

    Returns:
        0; 1 if a verdict got worse, or standard output was closed before all was written; 2 if something given is
        wrong, or nothing can be written, with a sentence on standard error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["view"], ["compare"]):
        return commands.run(words)
    parser = _parser()
    options = _parsed(parser, words)
    # What TensorFlow says of itself is no part of a report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        report = _measured(options)
        if options.save is not None:
            saved = report.save(options.save)
            if saved != options.save:
                sys.stderr.write(f"{parser.prog}: the report is in {saved}\n")
    except (ValueError, OSError, TypeError, ImportError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {message_of(error)}\n")
    text = json.dumps(report.to_dict()) if options.json else str(report)
    return 0 if write_line(text, parser) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keras_jacmon",
        usage="%(prog)s model probe [options]",
        description="Prints how a saved Keras model carries its states and gradients.",
        epilog="`%(prog)s view logs` writes a page of event files, and `%(prog)s compare A.npz B.npz` compares two "
        "reports; each has a --help of its own.",
    )
    parser.add_argument("model", nargs="?", help="a file that `model.save()` has written (.keras)")
    parser.add_argument(
        "probe",
        nargs="?",
        help="a batch of its inputs: .npy, or .npz with an array for each input, by name; the name of a single array "
        "does not matter",
    )
    for option in dataclasses.fields(Options):
        _add_option(parser, option)
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="names of recurrent layers; all if not given")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first, which registers the classes of the model's own cells; may be given again",
    )
    parser.add_argument("--save", metavar="PATH", help="write the report there (.npz), for `Report.load`")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--version", action="version", version=f"keras_jacmon {__version__}")
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
    try:
        return None if text == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or none, received {text!r}") from None


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parses the command line; a path behind a list of names is a path."""
    options = parser.parse_intermixed_args(words)
    paths = [path for path in (options.model, options.probe) if path is not None]
    for names in (vars(options).get("measures"), options.layers):
        while names and len(paths) < len(("model", "probe")) and _is_path(names[-1]):
            paths.append(names.pop())
    if len(paths) < len(("model", "probe")):
        parser.error(f"expected a model and a probe, received: {' and '.join(paths) or 'neither'}")
    # A path behind `--layers=` is no word of its own, and not before the others.
    options.model, options.probe = sorted(paths, key=lambda path: words.index(path) if path in words else len(words))
    return options


def _is_path(word: str) -> bool:
    # `os.path` says no where a name is too long for a file.
    return word.endswith(_ENDINGS) or os.path.isfile(word)  # noqa: PTH113


def _measured(options: argparse.Namespace) -> Any:
    for path in (options.model, options.probe):
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
    from keras_jacmon import measure  # noqa: PLC0415 - `--help` shall not wait for it

    for name in options.modules:
        _import(name)
    model = _loaded(options.model)
    chosen = {field.name for field in dataclasses.fields(Options)} & vars(options).keys()
    given = {name: vars(options)[name] for name in chosen}
    return measure(model, _probe(options.probe, model), layers=options.layers, **given)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        # It may be anybody's code.
        raise ImportError(f"the module {name} cannot be imported: {message_of(error)}") from error


def _loaded(path: str) -> Any:
    import keras  # noqa: PLC0415 - `--help` shall not wait for it

    try:
        # Never code out of a file: no lambdas in the model.
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ValueError(f"{path} is no model that can be read: {message_of(error)}") from error


def _probe(path: str, model: Any) -> Any:
    try:
        found = _arrays_in(path)
    except Exception as error:
        # A damaged file fails in many ways.
        raise ValueError(f"{path} is no array that can be read: {message_of(error)}") from error
    inputs = {spec.name for spec in getattr(model, "inputs", None) or ()}
    is_alone = isinstance(found, dict) and len(found) == 1 and found.keys().isdisjoint(inputs)
    return next(iter(found.values())) if is_alone else found


def _arrays_in(path: str) -> Any:
    """Returns the array of a file, or its arrays by name."""
    import numpy as np  # noqa: PLC0415 - `--help` shall not wait for it

    # Never code out of a file: no pickle in the probe.
    with Path(path).open("rb") as file:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            return found
        arrays = {name: found[name] for name in found.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"its member {name} is none")
    return arrays


if __name__ == "__main__":
    sys.exit(main())
