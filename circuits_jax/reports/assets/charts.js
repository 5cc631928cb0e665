// Small charts in SVG: a line against a band, points in the complex plane, bars by offset; the values below each.

const BOX = { width: 320, height: 190, left: 44, right: 10, top: 10, bottom: 34 };

function ticks(low, high, most = 5) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: count }, (_, place) => (first + place) * step);
}

// Bounds that hold all finite values, and are never empty.
function bounds(values, start = []) {
  const known = [...start, ...values.filter((value) => value !== null && Number.isFinite(Number(value)))];
  const [low, high] = [Math.min(...known), Math.max(...known)];
  if (!known.length) return [0, 1];
  return low === high ? [low - (low === 0 ? 0 : 0.5), high + 0.5] : [low, high];
}

const scale = ([low, high], from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);

function axes(label, xName, yName, xBounds, yBounds, box = BOX) {
  const [bottom, right] = [box.height - box.bottom, box.width - box.right];
  const x = scale(xBounds, box.left, right);
  const y = scale(yBounds, bottom, box.top);
  const viewBox = `0 0 ${box.width} ${box.height}`;
  const root = draw("svg", { viewBox, class: "chart", role: "img", "aria-label": label });
  for (const value of ticks(...yBounds, 4)) {
    root.append(draw("line", { x1: box.left, x2: right, y1: y(value), y2: y(value), class: "rule" }));
    root.append(draw("text", { x: box.left - 6, y: y(value) + 3.5, class: "end" }, number(value)));
  }
  for (const value of ticks(...xBounds)) {
    root.append(draw("text", { x: x(value), y: bottom + 14, class: "middle" }, number(value)));
  }
  root.append(draw("text", { x: (box.left + right) / 2, y: box.height - 4, class: "middle name" }, xName));
  const turned = `translate(10 ${(box.top + bottom) / 2}) rotate(-90)`;
  root.append(draw("text", { transform: turned, class: "middle name" }, yName));
  return { root, x, y, bottom };
}

const points = (pairs) => pairs.map((pair) => pair.map((value) => value.toFixed(1)).join(",")).join(" ");

// For those whom hovering does not serve.
function withValues(root, header, rows) {
  const label = root.getAttribute("aria-label");
  return make("figure", { class: "charted" }, root, fold(label, false, [`${label}, as a table`], table(header, rows)));
}

// Whole columns can be hovered, not only the marks in them.
function columnHints(plot, xs, texts) {
  const width = xs.length > 1 ? Math.abs(plot.x(xs[1]) - plot.x(xs[0])) : 20;
  xs.forEach((value, place) => {
    const column = { x: plot.x(value) - width / 2, y: BOX.top, width, height: plot.bottom - BOX.top, class: "hit" };
    plot.root.append(withTip(draw("rect", column), texts[place]));
  });
}

function spectrumChart(name, { sigma, low, high }) {
  const top = bounds([...sigma, ...high], [0]);
  const places = sigma.map((_, place) => place + 1);
  const plot = axes(`Singular values of ${name}`, "rank", "singular value", bounds(places, [1]), top);
  const line = (values) => values.map((value, place) => [plot.x(place + 1), plot.y(value)]);
  plot.root.append(draw("polygon", { points: points([...line(low), ...line(high).reverse()]), class: "band" }));
  plot.root.append(draw("polyline", { points: points(line(sigma)), class: "line" }));
  for (const [x, y] of line(sigma)) plot.root.append(draw("circle", { cx: x, cy: y, r: 1.8, class: "dot" }));
  const texts = sigma.map((value, place) => {
    return `σ ${place + 1}: ${number(value)}\nnull ${number(low[place])} to ${number(high[place])}`;
  });
  columnHints(plot, places, texts);
  const rows = sigma.map((value, place) => [String(place + 1), value, low[place], high[place]]);
  return withValues(plot.root, ["rank", "σ", "null from", "to"], rows);
}

function eigenvalueChart(name, eigenvalues) {
  const most = Math.max(...eigenvalues.map(([re, im]) => Math.hypot(re, im)), 1e-12);
  const box = { ...BOX, width: 196, left: 40 }; // square, for equal scales
  const ends = [-1.08 * most, 1.08 * most];
  const plot = axes(`Eigenvalues of ${name}`, "real", "imaginary", ends, ends, box);
  plot.root.classList.add("plane");
  plot.root.append(draw("circle", { cx: plot.x(0), cy: plot.y(0), r: plot.x(most) - plot.x(0), class: "circle" }));
  plot.root.append(draw("line", { x1: plot.x(0), x2: plot.x(0), y1: plot.y(-most), y2: plot.y(most), class: "rule" }));
  for (const [re, im] of eigenvalues) {
    const dot = draw("circle", { cx: plot.x(re), cy: plot.y(im), r: 3, class: "dot open" });
    plot.root.append(withTip(dot, `λ = ${number(re)} ${im < 0 ? "−" : "+"} ${number(Math.abs(im))}i`));
  }
  return withValues(plot.root, ["real", "imaginary"], eigenvalues);
}

function kernelChart({ offset, value, chance = [] }) {
  const yBounds = bounds([...value, ...chance], [0]);
  const xName = offset.some((place) => place < 0) ? "positions back (negative: ahead)" : "positions back";
  const plot = axes("Attention by offset", xName, "attention (dashed: uniform)", bounds(offset), yBounds);
  offset.forEach((place, index) => {
    const [x, y] = [plot.x(place), plot.y(value[index] ?? 0)];
    plot.root.append(draw("line", { x1: x, x2: x, y1: plot.y(0), y2: y, class: "stem" }));
    plot.root.append(draw("circle", { cx: x, cy: y, r: 1.8, class: "dot" }));
  });
  const uniform = chance.map((share, index) => [plot.x(offset[index]), plot.y(share ?? 0)]);
  plot.root.append(draw("polyline", { points: points(uniform), class: "chance" }));
  const texts = offset.map((place, index) => {
    const where = `${Math.abs(place)} ${place < 0 ? "ahead" : "back"}`;
    return `${where}: ${number(value[index])}\nuniform ${number(chance[index])}`;
  });
  columnHints(plot, offset, texts);
  const rows = offset.map((place, index) => [number(place), value[index], chance[index] ?? null]);
  return withValues(plot.root, ["positions back", "attention", "uniform"], rows);
}
