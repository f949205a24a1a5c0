"use strict";
// Draws a picture as scissor_vllm/show/picture.py describes it: frames with their tokens' cells,
// colored by the kept token that each was merged into, and a strip over time.

const DROPPED = 65535;
const TONES = [[0.75, 0.95], [0.95, 0.75], [0.5, 1], [0.85, 0.55]];
const OPACITY_ALONE = 0.5; // Of a token that is its own, as a share of the others'.
const STRIP_ROWS = 160;
const FRAME_PIXELS = 264;

// The color of a kept token, [r, g, b]; colors() in picture.py computes the same.
function colorOf(row) {
  const hue = (row * 0.6180339887498949) % 1 * 6;
  const [saturation, value] = TONES[row % TONES.length];
  return [5, 3, 1].map((offset) => {
    const k = (offset + hue) % 6;
    return Math.round(255 * (value - value * saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  });
}

function css(row, opacity) {
  const [red, green, blue] = row === DROPPED ? [0, 0, 0] : colorOf(row);
  return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
}

function decodeRows(text) {
  const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// A grouping with what drawing asks for: members of each kept token, in all and by frame.
function prepare(grouping, numFrames, perFrame) {
  const assignment = decodeRows(grouping.assignment);
  const size = new Uint32Array(grouping.num_retained);
  const byFrame = new Uint16Array(grouping.num_retained * numFrames);
  assignment.forEach((row, token) => {
    if (row === DROPPED) return;
    size[row] += 1;
    byFrame[row * numFrames + Math.floor(token / perFrame)] += 1;
  });
  const representatives = decodeRows(grouping.representatives);
  return { ...grouping, assignment, size, byFrame, representatives };
}

class PictureView {
  constructor(root, picture) {
    this.picture = picture;
    this.perFrame = picture.rows * picture.columns;
    this.groupings = picture.groupings.map(
      (each) => prepare(each, picture.frames.length, this.perFrame));
    this.grouping = this.groupings[0];
    this.opacity = 0.6;
    this.token = null; // Under the pointer, or where the arrow keys went.
    this.marked = null; // The kept token that is shown alone.
    root.replaceChildren(this.caption(), this.controls(), this.frames(), this.strip());
    this.ready = Promise.all(this.images.map((image) => image.decode())).then(() => this.draw());
  }

  caption() {
    this.about = make("p");
    this.about.setAttribute("role", "status");
    return this.about;
  }

  controls() {
    const line = make("div", { className: "controls" });
    if (this.groupings.length > 1) {
      this.slider = make("input", {
        type: "range", id: "picture-ratio", min: 0, max: this.groupings.length - 1, step: 1, value: 0,
      });
      this.slider.addEventListener("input", () => this.show(Number(this.slider.value)));
      this.chosen = make("output", { htmlFor: "picture-ratio" });
      line.append(make("span", {},
        make("label", { htmlFor: "picture-ratio", textContent: "Retention ratio " }),
        this.slider, " ", this.chosen));
    }
    const opacity = make("input", {
      type: "range", id: "picture-opacity", min: 0, max: 100, step: 5, value: 60 });
    opacity.addEventListener("input", () => {
      this.opacity = Number(opacity.value) / 100;
      this.draw();
    });
    line.append(make("span", {},
      make("label", { htmlFor: "picture-opacity", textContent: "Color over the frames " }), opacity));
    return line;
  }

  frames() {
    const { frames, width, height, rows, columns } = this.picture;
    this.cellWidth = Math.max(6, Math.round(FRAME_PIXELS / columns));
    this.cellHeight = Math.max(6, Math.round(this.cellWidth * columns * height / width / rows));
    this.images = frames.map((source) => Object.assign(new Image(), { src: source }));
    this.canvases = frames.map((_, frame) => {
      const canvas = make("canvas", {
        width: this.cellWidth * columns, height: this.cellHeight * rows });
      canvas.addEventListener("pointermove", (event) => {
        this.point(this.tokenAt(canvas, frame, event));
      });
      canvas.addEventListener("pointerleave", () => this.point(null));
      canvas.addEventListener("click", (event) => {
        this.mark(this.grouping.assignment[this.tokenAt(canvas, frame, event)]);
      });
      return canvas;
    });
    this.status = make("p", { className: "status" });
    this.status.setAttribute("role", "status");
    const figures = this.canvases.map((canvas, frame) => make("figure", {},
      make("figcaption", { textContent: this.label(frame) }), canvas));
    const grid = make("div", { className: "frames", tabIndex: 0 }, ...figures);
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label",
      "Frames with their tokens. Arrow keys: next token. Page up and down: next frame. " +
      "Enter: show one kept token alone. Escape: show all.");
    grid.addEventListener("keydown", (event) => this.key(event));
    const help = make("p", { className: "soft", textContent:
      "One color: merged into one kept token, in every frame. Dot: the member nearest to it. " +
      "Point at a cell, or go there by the arrow keys; a click or Enter shows its kept token alone." });
    return make("div", {}, help, grid, this.status);
  }

  strip() {
    this.stripCanvas = make("canvas", { className: "strip" });
    this.stripCanvas.setAttribute("role", "img");
    this.stripAbout = make("p");
    return make("div", {}, make("h2", { textContent: "Over time" }), this.stripAbout,
      this.stripCanvas);
  }

  label(frame) {
    const { times } = this.picture;
    return times ? `${times[frame].toFixed(2)} s` : `frame ${frame}`;
  }

  // Draw the ratio of this number.
  show(index) {
    this.grouping = this.groupings[index];
    this.marked = null;
    this.draw();
  }

  tokenAt(canvas, frame, event) {
    const { rows, columns } = this.picture;
    const box = canvas.getBoundingClientRect();
    const share = (value, size, count) =>
      Math.max(0, Math.min(count - 1, Math.floor(value / size * count)));
    return frame * this.perFrame +
      share(event.clientY - box.top, box.height, rows) * columns +
      share(event.clientX - box.left, box.width, columns);
  }

  key(event) {
    const { columns, frames } = this.picture;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns,
      PageDown: this.perFrame, PageUp: -this.perFrame };
    const last = frames.length * this.perFrame - 1;
    if (event.key in steps) {
      const next = this.token === null ? 0 : this.token + steps[event.key];
      this.point(Math.max(0, Math.min(last, next)));
    } else if (event.key === "Enter" && this.token !== null) {
      this.mark(this.grouping.assignment[this.token]);
    } else if (event.key === "Escape") {
      this.mark(null);
    } else {
      return;
    }
    event.preventDefault();
  }

  mark(row) {
    this.marked = row === this.marked ? null : row;
    this.draw();
  }

  point(token) {
    if (token === this.token) return;
    const touched = [this.token, token].filter((each) => each !== null)
      .map((each) => Math.floor(each / this.perFrame));
    this.token = token;
    new Set(touched).forEach((frame) => this.drawFrame(frame));
    this.tell();
  }

  tell() {
    if (this.token === null) {
      this.status.textContent = "";
      return;
    }
    const { columns } = this.picture;
    const frame = Math.floor(this.token / this.perFrame);
    const place = this.token % this.perFrame;
    const where = `${this.label(frame)}, row ${Math.floor(place / columns) + 1}, ` +
      `column ${place % columns + 1}: `;
    const row = this.grouping.assignment[this.token];
    if (row === DROPPED) {
      this.status.textContent = where + "dropped";
      return;
    }
    const among = this.framesOf(row);
    this.status.textContent = `${where}kept token ${row + 1} of ${this.grouping.num_retained}, ` +
      `of ${this.grouping.size[row]} tokens in ${among.length} frames ` +
      `(${this.label(among[0])} to ${this.label(among[among.length - 1])})`;
  }

  framesOf(row) {
    const numFrames = this.picture.frames.length;
    return [...Array(numFrames).keys()].filter(
      (frame) => this.grouping.byFrame[row * numFrames + frame] > 0);
  }

  draw() {
    const { picture, grouping } = this;
    const numTokens = picture.frames.length * this.perFrame;
    const threshold = grouping.similarity_threshold;
    this.about.textContent = `${grouping.method}, retention ratio ${grouping.retention_ratio}: ` +
      `K = ${grouping.num_retained} kept of T\u00d7P = ${picture.frames.length}\u00d7` +
      `${this.perFrame} = ${numTokens} tokens; similarity threshold: ` +
      (threshold === null ? "none" : threshold.toFixed(4));
    if (this.slider) {
      const text = `${grouping.retention_ratio}`;
      this.chosen.textContent = text;
      this.slider.setAttribute("aria-valuetext", text);
    }
    this.representatives = new Map();
    grouping.representatives.forEach((token, row) => {
      if (grouping.assignment[token] === row) this.representatives.set(token, row);
    });
    this.canvases.forEach((_, frame) => this.drawFrame(frame));
    this.drawStrip();
    this.tell();
  }

  drawFrame(frame) {
    const { rows, columns } = this.picture;
    const { assignment, size } = this.grouping;
    const [width, height] = [this.cellWidth, this.cellHeight];
    const canvas = this.canvases[frame];
    const pen = canvas.getContext("2d");
    pen.drawImage(this.images[frame], 0, 0, canvas.width, canvas.height);
    const first = frame * this.perFrame;
    for (let place = 0; place < this.perFrame; place += 1) {
      const token = first + place;
      const row = assignment[token];
      const x = place % columns * width;
      const y = Math.floor(place / columns) * height;
      if (this.marked !== null && row !== this.marked) {
        pen.fillStyle = "rgba(255, 255, 255, 0.8)";
        pen.fillRect(x, y, width, height);
        continue;
      }
      pen.fillStyle = css(row, this.opacity * (size[row] === 1 ? OPACITY_ALONE : 1));
      pen.fillRect(x, y, width, height);
      pen.fillStyle = "rgba(0, 0, 0, 0.6)";
      if (place % columns > 0 && assignment[token - 1] !== row) pen.fillRect(x, y, 1, height);
      if (place >= columns && assignment[token - columns] !== row) pen.fillRect(x, y, width, 1);
      if (this.representatives.has(token)) {
        pen.beginPath();
        pen.arc(x + width / 2, y + height / 2, Math.max(1.5, Math.min(width, height) * 0.22), 0,
          2 * Math.PI);
        pen.fillStyle = "#fff";
        pen.strokeStyle = "#1a1a1a";
        pen.fill();
        pen.stroke();
      }
    }
    if (this.token !== null && Math.floor(this.token / this.perFrame) === frame) {
      const place = this.token - first;
      pen.lineWidth = 3;
      pen.strokeStyle = "#fff";
      pen.strokeRect(place % columns * width, Math.floor(place / columns) * height, width, height);
      pen.lineWidth = 1;
      pen.strokeStyle = "#000";
      pen.strokeRect(place % columns * width, Math.floor(place / columns) * height, width, height);
    }
  }

  // The kept tokens of the strip, as strip_rows() in picture.py chooses them.
  stripRows() {
    const numFrames = this.picture.frames.length;
    const { size, byFrame, num_retained: numRows } = this.grouping;
    const first = Array.from({ length: numRows }, (_, row) => {
      const counts = byFrame.subarray(row * numFrames, (row + 1) * numFrames);
      return Math.max(0, counts.findIndex((count) => count > 0));
    });
    const ordered = [...first.keys()]
      .sort((a, b) => first[a] - first[b] || size[b] - size[a] || a - b);
    const numShown = Math.min(numRows, STRIP_ROWS);
    return Array.from({ length: numShown },
      (_, line) => ordered[Math.floor((2 * line + 1) * numRows / (2 * numShown))]);
  }

  drawStrip() {
    const numFrames = this.picture.frames.length;
    const { size, byFrame, num_retained: numRows } = this.grouping;
    const shown = this.stripRows();
    const which = numRows <= STRIP_ROWS ? `all ${numRows}` :
      `${STRIP_ROWS} of ${numRows}, evenly sampled,`;
    this.stripAbout.textContent =
      `Kept tokens (${which} top to bottom by first frame) over the frames (left to right).`;
    const spanning = [...size.keys()].filter((row) => this.framesOf(row).length > 1).length;
    this.stripCanvas.setAttribute("aria-label",
      `${spanning} of ${numRows} kept tokens have members in more than one frame`);
    const [width, height] = [Math.max(8, Math.floor(1200 / numFrames)), 4];
    this.stripCanvas.width = width * numFrames;
    this.stripCanvas.height = height * shown.length;
    const pen = this.stripCanvas.getContext("2d");
    shown.forEach((row, line) => {
      for (let frame = 0; frame < numFrames; frame += 1) {
        const count = byFrame[row * numFrames + frame];
        if (count === 0 || (this.marked !== null && row !== this.marked)) continue;
        pen.fillStyle = css(row, 0.5 + 0.5 * Math.sqrt(count / this.perFrame));
        pen.fillRect(frame * width, line * height, width, height);
      }
    });
  }
}
