"use strict";
// All models of a page: they answer a question about a picture in turn, token by token. In the
// browser this code runs in a worker.

// All models of the page. `info` is the page's description of them, `packed` the fp16 numbers of
// their weights (Uint16Array).
class Models {
  constructor(info, packed) {
    const unpack = unpacker(packed, info.starts);
    this.info = info;
    this.tokenizer = new Tokenizer(info.tokenizer);
    this.models = info.models.map(({ name, parts }) => {
      const get = (tensor) => unpack(parts[tensor]);
      const towerKey = Object.keys(parts).filter((key) => key.startsWith("vision_tower."))
        .map((key) => parts[key].join()).join(";");
      return { name, get, towerKey, decoder: new Decoder(get, info.text) };
    });
    this.pictures = 0;
  }

  // A picture for `ask`, from a canvas's pixels.
  see(rgba, width, height) {
    const pixels = preprocess(rgba, width, height, this.info.image);
    return { name: ++this.pictures, pixels, features: new Map() };
  }

  // The picture's embeddings for a model. Models with the same tower compute it once.
  features(picture, model) {
    const { vision, text } = this.info, known = picture.features;
    if (!known.has(model.towerKey))
      known.set(model.towerKey, tower(picture.pixels, model.get, vision));
    if (!known.has(model.name))
      known.set(model.name, project(known.get(model.towerKey), model.get, text, vision.width));
    return known.get(model.name);
  }

  read(model, picture, ids) {
    const features = this.features(picture, model);
    return model.decoder.read(ids, features, picture.name, this.info.chat.image);
  }

  // Token ids of a question's prompt, with a place for every row of the picture's features.
  promptIds(question) {
    const { prefix, suffix, image, slots, bos } = this.info.chat;
    const ids = this.tokenizer.encode(prefix + this.tokenizer.neutralise(question) + suffix)
      .flatMap((id) => (id === image ? Array(slots).fill(image) : [id]));
    return bos === null || ids[0] === bos ? ids : [bos, ...ids];
  }

  // Token ids of an answer as the reward model reads it, with one end token.
  answerIds(text) {
    const ids = this.tokenizer.encode(this.info.chat.lead + this.tokenizer.neutralise(strip(text)));
    while (ids.length && !strip(this.tokenizer.decode(ids.slice(-1)))) ids.pop();
    return [...ids, this.info.chat.ends[0]];
  }

  // Chances of all tokens after a sequence.
  chances(model, picture, ids) {
    return softmax(model.decoder.logits(this.read(model, picture, ids)));
  }

  // The chance that an answer, drawn token by token, begins as a refusal; null if unknown.
  refusal(model, picture, prompt) {
    if (!this.info.refusals) return null;
    let sum = 0;
    for (const opening of this.info.refusals.ids)
      sum += opening.reduce((chance, id, n) =>
        chance * this.chances(model, picture, [...prompt, ...opening.slice(0, n)])[id], 1);
    return sum;
  }

  // Answers a question token by token, all models in turn. Yields one event for each token
  // (`model`, `id`, its `text` and `chance`, the most likely `other` token, and at the first token
  // the chance of a `refusal`), for the end of each answer, and for its score.
  *ask(picture, question) {
    const { chat: { ends }, text: { context }, maxNew } = this.info;
    const prompt = this.promptIds(question);
    if (prompt.length + maxNew > context)
      throw new RangeError(`The question is too long: it has ${prompt.length} tokens with its ` +
        `picture, and the answer may have ${maxNew}, but the models take ${context} in all.`);
    const reward = this.models.find(({ name }) => name === "reward");
    const answers = this.models.filter((model) => model !== reward)
      .map((model) => ({ model, ids: [], text: new TextDecoder() }));
    for (let active = answers; active.length; active = active.filter((a) => !a.done)) {
      for (const answer of active) {
        const { model, ids } = answer;
        const refusal = ids.length ? null : this.refusal(model, picture, prompt);
        const chances = this.chances(model, picture, [...prompt, ...ids]);
        const id = argmax(chances), chance = chances[id];
        chances[id] = 0;
        const next = argmax(chances), end = ends.includes(id);
        ids.push(id);
        yield {
          model: model.name, id, chance, refusal, end,
          text: answer.text.decode(this.tokenizer.bytesOf(id), { stream: true }),
          other: {
            text: this.tokenizer.decode([next]), chance: chances[next], end: ends.includes(next),
          },
        };
        answer.done = end || ids.length === maxNew;
        if (!answer.done) continue;
        answer.response = strip(this.tokenizer.decode(end ? ids.slice(0, -1) : ids));
        yield { model: model.name, response: answer.response, finished: end };
      }
    }
    if (!reward) return;
    const head = reward.get("score.weight");
    for (const { model, response } of answers) {
      const state = this.read(reward, picture, [...prompt, ...this.answerIds(response)]);
      yield { model: model.name, score: linear(state, 1, head, 1)[0] };
    }
  }
}

// The page starts this code in a worker, so that it stays responsive. It sends the weights once,
// then a picture and a question at a time. A new question ends the answers to the one before.
if (typeof WorkerGlobalScope !== "undefined") {
  const pictures = new Map();
  let models = null, latest = 0;
  const pause = () => new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
  const answer = async ({ number, picture, question }) => {
    latest = number;
    try {
      if (!pictures.has(picture.key))
        pictures.set(picture.key, models.see(picture.rgba, picture.width, picture.height));
      for (const event of models.ask(pictures.get(picture.key), question)) {
        postMessage({ number, event });
        await pause();
        if (latest !== number) return;
      }
      postMessage({ number, done: true });
    } catch (error) {
      postMessage({ number, problem: error.message });
    }
  };
  self.onmessage = ({ data }) => {
    if (!data.info) return answer(data);
    const text = atob(data.weights), bytes = new Uint8Array(text.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
    models = new Models(data.info, new Uint16Array(bytes.buffer));
    postMessage({ ready: true });
  };
}
