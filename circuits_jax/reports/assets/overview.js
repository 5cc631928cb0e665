// The grid of all heads: coloured by label or by a number, filtered by type, moved through with the arrow keys.

const LETTERS = {
  previous_token: "P", fixed_offset: "O", first_token: "F", same_position: "S", duplicate_token: "D", induction: "I",
  content: "C", diffuse: "~", copying: "c", suppressing: "s", transforming: "t", extracting: "e", inactive: "i",
};
const SIDES = { qk: "where it looks (QK)", ov: "what it moves (OV)" };
const COLOURS = { labels: ["qk", "ov"], qk: ["qk"], ov: ["ov"] };
const UNDETERMINED = "undetermined";
const filter = new Set(); // of "qk induction"

const colourOf = (side, name) => `var(--${side}-${atlas.types[side].indexOf(name)})`;
const letterOf = (name) => LETTERS[name] ?? name[0];
const typesOf = (head, side) => (head[side].length ? head[side].map((label) => label.name) : [UNDETERMINED]);
const keysOf = (head) => ["qk", "ov"].flatMap((side) => typesOf(head, side).map((name) => `${side} ${name}`));
const passes = (head) => !filter.size || keysOf(head).some((key) => filter.has(key));

function labelText(label) {
  return `${words(label.name)} (${label.verdict}, ${number(label.confidence, 2)})`;
}

// One line: "5.1 · QK induction (supported, 0.98) · OV undetermined".
function report(index) {
  const said = ["qk", "ov"].map((side) => {
    const labels = state().heads[index][side].map(labelText).join(", ");
    return `${side.toUpperCase()} ${labels || UNDETERMINED}`;
  });
  return [headName(index), ...said].join(" · ");
}

// --- the grid ---

function buildGrid() {
  const column = (_, head) => make("span", { role: "columnheader" }, String(head));
  const numbers = Array.from({ length: atlas.n_heads }, column);
  byId("grid").style.setProperty("--heads", atlas.n_heads);
  byId("grid").classList.toggle("small", atlas.n_heads > 20);
  byId("grid").append(make("div", { role: "row" }, make("span", { role: "columnheader" }), ...numbers));
  for (let layer = 0; layer < atlas.n_layers; layer++) byId("grid").append(gridRow(layer));
  rove(byId("grid"), gridCells, atlas.n_heads);
}

function gridRow(layer) {
  const cells = Array.from({ length: atlas.n_heads }, (_, head) => {
    const index = layer * atlas.n_heads + head;
    return make("button", { type: "button", role: "gridcell", class: "head", onclick: () => go({ head: index }) });
  });
  return make("div", { role: "row" }, make("span", { role: "rowheader" }, String(layer)), ...cells);
}

const gridCells = () => [...byId("grid").querySelectorAll("button")];
const chosenMap = () => state().maps[Number(byId("colour").value.replace("map ", ""))] ?? null;

function paintGrid() {
  const map = chosenMap();
  const range = map && mapRange(map);
  gridCells().forEach((cell, index) => {
    const head = state().heads[index];
    const value = map?.values[Math.floor(index / atlas.n_heads)][index % atlas.n_heads];
    const parts = map ? [mapPart(value, range)] : COLOURS[byId("colour").value].map((side) => labelPart(head, side));
    cell.replaceChildren(...parts);
    cell.classList.toggle("faded", !passes(head));
    cell.setAttribute("aria-selected", index === view.head);
    cell.setAttribute("tabindex", index === view.head ? 0 : -1);
    cell.dataset.tip = report(index) + (map ? `\n${map.name}: ${number(value)}` : "");
    cell.setAttribute("aria-label", cell.dataset.tip);
  });
  paintScale(map, range);
}

function labelPart(head, side) {
  const names = head[side].map((label) => label.name);
  const stops = names.map((name, place) => {
    const colour = colourOf(side, name);
    return `${colour} ${(100 * place) / names.length}% ${(100 * (place + 1)) / names.length}%`;
  });
  if (!names.length) return make("span", { class: `part ${side}` }, "·");
  const style = `background: linear-gradient(90deg, ${stops.join(", ")})`;
  return make("span", { class: `part ${side}`, style }, names.map(letterOf).join(""));
}

// --- a number for each head ---

// Over all states, so that colours can be compared from step to step.
function mapRange({ name, diverging }) {
  const same = atlas.states.flatMap((one) => one.maps.filter((map) => map.name === name));
  const values = same.flatMap((map) => map.values.flat());
  const [low, high] = bounds(values, diverging ? [0] : []);
  const most = Math.max(Math.abs(low), Math.abs(high));
  return diverging ? [-most, most] : [low, high];
}

function mapPart(value, [low, high]) {
  if (value === null) return make("span", { class: "part" }, "·");
  return make("span", { class: "part", style: `background: ${mapColour(value, low, high)}` });
}

// Diverging maps run from -most to most and have the page's own colour at 0.
function mapColour(value, low, high) {
  const diverging = low === -high;
  const share = diverging ? Math.abs(value) / high : (value - low) / (high - low);
  const end = diverging && value < 0 ? "--negative" : "--positive";
  return `color-mix(in oklab, var(${end}) ${Math.round(100 * Math.min(1, share))}%, var(--zero))`;
}

function paintScale(map, range) {
  byId("scale").hidden = !map;
  if (!map) return;
  const [low, high] = range;
  const stops = Array.from({ length: 9 }, (_, place) => mapColour(low + ((high - low) * place) / 8, low, high));
  const bar = make("span", { class: "bar", style: `background: linear-gradient(90deg, ${stops.join(", ")})` });
  byId("scale").replaceChildren(number(low), bar, number(high), make("p", { class: "quiet" }, map.about));
}

// --- colour, legend, filter ---

function buildColours() {
  const names = { labels: "QK and OV labels", qk: "QK label", ov: "OV label" };
  atlas.states[0].maps.forEach((map, place) => (names[`map ${place}`] = map.name));
  const options = Object.entries(names).map(([value, text]) => make("option", { value }, text));
  byId("colour").append(...options);
  byId("colour").addEventListener("change", paintGrid);
}

function paintLegend() {
  const focused = document.activeElement?.dataset?.key;
  byId("legend").replaceChildren(...Object.keys(SIDES).map(legendOf));
  byId("legend").querySelector(`[data-key="${focused}"]`)?.focus();
  const passing = state().heads.filter(passes).length;
  byId("filtered").textContent = filter.size ? `${passing} of ${state().heads.length} heads` : "";
}

function legendOf(side) {
  const entries = [...atlas.types[side], UNDETERMINED].map((name) => legendEntry(side, name));
  return make("div", { role: "group", "aria-label": SIDES[side] }, make("h3", {}, SIDES[side]), ...entries);
}

function legendEntry(side, name) {
  const key = `${side} ${name}`;
  const count = state().heads.filter((head) => typesOf(head, side).includes(name)).length;
  const swatch = name === UNDETERMINED ? make("span", { class: "swatch" }, "·") : swatchOf(side, name);
  const attributes = { type: "button", "data-key": key, "aria-pressed": filter.has(key), onclick: () => toggle(key) };
  const button = make("button", attributes, swatch, words(name), make("span", { class: "quiet" }, String(count)));
  button.classList.toggle("none", count === 0);
  return button;
}

function swatchOf(side, name) {
  return make("span", { class: "swatch", style: `background: ${colourOf(side, name)}` }, letterOf(name));
}

function toggle(key) {
  if (!filter.delete(key)) filter.add(key);
  paintLegend();
  paintGrid();
  paintGraph();
}
