// A console of one service, on Node.js:
// COREKEY=$(base64 -w0 corekey.bin) node console.mjs http://localhost:8000 demo
//
// It uses node:http and not fetch. Node's fetch sends nothing, not even a header, before the first byte of a body
// that is a stream, and the daemon waits ten seconds for a header: a console at which nobody types would end. And
// fetch gives up on any answer that is silent for 300 seconds.
const [daemon, id] = process.argv.slice(2);
const { request } = await import(daemon.startsWith("https:") ? "node:https" : "node:http");
const headers = { "X-Duxcore-CoreKey": process.env.COREKEY ?? "" };

function call(method, path, failed, succeeded) {
  const sent = request(`${daemon}/service/${encodeURIComponent(id)}/${path}`, { method, headers }, async (answer) => {
    answer.on("error", failed); // it was cut off
    if (answer.statusCode < 400) return succeeded(answer);
    answer.setEncoding("utf8");
    let text = "";
    for await (const part of answer) text += part;
    failed(new Error(text.trim()));
  });
  return sent.on("error", failed);
}

const warn = (error) => console.error(error.message || error.code); // the logs go on, or end by themselves
const end = (error) => {
  warn(error);
  process.exit(1);
};

const { stdin: keys, stdout: screen } = process;
if (keys.isTTY && screen.isTTY) {
  const resize = () =>
    call("POST", "tty", warn, (answer) => answer.resume()).end(JSON.stringify({ rows: screen.rows, cols: screen.columns }));
  resize();
  screen.on("resize", resize);
  keys.setRawMode(true); // the service's terminal echoes, and has the control keys; Ctrl-] leaves
  keys.on("data", (typed) => typed.includes(0x1d) && process.exit());
}
const stdin = call("POST", "stdin", warn, (answer) => answer.resume());
stdin.flushHeaders(); // before anybody types
keys.pipe(stdin);
stdin.on("close", () => keys.resume()); // the pipe would pause them, and Ctrl-] with them
call("GET", "logs?follow=true", end, (answer) => {
  answer.pipe(screen);
  answer.on("end", () => process.exit());
}).end();
