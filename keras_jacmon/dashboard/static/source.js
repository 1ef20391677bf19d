// Where the data come from: the server of TensorBoard, or the page itself.

export class Server {
  constructor() {
    this.kept = new Map();
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
    return this.ask("heatmap", { run, layer, key, columns });
  }

  // Steps that were looked at are not asked for again until there are newer ones.
  measurement(run, layer, key, step) {
    const name = JSON.stringify([run, layer, key, step]);
    if (!this.kept.has(name)) {
      if (this.kept.size > 200) this.kept.clear();
      const answer = this.ask("measurement", { run, layer, key, step });
      answer.catch(() => this.kept.delete(name));
      this.kept.set(name, answer);
    }
    return this.kept.get(name);
  }

  forget() {
    this.kept.clear();
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
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

export function flags(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}
