// What was asked and answered, as it comes.

const scroller = $("scroller");
const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
const scrollToEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

// Draws at animation frames, and only what may still change: Markdown from the beginning of its last block, plain text
// by what is new. It rests ten times as long as drawing took, so that a long block costs no more than a tenth of the time.
class AnswerView {
  constructor(node, markdown) {
    Object.assign(this, {node, markdown, rest: "", open: [], next: 0, timer: 0, frame: 0});
    node.className = markdown ? "answer" : "answer plain";
    node.replaceChildren();
  }

  push(text) {
    this.rest += text;
    this.timer ||= setTimeout(() => { this.frame = requestAnimationFrame(() => this.draw()); }, this.next - performance.now());
  }

  finish() {
    clearTimeout(this.timer);
    cancelAnimationFrame(this.frame);
    this.draw();
  }

  draw() {
    const began = performance.now(), follow = atEnd();
    if (this.markdown) this.drawBlocks();
    else this.node.append(this.rest);
    if (!this.markdown) this.rest = "";
    if (follow) scrollToEnd();
    this.timer = 0;
    this.next = performance.now() + 10 * (performance.now() - began);
  }

  // A block is over when another one has begun with a whole line: what comes later cannot change it.
  drawBlocks() {
    const lines = this.rest.split("\n");
    let last = 0;
    for (const node of this.open) node.remove();
    this.open = [];
    for (let i = 0; i < lines.length;) {
      if (isBlank(lines[i])) {
        i++;
        continue;
      }
      if (i < lines.length - 1) {
        last = i;
        this.open = [];
      }
      const block = nextBlock(lines, i, 0);
      this.node.append(block.node);
      this.open.push(block.node);
      i = block.end;
    }
    this.rest = lines.slice(last).join("\n");
  }
}

// ---- turns ----

let turns = [];
let running = null; // {turn, abort}
let editing = null; // the turn that the next message replaces

class Turn {
  constructor(saved) {
    Object.assign(this, {mode: "chat", prompt: "", fields: {}, answer: "", status: "done", usage: null, reason: null,
                         began: 0, first: 0, last: 0, failure: null}, saved);
    const edit = button("Edit", () => beginEdit(this));
    const head = make("div", {className: "head"}, make("h2", {}, this.mode === "chat" ? "You" : "Text"),
      make("span", {className: "actions"}, edit));
    const asked = make("div", {className: "asked"}, head, make("div", {className: "text"}, this.prompt));
    this.node = make("li", {className: "turn"}, asked);
    this.title = make("h2");
    this.output = make("div");
    this.below = make("div");
    this.node.append(this.title, this.output, this.below);
    $("turns").append(this.node);
    this.show();
  }

  toJSON() {
    const {mode, prompt, fields, answer, status, usage, reason, began, first, last} = this;
    return {mode, prompt, fields, answer, status: status === "running" ? "stopped" : status, usage, reason, began, first, last};
  }

  begin() {
    Object.assign(this, {answer: "", status: "running", usage: null, reason: null, failure: null, first: 0});
    this.show();
  }

  push(text) {
    this.last = performance.now();
    this.first ||= this.last;
    this.answer += text;
    this.view.push(text);
  }

  end(status, failure) {
    Object.assign(this, {status, failure});
    this.view.finish();
    this.showEnd();
  }

  show() {
    this.title.textContent = this.mode === "chat" ? model ?? "Answer" : "Continuation";
    this.view = new AnswerView(this.output, this.mode === "chat");
    if (this.answer) this.view.push(this.answer);
    if (this.status !== "running") this.view.finish();
    this.showEnd();
  }

  showEnd() {
    const follow = atEnd(), busy = this.status === "running";
    this.output.ariaBusy = String(busy);
    this.below.replaceChildren();
    if (busy) return;
    const copy = button("Copy", () => copyText(this.answer, copy), {ariaLabel: "Copy the answer"});
    const again = button("Regenerate", () => run(this));
    if (this.failure) this.below.append(failureNode(this.failure, () => run(this)));
    this.below.append(make("div", {className: "below"}, make("span", {className: "figures"}, figuresOf(this)),
      ...(this.answer ? [copy] : []), ...(this.failure ? [] : [make("span", {className: "actions"}, again)])));
    if (follow) scrollToEnd();
  }
}

function figuresOf(turn) {
  const {usage, first, last, began} = turn, n = usage?.completion_tokens, parts = [];
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`${n.toLocaleString("en")} token${n === 1 ? "" : "s"}`,
                        `prompt ${usage.prompt_tokens.toLocaleString("en")}${cached ? ` (${cached.toLocaleString("en")} cached)` : ""}`);
  if (n > 8 && last > first) parts.push(`${Math.round((n - 1) / (last - first) * 1000).toLocaleString("en")} tokens/s`);
  if (first) parts.push(`first token after ${Math.max(1, Math.round(first - began)).toLocaleString("en")} ms`);
  if (turn.status === "stopped") parts.push("stopped");
  if (turn.reason === "length") parts.push("ended by the limit of tokens");
  for (const [name, value] of Object.entries(turn.fields)) parts.push(`${name} ${JSON.stringify(value)}`);
  return parts.join(" \u00b7 ");
}

// What went wrong, in words, and a button to try again when the server says that it may be.
function failureNode(failure, retry) {
  const again = make("button", {type: "button", onclick: retry});
  const until = performance.now() + failure.retryAfter * 1000;
  const tick = () => {
    const seconds = Math.ceil((until - performance.now()) / 1000);
    again.disabled = seconds > 0;
    again.textContent = seconds > 0 ? `Retry in ${seconds} s` : "Retry";
    if (seconds > 0) setTimeout(tick, 250);
  };
  tick();
  return make("div", {className: "failure", role: "alert"}, failure.message, again);
}

const lacksTemplate = (turn, failure) => turn.mode === "chat" && failure.status === 400 && !failure.param &&
  failure.message.includes("no chat template");

async function run(turn) {
  if (running) return;
  const abort = new AbortController();
  running = {turn, abort};
  turn.begin();
  showBusy();
  save();
  let status = "done", failure = null;
  try {
    await receive(turn, abort.signal);
  } catch (e) {
    status = abort.signal.aborted ? "stopped" : "failed";
    if (status === "failed") failure = e instanceof Failure ? e : new Failure("The answer was not understood: " + e.message);
  }
  if (running?.turn === turn) running = null;
  if (failure && lacksTemplate(turn, failure)) return withoutChat(turn);
  turn.end(status, failure);
  showBusy();
  save();
  if (failure?.status === 401) askKey();
  if (!failure) $("status").textContent = (status === "done" ? "Answer: " : "Stopped: ") + turn.answer;
}

// Falls back to completion: the model has no chat template.
function withoutChat(turn) {
  const fields = {mode: "completion", prompt: turn.prompt, fields: turn.fields};
  turns.splice(turns.indexOf(turn), 1);
  turn.node.remove();
  setMode("completion");
  note("This model has no chat template, so it cannot chat. It continues your text instead (completion mode).");
  return ask(fields);
}

function ask(fields) {
  const turn = new Turn({...fields, status: "running"});
  turns.push(turn);
  showWelcome();
  scrollToEnd();
  return run(turn);
}

function stop() { running?.abort.abort(); }

const save = () => keep("sessionStorage", "turns", turns.length ? turns : null);
