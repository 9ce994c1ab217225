// The server's own numbers, from the text that Prometheus reads.

export class Metrics {
  constructor(text) {
    this.samples = [];
    for (const line of text.split("\n")) {
      const parts = /^anybit_(\w+)(?:\{(.*)\})? (\S+)/.exec(line);
      if (!parts) continue;
      const labels = {};
      for (const [, name, value] of (parts[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
      this.samples.push({ name: parts[1], labels, value: Number(parts[3]) });
    }
  }

  /** The sum of a metric's series that carry these labels; undefined when there are none. */
  sum(name, labels = {}) {
    const wanted = Object.entries(labels);
    const found = this.samples.filter(
      (sample) => sample.name === name && wanted.every(([label, value]) => sample.labels[label] === value),
    );
    return found.length ? found.reduce((sum, sample) => sum + sample.value, 0) : undefined;
  }

  /** The same for one width; what was asked for as "at least" so many bits counts to them. */
  ofWidth(name, width) {
    const parts = [`${width}`, `at-least-${width}`].map((label) => this.sum(name, { bit_width: label }) ?? 0);
    return parts[0] + parts[1];
  }
}
