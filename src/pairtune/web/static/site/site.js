// What pages cannot do by themselves: show answers while they are written, keep what was typed, keyboard and clipboard.
// htmx swaps parts of pages in; this file follows what it swapped.
"use strict";

const find = (selector, root = document) => root.querySelector(selector);
const typing = (target) => target.closest?.("input, textarea, select, [contenteditable]");

// ---- The conversation stays at its end while the reader is there ----
const scroller = find("#scroller");
const latest = find("#latest");
let atEnd = true;

function toEnd() {
  atEnd = true;
  scroller.scrollTop = scroller.scrollHeight;
  latest.hidden = true;
}

function watchTheEnd() {
  const look = () => {
    atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 32;
    latest.hidden = atEnd;
  };
  scroller.addEventListener("scroll", look, { passive: true });
  // Answers grow, the composer grows, phones turn.
  const resized = new ResizeObserver(() => (atEnd ? toEnd() : look()));
  resized.observe(scroller);
  resized.observe(find("#turns"));
  latest.addEventListener("click", toEnd);
  if (find("#turns").children.length) toEnd();
}

// ---- Answers while they are written: one stream for each turn ----
const streams = new Map();

// Only the blocks that changed are replaced, so that a selection in an earlier paragraph survives.
function show(text, html) {
  const next = document.createElement("div");
  next.innerHTML = html;
  const old = [...text.childNodes];
  const same = [...next.childNodes].findIndex((node, at) => !old[at]?.isEqualNode(node));
  if (same < 0 && old.length === next.childNodes.length) return;
  const from = same < 0 ? next.childNodes.length : same;
  old.slice(from).forEach((node) => node.remove());
  text.append(...[...next.childNodes].slice(from));
}

function follow(turn) {
  const source = new EventSource(turn.dataset.stream);
  streams.set(turn, source);
  const on = (name, then) => source.addEventListener(name, (event) => then(JSON.parse(event.data)));
  on("text", ({ answer, html }) => {
    const text = find(`#answer-${answer} .text`);
    if (text) show(text, html);
    if (atEnd) toEnd();
  });
  on("done", ({ answer, html }) => {
    const old = find(`#answer-${answer}`);
    if (!old) return;
    old.outerHTML = html;
    htmx.process(find(`#answer-${answer}`));
    if (atEnd) toEnd();
  });
  on("over", () => {
    source.close();
    streams.delete(turn);
    turn.removeAttribute("data-stream");
  });
  // The browser connects again by itself after a break; a page that is gone for good says so.
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) return;
    find(".answer[aria-busy] .text", turn)?.insertAdjacentHTML(
      "beforeend", "<p class='notice' role='alert'>The connection broke off. Load the page again.</p>");
  });
}

function followAll() {
  for (const [turn, source] of streams) {
    if (turn.isConnected) continue;
    source.close();
    streams.delete(turn);
  }
  document.querySelectorAll("[data-stream]").forEach((turn) => { if (!streams.has(turn)) follow(turn); });
}

// ---- What was typed is kept until it has arrived ----
const composer = find("#composer");
const prompt = find("#prompt");
const kept = `draft ${location.pathname}`;

// At the form that it is about, or else in a corner of the page.
function tell(form, words) {
  const fault = find(".fault[role=alert]", form) || find("#status");
  fault.textContent = words;
  fault.hidden = !words;
}

document.body.addEventListener("htmx:responseError", ({ target, detail: { xhr } }) => {
  const plain = (xhr.getResponseHeader("content-type") || "").startsWith("text/plain");
  tell(target, plain ? xhr.responseText : `That could not be sent (${xhr.status}). Is it too long?`);
});
document.body.addEventListener("htmx:sendError", ({ target }) =>
  tell(target, "The site cannot be reached. What you wrote is still here; try again."));

// ---- Parts that renew themselves leave alone what a person is using ----
const renewed = "#runs, #live, #check, #models";
const inUse = (part) => part.contains(document.activeElement) || find("input[type=checkbox]:checked, details[open]", part)
  || [...part.querySelectorAll("[type=search]")].some((field) => field.value);
const written = () => [...document.querySelectorAll("textarea, .card input[name=tags]")].some((field) => field.value !== field.defaultValue);
document.body.addEventListener("htmx:beforeRequest", (event) => {
  const { target, detail } = event;
  if (!target.matches(renewed) || detail.requestConfig.verb !== "get") tell(target, "");
  else if (inUse(target)) event.preventDefault();
});
document.body.addEventListener("htmx:beforeOnLoad", (event) => {
  if (event.detail.xhr.getResponseHeader("HX-Refresh") && written()) event.preventDefault();
});

function startEdit(button) {
  const said = button.closest(".said");
  if (find(".edit", said)) return;
  const form = find("#edit-form").content.firstElementChild.cloneNode(true);
  form.action = composer.action;
  form.setAttribute("hx-post", composer.getAttribute("hx-post"));
  find("[name=turn]", form).value = button.dataset.edit;
  find("textarea", form).value = find(".original", said).content.textContent;
  for (const each of said.children) each.hidden = true;
  said.append(form);
  htmx.process(form);
  find("textarea", form).focus();
}

function cancelEdit(form) {
  const said = form.closest(".said");
  form.remove();
  for (const each of said.children) each.hidden = false;
  find("[data-edit]", said).focus();
}

function nameModels() {
  const names = [...document.querySelectorAll("#models select")].map((select) => select.value).filter(Boolean);
  find("#chosen").textContent = [...new Set(names)].join(" beside ") || "No model";
  document.querySelectorAll("#models .choice").forEach((choice, at) =>
    choice.classList.toggle("unused", at > 0 && !find("select", choice).value));
}

function usePreset(button) {
  for (const [name, value] of Object.entries(JSON.parse(button.dataset.preset))) {
    const field = find(`#setup [name=${name}]`);
    if (field) field.value = value ?? "";
  }
}

if (composer) {
  prompt.value ||= sessionStorage.getItem(kept) || "";
  prompt.addEventListener("input", () => sessionStorage.setItem(kept, prompt.value));
  let sent = "";
  document.body.addEventListener("htmx:beforeRequest", ({ target }) => { if (target === composer) sent = prompt.value; });
  document.body.addEventListener("htmx:afterRequest", (event) => {
    if (event.target !== composer || !event.detail.successful) return;
    if (prompt.value === sent) {  // else somebody has written on
      sessionStorage.removeItem(kept);
      prompt.value = "";
    }
    toEnd();
  });
  document.body.addEventListener("htmx:afterSwap", () => { followAll(); if (find("#chosen")) nameModels(); });
  find("#setup").addEventListener("change", nameModels);
  watchTheEnd();
  followAll();
}

// ---- The arena: both answers at one pace, and the vote by keyboard ----
const ask = find("#ask");
const match = find("[data-match]");

if (match) {
  const source = new EventSource(match.dataset.match);
  for (const side of ["left", "right"]) {
    source.addEventListener(side, ({ data }) => show(find(`[data-side=${side}]`, match), JSON.parse(data).html));
  }
  source.addEventListener("over", () => { source.close(); location.reload(); });
}

function castVote(key) {
  const button = find(`[data-vote=${key}]`);
  if (button && !button.closest("[inert]")) button.click();
}

// ---- Clipboard, colours, keyboard ----
async function copy(button, text) {
  const before = (button.before ??= button.innerHTML);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.innerHTML = before; }, 1500);
}

const themes = ["system", "light", "dark"];
const themeIcons = { system: "monitor", light: "sun", dark: "moon" };
const theme = () => document.documentElement.dataset.theme || "system";

function nameTheme() {
  const button = find("[data-theme-switch]");
  button.setAttribute("aria-label", `Colours: ${theme() === "system" ? "as the system" : theme()}`);
  const use = find("use", button);
  use.setAttribute("href", use.getAttribute("href").replace(/#.*/, `#${themeIcons[theme()]}`));
}

function nextTheme() {
  const next = themes[(themes.indexOf(theme()) + 1) % themes.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  document.cookie = `theme=${next}; path=/; max-age=31536000; samesite=strict`;
  nameTheme();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const data = button.dataset;
  if ("copy" in data) copy(button, find(".original", button.closest(".said, .answer, .copied")).content.textContent);
  else if ("copyCode" in data) copy(button, find("code", button.closest(".code")).textContent);
  else if (data.edit) startEdit(button);
  else if ("cancel" in data) cancelEdit(button.closest(".edit"));
  else if (data.preset) usePreset(button);
  else if ("themeSwitch" in data) nextTheme();
  else if (data.ask) {
    find("#question").value = data.ask;
    ask.requestSubmit();
  } else if (data.say) {
    prompt.value = data.say;
    composer.requestSubmit();
  }
});

document.addEventListener("submit", (event) => {
  const words = event.target.dataset.confirm;
  if (words && !window.confirm(words)) event.preventDefault();
});

const coarse = window.matchMedia("(pointer: coarse)").matches;
const keys = {
  "/": () => (prompt || find("#question") || find("[type=search]"))?.focus(),
  ArrowLeft: () => castVote("ArrowLeft"),
  ArrowRight: () => castVote("ArrowRight"),
  t: () => castVote("t"),
  b: () => castVote("b"),
  s: () => find("[data-key=s]")?.click(),
  n: () => find("[data-key=n]")?.click(),
  e: () => [...document.querySelectorAll("[data-edit]")].at(-1)?.click(),
  r: () => document.querySelectorAll(".turn:last-child [data-again]").forEach((button) => button.click()),
  End: () => scroller && toEnd(),
  "?": () => find("#keys").togglePopover(),
};

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.isComposing) return;
  if (key === "Escape") {
    const edited = target.closest?.(".edit");
    if (edited) cancelEdit(edited);
    else if (!find(":popover-open")) document.querySelectorAll("[data-stop]").forEach((button) => button.click());
    return;
  }
  // By touch the keyboard has no Shift+Enter, so Enter starts a line there and the button sends.
  if (key === "Enter" && !event.shiftKey && !event.isComposing && !coarse && target.matches?.("#prompt, #question, .edit textarea")) {
    event.preventDefault();
    target.form.requestSubmit();
    return;
  }
  if (typing(target) || event.ctrlKey || event.metaKey || event.altKey || !keys[key]) return;
  if (key.startsWith("Arrow") && !find("#ballot")) return;  // the page's own scrolling
  if (event.repeat) return;  // a key that is held was meant for what was there before
  event.preventDefault();
  keys[key]();
});

// ---- Charts: a tooltip at once, instead of the browser's slow one ----
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
document.addEventListener("pointerover", (event) => {
  const point = event.target.closest?.(".point");
  tip.hidden = !point;
  if (!point) return;
  const title = find("title", point);
  if (title) {
    point.dataset.tip = title.textContent;
    title.remove();
  }
  tip.textContent = point.dataset.tip;
  const { left, top, width } = point.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(left + width / 2 - tip.offsetWidth / 2, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, top - tip.offsetHeight - 4)}px`;
});

// ---- Tables that sort, switches, files that are dropped ----
function sortBy(button) {
  const header = button.closest("th");
  const up = header.getAttribute("aria-sort") !== "ascending";
  header.parentElement.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = find("tbody", header.closest("table"));
  const value = (row) => row.cells[header.cellIndex].dataset.value ?? row.cells[header.cellIndex].textContent.trim();
  const order = (a, b) => {
    const [one, other] = [value(a), value(b)];
    if (one === "" || other === "") return (one === "") - (other === "");
    const difference = isNaN(one) || isNaN(other) ? one.localeCompare(other) : one - other;
    return up ? difference : -difference;
  };
  body.append(...[...body.rows].sort(order));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".sortable th button");
  if (button) sortBy(button);
});

document.addEventListener("input", (event) => {
  const { target } = event;
  if (target.dataset.filters) {
    const words = target.value.toLowerCase().split(/\s+/);
    for (const row of find(target.dataset.filters).rows) {
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    }
  }
  if (target.dataset.unmarks) document.querySelectorAll(target.dataset.unmarks).forEach((each) => each.classList.toggle("unmarked", !target.checked));
});

const drop = find(".drop");
if (drop) {
  const file = find("[type=file]", drop);
  ["dragover", "dragleave", "drop"].forEach((name) => drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) file.files = event.dataTransfer.files;
  }));
}

nameTheme();
