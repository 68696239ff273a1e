// Tokens a second of each size over the last two minutes, as lines.

const SVG = "http://www.w3.org/2000/svg";
const KEPT_S = 120;
const GAP_S = 4; // between two looks: the page was hidden, or the server gone
const WIDTH = 240;
const HEIGHT = 36;

export class History {
  constructor() {
    this.last = null; // {at, tokens: size -> made so far}
    this.paces = new Map(); // size -> [[seconds, tokens a second or null], ...]
  }

  // Takes note of `sizes` of the status; `at` in seconds.
  add(sizes, at) {
    const tokens = new Map(sizes.map((size) => [size.name, size.tokens]));
    const passed = this.last ? at - this.last.at : Infinity;
    for (const name of this.paces.keys()) if (!tokens.has(name)) this.paces.delete(name);
    for (const [name, made] of tokens) {
      const before = this.last?.tokens.get(name);
      const known = before !== undefined && made >= before && passed < GAP_S;
      const line = this.paces.get(name) ?? [];
      line.push([at, known ? (made - before) / passed : null]);
      while (line[0][0] < at - KEPT_S) line.shift();
      this.paces.set(name, line);
    }
    this.last = { at, tokens };
  }

  now(name) {
    return this.paces.get(name)?.at(-1)?.[1] ?? null;
  }

  // The greatest pace of any size: one scale for all, so that lines compare.
  get greatest() {
    let most = 1;
    for (const line of this.paces.values()) for (const [, pace] of line) most = Math.max(most, pace ?? 0);
    return most;
  }

  draw(svg, name) {
    const line = this.paces.get(name) ?? [];
    const end = this.last?.at ?? 0;
    const x = (at) => (WIDTH * (1 - (end - at) / KEPT_S)).toFixed(1);
    const y = (pace) => (HEIGHT - 1 - (HEIGHT - 4) * (pace / this.greatest)).toFixed(1);
    const [area, stroke] = svg.children;
    let along = "";
    let filled = "";
    for (const run of runs(line)) {
      const points = run.map(([at, pace]) => `${x(at)},${y(pace)}`).join("L");
      along += `M${points}`;
      filled += `M${x(run[0][0])},${HEIGHT}L${points}L${x(run.at(-1)[0])},${HEIGHT}Z`;
    }
    stroke.setAttribute("d", along);
    area.setAttribute("d", filled);
  }
}

export function emptyChart() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true"); // the figure beside it says what matters
  for (const kind of ["area", "line"]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", kind);
    svg.append(path);
  }
  return svg;
}

function* runs(line) {
  let run = [];
  for (const point of line) {
    if (point[1] === null) {
      if (run.length) yield run;
      run = [];
    } else run.push(point);
  }
  if (run.length) yield run;
}
