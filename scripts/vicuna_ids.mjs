// Token ids of LLaVA-1.5's template, from the vocabulary of Llama, into tests/golden/vicuna_v1.json.
//
//     npm install --no-save llama-tokenizer-js && node scripts/vicuna_ids.mjs
//
// It shares no code with spavl_lib: turns are joined as LLaVA's `conversation.py` joins those of
// `vicuna_v1` (SeparatorStyle.TWO), and cut at special tokens as `tokenizer_image_token` and the
// tokenizer do. Every part between two of them is tokenised by itself, with a space before it.
// `lengths` are the characters of each token, so that a test can cut the text again; a space that
// the tokenizer adds counts.

import { writeFileSync } from "node:fs";
import llama from "llama-tokenizer-js";

const SYSTEM =
  "A chat between a curious user and an artificial intelligence assistant. " +
  "The assistant gives helpful, detailed, and polite answers to the user's questions.";
const SPECIAL = { "<s>": 1, "</s>": 2, "<image>": 32000 };
const SEPARATORS = [" ", "</s>"];

const CASES = {
  "prompt alone": { image: true, turns: ["What is in this picture?"] },
  "prompt and answer": { image: true, turns: ["How many cats are there?", "There are two cats."] },
  "no image": { image: false, turns: ["Why is the sky blue?", "Because of scattering, mostly."] },
  "two turns": {
    image: true,
    turns: ["What is this?", "A red kite.", "Can it fly in light wind?", "Yes, if it is small."],
  },
};

function written({ image, turns }) {
  let text = SYSTEM + SEPARATORS[0];
  turns.forEach((turn, number) => {
    const role = number % 2 ? "ASSISTANT" : "USER";
    text += `${role}: ${image && number === 0 ? "<image>\n" : ""}${turn}${SEPARATORS[number % 2]}`;
  });
  return turns.length % 2 ? `${text}ASSISTANT:` : text;
}

function tokenised(text) {
  const ids = [SPECIAL["<s>"]];
  const lengths = [3];
  for (const part of text.split(/(<image>|<\/s>)/)) {
    if (part in SPECIAL) {
      ids.push(SPECIAL[part]);
      lengths.push(part.length);
    } else if (part) {
      for (const id of llama.encode(part, false, true)) {
        ids.push(id);
        lengths.push(llama.decode([id], false, false).length);
      }
    }
  }
  return { ids, lengths };
}

const cases = Object.fromEntries(
  Object.entries(CASES).map(([name, conversation]) => {
    const text = written(conversation);
    return [name, { ...conversation, text, ...tokenised(text) }];
  }),
);
writeFileSync("tests/golden/vicuna_v1.json", `${JSON.stringify(cases, null, 1)}\n`);
