// The page: one prompt, several widths side by side, and what the server does meanwhile.

import { Answer } from "./answer.js";
import { Failure, getJson } from "./api.js";
import { Load } from "./load.js";

const REFRESH_MILLISECONDS = 1000;
const LOOKS_PER_MODEL = 10;
const NUM_TONES = 6;

const byId = (id) => document.getElementById(id);
const form = byId("form");
const chosenValue = (name) => form.elements[name].value;

let cards = []; // one of /v1/models for each width, narrowest first
let load = null;
let numLooks = 0;
let stopping = null; // the AbortController of a run
let key = "";
let refusedKey = null; // asking again with it would be in vain

const toneOf = (width) => cards.findIndex((card) => card.bit_width === width) % NUM_TONES;

/** Write a sentence where errors are shown; the same one again is not read aloud again. */
function say(sentence, from, place = byId("error")) {
  if (place.textContent !== sentence) place.textContent = sentence;
  place.dataset.from = from;
}

/** `from` says what failed, `asked` with which key. */
function showError(error, from, asked = key) {
  const known = error instanceof Failure;
  if (!known) console.error(error);
  const sentence = known ? error.message : "This page met an unexpected error.";
  if (error.status !== 401) {
    say(sentence, from);
    return;
  }
  refusedKey = asked;
  const hidden = byId("key-field").hidden;
  byId("key-field").hidden = false;
  byId("links-without-key").hidden = true; // a link sends no key
  if (hidden) byId("key").focus();
  byId("key").setAttribute("aria-invalid", "true");
  say(sentence, from, byId("key-error"));
}

/** Learn what is served; throws while the model is being loaded. */
async function learnModel() {
  const [base, ...aliases] = (await getJson("v1/models", key)).data;
  cards = aliases.sort((one, other) => one.bit_width - other.bit_width);
  const next = base.preparing;
  const preparing = next ? `; ${next.method} is being prepared, ${next.stage} ${Math.round(100 * next.progress)} %` : "";
  byId("model").textContent = `${base.id}, ${base.method}${preparing}`;
  if (load) return;
  load = new Load(cards.map((card) => card.bit_width), toneOf);
  const usual = cards.findIndex((card) => card.bit_width === base.bit_width);
  const first = new Set([cards[Math.max(0, usual - 1)], cards[usual], cards.at(-1)].map((card) => card.bit_width));
  byId("widths").replaceChildren(
    ...cards.map(({ bit_width: value }) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", name: "width", value });
      box.checked = first.has(value);
      label.append(box, ` ${value}`);
      return label;
    }),
  );
}

async function look() {
  const asked = key;
  try {
    if (numLooks % LOOKS_PER_MODEL === 0 || !load) await learnModel();
    await load.refresh(key);
    numLooks += 1;
    if (byId("error").dataset.from === "looking") say("", "looking");
    byId("key").removeAttribute("aria-invalid");
    say("", "looking", byId("key-error"));
  } catch (error) {
    if (!stopping && asked === key) showError(error, "looking", asked);
  }
}

async function keepLooking() {
  if (!document.hidden && key !== refusedKey) await look();
  setTimeout(keepLooking, REFRESH_MILLISECONDS);
}

/** Draws at most once a frame, however many pieces come. */
function drawer(answers) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const answer of answers) answer.draw(answers[0]);
    });
  };
}

/** What keeps a run from beginning, as a sentence; "" when nothing does. */
function obstacle(chosen) {
  if (!chosen.size) return "Choose at least one width.";
  return byId("prompt").value.trim() ? "" : "Write a prompt first.";
}

async function run() {
  const chosen = new Set([...form.querySelectorAll("[name=width]:checked")].map((box) => Number(box.value)));
  say(obstacle(chosen), "run");
  if (obstacle(chosen)) return;
  stopping = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  byId("answers").replaceChildren();
  const answers = cards
    .filter((card) => chosen.has(card.bit_width))
    .reverse() // the highest width first: the others are compared with it
    .map((card) => new Answer(card, toneOf(card.bit_width), load.metrics, byId("answers")));
  const changed = drawer(answers);
  const question = {
    prompt: byId("prompt").value,
    mode: chosenValue("mode"),
    maxTokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    key,
    signal: stopping.signal,
  };
  byId("status").textContent = `Waiting for ${answers.map(({ name }) => name).join(", ")} …`;
  if (chosenValue("order") === "together") await Promise.all(answers.map((answer) => answer.run(question, changed)));
  else for (const answer of answers) await answer.run(question, changed);
  finish(answers);
}

function finish(answers) {
  stopping = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
  const complete = answers.filter((answer) => answer.done);
  byId("status").textContent = `${complete.length} of ${answers.length} answers are complete.`;
  const failure = answers.find((answer) => answer.failed);
  if (failure) showError(new Failure(failure.problem, failure.status), "run");
}

byId("key").addEventListener("change", () => {
  key = byId("key").value.trim();
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  if (stopping) return;
  if (load) run().catch((error) => showError(error, "run"));
  else look();
});
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
byId("stop").addEventListener("click", () => stopping?.abort());
keepLooking();
