// The viewer's script: copying, keys, and following a run. Every page works without it.
"use strict";

function rows() { return [...document.querySelectorAll(".rows tbody tr, .cards .card, .tokens:not(.prompt) .tok")]; }

function tell(token) {
  const tip = document.getElementById("tip");
  if (token && tip) tip.textContent = token.title;
}

function move(by) {
  const all = rows();
  if (!all.length) return;
  const now = all.findIndex((row) => row.classList.contains("at"));
  const next = Math.min(all.length - 1, Math.max(0, now < 0 ? (by > 0 ? 0 : all.length - 1) : now + by));
  if (now >= 0) all[now].classList.remove("at");
  all[next].classList.add("at");
  const link = all[next].querySelector("a.open");
  if (link) link.focus({ preventScroll: true });
  all[next].scrollIntoView({ block: "nearest" });
  if (all[next].matches(".tok")) tell(all[next]);
}

function go(...selectors) {
  const link = selectors.map((selector) => document.querySelector(selector)).find((item) => item);
  if (link) link.click();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "[") go("[data-previous], [rel=prev]");
  else if (event.key === "]") go("[data-next], [rel=next]");
  else if (event.key === "u") go("[data-up]", ".brand");
  else if (event.key === "/") { const search = document.getElementById("search"); if (search) { search.focus(); event.preventDefault(); } }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const text = document.getElementById(button.dataset.copy).textContent;
  await navigator.clipboard.writeText(text);
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1200);
});

document.addEventListener("mouseover", (event) => tell(event.target.closest(".tokens .tok")));

// A running run: when it has written something, the main part of the page is fetched again and exchanged.
const events = document.body.dataset.events;
if (events) {
  let busy = false;
  const source = new EventSource(events);
  source.addEventListener("changed", async () => {
    const active = document.activeElement;
    if (busy || (active && /^(INPUT|SELECT)$/.test(active.tagName))) return;
    busy = true;
    try {
      const response = await fetch(location.href, { credentials: "same-origin" });
      if (!response.ok) return;
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      const open = [...document.querySelectorAll("main details")].map((item) => item.open);
      document.querySelector("main").replaceWith(page.querySelector("main"));
      document.querySelector("header").replaceWith(page.querySelector("header"));
      [...document.querySelectorAll("main details")].forEach((item, n) => { if (open[n]) item.open = true; });
      if (!page.body.dataset.events) source.close();
    } finally { busy = false; }
  });
}
