// One width's answer: its stream, its numbers and its place on the page.

import { Failure, streamAnswer } from "./api.js";
import { firstDifference } from "./differences.js";
import { formatBytes, formatMilliseconds } from "./units.js";

export class Answer {
  /** `card` is the width's entry in /v1/models; the answer appears at the end of `place`. */
  constructor(card, tone, metrics, place) {
    this.card = card;
    this.metrics = metrics;
    this.text = "";
    this.tokens = 0;
    this.done = false;
    this.failed = false;
    const article = document.getElementById("answer").content.cloneNode(true).firstElementChild;
    this.element = place.appendChild(article);
    article.dataset.tone = tone;
    article.dataset.width = card.bit_width;
    const title = article.querySelector("h2");
    title.id = `answer-${card.bit_width}`;
    title.append(this.name, " ");
    const scales = title.appendChild(document.createElement("small"));
    scales.textContent = `${card.effective_bits.toFixed(2)} with scales`;
    article.setAttribute("aria-labelledby", title.id);
    article.querySelector(".text").setAttribute("aria-labelledby", title.id);
    this.show("read", formatBytes(card.bytes_read_per_token));
    this.show("weights", formatBytes(metrics?.sum("weights_equivalent_bytes", { bit_width: `${card.bit_width}` })));
  }

  get name() {
    return `${this.card.bit_width} bits`;
  }

  /** Ask, and take the answer in as it comes; `changed` is called after every piece. Never throws. */
  async run(question, changed) {
    this.element.setAttribute("aria-busy", "true");
    const begun = performance.now();
    try {
      for await (const piece of streamAnswer({ ...question, width: this.card.bit_width })) {
        this.take(piece, performance.now() - begun);
        changed();
      }
      this.done = true;
    } catch (error) {
      this.failed = true;
      this.status = error.status;
      const known = error instanceof Failure;
      this.problem = known ? error.message : error.name === "AbortError" ? "Stopped." : "The answer could not be read.";
      if (!known && error.name !== "AbortError") console.error(error);
    }
    this.element.setAttribute("aria-busy", "false");
    changed();
  }

  take({ text, tokens, promptTokens, kvFormat }, elapsed) {
    if (tokens > this.tokens) {
      this.firstAt ??= { elapsed, tokens };
      this.lastAt = elapsed;
    }
    this.text += text;
    this.tokens = tokens;
    this.numCached = promptTokens + tokens;
    this.kvFormat = kvFormat;
  }

  get tokensPerSecond() {
    const first = this.firstAt;
    return first && this.lastAt > first.elapsed ? (1000 * (this.tokens - first.tokens)) / (this.lastAt - first.elapsed) : null;
  }

  /** Draw what has come, compared with `reference`, the answer of the highest width. */
  draw(reference) {
    if (this.firstAt) {
      this.show("ttft", formatMilliseconds(this.firstAt.elapsed));
      const perToken = this.metrics?.sum("kv_bytes_per_token", { kv_format: this.kvFormat });
      if (perToken !== undefined) this.show("kv", formatBytes(perToken * this.numCached));
    }
    if (this.firstAt || this.done) this.show("tokens", `${this.tokens}`);
    if (this.tokensPerSecond !== null) this.show("speed", this.tokensPerSecond.toFixed(1));
    this.element.querySelector(".error").textContent = this.problem ?? "";
    const difference = this === reference ? null : firstDifference(this, reference);
    this.drawText(difference);
    this.element.querySelector(".difference").textContent = this.compared(reference, difference);
  }

  drawText(difference) {
    const place = this.element.querySelector(".text");
    if (!difference) {
      place.textContent = this.text;
      return;
    }
    const mark = document.createElement("mark");
    mark.textContent = difference.word || "(ends)";
    place.replaceChildren(this.text.slice(0, difference.start), mark, this.text.slice(difference.end));
  }

  compared(reference, difference) {
    if (this === reference) return "The others are compared with this one.";
    if (difference) {
      const says = difference.instead ? `says “${difference.instead}”` : "has ended";
      return `First differs at word ${difference.number}, where ${reference.name} ${says}.`;
    }
    return this.done && reference.done ? `The same words as ${reference.name}.` : "";
  }

  show(name, text) {
    this.element.querySelector(`[data-is="${name}"]`).textContent = text;
  }
}
