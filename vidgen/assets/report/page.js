// Elements and texts. What comes from outside goes in as text alone.

const data = JSON.parse(document.getElementById("data").textContent);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((x) => x !== null && x !== ""));
  return node;
}

function svg(tag, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    node.setAttribute(name, value);
  }
  node.textContent = text;
  return node;
}

// Control characters, those that turn the direction of writing, and halves of
// surrogate pairs: shown by number, so that a text can't pose as another.
const HIDDEN = new RegExp(
  "[\\p{Cs}\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f" +
  "\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ufeff]", "gu");

function shown(text, limit = Infinity) {
  const node = el("span", { class: "text", dir: "auto" });
  const part = text.length > limit ? `${text.slice(0, limit)} …` : text;
  let end = 0;
  for (const match of part.matchAll(HIDDEN)) {
    const code = match[0].codePointAt(0).toString(16).toUpperCase();
    const label = `U+${code.padStart(4, "0")}`;
    node.append(part.slice(end, match.index));
    node.append(el("span", { class: "control" }, label));
    end = match.index + match[0].length;
  }
  node.append(part.slice(end));
  return node;
}

const plain = (text) => text.replace(HIDDEN, "�");

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function figure(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 10) return `${Number(seconds.toPrecision(2))} s`;
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

function button(label, name, press, attributes = {}) {
  const titled = { type: "button", title: name, "aria-label": name };
  return el("button", { ...titled, onclick: press, ...attributes }, label);
}

function select(name, options, value, change) {
  const node = el("select", {
    "aria-label": name,
    onchange: () => change(node.value),
  });
  for (const [key, label] of options) {
    node.append(el("option", { value: key, selected: key === value }, label));
  }
  return node;
}

// Buttons of which one is pressed.
function choice(name, options, value, change) {
  const node = el("div", { class: "group", role: "group", "aria-label": name });
  for (const [key, label] of options) {
    const press = () => {
      for (const other of node.children) {
        other.setAttribute("aria-pressed", other === one);
      }
      change(key);
    };
    const one = el("button", {
      type: "button",
      "aria-pressed": String(key === value),
      onclick: press,
    }, label);
    node.append(one);
  }
  return node;
}

function table(head, rows, attributes = {}) {
  const cell = (tag, value) =>
    value instanceof Node && /^T[HD]$/.test(value.nodeName)
      ? value
      : el(tag, {}, value);
  return el("table", attributes,
    el("thead", {}, el("tr", {}, head.map((x) => cell("th", x)))),
    el("tbody", {}, rows));
}
