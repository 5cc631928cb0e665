// The panel: all that is known of one head. A section without data is left out.

const CIRCUITS = ["qk", "ov"];
const ANY_QUERY = "any query"; // no token: the query bias

function drawPanel() {
  const head = state().heads[view.head];
  const name = headName(view.head);
  const title = make("h2", {}, `Head ${name}`, state().name && make("span", { class: "quiet" }, ` ${state().name}`));
  const made = SECTIONS.map(([key, heading, build]) => [heading, build(head), captionOf(key)]);
  const sections = made.filter(([, parts]) => parts.length);
  const built = sections.map(([heading, parts, caption]) => {
    return make("section", {}, make("h3", {}, heading), ...caption, ...parts);
  });
  const jumps = sections.map(([heading], place) => {
    return make("button", { type: "button", onclick: () => built[place].scrollIntoView() }, heading);
  });
  const top = make("div", { class: "top" }, title, make("nav", { "aria-label": "Sections" }, ...jumps));
  byId("panel").replaceChildren(top, ...built);
}

function captionOf(key) {
  const text = atlas.captions?.[key];
  return text ? [make("p", { class: "quiet" }, text)] : [];
}

const SECTIONS = [
  ["labels", "Labels", labelSection],
  ["attention", "Attention", (head) => (atlas.samples.length ? attentionSection(head) : [])],
  ["evidence", "Evidence", evidenceSection],
  ["spectra", "Spectra", spectraSection],
  ["kernel", "Offsets", ({ kernel }) => (kernel ? [kernelChart(kernel)] : [])],
  ["pairs", "Token pairs", pairsSection],
  ["directions", "Directions", (head) => directionList(head.directions, "tokens")],
  ["places", "Positions", (head) => directionList(head.places ?? [], "places")],
  ["contexts", "Contexts", (head) => directionList(head.contexts, "contexts")],
  ["probes", "OV probes", probeSection],
  ["partners", "Partners", partnerSection],
  ["effects", "Effects", (head) => (head.effects.length ? [table(["cause", "effect"], head.effects)] : [])],
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

const SMALLEST_P = 1e-38; // float32 holds nothing smaller in full

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
  for (const [kind, first] of [["weights", 1], ["activations", 5]]) {
    const { found, p } = evidence[place][kind] ?? { found: false, p: null };
    bold(found, first);
    if (p !== null && p < SMALLEST_P) cells[first + 2].textContent = "<1e-38";
  }
  row.classList.toggle("first", evidence[place - 1]?.side !== evidence[place].side);
}

// --- spectra, pairs ---

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

function pairsSection(head) {
  const columns = { qk: ["query", "key", "score"], ov: ["attended", "changed", "logit"] };
  const used = CIRCUITS.filter((side) => head.pairs[side].length);
  const tables = used.map((side) => {
    const rows = head.pairs[side].map(([from, to, value]) => [pairEnd(from), token(to), value]);
    const made = table(columns[side], rows);
    const lowest = rows.findIndex(([, , value], place) => value < 0 && rows[place - 1]?.[2] >= 0);
    made.querySelectorAll("tbody tr")[lowest]?.classList.add("divided");
    return make("div", {}, make("h4", {}, side.toUpperCase()), made);
  });
  return tables.length ? [make("div", { class: "side-by-side" }, ...tables)] : [];
}

const pairEnd = (text) => (text === ANY_QUERY ? make("span", { class: "quiet" }, text) : token(text));

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
