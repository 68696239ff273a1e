// Requests to the server that this page came from: the key, errors, streams of events.

let key = null; // never stored

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(text) {
  key = text || null;
}

// Addresses are relative: the page may live below a prefix of a proxy.
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  const reply = await fetch(path, { ...options, headers, cache: "no-store" });
  if (!reply.ok) throw new Refused(await reason(reply), reply.status);
  return reply;
}

async function reason(reply) {
  try {
    const { error } = await reply.json();
    if (error?.message) return String(error.message).slice(0, 500);
  } catch {
    // not in OpenAI's shape
  }
  return `the server answered with status ${reply.status}`;
}

// The objects of a stream of events; returns at [DONE], throws if it breaks off before.
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the answer broke off");
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message ?? "the answer failed");
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
