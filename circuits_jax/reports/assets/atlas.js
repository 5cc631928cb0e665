// What is looked at (head and step), kept in the address so that a link opens it; and the start of the page.

const atlas = JSON.parse(byId("data").textContent);
const view = { head: 0, step: atlas.states.length - 1 };
const state = () => atlas.states[view.step];

const headNamed = (name) => state().heads.findIndex((_, index) => headName(index) === name);

// #head=5.1&step=3; what the address does not say or says wrongly stays as it is.
function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  const head = headNamed(said.get("head"));
  const step = said.has("step") ? Number(said.get("step")) : -1;
  if (head >= 0) view.head = head;
  if (atlas.states[step]) view.step = step;
}

function address() {
  const step = atlas.states.length > 1 ? `&step=${view.step}` : "";
  return `#head=${headName(view.head)}${step}`;
}

function go(change) {
  const picked = "head" in change;
  Object.assign(view, change);
  if (picked) history.pushState(null, "", address());
  else history.replaceState(null, "", address());
  if (byId("panel").contains(document.activeElement)) byId("panel").focus({ preventScroll: true });
  render();
  const below = byId("panel").offsetTop > byId("map").offsetTop + 40;
  if (picked && below) byId("panel").scrollIntoView();
}

function render() {
  byId("step").value = view.step;
  byId("step").setAttribute("aria-valuetext", state().name);
  byId("step-name").textContent = state().name;
  byId("jump-said").textContent = "";
  paintGrid();
  paintLegend();
  paintGraph();
  drawPanel();
}

// A page without an address opens on the surest label.
function surest() {
  const best = state().heads.map((head) => Math.max(0, ...[...head.qk, ...head.ov].map((label) => label.confidence)));
  return best.indexOf(Math.max(...best));
}

function buildAbout() {
  const facts = atlas.facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]);
  byId("facts").append(...facts);
  byId("notes").append(...atlas.notes.map((note) => make("li", {}, note)));
}

function buildSteps() {
  byId("steps").hidden = atlas.states.length < 2;
  byId("step").max = atlas.states.length - 1;
  byId("step").addEventListener("input", (event) => go({ step: Number(event.target.value) }));
}

function buildJump() {
  byId("jump").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const name = event.target.value.trim();
    const head = headNamed(name);
    if (head >= 0) return go({ head });
    const known = `layers 0 to ${atlas.n_layers - 1}, heads 0 to ${atlas.n_heads - 1}`;
    byId("jump-said").textContent = `No head “${name}”: ${known}, written as 0.0`;
  });
}

function switchTheme() {
  const root = document.documentElement;
  const now = root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
}

view.head = surest();
readAddress();
addEventListener("hashchange", () => (readAddress(), render()));
byId("theme").addEventListener("click", switchTheme);
buildAbout();
buildSteps();
buildJump();
buildColours();
buildGrid();
buildGraph();
followHints();
render();
