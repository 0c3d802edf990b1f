// What plain pages cannot do: show an answer while it is written, send with Enter, copy, stop.
"use strict";

const token = () => document.querySelector("[name=csrfmiddlewaretoken]").value;

function post(url, fields = {}) {
  return fetch(url, { method: "POST", headers: { "X-CSRFToken": token() }, body: new URLSearchParams(fields) });
}

// Follow the answer to its end, unless the person has scrolled up to read.
function keepInView(change) {
  const page = document.scrollingElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function follow(answer) {
  const source = new EventSource(answer.dataset.stream);
  const text = answer.querySelector(".text");
  source.addEventListener("text", (event) => keepInView(() => { text.innerHTML = event.data; }));
  source.addEventListener("done", (event) => {
    source.close();
    keepInView(() => { answer.outerHTML = event.data; });
  });
  // The browser connects again by itself after a break; a page that is gone for good says so.
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) return;
    text.insertAdjacentHTML("beforeend", "<p class='notice' role='alert'>The connection broke off. Load the page again.</p>");
  });
}

async function send(form) {
  const button = form.querySelector(".send");
  const fault = form.querySelector("#fault");
  button.disabled = true;
  fault.hidden = true;
  try {
    const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    if (answer.ok) {
      window.location.assign(answer.url);
      if (new URL(answer.url).pathname === window.location.pathname) window.location.reload();
      return;
    }
    const plain = (answer.headers.get("content-type") || "").startsWith("text/plain");
    fault.textContent = plain ? await answer.text() : `That could not be sent (${answer.status}). Is it too long?`;
  } catch {
    fault.textContent = "The site cannot be reached. What you wrote is still here; try again.";
  }
  fault.hidden = false;
  button.disabled = false;
}

function edit(button) {
  const said = button.closest(".said");
  const form = document.querySelector("#composer");
  const area = form.querySelector("textarea");
  area.value = said.querySelector(".original").content.textContent;
  let turn = form.querySelector("[name=turn]");
  if (!turn) {
    turn = Object.assign(document.createElement("input"), { type: "hidden", name: "turn" });
    form.append(turn);
  }
  turn.value = button.dataset.edit;
  area.focus();
}

async function copy(button) {
  const text = button.closest(".said, .answer").querySelector(".original").content.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if ("copy" in button.dataset) await copy(button);
  else if (button.dataset.edit) edit(button);
  else if (button.dataset.stop) await post(button.dataset.stop);
  else if (button.dataset.post) {
    const answer = await post(button.dataset.post, button.dataset.step ? { step: button.dataset.step } : {});
    if (answer.ok) window.location.reload();
  }
});

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.dataset.confirm && !window.confirm(form.dataset.confirm)) event.preventDefault();
  if (form.id !== "composer") return;
  event.preventDefault();
  send(form);
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelectorAll("[data-stop]").forEach((button) => button.click());
  if (event.target.id === "prompt" && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
});

// The model's name says which one is talking; on a narrow screen the list is closed at first.
document.querySelectorAll("[data-stream]").forEach(follow);
if (window.matchMedia("(max-width: 800px)").matches) document.querySelector(".drawer")?.removeAttribute("open");
const turns = document.querySelector("#turns");
if (turns?.children.length) document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
