// The server's interface: its state, and answers as they are made.

export class Refused extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export async function health() {
  const response = await fetch("/healthz");
  return response.json();
}

// Gives each delta of the answer to `hear`; ends when the answer does.
export async function ask(body, key, signal, hear) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    const text = JSON.stringify({ ...body, stream: true });
    response = await fetch("/v1/chat/completions", { method: "POST", headers, body: text, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?", 0, "unreachable");
  }
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Refused(said.error?.message || `The server answered ${response.status}.`, response.status, said.error?.code);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("The connection broke before the answer was whole.", 0, "broken");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message, 0, chunk.error.code);
      if (chunk.choices.length) hear(chunk.choices[0].delta, chunk.choices[0].finish_reason);
    }
  }
}
