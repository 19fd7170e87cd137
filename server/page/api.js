// The API of the server that the page came from.

let key = recall("sessionStorage", "key");
let models = []; // of /v1/models
let model = null; // the name of the one in use

class Failure extends Error {
  constructor(message, more) { super(message); Object.assign(this, {status: 0, retryAfter: 0, param: null}, more); }
}

function secondsOf(header) {
  if (!header) return 0;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return seconds > 0 ? Math.ceil(seconds) : 0;
}

async function failureOf(response) {
  const {status} = response;
  let message = "status " + status, param = null;
  try {
    ({error: {message, param}} = await response.json());
  } catch { /* not from gptd: a proxy before it */ }
  const words = status === 401 ? "The server asks for an API key" : status === 429 || status === 503
    ? "The server cannot take this now" : status >= 500 ? "The server failed" : "The server refused this";
  return new Failure(`${words}: ${message}`, {status, param, retryAfter: secondsOf(response.headers.get("Retry-After"))});
}

// Addresses are relative: the server may lie behind a proxy's prefix.
async function request(path, options = {}) {
  const headers = {"Content-Type": "application/json", ...(key ? {Authorization: "Bearer " + key} : {})};
  let response;
  try {
    response = await fetch(path, {...options, headers, cache: "no-store", credentials: "same-origin"});
  } catch {
    throw new Failure("The server cannot be reached.");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

// The data of a stream's events.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {value, done} = await reader.read().catch(() => { throw new Failure("The connection broke off."); });
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function loadModels() {
  const {data} = await (await request("v1/models")).json();
  models = data;
  model = models.some(m => m.id === model) ? model : models[0].id;
  showModels();
  showExamples();
}

// At the start, and when there is a new key.
async function connect() {
  $("notices").replaceChildren();
  try {
    await loadModels();
  } catch (failure) {
    $("model").textContent = "not connected";
    if (failure.status === 401) askKey();
    else $("notices").append(failureNode(failure, connect));
  }
}

function messagesOf(turn) {
  const system = CONTROLS[0].input.value.trim(), messages = system ? [{role: "system", content: system}] : [];
  for (const t of turns.slice(0, turns.indexOf(turn))) {
    if (t.mode !== "chat" || !t.answer) continue;
    messages.push({role: "user", content: t.prompt}, {role: "assistant", content: t.answer});
  }
  return [...messages, {role: "user", content: turn.prompt}];
}

function bodyOf(turn) {
  const {seed, max_tokens, ...fields} = {...fieldsOf(), ...turn.fields};
  const body = {model, stream: true, stream_options: {include_usage: true}, ...fields};
  if (turn.mode === "chat") Object.assign(body, {messages: messagesOf(turn), max_completion_tokens: max_tokens});
  else Object.assign(body, {prompt: turn.prompt, max_tokens: max_tokens ?? COMPLETION_TOKENS});
  const text = JSON.stringify(body);
  return seed === undefined ? text : `${text.slice(0, -1)},"seed":${BigInt(seed)}}`;
}

// Asks, and passes on what comes until the stream's end.
async function receive(turn, signal) {
  if (!model) await loadModels();
  turn.began = performance.now();
  const path = turn.mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const response = await request(path, {method: "POST", body: bodyOf(turn), signal});
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data), choice = event.choices?.[0];
    if (event.error) throw new Failure("The answer broke off: " + event.error.message);
    turn.usage = event.usage ?? turn.usage;
    turn.reason = choice?.finish_reason ?? turn.reason;
    const text = choice?.delta?.content ?? choice?.text;
    if (text) turn.push(text);
  }
  throw new Failure("The answer broke off: the stream ended early.");
}
