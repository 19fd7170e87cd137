// Markdown as models write it, into elements: no text from outside is ever read as HTML, and what is malformed stays text.
// Paragraphs, headings, emphasis, code, lists, quotes, tables, rules, links to http, https and mailto. In linear time.

// ---- within a paragraph ----

const MAX_EMPHASIS = 32; // open at once in one paragraph
const LINK_TARGET = /\(([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)?)(?:[ \t]+"[^"\n]*")?\)/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]*)>/y;
const BARE_URL = /https?:\/\/[^\s<>"`*|\]]+/y;

function safeUrl(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function matchAt(pattern, text, i) {
  pattern.lastIndex = i;
  return pattern.exec(text);
}

// Turns one paragraph's text into a flat list of {text}, {open, href} and {close: true}, which nest. Every character is
// looked at a bounded number of times: an opening mark is kept until its closing one comes, and stays text if none does.
class Inline {
  constructor(text) {
    this.text = text;
    this.out = [];
    this.stack = []; // marks that may still be closed: {mark, at: index in out}
    this.open = {"**": [], "*": [], "__": [], "_": [], "~~": [], "[": []}; // mark -> indices in stack
    this.nEmphasis = 0; // in stack
    this.ticks = new Map(); // length of a run of backquotes -> where such runs are, and which is next
    for (const run of text.matchAll(/`+/g)) {
      if (!this.ticks.has(run[0].length)) this.ticks.set(run[0].length, {at: [], next: 0});
      this.ticks.get(run[0].length).at.push(run.index);
    }
  }

  say(text) { if (text) this.out.push({text}); }

  parse() {
    const special = /[\\`*_~[\]<h]/g;
    let i = 0;
    while (i < this.text.length) {
      special.lastIndex = i;
      const found = special.exec(this.text);
      const at = found ? found.index : this.text.length;
      this.say(this.text.slice(i, at));
      i = found ? at + this.special(at, found[0]) : at;
    }
    return this.out;
  }

  // Returns how many characters it took.
  special(i, c) {
    if (c === "\\") {
      const escaped = /[!-/:-@[-`{-~]/.test(this.text[i + 1] ?? "");
      this.say(escaped ? this.text[i + 1] : c);
      return escaped ? 2 : 1;
    }
    if (c === "`") return this.code(i);
    if (c === "[") return this.push("[", "[");
    if (c === "]") return this.link(i);
    if (c === "<" || c === "h") return this.address(i, c);
    return this.emphasis(i, c);
  }

  code(i) {
    let end = i;
    while (this.text[end] === "`") end++;
    const runs = this.ticks.get(end - i) ?? {at: [], next: 0}; // none: the rest of a run whose first tick was escaped
    while (runs.next < runs.at.length && runs.at[runs.next] < end) runs.next++;
    if (runs.next === runs.at.length) {
      this.say(this.text.slice(i, end));
      return end - i;
    }
    const close = runs.at[runs.next];
    let text = this.text.slice(end, close);
    if (text.startsWith(" ") && text.endsWith(" ") && !isBlank(text)) text = text.slice(1, -1);
    this.out.push({open: "code"}, {text}, {close: true});
    return close + (end - i) - i;
  }

  push(mark, text) {
    this.open[mark].push(this.stack.length);
    this.stack.push({mark, at: this.out.length});
    this.out.push({text});
    if (mark !== "[") this.nEmphasis++;
    return text.length;
  }

  // Ends the innermost open mark; marks within that are still open stay text.
  pop(mark, tag, href) {
    const index = this.open[mark].at(-1);
    while (this.stack.length > index) {
      const inner = this.stack.pop();
      if (inner.mark !== "[") this.nEmphasis--;
      if (this.open[inner.mark].at(-1) === this.stack.length) this.open[inner.mark].pop();
      if (this.stack.length === index) this.out[inner.at] = {open: tag, href};
    }
    this.out.push({close: true});
  }

  link(i) {
    if (this.open["["].length) {
      const target = matchAt(LINK_TARGET, this.text, i + 1);
      const href = target && safeUrl(target[1]);
      if (href) {
        this.pop("[", "a", href);
        this.open["["] = []; // no links in links
        return 1 + target[0].length;
      }
      this.open["["].pop();
    }
    this.say("]");
    return 1;
  }

  address(i, c) {
    const found = c === "<" ? matchAt(AUTOLINK, this.text, i)
      : /\w/.test(this.text[i - 1] ?? "") ? null : matchAt(BARE_URL, this.text, i);
    let url = found?.[c === "<" ? 1 : 0] ?? c, taken = found?.[0].length ?? 1;
    if (found && c === "h") {
      const ends = url.includes("(") ? ".,:;!?'_~" : ".,:;!?'_~)";
      while (ends.includes(url[taken - 1])) taken--;
      url = url.slice(0, taken);
    }
    const href = found && safeUrl(url);
    if (href) this.out.push({open: "a", href}, {text: url}, {close: true});
    else this.say(this.text.slice(i, i + taken));
    return taken;
  }

  emphasis(i, c) {
    let n = 0;
    while (this.text[i + n] === c) n++;
    const before = this.text[i - 1] ?? " ", after = this.text[i + n] ?? " ";
    const inWord = c === "_" && /\w/.test(before) && /\w/.test(after);
    let left = n;
    if (/\S/.test(before) && !inWord) left = this.closeMarks(c, left);
    if (/\S/.test(after) && !inWord) left = this.openMarks(c, left);
    this.say(c.repeat(left));
    return n;
  }

  closeMarks(c, left) {
    const tags = {"**": "strong", "__": "strong", "*": "em", "_": "em", "~~": "s"};
    for (;;) {
      const one = this.open[c]?.at(-1) ?? -1, two = (left > 1 ? this.open[c + c].at(-1) : undefined) ?? -1;
      if (!left || (one < 0 && two < 0)) return left;
      const mark = two > one ? c + c : c;
      this.pop(mark, tags[mark]);
      left -= mark.length;
    }
  }

  openMarks(c, left) {
    while (left && this.nEmphasis < MAX_EMPHASIS) {
      const mark = left > 1 ? c + c : c;
      if (!this.open[mark]) break;
      left -= this.push(mark, mark);
    }
    return left;
  }
}

function appendInline(parent, text) {
  const path = [parent];
  for (const part of new Inline(text).parse()) {
    const top = path.at(-1);
    if (part.close) {
      path.pop();
    } else if (!part.open) {
      top.append(part.text);
    } else if (part.open === "a" && path.some(e => e.tagName === "A")) {
      path.push(top); // an address in a link's text
    } else {
      const element = make(part.open);
      if (part.href) Object.assign(element, {href: part.href, rel: "noopener noreferrer", target: "_blank", title: part.href});
      top.append(element);
      path.push(element);
    }
  }
}

// ---- blocks ----

const MAX_DEPTH = 8; // of lists and quotes in each other
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+([^]*)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^ {0,3}([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;

const isBlank = line => !/\S/.test(line);

function isRule(line) {
  const marks = line.replace(/[ \t\r]/g, "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

const startsBlock = line => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line) ||
  /^ {0,3}([-*+]|1[.)])[ \t]+\S/.test(line);

function indentOf(line) {
  let columns = 0;
  for (const c of line) {
    if (c !== " " && c !== "\t") break;
    columns += c === "\t" ? 4 : 1;
  }
  return columns;
}

function dedent(line, columns) {
  let i = 0;
  for (let gone = 0; gone < columns && (line[i] === " " || line[i] === "\t"); i++) gone += line[i] === "\t" ? 4 : 1;
  return line.slice(i);
}

function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
  if (cells.length > 1 && !cells.at(-1)) cells.pop();
  return cells;
}

function isTable(lines, i) {
  if (i + 1 >= lines.length || !lines[i].includes("|") || !lines[i + 1].includes("-")) return false;
  const rule = cellsOf(lines[i + 1]);
  return rule.length === cellsOf(lines[i]).length && rule.every(cell => /^:?-+:?$/.test(cell));
}

function codeBlock(lines, i, fence) {
  const closes = line => line.trim().length >= fence[1].length && line.trim() === fence[1][0].repeat(line.trim().length);
  const indent = indentOf(lines[i]);
  let end = i + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const text = lines.slice(i + 1, end).map(line => dedent(line, indent)).join("\n");
  const language = fence[2].trim().split(/\s/)[0];
  const copy = button("Copy", () => copyText(text, copy), {ariaLabel: "Copy the code"});
  const label = language ? "Code, " + language : "Code";
  const body = make("pre", {tabIndex: 0, role: "group", ariaLabel: label}, make("code", {}, text));
  const bar = make("div", {}, make("span", {}, language || "code"), copy);
  return {node: make("div", {className: "code"}, bar, body), end: end + 1};
}

function quoteBlock(lines, i, depth) {
  let end = i;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const node = make("blockquote");
  appendBlocks(node, lines.slice(i, end).map(line => line.replace(QUOTE, "")), depth + 1);
  return {node, end};
}

// The lines of one item from line i on, without its mark and indent; and where it ends.
function itemLines(lines, i) {
  const mark = ITEM.exec(lines[i]), indent = indentOf(lines[i]);
  const inner = [lines[i].slice(mark[0].length)];
  let end = i + 1, width = 0;
  for (let j = end; j < lines.length; j++) {
    if (isBlank(lines[j])) continue;
    const goesOn = j === end && !isBlank(inner.at(-1)) && !startsBlock(lines[j]) && !ITEM.test(lines[j]);
    if (indentOf(lines[j]) < indent + 2 && !goesOn) break;
    width ||= goesOn ? 0 : Math.min(mark[0].length, indentOf(lines[j]));
    for (; end < j; end++) inner.push("");
    inner.push(dedent(lines[j], width));
    end++;
  }
  return {inner, end};
}

function listBlock(lines, i, depth) {
  const first = ITEM.exec(lines[i])[1], ordered = first.length > 1;
  const node = ordered ? make("ol", {start: parseInt(first, 10)}) : make("ul");
  for (let j = i; j < lines.length; j++) {
    if (isBlank(lines[j])) continue;
    const mark = ITEM.exec(lines[j]);
    if (!mark || mark[1].at(-1) !== first.at(-1) || isRule(lines[j])) break;
    const {inner, end} = itemLines(lines, j);
    const item = make("li");
    appendBlocks(item, inner, depth + 1);
    const only = item.firstElementChild;
    if (only?.tagName === "P") { // items lie close together
      while (only.firstChild) item.insertBefore(only.firstChild, only);
      only.remove();
    }
    node.append(item);
    i = end;
    j = end - 1;
  }
  return {node, end: i};
}

function tableBlock(lines, i) {
  const row = (line, tag) => {
    const node = make("tr");
    for (const text of cellsOf(line)) appendInline(node.appendChild(make(tag)), text);
    return node;
  };
  const table = make("table", {}, make("thead", {}, row(lines[i], "th"))), body = make("tbody");
  let end = i + 2;
  for (; end < lines.length && lines[end].includes("|"); end++) body.append(row(lines[end], "td"));
  table.append(body);
  return {node: make("div", {className: "table", tabIndex: 0, role: "group", ariaLabel: "Table"}, table), end};
}

function paragraph(lines, i, plain) {
  let end = i + 1;
  while (end < lines.length && !isBlank(lines[end]) && (plain || !startsBlock(lines[end]))) end++;
  const node = make("p");
  appendInline(node, lines.slice(i, end).join("\n"));
  return {node, end};
}

// The block that begins at line i, which is not blank: its node, and the line after it.
function nextBlock(lines, i, depth) {
  const line = lines[i];
  if (depth > MAX_DEPTH) return paragraph(lines, i, true);
  const fence = FENCE.exec(line);
  if (fence) return codeBlock(lines, i, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const node = make("h" + Math.min(heading[1].length + 2, 6));
    appendInline(node, heading[2].trim());
    return {node, end: i + 1};
  }
  if (isRule(line)) return {node: make("hr"), end: i + 1};
  if (QUOTE.test(line)) return quoteBlock(lines, i, depth);
  if (ITEM.test(line)) return listBlock(lines, i, depth);
  if (isTable(lines, i)) return tableBlock(lines, i);
  return paragraph(lines, i, false);
}

function appendBlocks(parent, lines, depth) {
  for (let i = 0; i < lines.length;) {
    if (isBlank(lines[i])) {
      i++;
      continue;
    }
    const block = nextBlock(lines, i, depth);
    parent.append(block.node);
    i = block.end;
  }
}
