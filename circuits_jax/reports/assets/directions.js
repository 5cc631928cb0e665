// Directions of a head: what lies at either end of them, among tokens, positions or texts.

const CONVINCING = 0.95; // share of the random controls; below it a direction is written quietly
const OPEN_AT_FIRST = 4;

function directionList(directions, kind) {
  let first = 1;
  return directions.map((one, place) => {
    const name = directionName(first, one.size);
    first += one.size;
    const controls = [" beats random controls: ", beaten(one, "query"), ", ", beaten(one, "key")];
    const summary = [make("strong", {}, name), ` σ ${number(one.sigma)} ·`, ...controls];
    const signs = one.size > 1 ? { "": "top" } : { "+": "top", "−": "bottom" };
    const rows = Object.entries(signs).map(([sign, end]) => {
      return [sign, rankedList(one.query[end], kind), rankedList(one.key[end], kind)];
    });
    const made = fold(`${kind} ${place}`, place < OPEN_AT_FIRST, summary, table(["", "queries", "keys"], rows));
    made.classList.add("direction", kind);
    return made;
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

// Each with its value beside it, the last of an entry.
function rankedList(entries, kind) {
  const items = entries.map((entry) => {
    const written = kind === "contexts" ? context(entry) : token(entry[0]);
    return make("span", { class: "item" }, written, make("small", { class: "quiet" }, number(entry.at(-1))));
  });
  return make("span", { class: "ranked" }, ...items);
}

function context([before, text]) {
  return make("span", { class: "context" }, before && visible(before), token(text, {}, "b"));
}
