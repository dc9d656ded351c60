"use strict";
// Texts of data and models stand in the document as text already; the script moves them, and reads and writes
// `textContent` alone. The JSON in #data holds numbers, a list a query, as `view.View.script` writes it:
//   bounded, fused: whether the top is a fused ranking, ends: [top, bottom], mean of the top scores, shares: whether parts are told as shares of it, sinks:
//   positions of attention sinks, owners: the target of each token or -1,
//   influence of each target, runs [first token, last token, hit] that have the same best hit, baselines, levels
//   of byTarget, and hits in the order of their elements' data-hit:
//   row, index, side, score, rank, ..., tail: characters of the template behind the prompt, targets [targets], tokens [tokens]: base64 of float32;
//   lengths [tokens] of their texts; byTarget [targets, tokens]: see `shades.levels`.
(() => {
  const STEPS = 9;
  const STRONGEST = 5;
  const UNSURE = "within two errors of 0"; // as in `text`
  const ROW = 160; // characters of a prompt and of an answer in a row
  const root = document.documentElement;
  root.classList.add("js");

  // ------------------------------------------------------------------------------------------ numbers

  const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const floatsOf = (text) => new Float32Array(bytesOf(text).buffer);

  // As `text.score_text` writes it.
  function scoreText(score, bounded) {
    const value = bounded ? unsigned(score, 4) : score || 0;
    return (value < 0 ? "" : "+") + (bounded ? value.toFixed(4) : plain(value, 4));
  }

  // The value, or 0 if it has nothing else in so many digits behind the point.
  const unsigned = (value, digits) => (Number(value.toFixed(digits)) === 0 ? 0 : value);

  // A number with so many digits, without an exponent unless it is huge or tiny, as `text._plain` writes it.
  function plain(value, digits) {
    const [rounded, power] = value.toExponential(digits - 1).split("e");
    if (power === undefined) return rounded;
    if (Number(power) < -6 || Number(power) > 12) {
      return rounded + "e" + power[0] + power.slice(1).padStart(2, "0");
    }
    const [whole, fraction] = value.toFixed(Math.max(0, digits - 1 - Number(power))).split(".");
    const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",");
    return fraction === undefined ? grouped : grouped + "." + fraction;
  }

  // Of `shades.levels`, which are known to about a digit.
  function roughText(score, bounded) {
    const sign = score < 0 ? "" : "+";
    return "≈ " + sign + (bounded ? String(Number(score.toPrecision(1))) : plain(score, 1));
  }

  // As `shades.steps` has it.
  function stepOf(value, peak) {
    if (!(peak > 0)) return 0;
    return Math.sign(value) * Math.min(STEPS, Math.floor(STEPS * Math.sqrt(Math.abs(value) / peak) + 0.5));
  }

  const shadeOf = (step) => (step > 0 ? "p" + step : step < 0 ? "n" + -step : "");
  const largestOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  // As `shades.peak_of` has it: without attention sinks, where much gathers in all examples.
  const peakOf = (values, sinks) => largestOf(values.filter((_, n) => !sinks.has(n))) || largestOf(values);

  // The places of a text's tokens, those of a word together. A token in two words joins them, one without text
  // belongs to the character that the next one ends, and no word reaches over a place in `parts`.
  const segmenter = typeof Intl.Segmenter === "function" ? new Intl.Segmenter(undefined, { granularity: "word" }) : null;
  function wordsOf(texts, parts) {
    const starts = new Set();
    for (const { index } of segmenter.segment(texts.join(""))) starts.add(index);
    const words = [];
    let at = 0;
    let isEmpty = true;
    texts.forEach((text, n) => {
      if (!words.length || parts.includes(n) || (starts.has(at) && !isEmpty)) {
        words.push([]);
        isEmpty = true;
      }
      words.at(-1).push(n);
      isEmpty &&= !text;
      at += text.length;
    });
    return words;
  }

  async function inflated(text) {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  // ------------------------------------------------------------------------------------------ elements

  function made(tag, words, kind) {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (words) element.textContent = words;
    return element;
  }

  // Text of data or a model inside of other text, whose direction it must not change.
  function holding(tag, words) {
    const element = made(tag);
    element.append(made("bdi", words));
    return element;
  }

  function setClass(element, name) {
    if (element.className !== name) element.className = name;
  }

  // Puts the elements into the list in this order, and moves none that is in its place.
  function arrange(list, elements) {
    let next = list.firstElementChild;
    for (const element of elements) {
      if (element === next) next = next.nextElementSibling;
      else list.insertBefore(element, next);
    }
  }

  // A token where it stands alone; `hits._named` writes the same.
  function named(text) {
    if (!text) return "(part of a character)";
    if (!text.trim()) return text.includes("\n") ? "line break" : "space";
    const line = text.trim().replace(/\s+/g, " ");
    return line.length > 30 ? line.slice(0, 29) + "…" : line;
  }

  // Makes elements of the tokens of a text, which is on the page with few elements to keep it small.
  function cutTokens(text, lengths) {
    let at = 0;
    const tokens = [];
    for (const kind of [".shared", ".ask", ".answer"]) {
      const box = text.querySelector(kind);
      if (!box) continue;
      const pieces = []; // of text and marks for characters that are not seen, and whether they are quiet
      const gather = (node, quiet) => {
        if (node.nodeType === Node.TEXT_NODE || node.tagName === "I") pieces.push({ node, quiet });
        else for (const child of node.childNodes) gather(child, quiet || node.classList.contains("q"));
      };
      const own = [...box.childNodes].filter((node) => !node.classList?.contains("shared"));
      for (const node of own) gather(node, false);
      for (const node of own) node.remove();
      let n = 0;
      let start = 0;
      while (n < pieces.length && at < lengths.length) {
        const token = made("b");
        for (let left = lengths[at++]; left > 0 && n < pieces.length; ) {
          const { node, quiet } = pieces[n];
          const length = node.textContent.length;
          const end = Math.min(length, start + left);
          token.append(start || end < length ? node.textContent.slice(start, end) : node);
          if (quiet) token.className = "q";
          left -= end - start;
          start = end;
          if (end === length) [n, start] = [n + 1, 0];
        }
        tokens.push(token);
        box.append(token);
      }
    }
    return tokens;
  }

  // A folded text, opened where `look` says, and the button that shows all of it. look: an element, 0 for the
  // start, or Infinity for the end.
  function fold(text, look) {
    const button = made("button", "Show all", "more");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    text.classList.add("folded");
    if (text.scrollHeight <= text.clientHeight + 8) {
      text.classList.remove("folded");
      return;
    }
    // Where to look, which is read for all texts before any is moved: reading anew lays out the page anew.
    text.toLook = () => {
      const folded = text.classList.contains("folded");
      let top = folded ? look() : 0;
      if (top instanceof Element) {
        const line = parseFloat(getComputedStyle(text).lineHeight) || 20; // whole lines, and this in the middle
        const down = top.getBoundingClientRect().top - text.getBoundingClientRect().top + text.scrollTop;
        const middle = Math.round(text.clientHeight / line) >> 1;
        top = Math.max(0, Math.round(down / line) - middle) * line;
      }
      top = Math.min(top, text.scrollHeight - text.clientHeight);
      const below = top + text.clientHeight < text.scrollHeight - 4;
      return () => {
        text.scrollTop = top;
        text.classList.toggle("above", folded && top > 4);
        text.classList.toggle("below", folded && below);
      };
    };
    button.addEventListener("click", () => {
      const folded = text.classList.toggle("folded");
      button.textContent = folded ? "Show all" : "Show less";
      button.setAttribute("aria-expanded", String(!folded));
      text.toLook()();
    });
    text.after(button);
    text.toLook()();
  }

  // ------------------------------------------------------------------------------------------ a query

  class Query {
    constructor(section, data) {
      this.section = section;
      this.data = data;
      this.sinks = new Set(data.sinks);
      this.selected = null; // {targets: Set, low, high, part}
      this.words = "";
      this.side = 1; // of the list in front
      this.cards = data.hits.map((hit, n) => this.card(hit, n));
      this.lists = [1, -1].map((side) => section.querySelector(`.hits[data-side="${side}"]`));
      this.pool = section.querySelector(".pool");
      // By a selection. A row at both ends, as a fused ranking may have one, is moved once.
      const first = new Map(this.cards.map((card) => [card.hit.row, card]).reverse());
      this.movable = this.cards.filter((card) => card.targets && first.get(card.hit.row) === card);
      this.near = new IntersectionObserver((seen) => this.approach(seen), { rootMargin: "400px 0px" });
      for (const card of this.cards) this.near.observe(card.element);
      this.tokens = [...section.querySelectorAll(".completion > span")];
      this.tabs = [...section.querySelectorAll(".tab")];
      this.listenToTabs();
      if (this.movable.length && data.owners.some((owner) => owner >= 0)) this.listen();
      for (const button of section.querySelectorAll("button.part")) {
        button.type = "button";
        button.setAttribute("aria-pressed", "false");
        button.addEventListener("click", () => {
          const part = Number(button.dataset.part);
          this.select(this.selected?.part === part ? null : { targets: new Set([part]), part });
        });
      }
      const search = section.querySelector(".search input");
      search?.addEventListener("input", () => this.search(search.value));
      section.querySelector(".csv")?.addEventListener("click", () => this.save());
      section.querySelector(".clear")?.addEventListener("click", () => this.clear());
      const prompt = section.querySelector(".prompt");
      const isKnown = prompt?.querySelector(".shared"); // else what it asks is likely near its end
      if (prompt) this.onceSeen(prompt, () => fold(prompt, () => (isKnown ? 0 : Infinity)));
      const template = section.querySelector(".template");
      section.classList.toggle("brief", template !== null);
      template?.addEventListener("click", () => {
        const shown = !section.classList.toggle("brief");
        template.setAttribute("aria-pressed", String(shown));
        this.look(this.shown.filter((card) => card.near));
      });
    }

    // Sizes are known only of what is on the screen: sections of other queries are hidden.
    onceSeen(element, act) {
      const seen = new IntersectionObserver((entries) => {
        if (!entries.some((entry) => entry.isIntersecting)) return;
        seen.disconnect();
        act();
      });
      seen.observe(element);
    }

    card(hit, n) {
      const element = this.section.querySelector(`[data-hit="${n}"]`);
      const tokens = element.querySelector(".text.tokens");
      const was = made("p", "", "was");
      was.hidden = true;
      element.querySelector(".meter").after(was);
      const card = {
        hit,
        element,
        was,
        rank: element.querySelector(".rank"),
        score: element.querySelector(".score"),
        kind: element.querySelector(".kind"),
        error: element.querySelector("header .error"), // of the whole score alone
        bar: element.querySelector(".meter rect"),
        text: element.querySelector(".text"),
        spans: tokens ? cutTokens(tokens, hit.lengths) : [],
        targets: hit.targets ? floatsOf(hit.targets) : null,
        whole: hit.tokens ? floatsOf(hit.tokens) : null,
        near: false,
        stale: true, // its shades are those of another selection, or of tokens
        values: null, // of its tokens
        units: null, // the tokens that have a shade together, and
        sums: [], // their values
        words: null,
        folds: [...element.querySelectorAll("[data-fold]")],
        row: null,
      };
      card.values = card.whole;
      card.answer = card.spans.findIndex((span) => span.closest(".answer"));
      card.link = element.querySelector(".index");
      card.link.title = "Link to this hit";
      card.link.addEventListener("click", (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        this.visit(card);
      });
      card.chips = [...element.querySelectorAll(".chips li:has(b)")].map((chip) => this.chip(chip));
      card.void = card.spans.map((span) => !span.firstChild);
      card.quiet = card.spans.map((span) => (span.classList.contains("q") ? " q" : ""));
      tokens?.addEventListener("pointerover", (event) => {
        const place = card.spans.indexOf(event.target.closest(".tokens b"));
        const unit = card.units?.findIndex((places) => places.includes(place));
        if (place >= 0 && unit >= 0) card.spans[place].title = this.partText(card, card.sums[unit]);
      });
      return card;
    }

    // A column of an example as a button that filters by it. Returns it as it is filtered by.
    chip(item) {
      const [name, value] = [...item.querySelectorAll("bdi")].map((part) => part.textContent);
      const button = made("span"); // which is printed, as other buttons are not
      button.setAttribute("role", "button");
      button.tabIndex = 0;
      button.title = item.title || "Filter by this column";
      button.append(...item.childNodes);
      item.replaceChildren(button);
      button.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        button.click();
      });
      button.addEventListener("click", () => {
        const search = this.section.querySelector(".search input");
        const text = `${name}=${value}`;
        search.value = search.value === text ? "" : text;
        this.search(search.value);
      });
      return `${name}=${value}`.toLowerCase();
    }

    // ---------------------------------------------------------------------------------- selection

    listen() {
      const { tokens } = this;
      const owners = this.data.owners;
      const box = tokens[0].parentElement;
      const usable = tokens.filter((_, place) => owners[place] >= 0);
      box.setAttribute("role", "listbox");
      box.setAttribute("aria-multiselectable", "true");
      box.setAttribute("aria-orientation", "horizontal");
      box.setAttribute("aria-label", "Tokens of the completion");
      for (const token of usable) {
        const influence = this.data.influence[owners[tokens.indexOf(token)]] ?? 0;
        token.setAttribute("role", "option");
        token.setAttribute("aria-selected", "false");
        token.setAttribute("aria-label", `${named(token.textContent)}, ${scoreText(influence, this.data.bounded)}`);
        token.tabIndex = token === usable[0] ? 0 : -1;
      }
      const placeOf = (event) => tokens.indexOf(event.target.closest('[role="option"]'));
      const focus = (token) => {
        for (const other of usable) other.tabIndex = other === token ? 0 : -1;
        token.focus();
      };
      let anchor = null;
      let drawn = null;
      // Whether a range only grows or shrinks: then it is no step of its own in the history.
      const range = (place, grows = false) => {
        if (anchor === null) anchor = place;
        this.select(this.range(Math.min(anchor, place), Math.max(anchor, place)), grows && this.selected !== null);
      };
      // A finger may be about to scroll, so it selects when it is lifted; the hits then come into view.
      const start = (event) => {
        const place = placeOf(event);
        if (place < 0) return false;
        focus(tokens[place]);
        const only = this.selected && this.selected.low === place && this.selected.high === place;
        if (event.shiftKey) range(place, true);
        else {
          anchor = place;
          if (only) this.clear();
          else range(place);
        }
        return !event.shiftKey && !only;
      };
      let finger = false;
      box.addEventListener("pointerdown", (event) => {
        finger = event.pointerType === "touch";
        if (finger || event.button) return;
        if (event.pointerType === "mouse") event.preventDefault();
        if (start(event)) drawn = event.pointerId;
      });
      box.addEventListener("click", (event) => {
        if (finger || event.detail === 0) start(event); // 0: a screen reader's click, or a script's
        if (this.selected && placeOf(event) >= 0) this.approachHits();
      });
      box.addEventListener("pointerover", (event) => {
        const place = placeOf(event);
        if (drawn === event.pointerId && place >= 0 && event.buttons) range(place, true);
      });
      addEventListener("pointerup", () => (drawn = null));
      box.addEventListener("keydown", (event) => {
        const here = usable.indexOf(document.activeElement);
        if (here < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
        let next = null;
        if (event.key === "ArrowRight") next = Math.min(usable.length - 1, here + 1);
        else if (event.key === "ArrowLeft") next = Math.max(0, here - 1);
        else if (event.key === "ArrowDown" || event.key === "ArrowUp") next = beside(here, event.key === "ArrowDown");
        else if (event.key === "Home") next = 0;
        else if (event.key === "End") next = usable.length - 1;
        else if (event.key === "Enter" || event.key === " ") {
          anchor = tokens.indexOf(usable[here]);
          range(anchor);
        } else return;
        event.preventDefault();
        if (next === null) return;
        if (event.shiftKey && anchor === null) anchor = tokens.indexOf(usable[here]);
        focus(usable[next]);
        if (event.shiftKey) range(tokens.indexOf(usable[next]), true);
        else anchor = null;
      });
      // The token of the next line that is nearest to this one.
      function beside(here, down) {
        const { left, top, bottom } = usable[here].getBoundingClientRect();
        let best = here;
        let least = Infinity;
        usable.forEach((token, n) => {
          const box = token.getBoundingClientRect();
          const lines = down ? box.top - bottom : top - box.bottom;
          const far = 1000 * Math.max(0, lines) + Math.abs(box.left - left);
          if (lines > -4 && n !== here && far < least) [best, least] = [n, far];
        });
        return best;
      }
    }

    range(low, high) {
      const targets = new Set(this.data.owners.slice(low, high + 1).filter((owner) => owner >= 0));
      return targets.size ? { targets, low, high } : null;
    }

    clear() {
      if (this.selected) this.select(null);
    }

    // Where they are below the screen, as on a phone.
    approachHits() {
      const bar = this.section.querySelector(".bar");
      if (bar.getBoundingClientRect().top < innerHeight - 160) return;
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      bar.scrollIntoView({ block: "start", behavior: calm ? "auto" : "smooth" });
    }

    select(selected, grows = false) {
      this.choose(selected);
      remember(this.address(), grows);
    }

    choose(selected) {
      this.selected = selected;
      this.tokens.forEach((token, place) => {
        if (token.hasAttribute("role")) {
          const on = selected !== null && selected.low !== undefined && selected.targets.has(this.data.owners[place]);
          token.setAttribute("aria-selected", String(on));
        }
      });
      for (const button of this.section.querySelectorAll("button.part")) {
        button.setAttribute("aria-pressed", String(selected?.part === Number(button.dataset.part)));
      }
      this.say();
      this.show();
      this.shade();
    }

    // ------------------------------------------------------------------------------------ address

    // Of this query with its selection and perhaps a card, all from 1: q3, q3.t5, q3.t5-7.h2, q3.p1.
    address(card) {
      const { low, high, part } = this.selected ?? {};
      let address = "#" + this.section.id;
      if (part !== undefined) address += `.p${part + 1}`;
      else if (low !== undefined) address += `.t${low + 1}${high > low ? `-${high + 1}` : ""}`;
      return card ? `${address}.h${this.cards.indexOf(card) + 1}` : address;
    }

    // Shows what an address says, as far as it is there.
    restore({ low, high, part, hit }) {
      let selected = null;
      if (this.movable.length) {
        if (part !== undefined && this.section.querySelector(`button[data-part="${part}"]`)) {
          selected = { targets: new Set([part]), part };
        } else if (low !== undefined) selected = this.range(low, high);
      }
      if (selected || this.selected) this.choose(selected);
      const card = this.cards[hit];
      if (card && this.shown.includes(card)) this.comeTo(card);
    }

    visit(card) {
      remember(this.address(card), false);
      this.comeTo(card);
    }

    // Opens a card where it is, and scrolls to it.
    comeTo(card) {
      const side = this.rows[0].some((row) => row.card === card) ? 1 : -1;
      if (side !== this.side) this.turn(side);
      this.openRow(card, true);
      for (const other of this.section.querySelectorAll(".hit.at")) other.classList.remove("at");
      card.element.classList.add("at");
      card.element.scrollIntoView({ block: "start" });
      card.link.focus({ preventScroll: true });
    }

    // --------------------------------------------------------------------------------------- tabs

    listenToTabs() {
      this.tabs.forEach((tab, n) => {
        tab.addEventListener("click", () => this.turn(Number(tab.dataset.side)));
        tab.addEventListener("keydown", (event) => {
          const to = { ArrowRight: 1 - n, ArrowLeft: 1 - n, Home: 0, End: 1 }[event.key];
          if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
          event.preventDefault();
          this.tabs[to].focus();
          this.tabs[to].click();
        });
        const panel = this.lists[n].parentElement;
        panel.setAttribute("role", "tabpanel");
        panel.setAttribute("aria-labelledby", tab.id);
      });
      this.turn(1);
    }

    // Brings the helpful (1) or the harmful (-1) hits to the front.
    turn(side) {
      this.side = side;
      this.tabs.forEach((tab, n) => {
        const on = Number(tab.dataset.side) === side;
        tab.setAttribute("aria-selected", String(on));
        tab.tabIndex = on ? 0 : -1;
        this.lists[n].parentElement.classList.toggle("away", !on);
      });
    }

    // --------------------------------------------------------------------------------------- rows

    // A line that stands for a card, made when it is first needed.
    rowOf(card) {
      if (card.row) return card.row;
      const line = made("button", "", "row");
      line.type = "button";
      const parts = { line };
      const texts = [".ask", ".answer"].map((kind) => {
        const part = card.text?.querySelector(kind);
        const shared = part?.querySelector(".shared")?.textContent.length ?? 0;
        const text = part?.textContent ?? "";
        const end = kind === ".ask" && card.hit.tail ? text.length - card.hit.tail : text.length;
        return text.slice(shared, Math.min(end, shared + 3 * ROW)).trim().replace(/\s+/g, " ").slice(0, ROW);
      });
      for (const kind of ["rank", "score", "index"]) line.append((parts[kind] = made("span", "", kind)));
      if (texts[0]) line.append(made("bdi", texts[0], "from"), made("span", "→", "arrow"));
      line.append(made("bdi", texts[1] || (texts[0] ? "" : "(no text)"), "to"));
      parts.index.textContent = card.hit.index;
      line.addEventListener("click", () => {
        const opened = !card.element.classList.contains("open");
        this.openRow(card, opened);
        remember(opened ? this.address(card) : this.address(), !opened);
      });
      card.element.prepend(line);
      return (card.row = parts);
    }

    openRow(card, opened) {
      card.element.classList.toggle("open", opened);
      card.row?.line.setAttribute("aria-expanded", String(opened));
      if (opened) this.foldIn(card);
    }

    sayRows() {
      if (!root.classList.contains("rows")) return;
      for (const { card, score, rank } of this.rows.flat()) {
        const row = this.rowOf(card);
        row.rank.textContent = rank;
        row.score.textContent = card.score.textContent;
        row.score.className = card.score.className;
        row.line.setAttribute("aria-expanded", String(card.element.classList.contains("open")));
      }
    }

    // What is selected, and its share of the score.
    say() {
      const status = this.section.querySelector(".status");
      const clear = this.section.querySelector(".clear");
      const { selected, data } = this;
      clear.hidden = !selected;
      if (!selected) {
        status.textContent = "Ranked for the whole generation";
        return;
      }
      let words;
      let quoted = true;
      let count = "";
      if (selected.part !== undefined) {
        words = this.section.querySelector(`[data-part="${selected.part}"] bdi`)?.textContent;
        quoted = words !== undefined;
        words ??= "a part without text";
      } else {
        const some = this.tokens.filter((_, place) => selected.targets.has(data.owners[place]));
        words = named(some.map((token) => token.textContent).join(""));
        if (some.length > 1) count = ` (${some.length} tokens)`;
      }
      const influence = [...selected.targets].reduce((sum, n) => sum + (data.influence[n] ?? 0), 0);
      let share = scoreText(influence, data.bounded);
      if (data.mean && data.shares) {
        const percent = unsigned((100 * influence) / data.mean, 1).toFixed(1);
        share = `${percent}% of the score, ${share} of ${scoreText(data.mean, data.bounded)}`;
      }
      const name = holding("b", words);
      if (quoted) {
        name.prepend("“");
        name.append("”");
      }
      const run = selected.low === undefined ? null : this.runOf(selected.low, selected.high);
      const best = run ? `; best example of ${run[1] - run[0] + 1} tokens in a row: ${this.nameOf(run)}` : "";
      status.replaceChildren("Ranked for ", name, `${count}: ${share}${best}`);
    }

    partOf(card) {
      let sum = 0;
      for (const n of this.selected.targets) sum += card.targets[n];
      return sum;
    }

    // Which cards are in which list, in order, for the selection and the words searched for.
    ranked() {
      const lists = [[], []];
      if (!this.selected) {
        for (const card of this.cards) {
          if (card.hit.side) lists[card.hit.side > 0 ? 0 : 1].push({ card, score: card.hit.score, rank: card.hit.rank });
        }
        return lists;
      }
      const parts = this.movable.map((card) => ({ card, score: this.partOf(card) }));
      const most = Math.max(...this.data.ends);
      const by = (sign) => (a, b) => sign * (b.score - a.score) || a.card.hit.row - b.card.hit.row;
      lists[0] = parts.filter((part) => part.score > 0).sort(by(1)).slice(0, most);
      lists[1] = parts.filter((part) => part.score < 0).sort(by(-1)).slice(0, most);
      for (const list of lists) list.forEach((part, n) => (part.rank = n + 1));
      return lists;
    }

    show() {
      const lists = this.ranked();
      const found = lists.map((list) => list.filter(({ card }) => this.matches(card)));
      const most = largestOf(lists.flat().map(({ score }) => score ?? 0));
      const kept = new Set(found.flat().map(({ card }) => card));
      const away = this.cards.filter((card) => !kept.has(card) && card.element.parentElement !== this.pool);
      this.pool?.append(...away.map((card) => card.element));
      found.forEach((list, n) => {
        arrange(this.lists[n], list.map(({ card }) => card.element));
        const none = this.lists[n].parentElement.querySelector(".none");
        none.hidden = list.length > 0;
        none.dataset.whole ??= none.textContent;
        if (this.words) this.sayNone(none);
        else if (!this.selected) none.textContent = none.dataset.whole;
        else none.textContent = n ? "None here makes it less likely." : "None here makes it more likely.";
        for (const { card, score, rank } of list) this.label(card, score, rank, most);
      });
      if (this.data.fused) {
        // A selection has a ranking of gradient scores alone.
        const title = this.selected ? "Most helpful" : "Fused ranking"; // as in `text.title_text`
        this.tabs[0].querySelector("span").textContent = title;
        this.lists[0].parentElement.querySelector("h3").textContent = title;
      }
      this.rows = found;
      this.listed = lists.flat().map(({ card }) => card);
      this.tabs.forEach((tab, n) => (tab.querySelector("b").textContent = found[n].length));
      this.sayRows();
      this.shown = found.flat().map(({ card }) => card);
      const of = lists[0].length + lists[1].length;
      const text = this.words ? `${this.shown.length} of ${of}` : "";
      const status = this.section.querySelector(".found");
      if (status.textContent !== text) status.textContent = text;
    }

    // That a list has no match, for what, and a button that shows all again: a filter is for both lists.
    sayNone(none) {
      const search = this.section.querySelector(".search input");
      const button = made("button", "Clear the filter", "unfilter");
      button.type = "button";
      button.addEventListener("click", () => {
        search.value = "";
        this.search("");
        search.focus();
      });
      none.replaceChildren("No matches for ", holding("b", search.value.trim()), ". ", button);
    }

    label(card, score, rank, most) {
      const { hit, kind, was } = card;
      const side = score < 0 ? "harmful" : "helpful";
      const { bounded } = this.data;
      card.rank.textContent = rank;
      card.score.textContent = scoreText(score ?? 0, bounded);
      const unsure = !this.selected && hit.error !== undefined && Math.abs(score) < 2 * hit.error ? " unsure" : "";
      setClass(card.score, `score ${side}${unsure}`);
      kind.textContent = unsure ? UNSURE : side;
      setClass(kind, `kind ${side}${unsure}`);
      card.link.setAttribute("href", this.address(card));
      if (card.error) card.error.hidden = this.selected !== null;
      card.bar.setAttribute("class", side);
      card.bar.setAttribute("width", most > 0 ? (100 * Math.abs(score)) / most : 0);
      was.hidden = !this.selected || hit.score === undefined;
      if (!was.hidden) {
        const place = hit.rank ? `, rank ${hit.rank} of the ${this.endName(hit.side)}` : "";
        was.textContent = `For the whole generation ${scoreText(hit.score, bounded)}${place}`;
      }
    }

    // ------------------------------------------------------------------------------------- shades

    approach(seen) {
      for (const entry of seen) this.cards[Number(entry.target.dataset.hit)].near = entry.isIntersecting;
      this.paintNear();
      for (const entry of seen) if (entry.isIntersecting) this.foldIn(this.cards[Number(entry.target.dataset.hit)]);
    }

    foldIn(card) {
      if (card.folded || !card.text?.clientHeight) return; // a card behind its row has no size yet
      card.folded = true;
      for (const part of card.folds) {
        fold(part, () => {
          if (!this.selected) return 0;
          const strongest = this.strongest(card).filter(({ span }) => part.contains(span) && span.checkVisibility());
          return strongest[0]?.span ?? 0;
        });
      }
    }

    // Where to look in the folded texts of these cards.
    look(cards) {
      for (const look of cards.flatMap((card) => card.folds.map((part) => part.toLook?.()))) look?.();
    }

    // The values of all cards that are shown, on one scale, and the shades of those on the screen.
    async shade() {
      const { selected, listed } = this;
      const parted = (card) => selected && card.hit.byTarget && typeof DecompressionStream === "function";
      const found = new Map();
      const inflated = listed.filter(parted);
      if (inflated.length) {
        const bytes = await Promise.all(inflated.map((card) => this.bytesOf(card)));
        inflated.forEach((card, n) => found.set(card, bytes[n]));
      }
      if (this.selected !== selected) return; // another was chosen meanwhile
      for (const card of this.cards) card.stale = true;
      for (const card of listed) {
        card.values = found.has(card) ? this.summed(card, found.get(card), selected.targets) : card.whole;
        card.ofWhole = selected !== null && !found.has(card);
        card.units = null;
      }
      const of = selected ? [...found.keys()] : this.cards.filter((card) => card.hit.side);
      this.peak = this.peakOf(of);
      this.wholePeak = selected ? this.peakOf(this.cards.filter((card) => card.hit.side), true) : this.peak;
      this.paintNear();
    }

    // The largest sum of a word or token in these cards.
    peakOf(cards, ofWhole = false) {
      let peak = 0;
      for (const card of cards) {
        const values = ofWhole ? card.whole : card.values;
        if (!values) continue;
        const units = this.unitsIn(card);
        const sums = units.map((places) => places.reduce((sum, place) => sum + values[place], 0));
        const sinks = new Set([...units.keys()].filter((n) => units[n].some((place) => this.sinks.has(place))));
        peak = Math.max(peak, peakOf(sums, sinks));
      }
      return peak;
    }

    unitsIn(card) {
      if (!byWords) return card.spans.map((_, n) => [n]);
      card.words ??= wordsOf(card.spans.map((span) => span.textContent), [card.answer]);
      return card.words;
    }

    paintNear() {
      const stale = this.shown.filter((card) => card.near && card.stale);
      for (const card of stale) this.paint(card);
      this.look(stale);
    }

    paint(card) {
      card.stale = false;
      if (!card.values) return;
      card.units = this.unitsIn(card);
      card.sums = card.units.map((places) => places.reduce((sum, place) => sum + card.values[place], 0));
      const peak = card.ofWhole ? this.wholePeak : this.peak;
      card.units.forEach((places, unit) => {
        const shade = shadeOf(stepOf(card.sums[unit], peak));
        for (const place of places) {
          const span = card.spans[place];
          setClass(span, (shade + (card.void[place] ? " void" : "") + card.quiet[place]).trim());
          if (span.title) span.removeAttribute("title");
        }
      });
      this.sayStrongest(card);
    }

    // The run of tokens with the same best hit that holds all of these.
    runOf(low, high) {
      return this.data.runs.find(([first, last]) => first <= low && high <= last);
    }

    nameOf([, , hit]) {
      const { index, side, rank } = this.data.hits[hit];
      return `index ${index}${side ? `, rank ${rank} of the ${this.endName(side)}` : ""}`;
    }

    endName(side) {
      if (side < 0) return "most harmful";
      return this.data.fused ? "fused ranking" : "most helpful";
    }

    underline() {
      this.data.runs.forEach(([first, last, hit], n) => {
        for (const token of this.tokens.slice(first, last + 1)) token.dataset.run = n % 2;
        const { side, rank } = this.data.hits[hit];
        if (side) this.tokens[last].dataset.rank = side > 0 ? rank : `−${rank}`;
      });
    }

    // The completion by words: of each the influence of its targets.
    paintCompletion() {
      const { owners, influence, bounded } = this.data;
      const units = byWords ? wordsOf(this.tokens.map((token) => token.textContent), []) : this.tokens.map((_, n) => [n]);
      const targets = units.map((places) => new Set(places.map((place) => owners[place]).filter((owner) => owner >= 0)));
      const sums = targets.map((some) => [...some].reduce((sum, owner) => sum + (influence[owner] ?? 0), 0));
      const peak = largestOf(sums);
      units.forEach((places, unit) => {
        for (const place of places) {
          const token = this.tokens[place];
          setClass(token, (shadeOf(stepOf(sums[unit], peak)) + (token.firstChild ? "" : " void")).trim());
          const run = this.runOf(place, place);
          const best = run ? `, best example: ${this.nameOf(run)}` : "";
          if (targets[unit].size) token.title = scoreText(sums[unit], bounded) + best;
        }
      });
    }

    async bytesOf(card) {
      card.inflated ??= inflated(card.hit.byTarget);
      return card.inflated;
    }

    summed(card, buffer, targets) {
      const tokens = card.spans.length;
      const peaks = new Float32Array(buffer, 0, card.targets.length);
      const levels = new Int8Array(buffer, 4 * peaks.length);
      const values = new Float64Array(tokens);
      for (const target of targets) {
        for (let token = 0; token < tokens; token++) {
          const level = levels[target * tokens + token] / this.data.levels;
          values[token] += peaks[target] * level * Math.abs(level);
        }
      }
      return values;
    }

    // What a token brings, as exactly as it is known.
    partText(card, value) {
      return (card.values === card.whole ? scoreText : roughText)(value, this.data.bounded);
    }

    strongest(card) {
      let order = card.units ? card.units.map((places, n) => ({ places, n, value: card.sums[n] })) : [];
      order = order.filter(({ places }) => !places.some((place) => this.sinks.has(place)));
      order.sort((a, b) => Math.abs(b.value) - Math.abs(a.value) || a.n - b.n);
      for (const one of order) one.span = card.spans[one.places[0]];
      return order.slice(0, STRONGEST).filter(({ value }) => value);
    }

    sayStrongest(card) {
      const list = card.element.querySelector(".strongest ul");
      if (!list) return;
      const items = this.strongest(card).map(({ places, value }) => {
        const item = made("li");
        const text = places.map((place) => card.spans[place].textContent).join("");
        item.append(holding("q", named(text)), ` ${this.partText(card, value)}`);
        return item;
      });
      list.replaceChildren(...items);
      const what = byWords ? "Strongest words" : "Strongest tokens";
      list.previousElementSibling.textContent = what + (card.ofWhole ? ", for the whole generation" : "");
    }

    // ------------------------------------------------------------------------------------- search

    textOf(card) {
      return card.folds.map((part) => part.textContent).join(card.spans.length ? "" : "\n");
    }

    matches(card) {
      if (!this.words) return true;
      if (card.chips.includes(this.words)) return true;
      card.lower ??= this.textOf(card).toLowerCase();
      return card.lower.includes(this.words) || String(card.hit.index) === this.words.replace(/^#/, "");
    }

    search(words) {
      this.words = words.trim().toLowerCase();
      this.show();
      this.paintNear(); // what tokens bring does not depend on the words
      this.mark();
    }

    // Marks what was found; a mark is no element, so that tokens stay as they are.
    mark() {
      if (!CSS.highlights) return;
      const ranges = [];
      if (this.words) for (const card of this.shown) if (card.text) this.rangesIn(card, ranges);
      CSS.highlights.set("found", new Highlight(...ranges));
    }

    rangesIn(card, ranges) {
      const nodes = [];
      let text = "";
      for (const part of card.folds) {
        const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
          nodes.push({ node: walker.currentNode, start: text.length });
          text += walker.currentNode.data;
        }
      }
      const lower = text.toLowerCase();
      if (lower.length !== text.length) return; // places would be off
      const spot = (offset) => {
        let n = nodes.length - 1;
        while (nodes[n].start > offset) n--;
        return [nodes[n].node, offset - nodes[n].start];
      };
      for (let at = lower.indexOf(this.words); at >= 0 && ranges.length < 1000; at = lower.indexOf(this.words, at + 1)) {
        const range = new Range();
        range.setStart(...spot(at));
        const [node, offset] = spot(at + this.words.length - 1);
        range.setEnd(node, offset + 1);
        ranges.push(range);
      }
    }

    // --------------------------------------------------------------------------------------- CSV

    save() {
      const { baselines } = this.data;
      const names = ["side", "rank", "index", "score", "error", "rank_low", "rank_high", "tied", "estimate"];
      names.push("copies", "copies_indices", "whole_score");
      for (const name of baselines) names.push(`${name} rank`, `${name} score`);
      const tested = this.rows.flat().some(({ card }) => card.hit.p !== undefined);
      if (tested) names.push("p", "q");
      names.push("selection", "text");
      const status = this.section.querySelector(".status b");
      const selection = this.selected && status ? status.textContent : "";
      const lines = [names.map(textCell)];
      for (const { card, score, rank } of this.rows.flat()) {
        const { hit } = card;
        const whole = !this.selected;
        const copies = (hit.copies ?? []).length + (hit.more ?? 0);
        const cells = [score < 0 ? "harmful" : "helpful", rank, hit.index, score, whole ? hit.error : null];
        cells.push(...(whole ? hit.ranks ?? [null, null] : [null, null]), whole && hit.ranks ? hit.tied : null);
        cells.push(whole ? hit.estimate : null, copies, (hit.copies ?? []).join(" "), hit.score);
        for (const name of baselines) {
          const [value, place] = hit.standings?.[name] ?? [null, null];
          cells.push(place, value);
        }
        if (tested) cells.push(...(whole ? [hit.p, hit.q] : [null, null]));
        lines.push([...cells.map((cell) => String(cell ?? "")), textCell(selection), textCell(this.textOf(card))]);
      }
      const csv = lines.map((cells) => cells.map(quoted).join(",") + "\r\n").join("");
      const link = made("a");
      link.href = URL.createObjectURL(new Blob([csv], { type: "text/csv;charset=utf-8" }));
      link.download = data.length > 1 ? `hits-${Number(this.section.dataset.query) + 1}.csv` : "hits.csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
  }

  // RFC 4180: a cell in quotes, quotes in it doubled.
  const quoted = (cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
  // A spreadsheet runs cells that begin so, in wide letters too; an apostrophe in front makes them text.
  const textCell = (text) => (/^\s*[=+\-@\t\r＝＋－＠]/.test(text) ? "'" + text : text);

  // ------------------------------------------------------------------------------------------- the page

  const data = JSON.parse(document.getElementById("data").textContent);
  const sections = [...document.querySelectorAll(".query")];
  const queries = new Map();
  const links = [...document.querySelectorAll("nav a")];

  let byWords = segmenter !== null;
  let address = location.hash;

  // Keeps what is shown in the address. A page in a notebook's frame has no history that it may write.
  function remember(to, replaces) {
    if (to === address) return;
    address = to;
    try {
      history[replaces ? "replaceState" : "pushState"](null, "", to);
    } catch {
      // The page works without.
    }
  }

  // Of several queries one is on the screen; what it needs is made when it first is.
  function open(n, focus) {
    sections.forEach((section, other) => (section.hidden = other !== n));
    links.forEach((link, other) => {
      if (other === n) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
    const section = sections[n];
    if (!queries.has(n) && section.querySelector(".hits")) {
      const query = new Query(section, data[n]);
      queries.set(n, query);
      query.show();
      query.shade();
      query.paintCompletion();
      query.underline();
    }
    queries.get(n)?.sayRows();
    queries.get(n)?.mark();
    if (focus) section.querySelector("h2").focus({ preventScroll: true });
  }

  function restore() {
    const found = /^#q(\d+)(?:\.(t|p)(\d+)(?:-(\d+))?)?(?:\.h(\d+))?$/.exec(location.hash);
    const number = (n) => (found?.[n] === undefined ? undefined : Number(found[n]) - 1);
    const n = number(1) ?? 0;
    if (!sections[n] || (location.hash && !found)) return;
    address = location.hash;
    open(n, false);
    const place = number(3);
    const what = { hit: number(5) };
    if (found?.[2] === "p") what.part = place;
    else if (found?.[2]) Object.assign(what, { low: place, high: number(4) ?? place });
    queries.get(n)?.restore(what);
  }

  links.forEach((link, n) =>
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      open(n, true);
      remember(queries.get(n)?.address() ?? "#" + sections[n].id, false);
    }),
  );
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // a frame's addresses are those of the page around it
    document.getElementById("content").focus();
  });
  if (sections.length) open(0, false);
  restore();
  addEventListener("popstate", restore);
  addEventListener("hashchange", () => address !== location.hash && restore());

  // Words or tokens, cards or rows: for all queries.
  function press(name, value) {
    for (const button of document.querySelectorAll(`[data-${name}]`)) {
      button.setAttribute("aria-pressed", String(button.dataset[name] === value));
    }
  }
  for (const button of document.querySelectorAll("[data-by]")) {
    button.parentElement.hidden = segmenter === null;
    button.addEventListener("click", () => {
      byWords = button.dataset.by === "words";
      press("by", button.dataset.by);
      root.classList.toggle("words", byWords);
      for (const query of queries.values()) {
        query.shade();
        query.paintCompletion();
      }
    });
  }
  root.classList.toggle("words", byWords);
  for (const button of document.querySelectorAll("[data-as]")) {
    button.addEventListener("click", () => {
      root.classList.toggle("rows", button.dataset.as === "rows");
      press("as", button.dataset.as);
      for (const query of queries.values()) query.sayRows();
    });
  }

  const current = () => queries.get(sections.findIndex((section) => !section.hidden));
  addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLInputElement;
    if (event.key === "Escape" && !typing) current()?.clear();
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && current()) {
      event.preventDefault();
      current().section.querySelector(".search input").focus();
    }
  });

  // On paper all is open, and what the screen never showed has its shades too.
  let opened = [];
  addEventListener("beforeprint", () => {
    const query = current();
    for (const card of query?.shown ?? []) if (card.stale) query.paint(card);
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });

  const theme = document.querySelector(".theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  function sayTheme() {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  }
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    sayTheme();
  });
  system.addEventListener("change", sayTheme);
  sayTheme();
})();
