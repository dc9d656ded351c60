"use strict";
// Asks the server, and shows what becomes of the question. Texts of data and models are written by `textContent`.
(() => {
  document.documentElement.classList.add("js", "live-script");
  const form = document.querySelector(".asking");
  let running = null; // the AbortController of the question that is answered

  // ------------------------------------------------------------------------------------------ questions

  // The events of a response, as (name, value).
  async function* eventsOf(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const name = /^event: (.*)$/m.exec(block)?.[1];
        const data = /^data: (.*)$/m.exec(block)?.[1];
        if (name && data) yield [name, JSON.parse(data)];
      }
    }
  }

  function stageText(name, { stage, done, total, before }) {
    if (name === "waiting") return before === 1 ? "1 question before this one" : `${before} questions before this one`;
    return `${stage}: ${done} of ${total}`;
  }

  async function problemOf(response) {
    if (response.status === 401) return "The server has another token now; open the address that it printed.";
    try {
      const { detail } = await response.json();
      return detail;
    } catch {
      return `the server answered with status ${response.status}`;
    }
  }

  async function ask(question) {
    running?.abort();
    const mine = new AbortController();
    running = mine;
    const [written, stage, problem] = [".written", ".stage", ".problem"].map((name) => form.querySelector(name));
    const cancel = form.querySelector(".cancel");
    written.textContent = "";
    written.hidden = problem.hidden = true;
    stage.textContent = "Asking the model";
    cancel.hidden = false;
    const buttons = document.querySelectorAll(".asking [type=submit], .again");
    for (const button of buttons) button.disabled = true; // one question at a time, which can be cancelled
    let failed = "";
    try {
      const response = await fetch("/query", {
        method: "POST",
        headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
        body: JSON.stringify(question),
        signal: mine.signal,
      });
      if (!response.ok) failed = await problemOf(response);
      else {
        failed = "the connection ended before the answer";
        for await (const [name, value] of eventsOf(response)) {
          if (name === "answer") {
            written.hidden = false;
            written.textContent += value.text;
            stage.textContent = "";
          } else if (name === "result") {
            location.assign(value.url);
            return;
          } else if (name === "error") failed = value.detail;
          else stage.textContent = stageText(name, value);
        }
      }
    } catch (error) {
      failed = error.name === "AbortError" ? "" : "the server cannot be reached";
    }
    if (running !== mine) return; // another question has taken its place
    running = null;
    cancel.hidden = true;
    for (const button of buttons) button.disabled = false;
    stage.textContent = failed ? "" : "Cancelled";
    problem.textContent = failed;
    problem.hidden = !failed;
  }

  form?.addEventListener("submit", (event) => {
    event.preventDefault();
    const given = new FormData(form);
    const question = { [given.get("kind")]: given.get("ask"), top_k: Number(given.get("top_k")) };
    if (given.get("words")) question.words = true;
    if (given.get("by")) question.by = given.get("by");
    if (given.get("interactions")) {
      question.interactions = true;
      if (!question.by) {
        const problem = form.querySelector(".problem");
        problem.textContent = "Choose a column to sum by first.";
        problem.hidden = false;
        return;
      }
    }
    if (given.get("fdr")) question.fdr = Number(given.get("fdr"));
    if (given.get("completion")) question.completion = given.get("completion");
    ask(question);
  });
  form?.querySelector(".cancel").addEventListener("click", () => running?.abort());
  form?.querySelector("#ask").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  for (const button of document.querySelectorAll(".again")) {
    button.addEventListener("click", () => {
      const question = JSON.parse(button.dataset.question);
      if (button.dataset.words) question.words = true;
      const by = button.parentElement.querySelector("select.by");
      if (by) question.by = by.value;
      ask(question);
    });
  }
  document.querySelector(".copy")?.addEventListener("click", async ({ target }) => {
    const link = location.origin + location.pathname;
    try {
      await navigator.clipboard.writeText(link);
      target.textContent = "Copied";
    } catch {
      const box = document.createElement("input"); // the page may not write to the clipboard
      box.readOnly = true;
      box.value = link;
      box.setAttribute("aria-label", "Link to this answer");
      target.replaceWith(box);
      box.select();
    }
  });
  addEventListener("pageshow", () => {
    if (!form) return; // the browser may show the page again as it was left
    for (const name of [".written", ".stage"]) form.querySelector(name).textContent = "";
    for (const button of document.querySelectorAll(".asking [type=submit], .again")) button.disabled = false;
    form.querySelector(".cancel").hidden = true;
  });

  // -------------------------------------------------------------------------------------------- history

  for (const button of document.querySelectorAll(".forget")) {
    button.addEventListener("click", async () => {
      const response = await fetch(`/answers/${button.dataset.id}`, { method: "DELETE" });
      if (response.ok || response.status === 404) button.closest("li").remove();
    });
  }

  // ----------------------------------------------------------------------------------------------- rows

  // Each hit gets a link to its row, whole.
  const data = document.getElementById("data");
  if (data && document.querySelector(".live[data-rows]")) {
    const queries = JSON.parse(data.textContent);
    document.querySelectorAll(".query").forEach((section, n) => {
      for (const hit of section.querySelectorAll("[data-hit]")) {
        const row = queries[n].hits[Number(hit.dataset.hit)]?.row;
        if (row === undefined) continue;
        const link = document.createElement("a");
        link.href = `/rows/${row}`;
        link.className = "whole";
        link.textContent = "Whole row";
        hit.querySelector(".index").before(link);
      }
    });
  }
})();
