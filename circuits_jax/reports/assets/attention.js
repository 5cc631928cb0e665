// One head's attention on the sample texts: the text, shaded by where a query token looks, and the whole pattern.

const reading = { sample: 0, query: Infinity }; // stay the same from head to head

function attentionSection(head) {
  const box = make("div", { class: "attention" });
  const show = () => box.replaceChildren(...attentionParts(head));
  if (atlas.samples.length < 2) {
    show();
    return [box];
  }
  const choose = (event) => {
    Object.assign(reading, { sample: Number(event.target.value), query: Infinity });
    show();
  };
  const options = atlas.samples.map((tokens, place) => {
    const selected = place === reading.sample ? { selected: "" } : {};
    const start = tokens.slice(0, 8).join("").slice(0, 50);
    return make("option", { value: place, ...selected }, `${place + 1}: ${start}…`);
  });
  show();
  return [make("label", {}, "text ", make("select", { id: "sample", onchange: choose }, ...options)), box];
}

function attentionParts(head) {
  const tokens = atlas.samples[reading.sample];
  const length = tokens.length;
  const pattern = patternOf(head, length);
  const readout = make("p", { class: "readout" });
  const marker = make("div", { class: "marker" });
  const buttons = tokens.map((text, place) => {
    const events = { onpointerenter: () => look(place), onfocus: () => look(place), onclick: () => pin(place) };
    const attributes = { type: "button", tabindex: -1, "aria-label": `${place}: ${visible(text)}` };
    return token(text, { ...attributes, ...events }, "button");
  });
  const name = (place) => `${place} “${visible(tokens[place])}”`;
  const pinned = () => Math.min(reading.query, length - 1);

  function look(query) {
    const row = pattern.subarray(query * length, (query + 1) * length);
    buttons.forEach((button, key) => {
      button.style.setProperty("--weight", `${(row[key] / 2.55).toFixed(1)}%`);
      button.classList.toggle("query", key === query);
    });
    marker.style.top = `${(100 * query) / length}%`;
    const strongest = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 4).filter((key) => row[key]);
    const seen = strongest.map((key) => `${name(key)} ${number(row[key] / 255, 2)}`);
    readout.textContent = `${name(query)} looks at ${seen.join(", ") || "nothing"}`;
  }

  function pin(place) {
    reading.query = place;
    buttons.forEach((button, key) => button.classList.toggle("pinned", key === place));
    look(place);
  }

  const heat = heatMap(pattern, length);
  heat.addEventListener("pointermove", (event) => {
    const box = heat.getBoundingClientRect();
    const at = (position, size) => Math.max(0, Math.min(length - 1, Math.floor((position / size) * length)));
    const [query, key] = [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
    heat.dataset.tip = `${name(query)} → ${name(key)}: ${number(pattern[query * length + key] / 255, 2)}`;
    look(query);
  });
  const text = make("div", { class: "text", role: "group", "aria-label": "Query tokens" }, ...buttons);
  for (const area of [text, heat]) area.addEventListener("pointerleave", () => look(pinned()));
  buttons[pinned()].setAttribute("tabindex", 0);
  buttons[pinned()].classList.add("pinned");
  rove(text, () => buttons, 1);
  look(pinned());
  const square = make("div", { class: "square" }, heat, marker);
  const figure = make("figure", {}, square, make("figcaption", {}, "query ↓  key →"));
  return [make("div", {}, text, readout), figure];
}

// Samples are padded to the longest; what comes back is [length,length] of the chosen one.
function patternOf(head, length) {
  const longest = Math.max(...atlas.samples.map((tokens) => tokens.length));
  const bytes = Uint8Array.from(atob(head.patterns), (character) => character.charCodeAt(0));
  const pattern = new Uint8Array(length * length);
  for (let query = 0; query < length; query++) {
    const start = (reading.sample * longest + query) * longest;
    pattern.set(bytes.subarray(start, start + length), query * length);
  }
  return pattern;
}

// The weights are the opacity of one colour, so that light and dark need no redrawing.
function heatMap(pattern, length) {
  const size = { width: length, height: length };
  const canvas = make("canvas", { ...size, role: "img", "aria-label": "Attention pattern", "data-tip": "" });
  const image = new ImageData(length, length);
  pattern.forEach((weight, place) => image.data.set([46, 124, 204, weight], 4 * place));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
