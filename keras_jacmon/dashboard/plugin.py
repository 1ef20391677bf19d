"""Plugin of TensorBoard: the routes of the Jacobian tab, documented in `http_api.md`."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from keras_jacmon.dashboard.answers import experiments, heat_map, layer_line, measurement, worst_first
from keras_jacmon.dashboard.files import NO_PLOTLY, STATIC, STATIC_DIRECTORY, plotly_file
from keras_jacmon.dashboard.metadata import PLUGIN
from keras_jacmon.dashboard.series import Series

# Measurements of a layer that the server keeps, a sample of a longer training.
_SAMPLES = 1000

_COLUMNS = 1000


class Loader(base_plugin.TBLoader):
    """Entry point of TensorBoard for the Jacobian tab."""

    def fix_flags(self, flags: Any) -> None:
        """Keeps more measurements of our summaries than TensorBoard does of a plugin that it does not know.

        Args:
            flags: Namespace of the command line.
        """
        flags.samples_per_plugin = {PLUGIN: _SAMPLES, **(flags.samples_per_plugin or {})}

    def load(self, context: base_plugin.TBContext) -> "JacobianPlugin | None":
        """Makes the plugin; None where TensorBoard has no data provider."""
        return JacobianPlugin(context) if context.data_provider is not None else None


class JacobianPlugin(base_plugin.TBPlugin):
    """The Jacobian tab: a page, and the data that it asks for.

    Args:
        context: `TBContext` with a data provider.
    """

    plugin_name = PLUGIN

    def __init__(self, context: base_plugin.TBContext) -> None:
        super().__init__(context)
        self._series = Series(context.data_provider)

    def get_plugin_apps(self) -> dict[str, Any]:
        """Returns the routes."""
        routes: dict[str, Any] = {f"/{name}": functools.partial(_serve_static, name) for name in STATIC}
        return {
            **routes,
            "/plotly.min.js": _serve_plotly,
            "/runs": self._route(lambda ctx, experiment, _: self.runs_impl(ctx, experiment)),
            "/layers": self._route(
                lambda ctx, experiment, query: self.layers_impl(ctx, experiment, query.get("run", ""))
            ),
            "/heatmap": self._route(
                lambda ctx, experiment, query: self.heatmap_impl(
                    ctx,
                    experiment,
                    query.get("run", ""),
                    layer=query.get("layer", ""),
                    key=query.get("key", ""),
                    columns=_whole(query, "columns", _COLUMNS),
                )
            ),
            "/measurement": self._route(
                lambda ctx, experiment, query: self.measurement_impl(
                    ctx,
                    experiment,
                    query.get("run", ""),
                    layer=query.get("layer", ""),
                    key=query.get("key", ""),
                    step=_whole(query, "step", 0),
                )
            ),
        }

    def is_active(self) -> bool:
        """Returns False: TensorBoard finds out by itself whether there are data of this plugin."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Returns the module and the name of the tab."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Jacobian")

    def runs_impl(self, ctx: Any, experiment: str) -> dict[str, Any]:
        """Returns the runs by experiment, and a sentence about what has to be installed for the curves, if anything."""
        missing = NO_PLOTLY if plotly_file() is None else None
        runs = self._series.runs(ctx, experiment)
        return {"experiments": experiments(runs, self._series.known(ctx, experiment)), "missing": missing}

    def layers_impl(self, ctx: Any, experiment: str, run: str) -> dict[str, Any]:
        """Returns the lines of the layers of a run, the worst verdict first."""
        lines = []
        for headers in self._series.headers(ctx, experiment, run).values():
            line = layer_line(headers)
            keys = {key: None for _, header in headers for key, *_ in header["curves"]}
            lines.append(line | {"keys": list(keys)})
        return {"run": run, "layers": worst_first(lines)}

    def heatmap_impl(
        self, ctx: Any, experiment: str, run: str, *, layer: str, key: str, columns: int
    ) -> dict[str, Any]:
        """Returns the heat map of a measure of a layer."""
        stack = self._series.layer(ctx, experiment, run, layer).stack(key)
        return {"run": run, "layer": layer, **heat_map(stack, key, max(1, columns))}

    def measurement_impl(
        self, ctx: Any, experiment: str, run: str, *, layer: str, key: str, step: int
    ) -> dict[str, Any]:
        """Returns the curves of a layer at the measurement that is nearest to a step."""
        near = self._series.layer(ctx, experiment, run, layer).near(step)
        return {"run": run, "layer": layer, **measurement(near, step, key)}

    def _route(self, answer: Callable[[Any, str, Any], dict[str, Any]]) -> Any:
        """Returns the WSGI application of an answer in JSON."""

        @wrappers.Request.application
        def route(request: wrappers.Request) -> wrappers.Response:
            if request.method not in ("GET", "HEAD"):
                return _refused(request, "only GET is known here", 405)
            try:
                content = answer(
                    plugin_util.context(request.environ), plugin_util.experiment_id(request.environ), request.args
                )
            except KeyError:
                return _refused(request, "there are no data of this run and layer", 404)
            except ValueError as error:
                return _refused(request, str(error), 400)
            return http_util.Respond(request, json.dumps(content), "application/json")

        return route


def _whole(query: Any, name: str, default: int) -> int:
    """Returns a whole number of a query.

    Raises:
        ValueError: If it is none, or has more than 64 bits.
    """
    text = query.get(name)
    if text is None:
        return default
    if re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) is None:
        raise ValueError(f"`{name}` should be a whole number of at most 18 digits, and is {text!r}")
    return int(text)


def _refused(request: wrappers.Request, sentence: str, code: int) -> wrappers.Response:
    return http_util.Respond(request, json.dumps({"error": sentence}), "application/json", code=code)


@wrappers.Request.application
def _serve_plotly(request: wrappers.Request) -> wrappers.Response:
    path = plotly_file()
    if path is None:
        return http_util.Respond(request, NO_PLOTLY, "text/plain", code=404)
    return http_util.Respond(request, path.read_bytes(), "text/javascript", expires=86400)


def _serve_static(name: str, environ: Any, start_response: Any) -> Any:
    request = wrappers.Request(environ)
    content = (STATIC_DIRECTORY / name).read_bytes()
    return http_util.Respond(request, content, STATIC[name])(environ, start_response)
