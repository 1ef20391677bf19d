// The curves, by plotly.js.
import { RUN_COLOURS } from "./colours.js";

export function formatNumber(value) {
  const number = Number(value);
  if (!Number.isFinite(number)) return Number.isNaN(number) ? "NaN" : number > 0 ? "Inf" : "-Inf";
  if (number !== 0 && (Math.abs(number) < 1e-3 || Math.abs(number) >= 1e5)) return number.toExponential(2);
  return String(Number(number.toPrecision(4)));
}

function layout(x, y, more = {}) {
  const style = getComputedStyle(document.body);
  const line = style.getPropertyValue("--line").trim();
  const axis = (title) => ({ title: { text: title }, gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true });
  return {
    font: { color: style.color, family: "system-ui, sans-serif", size: 12 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 12, t: 10, b: 40 },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: style.backgroundColor, font: { color: style.color } },
    ...more,
    // Words over a curve stay readable.
    annotations: (more.annotations ?? []).map((one) => ({ bgcolor: style.backgroundColor.replace(/^rgb\((.*)\)$/, "rgba($1, 0.75)"), ...one })),
    xaxis: { ...axis(x), ...more.xaxis },
    // More would be a crowd on a logarithmic axis.
    yaxis: { ...axis(y), tickformat: "~g", nticks: 5, ...more.yaxis },
  };
}

// On a logarithmic axis a shape stands at its value, a text at its logarithm.
const level = (y, text, logarithmic) => ({
  shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, layer: "below", line: { dash: "dash", width: 1.5, color: "#888888" } }],
  annotations: [{ xref: "paper", x: 1, xanchor: "right", y: logarithmic ? Math.log10(y) : y, yanchor: "bottom", text, showarrow: false, font: { size: 11 } }],
});

// Names stand in charts as text: plotly reads a few tags.
const asText = (name) => String(name).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

const spread = (colour) => `${colour}33`;

function lines(curve, colour, name, dash, offset = 0) {
  const x = curve.from.map((from, at) => (from + curve.to[at]) / 2 + offset);
  const numbers = (values) => values.map(Number).map((value) => (Number.isFinite(value) ? value : null));
  const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", connectgaps: false };
  const all = [
    { ...edge, y: numbers(curve.low) },
    { ...edge, y: numbers(curve.high), fill: "tonexty", fillcolor: spread(colour) },
    { x, y: numbers(curve.mean), mode: curve.mean.length < 80 ? "lines+markers" : "lines", name: asText(name),
      line: { color: colour, width: 2, dash }, marker: { size: 4, color: colour },
      customdata: curve.low.map((low, at) => [formatNumber(low), formatNumber(curve.high[at])]),
      hovertemplate: "%{y:.4g} (%{customdata[0]} to %{customdata[1]})" },
  ];
  if (curve.least) {
    for (const part of ["least", "greatest"]) {
      all.push({ x, y: numbers(curve[part]), mode: "lines", name: part, line: { color: colour, width: 1, dash: "dot" },
        hovertemplate: `${part} %{y:.4g}` });
    }
  }
  return all;
}

function draw(Plotly, element, traces, options) {
  if (traces.length) return Plotly.react(element, traces, options, { displayModeBar: false, responsive: true });
  return Plotly.purge(element);
}

const DASHES = ["solid", "dash"];

export function showCharts(Plotly, places, answers, logarithmic) {
  const each = (part, offset) => answers.flatMap((answer, at) =>
    answer[part] ? lines(answer[part], RUN_COLOURS[at], answer.run, DASHES[at], offset) : []);
  const first = answers[0];
  const kind = logarithmic ? { type: "log" } : {};
  const found = typeof first.reference === "number"
    ? level(first.reference, `keeps a gradient: ${first.reference}`, logarithmic) : { shapes: [], annotations: [] };
  // Each place has its size before anything is drawn in it.
  const has = (part) => answers.some((answer) => answer[part]);
  const spectra = answers.flatMap((answer) => Object.keys(answer.spectra));
  places.curve.parentElement.hidden = !has("curve");
  places.flow.parentElement.hidden = !has("flow");
  places.loss.parentElement.hidden = !has("loss_gradient");
  places.eigenvalues.parentElement.hidden = !spectra.some((key) => key.endsWith("eigenvalues"));
  places.singular.parentElement.hidden = !spectra.some((key) => key.endsWith("singular_values"));
  const length = Math.max(...answers.map((answer) => answer.curve?.length ?? 0));
  const position = { range: [-0.5, length - 0.5] };
  const goals = targets(answers, length, logarithmic);
  found.annotations.push(...goals.annotations);
  draw(Plotly, places.curve, [...each("curve"), ...goals.traces],
    layout("position", first.unit || first.key, { ...found, xaxis: position, yaxis: kind }));
  draw(Plotly, places.flow, flow(answers), layout("steps back, k", "‖ds<sub>T</sub> / ds<sub>T−k</sub>‖", {
    ...flowLevels(answers), yaxis: { type: "log" } }));
  draw(Plotly, places.loss, each("loss_gradient"), layout("position", "‖dLoss / dh<sub>t</sub>‖", { xaxis: position, yaxis: { type: "log" } }));
  showSpectra(Plotly, places, answers);
}

// The target of a regularizer is a curve and no shape: the axis must reach it.
function targets(answers, length, logarithmic) {
  const traces = [];
  const annotations = [];
  answers.forEach(({ target }, at) => {
    if (!answers[at].curve || typeof target !== "number" || (logarithmic && target <= 0)) return;
    traces.push({ x: [-0.5, length - 0.5], y: [target, target], mode: "lines", name: "target", hoverinfo: "skip",
      line: { color: RUN_COLOURS[at], width: 2, dash: "dashdot" } });
    annotations.push({ xref: "paper", x: 0, xanchor: "left", y: logarithmic ? Math.log10(target) : target, yanchor: "bottom",
      text: `target of the regularizer: ${formatNumber(target)}`, showarrow: false, font: { size: 11, color: RUN_COLOURS[at] } });
  });
  return { traces, annotations };
}

// The flow is a logarithm; the gain itself is drawn.
function flow(answers) {
  return answers.flatMap((answer, at) => {
    if (!answer.flow) return [];
    const gain = (values) => values.map((value) => Math.exp(Number(value)));
    const curve = { ...answer.flow, mean: gain(answer.flow.mean), low: gain(answer.flow.low), high: gain(answer.flow.high), least: undefined };
    return lines(curve, RUN_COLOURS[at], answer.run, DASHES[at], 1);
  });
}

function flowLevels(answers) {
  const found = level(0.01, "1 %", true);
  answers.forEach((answer, at) => {
    const horizon = Number(answer.verdict?.horizon);
    if (!Number.isFinite(horizon)) return;
    const line = { dash: "dot", width: 1.5, color: RUN_COLOURS[at] };
    found.shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: horizon, x1: horizon, line });
    found.annotations.push({ yref: "paper", y: 1, yanchor: "top", x: horizon, xanchor: "left", text: `horizon ${horizon}`,
      showarrow: false, font: { size: 11 } });
  });
  return found;
}

function showSpectra(Plotly, places, answers) {
  const plane = [];
  const curves = [];
  answers.forEach((answer, at) => {
    for (const [key, spectrum] of Object.entries(answer.spectra)) {
      const name = asText(`${answer.run} ${key}, step ${spectrum.step}`);
      const marker = { color: RUN_COLOURS[at], size: 5, symbol: ["circle", "x"][at], opacity: 0.75 };
      if (key.endsWith("eigenvalues")) {
        const points = spectrum.values.flat();
        plane.push({ x: points.map(([real]) => Number(real)), y: points.map(([, imaginary]) => Number(imaginary)), mode: "markers", name, marker });
      } else {
        spectrum.values.forEach((values) => curves.push({ y: values.map(Number), mode: "lines", name,
          line: { color: RUN_COLOURS[at], width: 1, dash: DASHES[at] } }));
      }
    }
  });
  const circle = { type: "circle", x0: -1, y0: -1, x1: 1, y1: 1, line: { color: "#888888", width: 1.5, dash: "dash" } };
  draw(Plotly, places.eigenvalues, plane, layout("real part", "imaginary part", {
    shapes: [circle], hovermode: "closest", yaxis: { scaleanchor: "x", scaleratio: 1 } }));
  draw(Plotly, places.singular, curves, layout("number", "singular value", { hovermode: "closest" }));
}
