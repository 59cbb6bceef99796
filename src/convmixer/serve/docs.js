// The API described on one page, from openapi.json; no other host is asked.
"use strict";

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

function table(caption, head, rows) {
  const node = element("table");
  node.append(element("caption", caption));
  const row = (cells, tag) => {
    const line = element("tr");
    line.append(...cells.map((cell) => element(tag, cell)));
    return line;
  };
  node.append(row(head, "th"), ...rows.map((cells) => row(cells, "td")));
  return node;
}

function kindOf(schema = {}) {
  const range = [schema.minimum, schema.maximum].filter((x) => x !== undefined).join(" to ");
  const fallback = schema.default === undefined ? "" : `, default ${schema.default}`;
  return `${schema.type ?? "any"}${range && ` ${range}`}${fallback}`;
}

function operation(path, method, about) {
  const card = element("section", undefined, "card");
  const title = element("h2");
  title.append(element("code", `${method.toUpperCase()} ${path}`));
  card.append(title, element("p", about.summary));
  const parameters = (about.parameters ?? []).map((p) => [p.name, kindOf(p.schema), p.description ?? ""]);
  if (parameters.length) card.append(table("Parameters", ["name", "value", "what it does"], parameters));
  if (about.requestBody) {
    card.append(element("p", `Body: ${about.requestBody.description} ${Object.keys(about.requestBody.content).join(", ")}.`));
  }
  const answers = Object.entries(about.responses).map(([status, { description }]) => [status, description]);
  card.append(table("Answers", ["status", "meaning"], answers));
  return card;
}

async function main() {
  const address = location.href.replace(/\/docs.*$/, "");
  document.getElementById("example").textContent = [
    `curl --data-binary @cat.jpg -H "Content-Type: image/jpeg" ${address}/v1/predict`,
    `curl -F image=@cat.jpg -F image=@dog.png "${address}/v1/predict?topk=3"`,
  ].join("\n");
  const description = await (await fetch("openapi.json")).json();
  const cards = Object.entries(description.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, about]) => operation(path, method, about)),
  );
  document.getElementById("operations").replaceChildren(...cards);
}

main().catch((error) => {
  document.querySelector("[role=status]").textContent = `The description cannot be loaded: ${error.message}`;
});
