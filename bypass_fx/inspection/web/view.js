"use strict";

/** The graph as it is drawn: cytoscape shows what NestedGraph says can be seen. */
class View {
  constructor(container, graph, data, choose) {
    this.graph = graph;
    this.data = data;
    this.heat = null;
    this.cy = cytoscape({
      container, style: [], layout: { name: "preset" }, minZoom: 0.005, maxZoom: 3,
      autoungrabify: true, boxSelectionEnabled: false, selectionType: "single",
    });
    this.cy.on("tap", "node", (event) => choose(event.target.id()));
    this.cy.on("dbltap", "node", (event) => this.toggle(event.target.id()));
    this.restyle();
  }

  /** Draw what can be seen now; what stays keeps its element. */
  draw() {
    const { nodes, edges } = this.graph.visible();
    const cy = this.cy;
    cy.batch(() => {
      const wanted = new Set([...nodes.map((node) => node.id), ...edges.map((edge) => this.edgeId(edge))]);
      cy.elements().filter((element) => !wanted.has(element.id())).remove();
      for (const node of nodes) {
        const known = cy.getElementById(node.id);
        if (known.length && known.hasClass("open") !== node.open) known.remove();
      }
      const made = [];
      for (const node of nodes) {
        const shown = this.describe(node);
        const known = cy.getElementById(node.id);
        if (!known.length) made.push(shown);
        else if (node.open) ["inner", "left", "right"].forEach((side) => known.data(side) !== node[side] && known.data(side, node[side]));
        else if (known.position("x") !== node.x || known.position("y") !== node.y) known.position(shown.position);
      }
      cy.add(made);
      const places = new Map(nodes.map((node) => [node.id, node]));
      cy.add(edges.filter((edge) => !cy.getElementById(this.edgeId(edge)).length).map((edge) => ({
        group: "edges", classes: edge.seen ? "" : "unseen",
        data: { id: this.edgeId(edge), source: edge.source, target: edge.target },
      })));
      for (const edge of edges) this.route(edge, places);
    });
    this.warm();
  }

  edgeId(edge) {
    return `→ ${edge.id}`;
  }

  describe(place) {
    const node = this.graph.nodes.get(place.id);
    const parent = node.parent === this.graph.root ? undefined : node.parent;
    const classes = [node.role, place.open ? "open" : "closed"];
    if (node.kind) classes.push("kind");
    const data = { id: node.id, label: this.label(node, place.open), width: place.width, height: place.height, inner: place.inner, left: place.left, right: place.right };
    if (node.kind) data.kind = node.kind;
    if (parent) data.parent = parent;
    const element = { group: "nodes", data, classes: classes.join(" ") };
    if (!place.open) element.position = { x: place.x, y: place.y };
    return element;
  }

  label(node, open) {
    if (node.role !== "module") return [node.label, node.type].filter(Boolean).join("\n");
    const name = node.type && node.type !== node.label ? `${node.label} · ${node.type}` : node.label;
    return open || !node.count ? name : `${name}\n${node.count}`;
  }

  /** Bends in cytoscape's terms: how far along the line from source to target, and how far beside it. */
  route(edge, places) {
    const source = places.get(edge.source), target = places.get(edge.target);
    const along = { x: target.x - source.x, y: target.y - source.y };
    const squared = along.x ** 2 + along.y ** 2 || 1, length = Math.sqrt(squared);
    const parts = edge.bends.map((bend) => {
      const to = { x: bend.x - source.x, y: bend.y - source.y };
      return [(to.x * along.x + to.y * along.y) / squared, (to.y * along.x - to.x * along.y) / length];
    });
    const bent = parts.some(([, beside]) => Math.abs(beside) > 3);
    const weights = parts.map(([weight]) => weight.toFixed(4)).join(" ");
    const distances = parts.map(([, beside]) => beside.toFixed(1)).join(" ");
    const drawn = this.cy.getElementById(this.edgeId(edge));
    if (drawn.scratch("route") === `${bent} ${weights} ${distances}`) return;
    drawn.scratch("route", `${bent} ${weights} ${distances}`);
    drawn.style(bent ? {
      "curve-style": "round-segments", "edge-distances": "node-position", "segment-weights": weights, "segment-distances": distances,
    } : { "curve-style": "straight" });
  }

  toggle(id) {
    if (!this.graph.isModule(id)) return;
    this.graph.setOpen(id, !this.graph.open.has(id));
    const before = this.cy.getElementById(id).renderedPosition();
    this.draw();
    const after = this.cy.getElementById(id).renderedPosition();
    if (before && after) this.cy.panBy({ x: before.x - after.x, y: before.y - after.y });
  }

  setStage(stage) {
    this.graph.stage = stage;
    this.draw();
  }

  select(id) {
    this.cy.elements(":selected").unselect();
    this.cy.getElementById(id).select();
  }

  /** Bring a node into sight. */
  show(id) {
    const hidden = this.graph.shownBy(id) !== id;
    this.graph.reveal(id);
    if (hidden) this.draw();
    this.select(id);
    this.cy.zoom(Math.max(this.cy.zoom(), 0.7));
    this.cy.center(this.cy.getElementById(id));
  }

  /** All in sight, where that is not too small to read; else the beginning. */
  begin() {
    this.fit();
    if (this.cy.zoom() >= View.READABLE) return;
    this.cy.zoom(View.READABLE);
    const box = this.cy.elements().boundingBox();
    this.cy.pan({ x: this.cy.width() / 2 - (box.x1 + box.w / 2) * View.READABLE, y: 24 - box.y1 * View.READABLE });
  }

  fit() {
    this.cy.fit(undefined, 24);
    if (this.cy.zoom() > 1.2) {
      this.cy.zoom(1.2);
      this.cy.center();
    }
  }

  middle() {
    return { x: this.cy.width() / 2, y: this.cy.height() / 2 };
  }

  zoomBy(factor) {
    this.cy.zoom({ level: this.cy.zoom() * factor, renderedPosition: this.middle() });
  }

  /** Colour sites, and closed modules by their highest site; `heat` gives a colour for a node's id, or none. */
  warm() {
    if (!this.heat) return;
    this.cy.batch(() => this.cy.nodes().forEach((element) => {
      const color = element.hasClass("open") ? null : this.heat(element.id());
      element.toggleClass("warm", Boolean(color));
      if (color) element.data("warmth", color);
    }));
  }

  restyle() {
    const css = getComputedStyle(document.documentElement);
    const of = (name) => css.getPropertyValue(`--${name}`).trim();
    const kinds = ["folded", "augmented", "zero", "refused"].flatMap((kind) => [
      { selector: `node.kind[kind = "${kind}"]`, style: { "background-color": of(kind), color: of("on-kind"), "border-color": of(kind) } },
      { selector: `node.module.kind[kind = "${kind}"]`, style: { "background-color": of("module"), color: of("ink"), "border-width": 2.5 } },
    ]);
    this.cy.style().fromJson([
      { selector: "node", style: {
        shape: "round-rectangle", width: "data(width)", height: "data(height)", label: "data(label)",
        "text-wrap": "wrap", "text-valign": "center", "font-size": 11, "line-height": 1.15, color: of("ink"),
        "background-color": of("value"), "border-width": 1, "border-color": of("line"), "font-family": "system-ui, sans-serif",
      } },
      { selector: "node.module", style: { "background-color": of("module"), "border-color": of("faint") } },
      { selector: "node.open", style: {
        "text-valign": "top", "text-margin-y": -2, "background-opacity": 0.55, padding: NestedGraph.PADDING,
        "compound-sizing-wrt-labels": "exclude", color: of("ink"), "min-width": "data(inner)",
        "min-width-bias-left": "data(left)", "min-width-bias-right": "data(right)",
        "text-background-color": of("ground"), "text-background-opacity": 0.85, "text-background-padding": 1,
      } },
      { selector: "node.input, node.output", style: { shape: "ellipse", color: of("faint"), "border-style": "dashed" } },
      { selector: "node.parameter", style: { shape: "cut-rectangle", color: of("faint") } },
      { selector: "node.opaque", style: { "border-style": "dashed", "border-color": of("ink") } },
      ...kinds,
      { selector: "node[kind = 'refused']", style: { "border-style": "dashed" } },
      { selector: "node.warm", style: { "background-color": "data(warmth)", color: "#101318", "background-opacity": 1 } },
      { selector: "edge", style: {
        width: 1.2, "line-color": of("edge"), "curve-style": "straight", "target-arrow-shape": "triangle",
        "target-arrow-color": of("edge"), "arrow-scale": 0.7, events: "no",
      } },
      { selector: "edge.unseen", style: { "line-style": "dashed" } },
      { selector: "node:selected", style: { "border-color": of("chosen"), "border-width": 4, "border-style": "solid" } },
    ]).update();
  }
}

View.READABLE = 0.65;
