// Shows below a node of this pack the text that it reports when it has run: what a loader found in its file,
// what a preview counted, where something was saved. ComfyUI shows pictures by itself, but no such text.

import { app } from "../../scripts/app.js";

const PREFIX = "PiT"; // of our nodes' ids
const NAME = "report";
const HEIGHT = 108; // pixels: five lines and the margins; longer text scrolls

const STYLE = {
  margin: "0",
  padding: "4px 6px",
  boxSizing: "border-box",
  overflow: "auto",
  font: "12px/1.3 sans-serif",
  whiteSpace: "pre-wrap",
  overflowWrap: "anywhere",
  userSelect: "text",
  color: "var(--input-text)",
};

function addReport(node) {
  const element = document.createElement("pre");
  Object.assign(element.style, STYLE);
  const widget = node.addDOMWidget(NAME, NAME, element, {
    getMinHeight: () => HEIGHT,
    getValue: () => element.textContent,
    setValue: (text) => {
      element.textContent = text;
    },
    serialize: false, // not sent to the server
  });
  widget.serialize = false; // nor saved with the workflow
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return widget;
}

function show(node, output) {
  if (!output?.text) return;
  const widget = node.widgets?.find(({ name }) => name === NAME) ?? addReport(node);
  widget.value = [output.text].flat().join("\n");
}

app.registerExtension({
  name: "PieceItTogether.Report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      show(this, output);
    };
  },
  // Another tab and back: the page makes the nodes anew, and tells what they last showed.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph.getNodeById(id);
      if (node?.type.startsWith(PREFIX)) show(node, output);
    }
  },
});
