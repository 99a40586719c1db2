"use strict";

/**
 * The nested graph: which part of it can be seen, and where that lies. dagre lays out each module's inside on its own.
 * `measure(node)` gives the size of a node, and of an open module's title for `measure(node, true)`.
 */
class NestedGraph {
  constructor(data, measure) {
    this.nodes = new Map(data.nodes.map((node) => [node.id, node]));
    this.edges = data.edges;
    this.measure = measure;
    this.open = new Set();
    this.stage = "before";
    this.chains = new Map();
    this.inside = { before: this.readChildren("before"), after: this.readChildren("after") };
    this.levels = {};
    this.layouts = new Map();
    this.arranged = new Map();
    this.root = data.nodes[0].id;
  }

  has(thing, stage = this.stage) {
    return !thing.stage || thing.stage === stage;
  }

  isModule(id) {
    return this.nodes.get(id).role === "module";
  }

  readChildren(stage) {
    const children = new Map();
    for (const node of this.nodes.values()) {
      if (node.parent === undefined || !this.has(node, stage)) continue;
      if (!children.has(node.parent)) children.set(node.parent, []);
      children.get(node.parent).push(node.id);
    }
    return children;
  }

  children(id) {
    return this.inside[this.stage].get(id) || [];
  }

  /** The node with the modules around it, outermost first. */
  chain(id) {
    let chain = this.chains.get(id);
    if (!chain) {
      const parent = this.nodes.get(id).parent;
      chain = parent === undefined ? [id] : [...this.chain(parent), id];
      this.chains.set(id, chain);
    }
    return chain;
  }

  /** What shows a node: itself, or the outermost closed module around it. */
  shownBy(id) {
    const chain = this.chain(id);
    return chain.find((step) => step === id || !this.open.has(step));
  }

  setOpen(id, open) {
    if (open) this.open.add(id);
    else this.open.delete(id);
    for (const step of this.chain(id)) for (const stage of ["before", "after"]) this.layouts.delete(`${stage} ${step}`);
  }

  /** How many nodes can be seen. */
  count(id = this.root) {
    return this.children(id).reduce((sum, child) => sum + 1 + (this.open.has(child) ? this.count(child) : 0), 0);
  }

  /** Open the modules around a node. */
  reveal(id) {
    for (const step of this.chain(id)) if (step !== id && !this.open.has(step)) this.setOpen(step, true);
  }

  /** Open the modules that hold sites or refusals, level by level, as long as few nodes can be seen and not too far apart. */
  openUpTo(budget, width) {
    let seen = 0, level = [this.root];
    while (level.length) {
      const inner = level.flatMap((id) => this.children(id));
      seen += inner.length;
      if (seen > budget && level[0] !== this.root) return;
      for (const id of level) this.setOpen(id, true);
      if (this.layout(this.root).width > width && level[0] !== this.root) {
        for (const id of level) this.setOpen(id, false);
        return;
      }
      level = inner.filter((id) => this.isModule(id) && this.nodes.get(id).kind);
    }
  }

  /** The edges of each module: those whose ends it holds, and no module inside it does; with the children they join. */
  edgesIn(id) {
    if (!this.levels[this.stage]) {
      const levels = new Map();
      for (const edge of this.edges) {
        if (!this.has(edge)) continue;
        const from = this.chain(edge.source), to = this.chain(edge.target);
        let depth = 0;
        while (from[depth] === to[depth]) depth += 1;
        const level = from[depth - 1];
        if (!levels.has(level)) levels.set(level, []);
        levels.get(level).push({ edge, from: from[depth], to: to[depth] });
      }
      this.levels[this.stage] = levels;
    }
    return this.levels[this.stage].get(id) || [];
  }

  size(id) {
    const node = this.nodes.get(id);
    if (!this.open.has(id)) return this.measure(node);
    const { width, height } = this.layout(id), title = this.measure(node, true);
    return { width: Math.max(width + 2 * NestedGraph.PADDING, title.width), height: height + 2 * NestedGraph.PADDING + title.height };
  }

  /** The inside of an open module: size, the centres of its children, and the bends of the edges between them. */
  layout(id) {
    const key = `${this.stage} ${id}`;
    if (this.layouts.has(key)) return this.layouts.get(key);
    const children = this.children(id), place = new Map(children.map((child, index) => [child, index]));
    const joins = new Map(this.edgesIn(id).map(({ from, to }) => [`${from} ${to}`, [place.get(from), place.get(to)]]));
    const found = this.arrange(children.map((child) => this.size(child)), [...joins.values()]);
    const places = new Map(children.map((child, index) => [child, found.places[index]]));
    const bends = new Map([...joins.keys()].map((join, index) => [join, found.bends[index]]));
    const layout = { width: found.width, height: found.height, places, bends };
    this.layouts.set(key, layout);
    return layout;
  }

  /** dagre's layout of boxes and edges between them; blocks that look alike share it. */
  arrange(sizes, edges) {
    const key = JSON.stringify([sizes, edges]);
    if (this.arranged.has(key)) return this.arranged.get(key);
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", rankalign: "top", nodesep: 16, ranksep: 26, edgesep: 8 });
    sizes.forEach(({ width, height }, index) => graph.setNode(String(index), { width, height }));
    for (const [from, to] of [...edges, ...NestedGraph.columns(sizes.length, edges)]) graph.setEdge(String(from), String(to), {});
    dagre.layout(graph);
    const found = {
      width: graph.graph().width,
      height: graph.graph().height,
      places: sizes.map((_, index) => graph.node(String(index))),
      bends: edges.map(([from, to]) => graph.edge(String(from), String(to)).points.slice(1, -1)),
    };
    this.arranged.set(key, found);
    return found;
  }

  /** Joins that set what no edge touches, such as the blocks of a ModuleList, in columns and not in one row. */
  static columns(count, edges) {
    const joined = new Set(edges.flat()), alone = [...Array(count).keys()].filter((index) => !joined.has(index));
    const high = Math.ceil(alone.length / Math.ceil(alone.length / NestedGraph.COLUMN));
    return alone.slice(1).map((to, index) => [alone[index], to]).filter((_, index) => (index + 1) % high);
  }

  /** All that can be seen, outer modules first: {nodes: [{id, x, y, width, height, open, depth}], edges: [{id, source, target, bends, seen}]}. */
  visible() {
    const nodes = [], edges = new Map();
    const place = (id, left, top, depth) => {
      const { places, bends } = this.layout(id);
      for (const [child, spot] of places) {
        const open = this.open.has(child);
        // Whole pixels: cytoscape keeps pictures of nodes, which blur in between.
        const shown = { id: child, x: Math.round(left + spot.x), y: Math.round(top + spot.y), width: spot.width, height: spot.height, open, depth };
        nodes.push(shown);
        if (!open) continue;
        const corner = shown.y - spot.height / 2 + NestedGraph.PADDING + this.measure(this.nodes.get(child), true).height;
        place(child, shown.x - this.layout(child).width / 2, corner, depth + 1);
      }
      for (const { edge, from, to } of this.edgesIn(id)) {
        // What code without a graph may call is the module: the edge ends at its box, open or closed.
        const seen = edge.seen !== false, source = this.shownBy(edge.source), target = seen ? this.shownBy(edge.target) : to;
        const name = `${source} ${target}`;
        if (edges.has(name)) continue;
        const points = bends.get(`${from} ${to}`).map((point) => ({ x: left + point.x, y: top + point.y }));
        edges.set(name, { id: name, source, target, seen, bends: points });
      }
    };
    place(this.root, 0, 0, 0);
    return { nodes, edges: [...edges.values()] };
  }
}

NestedGraph.PADDING = 12;
NestedGraph.COLUMN = 8; // at most so many in a column
