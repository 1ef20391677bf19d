// Colours that are told apart by the colour-blind: blue to orange around the reference, else dark to light.

const DIVERGING = [
  [5, 48, 97], [33, 102, 172], [103, 169, 207], [209, 229, 240], [245, 245, 243],
  [254, 224, 182], [241, 163, 64], [179, 88, 6], [110, 50, 4],
];
const SEQUENTIAL = [[0, 32, 77], [49, 68, 107], [102, 105, 112], [149, 143, 120], [203, 186, 105], [255, 234, 70]];

export const STATE_COLOURS = { vanishing: "#2166ac", exploding: "#b35806", stable: "#5b8c5a", "not judged": "#888888" };
export const RUN_COLOURS = ["#3b7fc4", "#d9822b"];

function table(stops) {
  const colours = new Uint8ClampedArray(256 * 3);
  for (let at = 0; at < 256; at++) {
    const place = (at / 255) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(place));
    for (let part = 0; part < 3; part++) {
      colours[3 * at + part] = stops[low][part] + (place - low) * (stops[low + 1][part] - stops[low][part]);
    }
  }
  return colours;
}

const TABLES = { diverging: table(DIVERGING), sequential: table(SEQUENTIAL) };

// The scale of all maps of one measure, so that two runs have the same one.
export function makeScale(maps, logarithmic) {
  const numbers = (name) => maps.map((map) => map.range[name]).filter((value) => value !== null);
  const reference = maps[0].reference;
  const forward = logarithmic ? (value) => Math.log(Math.max(value, Number.MIN_VALUE)) : (value) => value;
  let low = forward(Math.min(...numbers(logarithmic ? "positive" : "least")));
  let high = forward(Math.max(...numbers("greatest")));
  if (!Number.isFinite(low) || !Number.isFinite(high)) [low, high] = [0, 1];
  const centred = typeof reference === "number" && (!logarithmic || reference > 0);
  if (centred) {
    const centre = forward(reference);
    const reach = Math.max(Math.abs(low - centre), Math.abs(high - centre), logarithmic ? 0.01 : 1e-9);
    [low, high] = [centre - reach, centre + reach];
  }
  if (!(high > low)) high = low + 1;
  const backward = logarithmic ? Math.exp : (value) => value;
  return {
    table: centred ? TABLES.diverging : TABLES.sequential,
    ends: [backward(low), centred ? reference : backward((low + high) / 2), backward(high)],
    place: (value) => Math.round(255 * Math.min(1, Math.max(0, (forward(value) - low) / (high - low)))),
  };
}
