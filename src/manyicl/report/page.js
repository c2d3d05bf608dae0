"use strict";
// The page is whole without this: it only sorts and filters tables, and opens what is folded before printing.
const valueOf = (row, column) => {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const number = Number(text.replaceAll(",", "").replace("\u2212", "-"));
  return text === "" || text === "\u2013" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
};
const compare = (a, b, sign) => {
  if (a === null || b === null) return (a === null) - (b === null); // what was not measured stays last
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
};
const sortBy = (table, column, head) => {
  const descending = head.getAttribute("aria-sort") === "ascending" ||
    (!head.hasAttribute("aria-sort") && head.classList.contains("num"));
  const again = head.getAttribute("aria-sort") === "descending";
  for (const other of table.tHead.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending && !again ? "descending" : "ascending");
  const sign = descending && !again ? -1 : 1;
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
  rows.sort(([a], [b]) => compare(a, b, sign));
  body.append(...rows.map(([, row]) => row));
};
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (head.classList.contains("plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, column, head));
    head.append(button);
  });
}
const filters = document.getElementById("filters");
const inputs = ["name", "role", "family"].map((key) => [key, document.getElementById(`filter-${key}`)]);
const filterTasks = () => {
  const fits = (item) => inputs.every(([key, input]) => key === "name"
    ? item.dataset.name.toLowerCase().includes(input.value.trim().toLowerCase())
    : !input.value || item.dataset[key] === input.value);
  let shown = 0;
  const rows = document.querySelectorAll("#task-table tbody tr");
  for (const row of rows) {
    row.hidden = !fits(row);
    shown += !row.hidden;
  }
  for (const item of document.querySelectorAll("#tasks details.one")) item.hidden = !fits(item);
  document.getElementById("filter-count").textContent = `${shown} of ${rows.length} tasks`;
};
filters.hidden = false;
filters.addEventListener("submit", (event) => event.preventDefault());
for (const event of ["input", "change"]) filters.addEventListener(event, filterTasks); // some browsers send one of them
filterTasks();
const openTarget = () => {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (!target) return;
  for (let item = target; item; item = item.parentElement) if (item.tagName === "DETAILS") item.open = true;
  target.scrollIntoView();
};
addEventListener("hashchange", openTarget);
openTarget();
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const item of opened) item.open = true;
});
addEventListener("afterprint", () => {
  for (const item of opened) item.open = false;
});
