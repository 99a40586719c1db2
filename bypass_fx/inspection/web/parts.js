"use strict";

/**
 * Split modules that hold more than can be drawn at once into parts, modules of their own that can be opened one by one.
 * A part holds neighbours in the order of the dataflow, so that edges run from one part to the next.
 */
function splitIntoParts(data) {
  const nodes = new Map(data.nodes.map((node) => [node.id, node])), held = new Map();
  for (const node of data.nodes) if (node.parent !== undefined) held.set(node.parent, [...(held.get(node.parent) || []), node]);
  for (const [id, children] of held) if (children.length > splitIntoParts.MOST) split(data, nodes, nodes.get(id), children);
}

splitIntoParts.MOST = 150;

function split(data, nodes, module, children) {
  const ordered = inOrder(data, nodes, module, children), size = Math.ceil(Math.sqrt(ordered.length));
  for (let start = 0; start < ordered.length; start += size) {
    const part = ordered.slice(start, start + size), label = `${part[0].label} … ${part[part.length - 1].label}`;
    const made = { id: `${module.id} ${start} ${label}`, parent: module.id, role: "module", label, type: `part of ${module.label}` };
    data.nodes.push(made);
    for (const node of part) node.parent = made.id;
  }
}

/** The children of a module, each behind those that it reads from; where nothing tells, by the numbers in their names. */
function inOrder(data, nodes, module, children) {
  const within = (id) => {
    let node = nodes.get(id);
    while (node && node.parent !== module.id) node = nodes.get(node.parent);
    return node;
  };
  const readers = new Map(children.map((child) => [child, []])), waits = new Map(children.map((child) => [child, 0]));
  for (const { source, target } of data.edges) {
    const from = within(source), to = within(target);
    if (!from || !to || from === to) continue;
    readers.get(from).push(to);
    waits.set(to, waits.get(to) + 1);
  }
  const byName = [...children].sort((a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }));
  const ordered = new Set(), ready = byName.filter((child) => !waits.get(child)).reverse();
  while (ready.length) {
    const child = ready.pop();
    ordered.add(child);
    for (const reader of readers.get(child)) {
      waits.set(reader, waits.get(reader) - 1);
      if (!waits.get(reader)) ready.push(reader);
    }
  }
  return [...ordered, ...byName.filter((child) => !ordered.has(child))]; // what is left reads from itself, in a circle
}
