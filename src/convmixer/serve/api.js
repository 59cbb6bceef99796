// Classification on the server that gave the page, by its HTTP API.
"use strict";

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (classifier.token) headers.authorization = `Bearer ${classifier.token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("The server cannot be reached.");
  }
  const body = await response.json();
  if (response.ok) return body;
  const error = new Error(body.error?.message ?? `The server answered ${response.status}.`);
  error.needsToken = response.status === 401;
  throw error;
}

async function loadImage(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  return image;
}

globalThis.classifier = {
  note: "Runs on this server. Pictures are not kept.",
  token: "",

  load: () => ask("v1/model"),

  /** The same answer as in local.js; `milliseconds` is the server's own time. */
  async classify(blob) {
    const start = performance.now();
    const headers = { "content-type": blob.type.startsWith("image/") ? blob.type : "application/octet-stream" };
    const answer = await ask("v1/predict?explain=true", { method: "POST", headers, body: blob });
    const [{ classes, probabilities, evidence }] = answer.predictions;
    const rows = evidence.maps?.[0].length ?? 0;
    const top = classes.map((name, i) => ({
      name,
      probability: probabilities[i],
      map: evidence.maps?.[i]?.flat() ?? null,
    }));
    const seen = await loadImage(evidence.seen);
    return { top, rows, columns: evidence.maps?.[0][0].length ?? 0, seen, milliseconds: performance.now() - start };
  },
};
