// What the input and the output of a layer are called: output[2], or the input of the next layer.

/** The input of a step, such as input[0, 2]. Empty if it has no index. */
export function inputName(model, step) {
  return model.tensorNames.input?.replace("{}", step) ?? "";
}

/** The output of a step, such as output[0, 2]. Empty if it has no index. */
export function outputName(model, step) {
  return model.tensorNames.output?.replace("{}", step) ?? "";
}

/** What a step reads: "the input", or "the output of layer 0". */
export function inputDescription(model) {
  return model.index ? `the output of layer ${model.index - 1}` : "the input";
}

/** What the first state is besides: "the output", or "the input of layer 1". */
export function outputDescription(model) {
  const { above, joined } = model.tensorNames;
  return `${joined ? "part of " : ""}${above === null ? "the output" : `the input of layer ${above}`}`;
}
