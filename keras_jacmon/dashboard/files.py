"""Files of the page: a fixed list, and plotly.js out of the Python package `plotly`."""

import importlib.util
from pathlib import Path

# Types by hand: the registry of Windows calls JavaScript plain text.
STATIC = {
    "index.js": "text/javascript",
    "page.js": "text/javascript",
    "state.js": "text/javascript",
    "source.js": "text/javascript",
    "strip.js": "text/javascript",
    "heatmap.js": "text/javascript",
    "colours.js": "text/javascript",
    "charts.js": "text/javascript",
    "page.css": "text/css",
}

STATIC_DIRECTORY = Path(__file__).parent / "static"

NO_PLOTLY = "The curves need plotly: pip install 'keras-jacmon[dashboard]'"


def plotly_file() -> Path | None:
    """Returns the file of plotly.js in the Python package `plotly`; None if it is not installed."""
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "package_data" / "plotly.min.js"
    return path if path.is_file() else None
