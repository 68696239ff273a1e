// The page at `/`: one prompt for several sizes side by side, beside what the server does now.

import { Column } from "./column.js";
import { hue, Live } from "./live.js";
import { ask, useKey } from "./wire.js";
import { made } from "./words.js";

const AUTO = ""; // the value of its box; no size has an empty name
const AT_ONCE = 4; // answers: browsers open six connections to a server, and the status needs one
const at = (id) => document.getElementById(id);

let model = null;
let stopping = null; // an AbortController while answers come
let tried = false; // has a key been given?

const live = new Live(offer, lock);
at("api").textContent = new URL("v1", document.baseURI).href;
live.start();

// The boxes of who may answer; what was checked stays so.
async function offer(names) {
  const before = new Set(chosen());
  const boxes = [box("auto", AUTO, "", before.has(AUTO))];
  names.forEach((name, place) => {
    const first = !before.size && (place === 0 || place === names.length - 1);
    boxes.push(box(name, name, hue(place), before.has(name) || first));
  });
  at("choices").replaceChildren(at("choices").firstElementChild, ...boxes);
  await learn();
}

// The model's id, and how long an answer may be.
async function learn() {
  try {
    const { data } = await (await ask("v1/models")).json();
    model = data[0].id;
    const longest = data[0].max_model_len;
    if (longest) {
      at("limit").max = longest;
      if (Number(at("limit").value) > longest / 2) at("limit").value = Math.floor(longest / 2);
    }
  } catch (error) {
    at("ask-error").textContent = error.message;
  }
}

function box(text, value, hueClass, checked) {
  const label = made("label", `choice ${hueClass}`);
  const input = made("input");
  input.type = "checkbox";
  input.name = "size";
  input.value = value;
  input.checked = checked;
  label.append(input, made("span", "dot"), made("span", "", text));
  return label;
}

function chosen() {
  return [...at("choices").querySelectorAll("input:checked")].map((input) => input.value);
}

at("ask-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("ask-error").textContent = "";
  const sizes = chosen();
  if (stopping) return;
  if (model === null) await learn();
  if (model === null) return;
  if (!sizes.length) {
    at("ask-error").textContent = "Choose who is to answer.";
    return;
  }
  const columns = sizes.map((size) => {
    const place = [...live.rows.keys()].indexOf(size);
    return new Column(size === AUTO ? null : size, size === AUTO ? "" : hue(place));
  });
  at("answers").replaceChildren(...columns.map((column) => column.element));
  await answerAll(columns);
});

async function answerAll(columns) {
  stopping = new AbortController();
  const { signal } = stopping;
  busy(true);
  const messages = [{ role: "user", content: at("prompt").value }];
  const most = Number(at("limit").value);
  const waiting = [...columns];
  const take = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) {
      const name = next.size === null ? model : `${model}:${next.size}`;
      await next.run({ model: name, messages, max_tokens: most }, signal);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, take));
  stopping = null;
  busy(false);
}

function busy(is) {
  at("stop").disabled = !is;
  at("ask").disabled = is;
  if (!is && document.activeElement === document.body) at("prompt").focus({ preventScroll: true });
}

at("stop").addEventListener("click", () => stopping?.abort());

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopping?.abort();
});

at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    at("ask-form").requestSubmit();
  }
});

function lock(message) {
  at("key-form").hidden = false;
  at("main").hidden = model === null; // nothing to see yet
  at("key-error").textContent = tried ? message : "";
  at("key").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  tried = true;
  useKey(at("key").value.trim());
  at("key").value = "";
  at("key-form").hidden = true;
  at("main").hidden = false;
  live.start();
});
