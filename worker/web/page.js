"use strict";
// Draws what /scene says, once a second; every text is set as text, so nothing that a server says becomes markup.

const at = (id) => document.getElementById(id);
const LOOK_MS = 1000;
const DAYS = { mon: "Mon", tue: "Tue", wed: "Wed", thu: "Thu", fri: "Fri", sat: "Sat", sun: "Sun" };

function put(id, text) {
  const element = at(id);
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

function number(value) {
  return Math.round(value).toLocaleString("en-GB").replaceAll(",", "\u202f");
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit += 1) count /= 1000;
  return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// -- what it does ---------------------------------------------------------------------------------------------------

function draw(scene) {
  const { status } = scene;
  put("name", status.name || "Rankup worker");
  put("server", status.server);
  at("state").dataset.doing = status.doing;
  const doing = status.leaving ? "Leaving" : status.doing[0].toUpperCase() + status.doing.slice(1);
  put("doing", doing + (status.finishing ? ", the last lease" : ""));
  put("reason", status.reason);
  document.title = `${doing} – Rankup worker`;
  document.querySelector("[data-order=resume]").hidden = !status.paused_by_you;
  document.querySelector("[data-order=finish]").disabled = status.finishing;
  drawLease(status.lease, scene.curve);
  const { credit } = status;
  put("accepted", number(credit.accepted));
  put("rejected", number(credit.rejected));
  put("tokens", number(credit.tokens));
  put("up", bytes(status.bytes_up));
  put("down", bytes(status.bytes_down));
  const upload = status.upload;
  put("ready", number(status.outbox_ready) + (upload ? ` (${Math.floor((100 * upload.done) / upload.total)} %)` : ""));
  put("submitted", number(status.outbox_submitted));
  put("process", `Process ${status.pid}, up ${duration(status.uptime_s)}, ${status.worker_id}`);
  lines("notes", status.unread);
  const journal = at("journal");
  const below = journal.scrollTop + journal.clientHeight >= journal.scrollHeight - 4;
  if (lines("journal", scene.journal) && below) journal.scrollTop = journal.scrollHeight;
  form.show(status.limits);
}

function drawLease(lease, curve) {
  at("lease").hidden = !lease;
  if (!lease) return;
  const last = lease.shard + lease.shards - 1;
  put("what", `${lease.shards > 1 ? `Shards ${lease.shard}–${last}` : `Shard ${lease.shard}`} of ${lease.round_id}`);
  put("base", `${lease.model}, version ${lease.base_version}`);
  at("progress").value = lease.step / lease.steps;
  put("percent", `${Math.floor((100 * lease.step) / lease.steps)} %`);
  put("step", `${number(lease.step)} / ${number(lease.steps)}`);
  put("loss", lease.loss == null ? "–" : lease.loss.toFixed(3));
  put("speed", lease.tokens_per_s == null ? "–" : `${number(lease.tokens_per_s)} tok/s`);
  put("eta", lease.eta_s == null ? "–" : duration(lease.eta_s));
  at("energy-tile").hidden = lease.energy_j == null;
  if (lease.energy_j != null) put("energy", `${(lease.energy_j / 3600).toFixed(1)} Wh`);
  at("curve").hidden = curve.length < 2;
  if (curve.length > 1) drawCurve(curve);
}

function lines(id, texts) {
  const list = at(id);
  if (list.dataset.shown === texts.join("\n")) return false;
  list.dataset.shown = texts.join("\n");
  list.replaceChildren(...texts.map((text) => make("li", {}, text)));
  return true;
}

// -- the curve ------------------------------------------------------------------------------------------------------

function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawCurve(points) {
  const box = { left: 44, right: 632, top: 10, bottom: 162 };
  const losses = points.map(([, loss]) => loss);
  let low = Math.min(...losses);
  let high = Math.max(...losses);
  const spare = Math.max((high - low) * 0.06, 0.01);
  low -= spare;
  high += spare;
  const [from, to] = [points[0][0], points.at(-1)[0]];
  const x = (step) => box.left + ((box.right - box.left) * (step - from)) / (to - from);
  const y = (loss) => box.bottom - ((box.bottom - box.top) * (loss - low)) / (high - low);
  const path = (pairs) => pairs.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
  const parts = [];
  for (let n = 0; n <= 3; n += 1) {
    const loss = low + ((high - low) * n) / 3;
    parts.push(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(loss), y2: y(loss) }));
    parts.push(svg("text", { x: box.left - 8, y: y(loss) + 4, "text-anchor": "end" }, loss.toFixed(2)));
  }
  for (let n = 0; n <= 4; n += 1) {
    const step = Math.round(from + ((to - from) * n) / 4);
    const anchor = n === 0 ? "start" : n === 4 ? "end" : "middle";
    parts.push(svg("text", { x: x(step), y: box.bottom + 20, "text-anchor": anchor }, number(step)));
  }
  const longest = 1 - 1 / Math.max(2, points.length / 16);
  let mean = 0;
  const smooth = points.map(([step, loss], n) => {
    const weight = Math.min(longest, n / (n + 1));
    mean = weight * mean + (1 - weight) * loss;
    return [step, mean];
  });
  parts.push(svg("polyline", { class: "each", points: path(points) }));
  parts.push(svg("polyline", { class: "mean", points: path(smooth) }));
  at("chart").replaceChildren(...parts);
}

// -- orders ---------------------------------------------------------------------------------------------------------

async function order(request) {
  const answer = await fetch("order", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
  });
  if (!answer.ok) return (await answer.text()).trim();
  return (await answer.json()).error;
}

async function give(request) {
  const told = at("told");
  try {
    told.textContent = await order(request);
  } catch {
    told.textContent = "The worker does not answer.";
  }
  told.hidden = !told.textContent;
  await look();
}

for (const button of document.querySelectorAll("[data-order]")) {
  button.addEventListener("click", () => {
    const seconds = button.dataset.seconds;
    give({ order: button.dataset.order, ...(seconds ? { seconds: Number(seconds) } : {}) });
  });
}
at("leave").addEventListener("click", () => at("sure").showModal());
at("sure").addEventListener("close", () => {
  if (at("sure").returnValue === "yes") give({ order: "leave" });
  at("sure").returnValue = "";
});

// -- limits ---------------------------------------------------------------------------------------------------------

const form = {
  fields: [],
  shown: null,

  // One field: {name, element, read() -> JSON value, write(value)}.
  add({ name, kind, unit, words }) {
    const label = kind === "week" ? make("span", { class: "label" }, words) : make("label", { for: `limit-${name}` }, words);
    const control = make("div", { class: "control" });
    const element = make("div", { class: `field ${kind}` }, make("div", {}, label, make("code", {}, name)), control);
    const field = { name, element };
    if (kind === "week") {
      Object.assign(field, weekControl(control));
    } else {
      const type = { switch: "checkbox", number: "number", programs: "text" }[kind];
      const input = make("input", { id: `limit-${name}`, type, ...(kind === "number" ? { min: 0, step: "any" } : {}) });
      if (kind === "programs") input.placeholder = "cs2, witcher3";
      control.append(input, ...(kind === "number" ? [make("span", { class: "unit" }, unit)] : []));
      field.read = {
        switch: () => input.checked,
        number: () => (input.value === "" ? null : Number(input.value)),
        programs: () => input.value.split(",").map((part) => part.trim()).filter(Boolean),
      }[kind];
      field.write = {
        switch: (value) => { input.checked = value; },
        number: (value) => { input.value = value; },
        programs: (value) => { input.value = value.join(", "); },
      }[kind];
    }
    this.fields.push(field);
    at("fields").append(element);
  },

  differs(field) {
    return JSON.stringify(field.read()) !== JSON.stringify(this.shown[field.name]);
  },

  mark() {
    for (const field of this.fields) field.element.classList.toggle("changed", this.differs(field));
  },

  // Takes over what is in force, but for the fields that somebody is just changing.
  show(limits) {
    const before = this.shown;
    limits.week = Object.fromEntries(Object.keys(DAYS).filter((day) => day in limits.week).map((day) => [day, limits.week[day]]));
    if (!this.fields.length || JSON.stringify(before) === JSON.stringify(limits)) return;
    const touched = before === null ? [] : this.fields.filter((field) => this.differs(field));
    this.shown = limits;
    for (const field of this.fields) if (!touched.includes(field)) field.write(limits[field.name]);
    this.mark();
  },

  undo() {
    for (const field of this.fields) field.write(this.shown[field.name]);
    this.mark();
    at("saved").hidden = true;
  },

  async save() {
    const changes = this.fields.filter((field) => this.differs(field)).map((field) => {
      const value = field.read();
      return `${field.name}=${value === null ? "" : JSON.stringify(value)}`;
    });
    if (!changes.length) return;
    const saved = at("saved");
    try {
      saved.textContent = (await order({ order: "limits", changes })) || "Saved and in force; threads and niceness from the next start of the training on.";
    } catch {
      saved.textContent = "The worker does not answer; nothing is saved.";
    }
    saved.hidden = false;
    await look();
  },
};

function weekControl(control) {
  const days = Object.entries(DAYS).map(([day, words]) => {
    const choice = make("select", { "aria-label": words });
    for (const [value, text] of [["same", "as above"], ["off", "off"], ["hours", "from – to"]]) {
      choice.append(make("option", { value }, text));
    }
    const ends = ["from", "to"].map((end) => make("input", { type: "number", min: 0, max: 24, step: "any", "aria-label": `${words}, ${end}` }));
    const hide = () => ends.forEach((input) => { input.hidden = choice.value !== "hours"; });
    choice.addEventListener("change", hide);
    control.append(make("div", { class: "day" }, make("b", {}, words), choice, ...ends));
    return { day, choice, ends, hide };
  });
  return {
    read: () => Object.fromEntries(days.filter(({ choice }) => choice.value !== "same").map(({ day, choice, ends }) => (
      [day, choice.value === "off" ? "off" : ends.map((input) => Number(input.value))]))),
    write: (value) => {
      for (const { day, choice, ends, hide } of days) {
        const hours = value[day];
        choice.value = hours === undefined ? "same" : hours === "off" ? "off" : "hours";
        ends.forEach((input, n) => { input.value = Array.isArray(hours) ? hours[n] : [0, 24][n]; });
        hide();
      }
    },
  };
}

at("form").addEventListener("input", () => form.mark());
at("form").addEventListener("submit", (event) => { event.preventDefault(); form.save(); });
at("form").addEventListener("reset", (event) => { event.preventDefault(); form.undo(); });

// -- looking --------------------------------------------------------------------------------------------------------

async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

async function look() {
  try {
    draw(await ask("scene"));
    at("stale").hidden = true;
  } catch {
    at("stale").hidden = false;
  }
}

async function watch() {
  if (!form.fields.length) await ask("limits").then((all) => all.forEach((words) => form.add(words))).catch(() => {});
  if (!document.hidden) await look();
  setTimeout(watch, LOOK_MS);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
watch();
