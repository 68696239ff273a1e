// One answer as it comes: its reasoning, its text, and the account of it.

import { ask, events } from "./wire.js";
import { count, made, pace } from "./words.js";

export class Column {
  // `size` is null where the server chooses.
  constructor(size, hueClass) {
    this.size = size;
    this.element = made("article", `card answer ${hueClass}`);
    this.name = made("h3", "", size ?? "auto");
    this.phase = made("span", "quiet phase", "waiting");
    const head = made("header");
    const title = made("span", "title");
    title.append(made("span", "dot"), this.name);
    head.append(title, this.phase);
    this.thoughts = made("details", "thoughts");
    this.thoughts.hidden = true;
    this.summary = made("summary", "", "reasoning");
    this.thinking = made("div", "text");
    this.thoughts.append(this.summary, this.thinking);
    this.text = made("div", "text said");
    this.text.tabIndex = 0; // it scrolls, so keys must reach it
    this.text.setAttribute("role", "region");
    this.text.setAttribute("aria-label", `answer of ${size ?? "the size that is chosen"}`);
    this.account = made("p", "account quiet");
    this.why = made("p", "why quiet");
    this.element.append(head, this.thoughts, this.text, this.account, this.why);
    this.speaks = false; // the reasoning is over
    this.pending = [new Grown(this.thinking), new Grown(this.text)];
    this.seen = { tokens: 0, first: null, last: null, pieces: 0 };
  }

  // Asks and shows; never throws.
  async run(body, signal) {
    this.began = performance.now();
    this.element.setAttribute("aria-busy", "true");
    try {
      const reply = await ask("v1/chat/completions", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
        signal,
      });
      for await (const event of events(reply)) this.take(event);
      this.end(this.finish === "length" ? "cut at the limit" : "done");
    } catch (error) {
      if (signal.aborted) this.end("stopped");
      else this.fail(error);
    }
    this.element.removeAttribute("aria-busy");
  }

  take(event) {
    for (const { delta, finish_reason: finish } of event.choices) {
      this.seen.last = performance.now();
      this.seen.first ??= this.seen.last;
      this.seen.pieces += 1;
      this.finish = finish ?? this.finish;
      const thought = delta?.reasoning ?? delta?.reasoning_content;
      if (thought) this.think(thought);
      if (delta?.content) this.say(delta.content);
    }
    if (event.usage) this.seen.tokens = event.usage.completion_tokens;
    if (event.elastic) this.report(event.elastic);
    // pieces may come by the hundred a second: they are shown once a frame
    this.frame ??= requestAnimationFrame(() => this.show());
  }

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    for (const each of this.pending) each.show();
    this.tell();
  }

  think(text) {
    if (this.thoughts.hidden) {
      this.thoughts.hidden = false;
      this.thoughts.open = true;
      this.phase.textContent = "thinking";
    }
    this.pending[0].add(text);
  }

  say(text) {
    if (!this.speaks) {
      this.speaks = true;
      this.phase.textContent = "answering";
      this.thoughts.open = false; // it stays one click away
      text = text.replace(/^\n+/, "");
    }
    this.pending[1].add(text);
  }

  report(elastic) {
    if (this.size === null) this.name.textContent = `auto → ${elastic.sizes.join(" → ")}`;
    this.why.textContent = elastic.routed_because.join("; ");
  }

  tell() {
    const { tokens, pieces, first, last } = this.seen;
    const many = tokens || pieces; // a piece is about a token, until the server has counted
    if (first === null) return;
    const told = [
      `${count(many)} ${many === 1 ? "token" : "tokens"}`,
      `first after ${((first - this.began) / 1000).toFixed(2)} s`,
    ];
    if (many > 1 && last > first) told.push(`${pace((1000 * (many - 1)) / (last - first))} tokens/s`);
    // a figure stays with its unit
    this.account.textContent = told.map((each) => each.replaceAll(" ", "\u00a0")).join(" · ");
  }

  end(phase) {
    this.show();
    this.phase.textContent = phase;
    this.element.dataset.ended = "true";
  }

  fail(error) {
    this.end("failed");
    // fetch has a TypeError for all that happens on the way
    const why = error instanceof TypeError ? "no answer from the server" : error.message;
    this.text.append(made("p", "bad", why));
  }
}

// Text that grows, and is followed to its end unless the reader has scrolled away from it.
class Grown {
  constructor(element) {
    this.element = element;
    this.node = document.createTextNode("");
    this.more = "";
    element.append(this.node);
  }

  add(text) {
    this.more += text;
  }

  show() {
    if (!this.more) return;
    const { scrollHeight, scrollTop, clientHeight } = this.element;
    this.node.appendData(this.more);
    this.more = "";
    if (scrollHeight - scrollTop - clientHeight < 24) this.element.scrollTop = this.element.scrollHeight;
  }
}
