"use strict";
// The server's page: one video, one question, one ratio at a time; the answer and the picture.

const MAX_FILE_BYTES = 90 * 1024 * 1024; // In base64 it stays below what the server takes.
const PICTURE_TRIES = 5;

const find = (id) => document.getElementById(id);
const [form, fileInput, ratio, key] = ["form", "video", "ratio", "key"].map(find);
let model = null;
let video = null; // { file, url }, url once it was read.
let running = null; // AbortController of the request that is under way.

// The chosen ratio in two digits, the slider's ends and start as they are.
function chosenRatio() {
  const { value, min, max, defaultValue } = ratio;
  if ([min, max, defaultValue].includes(value)) return Number(value);
  return Math.max(Number(min), Number(Number(value).toPrecision(2)));
}

function headers() {
  const all = { "Content-Type": "application/json" };
  if (key.value) all.Authorization = `Bearer ${key.value}`;
  return all;
}

// A request to this server; its own words if it refuses.
async function send(path, body, signal) {
  const response = await fetch(path, body === undefined ? { headers: headers(), signal } :
    { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (response.ok) return response;
  if (response.status === 401) {
    find("key-field").hidden = false;
    key.focus();
    throw new Error("This server asks for an API key: enter it and ask again.");
  }
  const text = await response.text();
  let message = text;
  try {
    const { error, detail } = JSON.parse(text);
    message = error?.message ?? detail ?? text;
  } catch { /* Not JSON: the text as it is. */ }
  throw Object.assign(new Error(message || `The server answered ${response.status}.`),
    { status: response.status });
}

async function findModel() {
  if (model === null) {
    const { data } = await (await send("v1/models")).json();
    model = data[0].id;
  }
  return model;
}

function choose(file) {
  find("error").textContent = "";
  if (file.size > MAX_FILE_BYTES) {
    find("error").textContent =
      `A video may have ${MAX_FILE_BYTES} bytes here, got ${file.size}: choose a smaller one.`;
    return;
  }
  video = { file, url: null };
  // What was asked about another video is no longer meant.
  running?.abort();
  find("table").replaceChildren();
  find("picture").replaceChildren();
  find("state").textContent = "";
  find("answers").hidden = true;
  find("what-was-kept").hidden = true;
  const preview = find("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.hidden = false;
  find("video-help").textContent = `${file.name}, ${Math.ceil(file.size / 1024)} KiB`;
}

function readVideo() {
  if (video.url !== null) return video.url;
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      // The browser's guess of the type does not matter to the server, but it must be a video.
      video.url = "data:video/mp4" + reader.result.slice(reader.result.indexOf(";base64,"));
      resolve(video.url);
    };
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(video.file);
  });
}

// The data of a stream's events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice("data: ".length));
    }
  }
}

// Ask and show the answer as it comes; what is known of it at the end.
async function ask(body, signal) {
  const answer = { text: "", first: null, usage: null, compression: null };
  const start = performance.now();
  const response = await send("v1/chat/completions", { ...body, stream: true,
    stream_options: { include_usage: true }, max_completion_tokens: Number(find("most").value),
    temperature: 0 }, signal);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const text = event.choices?.[0]?.delta?.content ?? "";
    if (text && answer.first === null) answer.first = performance.now() - start;
    answer.text += text;
    find("answer").textContent = answer.text;
    if (event.usage) Object.assign(answer,
      { usage: event.usage, compression: event.video_compression ?? null });
  }
  answer.whole = performance.now() - start;
  return answer;
}

function cell(text, isNumber = true) {
  return make("td", { className: isNumber ? "number" : "text", textContent: text });
}

function addRow(question, answer) {
  const { compression, usage } = answer;
  const milliseconds = (value) => value === null ? "–" : `${Math.round(value)} ms`;
  find("table").prepend(make("tr", {},
    cell(compression ? Number(compression.retention_ratio.toFixed(4)) : "–"),
    cell(compression ?
      `${compression.num_video_tokens} → ${compression.num_retained_video_tokens}` : "–"),
    cell(usage ? usage.prompt_tokens : "–"), cell(milliseconds(answer.first)),
    cell(milliseconds(answer.whole)), cell(question, false), cell(answer.text, false)));
}

async function drawPicture(body, signal) {
  const state = find("picture-state");
  find("what-was-kept").hidden = false;
  state.textContent = "Drawing what was kept …";
  for (let tries = 1; ; tries += 1) {
    try {
      const picture = await (await send("v1/scissor/picture", body, signal)).json();
      await new PictureView(find("picture"), picture).ready;
      state.textContent = "";
      return;
    } catch (error) {
      if (error.status !== 429 || tries === PICTURE_TRIES) {
        find("picture").replaceChildren();
        state.textContent =
          `No picture: ${error.name === "AbortError" ? "stopped." : error.message}`;
        return;
      }
      await new Promise((resolve) => setTimeout(resolve, 1000 * tries));
    }
  }
}

function setBusy(isBusy) {
  find("ask").disabled = isBusy;
  find("stop").hidden = !isBusy;
  find("answer").setAttribute("aria-busy", String(isBusy));
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  find("error").textContent = "";
  if (running) return;
  if (video === null) {
    find("error").textContent = "Choose a video first.";
    fileInput.focus();
    return;
  }
  running = new AbortController();
  setBusy(true);
  find("state").textContent = "Asking …";
  try {
    const question = find("question").value;
    const body = {
      model: await findModel(),
      retention_ratio: chosenRatio(),
      ...(find("budget").value && { max_retained_video_tokens: Number(find("budget").value) }),
      messages: [{ role: "user", content: [
        { type: "video_url", video_url: { url: await readVideo() } },
        { type: "text", text: question },
      ] }],
    };
    find("answers").hidden = false;
    find("answer").textContent = "";
    addRow(question, await ask(body, running.signal));
    find("state").textContent = "Answered.";
    await drawPicture(body, running.signal);
  } catch (error) {
    find("state").textContent = "";
    find("error").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  } finally {
    running = null;
    setBusy(false);
  }
});

find("stop").addEventListener("click", () => running?.abort());
ratio.addEventListener("input", () => { find("ratio-text").textContent = chosenRatio(); });
fileInput.addEventListener("change", () => fileInput.files[0] && choose(fileInput.files[0]));

const drop = find("drop");
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) {
  drop.addEventListener(name, () => drop.classList.remove("over"));
}
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
});

// Tells at once whether a key is needed.
findModel().catch((error) => { find("state").textContent = error.message; });
