// The page: what is chosen, and what follows from it.
import { showCharts, formatNumber } from "./charts.js";
import { makeScale, RUN_COLOURS } from "./colours.js";
import { drawLegend, HeatMap } from "./heatmap.js";
import { isDark, readState, writeState } from "./state.js";
import { showStrip } from "./strip.js";

const RELOAD_SECONDS = 30;
const PLAY_MILLISECONDS = 200;
const MOST_NAMED = 12;

const VIEWS = { hidden: "hidden state", joint: "all states", inputs: "inputs" };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function select(label, onChange) {
  const element = make("select");
  element.setAttribute("aria-label", label);
  element.addEventListener("change", () => onChange(element.value));
  return [element, make("label", {}, make("span", { textContent: label }), element)];
}

const options = (pairs) => pairs.map(([value, textContent]) => make("option", { value, textContent }));

function fill(element, pairs, chosen) {
  element.replaceChildren(...options(pairs));
  element.value = chosen;
}

// Runs of one experiment stand together.
function fillRuns(element, experiments, chosen, first = []) {
  const groups = experiments.map(({ name, runs }) => {
    const own = options(runs.map((run) => [run, runName(run)]));
    return runs.length < 2 ? own : [make("optgroup", { label: name || "this directory" }, ...own)];
  });
  element.replaceChildren(...options(first), ...groups.flat());
  element.value = chosen;
}

const split = (key) => (key.includes("/") ? key.split("/") : ["hidden", key]);
const join = (view, measure) => (view === "hidden" ? measure : `${view}/${measure}`);
// The run of the monitor, by the directory that the user gave.
export const runName = (run) => run.replace(/(^|\/)jacobian$/, "") || run;

class Page {
  constructor(source) {
    this.source = source;
    this.state = readState();
    this.maps = [];
    this.turn = 0;
    this.build();
  }

  build() {
    document.body.className = "jacmon";
    [this.runSelect, this.runLabel] = select("run", (run) => this.change({ run, layer: undefined, step: undefined }));
    [this.otherSelect, this.otherLabel] = select("compare with", (other) => this.change({ other }));
    [this.viewSelect, this.viewLabel] = select("view", (view) => this.changeView(view));
    [this.measureSelect, this.measureLabel] = select("measure", (measure) => this.change({ key: join(this.viewSelect.value, measure) }));
    [this.scaleSelect, this.scaleLabel] = select("scale", (scale) => this.change({ scale }));
    [this.cellsSelect, this.cellsLabel] = select("cell colour", (cells) => this.change({ cells }));
    this.reload = make("button", { type: "button", textContent: "Reload" });
    this.reload.addEventListener("click", () => this.refresh());
    this.together = make("p", { className: "together", hidden: true });
    this.message = make("p", { className: "message", hidden: true });
    this.message.setAttribute("role", "status");
    this.strip = make("div", { className: "strip" });
    this.advice = make("ul", { className: "advice" });
    this.panels = make("div", { className: "panels" });
    this.legend = make("canvas", { className: "legend", width: 200, height: 12 });
    this.legendText = make("span");
    this.readout = make("p", { className: "readout" });
    this.readout.setAttribute("role", "status");
    this.buildPlayer();
    this.buildCharts();
    const header = make("header", {}, this.runLabel, this.otherLabel, this.reload);
    const controls = make("div", { className: "controls" }, this.viewLabel, this.measureLabel, this.scaleLabel, this.cellsLabel);
    this.main = make("main", {}, controls, this.panels, make("div", { className: "scale" }, this.legend, this.legendText),
      this.readout, this.player, this.message, this.charts);
    document.body.replaceChildren(header, this.together, this.strip, this.advice, this.main);
    window.addEventListener("resize", () => this.maps.forEach((map) => map.draw()));
  }

  buildPlayer() {
    this.play = make("button", { type: "button", textContent: "▶ Play" });
    this.play.addEventListener("click", () => this.toggle());
    this.slider = make("input", { type: "range", min: 0, value: 0 });
    this.slider.setAttribute("aria-label", "training step");
    this.slider.addEventListener("input", () => this.changeStep(this.steps[Number(this.slider.value)]));
    this.stepText = make("output");
    this.player = make("div", { className: "player" }, this.play, this.slider, this.stepText);
  }

  buildCharts() {
    const titles = { curve: "Over the position", flow: "Flow: the rest of a gradient k steps back", loss: "What the loss feels of a step",
      eigenvalues: "Eigenvalues", singular: "Singular values" };
    this.places = {};
    this.charts = make("div", { className: "charts" });
    for (const [name, title] of Object.entries(titles)) {
      this.places[name] = make("div", { className: "chart" });
      this.charts.append(make("section", { hidden: true }, make("h2", { textContent: title }), this.places[name]));
    }
  }

  theme() {
    document.body.classList.toggle("dark", isDark());
  }

  fail(error) {
    this.message.hidden = false;
    this.message.textContent = error.message;
  }

  change(changes) {
    Object.assign(this.state, changes);
    return this.update();
  }

  changeView(view) {
    const measures = this.keys().filter((key) => split(key)[0] === view).map((key) => split(key)[1]);
    const measure = measures.includes(this.measureSelect.value) ? this.measureSelect.value : measures[0];
    return this.change({ key: join(view, measure) });
  }

  // The data anew: runs, then the layers, then what is chosen.
  async refresh() {
    this.theme();
    this.source.forget();
    this.fresh = true;
    try {
      const { experiments, missing } = await this.source.runs();
      this.experiments = experiments;
      this.runs = experiments.flatMap(({ runs }) => runs);
      this.missing = missing;
      if (!this.runs.length) return this.fail(new Error("No Jacobians yet: train with JacobianMonitor(..., log_dir=...)."));
      await this.update();
    } catch (error) {
      this.fail(error);
    }
    return undefined;
  }

  async update() {
    const turn = ++this.turn;
    this.message.hidden = true;
    try {
      await this.updateLayers(turn);
      await this.updateMaps(turn);
      if (turn === this.turn) await this.updateMeasurement(turn);
      if (turn === this.turn) this.fetchNeighbours();
    } catch (error) {
      if (turn === this.turn) this.fail(error);
    }
  }

  async updateLayers(turn) {
    const { state } = this;
    if (!this.runs.includes(state.run)) state.run = this.runs[0];
    if (!this.runs.includes(state.other) || state.other === state.run) state.other = "";
    this.showRuns();
    this.otherLabel.hidden = this.runs.length < 2;
    if (this.fresh || this.layersOf !== state.run) {
      const { layers } = await this.source.layers(state.run);
      if (turn !== this.turn) return;
      [this.layers, this.layersOf, this.fresh] = [layers, state.run, false];
    }
    if (!this.layers.some((line) => line.layer === state.layer)) state.layer = this.layers[0].layer;
    showStrip(this.strip, this.layers, state.layer, (layer) => this.change({ layer }));
    const line = this.line();
    this.advice.replaceChildren(...[...line.suggestions, ...line.notes].map((textContent) => make("li", { textContent })));
    const keys = this.keys();
    if (!keys.includes(state.key)) state.key = keys.find((key) => key === "joint/variance") ?? keys[0];
    const [view, measure] = split(state.key);
    fill(this.viewSelect, [...new Set(keys.map((key) => split(key)[0]))].map((one) => [one, VIEWS[one] ?? one]), view);
    fill(this.measureSelect, keys.filter((key) => split(key)[0] === view).map((key) => [split(key)[1], split(key)[1].replaceAll("_", " ")]), measure);
    fill(this.scaleSelect, [["log", "logarithmic"], ["linear", "linear"]], state.scale ?? "log");
    fill(this.cellsSelect, [["mean", "mean"], ["least", "least"], ["greatest", "greatest"]], state.cells ?? "mean");
  }

  showRuns() {
    const { state } = this;
    fillRuns(this.runSelect, this.experiments, state.run);
    const others = this.experiments.map(({ name, runs }) => ({ name, runs: runs.filter((run) => run !== state.run) }));
    fillRuns(this.otherSelect, others, state.other, [["", "nothing"]]);
    const { runs, others: beside } = this.experiments.find((one) => one.runs.includes(state.run));
    this.together.hidden = !beside.length;
    const all = [...runs, ...beside];
    const more = all.length > MOST_NAMED ? ` and ${all.length - MOST_NAMED} others` : "";
    this.together.textContent = `In TensorBoard's own tabs this experiment has the runs ${all.slice(0, MOST_NAMED).join(", ")}${more}.`;
  }

  line() {
    return this.layers.find((line) => line.layer === this.state.layer);
  }

  keys() {
    return this.line().keys;
  }

  columns() {
    return Math.min(1000, Math.max(100, Math.floor((this.panels.clientWidth || 900) / (this.state.other ? 2 : 1))));
  }

  // The layers above and below in the strip are likely to be chosen next.
  fetchNeighbours() {
    const { run, layer, key } = this.state;
    const at = this.layers.findIndex((line) => line.layer === layer);
    const near = [this.layers[at + 1], this.layers[at - 1]].filter((line) => line?.keys.includes(key));
    for (const line of near) this.source.heatmap(run, line.layer, key, this.columns()).catch(() => {});
  }

  async updateMaps(turn) {
    const { run, other, layer, key } = this.state;
    const runs = [run, ...(other ? [other] : [])];
    const columns = this.columns();
    const found = await Promise.all(runs.map((one) => this.source.heatmap(one, layer, key, columns).catch((error) => this.fail(error))));
    if (turn !== this.turn) return;
    const answers = found.filter((map) => map?.columns);
    if (!answers.length) throw new Error(`There is no ${key} of ${layer} in ${runName(run)}.`);
    this.logarithmic = this.scaleSelect.value === "log" && !answers[0].linear;
    this.colours = makeScale(answers, this.logarithmic);
    const span = [Math.min(...answers.map((map) => map.steps[0][0])), Math.max(...answers.map((map) => map.steps.at(-1)[1]))];
    this.steps = [...new Set(answers.flatMap((map) => map.steps.map((one) => one[0])).concat(span[1]))].sort((one, two) => one - two);
    this.showMaps(answers, span);
    const chosen = this.state.step === undefined ? span[1] : Number(this.state.step);
    this.showStep(this.steps.reduce((best, step) => (Math.abs(step - chosen) < Math.abs(best - chosen) ? step : best)));
    this.main.dataset.shown = JSON.stringify([run, layer, key]);
  }

  showMaps(answers, span) {
    while (this.maps.length < answers.length) this.maps.push(new HeatMap((step) => this.changeStep(step), (cell) => this.hover(cell)));
    this.maps.length = answers.length;
    this.panels.replaceChildren(...this.maps.map((map, at) => make("figure", {},
      make("figcaption", {}, ...this.swatch(at), this.caption(answers[at])), map.canvas)));
    this.maps.forEach((map, at) => map.show(answers[at], this.colours, this.cellsSelect.value, span));
    drawLegend(this.legend, this.colours);
    const [low, middle, high] = this.colours.ends.map(formatNumber);
    const counts = [["nan", "NaN"], ["inf", "Inf"]].map(([name, word]) => [answers.reduce((sum, map) => sum + map[name], 0), word])
      .filter(([count]) => count).map(([count, word]) => `${count.toLocaleString("en")} ${word}`);
    this.legendText.textContent = [`${low} · ${middle} · ${high}`, ...counts].join(", ");
  }

  // The colour and the line of a run in the curves, where there are two.
  swatch(at) {
    if (this.maps.length < 2) return [];
    const line = make("span", { className: "swatch" });
    line.style.borderTop = `3px ${["solid", "dashed"][at]} ${RUN_COLOURS[at]}`;
    return [line];
  }

  caption(map) {
    const all = map.run === this.state.run ? this.line().measurements : map.measurements;
    const part = map.measurements < all ? ` of ${all.toLocaleString("en")}` : "";
    const noun = map.measurements === 1 ? "measurement" : "measurements";
    return `${runName(map.run)} · ${map.layer} · ${map.measurements.toLocaleString("en")}${part} ${noun}`;
  }

  changeStep(step) {
    this.showStep(step);
    const turn = ++this.turn;
    return this.updateMeasurement(turn).catch((error) => this.fail(error));
  }

  showStep(step) {
    this.state.step = step;
    this.slider.max = this.steps.length - 1;
    this.slider.value = this.steps.indexOf(step);
    this.stepText.textContent = `step ${step.toLocaleString("en")}`;
    this.maps.forEach((map) => map.choose(step));
    writeState(this.state);
  }

  async updateMeasurement(turn) {
    const { run, other, layer, key, step } = this.state;
    const runs = [run, ...(other ? [other] : [])];
    const answers = (await Promise.all(runs.map((one) => this.source.measurement(one, layer, key, step).catch(() => null)))).filter(Boolean);
    if (turn !== this.turn || !answers.length) return;
    this.answers = answers;
    if (this.missing) return this.fail(new Error(this.missing));
    this.plotly ??= this.source.loadPlotly();
    const Plotly = await this.plotly;
    if (turn !== this.turn) return undefined;
    showCharts(Plotly, this.places, answers, this.logarithmic);
    this.main.dataset.measured = JSON.stringify([run, layer, key, answers[0].step]);
    return undefined;
  }

  async hover(cell) {
    const turn = (this.hovers = (this.hovers ?? 0) + 1);
    if (!cell) return;
    const where = cell.first === cell.last ? cell.first : `${cell.first} to ${cell.last}`;
    const start = `step ${cell.step.toLocaleString("en")}, position ${where}: `;
    if (!cell.present) {
      this.readout.textContent = `${start}not measured`;
      return;
    }
    const several = cell.least !== cell.greatest ? `, ${formatNumber(cell.least)} to ${formatNumber(cell.greatest)} in this cell` : "";
    this.readout.textContent = `${start}mean ${formatNumber(cell.mean)}${several}`;
    await new Promise((resolve) => setTimeout(resolve, 60));
    if (turn !== this.hovers) return;
    const { run, layer, key } = this.state;
    const answer = await this.source.measurement(run, layer, key, cell.step).catch(() => null);
    const at = answer?.curve?.from.findIndex((from, place) => from <= cell.first && cell.first <= answer.curve.to[place]) ?? -1;
    if (turn !== this.hovers || at < 0) return;
    this.readout.textContent += `, quantiles ${formatNumber(answer.curve.low[at])} (10 %) and ${formatNumber(answer.curve.high[at])} (90 %)`;
  }

  toggle() {
    this.playing = !this.playing;
    this.play.textContent = this.playing ? "⏸ Pause" : "▶ Play";
    if (this.playing) this.playOn();
  }

  // A step is drawn before the next is asked for: behind a slow connection the next would else supersede each.
  async playOn() {
    const mine = (this.plays = (this.plays ?? 0) + 1);
    while (this.playing && mine === this.plays) {
      await Promise.all([this.next(), new Promise((resolve) => setTimeout(resolve, PLAY_MILLISECONDS))]);
    }
  }

  next() {
    const stride = Math.max(1, Math.floor(this.steps.length / 100));
    const at = this.steps.indexOf(this.state.step);
    return this.changeStep(this.steps[at + 1 >= this.steps.length ? 0 : Math.min(this.steps.length - 1, at + stride)]);
  }
}

export function start(source) {
  const page = new Page(source);
  page.refresh();
  if (source.live) setInterval(() => document.hidden || page.playing || page.refresh(), 1000 * RELOAD_SECONDS);
}
