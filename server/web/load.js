// What the server does now: asked once a second while somebody looks.

import { getText } from "./api.js";
import { Chart } from "./chart.js";
import { Metrics } from "./metrics.js";
import { formatBytes } from "./units.js";

const byId = (id) => document.getElementById(id);

export class Load {
  /** `widths` are all that the server has, narrowest first; `toneOf` gives the colour of one. */
  constructor(widths, toneOf) {
    this.widths = widths;
    const tones = widths.map(toneOf);
    this.requests = new Chart(byId("requests"), [...tones, "waiting"]);
    this.speed = new Chart(byId("speed"), tones);
    const names = [...widths.map((width) => `${width} bits`), "waiting"];
    byId("legend").replaceChildren(
      ...[...tones, "waiting"].map((tone, index) => {
        const item = Object.assign(document.createElement("li"), { textContent: names[index] });
        item.dataset.tone = tone;
        return item;
      }),
    );
  }

  /** Ask, and draw what has changed since the last time. */
  async refresh(key) {
    const metrics = new Metrics(await getText("metrics", key));
    this.metrics = metrics;
    const time = performance.now() / 1000;
    const running = this.widths.map((width) => metrics.ofWidth("requests_running", width));
    const waiting = this.widths.reduce((sum, width) => sum + metrics.ofWidth("requests_waiting", width), 0);
    this.requests.add(time, [...running, waiting]);
    const total = running.reduce((sum, value) => sum + value, 0);
    byId("requests-now").textContent = `${total} running, ${waiting} waiting (at most ${this.requests.top})`;

    const counts = this.widths.map((width) => metrics.ofWidth("generated_tokens_total", width));
    if (this.last) {
      const seconds = time - this.last.time;
      const speeds = counts.map((count, index) => Math.max(0, count - this.last.counts[index]) / seconds);
      this.speed.add(time, speeds);
      const now = speeds.reduce((sum, value) => sum + value, 0);
      byId("speed-now").textContent = `${now.toFixed(0)} (at most ${this.speed.top.toFixed(0)})`;
    }
    this.last = { time, counts };

    const held = metrics.sum("weights_bytes");
    const apart = metrics.sum("weights_equivalent_bytes");
    byId("memory").textContent =
      held === undefined
        ? ""
        : `One copy of the weights serves all widths: ${formatBytes(held)}. ` +
          `A model for each width would hold ${formatBytes(apart)}.`;
  }
}
