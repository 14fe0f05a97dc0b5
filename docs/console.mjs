// A console of one service, on Node.js: KEY=$(base64 -w0 corekey.bin) node console.mjs http://localhost:8000 demo
//
// It uses node:http and not fetch. Node's fetch sends nothing, not even a header, before the first byte of a body
// that is a stream, and the daemon waits ten seconds for a header: a console at which nobody types would end. And
// fetch gives up any answer that is silent for 300 seconds.
import { request } from "node:http";

const [daemon, id] = process.argv.slice(2);
const headers = { "X-Duxcore-CoreKey": process.env.KEY ?? "" };

function call(method, path, failed, succeeded) {
  const sent = request(`${daemon}/service/${id}/${path}`, { method, headers }, async (answer) => {
    answer.on("error", failed); // it was broken off
    if (answer.statusCode < 400) return succeeded(answer);
    answer.setEncoding("utf8");
    let text = "";
    for await (const part of answer) text += part;
    failed(new Error(JSON.parse(text).error.description));
  });
  return sent.on("error", failed);
}

const end = (error) => {
  console.error(error.message);
  process.exit(1);
};
const warn = (error) => console.error(error.message); // the logs go on, or end by themselves

if (process.stdout.isTTY) {
  const { rows, columns: cols } = process.stdout;
  call("POST", "tty", warn, (answer) => answer.resume()).end(JSON.stringify({ rows, cols }));
}
const stdin = call("POST", "stdin", warn, (answer) => answer.resume());
stdin.flushHeaders(); // before anybody types
process.stdin.pipe(stdin);
call("GET", "logs?follow=true", end, (answer) => {
  answer.pipe(process.stdout);
  answer.on("end", () => process.exit());
}).end();
