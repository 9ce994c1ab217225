// A chart of the last minute: layers of numbers, one above the other, each number a step back to the one before it.

const SVG = "http://www.w3.org/2000/svg";
const SECONDS = 60;
const SCALE = 100; // the drawing is 100 units high, and stretched

export class Chart {
  /** `tones` name the layers from the bottom up; each is a value of data-tone in the style sheet. */
  constructor(svg, tones) {
    this.points = []; // {time in seconds, values}
    svg.setAttribute("viewBox", `0 0 ${SECONDS} ${SCALE}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.replaceChildren();
    for (const height of [0.25, 0.5, 0.75]) {
      const line = svg.appendChild(document.createElementNS(SVG, "line"));
      line.setAttribute("x2", SECONDS);
      for (const name of ["y1", "y2"]) line.setAttribute(name, height * SCALE);
    }
    this.paths = tones.map((tone) => {
      const path = svg.appendChild(document.createElementNS(SVG, "path"));
      path.dataset.tone = tone;
      return path;
    });
  }

  /** The highest sum of the last minute, at which the chart ends. */
  get top() {
    return Math.max(0, ...this.points.map(({ values }) => values.reduce((sum, value) => sum + value, 0)));
  }

  add(time, values) {
    this.points.push({ time, values });
    // One point beyond the left edge stays, so that the layers reach it.
    while (this.points.length > 2 && this.points[1].time < time - SECONDS) this.points.shift();
    this.draw(time);
  }

  draw(now) {
    const top = this.top || 1;
    let lower = this.points.map(() => 0);
    const across = (index) => (SECONDS - (now - this.points[index].time)).toFixed(2);
    const down = (height) => (SCALE * (1 - (0.95 * height) / top)).toFixed(2);
    const steps = (heights) =>
      heights.slice(1).flatMap((height, index) => [across(index), across(index + 1)].map((x) => `${x},${down(height)}`));
    this.paths.forEach((path, layer) => {
      const upper = this.points.map(({ values }, index) => lower[index] + values[layer]);
      const outline = [...steps(upper), ...steps(lower).reverse()];
      path.setAttribute("d", outline.length ? `M${outline.join("L")}Z` : "");
      lower = upper;
    });
  }
}
