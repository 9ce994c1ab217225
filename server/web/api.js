// What the page asks of the server. Addresses are relative, so that the page works behind a prefix too.

/** A failure whose message is one sentence for the reader. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function ask(path, key, options = {}) {
  const headers = { ...options.headers };
  if (/[^\x21-\x7e]/.test(key)) throw new Failure("An API key has letters, digits and signs of ASCII only.", 401);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (!response.ok) throw await failureOf(response, key);
  return response;
}

async function failureOf(response, key) {
  const body = await response.json().catch(() => null);
  let message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  if (response.status === 401) {
    message = key ? "The server does not accept this API key." : "This server asks for an API key.";
  }
  const seconds = response.headers.get("Retry-After");
  if (response.status === 429 && seconds) message = `${message.replace(/\.$/, "")} (in ${seconds} s).`;
  return new Failure(message, response.status);
}

export async function getJson(path, key) {
  return (await ask(path, key)).json();
}

export async function getText(path, key) {
  return (await ask(path, key)).text();
}

/** Ask one width, and yield `{text, tokens, promptTokens, kvFormat}` for every chunk of its answer. */
export async function* streamAnswer({ width, mode, prompt, maxTokens, temperature, key, signal }) {
  const question = mode === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const response = await ask(mode === "chat" ? "v1/chat/completions" : "v1/completions", key, {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json", "X-Bit-Width": String(width) },
    body: JSON.stringify({
      ...question,
      max_tokens: maxTokens,
      temperature,
      seed: 0, // with a temperature, too, only the width should make a difference
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
  });
  const kvFormat = response.headers.get("X-KV-Format");
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message);
    const [choice] = chunk.choices;
    const text = choice?.delta?.content ?? choice?.text ?? "";
    yield { text, tokens: chunk.usage.completion_tokens, promptTokens: chunk.usage.prompt_tokens, kvFormat };
  }
  throw new Failure("The connection ended before the answer did.");
}

/** The data of each server-sent event in a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield part.replace(/^data: ?/, "");
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
