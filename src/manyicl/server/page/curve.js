// The measured curve as SVG: score after each number of shots, its interval, and the two lines that it has to beat.

import { count, draw, make, percent } from "./dom.js";

const HEIGHT = 270;
const LEFT = 50;
const RIGHT = 18;
const TOP = 18;
const BOTTOM = 44;

const isGoing = (measured) => ["waiting", "running"].includes(measured.state);

// While it is measured, a point of very few answers says nothing yet, and is left out.
const FEWEST = 8;
export const shownPoints = (measured) => measured.curve.filter((point) => !isGoing(measured) || point.num_scored >= FEWEST);

// Returns the figure's content. before: the curve before the last change, if there was one.
export function drawCurve(measured, before, width) {
  const points = shownPoints(measured);
  const most = Math.max(isGoing(measured) ? 16 : 1, ...points.map((point) => point.shots), ...(before || []).map((point) => point.shots));
  const right = width - RIGHT;
  // Doublings are equally far apart; 0 has its place at the left.
  const x = (shots) => LEFT + ((right - LEFT) * Math.log2(1 + shots)) / Math.log2(1 + most);
  const y = (score) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - score);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": describe(measured) });
  drawAxes(picture, { x, y, most, right, width });
  drawLevels(picture, measured, { y, right });
  const bounded = points.filter((point) => point.low !== null);
  if (bounded.length > 1) {
    const edge = [...bounded.map((p) => [p.shots, p.high]), ...bounded.toReversed().map((p) => [p.shots, p.low])];
    picture.append(draw("polygon", { class: "band", points: edge.map(([shots, score]) => `${x(shots)},${y(score)}`).join(" ") }));
  }
  const path = (list) => list.map((point) => `${x(point.shots)},${y(point.score)}`).join(" ");
  if (before) picture.append(draw("polyline", { class: "before", points: path(before) }));
  picture.append(draw("polyline", { class: "line", points: path(points) }));
  for (const point of points) {
    picture.append(draw("circle", { class: "point", cx: x(point.shots), cy: y(point.score), r: 4 }, draw("title", {}, tell(point))));
  }
  const last = points.at(-1);
  if (last) {
    const above = y(last.score) - 12;
    picture.append(draw("text", { class: "halo strong", x: x(last.shots), y: above < 10 ? above + 28 : above, "text-anchor": points.length > 1 ? "end" : "start" }, percent(last.score)));
  }
  return picture;
}

function drawAxes(picture, { x, y, most, right, width }) {
  for (const level of [0, 0.25, 0.5, 0.75, 1]) {
    picture.append(draw("line", { class: "grid", x1: LEFT, x2: right, y1: y(level), y2: y(level) }));
    picture.append(draw("text", { x: LEFT - 8, y: y(level) + 4, "text-anchor": "end" }, percent(level)));
  }
  let end = -Infinity;
  const ticks = [0, 1];
  while (ticks.at(-1) * 2 < most) ticks.push(ticks.at(-1) * 2);
  if (most > 1) ticks.push(most);
  for (const [index, shots] of ticks.entries()) {
    const label = shots.toLocaleString("en");
    const half = label.length * 3.6;
    const fits = x(shots) - half > end + 8 && (shots === most || x(shots) + half < x(most) - most.toLocaleString("en").length * 3.6 - 8);
    if (index && !fits && shots !== most) continue;
    end = x(shots) + half;
    picture.append(draw("text", { x: x(shots), y: y(0) + 18, "text-anchor": "middle" }, label));
  }
  picture.append(draw("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "examples shown before the input"));
}

function drawLevels(picture, { majority, chance }, { y, right }) {
  const levels = [];
  if (majority !== null) levels.push(["majority", majority, "always the commonest answer"]);
  if (chance !== null && (majority === null || Math.abs(chance - majority) > 0.005)) levels.push(["chance", chance, "chance"]);
  else if (chance !== null) levels[0][2] = "the commonest answer, and chance";
  const isClose = levels.length === 2 && Math.abs(y(majority) - y(chance)) < 20;
  for (const [name, level, words] of levels) {
    picture.append(draw("line", { class: name, x1: LEFT, x2: right, y1: y(level), y2: y(level) }));
    const isBelow = isClose ? level === Math.min(majority, chance) : false;
    picture.append(draw("text", { class: "halo", x: right, y: y(level) + (isBelow ? 15 : -6), "text-anchor": "end" }, `${words} ${percent(level)}`));
  }
}

function tell(point) {
  const interval = point.low === null ? "" : ` (95 % interval ${percent(point.low)} to ${percent(point.high)})`;
  return `${count(point.shots, "shot")}: ${percent(point.score)}${interval}, from ${count(point.num_scored, "answer")}`;
}

function describe(measured) {
  const { majority, chance } = measured;
  const levels = [majority !== null && `always the commonest answer: ${percent(majority)}`, chance !== null && `chance: ${percent(chance)}`];
  return ["Score by number of examples shown", ...shownPoints(measured).map(tell), ...levels.filter(Boolean)].join("; ");
}

// The same numbers as a table.
export function tableOf(measured) {
  const row = (cell, values) => make("tr", {}, ...values.map((value, index) => make(index ? cell : "th", { scope: cell === "th" ? "col" : index ? false : "row" }, value)));
  const body = shownPoints(measured).map((p) => row("td", [String(p.shots), percent(p.score), p.low === null ? "–" : `${percent(p.low)} to ${percent(p.high)}`, String(p.num_scored)]));
  const table = make("table", {}, make("thead", {}, row("th", ["Shots", "Score", "95 % interval", "Answers"])), make("tbody", {}, ...body));
  return make("details", { id: "numbers" }, make("summary", {}, "The numbers as a table"), table);
}
