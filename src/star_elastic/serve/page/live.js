// What the server does now, each second while somebody looks.

import { emptyChart, History } from "./history.js";
import { ask, Refused } from "./wire.js";
import { bytes, count, duration, made, pace, parameters } from "./words.js";

const EVERY_MS = 1000;
const HUES = 6; // in page.css
const at = (id) => document.getElementById(id);

export class Live {
  // `onOffer(names)` when model or sizes are others than before, `onLocked(why)` when a key is
  // wanted.
  constructor(onOffer, onLocked) {
    this.onOffer = onOffer;
    this.onLocked = onLocked;
    this.history = new History();
    this.rows = new Map(); // size -> its row
    this.offered = null; // model and sizes
    this.turn = 0; // of the loop that runs: there is one at most
    document.addEventListener("visibilitychange", () => this.start());
  }

  // Looks again and again, from now on.
  async start() {
    const turn = ++this.turn;
    this.aborting?.abort();
    while (turn === this.turn && !document.hidden) {
      if (!(await this.look(turn))) return;
      await new Promise((done) => setTimeout(done, EVERY_MS));
    }
  }

  // Whether looking again makes sense.
  async look(turn) {
    this.aborting = new AbortController();
    try {
      const reply = await ask("status", { signal: this.aborting.signal });
      const status = await reply.json();
      if (turn === this.turn) this.show(status);
    } catch (error) {
      if (turn !== this.turn) return false;
      if (error instanceof Refused && error.status === 401) {
        say("locked", "locked");
        this.onLocked(error.message);
        return false;
      }
      say("gone", "no answer; trying again");
    }
    return true;
  }

  show(status) {
    document.title = `${status.model} · star-elastic`;
    at("model").textContent = status.model;
    at("uptime").textContent = `up ${duration(status.seconds_up)}`;
    if (status.draining) say("draining", "draining");
    else if (status.ready) say("ready", "ready");
    else say("gone", "not ready");
    const { load, memory } = status;
    at("speed").textContent = pace(load.tokens_per_second);
    at("running").textContent = count(load.running);
    at("queued").textContent = count(load.queued);
    at("cache").textContent = `${Math.round(100 * load.cache_used)} %`;
    at("device-figure").hidden = load.device_used === null;
    at("device").textContent = `${Math.round(100 * load.device_used)} %`;
    const parts = ["weights", "copies", "cache", "process"].filter((name) => memory[name]);
    at("memory").replaceChildren(...parts.map((name) => figure(name, bytes(memory[name]))));
    this.showSizes(status.model, status.sizes);
    showRequests(status.requests);
  }

  showSizes(model, sizes) {
    this.history.add(sizes, performance.now() / 1000);
    const names = sizes.map((size) => size.name);
    const offered = JSON.stringify([model, names]);
    if (offered !== this.offered) {
      this.offered = offered;
      this.rows = new Map(names.map((name, place) => [name, emptyRow(name, place)]));
      at("sizes").replaceChildren(...[...this.rows.values()].map((row) => row.element));
      this.onOffer(names);
    }
    for (const size of sizes) this.fill(this.rows.get(size.name), size);
  }

  fill(row, size) {
    const speed = this.history.now(size.name);
    row.state.textContent = size.ready ? "" : "not ready";
    row.active.textContent = parameters(size.active_params);
    row.live.textContent = count(size.requests);
    row.tokens.textContent = count(size.tokens);
    row.time.textContent = size.time_per_token_ms === null ? "–" : size.time_per_token_ms.toFixed(1);
    row.speed.textContent = speed === null ? "–" : pace(speed);
    this.history.draw(row.chart, size.name);
  }
}

export function hue(place) {
  return `hue-${place % HUES}`;
}

function say(state, text) {
  const element = at("state");
  element.dataset.state = state;
  // a status that is said again each second would be read aloud each second
  if (element.textContent !== text) element.textContent = text;
}

function figure(name, text) {
  const pair = made("span", "pair");
  pair.append(made("b", "", text), ` ${name}`);
  return pair;
}

function emptyRow(name, place) {
  const element = made("tr", hue(place));
  const head = made("th", "name");
  head.scope = "row";
  const state = made("span", "bad");
  head.append(made("span", "dot"), made("span", "", name), " ", state);
  const cells = {};
  element.append(head);
  for (const [field, label] of Object.entries({
    active: "active",
    live: "live",
    tokens: "tokens",
    time: "ms a token",
  })) {
    cells[field] = made("td", "number");
    cells[field].dataset.label = label;
    element.append(cells[field]);
  }
  const wide = made("td", "chart");
  const chart = emptyChart();
  const speed = made("span", "speed", "–");
  wide.append(chart, speed);
  element.append(wide);
  return { element, state, chart, speed, ...cells };
}

function showRequests(requests) {
  at("requests-table").hidden = !requests.length;
  at("no-requests").hidden = requests.length > 0;
  at("requests").replaceChildren(...requests.map(requestRow));
}

function requestRow(each) {
  const row = made("tr");
  const cells = [
    ["size", each.sizes.join(" → ") || each.size, "name"],
    ["phase", each.phase, "phase"],
    ["prompt", count(each.prompt_tokens), "number"],
    ["tokens", `${count(each.tokens)} / ${count(each.max_tokens)}`, "number"],
    ["seconds", each.seconds.toFixed(1), "number"],
    ["why", each.why.join("; "), "why"],
  ];
  for (const [label, text, kind] of cells) {
    const cell = made("td", kind, text);
    cell.dataset.label = label;
    row.append(cell);
  }
  return row;
}
