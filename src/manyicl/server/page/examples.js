// The list of a task's examples: pages of it, and every change to one.

import { ask, taskPath } from "./api.js";
import { answerField, byId, chanceOf, count, make, say } from "./dom.js";

const PER_PAGE = 20;
const PER_REQUEST = 1000;
// So many examples are looked through for those that were shown; of more, only the number is said.
const MOST_SOUGHT = 20000;
let start = 0;
let kept = { name: "", version: 0, byId: new Map(), isWhole: false };

export const restart = () => (start = 0);

// Returns the examples by id; fewer than all if there are very many. They are kept until the task changes.
export async function allExamples(task) {
  if (kept.name !== task.name || kept.version !== task.version) kept = { name: task.name, version: task.version, byId: new Map(), isWhole: false };
  const mine = kept;
  while (!mine.isWhole && mine.byId.size < MOST_SOUGHT) {
    const page = await ask("GET", `${taskPath(task.name)}/examples?start=${mine.byId.size}&limit=${PER_REQUEST}`);
    for (const example of page.examples) mine.byId.set(example.id, example);
    if (!page.examples.length || mine.byId.size >= page.total) mine.isWhole = true;
  }
  return mine.byId;
}

// Shows one page. context: {task, mayChange, change}, where change(words, request) does a request and shows the rest anew.
export async function showExamples(context) {
  const { task } = context;
  if (start >= task.num_examples) start = Math.max(0, Math.floor((task.num_examples - 1) / PER_PAGE) * PER_PAGE);
  const page = await ask("GET", `${taskPath(task.name)}/examples?start=${start}&limit=${PER_PAGE}`);
  byId("examples").replaceChildren(...page.examples.map((example) => rowOf(example, context)));
  byId("range").textContent = page.total ? `${start + 1} to ${start + page.examples.length} of ${page.total.toLocaleString("en")}` : "none yet";
  byId("earlier").disabled = start === 0;
  byId("later").disabled = start + PER_PAGE >= page.total;
}

export function turn(pages, context) {
  start = Math.max(0, start + pages * PER_PAGE);
  return showExamples(context).then(() => say(`Examples ${byId("range").textContent}`));
}

const shorten = (text) => (text.length > 60 ? `${text.slice(0, 57)}…` : text);

function rowOf(example, context) {
  const text = make("div", {}, make("div", { class: "text" }, example.input), make("div", { class: "sub" }, make("span", { class: "tag" }, example.answer)));
  const row = make("li", { "data-id": example.id }, text);
  if (!context.mayChange) return row;
  const edit = make("button", { type: "button", class: "quiet", "aria-label": `Correct: ${shorten(example.input)}`, onclick: () => openEditor(row, example, context) }, "Correct");
  const remove = make("button", { type: "button", class: "quiet danger", "aria-label": `Delete: ${shorten(example.input)}`, onclick: () => removeExample(example, context) }, "Delete");
  row.append(make("div", { class: "tools" }, edit, remove));
  return row;
}

function openEditor(row, example, context) {
  row.querySelector(".edit")?.remove();
  const button = row.querySelector(".tools button");
  const id = `answer-of-${example.id}`;
  const field = answerField(id, context.task.labels, example.answer);
  const close = () => {
    form.remove();
    button.focus();
  };
  const submit = (event) => {
    event.preventDefault();
    correct(example, field.value, context).then((went) => went && document.querySelector(`#examples [data-id="${example.id}"] button`)?.focus());
  };
  const buttons = [make("button", { class: "main" }, "Save"), make("button", { type: "button", onclick: close }, "Cancel")];
  const form = make("form", { class: "edit", onsubmit: submit, onkeydown: (event) => event.key === "Escape" && close() }, make("label", { for: id }, "Right answer"), make("div", { class: "row" }, make("span", {}, field), ...buttons));
  row.append(form);
  field.focus();
}

export function correct(example, answer, context) {
  const path = `${taskPath(context.task.name)}/examples/${example.id ?? example.example_id}`;
  return context.change(`Corrected: the answer is now “${answer}”.`, () => ask("PATCH", path, { answer }));
}

async function removeExample(example, context) {
  if (!(await context.confirm("Delete this example?", `“${shorten(example.input)}”, answer “${example.answer}”. This cannot be undone.`, "Delete"))) return;
  await context.change("Example deleted.", () => ask("DELETE", `${taskPath(context.task.name)}/examples/${example.id ?? example.example_id}`));
  byId("examples-head").focus();
}

// Shows the examples whose answer looks wrong, and those that are nearly the same.
export async function showDoubts(measured, context) {
  const { suspects, duplicates } = measured;
  byId("doubts").hidden = !suspects.length && !duplicates.num_examples;
  byId("suspects").replaceChildren();
  byId("duplicates").replaceChildren();
  if (suspects.length) {
    const rows = suspects.map((suspect) => suspectRow(suspect, context));
    byId("suspects").append(make("p", {}, `After many examples the model finds another answer much likelier than the given one for ${count(suspects.length, "example")}. Look at them: the label may be wrong, or the example hard.`), ...fold(rows, "suspects"));
  }
  if (!duplicates.num_examples) return;
  const words = `${count(duplicates.num_examples, "example has", "examples have")} nearly the same input as another one.`;
  const known = await allExamples(context.task);
  const pairs = duplicates.pairs.map((pair) => pair.map((id) => known.get(id))).filter(([one, other]) => one && other);
  byId("duplicates").replaceChildren(make("h3", {}, "Near copies"), make("p", {}, words), ...fold(pairs.map((pair) => pairRow(pair, context)), "pairs"));
}

function fold(rows, what) {
  const first = make("ul", { class: "list" }, ...rows.slice(0, 5));
  if (rows.length <= 5) return [first];
  return [first, make("details", {}, make("summary", {}, `${rows.length - 5} more ${what}`), make("ul", { class: "list" }, ...rows.slice(5)))];
}

// After a change the doubts are found anew, with the curve.
const focusDoubts = () => byId(byId("doubts").hidden ? "expect-head" : "doubts-head").focus();

function suspectRow(suspect, context) {
  const odds = Math.exp(Math.min(suspect.nats_gap, 20));
  const times = odds > 1000 ? "more than 1,000" : Math.round(odds).toLocaleString("en");
  const sub = make("div", { class: "sub" }, "given ", make("span", { class: "tag" }, suspect.answer), ", more likely ", make("span", { class: "tag" }, suspect.likelier), ` (${times} times)`);
  const row = make("li", {}, make("div", {}, make("div", { class: "text" }, suspect.input), sub));
  if (!context.mayChange) return row;
  const about = shorten(suspect.input);
  const fix = make("button", { type: "button", "aria-label": `Change to ${suspect.likelier}: ${about}`, onclick: () => correct(suspect, suspect.likelier, context).then(focusDoubts) }, `Change to “${shorten(suspect.likelier)}”`);
  const remove = make("button", { type: "button", class: "quiet danger", "aria-label": `Delete: ${about}`, onclick: () => removeExample(suspect, context) }, "Delete");
  row.append(make("div", { class: "tools" }, fix, remove));
  return row;
}

function pairRow(pair, context) {
  const lines = pair.map((example) => [make("div", { class: "text" }, example.input), make("div", { class: "sub" }, make("span", { class: "tag" }, example.answer))]);
  const row = make("li", {}, make("div", {}, ...lines.flat()));
  const second = pair[1];
  if (context.mayChange) row.append(make("div", { class: "tools" }, make("button", { type: "button", class: "quiet danger", "aria-label": `Delete the second: ${shorten(second.input)}`, onclick: () => removeExample(second, context) }, "Delete the second")));
  return row;
}

// The examples that were shown before an input, in their order.
export async function shotsOf(reply, task) {
  const known = await allExamples(task);
  const items = reply.shots.map((id) => known.get(id)).map((example) => make("li", {}, ...(example ? [example.input, make("span", { class: "sub" }, ` → ${example.answer}`)] : [make("span", { class: "sub" }, "an example that is no longer there")])));
  return make("ol", { class: "shown", tabindex: "0", "aria-label": "Examples that were shown, in order" }, ...items);
}

// The answer to an input: in words, and the probability of each choice as bars.
// least: the probability that was wanted, if one was.
export function replyContent(reply, least) {
  const parts = [make("p", { class: "asked" }, reply.input)];
  const share = chanceOf(reply.confidence ?? 0);
  if (reply.unsure) parts.push(make("p", { class: "unsure" }, `Unsure: its probability is ${share}, and you want at least ${+(100 * least).toFixed(2)} %. Do not rely on this answer.`));
  parts.push(make("p", { class: reply.probabilities ? "answer" : "answer long" }, reply.answer || "(nothing)"));
  if (reply.probabilities) {
    const ranked = Object.entries(reply.probabilities).sort(([, one], [, other]) => other - one);
    const bars = ranked.map(([label, share], index) => bar(label, share, index === 0));
    parts.push(make("ul", { class: "bars", "aria-label": "Probability of each answer" }, ...bars.slice(0, 8)));
    if (bars.length > 8) parts.push(make("details", {}, make("summary", {}, `${bars.length - 8} more answers`), make("ul", { class: "bars" }, ...bars.slice(8))));
  }
  const cut = reply.cut ? " The answer was cut at its limit." : "";
  parts.push(make("p", { class: "muted" }, `${reply.timing.total_s.toFixed(2)} s, ${reply.num_prompt_tokens.toLocaleString("en")} tokens read${reply.timing.prefix_cached ? ", the examples from memory" : ""}.${cut}`));
  return parts;
}

function bar(label, share, isFirst) {
  const inner = make("span", { class: "bar" });
  inner.style.width = `${Math.max(100 * share, 0.4)}%`;
  return make("li", { class: isFirst && "first" }, make("span", {}, label), make("span", { class: "track", "aria-hidden": "true" }, inner), make("span", { class: "number" }, chanceOf(share)));
}
