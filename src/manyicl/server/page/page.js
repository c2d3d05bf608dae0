// The page: tasks, one task's curve, questions and corrections. See api.js, curve.js, dom.js and examples.js.

import { Refusal, ask, events, hasToken, keepToken, onTokenNeeded, send, taskPath } from "./api.js";
import { drawCurve, shownPoints, tableOf } from "./curve.js";
import { answerField, byId, count, make, percent, say } from "./dom.js";
import { allExamples, replyContent, restart, shotsOf, showDoubts, showExamples, turn } from "./examples.js";

const state = { tasks: [], task: null, measured: null, readOnly: false, polling: 0, asking: null };
// Curves before the last change, by task, so that one sees them move.
const curves = new Map();

const context = () => ({ task: state.task, mayChange: !state.readOnly, change, confirm });

// Runs something that may be refused, and shows why in words. Returns whether it went well.
async function attempt(what) {
  try {
    await what();
    return true;
  } catch (error) {
    if (error.name === "AbortError") return false;
    if (!(error instanceof Refusal)) console.error(error);
    showProblem(error);
    return false;
  }
}

function showProblem(error) {
  const wait = error.retryAfter ? ` Try again in ${count(error.retryAfter, "second")}.` : "";
  const faults = (error.faults || []).filter((fault) => fault.message && fault.message !== error.message);
  const list = faults.length > 0 && make("ul", {}, ...faults.map((fault) => make("li", {}, fault.message)));
  const text = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  const end = /[.!?…]$/.test(text) ? "" : ".";
  byId("alert").replaceChildren(noteOf("bad", make("p", {}, `${text}${end}${wait}`), list));
  byId("alert").scrollIntoView({ block: "nearest" });
}

function noteOf(kind, ...content) {
  const note = make("div", { class: `note ${kind}` }, make("div", {}, ...content));
  note.append(make("button", { type: "button", class: "quiet", onclick: () => (note.remove(), byId("main").focus({ preventScroll: true })) }, "Close"));
  return note;
}

// Asks in a dialog. buttons: [value, words, class]. Returns the value of the button, "" if it was closed.
function choose(title, text, buttons) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-buttons").replaceChildren(...buttons.map(([value, words, kind]) => make("button", { value, class: kind }, words)));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

const confirm = async (title, text, words) => (await choose(title, text, [["no", "Cancel"], ["yes", words, "danger"]])) === "yes";

onTokenNeeded(async (message, hadToken) => {
  const dialog = byId("token");
  if (dialog.open) return false;
  byId("token-title").textContent = hadToken ? "This token is not accepted" : "This service needs a token";
  byId("token-value").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  const value = await new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
  const token = byId("token-value").value.trim();
  byId("token-value").value = "";
  if (value !== "use" || !token) return false;
  keepToken(token);
  byId("token-button").hidden = false;
  return true;
});

// --- tasks

async function loadTasks() {
  state.tasks = (await ask("GET", "v1/tasks")).tasks;
  const items = state.tasks.map((task) => {
    const facts = make("span", { class: "muted" }, count(task.num_examples, "example"));
    return make("li", {}, make("a", { href: `#${encodeURIComponent(task.name)}`, "aria-current": state.task?.name === task.name && "page" }, task.name, facts));
  });
  byId("tasks").replaceChildren(...items);
  if (!items.length) byId("tasks").append(make("li", { class: "muted" }, "None yet."));
}

async function openFromAddress({ focus = true } = {}) {
  let name = "";
  try {
    name = decodeURIComponent(location.hash.slice(1));
  } catch {
    history.replaceState(null, "", "#");
  }
  clearTimeout(state.polling);
  state.asking?.abort();
  if (name !== state.task?.name) byId("news").replaceChildren();
  byId("alert").replaceChildren();
  state.task = null;
  state.measured = null;
  const opened = name && (await attempt(async () => (state.task = await ask("GET", taskPath(name)))));
  byId("start").hidden = Boolean(opened);
  byId("task").hidden = !opened;
  document.title = opened ? `${name} – manyicl` : "manyicl";
  await attempt(loadTasks);
  if (!opened) {
    if (focus) byId("start").querySelector("h1").focus();
    return;
  }
  restart();
  byId("reply").hidden = true;
  byId("ask").reset();
  byId("choices-field").hidden = state.task.labels.length > 0 || state.task.family !== "classification";
  byId("least-field").hidden = !state.task.labels.length && byId("choices-field").hidden;
  await showTask();
  if (focus) byId("task-name").focus();
}

// Shows the open task anew, after a change as well.
async function showTask() {
  const { task } = state;
  byId("task-name").textContent = task.name;
  const answers = task.labels.length ? count(task.labels.length, "answer") : "open answers";
  byId("task-facts").textContent = `${count(task.num_examples, "example")} · ${answers} · ${task.metric.replaceAll("_", " ")}`;
  byId("add-answer-field").replaceChildren(answerField("add-answer", task.labels));
  await attempt(() => showExamples(context()));
  await follow();
}

// Shows what others have changed meanwhile.
async function refresh() {
  const before = state.task;
  if (document.hidden || !before) return;
  const now = await ask("GET", taskPath(before.name)).catch(() => before);
  if (state.task !== before || now.version === before.version) return;
  state.task = now;
  await showTask();
}

// Does a change, then shows the task as it is after it.
async function change(words, request) {
  byId("alert").replaceChildren();
  return attempt(async () => {
    const { name } = state.task;
    const outcome = await request();
    if (state.measured?.state === "done") curves.set(name, state.measured.curve);
    const news = outcome?.registration ? tellRegistration(outcome.registration) : null;
    if (news) byId("news").replaceChildren(news);
    if (state.task?.name !== name) return;
    state.task = await ask("GET", taskPath(name));
    say(words);
    await showTask();
    await loadTasks();
  });
}

// What became of the rows of a file; null if there is nothing to say beyond their number.
function tellRegistration({ kept, dropped, notes, warnings }) {
  const lost = Object.entries(dropped).map(([reason, number]) => `${count(number, "row")} left out: ${reason}`);
  const lines = [...lost, ...notes, ...warnings];
  const list = lines.length > 0 && make("ul", {}, ...lines.map((line) => make("li", {}, line)));
  return noteOf(lost.length || warnings.length ? "warn" : "", make("p", {}, `${count(kept, "example")} added.`), list);
}

// --- uploads

function formOf(file, name, settings) {
  const form = new FormData();
  form.append("file", file);
  if (name) form.append("name", name);
  if (settings) form.append("settings", JSON.stringify(settings));
  return form;
}

// Uploads a file. If its columns have other names that are known, the user says whether they are read so.
async function upload(method, path, file, name) {
  try {
    return await ask(method, path, formOf(file, name));
  } catch (error) {
    const settings = error.faults?.length === 1 && error.faults[0].settings;
    if (!settings) throw error;
    const named = (columns) => [columns].flat().map((column) => `“${column}”`).join(" and ");
    const read = Object.entries(settings.columns).map(([ours, theirs]) => `${ours.replaceAll("_", " ")} from ${named(theirs)}`);
    const agreed = await choose(`The columns of “${file.name}” have other names`, `Read ${read.join(", ")}?`, [["no", "Cancel"], ["yes", "Read it this way", "main"]]);
    if (agreed !== "yes") throw error;
    return ask(method, path, formOf(file, name, settings));
  }
}

// The name of a task from a file, as it is: the service would replace unusual characters of a file's name.
const stem = (file) => file.name.replace(/\.gz$/i, "").replace(/\.[^.]+$/, "").slice(0, 100);

async function addTask(file, name) {
  say(`Reading ${file.name}`);
  byId("alert").replaceChildren();
  byId("news").replaceChildren(make("p", { class: "note" }, `Reading ${file.name}…`));
  const went = await attempt(async () => {
    try {
      const { task, registration } = await upload("POST", "v1/tasks", file, name || stem(file));
      curves.delete(task.name);
      await open(task.name);
      byId("news").replaceChildren(tellRegistration(registration));
      say(`The task ${task.name} is there, with ${count(task.num_examples, "example")}. It can be asked now.`);
    } catch (error) {
      if (error.status !== 409) throw error;
      await settleName(file, name || stem(file));
    }
  });
  if (!went) byId("news").replaceChildren();
  byId("new-file").value = "";
}

async function open(name) {
  const address = `#${encodeURIComponent(name)}`;
  if (location.hash === address) return openFromAddress();
  history.pushState(null, "", address);
  return openFromAddress();
}

// There is a task of that name: lets the user say what is meant.
async function settleName(file, name) {
  byId("news").replaceChildren();
  byId("confirm-field").hidden = false;
  byId("confirm-name").value = `${name} 2`;
  const buttons = [["new", "Make a new task", "main"], ["append", "Add the rows to it"], ["replace", "Replace it", "danger"], ["no", "Cancel"]];
  const chosen = await choose(`There is already a task “${name}”`, "Give the new one another name, add these rows to the old one, or replace the old one with all of its examples.", buttons);
  byId("confirm-field").hidden = true;
  if (chosen === "new" && byId("confirm-name").value.trim()) return addTask(file, byId("confirm-name").value.trim());
  if (chosen === "append") {
    await open(name);
    return change("Examples added.", () => ask("POST", `${taskPath(name)}/examples`, formOf(file)));
  }
  if (chosen === "replace") {
    const { registration } = await upload("PUT", taskPath(name), file);
    await open(name);
    byId("news").replaceChildren(tellRegistration(registration));
  }
}

// --- the measured curve

// Shows the measurement, and again while it goes on.
async function follow() {
  clearTimeout(state.polling);
  const { task } = state;
  let isGone = false;
  const went = await attempt(async () => {
    const measured = await ask("GET", `${taskPath(task.name)}/curve`).catch((error) => {
      isGone = error.status === 404; // removed elsewhere
      throw error;
    });
    if (state.task !== task) return;
    const wasDone = state.measured?.state === "done" && state.measured.version === measured.version;
    state.measured = measured;
    showMeasured();
    if (measured.state === "done" && !wasDone) {
      say(`Measured. ${measured.sentence}`);
      await showDoubts(measured, context());
    } else if (measured.state !== "done") byId("doubts").hidden = true;
  });
  // Before a first answer nobody knows whether it is measured, so it is asked again.
  const isGoing = !isGone && (!state.measured || ["waiting", "running"].includes(state.measured.state));
  if (state.task === task && isGoing) state.polling = setTimeout(follow, went ? 700 : 5000);
}

function showMeasured() {
  const { measured, task } = state;
  const isGoing = ["waiting", "running"].includes(measured.state);
  const waiting = { off: "This service does not measure tasks.", waiting: "The measurement waits for its turn. You can ask meanwhile.", running: "Examples are answered after growing numbers of others. You can ask meanwhile." };
  // No line ends between a number and its percent sign.
  byId("sentence").textContent = measured.sentence.replaceAll(" %", "\u00a0%") || waiting[measured.state] || "";
  byId("progress").hidden = !isGoing;
  byId("progress-bar").value = measured.fraction;
  byId("progress-text").textContent = percent(measured.fraction);
  // While a new version waits or is measured, the service goes on to give the curve of the old one.
  const isOld = measured.version !== task.version && measured.curve.length > 0;
  const before = isOld ? undefined : curves.get(task.name);
  const wasOpen = byId("numbers")?.open;
  byId("curve").replaceChildren();
  const isEmpty = !shownPoints(measured).length;
  if (isEmpty && !(isGoing && before)) return;
  const width = Math.max(280, Math.min(640, byId("curve").clientWidth));
  byId("curve").append(drawCurve(measured, before, width));
  const words = ["The band is the 95 % interval of each point."];
  if (isOld) words.push("The curve is the one before the last change, until it is measured anew.");
  if (before) words.push("The thin dotted line is the curve before your last change.");
  byId("curve").append(make("p", { class: "muted" }, words.join(" ")));
  if (!isEmpty) byId("curve").append(tableOf(measured));
  if (wasOpen && byId("numbers")) byId("numbers").open = true;
}

// --- questions

async function askTask(event) {
  event.preventDefault();
  const { task } = state;
  const input = byId("input").value;
  if (!input.trim()) return;
  state.asking?.abort();
  const asking = new AbortController();
  state.asking = asking;
  setBusy(true);
  byId("alert").replaceChildren();
  say("Asking");
  await attempt(async () => {
    const body = bodyOf(input);
    const reply = await requestReply(task, body, asking.signal);
    if (state.task?.name === task.name) await showReply(reply, body.min_confidence);
  });
  if (state.asking === asking) setBusy(false);
}

function setBusy(isBusy) {
  byId("ask-button").disabled = isBusy;
  byId("ask-button").textContent = isBusy ? "Answering…" : "Answer";
  byId("stop-button").hidden = !isBusy;
}

function bodyOf(input) {
  const body = { input };
  const policy = byId("policy").value;
  const number = byId("count").value;
  if (policy || number !== "") body.shots = { policy: policy || "random", count: number === "" ? null : Number(number) };
  const choices = byId("choices").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (choices.length && !byId("choices-field").hidden) body.options = choices;
  // An answer that is generated has no probability.
  if (byId("least").value !== "" && (state.task.labels.length || body.options)) body.min_confidence = Number(byId("least").value) / 100;
  return body;
}

// Returns the reply; a generated answer is shown while it is written.
async function requestReply(task, body, signal) {
  const path = `${taskPath(task.name)}/predict`;
  if (task.labels.length) return (await ask("POST", path, body, { signal })).replies[0];
  const response = await send("POST", path, { ...body, stream: true }, { signal });
  const answer = make("p", { class: "answer long" });
  byId("reply").replaceChildren(make("p", { class: "asked" }, body.input), answer);
  byId("reply").hidden = false;
  let reply = null;
  for await (const [name, content] of events(response)) {
    if (name === "text") answer.append(content.text);
    if (name === "reply") reply = content.reply;
    if (name === "problem") throw new Refusal(content, content.status);
  }
  if (!reply) throw new Refusal({ detail: "The answer broke off; what is shown is only its beginning. Ask again." }, 0);
  return reply;
}

// least: the probability that was wanted, if one was.
async function showReply(reply, least) {
  const { task } = state;
  const shown = make("details", {}, make("summary", {}, `${count(reply.shots.length, "example was", "examples were")} shown before it`));
  shown.addEventListener("toggle", () => shown.children.length === 1 && attempt(async () => shown.append(await shotsOf(reply, task))));
  byId("reply").replaceChildren(...replyContent(reply, least), shown);
  if (!state.readOnly) byId("reply").append(correctionOf(reply));
  byId("reply").hidden = false;
  const sure = reply.probabilities?.[reply.answer];
  say(`${reply.unsure ? "Unsure answer" : "Answer"}: ${reply.answer}${sure === undefined ? "" : `, ${percent(sure)}`}`);
}

// Right or wrong: the input becomes an example with the answer that is chosen here.
function correctionOf(reply) {
  const field = answerField("right-answer", state.task.labels, reply.answer);
  const button = make("button", {}, "Keep as an example");
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    if (await keepExample(reply.input, field.value)) form.replaceWith(make("p", { class: "note", tabindex: "-1", id: "kept" }, `It is an example now, with the answer “${field.value}”. New inputs are answered after it.`));
    else button.disabled = false;
    byId("kept")?.focus({ preventScroll: true });
  };
  const form = make("form", { class: "correct", onsubmit: submit }, make("label", { for: "right-answer" }, "The right answer"), make("div", { class: "row" }, make("span", {}, field), button), make("p", { class: "muted" }, "Correct it if it is wrong. From then on it is shown before new inputs."));
  return form;
}

// Adds an example; if its input is one already, that one is corrected.
function keepExample(input, answer) {
  return change("The example is kept. The curve is measured anew.", async () => {
    const path = `${taskPath(state.task.name)}/examples`;
    const { registration } = await ask("POST", path, { examples: [{ input, answer }] });
    const [reason] = Object.keys(registration.dropped);
    if (!reason) return;
    const known = [...(await allExamples(state.task)).values()];
    const same = known.find((example) => example.input.trim() === input.trim());
    if (!same) throw new Refusal({ detail: `This example was not added: ${reason}.` }, 422);
    if (same.answer !== answer) await ask("PATCH", `${path}/${same.id}`, { answer });
  });
}

async function deleteTask() {
  const { name, num_examples: number } = state.task;
  if (!(await confirm(`Delete “${name}”?`, `Its ${count(number, "example")} and its curve are deleted too. This cannot be undone.`, "Delete the task"))) return;
  await attempt(async () => {
    await ask("DELETE", taskPath(name));
    curves.delete(name);
    history.pushState(null, "", "#");
    await openFromAddress();
    say(`The task ${name} is deleted.`);
  });
}

// --- the service

async function greet() {
  try {
    const ready = await ask("GET", "readyz");
    state.readOnly = ready.read_only;
    for (const part of document.querySelectorAll(".change, .drop")) part.hidden = state.readOnly;
    byId("model").textContent = `${ready.model}${ready.read_only ? " · read-only" : ""}`;
  } catch (error) {
    byId("model").textContent = error.status === 503 ? "The model is getting ready…" : error.message;
    setTimeout(greet, 2000);
  }
}

function listen() {
  byId("ask").addEventListener("submit", askTask);
  byId("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    byId("ask").requestSubmit(byId("ask-button"));
  });
  byId("stop-button").addEventListener("click", () => {
    state.asking?.abort();
    setBusy(false);
    byId("input").focus();
    say("Stopped");
  });
  byId("add").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!(await keepExample(byId("add-input").value, byId("add-answer").value))) return;
    byId("add").reset();
    byId("add-input").focus();
  });
  byId("more-file").addEventListener("change", async ({ target }) => {
    const [file] = target.files;
    if (file) await change("Examples added. The curve is measured anew.", () => ask("POST", `${taskPath(state.task.name)}/examples`, formOf(file)));
    target.value = "";
  });
  byId("new-file").addEventListener("change", ({ target }) => target.files.length && addTask(target.files[0]));
  byId("delete-task").addEventListener("click", deleteTask);
  byId("earlier").addEventListener("click", () => attempt(() => turn(-1, context())));
  byId("later").addEventListener("click", () => attempt(() => turn(1, context())));
  byId("token-button").addEventListener("click", () => {
    keepToken("");
    byId("token-button").hidden = true;
    openFromAddress();
  });
  document.addEventListener("visibilitychange", refresh);
  addEventListener("popstate", () => openFromAddress());
  let width = innerWidth;
  addEventListener("resize", () => {
    if (state.measured && innerWidth !== width) showMeasured();
    width = innerWidth;
  });
  listenForDrops();
}

function listenForDrops() {
  const isFile = (event) => [...(event.dataTransfer?.types || [])].includes("Files");
  const mark = (isOver) => document.body.classList.toggle("dropping", isOver);
  addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    mark(!state.readOnly);
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && mark(false));
  addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    mark(false);
    if (!state.readOnly) addTask(event.dataTransfer.files[0]);
  });
}

listen();
byId("token-button").hidden = !hasToken();
await greet();
await openFromAddress({ focus: false });
// A file that was chosen before this script ran.
if (byId("new-file").files.length && !state.task) addTask(byId("new-file").files[0]);
