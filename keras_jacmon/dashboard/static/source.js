// Where the data come from: the server of TensorBoard, or the page itself.

const MOST_MEASUREMENTS = 200;
// Of at most 1 MB each.
const MOST_MAPS = 12;

export class Server {
  constructor() {
    this.measurements = new Map();
    this.maps = new Map();
    this.live = true;
  }

  async ask(route, query = {}) {
    const url = `./${route}?${new URLSearchParams(query)}`;
    const answer = await fetch(url);
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    return content;
  }

  runs() {
    return this.ask("runs");
  }

  layers(run) {
    return this.ask("layers", { run });
  }

  heatmap(run, layer, key, columns) {
    return this.keep(this.maps, MOST_MAPS, "heatmap", { run, layer, key, columns });
  }

  measurement(run, layer, key, step) {
    return this.keep(this.measurements, MOST_MEASUREMENTS, "measurement", { run, layer, key, step });
  }

  // What was looked at is not asked for again until there may be newer data.
  keep(kept, most, route, query) {
    const name = JSON.stringify(query);
    const answer = kept.get(name) ?? this.ask(route, query);
    // The last one that was looked at stands last.
    kept.delete(name);
    kept.set(name, answer);
    answer.catch(() => kept.delete(name));
    if (kept.size > most) kept.delete(kept.keys().next().value);
    return answer;
  }

  forget() {
    this.measurements.clear();
    this.maps.clear();
  }

  loadPlotly() {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = "./plotly.min.js";
      script.addEventListener("load", () => resolve(window.Plotly));
      script.addEventListener("error", () => reject(new Error("plotly.js cannot be loaded")));
      document.head.append(script);
    });
  }
}

// The data of one file: the answers of the server, written out.
export class Embedded {
  constructor(data) {
    this.data = data;
    this.live = false;
  }

  async runs() {
    return this.data.runs;
  }

  async layers(run) {
    return this.data.layers.find((one) => one.run === run);
  }

  async heatmap(run, layer, key) {
    return this.data.heatmaps.find((one) => one.run === run && one.layer === layer && one.key === key);
  }

  async measurement(run, layer, key, step) {
    const near = this.data.measurements.filter((one) => one.run === run && one.layer === layer);
    const distance = (one) => Math.abs(one.step - step);
    const found = near.reduce((best, one) => (distance(one) < distance(best) ? one : best));
    const own = found.curves.find((one) => one.key === key);
    return { ...found, ...own };
  }

  forget() {}

  async loadPlotly() {
    return window.Plotly;
  }
}

export function floats(text) {
  return new Float32Array(flags(text).buffer);
}

export function flags(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
  return bytes;
}
