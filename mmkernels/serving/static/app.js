// The page: what is attached, the conversation, and what it looks like.

import { ask, health } from "./api.js";
import { imagePart, record, soundPart } from "./media.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  { text: "What digit do you see?", image: "seven.png" },
  { text: "What digit do you hear?", sound: "three.wav" },
  { text: "Add the digit you see to the digit you hear.", image: "five.png", sound: "four.wav" },
  { text: "Draw a green eight.", note: "✎" },
  { text: "Say six.", note: "♪" },
  { text: "What is four plus nine?", note: "+" },
];

let turns = []; // messages that were asked and answered
let attached = []; // parts of the next message
let running = null; // the AbortController of an answer that is being made
let stopRecording = null;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function show(part) {
  if (part.type === "text") return element("p", { textContent: part.text });
  if (part.type === "image_url") return picture(part.image_url.url, "Attached picture");
  return player(part.input_audio.data, "Attached sound");
}

function picture(url, alt) {
  const image = element("img", { src: url, alt });
  image.onload = () => image.classList.toggle("pixels", image.naturalHeight <= 64);
  return image;
}

function player(data, label) {
  const audio = element("audio", { controls: true, src: `data:audio/wav;base64,${data}` });
  audio.setAttribute("aria-label", label);
  return audio;
}

function addTurn(role, ...children) {
  $("welcome").hidden = true;
  const turn = element("article", { className: `turn ${role}` }, ...children);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  $("log").append(turn);
  scroll();
  return turn;
}

function scroll() {
  $("log").scrollTop = $("log").scrollHeight;
}

function problem(message) {
  const shown = element("div", { className: "problem", textContent: message });
  shown.setAttribute("role", "alert");
  $("log").append(shown);
  scroll();
}

function showAttached() {
  $("chosen").replaceChildren(...attached.map((part) => {
    const remove = element("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", "Remove");
    remove.onclick = () => { attached = attached.filter((other) => other !== part); showAttached(); };
    return element("div", { className: "chip" }, show(part), remove);
  }));
}

async function attach(files) {
  for (const file of files) {
    try {
      attached.push(await (file.type.startsWith("audio/") || file.type.startsWith("video/") ? soundPart : imagePart)(file));
    } catch (error) {
      problem(error.message);
    }
  }
  showAttached();
  $("text").focus();
}

async function send(content) {
  if (running || !content.length) return;
  running = new AbortController();
  setBusy(true);
  const question = { role: "user", content };
  addTurn("user", ...content.map(show));
  const words = element("p");
  const turn = addTurn("assistant", words);
  turn.classList.add("waiting");
  const answer = { role: "assistant", content: "" };
  const hear = (delta, reason) => {
    if (delta.content) words.textContent = answer.content += delta.content;
    for (const part of delta.images || []) {
      (answer.images ||= []).push(part);
      turn.append(picture(part.image_url.url, "Drawn picture"));
    }
    if (delta.audio) {
      answer.audio ||= delta.audio;
      const sound = player(delta.audio.data, "Spoken answer");
      turn.append(sound);
      sound.play().catch(() => {}); // browsers may want a click first
    }
    if (reason === "length") turn.append(element("p", { textContent: "… (cut off)" }));
    scroll();
  };
  const before = turns.slice(turns.length - 2 * Number($("memory").value));
  const body = { messages: [...before, question], temperature: Number($("temperature").value) };
  try {
    await ask(body, $("key").value, running.signal, hear);
    turns.push(question, answer);
  } catch (error) {
    if (error.name !== "AbortError") {
      problem(error.message);
      if (error.status === 401) { $("settings").open = true; $("key").focus(); }
    }
    if (!turn.textContent && turn.childElementCount === 1) turn.remove();
  } finally {
    turn.classList.remove("waiting");
    running = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  $("send").classList.toggle("stop", busy);
  $("send").setAttribute("aria-label", busy ? "Stop" : "Send");
  setExamples(!busy);
}

function setExamples(on) {
  document.querySelectorAll("#examples button").forEach((button) => { button.disabled = !on; });
}

async function sample(name, read) {
  const response = await fetch(`/samples/${name}`);
  return read(new File([await response.blob()], name, { type: name.endsWith("png") ? "image/png" : "audio/wav" }));
}

async function tryExample(example) {
  const content = [];
  setExamples(false); // a second click would overtake the first, whose files are still coming
  try {
    if (example.image) content.push(await sample(example.image, imagePart));
    if (example.sound) content.push(await sample(example.sound, soundPart));
  } catch (error) {
    problem(error.message);
    setExamples(true);
    return;
  }
  await send([...content, { type: "text", text: example.text }]);
}

$("examples").append(...EXAMPLES.map((example) => {
  const button = element("button", { type: "button" });
  if (example.image) button.append(element("img", { src: `/samples/${example.image}`, alt: "", className: "pixels" }));
  if (example.sound || example.note) {
    const mark = element("span", { className: "note", textContent: example.note || "" });
    if (example.sound) mark.append($("pick-sound").querySelector("svg").cloneNode(true));
    mark.setAttribute("aria-hidden", "true");
    button.append(mark);
  }
  button.append(element("span", { textContent: example.text }));
  button.onclick = () => tryExample(example);
  return button;
}));

$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const text = $("text").value.trim();
  const content = [...attached, ...(text ? [{ type: "text", text }] : [])];
  if (!content.length) { $("text").focus(); return; }
  attached = [];
  $("text").value = "";
  grow();
  showAttached();
  send(content);
};

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight}px`;
}

$("text").oninput = grow;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("ask").requestSubmit();
  }
};
$("text").onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); attach(files); }
};

for (const kind of ["image", "sound"]) {
  $(`pick-${kind}`).onclick = () => $(`${kind}-file`).click();
  $(`${kind}-file`).onchange = (event) => { attach([...event.target.files]); event.target.value = ""; };
}

$("record").onclick = async () => {
  try {
    if (stopRecording) {
      const stop = stopRecording;
      stopRecording = null;
      $("record").setAttribute("aria-pressed", "false");
      await attach([await stop()]);
    } else {
      stopRecording = await record();
      $("record").setAttribute("aria-pressed", "true");
    }
  } catch (error) {
    problem(error.name === "NotAllowedError" ? "The browser was not allowed to use the microphone." : error.message);
  }
};

document.ondragover = (event) => { event.preventDefault(); $("ask").classList.add("over"); };
document.ondragleave = (event) => { if (!event.relatedTarget) $("ask").classList.remove("over"); };
document.ondrop = (event) => {
  event.preventDefault();
  $("ask").classList.remove("over");
  attach([...event.dataTransfer.files]);
};

$("new").onclick = () => {
  running?.abort();
  turns = [];
  document.querySelectorAll(".turn, .problem").forEach((old) => old.remove());
  $("welcome").hidden = false;
  $("text").focus();
};
$("temperature").oninput = () => { $("temperature-shown").textContent = $("temperature").value; };

async function watch() {
  try {
    const state = await health();
    $("status").className = state.status === "ok" ? "ok" : "bad";
    const waiting = state.waiting ? `, ${state.waiting} waiting` : "";
    $("status").querySelector(".words").textContent = `${state.model}${waiting}`;
  } catch {
    $("status").className = "bad";
    $("status").querySelector(".words").textContent = "not reachable";
  }
}
watch();
setInterval(watch, 10000);
