// The panel: all that is known of one head. A section without data is left out.

const CIRCUITS = ["qk", "ov"];
const CONVINCING = 0.95; // share of the random controls; below it a direction is written quietly

function drawPanel() {
  const head = state().heads[view.head];
  const name = headName(view.head);
  const title = make("h2", {}, `Head ${name}`, state().name && make("span", { class: "quiet" }, ` ${state().name}`));
  const sections = SECTIONS.map(([heading, build]) => [heading, build(head)]).filter(([, parts]) => parts.length);
  const built = sections.map(([heading, parts]) => make("section", {}, make("h3", {}, heading), ...parts));
  const jumps = sections.map(([heading], place) => {
    return make("button", { type: "button", onclick: () => built[place].scrollIntoView() }, heading);
  });
  const top = make("div", { class: "top" }, title, make("nav", { "aria-label": "Sections" }, ...jumps));
  byId("panel").replaceChildren(top, ...built);
}

const SECTIONS = [
  ["Labels", labelSection],
  ["Attention", (head) => (atlas.samples.length ? attentionSection(head) : [])],
  ["Evidence", evidenceSection],
  ["Spectra", spectraSection],
  ["Positions", kernelSection],
  ["Token pairs", pairsSection],
  ["Directions", (head) => directionList(head.directions, "tokens")],
  ["Contexts", (head) => directionList(head.contexts, "contexts")],
  ["OV probes", probeSection],
  ["Partners", partnerSection],
  ["Effects", (head) => (head.effects.length ? [table(["cause", "effect"], head.effects)] : [])],
];

// --- labels ---

function labelSection(head) {
  return [make("dl", { class: "labels" }, ...CIRCUITS.flatMap((side) => labelsOf(head, side)))];
}

function labelsOf(head, side) {
  const term = make("dt", {}, side.toUpperCase());
  if (!head[side].length) return [term, make("dd", { class: "quiet" }, UNDETERMINED)];
  return [term, ...head[side].map((label) => labelLine(label, side))];
}

function labelLine(label, side) {
  const chip = make("strong", { class: "chip", style: `background: ${colourOf(side, label.name)}` }, words(label.name));
  const said = ` ${label.verdict}, confidence ${number(label.confidence)}${label.note ? ` · ${label.note}` : ""}`;
  return make("dd", {}, chip, said, make("p", { class: "quiet" }, label.establishes));
}

// --- evidence for every type ---

function evidenceSection(head) {
  if (!head.evidence.length) return [];
  const kind = ["score", "z", "p", "conf."];
  const groups = [["", 1], ["weights", 4], ["activations", 4], ["own batch", 1]];
  const over = groups.map(([name, span]) => make("th", { colspan: span, scope: "colgroup", class: "group" }, name));
  const made = table(["type", ...kind, ...kind, "score"], head.evidence.map(evidenceRow));
  made.querySelector("thead").prepend(make("tr", {}, ...over));
  made.classList.add("evidence");
  made.querySelectorAll("tbody tr").forEach((row, place) => markEvidence(row, head.evidence, place));
  return [made, make("p", { class: "quiet" }, "Bold: score beyond its threshold and null beaten over all heads.")];
}

function evidenceRow(one) {
  const of = (score) => (score ? [score.score, score.z, score.p, score.confidence] : [null, null, null, null]);
  const name = make("span", {}, swatchOf(one.side, one.type), words(one.type));
  return [name, ...of(one.weights), ...of(one.activations), one.own];
}

function markEvidence(row, evidence, place) {
  const cells = [...row.children];
  const bold = (found, first) => found && cells.slice(first, first + 4).forEach((one) => one.classList.add("found"));
  bold(evidence[place].weights?.found, 1);
  bold(evidence[place].activations?.found, 5);
  row.classList.toggle("first", evidence[place - 1]?.side !== evidence[place].side);
}

// --- spectra, positions, pairs ---

const BETWEEN_TOKENS = { qk: "W_E W_QK W_Eᵀ", ov: "W_E W_OV W_U" };

function spectraSection(head) {
  return CIRCUITS.map((side) => {
    const spectrum = head.spectra[side];
    const name = side.toUpperCase();
    const summary = table([name, "value", "null", "z"], spectrum.summary);
    const charts = [spectrumChart(name, spectrum), eigenvalueChart(name, spectrum.eigenvalues)];
    const titles = `W_${name}: singular values, the band of random circuits. Eigenvalues of ${BETWEEN_TOKENS[side]}`;
    const heading = make("h4", {}, titles);
    return make("div", { class: "spectra" }, heading, ...charts, summary);
  });
}

function kernelSection({ kernel }) {
  return kernel ? [make("p", { class: "quiet" }, kernel.about), kernelChart(kernel)] : [];
}

function pairsSection(head) {
  const columns = { qk: ["query", "key", "score"], ov: ["attended", "raised", "logit"] };
  const used = CIRCUITS.filter((side) => head.pairs[side].length);
  const tables = used.map((side) => {
    const rows = head.pairs[side].map(([from, to, value]) => [token(from), token(to), value]);
    return make("div", {}, make("h4", {}, side.toUpperCase()), table(columns[side], rows));
  });
  return tables.length ? [make("div", { class: "side-by-side" }, ...tables)] : [];
}

// --- directions and contexts ---

function directionList(directions, kind) {
  let first = 1;
  return directions.map((one, place) => {
    const name = directionName(first, one.size);
    first += one.size;
    const controls = [" beats random controls: ", beaten(one, "query"), ", ", beaten(one, "key")];
    const summary = make("summary", {}, make("strong", {}, name), ` σ ${number(one.sigma)} ·`, ...controls);
    const signs = one.size > 1 ? { "": "top" } : { "+": "top", "−": "bottom" };
    const rows = Object.entries(signs).map(([sign, end]) => {
      return [sign, rankedList(one.query[end], kind), rankedList(one.key[end], kind)];
    });
    const opened = place < 4 ? { open: "" } : {};
    return make("details", { class: `direction ${kind}`, ...opened }, summary, table(["", "queries", "keys"], rows));
  });
}

function directionName(first, size) {
  return size > 1 ? `subspace of ${size} tied directions, ${first} to ${first + size - 1}` : `direction ${first}`;
}

function beaten(direction, side) {
  const share = direction[side].control;
  const quiet = share === null || share < CONVINCING;
  return make("span", { class: quiet ? "quiet" : "" }, `${side} ${percent(share)}`);
}

function rankedList(entries, kind) {
  const written = kind === "contexts" ? context : token;
  const items = entries.map(([text, value]) => withTip(written(text), number(value)));
  return make("span", { class: "ranked" }, ...items);
}

// "left context [token]": the token stands out.
function context(text) {
  const shown = visible(text);
  const start = Math.max(0, shown.lastIndexOf("["));
  return make("span", { class: "context" }, shown.slice(0, start), make("b", {}, shown.slice(start)));
}

// --- OV probes, partners ---

function probeSection(head) {
  if (!head.probes.length) return [];
  const near = (pairs) => pairs.map(([name, cosine]) => `${name} ${number(cosine, 2)}`).join(", ");
  const rows = head.probes.map((one) => {
    return [one.name, one.gain, one.own, near(one.nearest), rankedList(one.tokens, "tokens")];
  });
  return [table(["probe", "gain", "cosine to itself", "nearest", "tokens raised"], rows)];
}

function partnerSection(head) {
  const titles = { receives: "receives from", sends: "sends to" };
  const used = Object.keys(titles).filter((way) => head.partners[way].length);
  const tables = used.map((way) => {
    const rows = head.partners[way].map(([index, path, score, z]) => [headLink(index), pathChip(path), score, z]);
    return make("div", {}, make("h4", {}, titles[way]), table(["head", "by", "score", "z"], rows));
  });
  return tables.length ? [make("div", { class: "side-by-side" }, ...tables)] : [];
}

function headLink(index) {
  const attributes = { type: "button", class: "link", "data-tip": report(index), onclick: () => go({ head: index }) };
  return make("button", attributes, headName(index));
}

const pathChip = (path) => make("span", { class: `path ${path}` }, path.toUpperCase());
