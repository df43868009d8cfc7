"use strict";
// Runs the code of a playground page in node: `node playground_node.js PAGE CASES`. CASES is a JSON
// file with any of `texts` (to token ids), `answers` (to the reward model's ids), `pictures` (to
// pixel values), `logits` and `prompts` (to answers). Prints the results as JSON, in this order.
const fs = require("fs");
const vm = require("vm");

const page = fs.readFileSync(process.argv[2], "utf-8");
const cases = JSON.parse(fs.readFileSync(process.argv[3], "utf-8"));
const block = (id) => {
  const start = page.indexOf(">", page.indexOf(` id="${id}"`)) + 1;
  return page.slice(start, page.indexOf("</script>", start));
};
const Models = vm.runInThisContext(block("code") + "; Models");
const bytes = Buffer.from(block("weights"), "base64");
const packed = new Uint16Array(new Uint8Array(bytes).buffer);
const models = new Models(JSON.parse(block("info")), packed);

const pictures = (cases.pictures || []).map(({ rgba, width, height }) =>
  models.see(Uint8Array.from(Buffer.from(rgba, "base64")), width, height));
const result = {
  texts: (cases.texts || []).map((text) => models.promptIds(text)),
  answers: (cases.answers || []).map((text) => models.answerIds(text)),
  pixels: cases.pixels ? pictures.map(({ pixels }) => [...pixels]) : [],
  logits: (cases.logits || []).map(({ model, picture, question }) => {
    const one = models.models.find(({ name }) => name === model);
    const state = models.read(one, pictures[picture], models.promptIds(question));
    return [...one.decoder.logits(state)];
  }),
  prompts: (cases.prompts || []).map(({ picture, question }) => {
    const started = process.cpuUsage().user, replies = {};
    for (const event of models.ask(pictures[picture], question)) {
      const reply = (replies[event.model] ??= { ids: [], chances: [] });
      if (event.id !== undefined) {
        reply.ids.push(event.id);
        reply.chances.push(event.chance);
        reply.refusal ??= event.refusal;
      } else Object.assign(reply, event);
    }
    return { replies, seconds: (process.cpuUsage().user - started) / 1e6 };
  }),
};
process.stdout.write(JSON.stringify(result));
