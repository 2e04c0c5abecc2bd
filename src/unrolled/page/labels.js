// What nodes are called in formulas.

const MAX_OPERANDS = 6; // of an expression that is written in one line
const MAX_DEPTH = 3; // functions of functions in it

/**
 * Return what each node is called in formulas, by id: its name, or empty for one that its readers write out.
 *
 * A step may compute another x from its input. It is called x′. A node without a name is called v_1, v_2, … if its formula is long or deep, or would be written out more than once.
 */
export function findLabels({ nodes, nodesById, readers, parameters, statesByName }) {
  const isFree = (letter) => ![...nodes.map((node) => node.name), ...parameters.keys(), ...statesByName.keys()].some((name) => name.split("_")[0] === letter);
  const letter = ["v", "u", "q", "w", "a"].find(isFree) ?? "node";
  const labels = new Map();
  const operands = new Map();
  const depths = new Map(); // 0 for a node that has a name
  let count = 0;
  for (const node of nodes) {
    const sources = node.terms.map((term) => term.source).filter((source) => source !== null);
    operands.set(node.id, sources.reduce((sum, source) => sum + (labels.get(source) === "" ? operands.get(source) : 1), 0));
    const depth = 1 + Math.max(0, ...sources.map((source) => depths.get(source) ?? 0));
    const isRepeated = readers.get(node.id).length > 1 && (node.kind === "layer" || operands.get(node.id) > 1);
    const isLong = operands.get(node.id) > MAX_OPERANDS || depth > MAX_DEPTH || isRepeated;
    if (!node.name && isLong) count += 1;
    const name = node.name === "x" ? "x′" : node.name;
    depths.set(node.id, name || isLong ? 0 : depth);
    labels.set(node.id, name || (isLong ? `${letter}_${count}` : ""));
  }
  return labels;
}
