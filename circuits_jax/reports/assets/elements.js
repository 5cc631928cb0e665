// Elements, and how tokens, numbers and hints are written. Data enters the page through text nodes and attributes only.

const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

// --- numbers and names ---

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size === Infinity) return value > 0 ? "∞" : "−∞";
  const exponent = size !== 0 && (size < 1e-3 || size >= 1e5);
  const text = exponent ? Number(value).toExponential(1) : String(Number(Number(value).toPrecision(digits)));
  return text.replaceAll("-", "−");
}

// In tables: the same decimals for numbers of one size, so that points stand below each other.
function aligned(value) {
  const size = Math.abs(value);
  if (value === null || !size || !(size < 1e5) || size < 1e-3) return number(value);
  return value.toFixed(size < 1 ? 3 : size < 10 ? 2 : 1).replace("-", "−");
}

const percent = (share) => (share === null ? "–" : `${number(100 * share)} %`);
const words = (name) => name.replaceAll("_", " ");
const headName = (index) => `${Math.floor(index / atlas.n_heads)}.${index % atlas.n_heads}`;

// --- tokens ---

const LONGEST = 24; // characters of a token that are shown; its tip has them all
const MARKS = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥" };
const code = (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`;

// Spaces at either end and characters without a shape of their own are made visible.
function visible(text) {
  if (text === "") return "∅";
  return text
    .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length))
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u00a0]/gu, (character) => MARKS[character] ?? code(character));
}

function token(text, attributes = {}, name = "span") {
  const whole = visible(text);
  const characters = [...whole];
  const long = characters.length > LONGEST;
  const parts = (long ? `${characters.slice(0, LONGEST).join("")}…` : whole).split(/([␣↵␍⇥∅])/);
  const pieces = parts.map((part, place) => (place % 2 ? make("i", {}, part) : part));
  const made = make(name, { ...attributes, class: `token ${attributes.class ?? ""}` }, ...pieces);
  return long ? withTip(made, whole) : made;
}

// --- tables ---

const numeric = (content) => content === null || typeof content === "number" || Math.abs(content) === Infinity;

// A cell is text, a number or an element; numbers stand to the right.
function cell(content) {
  return numeric(content) ? make("td", { class: "number" }, aligned(content)) : make("td", {}, content);
}

function table(header, rows) {
  const heads = header.map((name, column) => {
    const right = rows.length && rows.every((row) => numeric(row[column]));
    return make("th", { scope: "col", class: right ? "number" : "" }, name);
  });
  const lines = rows.map((row) => make("tr", {}, ...row.map(cell)));
  const body = [make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines)];
  return make("div", { class: "scroll" }, make("table", {}, ...body));
}

// --- folds: stay as the reader left them, from head to head and from step to step ---

const folds = new Map();

function fold(key, open, summary, ...parts) {
  const attributes = (folds.get(key) ?? open) ? { open: "" } : {};
  const title = make("summary", {}, ...summary);
  const made = make("details", attributes, title, ...parts);
  title.addEventListener("click", () => folds.set(key, !made.open)); // "toggle" comes too late for a quick next step
  return made;
}

// --- hints: any element with data-tip has one, under the pointer or beside the focus ---

function withTip(element, text) {
  element.dataset.tip = text;
  return element;
}

function placeTip(owner, x, y) {
  const tip = byId("tip");
  tip.hidden = !owner;
  if (!owner) return;
  tip.textContent = owner.dataset.tip;
  const left = Math.min(x + 12, innerWidth - tip.offsetWidth - 8);
  const above = y + 16 + tip.offsetHeight > innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above ? y - tip.offsetHeight - 8 : y + 16}px`;
}

function followHints() {
  const owner = (event) => event.target.closest?.("[data-tip]");
  document.addEventListener("pointermove", (event) => placeTip(owner(event), event.clientX, event.clientY));
  document.addEventListener("pointerleave", () => placeTip(null));
  document.addEventListener("focusout", () => placeTip(null));
  document.addEventListener("keydown", (event) => event.key === "Escape" && placeTip(null));
  document.addEventListener("focusin", (event) => {
    if (!owner(event) || !event.target.matches(":focus-visible")) return;
    const box = owner(event).getBoundingClientRect();
    placeTip(owner(event), box.left, box.bottom - 8);
  });
}

// --- keyboard: one Tab stop for many items, arrow keys between them ---

function rove(container, items, columns) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  container.addEventListener("keydown", (event) => {
    const all = items();
    const here = all.indexOf(event.target.closest("[tabindex]"));
    const ends = { Home: 0, End: all.length - 1 };
    const next = all[ends[event.key] ?? here + (steps[event.key] ?? NaN)];
    if (here < 0 || !next) return;
    event.preventDefault();
    next.focus();
  });
  container.addEventListener("focusin", (event) => {
    const focused = event.target.closest("[tabindex]");
    for (const item of items()) item.setAttribute("tabindex", item === focused ? 0 : -1);
  });
}
