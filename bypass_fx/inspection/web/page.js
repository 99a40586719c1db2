"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const made = (tag, text = "", className = "") => Object.assign(document.createElement(tag), { textContent: text, className });
const BUDGET = 60, CROWD = 110, LISTED = 200; // nodes drawn at first, nodes opened at once, entries of the list
const KINDS = { folded: "strict, folded", augmented: "strict, augmented", zero: "relaxed", refused: "refused" };
const MEANINGS = {
  folded: "comes back at A D W = 0; what is left goes into A’s bias",
  augmented: "comes back at A D [W b_W] = 0; A’s bias can’t take it",
  zero: "comes back at D = 0",
  refused: "gets no D; its panel says why",
};

/** Text that may break behind the dots and underscores of a long name. */
function breakable(text) {
  const parts = text.split(/(?<=[._:/])/), fragment = document.createDocumentFragment();
  parts.forEach((part, index) => fragment.append(...(index ? [document.createElement("wbr"), part] : [part])));
  return fragment;
}

function namedAs(tag, text, className = "") {
  const element = made(tag, "", className);
  element.append(breakable(text));
  return element;
}

const pen = document.createElement("canvas").getContext("2d");
pen.font = `${View.FONT}px ${View.FACE}`;
const widths = new Map();
function widthOf(line) {
  if (!widths.has(line)) widths.set(line, pen.measureText(line).width);
  return widths.get(line);
}

/** Count the sites and refusals in every module, and name a module's kind: the first of KINDS that it holds. */
function countKinds(graph) {
  const counts = new Map();
  for (const node of graph.nodes.values()) {
    if (!node.kind || node.stage === "after" || node.role === "module") continue;
    for (const step of graph.chain(node.id).slice(0, -1)) {
      const count = counts.get(step) || {};
      count[node.kind] = (count[node.kind] || 0) + 1;
      counts.set(step, count);
    }
  }
  for (const [id, count] of counts) {
    const node = graph.nodes.get(id);
    const sites = Object.entries(count).reduce((sum, [kind, n]) => (kind === "refused" ? sum : sum + n), 0);
    const words = [[sites, sites === 1 ? "site" : "sites"], [count.refused || 0, "refused"]];
    node.count = words.filter(([n]) => n).map(([n, word]) => `${n} ${word}`).join(", ");
    node.kind = Object.keys(KINDS).find((kind) => count[kind]);
  }
}

splitIntoParts(data);
const graph = new NestedGraph(data, (node, open = false) => {
  const lines = view.label(node, open).split("\n");
  return { width: 2 * Math.ceil(Math.max(34, 18 + Math.max(...lines.map(widthOf))) / 2), height: (open ? 6 : 12) + View.LINE * lines.length };
});
let view = { label: View.prototype.label };
let chosen = null;
countKinds(graph);
const siteNodes = data.nodes.filter((node) => (node.site || node.refusal) && node.stage !== "after");

function choose(id) {
  chosen = id;
  view.select(id);
  showPanel(id);
  for (const entry of byId("list").querySelectorAll("button")) entry.setAttribute("aria-current", entry.dataset.id === id);
  const node = graph.nodes.get(id);
  byId("said").textContent = `${node.label} ${node.type || ""} selected`;
}

function go(id) {
  view.show(id);
  choose(id);
}

function rows(pairs, className = "") {
  const table = made("table", "", className);
  for (const cells of pairs) {
    const row = table.insertRow();
    for (const cell of cells) row.insertCell().append(breakable(cell));
  }
  return table;
}

/** What a first look needs: how to read the picture, what each colour means, and what the surgery costs. */
function overview() {
  const panel = made("div");
  panel.append(made("h3", "How to read this"), made("p", "Frames are modules: a double click opens or closes one. A coloured "
    + "value is an activation σ; the surgery makes it ψ(z) = σ(z) + D z, and with D = 0 the model computes what it did. "
    + "Click one for its formula, its shapes and the reason."));
  const table = made("table");
  for (const [kind, words] of Object.entries(KINDS)) {
    const count = siteNodes.filter((node) => node.kind === kind).length, row = table.insertRow();
    if (!count) continue;
    row.insertCell().append(made("span", `${count} ${words}`, `badge ${kind}`));
    row.insertCell().textContent = MEANINGS[kind];
  }
  panel.append(table, made("h3", "What it adds"), ...data.totals.map((line) => made("p", line)));
  return panel;
}

function showPanel(id) {
  const node = graph.nodes.get(id), panel = byId("panel");
  panel.scrollTop = 0;
  panel.replaceChildren(namedAs("h2", node.label), namedAs("p", id === graph.root ? node.type : pathOf(node), "quiet"));
  if (id === graph.root) {
    panel.append(overview());
    return;
  }
  const site = data.sites[node.site], refusal = data.refusals[node.refusal];
  if (site) {
    panel.append(made("span", KINDS[site.kind], `badge ${site.kind}`));
    panel.append(made("h3", "Formula"), ...site.formula.map((line) => made("p", line, "formula")));
    panel.append(rows(site.shapes, "shapes"), made("h3", "Why"), namedAs("p", site.reason));
    panel.append(made("h3", "Cost"), made("p", site.cost));
  } else if (refusal) {
    panel.append(made("span", KINDS.refused, "badge refused"), made("p", refusal.activation));
    panel.append(made("h3", "Why not"), namedAs("p", refusal.reason));
    if (refusal.remedy) panel.append(made("h3", "What would help"), made("p", refusal.remedy));
  }
  if (data.run && node.site) panel.append(made("h3", "Residual norm"), made("p", residualText(node.site)));
  const facts = [["type", node.type], ["shape", node.shape], ["with", node.detail], ["holds", node.count]];
  panel.append(made("h3", node.role), rows(facts.filter(([, value]) => value)));
  if (graph.isModule(id)) {
    const button = made("button", graph.open.has(id) ? "Close" : "Open");
    button.onclick = () => { view.toggle(id); choose(id); };
    panel.append(button);
  }
}

function list(nodes, heading) {
  byId("found").textContent = heading;
  byId("list").replaceChildren(...nodes.slice(0, LISTED).map((node) => {
    const entry = made("li"), button = namedAs("button", node.site || node.refusal || pathOf(node));
    button.dataset.id = node.id;
    if (node.kind) button.style.borderColor = `var(--${node.kind})`;
    button.onclick = () => go(node.id);
    entry.append(button);
    return entry;
  }));
}

const pathOf = (node) => node.id.replace("(model)#", "").replace("#", ".");
const names = data.nodes.map((node) => [`${pathOf(node)} ${node.type || ""}`.toLowerCase(), node]);
function search() {
  const text = byId("search").value.trim().toLowerCase();
  if (!text) {
    const sites = siteNodes.filter((node) => node.site).length;
    list(siteNodes, `${sites} sites, ${siteNodes.length - sites} refused`);
    return;
  }
  const hits = names.filter(([name, node]) => name.includes(text) && graph.has(node)).map(([, node]) => node);
  list(hits, hits.length > LISTED ? `${LISTED} of ${hits.length} found` : `${hits.length} found`);
}

function step(by) {
  if (!siteNodes.length) return;
  const now = siteNodes.findIndex((node) => node.id === chosen);
  go(siteNodes[(now + by + siteNodes.length + (now < 0 && by < 0)) % siteNodes.length].id);
}

/** The next node in a direction: along an edge for up and down, else into or out of a module; beside it for left and right. */
function neighbour(key) {
  const element = view.cy.getElementById(chosen), here = view.places.get(chosen);
  if (!here) return graph.children(graph.root)[0];
  if (key === "ArrowDown" || key === "ArrowUp") {
    const down = key === "ArrowDown";
    const ends = down ? element.outgoers("node") : element.incomers("node");
    if (ends.length) return ends.first().id();
    const parent = graph.nodes.get(chosen).parent;
    return down ? here.open && graph.children(chosen)[0] : parent !== graph.root && parent;
  }
  const sign = key === "ArrowRight" ? 1 : -1, off = (place) => Math.abs(place.y - here.y) * 3 + Math.abs(place.x - here.x);
  const beside = [...view.places.values()].filter((place) => !place.open && sign * (place.x - here.x) > 1);
  return beside.sort((a, b) => off(a) - off(b))[0]?.id;
}

const KEYS = {
  Enter: () => { view.toggle(chosen); choose(chosen); },
  Backspace: () => { const parent = graph.nodes.get(chosen).parent; if (parent && parent !== graph.root) go(parent); },
  n: () => step(1),
  p: () => step(-1),
  b: () => setStage(graph.stage === "before" ? "after" : "before"),
  "+": () => view.zoomBy(1.25),
  "-": () => view.zoomBy(0.8),
  0: () => view.fit(),
};

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && event.target.tagName !== "INPUT") byId("search").focus();
  else if (event.target === byId("graph") && event.key.startsWith("Arrow")) {
    const next = neighbour(event.key);
    if (next) go(next);
  } else if (event.target === byId("graph") && KEYS[event.key]) {
    if (chosen || !["Enter", "Backspace"].includes(event.key)) KEYS[event.key]();
  } else return;
  event.preventDefault();
}

function setStage(stage) {
  document.querySelector(`input[name=stage][value=${stage}]`).checked = true;
  view.setStage(stage, chosen);
  if (chosen && graph.has(graph.nodes.get(chosen))) choose(chosen);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  view.restyle();
}

function closeAll() {
  for (const id of [...graph.open]) if (id !== graph.root) graph.setOpen(id, false);
  view.draw();
  view.begin();
}

/** Open the modules around the sites, the first ones where all would be too many to draw. */
function openSites() {
  for (const node of siteNodes) if (graph.count() < CROWD) graph.reveal(node.id);
  const shown = siteNodes.filter((node) => graph.shownBy(node.id) === node.id).length;
  view.draw();
  view.begin();
  byId("said").textContent = `${shown} of ${siteNodes.length} can be seen; search or the list opens others`;
}

const RAMP = [[59, 76, 192], [33, 144, 141], [143, 215, 68], [253, 231, 37]];
/** The residual norms of a run, on a scale of logarithms from the least positive one to the greatest. */
class Heat {
  constructor(run) {
    this.run = run;
    this.at = 0;
    const positive = Object.values(run.residuals).flat().filter((value) => value > 0);
    this.least = positive.length ? Math.log(Math.min(...positive)) : 0;
    this.most = positive.length ? Math.log(Math.max(...positive)) : 1;
    this.sitesIn = new Map();
    for (const node of siteNodes) {
      if (node.site in run.residuals) for (const id of graph.chain(node.id)) this.sitesIn.set(id, [...(this.sitesIn.get(id) || []), node.site]);
    }
    for (const node of data.nodes) if (node.stage === "after" && node.type === "D-activation") this.sitesIn.set(node.id, [node.site]);
  }

  color(id) {
    const sites = this.sitesIn.get(id);
    if (!sites) return null;
    const value = Math.max(...sites.map((site) => this.run.residuals[site][this.at] ?? 0));
    if (!(value > 0)) return "#b8bec9";
    const scaled = (Math.log(value) - this.least) / (this.most - this.least || 1) * (RAMP.length - 1);
    const low = Math.min(Math.floor(scaled), RAMP.length - 2), part = scaled - low;
    return `rgb(${RAMP[low].map((channel, i) => Math.round(channel + part * (RAMP[low + 1][i] - channel))).join(",")})`;
  }
}

function residualText(site) {
  const values = data.run.residuals[site] || [], value = values[byId("step").value];
  const most = Math.max(...values);
  return value == null ? "not recorded at this step" : `${value.toPrecision(3)} at step ${data.run.steps[byId("step").value]}, highest ${most.toPrecision(3)}`;
}

function prepareRun() {
  if (!data.run) return;
  const heat = new Heat(data.run), slider = byId("step");
  byId("heat").hidden = false;
  slider.max = data.run.steps.length - 1;
  byId("least").textContent = Math.exp(heat.least).toPrecision(2);
  byId("most").textContent = Math.exp(heat.most).toPrecision(2);
  view.heat = (id) => heat.color(id);
  const move = () => {
    heat.at = Number(slider.value);
    byId("step-value").textContent = `${data.run.steps[heat.at]} (${data.run.phases[heat.at]})`;
    view.warm();
    if (chosen) showPanel(chosen);
  };
  slider.oninput = move;
  move();
}

function start() {
  byId("title").append(data.name, made("small", data.summary));
  graph.openUpTo(BUDGET, byId("graph").clientWidth || Infinity);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  view = new View(byId("graph"), graph, choose);
  byId("theme").textContent = dark ? "Light" : "Dark";
  for (const [kind, words] of Object.entries(KINDS)) byId("legend").append(made("i", "", kind), words);
  byId("legend").append(" · a dashed edge: code without a graph may make this call");
  view.draw();
  prepareRun();
  search();
  showPanel(graph.root);
  view.cy.resize();
  view.begin();
  byId("search").oninput = search;
  byId("search").onkeydown = (event) => { if (event.key === "Enter") byId("list").querySelector("button")?.click(); };
  for (const input of document.querySelectorAll("input[name=stage]")) input.onchange = () => setStage(input.value);
  byId("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  byId("fit").onclick = () => view.fit();
  byId("zoom-in").onclick = () => view.zoomBy(1.25);
  byId("zoom-out").onclick = () => view.zoomBy(0.8);
  byId("close-all").onclick = closeAll;
  byId("open-sites").onclick = openSites;
  document.addEventListener("keydown", pressed);
  requestAnimationFrame(() => requestAnimationFrame(() => { window.drawnAfter = performance.now(); }));
}

start();
