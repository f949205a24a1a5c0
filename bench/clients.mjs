// What openai's JavaScript client can send to a server and read of its answers, as
// bench/clients.py does for Python's: node bench/clients.mjs BASE_URL MODEL VIDEO [API_KEY]
// Needs the package openai.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [baseURL, model, video, apiKey = "x"] = process.argv.slice(2);
const url = `data:video/mp4;base64,${readFileSync(video).toString("base64")}`;
const parts = [{ type: "video_url", video_url: { url } }, { type: "text", text: "What is this?" }];
const body = {
  model, max_tokens: 4, retention_ratio: 0.25, messages: [{ role: "user", content: parts }],
};
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const header = "x-retained-video-tokens";

function print(name, compression, response) {
  const field = compression ? "yes" : "no";
  const found = response.headers.get(header) ? `\`${header}\`` : "no";
  const arrived = Number(response.headers.get("x-video-retention-ratio")) === 0.25;
  console.log(`| ${name} | ${field} | ${found} | ${arrived} |`);
}

const whole = await client.chat.completions.create(body).withResponse();
print("openai for JavaScript, whole", whole.data.video_compression, whole.response);
const streamed = await client.chat.completions
  .create({ ...body, stream: true, stream_options: { include_usage: true } }).withResponse();
let last;
for await (const chunk of streamed.data) last = chunk;
print("openai for JavaScript, streamed", last.video_compression, streamed.response);
