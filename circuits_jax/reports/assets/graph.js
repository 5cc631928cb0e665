// Composition: layers as rows, as in the grid, and one curve for each edge whose z is large enough.

const PATHS = ["q", "k", "v"];
const STEP = { x: 40, y: 38, left: 30, top: 14 };
const USUAL_EDGES = 150;
const USUAL_Z = 2;
const graph = { threshold: 0, paths: new Set(PATHS) };

const place = (index) => [
  STEP.left + STEP.x * ((index % atlas.n_heads) + 0.5),
  STEP.top + STEP.y * Math.floor(index / atlas.n_heads),
];

function buildGraph() {
  const [width, height] = [STEP.left + STEP.x * atlas.n_heads + 8, 2 * STEP.top + STEP.y * (atlas.n_layers - 1)];
  const root = byId("graph");
  byId("composition").hidden = atlas.states.every((one) => !one.edges.z.length);
  byId("graph-caption").textContent = atlas.captions?.graph ?? "";
  root.setAttribute("viewBox", `0 0 ${width} ${height}`);
  root.style.maxWidth = `${1.7 * width}px`;
  for (let layer = 0; layer < atlas.n_layers; layer++) {
    root.append(draw("text", { x: STEP.left - 14, y: STEP.top + STEP.y * layer + 4, class: "end" }, String(layer)));
  }
  root.append(draw("g", { id: "edges", role: "list", "aria-label": "Edges, strongest first" }));
  const nodes = state().heads.map((_, index) => node(index));
  root.append(draw("g", { id: "nodes", role: "group", "aria-label": "Heads" }, ...nodes));
  rove(byId("nodes"), () => [...byId("nodes").children], atlas.n_heads);
  rove(byId("edges"), () => [...byId("edges").children], 1);
  buildGraphControls();
}

function node(index) {
  const [cx, cy] = place(index);
  const select = () => go({ head: index });
  const onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    select();
  };
  const attributes = { cx, cy, r: 8, role: "button", class: "node", "data-head": index, onclick: select, onkeydown };
  return draw("circle", attributes);
}

function buildGraphControls() {
  const strongest = state().edges.z.toSorted((a, b) => b - a);
  graph.threshold = Math.max(USUAL_Z, strongest[USUAL_EDGES - 1] ?? USUAL_Z);
  byId("threshold").addEventListener("input", () => {
    graph.threshold = sortedZ()[Number(byId("threshold").value)];
    paintGraph();
  });
  const boxes = PATHS.map((path) => {
    const change = () => (graph.paths.delete(path) || graph.paths.add(path), paintGraph());
    const input = make("input", { type: "checkbox", checked: "", value: path, onchange: change });
    return make("label", {}, input, pathChip(path));
  });
  byId("paths").append(...boxes);
}

// The slider goes through the edges, not through z: half of its way leaves half of them, however long the tail.
const sortedZ = () => state().edges.z.toSorted((a, b) => a - b);

function paintGraph() {
  const { z, path } = state().edges;
  const order = sortedZ();
  const shown = [...z.keys()].filter((edge) => z[edge] >= graph.threshold && graph.paths.has(PATHS[path[edge]]));
  const slider = byId("threshold");
  const found = order.findIndex((value) => value >= graph.threshold);
  slider.max = Math.max(0, order.length - 1);
  slider.value = found < 0 ? slider.max : found;
  const said = `z ≥ ${number(graph.threshold)}: ${shown.length || "none"} of ${edgesInAll()}`;
  slider.setAttribute("aria-valuetext", said);
  byId("threshold-name").textContent = said;
  byId("edges").replaceChildren(...shown.map(edgeCurve));
  byId("edges").firstElementChild?.setAttribute("tabindex", 0);
  paintNodes();
}

// "the strongest 2000 of 28,512 edges", or "48 edges" when all are here.
function edgesInAll() {
  const { z, total = z.length } = state().edges;
  const all = `${total.toLocaleString("en-US")} edges`;
  return total > z.length ? `the strongest ${z.length} of ${all}` : all;
}

function paintNodes() {
  for (const [index, circle] of [...byId("nodes").children].entries()) {
    const head = state().heads[index];
    const main = head.qk[0];
    circle.setAttribute("style", main ? `fill: ${colourOf("qk", main.name)}` : "");
    circle.setAttribute("tabindex", index === view.head ? 0 : -1);
    circle.classList.toggle("selected", index === view.head);
    circle.classList.toggle("faded", !passes(head));
    circle.setAttribute("aria-label", report(index));
    circle.dataset.tip = report(index);
  }
}

function edgeCurve(edge) {
  const { sender, receiver, path, score, z } = state().edges;
  const name = PATHS[path[edge]];
  const own = [sender[edge], receiver[edge]].includes(view.head);
  const ends = `${headName(sender[edge])} → ${headName(receiver[edge])} by ${name.toUpperCase()}`;
  const text = `${ends}\nscore ${number(score[edge])}, z ${number(z[edge])}`;
  const d = curve(place(sender[edge]), place(receiver[edge]), path[edge]);
  const attributes = { class: `edge ${name}${own ? " own" : ""}`, role: "listitem", tabindex: -1, "aria-label": text };
  return withTip(draw("g", attributes, draw("path", { d, class: "hit" }), draw("path", { d, class: "stroke" })), text);
}

// Bent differently for q, k and v, and within a column around the heads that it skips, towards the middle of the graph.
function curve([x1, y1], [x2, y2], path) {
  const skipped = (y2 - y1) / STEP.y - 1;
  const inwards = x1 > (STEP.x * atlas.n_heads) / 2 ? -1 : 1;
  const bend = (path - 1) * 5 + (x1 === x2 && skipped ? inwards * Math.min(14 + 2 * skipped, 28) : 0);
  const third = (y2 - y1) / 3;
  return `M${x1},${y1} C${x1 + bend},${y1 + third} ${x2 + bend},${y2 - third} ${x2},${y2}`;
}
