// Requests to the service, with the token of this tab; errors become a Refusal whose message can be shown as it is.

const TOKEN = "manyicl-token";
// Called when the service wants a token; returns whether the user gave one.
let askForToken = async () => false;

export class Refusal extends Error {
  constructor(problem, status, retryAfter) {
    super(problem.detail || problem.title || `The service answered ${status}.`);
    this.status = status;
    this.kind = (problem.type || "").replace("urn:manyicl:", "");
    this.faults = problem.faults || [];
    this.retryAfter = retryAfter;
  }
}

export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;
export const keepToken = (token) => (token ? sessionStorage.setItem(TOKEN, token) : sessionStorage.removeItem(TOKEN));
export const onTokenNeeded = (ask) => (askForToken = ask);
export const taskPath = (name) => `v1/tasks/${encodeURIComponent(name)}`;

// Sends a request and returns its response, asking for a token as often as the user gives one.
export async function send(method, path, body, { signal } = {}) {
  for (;;) {
    const headers = {};
    const token = sessionStorage.getItem(TOKEN);
    if (token) headers.Authorization = `Bearer ${token}`;
    if (body !== undefined && !(body instanceof FormData)) headers["Content-Type"] = "application/json";
    let response;
    try {
      const content = body === undefined || body instanceof FormData ? body : JSON.stringify(body);
      response = await fetch(path, { method, headers, body: content, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal({ detail: "The service cannot be reached. Is it still running?" }, 0);
    }
    if (response.ok) return response;
    const refusal = await readRefusal(response);
    if (response.status === 401 && (await askForToken(refusal.message, token !== null))) continue;
    throw refusal;
  }
}

export async function ask(method, path, body, options) {
  const response = await send(method, path, body, options);
  return response.status === 204 ? null : response.json();
}

async function readRefusal(response) {
  const problem = await response.json().catch(() => ({}));
  return new Refusal(problem, response.status, Number(response.headers.get("Retry-After")) || null);
}

// Yields the events of a stream as [name, content].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const field = (name) => block.split("\n").filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim()).join("\n");
      if (field("data")) yield [field("event"), JSON.parse(field("data"))];
    }
  }
}
