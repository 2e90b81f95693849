// Requests to the server, and its errors in words.

const KEY = "gptjax.key";
export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (key) => sessionStorage.setItem(KEY, key.trim());

export class ServerError extends Error {
  constructor(message, {needsKey = false, seconds = null} = {}) {
    super(message);
    this.needsKey = needsKey;
    this.seconds = seconds;  // after which the server asks to be tried again
  }
}

async function request(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const options = body === undefined ? {headers, signal} : {method: "POST", headers, body: JSON.stringify(body), signal};
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server can't be reached. Nothing is lost: start it again, then try again.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = "";
  try {
    const body = await response.json();
    message = body.error?.message ?? body.detail ?? "";
  } catch { /* no JSON: the status says it */ }
  const said = message ? ` The server says: ${message}` : "";
  const wait = Number(response.headers.get("Retry-After"));
  switch (response.status) {
    case 401: case 403:
      return new ServerError(apiKey() ? `The server refuses this API key.${said}` : `The server wants an API key.${said}`, {needsKey: response.status === 401});
    case 404: return new ServerError(`This is not there (any more).${said}`);
    case 413: return new ServerError(`This is too much for the server.${said}`);
    case 429: case 503:
      return new ServerError(`The server is busy.${wait ? ` It asks to wait ${wait} s.` : ""}${message && response.status === 503 ? said : ""}`, {seconds: wait || 2});
    default:
      if (response.status >= 500) return new ServerError(`The server failed (${response.status}).${said}`);
      return new ServerError(message || `The server refused this (${response.status}).`);
  }
}

// The JSON that the server answers with; a GET without a body.
export async function ask(path, body, signal) {
  const response = await request(path, body, signal);
  return response.json();
}

// Yields the chunks of an answer as they come (server-sent events); throws a ServerError where it breaks off.
export async function* stream(path, body, signal) {
  const response = await request(path, {...body, stream: true}, signal);
  const decoder = new TextDecoder();  // keeps the first bytes of a character until its last ones come
  const reader = response.body.getReader();
  let text = "", ended = false;
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The connection broke off. What had come is kept.");
      }
      text += read.done ? decoder.decode() : decoder.decode(read.value, {stream: true});
      const lines = text.split(/\r\n|\n|\r(?!$)/);
      text = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") { ended = true; return; }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(`The answer failed. The server says: ${chunk.error.message ?? chunk.error}`);
        yield chunk;
      }
      if (read.done) break;
    }
    if (!ended) throw new ServerError("The answer broke off before its end. What had come is kept.");
  } finally {
    reader.cancel().catch(() => {});  // also where the reader of this stream stops
  }
}

let facts;
export const pageFacts = () => facts ??= ask("/page.json").catch(() => ({label: false, tools: [], max_calls: 0, images: false}));
export async function showLabelling(link) { link.hidden = !(await pageFacts()).label; }
