"""The examples are scripts that assert their own claims."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from browsers import HAS_CHROMIUM, NO_CHROMIUM, REQUIRED, chromium, tensorboard, visit
from nbconvert.preprocessors import ExecutePreprocessor

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, cwd: Path, *arguments: str) -> str:
    """Runs an example as a user does, somewhere else than in the source tree, and returns what it prints."""
    finished = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "digits.py",
        "lru.py",
        "min_gru.py",
        "quickstart.py",
        "recall.py",
        "reproduce_digits.py",
        "reproduce_flossing.py",
        "reproduce_lorenz.py",
        "reproduce_mean_field.py",
        "reproduce_pascanu.py",
        "reproduce_seed.py",
        "reproduce_stack.py",
        "temporal_order.py",
    }


# `.ci/run` runs the first command of the README, too.
@pytest.mark.soak
def test_quickstart(tmp_path: Path) -> None:
    printed = run("quickstart.py", tmp_path)
    for line in ("Before training (step 0):", "After training (step 705):", "tensorboard --logdir logs"):
        assert line in printed
    assert (tmp_path / "logs" / "jacobian").is_dir()
    # Of every machine `test_browser.py` asks what the tab shows.
    if not REQUIRED:
        return
    assert HAS_CHROMIUM, NO_CHROMIUM
    with tensorboard(tmp_path / "logs") as url, chromium(tmp_path / "profile") as browser:
        seen = visit(browser, f"{url}#keras_jacmon")
        state, growth = re.findall(r"^lstm: (\w+): (\S+) nats per step", printed, flags=re.MULTILINE)[-1]
        words = seen.content.locator("button.layer .words").text_content()
        assert words.startswith(state)
        assert f"growth {float(growth):+.2g}" in words
        assert seen.complaints == []


@pytest.mark.soak
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed as Jupyter does, in a kernel of its own."""
    if importlib.util.find_spec("ipykernel") is None:
        reason = "there is no kernel for the notebook: pip install ipykernel"
        assert not REQUIRED, reason
        pytest.skip(reason)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    # Jupyter's own files do not belong into the home directory.
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    shown = [cell.outputs[-1].data for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    table, page = (data["text/html"] for data in shown)
    assert "<table>" in table
    assert "lstm" in table
    assert "<script" not in table
    assert page.startswith("<iframe srcdoc=")
    assert "loss_gradient" in page
    assert list(tmp_path.glob("*.tfevents.*")) == []


# Its numbers are also those of `test_simple_rnn_of_64_units` in `measurement/test_ground_truths.py`.
@pytest.mark.soak
def test_reproduce_seed(tmp_path: Path) -> None:
    printed = run("reproduce_seed.py", tmp_path, "--fast")
    assert [line.split()[1] for line in printed.splitlines() if "±" in line] == ["relu", "linear"]


@pytest.mark.soak
def test_reproduce_stack(tmp_path: Path) -> None:
    printed = run("reproduce_stack.py", tmp_path, "--fast")
    assert "| 1.0 | all outputs by the first input | 42634215112710 | 42634215112710 |" in printed
    assert [line.split("|")[9].strip() for line in printed.splitlines() if "| gru |" in line] == ["yes"]


@pytest.mark.soak
def test_reproduce_pascanu(tmp_path: Path) -> None:
    """Hardly trained; the known values of Ω are asserted by the script."""
    printed = run("reproduce_pascanu.py", tmp_path, "--fast")
    first = [float(line.split("|")[5]) for line in printed.splitlines() if line.startswith("| with")]
    assert first[0] == first[1] > 0


@pytest.mark.soak
def test_reproduce_lorenz(tmp_path: Path) -> None:
    """Hardly trained: the equations have their exponent, the network has some."""
    printed = run("reproduce_lorenz.py", tmp_path, "--fast")
    first = [float(line.split("|")[3]) for line in printed.splitlines() if line.startswith("| the")]
    assert abs(first[0] - 0.9056) < 0.2
    assert abs(first[1]) < 10


@pytest.mark.soak
def test_reproduce_mean_field(tmp_path: Path) -> None:
    printed = run("reproduce_mean_field.py", tmp_path, "--fast", "--figure", "mean_field.png")
    assert sum(line.startswith("| ") for line in printed.splitlines()) == 2 + 2 * 10
    assert (tmp_path / "mean_field.png").read_bytes().startswith(b"\x89PNG")


ONE_SEED = ["--seeds", "1"]


@pytest.mark.soak
@pytest.mark.parametrize("arguments", [ONE_SEED, []], ids=["one_seed", "five_seeds"])
def test_digits(arguments: list[str], tmp_path: Path) -> None:
    printed = run("digits.py", tmp_path, *arguments)
    assert [line.split()[:2] for line in printed.splitlines()[1:]] == [
        [gain, held] for gain in ("0.5", "1.5") for held in ("without", "with")
    ]


@pytest.mark.soak
@pytest.mark.parametrize("script", ["min_gru.py", "lru.py"])
def test_layers_with_a_loop_of_their_own(script: str, tmp_path: Path) -> None:
    assert "% of new " in run(script, tmp_path)


@pytest.mark.soak
def test_recall_one_seed(tmp_path: Path) -> None:
    """With one of the five seeds, whose training without the regularizer fails."""
    printed = run("recall.py", tmp_path, *ONE_SEED)
    assert "without      0 of 1 recall it" in printed
    assert "with         1 of 1 recall it" in printed


@pytest.mark.soak
def test_recall_five_seeds(tmp_path: Path) -> None:
    assert "of 5 recall it" in run("recall.py", tmp_path)


@pytest.mark.soak
def test_temporal_order(tmp_path: Path) -> None:
    printed = run("temporal_order.py", tmp_path, "--fast")
    assert "| LSTM | 20 | chrono | stable |" in printed


@pytest.mark.soak
def test_temporal_order_with_omega(tmp_path: Path) -> None:
    """At 20 steps both layers learn it in two epochs."""
    arguments = ["--layer", "SimpleRNN", "GRU", "--length", "20", "--cure", "radius+omega", "--epochs", "2", *ONE_SEED]
    printed = run("temporal_order.py", tmp_path, *arguments)
    assert re.findall(r"(\w+) \| 20 \| radius\+omega \|.* (\d) of 1", printed) == [("SimpleRNN", "1"), ("GRU", "1")]


@pytest.mark.soak
def test_temporal_order_is_rescued(tmp_path: Path) -> None:
    arguments = ["--layer", "GRU", "--length", "120", "--cure", "none", "chrono", *ONE_SEED]
    printed = run("temporal_order.py", tmp_path, *arguments)
    assert re.findall(r"(\w+) \| (\w+) \| [-+.\d |]+ (\d) of 1", printed) == [
        ("none", "vanishing", "0"),
        ("chrono", "stable", "1"),
    ]


@pytest.mark.soak
def test_reproduce_flossing(tmp_path: Path) -> None:
    assert "| copy | 1 | with | 1 of 1 | all | yes |" in run("reproduce_flossing.py", tmp_path, "--fast")


@pytest.mark.soak
def test_reproduce_digits(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    printed = run("reproduce_digits.py", tmp_path, "--fast", "--figure", str(picture))
    lines = printed.splitlines()
    assert [line.split(" | ")[2:4] for line in lines[2:5]] == [["plain", "-"], ["to 1", "1 of 1"], ["to 0.5", "1 of 1"]]
    assert lines[-1].startswith("| relu | 2 | to 1 is better than plain | ")
    assert picture.stat().st_size > 1000
