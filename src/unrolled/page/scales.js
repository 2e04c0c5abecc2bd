// The scales of bars, lines and colors.

/** Return a function that gives the scale of a number: fixed for gates and tanh, else from the recorded run. */
export function findScales(model) {
  const over = (valueIndex) => model.largestOf(valueIndex);
  let parameters = 0;
  for (const { values } of model.parameters.values()) for (const value of values ?? []) if (Math.abs(value) < 5) parameters = Math.max(parameters, Math.abs(value));
  const input = over(model.inputValue) || 1;
  const lanes = new Map((model.drawing?.layout.nodes ?? []).map((node) => [node.id, node.lane]));
  const sums = [];
  const states = new Map();
  for (const node of model.nodes) {
    for (const q of model.quantitiesOf(node)) if (model.quantity(q).kind !== "node" || (node.kind === "layer" && !node.range)) sums.push(over(model.valueIndex(q)));
    const lane = lanes.get(node.id) ?? model.states.find((state) => state.end === node.id)?.name;
    if (lane) states.set(lane, Math.max(states.get(lane) ?? 1, over(node.value)));
  }
  for (const state of model.states) states.set(state.name, Math.max(states.get(state.name) ?? 1, over(state.value)));
  const sum = Math.max(...sums, 1e-9);
  const cache = new Map();
  return (number) => {
    if (model.isParameter(number)) return parameters || 1;
    if (number.q === "x") return input;
    if (!cache.has(number.q)) cache.set(number.q, find(number.q));
    return cache.get(number.q);
  };
  function find(q) {
    if (states.has(q)) return states.get(q);
    const { kind, node, state } = model.quantity(q);
    if (kind === "before") return states.get(state.name);
    if (kind !== "node" || (node.kind === "layer" && !node.range)) return sum;
    if (node.range) return 1;
    const lane = lanes.get(node.id);
    return lane ? states.get(lane) : Math.max(over(node.value), 1e-9);
  }
}
