"""Commands on what is measured already: `view` event files, `compare` two reports."""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keras_jacmon.dashboard.one_file import write_page
from keras_jacmon.errors import message_of
from keras_jacmon.report.layer_report import LayerReport
from keras_jacmon.report.report import Report
from keras_jacmon.standard_output import write_line

if TYPE_CHECKING:
    from keras_jacmon.dashboard.stack import Moment

# A horizon that shrinks by more than a tenth is worse; less is within the noise of another probe.
_SHRINKS = 0.9


def run(words: Sequence[str]) -> int:
    """Runs a command.

    Args:
        words: The name of the command and its arguments.

    Returns:
        0; 1 if a verdict got worse; 2 if something given is wrong, with a sentence on standard error.
    """
    parser = _parser()
    options = parser.parse_args(words)
    parser.prog = f"{parser.prog} {options.command}"
    try:
        if options.command == "view":
            view(options.logs, options.output)
            lines, is_worse = [options.output], False
        else:
            lines, is_worse = compare(Report.load(options.before), Report.load(options.after))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {message_of(error)}\n")
    write_line("\n".join(lines), parser)
    return int(is_worse)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m keras_jacmon")
    commands = parser.add_subparsers(dest="command", required=True)
    view_parser = commands.add_parser("view", help="write the page of the Jacobian tab from event files")
    view_parser.add_argument("logs", help="a directory with event files of `JacobianMonitor`")
    view_parser.add_argument("--output", default="jacobians.html", metavar="PATH", help="the file that is written")
    compare_parser = commands.add_parser("compare", help="print two reports side by side; exit code 1 if it got worse")
    compare_parser.add_argument("before", help="a file that `Report.save` has written (.npz)")
    compare_parser.add_argument("after", help="the file of the later report")
    return parser


def view(logs: str, output: str) -> None:
    """Writes the page of the Jacobian tab from event files.

    Args:
        logs: String, a directory with event files.
        output: String, the path of the page; a file that is there is replaced.

    Raises:
        ValueError: If there are no summaries of this package.
        OSError: If there is no such directory, or the page cannot be written.
    """
    # A second, which `compare` shall not wait for.
    from keras_jacmon.dashboard.series import read_directory  # noqa: PLC0415 - `--help` shall not wait for it

    if not Path(logs).is_dir():
        raise FileNotFoundError(f"there is no directory {logs}")
    runs: dict[str, dict[str, list[Moment]]] = read_directory(logs)
    if not runs:
        raise ValueError(f"there are no event files of JacobianMonitor in {logs}")
    write_page(output, runs)


def compare(before: Report, after: Report) -> tuple[list[str], bool]:
    """Compares two reports.

    Args:
        before: `Report`.
        after: `Report`, the later one.

    Returns:
        The lines to print, and True if the verdict of a layer got worse.
    """
    worse = [name for name in before if name in after and _is_worse(before[name], after[name])]
    lines = []
    for name in {**before.layers, **after.layers}:
        lines.append(f"{name}:" + (" WORSE" if name in worse else ""))
        for title, report in (("before", before), ("after", after)):
            words = report[name].verdict_in_a_line() if name in report else "not there"
            lines.append(f"  {title:<6}  {words}")
        lines += _numbers(before, after, name)
    return lines, bool(worse)


def _is_worse(layer: LayerReport, later: LayerReport) -> bool:
    before, after = layer.judge(), later.judge()
    if before is None or after is None:
        # A flow that is NaN has no verdict.
        return before is not None and f"{later.joint}flow" in later.sequences and bool(later.mask.any())
    if after.state == "stable":
        return False
    return before.state == "stable" or after.horizon < _SHRINKS * before.horizon


def _numbers(before: Report, after: Report, name: str) -> Iterator[str]:
    """Yields a line for each key: both means, and the second over the first."""
    one, other = (report[name].scalars() if name in report else {} for report in (before, after))
    keys = {**one, **other}
    width = max(map(len, keys), default=0)
    for key in keys:
        old, new = one.get(key, math.nan), other.get(key, math.nan)
        ratio = f"  x {new / old:.3g}" if old > 0 and math.isfinite(new / old) else ""
        yield f"  {key:<{width}}  {old:>10.4g}  {new:>10.4g}{ratio}"
