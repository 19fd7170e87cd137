// What the other scripts share: elements, storage, the clipboard.
"use strict";

const $ = id => document.getElementById(id);

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const button = (label, onclick, properties) => make("button", {type: "button", className: "quiet", onclick, ...properties}, label);

// Storage may be switched off: then what is kept ends with the page.
function recall(storage, name) {
  try {
    return JSON.parse(window[storage].getItem("gptd." + name));
  } catch {
    return null;
  }
}

function keep(storage, name, value) {
  try {
    if (value === null) window[storage].removeItem("gptd." + name);
    else window[storage].setItem("gptd." + name, JSON.stringify(value));
  } catch { /* full, or switched off */ }
}

async function copyText(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page that came over plain HTTP from another machine has no clipboard
    const area = make("textarea", {value: text, className: "unseen"});
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    from.focus();
  }
  from.textContent = "Copied";
  setTimeout(() => { from.textContent = "Copy"; }, 1500);
}
