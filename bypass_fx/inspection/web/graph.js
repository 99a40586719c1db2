"use strict";

/** The nested graph: which part of it can be seen, and where that lies. dagre lays out each module's inside on its own. */
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
    for (const step of this.chain(id)) this.layouts.delete(`${this.stage} ${step}`);
    const other = this.stage === "before" ? "after" : "before";
    for (const step of this.chain(id)) this.layouts.delete(`${other} ${step}`);
  }

  /** Open the modules around a node. */
  reveal(id) {
    for (const step of this.chain(id)) if (step !== id && !this.open.has(step)) this.setOpen(step, true);
  }

  /** Open the modules that hold sites or refusals, level by level, as long as at most `budget` nodes can be seen. */
  openUpTo(budget) {
    let seen = 0, level = [this.root];
    while (level.length) {
      const inner = level.flatMap((id) => this.children(id));
      seen += inner.length;
      if (seen > budget && level[0] !== this.root) return;
      for (const id of level) this.setOpen(id, true);
      level = inner.filter((id) => this.isModule(id) && this.nodes.get(id).kind);
    }
  }

  /** Edges between the children of each module: an edge belongs to the innermost module that holds both its ends. */
  levelEdges(id) {
    if (!this.levels[this.stage]) {
      const levels = new Map();
      for (const edge of this.edges) {
        if (!this.has(edge)) continue;
        const from = this.chain(edge.source), to = this.chain(edge.target);
        let depth = 0;
        while (from[depth] === to[depth]) depth += 1;
        const level = from[depth - 1];
        if (!levels.has(level)) levels.set(level, new Map());
        levels.get(level).set(`${from[depth]} ${to[depth]}`, [from[depth], to[depth]]);
      }
      this.levels[this.stage] = levels;
    }
    return this.levels[this.stage].get(id) || new Map();
  }

  size(id) {
    if (!this.open.has(id)) return this.measure(this.nodes.get(id));
    const { height } = this.layout(id);
    const width = this.innerWidth(id);
    return { width: width + 2 * NestedGraph.PADDING, height: height + 2 * NestedGraph.PADDING + NestedGraph.TITLE };
  }

  /** How wide the inside of an open module is: at least as wide as its title. */
  innerWidth(id) {
    return Math.max(this.layout(id).width, this.measure(this.nodes.get(id), true).width - 2 * NestedGraph.PADDING);
  }

  /** The width inside an open module, and how much of it lies left and right of the children (edges may run there). */
  room(id) {
    const inner = this.innerWidth(id), { width, places } = this.layout(id);
    const spots = [...places.values()];
    const beside = (inner - width) / 2;
    const left = beside + Math.min(...spots.map((spot) => spot.x - spot.width / 2));
    return { inner, left, right: inner - beside - Math.max(...spots.map((spot) => beside + spot.x + spot.width / 2)) + beside };
  }

  /** The inside of an open module: size, the centres of its children, and the bends of the edges between them. */
  layout(id) {
    const key = `${this.stage} ${id}`;
    if (this.layouts.has(key)) return this.layouts.get(key);
    const children = this.children(id), place = new Map(children.map((child, index) => [child, index]));
    const edges = [...this.levelEdges(id).values()].map(([from, to]) => [place.get(from), place.get(to)]);
    const found = this.arrange(children.map((child) => this.size(child)), edges);
    const places = new Map(children.map((child, index) => [child, found.places[index]]));
    const bends = new Map(edges.map(([from, to], index) => [`${children[from]} ${children[to]}`, found.bends[index]]));
    const layout = { width: found.width, height: found.height, places, bends };
    this.layouts.set(key, layout);
    return layout;
  }

  /** dagre's layout of boxes and edges between them; blocks that look alike share it. */
  arrange(sizes, edges) {
    const key = JSON.stringify([sizes, edges]);
    if (this.arranged.has(key)) return this.arranged.get(key);
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 26, edgesep: 8 });
    sizes.forEach(({ width, height }, index) => graph.setNode(String(index), { width, height }));
    for (const [from, to] of edges) graph.setEdge(String(from), String(to), {});
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

  /** All that can be seen, with places: {nodes: [{id, x, y, width, height, open, inner, left, right}], edges: [{id, source, target, bends, seen}]}. */
  visible() {
    const nodes = [], origins = new Map();
    const place = (id, left, top) => {
      origins.set(id, { left, top });
      for (const [child, spot] of this.layout(id).places) {
        const open = this.open.has(child);
        const room = open ? this.room(child) : {};
        nodes.push({ id: child, x: left + spot.x, y: top + spot.y, width: spot.width, height: spot.height, open, ...room });
        if (open) {
          const corner = top + spot.y - spot.height / 2;
          place(child, left + spot.x - this.layout(child).width / 2, corner + NestedGraph.PADDING + NestedGraph.TITLE);
        }
      }
    };
    place(this.root, 0, 0);
    const edges = new Map();
    for (const edge of this.edges) {
      if (!this.has(edge)) continue;
      const source = this.shownBy(edge.source), target = this.shownBy(edge.target);
      const id = `${source} ${target}`;
      if (source === target || edges.has(id)) continue;
      edges.set(id, { id, source, target, seen: edge.seen !== false, bends: this.bends(edge, origins) });
    }
    return { nodes, edges: [...edges.values()] };
  }

  bends(edge, origins) {
    const from = this.chain(edge.source), to = this.chain(edge.target);
    let depth = 0;
    while (from[depth] === to[depth]) depth += 1;
    const level = from[depth - 1];
    const points = this.layout(level).bends.get(`${from[depth]} ${to[depth]}`) || [];
    const { left, top } = origins.get(level);
    return points.map((point) => ({ x: left + point.x, y: top + point.y }));
  }
}

NestedGraph.PADDING = 12;
NestedGraph.TITLE = 18;
