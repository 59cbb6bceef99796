// Classification in this browser: ONNX Runtime Web on the model in model.js. Nothing leaves the page.
"use strict";

const bytesOf = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

/** Unpack gzip bytes. */
async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((x) => Math.exp(x - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

/** RGB or grey bytes -> a canvas that can be drawn. */
function toCanvas({ width, height, data }) {
  const channels = data.length / (width * height);
  const pixels = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = data[channels * i + (channels === 3 ? c : 0)];
    pixels.data[4 * i + 3] = 255;
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

globalThis.classifier = {
  note: "Runs in this browser. Nothing is uploaded.",

  async load() {
    ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
    ort.env.wasm.wasmBinary = await gunzip(bytesOf(CONVMIXER_RUNTIME));
    ort.env.logLevel = "error";
    this.session = await ort.InferenceSession.create(bytesOf(CONVMIXER_MODEL.onnx), { executionProviders: ["wasm"] });
    CONVMIXER_MODEL.onnx = CONVMIXER_RUNTIME = null; // let the text go
    return CONVMIXER_MODEL;
  },

  /** -> {top: [{name, probability, map}], rows, columns, seen: canvas, milliseconds}; map: rows x columns or null. */
  async classify(blob) {
    const p = CONVMIXER_MODEL.preprocessing;
    const start = performance.now();
    const { seen, input } = await prepare(blob, p);
    const shape = [1, p.in_chans, p.img_size, p.img_size];
    const { logits, maps } = await this.session.run({ images: new ort.Tensor("float32", input, shape) });
    const milliseconds = performance.now() - start;
    const probabilities = softmax(Array.from(logits.data));
    const order = probabilities.map((_, i) => i).sort((a, b) => logits.data[b] - logits.data[a]).slice(0, 5);
    const [rows, columns] = maps ? maps.dims.slice(2) : [0, 0];
    const area = rows * columns;
    const top = order.map((i, rank) => ({
      name: CONVMIXER_MODEL.classes[i],
      probability: probabilities[i],
      map: maps ? Array.from(maps.data.subarray(rank * area, (rank + 1) * area)) : null,
    }));
    return { top, rows, columns, seen: toCanvas(seen), milliseconds };
  },
};
