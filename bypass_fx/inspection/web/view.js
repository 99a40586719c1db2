"use strict";

/**
 * The graph as it is drawn: cytoscape shows what NestedGraph says can be seen.
 *
 * Open modules are plain nodes below the others, not cytoscape's compound ones: where they lie is known, and compound nodes
 * would make it work that out again, and restyle all that they hold, at every change.
 */
class View {
  constructor(container, graph, choose) {
    this.graph = graph;
    this.heat = null;
    this.places = new Map();
    this.cy = cytoscape({
      container, style: [], layout: { name: "preset" }, minZoom: 0.005, maxZoom: 3,
      autoungrabify: true, boxSelectionEnabled: false, selectionType: "single",
    });
    const of = (event) => event.target.data("of") || event.target.id();
    this.cy.on("tap", "node", (event) => choose(of(event)));
    this.cy.on("dbltap", "node", (event) => { this.toggle(of(event)); choose(of(event)); });
    this.restyle();
  }

  /** Draw what can be seen now; what stays keeps its element, and what did not move is left alone. */
  draw() {
    const { nodes, edges } = this.graph.visible(), cy = this.cy;
    const wanted = new Map(nodes.flatMap((place) => this.describe(place)).map((element) => [element.data.id, element]));
    cy.batch(() => {
      cy.nodes().filter((node) => wanted.get(node.id())?.classes !== node.scratch("classes")).remove();
      const joins = new Set(edges.map((edge) => this.edgeId(edge)));
      cy.edges().filter((edge) => !joins.has(edge.id())).remove();
      const made = [];
      for (const [id, element] of wanted) {
        const known = cy.getElementById(id), now = known.length && known.position();
        if (!known.length) made.push(element);
        else {
          if (now.x !== element.position.x || now.y !== element.position.y) known.position(element.position);
          if (known.data("width") !== element.data.width || known.data("height") !== element.data.height) known.data(element.data);
        }
      }
      cy.add(made);
      cy.add(edges.filter((edge) => !cy.getElementById(this.edgeId(edge)).length).map((edge) => ({
        group: "edges", classes: edge.seen ? "" : "unseen", data: { id: this.edgeId(edge), source: edge.source, target: edge.target },
      })));
      this.places = new Map(nodes.map((node) => [node.id, node]));
      for (const edge of edges) this.route(edge);
    });
    this.warm();
  }

  edgeId(edge) {
    return `→ ${edge.id}`;
  }

  /** A place as elements of cytoscape: an open module is a box, and its title lies above the edges that cross it. */
  describe(place) {
    const node = this.graph.nodes.get(place.id), label = this.label(node, place.open);
    const { x, y, width, height, depth } = place;
    const classes = [node.role, place.open ? "open" : "closed"].join(" ");
    const element = { group: "nodes", classes, scratch: { classes }, position: { x, y }, data: { id: node.id, label, width, height, depth } };
    if (node.kind) element.data.kind = node.kind;
    if (!place.open) return [element];
    const title = this.graph.measure(node, true);
    const corner = { x: x - width / 2 + title.width / 2, y: y - height / 2 + title.height / 2 + 2 };
    const data = { id: `≡ ${node.id}`, of: node.id, label, width: title.width - 8, height: title.height };
    return [element, { group: "nodes", classes: "title", scratch: { classes: "title" }, position: corner, data }];
  }

  label(node, open) {
    if (node.role !== "module") return [node.label, node.type].filter(Boolean).join("\n");
    const name = node.type && node.type !== node.label ? `${node.label} · ${node.type}` : node.label;
    return open || !node.count ? name : `${name}\n${node.count}`;
  }

  /** Bends in cytoscape's terms: how far along the line from source to target, and how far beside it. */
  route(edge) {
    const source = this.places.get(edge.source), target = this.places.get(edge.target);
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

  /** Open or close a module; its upper edge stays where it is. */
  toggle(id) {
    if (!this.graph.isModule(id) || id === this.graph.root) return;
    this.graph.reveal(id);
    this.graph.setOpen(id, !this.graph.open.has(id));
    this.redraw(id);
  }

  /** Show the model before or after the surgery; one node stays where it is. */
  setStage(stage, id) {
    this.graph.stage = stage;
    this.redraw(id);
  }

  /** Draw, and move the picture so that a node's upper edge is where it was. */
  redraw(id) {
    const was = this.places.get(id);
    this.draw();
    const is = this.places.get(id), zoom = this.cy.zoom();
    if (was && is) this.cy.panBy({ x: (was.x - is.x) * zoom, y: (was.y - was.height / 2 - is.y + is.height / 2) * zoom });
  }

  select(id) {
    this.cy.batch(() => {
      this.cy.elements(":selected").unselect();
      this.cy.getElementById(id).select();
    });
  }

  /** Bring a node into sight. */
  show(id) {
    if (this.graph.shownBy(id) !== id) {
      this.graph.reveal(id);
      this.draw();
    }
    const place = this.places.get(id);
    if (!place) return;
    this.look(Math.max(this.cy.zoom(), View.READABLE), place, this.middle());
  }

  /** All in sight, where that is not too small to read; else the beginning, as wide as can be read. */
  begin() {
    const { width, height } = this.graph.layout(this.graph.root);
    const across = (this.cy.width() - 2 * View.MARGIN) / width, down = (this.cy.height() - 2 * View.MARGIN) / height;
    if (Math.min(across, down) >= View.READABLE) this.fit();
    else this.look(Math.min(1, Math.max(View.READABLE, across)), { x: width / 2, y: 0 }, { x: this.cy.width() / 2, y: View.MARGIN });
  }

  fit() {
    const { width, height } = this.graph.layout(this.graph.root);
    const across = (this.cy.width() - 2 * View.MARGIN) / width, down = (this.cy.height() - 2 * View.MARGIN) / height;
    this.look(Math.min(1, across, down), { x: width / 2, y: height / 2 }, this.middle());
  }

  /** Show a point of the graph at a point of the screen, in whole pixels. */
  look(zoom, point, at) {
    this.cy.viewport({ zoom, pan: { x: Math.round(at.x - point.x * zoom), y: Math.round(at.y - point.y * zoom) } });
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
    this.cy.batch(() => this.cy.nodes(".closed").forEach((element) => {
      const color = this.heat(element.id());
      element.toggleClass("warm", Boolean(color));
      if (color) element.data("warmth", color);
    }));
  }

  restyle() {
    const css = getComputedStyle(document.documentElement);
    const of = (name) => css.getPropertyValue(`--${name}`).trim();
    const kinds = ["folded", "augmented", "zero", "refused"].flatMap((kind) => [
      { selector: `node[kind = "${kind}"]`, style: { "background-color": of(kind), color: of("on-kind"), "border-color": of(kind) } },
      { selector: `node.module[kind = "${kind}"]`, style: { "background-color": of("module"), color: of("ink"), "border-width": 2.5 } },
    ]);
    this.cy.style().fromJson([
      { selector: "node", style: {
        shape: "round-rectangle", width: "data(width)", height: "data(height)", label: "data(label)",
        "text-wrap": "wrap", "text-valign": "center", "font-size": View.FONT, "line-height": View.LINE / View.FONT, color: of("ink"),
        "background-color": of("value"), "border-width": 1, "border-color": of("line"), "font-family": View.FACE,
        "z-index-compare": "manual", "z-index": View.ABOVE + 1,
      } },
      { selector: "node.module", style: { "background-color": of("module"), "border-color": of("faint") } },
      { selector: "node.open", style: { label: "", "background-opacity": 0.55, "z-index": "data(depth)" } },
      { selector: "node.title", style: {
        shape: "rectangle", "background-color": of("module"), "background-opacity": 0.85, "border-width": 0, "z-index": View.ABOVE + 2,
      } },
      { selector: "node.input, node.output", style: { shape: "ellipse", color: of("faint"), "border-style": "dashed" } },
      { selector: "node.parameter", style: { shape: "cut-rectangle", color: of("faint") } },
      { selector: "node.opaque", style: { "border-style": "dashed", "border-color": of("ink") } },
      ...kinds,
      { selector: "node[kind = 'refused']", style: { "border-style": "dashed" } },
      { selector: "node.warm", style: { "background-color": "data(warmth)", color: "#101318", "background-opacity": 1 } },
      { selector: "edge", style: {
        width: 1.2, "line-color": of("edge"), "curve-style": "straight", "target-arrow-shape": "triangle",
        "target-arrow-color": of("edge"), "arrow-scale": 0.7, events: "no", "z-index-compare": "manual", "z-index": View.ABOVE,
      } },
      { selector: "edge.unseen", style: { "line-style": "dashed" } },
      { selector: "node:selected", style: { "border-color": of("chosen"), "border-width": 4, "border-style": "solid" } },
    ]).update();
  }
}

View.READABLE = 0.8;
View.MARGIN = 16;
View.FONT = 12;
View.LINE = 14;
View.FACE = "system-ui, sans-serif";
View.ABOVE = 1000; // edges lie above modules, values above edges
