// Runs in the rendering page: draws a diagram, then writes down only what is seen of it.
"use strict";

// Attributes that carry the geometry, by element; any other element is refused.
const SHAPES = {
  path: ["d"],
  rect: ["x", "y", "width", "height", "rx", "ry"],
  circle: ["cx", "cy", "r"],
  ellipse: ["cx", "cy", "rx", "ry"],
  line: ["x1", "y1", "x2", "y2"],
  polygon: ["points"],
  polyline: ["points"],
};
const MARKER = ["id", "viewBox", "refX", "refY", "markerUnits", "markerWidth", "markerHeight", "orient"];
const UNSEEN = ["style", "title", "desc", "filter", "lineargradient", "symbol"];
const FONTS = {
  Inter: "var(--md-text-font),sans-serif",
  "JetBrains Mono": "var(--md-code-font),monospace",
};
// What the outermost element says for all.
const ROOT = {
  fill: "var(--diagram-ink)",
  "font-family": FONTS.Inter,
  "font-size": "14",
  "font-weight": "400",
  "font-style": "normal",
  "text-anchor": "middle",
  "dominant-baseline": "auto",
};
const HALO = { stroke: "var(--diagram-paper)", "stroke-width": 12, "stroke-linejoin": "round", "paint-order": "stroke" };
let colours;

async function prepare(config, names) {
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(", ");
  const entries = Object.entries(names);
  colours = Object.fromEntries(entries.map(([hex, name]) => [`rgb(${rgb(hex)})`, `var(--diagram-${name})`]));
  for (const family of Object.keys(FONTS))
    for (const weight of [400, 700])
      if (!(await document.fonts.load(`${weight} 14px "${family}"`)).length) throw Error(`no font ${family}`);
  mermaid.initialize(config);
}

const escaped = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
const number = (value) => String(+Number(value).toFixed(1)); // less is seen by nobody
const rounded = (text) => text.replace(/-?\d*\.\d+(e-?\d+)?/g, number);
const attributes = (list) => Object.entries(list).map(([k, v]) => ` ${k}="${escaped(v)}"`).join("");

function colour(value, element) {
  if (value === "none" || /^rgba.*, 0\)$/.test(value)) return "none";
  if (value in colours) return colours[value];
  throw Error(`<${element.tagName}> has the colour ${value}, which is none of the site's`);
}

function paint(element) {
  const style = getComputedStyle(element);
  const now = { fill: colour(style.fill, element) };
  if (style.opacity !== "1") now.opacity = style.opacity;
  if (element.matches("text, tspan")) {
    const family = style.fontFamily.split(",")[0].replace(/"/g, "");
    if (!(family in FONTS)) throw Error(`text in the font ${family}`);
    now["font-family"] = FONTS[family];
    now["font-size"] = number(parseFloat(style.fontSize));
    for (const name of ["font-weight", "font-style", "text-anchor", "dominant-baseline"])
      now[name] = style.getPropertyValue(name);
    if (element.closest(".edgeLabel")) Object.assign(now, HALO);
  } else if (style.stroke !== "none" && parseFloat(style.strokeWidth) > 0) {
    now.stroke = colour(style.stroke, element);
    if (style.strokeWidth !== "1px") now["stroke-width"] = number(parseFloat(style.strokeWidth));
    const dashes = style.strokeDasharray.replace(/px/g, "").replace(/, /g, " ");
    if (/[1-9]/.test(dashes) && dashes !== "1 0") now["stroke-dasharray"] = dashes;
  }
  return now;
}

const different = (now, from) => Object.fromEntries(Object.entries(now).filter(([k, v]) => from[k] !== v));

// Where the element's coordinates lie in those of the whole drawing.
function place(element) {
  const { a, b, c, d, e, f } = element.ownerSVGElement.getScreenCTM().inverse().multiply(element.getScreenCTM());
  const still = Math.abs(a - 1) + Math.abs(b) + Math.abs(c) + Math.abs(d - 1) < 1e-6;
  return { x: +number(e), y: +number(f), turned: still ? null : `matrix(${[a, b, c, d, e, f].map((v) => +v.toFixed(3)).join(" ")})` };
}

function shape(element) {
  const tag = element.tagName;
  const list = {};
  for (const key of SHAPES[tag]) {
    const value = element.getAttribute(key);
    if (value && value !== "0") list[key] = rounded(value);
  }
  if (list.d && doubled(element.parentNode)) list.d += "Z"; // the filling leaves a side open
  const now = different(paint(element), ROOT);
  if (now.fill === "none" && !now.stroke) return [];
  if (tag === "rect" && !(element.width.baseVal.value && element.height.baseVal.value)) return [];
  for (const key of ["marker-start", "marker-end"])
    if (element.hasAttribute(key)) now[key] = element.getAttribute(key);
  if (element.closest("marker")) return [{ tag, list, now }];

  const { x, y, turned } = place(element);
  const shift = (keys, by) => keys.forEach((key) => (list[key] = number(+(list[key] || 0) + by)));
  if (turned) list.transform = turned;
  else if (tag === "rect") shift(["x"], x), shift(["y"], y);
  else if (tag === "circle" || tag === "ellipse") shift(["cx"], x), shift(["cy"], y);
  else if (tag === "line") shift(["x1", "x2"], x), shift(["y1", "y2"], y);
  else if (x || y) list.transform = `translate(${x} ${y})`;
  return [{ tag, list, now }];
}

// A text of several lines becomes several texts: no line depends on em or on the one before.
function text(element) {
  const rows = element.querySelector(":scope > tspan") ? [...element.children] : [element];
  const { x, y, turned } = place(element);
  return rows.filter((row) => row.textContent.trim()).map((row) => {
    const own = paint(row);
    const from = row.getStartPositionOfChar(0);
    const to = row.getEndPositionOfChar(row.getNumberOfChars() - 1);
    const at = { start: from.x, middle: (from.x + to.x) / 2, end: to.x }[own["text-anchor"]];
    const list = turned
      ? { x: number(at), y: number(from.y), transform: turned }
      : { x: number(at + x), y: number(from.y + y) };
    return { tag: "text", list, now: different(own, ROOT), inside: words(row, own).trim() };
  });
}

function words(node, from) {
  return [...node.childNodes].map((child) => {
    if (child.nodeType === Node.TEXT_NODE) return escaped(child.data);
    const own = paint(child);
    const changed = attributes(different(own, from));
    return changed ? `<tspan${changed}>${words(child, own)}</tspan>` : words(child, own);
  }).join("");
}

// Round shapes come as a filling and an outline of the same form: one of them is enough.
const doubled = (element) => element.matches(".outer-path") && element.children.length === 2;

// All that is seen, from back to front, without the tree around it.
function* seen(element) {
  const tag = element.tagName;
  const style = getComputedStyle(element);
  if (UNSEEN.includes(tag.toLowerCase())) return;
  if (style.display === "none" || style.visibility === "hidden") return;
  if (element.matches(".edgeLabel rect")) return; // the text's halo hides the line behind it
  if (tag === "marker") {
    const used = `[marker-start="url(#${element.id})"], [marker-end="url(#${element.id})"]`;
    if (!element.ownerSVGElement.querySelector(used)) return;
    const present = MARKER.filter((key) => element.hasAttribute(key));
    const list = Object.fromEntries(present.map((key) => [key, element.getAttribute(key)]));
    yield { tag, list, now: {}, inside: drawn([...element.children].flatMap(shape)) };
  } else if (tag in SHAPES) yield* shape(element);
  else if (tag === "text") yield* text(element);
  else if (["svg", "g", "defs"].includes(tag)) {
    for (const child of doubled(element) ? [element.children[0]] : element.children) yield* seen(child);
  } else throw Error(`<${tag}> in the diagram, which can't be shown`);
}

// Neighbours of one look share its attributes.
function drawn(items) {
  const runs = [];
  for (const { tag, list, now, inside } of items) {
    const look = attributes(now);
    if (runs.at(-1)?.look !== look) runs.push({ look, parts: [] });
    runs.at(-1).parts.push([tag, attributes(list), inside]);
  }
  const one = ([tag, list, inside], look) => `<${tag}${list}${look}${inside ? `>${inside}</${tag}>` : "/>"}`;
  return runs.map(({ look, parts }) =>
    look && parts.length > 1
      ? `<g${look}>${parts.map((part) => one(part, "")).join("")}</g>`
      : parts.map((part) => one(part, look)).join(""),
  ).join("");
}

async function render(name, source, title, description) {
  const holder = document.createElement("div");
  holder.innerHTML = (await mermaid.render(name, source)).svg;
  document.body.append(holder);
  try {
    const svg = holder.querySelector("svg");
    const box = svg.viewBox.baseVal;
    const [left, top] = [Math.floor(box.x), Math.floor(box.y)];
    const [width, height] = [Math.ceil(box.x + box.width) - left, Math.ceil(box.y + box.height) - top];
    const root = {
      xmlns: "http://www.w3.org/2000/svg",
      width,
      height,
      viewBox: `${left} ${top} ${width} ${height}`,
      role: "img",
      "aria-label": title,
      "aria-describedby": `${name}-about`,
      ...ROOT,
    };
    const about = `<desc id="${name}-about">${escaped(description)}</desc>`;
    const inside = drawn(seen(svg)).replaceAll(`${name}_flowchart-v2-`, `${name}-`);
    return `<svg${attributes(root)}>${about}${inside}</svg>`;
  } finally {
    holder.remove();
  }
}
