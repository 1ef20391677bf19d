// The strip: a line for each layer, the worst verdict first.
import { STATE_COLOURS } from "./colours.js";

const SVG = "http://www.w3.org/2000/svg";

export function showStrip(list, layers, chosen, onChoose) {
  const focused = list.contains(document.activeElement);
  list.replaceChildren(...layers.map((line) => button(line, line.layer === chosen, onChoose)));
  if (focused) list.querySelector('[aria-pressed="true"]')?.focus();
}

function button(line, isChosen, onChoose) {
  const element = document.createElement("button");
  element.type = "button";
  element.className = "layer";
  element.setAttribute("aria-pressed", String(isChosen));
  element.title = [line.layer, ...line.suggestions, ...line.notes].join("\n");
  const mark = document.createElement("span");
  mark.className = "mark";
  mark.style.background = STATE_COLOURS[line.state];
  // A shape beside the colour.
  mark.textContent = { vanishing: "▼", exploding: "▲", stable: "●" }[line.state] ?? "?";
  const name = document.createElement("bdi");
  name.className = "name";
  name.textContent = line.layer;
  const words = document.createElement("span");
  words.className = "words";
  words.textContent = line.words;
  element.append(mark, name, words, spark(line));
  element.addEventListener("click", () => onChoose(line.layer));
  return element;
}

function spark(line) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("class", "spark");
  drawing.setAttribute("viewBox", "0 0 80 22");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", "growth over training");
  const numbers = line.growth.map(([step, value]) => [step, Number(value)]).filter(([, value]) => Number.isFinite(value));
  if (!numbers.length) return drawing;
  const reach = Math.max(1e-6, ...numbers.map(([, value]) => Math.abs(value)));
  const [first, last] = [numbers[0][0], numbers.at(-1)[0]];
  const points = numbers.map(([step, value]) => {
    const x = last > first ? (78 * (step - first)) / (last - first) + 1 : 40;
    return `${x.toFixed(1)},${(11 - (9 * value) / reach).toFixed(1)}`;
  });
  const zero = document.createElementNS(SVG, "line");
  for (const [name, value] of [["x1", 0], ["x2", 80], ["y1", 11], ["y2", 11], ["class", "zero"]]) zero.setAttribute(name, value);
  const path = document.createElementNS(SVG, "polyline");
  path.setAttribute("points", points.join(" "));
  path.setAttribute("stroke", STATE_COLOURS[line.state]);
  drawing.append(zero, path);
  return drawing;
}
