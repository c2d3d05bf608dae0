// Small helpers to make elements. Texts of users only ever become text nodes, never markup.

export const byId = (id) => document.getElementById(id);

// make("p", {class: "muted", onclick: f}, "text", child, ...): attributes; a function is a listener, false leaves one out.
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined && value !== null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const numbers = new Intl.NumberFormat("en");
export const count = (number, one, many = `${one}s`) => `${numbers.format(number)} ${number === 1 ? one : many}`;
export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
// A probability: never 0 % or 100 % unless it is.
export function chanceOf(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  if (share < 1 && share > 0.999) return "> 99.9 %";
  return percent(share, 1);
}

// What a screen reader hears of a change that the eye sees.
export function say(text) {
  byId("status").textContent = "";
  setTimeout(() => (byId("status").textContent = text), 50);
}

// A field for an answer: a list of the task's labels, or free text if it has none. Returns the field.
export function answerField(id, labels, value = "") {
  if (!labels.length) return make("textarea", { id, rows: 1, required: true }, value);
  const all = labels.includes(value) || !value ? labels : [value, ...labels];
  const field = make("select", { id, required: true });
  if (!value) field.append(make("option", { value: "" }, "Choose…"));
  for (const label of all) field.append(make("option", { value: label, selected: label === value }, label));
  return field;
}
