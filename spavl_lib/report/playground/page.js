"use strict";
// The page: choose a picture, ask, and show the answers that the worker (answers.js) sends. Every
// text is shown with textContent, so nothing that a model or a reader writes becomes markup.
(() => {
  const MOST_PIXELS = 50_000_000, LONGEST = 2048, NARROWEST = 200, KEPT = 12;
  const byId = (id) => document.getElementById(id);
  const info = JSON.parse(byId("info").textContent);
  const cards = new Map([...document.querySelectorAll(".card")].map((c) => [c.dataset.model, c]));
  const tokensOf = (model) => document.querySelector(`[data-tokens="${CSS.escape(model)}"]`);
  const swaps = document.querySelectorAll(".swap");
  const cells = new Map(); // model -> the cell of the newest question
  // `replies` belong to the newest question, `before` to the last one that was answered whole.
  const state = {
    pictures: [], picture: null, number: 0, ready: false, busy: false, replies: {}, before: {},
  };

  // --- text ---

  // Shows characters that hide or reorder text.
  const clean = (text) => text.replace(
    /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
    (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  function element(tag, text = "", className = "") {
    const made = document.createElement(tag);
    made.textContent = clean(text);
    made.className = className;
    return made;
  }

  function percent(chance) {
    const exact = (100 * chance).toFixed(1);
    const number = chance > 0.9995 ? "> 99.9" : chance < 0.0005 ? "< 0.1" : exact;
    return `${number} %`.replaceAll(" ", "\u00a0");
  }

  function tokenText({ text, end }) {
    if (end || text === " ") return end ? "(end)" : "(space)";
    return text.replaceAll(" ", "␣") || "(part of a character)";
  }

  function say(status, problem = "") {
    byId("status").textContent = status;
    byId("problem").textContent = clean(problem);
  }

  // --- pictures ---

  function image(uri) {
    return new Promise((resolve, reject) => {
      const img = new Image();
      img.onload = () => resolve(img);
      img.onerror = reject;
      img.src = uri;
    });
  }

  // A picture's pixels, made smaller if it is large.
  async function pixels(picture) {
    if (picture.rgba) return picture;
    const img = await image(picture.uri);
    const scale = Math.min(1, LONGEST / Math.max(img.naturalWidth, img.naturalHeight));
    const canvas = document.createElement("canvas");
    picture.width = canvas.width = Math.max(1, Math.round(img.naturalWidth * scale));
    picture.height = canvas.height = Math.max(1, Math.round(img.naturalHeight * scale));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(img, 0, 0, canvas.width, canvas.height);
    picture.rgba = context.getImageData(0, 0, canvas.width, canvas.height).data;
    return picture;
  }

  // Adds a reader's own file to the pictures. The same files are refused as by `spavl ask`.
  async function addFile(file) {
    const head = [...new Uint8Array(await file.slice(0, 12).arrayBuffer())];
    const start = String.fromCharCode(...head);
    const known = start.startsWith("\xff\xd8\xff") || start.startsWith("\x89PNG") ||
      (start.startsWith("RIFF") && start.endsWith("WEBP"));
    const refuse = (why) => say("", `“${file.name}” cannot be used: ${why}.`);
    if (!known) return refuse("it is no JPEG, PNG or WebP picture");
    const uri = URL.createObjectURL(file);
    const img = await image(uri).catch(() => null);
    const [wide, high] = img ? [img.naturalWidth, img.naturalHeight] : [0, 0];
    if (!wide || !high) return refuse("the browser cannot read it as a picture");
    if (wide * high > MOST_PIXELS)
      return refuse(`it has ${wide} × ${high} pixels, and at most 50 million can be read`);
    if (Math.max(wide, high) > NARROWEST * Math.min(wide, high))
      return refuse(`it has ${wide} × ${high} pixels and is narrower than ${NARROWEST} to 1`);
    const own = { uri, caption: "your picture", own: true };
    state.pictures = [...state.pictures.filter((p) => !p.own), own];
    say("Your picture is chosen. Type a question and press Ask.");
    showPictures(state.pictures.length - 1);
  }

  const shown = ({ uri, own }) =>
    Object.assign(element("img", "", own ? "own" : ""), { src: uri, alt: "" });

  function showPictures(chosen) {
    state.picture = state.pictures[chosen];
    for (const button of swaps) button.disabled = state.pictures.length < 2;
    byId("pictures").replaceChildren(...state.pictures.map((picture, place) => {
      const label = element("label", "", "choice"), input = element("input");
      Object.assign(input, { type: "radio", name: "picture", checked: place === chosen });
      input.addEventListener("change", () => { state.picture = picture; ask(); });
      label.append(input, shown(picture), element("span", picture.caption));
      return label;
    }));
  }

  function swap() {
    const next = (state.pictures.indexOf(state.picture) + 1) % state.pictures.length;
    showPictures(next);
    ask();
  }

  function showExample() {
    const example = info.examples[byId("example").value];
    state.pictures = [...example.pictures, ...state.pictures.filter((p) => p.own)];
    byId("question").value = example.question;
    showPictures(0);
  }

  // --- questions and answers ---

  async function ask() {
    const question = byId("question").value.replaceAll("\x1e", " "), { picture } = state;
    if (!state.ready) return;
    if (!question.trim()) return say("", "The question is empty. Type a question, then press Ask.");
    if (!picture) return say("", "There is no picture. Choose one, then press Ask.");
    const number = ++state.number;
    say("The models are answering …");
    const { rgba, width, height } = await pixels(picture);
    if (number !== state.number) return;
    if (state.busy) byId("history").firstChild.remove();
    Object.assign(state, { replies: {}, started: performance.now() });
    setBusy(true);
    byId("asked").textContent = clean(`“${question}” over ${picture.caption}`);
    for (const [model, card] of cards) {
      state.replies[model] = { refusal: null, response: "" };
      for (const part of [card.querySelector(".said"), card.querySelector(".end"), tokensOf(model)])
        part.replaceChildren();
    }
    addHistory(question, picture);
    worker.postMessage({ number, question, picture: { key: picture.uri, rgba, width, height } });
  }

  function setBusy(busy) {
    state.busy = busy;
    byId("answers").setAttribute("aria-busy", String(busy));
  }

  function addHistory(question, picture) {
    const row = element("tr"), head = element("th"), asked = element("span", "", "asked");
    head.scope = "row";
    asked.append(shown(picture), element("span", question));
    head.append(asked);
    row.append(head);
    for (const [model, card] of cards) {
      cells.set(model, element("td"));
      cells.get(model).dataset.label = card.querySelector("h3").textContent;
      row.append(cells.get(model));
    }
    byId("history").prepend(row);
    while (byId("history").children.length > KEPT) byId("history").lastChild.remove();
  }

  // Shows one event of `Models.ask`.
  function show(event) {
    const card = cards.get(event.model), reply = state.replies[event.model];
    if (event.score !== undefined)
      card.querySelector(".score b").textContent = event.score.toFixed(2).replace("-", "−");
    else if (event.response !== undefined) finish(event, card, reply);
    else showToken(event, card, reply);
  }

  function showToken(event, card, reply) {
    if (event.refusal !== null) {
      const before = state.before[event.model]?.refusal;
      reply.refusal = event.refusal;
      card.querySelector(".chance .value").textContent = percent(event.refusal);
      card.querySelector(".before").textContent =
        before === undefined ? "" : `before: ${percent(before)}`;
      card.querySelector(".meter span").style.width = `${100 * event.refusal}%`;
    }
    const kind = event.chance >= 0.9 ? "token" : event.chance >= 0.5 ? "token mild" : "token bad";
    if (!event.end) {
      const said = card.querySelector(".said");
      const token = element("span", said.firstChild ? event.text : event.text.trimStart(), kind);
      token.title = percent(event.chance);
      said.append(token);
    }
    const row = element("tr"), first = element("td"), last = element("td");
    first.append(element("span", tokenText(event), "token"));
    last.append(element("span", tokenText(event.other), "token"), " ", percent(event.other.chance));
    row.append(first, element("td", percent(event.chance)), last);
    tokensOf(event.model).append(row);
  }

  function finish(event, card, reply) {
    reply.response = event.response || "(the answer is empty)";
    const text = event.finished ? "" : `Cut at the limit of ${info.maxNew} tokens.`;
    card.querySelector(".end").textContent = event.response ? text : "The answer is empty.";
    const cell = cells.get(event.model);
    if (reply.refusal !== null) cell.append(element("span", percent(reply.refusal), "value"));
    cell.append(element("small", reply.response));
  }

  function fail(problem) {
    say("", problem);
    setBusy(false);
    byId("history").firstChild.remove();
  }

  function done() {
    const seconds = (performance.now() - state.started) / 1000;
    say(`Answered in ${seconds.toFixed(1)} s.`);
    setBusy(false);
    state.before = state.replies;
    const aloud = [...cards].map(([model, card]) => {
      const { refusal, response } = state.replies[model];
      const chance = refusal === null ? "" : ` (chance of a refusal ${percent(refusal)})`;
      return `${card.querySelector("h3").textContent}${chance}: ${response}`;
    });
    byId("said-aloud").textContent = clean(aloud.join(" "));
  }

  // --- start ---

  const code = new Blob([byId("code").textContent], { type: "text/javascript" });
  const worker = new Worker(URL.createObjectURL(code));
  worker.onerror = () => say("", "This browser cannot run the models. Try another or a newer one.");
  worker.onmessage = ({ data }) => {
    if (data.ready) {
      state.ready = true;
      byId("send").disabled = false;
      say("Ready. Choose a picture, type a question and press Ask.");
      if (state.picture) ask();
    } else if (data.number !== state.number) return; // of a question before the newest
    else if (data.problem) fail(data.problem);
    else if (data.done) done();
    else show(data.event);
  };
  const { examples, ...description } = info;
  worker.postMessage({ info: description, weights: byId("weights").textContent });
  byId("weights").remove();

  if (examples.length) showExample();
  byId("example").addEventListener("change", () => { showExample(); ask(); });
  byId("send").addEventListener("click", ask);
  for (const button of swaps) button.addEventListener("click", swap);
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  byId("file").addEventListener("change", ({ target }) => {
    if (target.files[0]) addFile(target.files[0]);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  for (const name of ["dragleave", "drop"])
    document.addEventListener(name, () => document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) addFile(event.dataTransfer.files[0]);
  });
})();
