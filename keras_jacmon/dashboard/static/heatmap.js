// The heat map: a canvas whose pixels are cells of training step and position.
import { flags, floats } from "./source.js";
import { formatNumber } from "./charts.js";

const MARGIN = { left: 52, right: 10, top: 8, bottom: 36 };

// Cells that have no colour of the scale; an opaque colour is a larger number.
const ABSENT = 0;
const BROKEN = 1;
const INFINITE = 2;

// As they stand in an ImageData: on all machines of today the first byte is the lowest.
const opaque = (red, green, blue) => (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;

function cellColours(values, present, scale) {
  const colours = new Uint32Array(values.length);
  const { table } = scale;
  for (let at = 0; at < values.length; at++) {
    if (!present[at]) colours[at] = ABSENT;
    else if (Number.isNaN(values[at])) colours[at] = BROKEN;
    else if (!Number.isFinite(values[at])) colours[at] = INFINITE;
    else {
      const place = 3 * scale.place(values[at]);
      colours[at] = opaque(table[place], table[place + 1], table[place + 2]);
    }
  }
  return colours;
}

// NaN is a chequered black and magenta, Inf stripes of black and yellow: seen without colours, too.
function patterned(colour, x, y) {
  if (colour === ABSENT) return 0;
  if (colour === BROKEN) return ((x >> 2) + (y >> 2)) % 2 ? opaque(0, 0, 0) : opaque(215, 0, 190);
  return ((x + y) >> 2) % 2 ? opaque(0, 0, 0) : opaque(250, 220, 30);
}

export class HeatMap {
  constructor(onStep, onHover) {
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.className = "heatmap";
    this.onStep = onStep;
    this.onHover = onHover;
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => this.onHover(null));
    this.canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) this.onStep(cell.step);
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  show(map, scale, cells, span) {
    this.map = { ...map, all: Object.fromEntries(["mean", "least", "greatest"].map((name) => [name, floats(map[name])])),
      present: flags(map.present) };
    this.colours = cellColours(this.map.all[cells], this.map.present, scale);
    this.image = undefined;
    this.span = span;
    this.row = Math.min(this.row ?? 0, Math.max(0, map.rows - 1));
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${map.key} of ${map.layer} by training step and position; arrow keys move`);
    this.draw();
  }

  size() {
    const width = Math.max(200, this.canvas.parentElement.clientWidth);
    return { width, height: width < 500 ? 240 : 320 };
  }

  plot() {
    const { width, height } = this.size();
    return { x: MARGIN.left, y: MARGIN.top, width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  }

  // The columns' left edges in steps; a column lasts until the next one begins.
  columnOf(step) {
    const { steps } = this.map;
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (steps[middle][0] <= step) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  draw() {
    if (!this.map) return;
    const { width, height } = this.size();
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    const plot = this.plot();
    this.pixels(context, plot, ratio);
    context.scale(ratio, ratio);
    this.axes(context, plot);
  }

  pixels(context, plot, ratio) {
    if (!this.map.columns) return;
    const wide = Math.round(plot.width * ratio);
    const high = Math.round(plot.height * ratio);
    // A cursor that moves changes no cell.
    if (this.image?.width !== wide || this.image.height !== high) this.image = this.cells(context.createImageData(wide, high));
    context.putImageData(this.image, Math.round(plot.x * ratio), Math.round(plot.y * ratio));
  }

  cells(image) {
    const { rows, steps } = this.map;
    const { width, height } = image;
    const [from, to] = this.span;
    const lastEnds = steps.at(-1)[1] + Math.max(1, (to - from) / Math.max(1, steps.length - 1));
    const columnAt = new Int32Array(width);
    for (let x = 0; x < width; x++) {
      const step = from + ((x + 0.5) / width) * (this.until() - from);
      columnAt[x] = step < steps[0][0] || step > lastEnds ? -1 : this.columnOf(step);
    }
    const pixels = new Uint32Array(image.data.buffer);
    for (let y = 0; y < height; y++) {
      const row = Math.min(rows - 1, Math.floor(((height - 1 - y) / height) * rows));
      for (let x = 0; x < width; x++) {
        if (columnAt[x] < 0) continue;
        const colour = this.colours[columnAt[x] * rows + row];
        pixels[y * width + x] = colour > INFINITE ? colour : patterned(colour, x, y);
      }
    }
    return image;
  }

  // The last measurement is as wide as the others.
  until() {
    const [from, to] = this.span;
    return to + Math.max(1, (to - from) / Math.max(1, this.map.columns - 1));
  }

  axes(context, plot) {
    const style = getComputedStyle(this.canvas);
    context.fillStyle = style.color;
    context.strokeStyle = style.color;
    context.font = "12px system-ui, sans-serif";
    context.globalAlpha = 0.45;
    context.strokeRect(plot.x - 0.5, plot.y - 0.5, plot.width + 1, plot.height + 1);
    context.globalAlpha = 1;
    context.textAlign = "center";
    const [from] = this.span;
    const ticks = plot.width < 400 ? 3 : 6;
    const spread = Array.from({ length: ticks + 1 }, (_, tick) => Math.round(from + (tick / ticks) * (this.span[1] - from)));
    // Few measurements are named each.
    const named = this.map.columns <= ticks ? this.map.steps.map(([step]) => step) : new Set(spread);
    for (const step of named) context.fillText(step.toLocaleString("en"), this.x(step, plot), plot.y + plot.height + 15);
    context.fillText("training step", plot.x + plot.width / 2, plot.y + plot.height + 31);
    context.textAlign = "right";
    for (let tick = 0; tick <= 4; tick++) {
      const position = Math.round((tick / 4) * Math.max(0, this.map.length - 1));
      const y = plot.y + plot.height * (1 - (position + 0.5) / Math.max(1, this.map.length));
      context.fillText(String(position), plot.x - 6, y + 4);
    }
    context.save();
    context.translate(12, plot.y + plot.height / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("position", 0, 0);
    context.restore();
    if (this.chosen !== undefined) this.cursor(context, plot);
  }

  // The middle of a measurement.
  x(step, plot) {
    const [from] = this.span;
    const half = (this.until() - this.span[1]) / 2;
    return plot.x + (plot.width * (step + half - from)) / (this.until() - from);
  }

  cursor(context, plot) {
    const x = Math.round(this.x(this.chosen, plot)) + 0.5;
    for (const [width, colour] of [[4, "#ffffff"], [2, "#000000"]]) {
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.beginPath();
      context.moveTo(x, plot.y);
      context.lineTo(x, plot.y + plot.height);
      context.stroke();
    }
  }

  choose(step) {
    this.chosen = step;
    this.draw();
  }

  cellAt(event) {
    if (!this.map?.columns) return null;
    const box = this.canvas.getBoundingClientRect();
    const plot = this.plot();
    const [x, y] = [event.clientX - box.left - plot.x, event.clientY - box.top - plot.y];
    if (x < 0 || y < 0 || x >= plot.width || y >= plot.height) return null;
    const [from] = this.span;
    const column = this.columnOf(from + (x / plot.width) * (this.until() - from));
    const row = Math.min(this.map.rows - 1, Math.floor((1 - y / plot.height) * this.map.rows));
    return this.cell(column, row);
  }

  cell(column, row) {
    const { rows, length, steps, all, present } = this.map;
    const at = column * rows + row;
    const first = Math.ceil((row * length) / rows);
    const last = Math.ceil(((row + 1) * length) / rows) - 1;
    return { step: steps[column][0], steps: steps[column], first, last, present: present[at] === 1,
      mean: all.mean[at], least: all.least[at], greatest: all.greatest[at] };
  }

  hover(event) {
    this.onHover(this.cellAt(event));
  }

  key(event) {
    if (!this.map?.columns) return;
    const across = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const along = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!across && !along) return;
    event.preventDefault();
    const column = this.columnOf(this.chosen ?? 0) + (across ?? 0);
    const inside = Math.min(this.map.columns - 1, Math.max(0, column));
    this.row = Math.min(this.map.rows - 1, Math.max(0, this.row + (along ?? 0)));
    const cell = this.cell(inside, this.row);
    if (across) this.onStep(cell.step);
    this.onHover(cell);
  }
}

export function drawLegend(canvas, scale) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  for (let at = 0; at < canvas.width * canvas.height; at++) {
    const place = 3 * Math.round((255 * (at % canvas.width)) / (canvas.width - 1));
    image.data.set([scale.table[place], scale.table[place + 1], scale.table[place + 2], 255], 4 * at);
  }
  context.putImageData(image, 0, 0);
  canvas.title = `colours from ${scale.ends.map(formatNumber).join(" over ")}`;
}
