"use strict";

const MOST_SECONDS = 60; // of a recording made here
let mostMegabytes = Infinity; // of a request; the server says it

// One slot holds the recordings of one field of a form: chosen, dropped or recorded here.
class Slot {
  constructor(element) {
    this.element = element;
    this.name = element.dataset.name;
    this.many = "many" in element.dataset;
    this.files = [];
    element.append(document.getElementById("slot").content.cloneNode(true));
    element.querySelector("h2").textContent = element.dataset.title;
    this.input = element.querySelector("input");
    this.input.multiple = this.many;
    this.input.addEventListener("change", () => { this.take([...this.input.files]); this.input.value = ""; });
    this.button = element.querySelector(".record");
    this.button.addEventListener("click", () => this.record());
    for (const kind of ["dragover", "dragleave", "drop"]) {
      element.addEventListener(kind, (event) => {
        event.preventDefault();
        element.classList.toggle("over", kind === "dragover");
        if (kind === "drop") this.take([...event.dataTransfer.files]);
      });
    }
  }

  take(files) {
    if (!files.length) return;
    const form = this.element.closest("form");
    form.querySelector(".result").replaceChildren(); // it was of other recordings
    shown.delete(form.id);
    this.files = this.many ? [...this.files, ...files] : files.slice(-1);
    this.show();
  }

  clear() {
    this.files = [];
    this.show();
  }

  show() {
    const names = this.files.map((file) => file.name).join(", ");
    this.element.querySelector(".chosen").textContent = names || "or drop a WAV, FLAC, OGG or MP3 file here";
    const players = this.element.querySelector(".players");
    for (const player of players.children) URL.revokeObjectURL(player.src);
    players.replaceChildren(...this.files.map((file) => {
      const player = document.createElement("audio");
      player.controls = true;
      player.src = URL.createObjectURL(file);
      return player;
    }));
    this.element.querySelector(".pictures").replaceChildren();
  }

  async record() {
    if (this.recorder) {
      this.recorder.stop();
      return;
    }
    this.button.disabled = true; // until the microphone is there: another click would open it twice
    try {
      this.recorder = await Recorder.start((seconds) => { this.button.textContent = `Stop (${seconds.toFixed(0)} s)`; });
    } catch (error) {
      this.element.querySelector(".chosen").textContent = `The microphone cannot be used: ${error.message}`;
      return;
    } finally {
      this.button.disabled = false;
    }
    this.button.classList.add("on");
    const wave = await this.recorder.done;
    this.recorder = null;
    this.button.classList.remove("on");
    this.button.textContent = "Record";
    const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "");
    this.take([new File([wave], `recording_${time}.wav`, { type: "audio/wav" })]);
  }
}

// Records the microphone as 16-bit WAV: what browsers record by themselves, WebM, is read by few programs.
class Recorder {
  static async start(tell) {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const context = new AudioContext();
    await context.audioWorklet.addModule("recorder.js");
    return new Recorder(stream, context, tell);
  }

  constructor(stream, context, tell) {
    Object.assign(this, { stream, context, blocks: [], samples: 0 });
    const tap = new AudioWorkletNode(context, "tap", { numberOfOutputs: 0 });
    tap.port.onmessage = ({ data }) => {
      this.blocks.push(data);
      this.samples += data.length;
      tell(this.samples / context.sampleRate);
      if (this.samples > MOST_SECONDS * context.sampleRate) this.stop();
    };
    context.createMediaStreamSource(stream).connect(tap);
    this.done = new Promise((resolve) => { this.resolve = resolve; });
  }

  stop() {
    for (const track of this.stream.getTracks()) track.stop();
    const rate = this.context.sampleRate;
    this.context.close();
    this.resolve(encodeWav(this.blocks, this.samples, rate));
  }
}

function encodeWav(blocks, samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples));
  const text = (place, letters) => [...letters].forEach((c, i) => view.setUint8(place + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples, true);
  let place = 44;
  for (const block of blocks) {
    for (const value of block) {
      view.setInt16(place, Math.round(32767 * Math.max(-1, Math.min(1, value))), true);
      place += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}

// ------------------------------------------------------------------------------------------------ pictures

const SHADES = [[13, 8, 50], [84, 15, 109], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];

function shade(value) {
  const place = (value / 255) * (SHADES.length - 1), low = Math.min(Math.floor(place), SHADES.length - 2);
  return SHADES[low].map((c, i) => Math.round(c + (place - low) * (SHADES[low + 1][i] - c)));
}

function canvasOf(width, height, label) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return canvas;
}

function drawWaveform(recording) {
  const canvas = canvasOf(recording.waveform.length, 90, "waveform"), context = canvas.getContext("2d");
  const peak = Math.max(recording.peak, 1e-4);
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--wave");
  recording.waveform.forEach(([low, high], x) => {
    const top = 45 - 43 * (high / peak);
    context.fillRect(x, top, 1, Math.max(45 - 43 * (low / peak) - top, 1));
  });
  canvas.style.height = "5rem";
  return canvas;
}

function drawMel(recording) {
  const { bands, frames } = recording, canvas = canvasOf(frames, bands, "log-mel spectrogram");
  const context = canvas.getContext("2d"), picture = context.createImageData(frames, bands);
  const values = Uint8Array.from(atob(recording.mel), (c) => c.charCodeAt(0));
  for (let band = 0; band < bands; band++) {
    for (let frame = 0; frame < frames; frame++) {
      const place = 4 * ((bands - 1 - band) * frames + frame);
      picture.data.set([...shade(values[band * frames + frame]), 255], place);
    }
  }
  context.putImageData(picture, 0, 0);
  canvas.style.height = "7rem";
  return canvas;
}

function figureOf(recording, name) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  caption.textContent = `${name}: ${recording.seconds.toFixed(1)} s at ${recording.rate} Hz, peak ${recording.peak.toFixed(2)}`;
  figure.append(drawWaveform(recording), drawMel(recording), caption);
  if (recording.caution) figure.append(element("p", `Caution: ${recording.caution}`, "figures"));
  return figure;
}

function drawRecordings(slots, recordings) {
  let next = 0;
  for (const slot of slots) {
    const figures = slot.files.map((file) => figureOf(recordings[next++], file.name));
    slot.element.querySelector(".pictures").replaceChildren(...figures);
  }
}

// ------------------------------------------------------------------------------------------------- results

function element(tag, text, kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

const decisionOf = (verdict) => verdict.same === null ? "no threshold" : verdict.same ? "same speaker" : "different speakers";

// As a person says it: whole percent, finer near none and all, and never quite none or all.
function percent(share) {
  if (share === null) return "-";
  if (share < 1e-4) return "less than 0.01 %";
  if (share > 1 - 1e-4) return "more than 99.99 %";
  return share >= 0.01 && share <= 0.99 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(2)} %`;
}

function scaleOf(verdict) {
  const scale = element("div", "", "scale");
  const value = verdict.llr ?? verdict.score; // the threshold is on the log-likelihood ratio where there is one
  const edges = [value, verdict.threshold ?? value], [least, most] = verdict.llr === null ? [-0.2, 1] : [-10, 10];
  const low = Math.min(least, ...edges), high = Math.max(most, ...edges);
  const place = (x) => `${(100 * (x - low)) / (high - low)}%`;
  const filled = document.createElement("b");
  filled.style.width = place(value);
  const mark = document.createElement("i");
  mark.style.left = place(value);
  scale.append(filled, mark);
  if (verdict.threshold !== null) {
    const threshold = element("i", "", "threshold"), label = element("span", `threshold ${verdict.threshold.toFixed(3)}`);
    threshold.style.left = label.style.left = place(verdict.threshold);
    scale.append(threshold, label);
  }
  return scale;
}

// The verdict as it is at the prior that was chosen on the page; the log-likelihood ratio does not depend on it.
function atPrior(verdict) {
  const prior = chosenPriors.compare;
  if (verdict.llr === null || prior === null) return verdict;
  const odds = Math.log(prior / (1 - prior));
  const threshold = verdict.threshold_moves ? -odds : verdict.threshold;
  const from = verdict.threshold_moves ? `Bayes, prior ${percent(prior)}` : verdict.threshold_from;
  const probability = 1 / (1 + Math.exp(-verdict.llr - odds));
  return { ...verdict, prior, probability, threshold, threshold_from: from, same: verdict.llr >= threshold };
}

function surenessOf(verdict) {
  if (verdict.probability === null) return verdict.same === null ? "" : "not calibrated, so nobody can say how sure that is";
  const sure = verdict.same ? verdict.probability : 1 - verdict.probability;
  return `${sure < 0.5 ? "only " : ""}${percent(sure)} sure, if ${percent(verdict.prior)} of the comparisons are of one speaker`;
}

function figuresOf(verdict) {
  const parts = [`score ${verdict.score.toFixed(4)}`];
  if (verdict.llr !== null) parts.push(`log-likelihood ratio ${verdict.llr.toFixed(2)}`);
  if (verdict.threshold !== null) parts.push(`threshold ${verdict.threshold.toFixed(3)}: ${verdict.threshold_from}`);
  return element("p", parts.join(", "), "figures");
}

function showVerdict(section, answer) {
  const verdict = atPrior(answer.verdict);
  const decision = element("p", decisionOf(verdict), "decision " + (verdict.same === null ? "" : verdict.same ? "yes" : "no"));
  section.replaceChildren(decision, element("p", surenessOf(verdict)), scaleOf(verdict), figuresOf(verdict));
}

// Whose a recording is, at the prior that was chosen: see scoring/identification.py.
function identifiedAt(answer) {
  const prior = chosenPriors.identify;
  if (!answer.by_probability || prior === null) return answer;
  const known = prior * Math.exp(answer.evidence), nobody = (1 - prior) / (known + 1 - prior);
  const speakers = answer.speakers.map((found) => ({
    ...found, probability: (prior * Math.exp(found.llr)) / answer.enrolled / (known + 1 - prior),
  }));
  return { ...answer, prior, nobody, speakers, speaker: speakers[0].probability > 0.5 ? speakers[0].name : null };
}

function sureOf(answer) {
  const best = answer.speakers[0], among = `if ${percent(answer.prior)} of the recordings are of somebody who is enrolled`;
  if (answer.speaker !== null) return `${percent(best.probability)} sure, ${among}`;
  const nearest = `the nearest is ${best.name}`;
  return answer.nobody > 0.5 ? `${nearest}: ${percent(answer.nobody)} sure that it is nobody, ${among}`
    : `${nearest}: ${percent(1 - answer.nobody)} sure that it is somebody, but no one of them is likelier than all others together, ${among}`;
}

function showSpeakersFound(section, given) {
  const answer = identifiedAt(given), best = answer.speakers[0], none = answer.decided && answer.speaker === null;
  const several = answer.nobody !== null && answer.nobody <= 0.5;  // it is somebody, and not clear who
  const name = none ? (several ? "not clear who" : "nobody who is enrolled") : answer.decided ? best.name : `nearest: ${best.name}`;
  const decision = element("p", name, `decision ${answer.decided ? (none ? "no" : "yes") : ""}`);
  const undecided = "no decision: there is neither a calibration nor a threshold to decide by";
  const single = `${none ? `the nearest is ${best.name}: ` : ""}${surenessOf(best)}`;
  const nearest = !answer.decided ? undecided : answer.by_probability ? sureOf(answer) : single;
  const table = document.createElement("table"), head = table.createTHead().insertRow();
  for (const title of ["speaker", "score", "probability"]) head.append(element("th", title, title === "speaker" ? "" : "number"));
  const body = table.createTBody(), rows = [...answer.speakers];
  if (answer.nobody !== null) rows.push({ name: "nobody who is enrolled", score: null, probability: answer.nobody });
  for (const found of rows) {
    const row = body.insertRow();
    row.append(element("td", found.name), element("td", found.score === null ? "" : found.score.toFixed(4), "number"),
      element("td", percent(found.probability), "number"));
    if (answer.decided && found.name === answer.speaker) row.className = "yes";
  }
  section.replaceChildren(decision, element("p", nearest), ...answer.cautions.map((text) => element("p", text, "figures")),
    element("p", `${answer.enrolled} enrolled, the nearest ${answer.speakers.length}:`, "figures"), table);
}

// ---------------------------------------------------------------------------------------------------- prior

const PRIORS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];
const QUESTIONS = {
  compare: ["How many of your comparisons are of one speaker?",
    "The rarer that is, the more alike two recordings must sound before the answer is “same speaker”."],
  identify: ["How many of your recordings are of somebody who is enrolled?",
    "The rarer that is, and the more people are enrolled, the more alike a recording must sound before it gets a name."],
};
let chosenPriors = { compare: null, identify: null }; // shares; null without a calibration
let priors = PRIORS;

const openForm = () => [...document.querySelectorAll("form")].find((form) => !form.hidden).id;

function preparePrior(prior) {
  priors = [...new Set([...PRIORS, prior])].sort((a, b) => a - b);
  chosenPriors = { compare: prior, identify: 0.5 };
  const range = document.getElementById("prior-range");
  range.max = priors.length - 1;
  range.oninput = () => {
    chosenPriors[openForm()] = priors[range.value];
    for (const [id, [section, answer]] of shown) FORMS[id](section, answer);
    showPrior();
  };
  for (const [id, [section, answer]] of shown) FORMS[id](section, answer);
  showPrior();
}

function showPrior() { // where something is decided
  const form = openForm(), chosen = chosenPriors[form] ?? null, range = document.getElementById("prior-range");
  document.getElementById("prior").hidden = chosen === null;
  if (chosen === null) return;
  const [question, meaning] = QUESTIONS[form], one = chosen < 0.5 ? `, 1 in ${Math.round(1 / chosen)}` : "";
  document.getElementById("prior-question").textContent = question;
  document.getElementById("prior-meaning").textContent = meaning;
  range.value = priors.indexOf(chosen);
  range.setAttribute("aria-valuetext", percent(chosen));
  document.getElementById("prior-value").textContent = `${percent(chosen)}${one}`;
}

async function ask(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  const answer = await reply.json().catch(() => ({ detail: `the server answered ${reply.status}` }));
  if (!reply.ok) throw new Error(typeof answer.detail === "string" ? answer.detail : "a field is missing");
  return answer;
}

async function listSpeakers() {
  const list = document.getElementById("speakers");
  const speakers = await ask("api/speakers");
  list.replaceChildren(...speakers.map(({ name, recordings }) => {
    const item = element("li", ""), forget = element("button", "Remove");
    forget.type = "button";
    forget.addEventListener("click", async () => {
      if (!confirm(`Remove ${name}?`)) return;
      try {
        await ask(`api/speakers/${encodeURIComponent(name)}`, { method: "DELETE" });
        await listSpeakers();
      } catch (error) {
        document.querySelector("#enroll .result").replaceChildren(element("p", error.message, "error"));
      }
    });
    item.append(element("span", `${name} (${recordings} recording${recordings === 1 ? "" : "s"})`), forget);
    return item;
  }));
  if (!speakers.length) list.replaceChildren(element("li", "nobody yet"));
}

const FORMS = {
  compare: showVerdict,
  enroll: (section, answer) => section.replaceChildren(element("p", `${answer.name} is enrolled`, "decision yes")),
  identify: showSpeakersFound,
};
const shown = new Map(); // the last answer of each form, to be shown again at another prior
const ROUTES = { compare: "api/compare", enroll: "api/speakers", identify: "api/identify" };

function prepare(form) {
  const slots = [...form.querySelectorAll(".slot")].map((slot) => new Slot(slot));
  const section = form.querySelector(".result"), button = form.querySelector("[type=submit]");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = new FormData();
    const name = form.querySelector("[name=name]");
    if (name) body.append("name", name.value);
    for (const slot of slots) {
      for (const file of slot.files) body.append(slot.name, file);
    }
    const empty = slots.find((slot) => !slot.files.length);
    if (empty) {
      section.replaceChildren(element("p", `${empty.element.dataset.title}: choose a file or record one first`, "error"));
      return;
    }
    // A browser that is cut off while it sends does not see the server's refusal.
    const megabytes = slots.flatMap((slot) => slot.files).reduce((sum, file) => sum + file.size, 0) / 2 ** 20;
    if (megabytes > mostMegabytes) {
      section.replaceChildren(element("p", `${megabytes.toFixed(1)} MB: more than the ${mostMegabytes} MB of a request`, "error"));
      return;
    }
    button.disabled = true;
    shown.delete(form.id);
    section.replaceChildren(element("p", "working ..."));
    try {
      const answer = await ask(ROUTES[form.id], { method: "POST", body });
      drawRecordings(slots, answer.recordings);
      FORMS[form.id](section, answer);
      if (form.id !== "enroll") shown.set(form.id, [section, answer]);
      if (form.id === "enroll") {
        for (const slot of slots) slot.files = []; // their pictures stay; another click must not enroll them again
        await listSpeakers();
      }
    } catch (error) {
      section.replaceChildren(element("p", error.message, "error"));
    }
    button.disabled = false;
  });
}

function choose(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  showPrior();
}

async function start() {
  for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => choose(tab));
  for (const form of document.querySelectorAll("form")) prepare(form);
  try {
    const about = await ask("api/about");
    mostMegabytes = about.max_mb;
    const fixed = about.threshold === null ? "no threshold" : `threshold ${about.threshold.toFixed(3)}`;
    const threshold = about.threshold_moves ? "the threshold follows the share below" : fixed;
    document.getElementById("about").textContent =
      `${about.model}, embeddings of ${about.dimension}; ${threshold}; ${about.calibrated ? "calibrated" : "not calibrated"}; up to ${about.max_mb} MB`;
    document.getElementById("cautions").replaceChildren(...about.cautions.map((text) => element("li", `Caution: ${text}`)));
    if (about.calibrated) preparePrior(about.prior);
    await listSpeakers();
  } catch (error) {
    document.getElementById("about").textContent = error.message;
  }
}

start();
