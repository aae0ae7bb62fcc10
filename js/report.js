// Shows below a node of this pack the text that it reports when it has run: what a loader found in its file,
// what a preview counted, where something was saved. ComfyUI shows pictures by itself, but no such text.

import { app } from "../../scripts/app.js";

const NAME = "report";
const HEIGHT = 84; // pixels: five lines; longer text scrolls

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
    if (!nodeData.name.startsWith("PiT")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      show(this, output);
    };
  },
});
