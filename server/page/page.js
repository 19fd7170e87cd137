// The page as a whole: what its controls do.

function note(text, ...more) {
  $("notices").replaceChildren(make("div", {className: "remark", role: "status"}, text, ...more));
  scrollToEnd();
}

function askKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

function showBusy() {
  const busy = !!running, had = document.activeElement;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  document.body.classList.toggle("busy", busy);
  if (had !== document.activeElement || had === document.body || !had.isConnected || had.closest("[hidden]")) $("message").focus();
}

function showModels() {
  document.title = model + " \u00b7 gptd";
  const length = models.find(m => m.id === model).max_model_len;
  const context = length ? ` \u00b7 ${length.toLocaleString("en")} tokens of context` : "";
  if (models.length === 1) {
    $("model").textContent = model + context;
    return;
  }
  const select = make("select", {ariaLabel: "Model", onchange: () => { model = select.value; showModels(); showExamples(); }});
  for (const m of models) select.append(make("option", {selected: m.id === model}, m.id));
  $("model").replaceChildren(select, context);
}

const DEMO_EXAMPLES = [
  {mode: "chat", prompt: "Tell me a story about a fox.", fields: {}},
  {mode: "completion", prompt: "Once upon a time", fields: {}},
  {mode: "completion", prompt: "12+30=", fields: {temperature: 0, max_tokens: 4, stop: ["\n"]}},
  {mode: "completion", prompt: "Monday, Tuesday,", fields: {temperature: 0, max_tokens: 24}},
];
const EXAMPLES = [
  {mode: "chat", prompt: "Explain how a hash table works, with a short example in C.", fields: {}},
  {mode: "chat", prompt: "Compare TCP and UDP in a table.", fields: {}},
  {mode: "chat", prompt: "Write a short poem about the sea in autumn.", fields: {}},
  {mode: "completion", prompt: "Once upon a time", fields: {}},
  {mode: "completion", prompt: "The three laws of motion are", fields: {}},
];

function showExamples() {
  const fitting = model === "demo" ? DEMO_EXAMPLES : EXAMPLES.filter(e => e.mode === mode());
  $("welcome-text").textContent = model === "demo"
    ? "The demo model has two million parameters: it adds, counts and tells small stories, and knows nothing else."
    : "Ask something below, or begin with one of these.";
  $("examples").replaceChildren(...fitting.map(example => make("li", {}, make("button", {type: "button", onclick: () => {
    if (running) return;
    setMode(example.mode);
    ask(example);
  }}, example.prompt))));
}

const showWelcome = () => { $("welcome").hidden = turns.length > 0; };

function beginEdit(turn) {
  editing = turn;
  $("editing").hidden = false;
  $("message").value = turn.prompt;
  fitMessage();
  $("message").focus();
}

function endEdit() {
  editing = null;
  $("editing").hidden = true;
  $("message").value = "";
  fitMessage();
  $("message").focus();
}

function fitMessage() {
  const {style} = $("message");
  style.height = "auto";
  style.height = $("message").scrollHeight + 2 + "px";
}

function clearTurns() {
  stop();
  running = null;
  turns = [];
  $("turns").replaceChildren();
  if (editing) endEdit();
}

function newChat() {
  const old = turns;
  clearTurns();
  $("notices").replaceChildren();
  if (old.length) note("The conversation is deleted.", button("Undo", () => {
    clearTurns();
    turns = old;
    $("turns").append(...old.map(turn => turn.node));
    $("notices").replaceChildren();
    showAll();
  }));
  showAll();
}

function showAll() {
  showWelcome();
  showBusy();
  save();
  scrollToEnd();
  $("message").focus();
}

$("composer").onsubmit = event => {
  event.preventDefault();
  const prompt = $("message").value, wrong = CONTROLS.find(control => !isValid(control));
  if (running || isBlank(prompt)) return;
  $("notices").replaceChildren();
  if (wrong) {
    togglePanel(true);
    wrong.input.focus();
    note(`${wrong.label}: ${wrong.range}.`);
    return;
  }
  if (editing) {
    turns.splice(turns.indexOf(editing), 1);
    editing.node.remove();
  }
  endEdit();
  ask({mode: mode(), prompt, fields: {}});
};

$("key-form").onsubmit = async event => {
  event.preventDefault();
  const value = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(value)) {
    $("key").ariaInvalid = "true";
    return;
  }
  key = value;
  keep("sessionStorage", "key", key);
  $("key").value = "";
  $("key").ariaInvalid = "false";
  $("key-form").hidden = $("forget").hidden = true;
  $("message").focus();
  await connect();
  $("forget").hidden = !model;
  if (model && turns.at(-1)?.failure?.status === 401) run(turns.at(-1));
};

$("forget").onclick = () => {
  key = model = null;
  keep("sessionStorage", "key", null);
  $("forget").hidden = true;
  connect();
};

$("message").oninput = fitMessage;
$("message").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
document.onkeydown = event => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (editing) endEdit();
  else if (narrow.matches && !$("settings").hidden) $("toggle").click();
};
$("stop").onclick = stop;
$("new").onclick = newChat;
$("cancel").onclick = endEdit;
$("toggle").onclick = () => togglePanel($("settings").hidden);
$("theme").onclick = () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  keep("localStorage", "theme", theme === "system" ? null : theme);
  showTheme();
};
$("modes").onchange = onSettings;
$("reset-all").onclick = () => {
  for (const control of CONTROLS) control.input.value = "";
  onSettings();
};

showTheme();
CONTROLS.forEach(buildControl);
restoreSettings();
togglePanel(recall("sessionStorage", "panel") ?? matchMedia("(min-width: 75rem)").matches);
$("forget").hidden = !key;
turns = (recall("sessionStorage", "turns") ?? []).map(saved => new Turn(saved));
showWelcome();
scrollToEnd();
connect();
$("message").focus();
