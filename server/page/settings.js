// The settings panel: mode, system prompt, sampling; the theme.

const COMPLETION_TOKENS = 256; // in completion mode, where the API's own default is 16

// Where a field is empty nothing is sent, and the server's default (initial) holds.
const CONTROLS = [
  {name: "system", label: "System prompt", range: "in chat mode", text: true},
  {name: "temperature", label: "Temperature", range: "0 to 2", min: 0, max: 2, step: 0.1, initial: "1"},
  {name: "top_p", label: "Top p", range: "over 0, to 1", over: 0, max: 1, step: 0.05, initial: "1"},
  {name: "top_k", label: "Top k", range: "1 or more; \u22121: off", min: -1, step: 1, whole: true, initial: "off"},
  {name: "min_p", label: "Min p", range: "0 to 1", min: 0, max: 1, step: 0.01, initial: "0"},
  {name: "max_tokens", label: "Max tokens", range: "1 or more", min: 1, step: 1, whole: true},
  {name: "repetition_penalty", label: "Repetition penalty", range: "over 0, to 2", over: 0, max: 2, step: 0.05, initial: "1"},
  {name: "frequency_penalty", label: "Frequency penalty", range: "\u22122 to 2", min: -2, max: 2, step: 0.1, initial: "0"},
  {name: "presence_penalty", label: "Presence penalty", range: "\u22122 to 2", min: -2, max: 2, step: 0.1, initial: "0"},
  {name: "seed", label: "Seed", range: "a whole number of 64 bits", initial: "random"},
  {name: "stop", label: "Stop at", range: "up to 4, one a line; \\n: a new line", text: true},
];

const mode = () => document.querySelector("input[name=mode]:checked").value;

function setMode(value) {
  document.querySelector(`input[name=mode][value=${value}]`).checked = true;
  onSettings();
}

const stopsOf = text => text.split("\n").filter(line => line)
  .map(line => line.replace(/\\([nt\\])/g, (_, c) => ({n: "\n", t: "\t"}[c] ?? c)));

function isValid(control) {
  const {input} = control, value = input.value.trim(), number = Number(value);
  if (control.name === "stop") return stopsOf(input.value).length <= 4;
  if (control.name === "seed") return !value || (/^-?\d{1,19}$/.test(value) && BigInt.asIntN(64, value) === BigInt(value));
  if (control.text) return true;
  if (!value) return !input.validity.badInput;
  return number >= (control.min ?? -Infinity) && number > (control.over ?? -Infinity) && number <= (control.max ?? Infinity) &&
    (!control.whole || Number.isSafeInteger(number));
}

function buildControl(control) {
  const id = "control-" + control.name, numeric = !control.text && control.name !== "seed";
  const common = {id, placeholder: control.initial ?? "", autocomplete: "off", oninput: onSettings};
  control.input = control.text ? make("textarea", {rows: 2, ...common})
    : make("input", {type: numeric ? "number" : "text", step: control.step ?? "", min: control.min ?? control.over ?? "",
                     max: control.max ?? "", ...common});
  control.input.setAttribute("aria-describedby", id + "-range");
  control.reset = button("Reset", () => {
    control.input.value = "";
    onSettings();
    control.input.focus();
  }, {ariaLabel: "Reset " + control.label.toLowerCase()});
  $("controls").append(make("div", {className: "control"}, make("label", {htmlFor: id}, control.label),
    make("span", {className: "range", id: id + "-range"}, control.range), control.input, control.reset));
}

function onSettings() {
  const values = {mode: mode()};
  for (const control of CONTROLS) {
    values[control.name] = control.input.value;
    control.input.ariaInvalid = String(!isValid(control));
    control.reset.disabled = !control.input.value && !control.input.validity.badInput;
  }
  const chat = mode() === "chat";
  CONTROLS[0].input.disabled = !chat;
  CONTROLS.find(c => c.name === "max_tokens").input.placeholder = chat ? "no limit" : COMPLETION_TOKENS;
  $("message").placeholder = chat ? "Message" : "Text to continue";
  showExamples();
  keep("sessionStorage", "settings", values);
}

function restoreSettings() {
  const values = recall("sessionStorage", "settings") ?? {};
  for (const control of CONTROLS) control.input.value = values[control.name] ?? "";
  setMode(values.mode === "completion" ? "completion" : "chat");
}

// The sampling fields of a request; seed stays text, for it may have more digits than a number holds.
function fieldsOf() {
  const fields = {};
  for (const {name, input, text} of CONTROLS) {
    const value = input.value.trim();
    if (name === "system" || !input.value) continue;
    if (name === "stop") fields.stop = stopsOf(input.value).length ? stopsOf(input.value) : undefined;
    else if (value) fields[name] = text || name === "seed" ? value : Number(value);
  }
  return fields;
}

function togglePanel(open) {
  $("settings").hidden = !open;
  $("toggle").ariaExpanded = String(open);
  document.querySelector("main").inert = open && narrow.matches; // it lies over the conversation
  keep("sessionStorage", "panel", open);
}

const narrow = matchMedia("(max-width: 56rem)");
narrow.onchange = () => togglePanel(!narrow.matches && !$("settings").hidden);

const THEMES = ["system", "light", "dark"];
let theme = THEMES.includes(recall("localStorage", "theme")) ? recall("localStorage", "theme") : "system";

function showTheme() {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = "Theme: " + theme;
}
