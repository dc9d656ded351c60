"use strict";
// Texts of data and models stand in the document as text already; the script moves them, and reads and writes
// `textContent` alone. The JSON in #data holds numbers, a list a query, as `view.View.script` writes it:
//   bounded, ends: [top, bottom], mean of the top scores, shares: whether parts are told as shares of it, sinks:
//   positions of attention sinks, owners: the target of each token or -1,
//   influence of each target, baselines, levels of byTarget, and hits in the order of their elements' data-hit:
//   row, index, side, score, rank, ..., targets [targets], tokens [tokens]: base64 of float32;
//   byTarget [targets, tokens]: see `shades.levels`.
(() => {
  const STEPS = 9;
  const STRONGEST = 5;
  const LINES = 5; // of a folded text, as in the style sheet
  const root = document.documentElement;
  root.classList.add("js");

  // ------------------------------------------------------------------------------------------ numbers

  const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const floatsOf = (text) => new Float32Array(bytesOf(text).buffer);

  // As `text.score_text` writes it.
  function scoreText(score, bounded) {
    const sign = score < 0 || Object.is(score, -0) ? "" : "+";
    if (bounded) return sign + (Object.is(score, -0) ? "-" : "") + score.toFixed(4);
    return sign + (Object.is(score, -0) ? "-" : "") + plain(score, 4);
  }

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

  // A folded text, opened at what matters in it, by default its end, and the button that shows all of it.
  function fold(text, strongest) {
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
      const token = folded ? strongest?.() : null;
      let top = folded && !strongest ? Infinity : 0;
      if (token) {
        const line = text.clientHeight / LINES; // whole lines, and the token in the middle one
        const down = token.getBoundingClientRect().top - text.getBoundingClientRect().top + text.scrollTop;
        top = Math.max(0, Math.round(down / line) - (LINES >> 1)) * line;
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
      this.cards = data.hits.map((hit, n) => this.card(hit, n));
      this.lists = [1, -1].map((side) => section.querySelector(`.hits[data-side="${side}"]`));
      this.pool = section.querySelector(".pool");
      this.movable = this.cards.filter((card) => card.targets); // by a selection
      this.near = new IntersectionObserver((seen) => this.approach(seen), { rootMargin: "400px 0px" });
      for (const card of this.cards) this.near.observe(card.element);
      this.tokens = [...section.querySelectorAll(".completion > span")];
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
      if (prompt) this.onceSeen(prompt, () => fold(prompt, null));
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
        spans: tokens ? [...tokens.children] : [],
        targets: hit.targets ? floatsOf(hit.targets) : null,
        whole: hit.tokens ? floatsOf(hit.tokens) : null,
        byTarget: hit.byTarget,
        near: false,
        stale: false, // its shades are those of another selection
        values: null, // of its tokens, as they are shaded
      };
      card.values = card.whole;
      card.void = card.spans.map((span) => !span.firstChild);
      card.quiet = card.spans.map((span) => (span.classList.contains("q") ? " q" : ""));
      tokens?.addEventListener("pointerover", (event) => {
        const span = event.target.closest(".tokens > span");
        if (span && card.values) span.title = this.partText(card, card.values[card.spans.indexOf(span)]);
      });
      return card;
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
      const range = (place) => {
        if (anchor === null) anchor = place;
        this.select(this.range(Math.min(anchor, place), Math.max(anchor, place)));
      };
      box.addEventListener("pointerdown", (event) => {
        const place = placeOf(event);
        if (place < 0 || event.button) return;
        if (event.pointerType === "mouse") event.preventDefault();
        focus(tokens[place]);
        if (event.shiftKey) return range(place);
        const only = this.selected && this.selected.low === place && this.selected.high === place;
        anchor = place;
        if (only) return this.clear();
        range(place);
        drawn = event.pointerType === "touch" ? null : event.pointerId;
      });
      box.addEventListener("pointerover", (event) => {
        const place = placeOf(event);
        if (drawn === event.pointerId && place >= 0 && event.buttons) range(place);
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
        if (event.shiftKey) range(tokens.indexOf(usable[next]));
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

    select(selected) {
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
      for (const card of this.cards) card.stale = true;
      this.shade(this.shown.filter((card) => card.near));
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
      let count = "";
      if (selected.part !== undefined) {
        words = this.section.querySelector(`[data-part="${selected.part}"]`).firstChild.textContent.trim();
      } else {
        const some = this.tokens.filter((_, place) => selected.targets.has(data.owners[place]));
        words = `“${named(some.map((token) => token.textContent).join(""))}”`;
        if (some.length > 1) count = ` (${some.length} tokens)`;
      }
      const influence = [...selected.targets].reduce((sum, n) => sum + (data.influence[n] ?? 0), 0);
      let share = scoreText(influence, data.bounded);
      if (data.mean && data.shares) {
        const percent = ((100 * influence) / data.mean).toFixed(1);
        share = `${percent}% of the score, ${share} of ${scoreText(data.mean, data.bounded)}`;
      }
      status.replaceChildren("Ranked for ", made("b", words), `${count}: ${share}`);
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
        if (this.words) none.textContent = "No matches.";
        else if (!this.selected) none.textContent = none.dataset.whole;
        else none.textContent = n ? "None here makes it less likely." : "None here makes it more likely.";
        for (const { card, score, rank } of list) this.label(card, score, rank, most);
      });
      this.rows = found;
      this.shown = found.flat().map(({ card }) => card);
      const of = lists[0].length + lists[1].length;
      const text = this.words ? `${this.shown.length} of ${of}` : "";
      const status = this.section.querySelector(".found");
      if (status.textContent !== text) status.textContent = text;
    }

    label(card, score, rank, most) {
      const { hit, kind, was } = card;
      const side = score < 0 ? "harmful" : "helpful";
      const { bounded } = this.data;
      card.rank.textContent = rank;
      card.score.textContent = scoreText(score ?? 0, bounded);
      setClass(card.score, `score ${side}`);
      kind.textContent = side;
      setClass(kind, `kind ${side}`);
      if (card.error) card.error.hidden = this.selected !== null;
      card.bar.setAttribute("class", side);
      card.bar.setAttribute("width", most > 0 ? (100 * Math.abs(score)) / most : 0);
      was.hidden = !this.selected || hit.score === undefined;
      if (!was.hidden) {
        const end = hit.side > 0 ? "helpful" : "harmful";
        const place = hit.rank ? `, rank ${hit.rank} of the most ${end}` : "";
        was.textContent = `For the whole generation ${scoreText(hit.score, bounded)}${place}`;
      }
    }

    // ------------------------------------------------------------------------------------- shades

    approach(seen) {
      const stale = [];
      for (const entry of seen) {
        const card = this.cards[Number(entry.target.dataset.hit)];
        card.near = entry.isIntersecting;
        if (!card.near) continue;
        if (card.stale) stale.push(card);
        if (card.text?.hasAttribute("data-fold") && !card.folded) {
          card.folded = true;
          fold(card.text, () => {
            const strongest = this.strongest(card);
            return (strongest.find(({ n }) => n > 0) ?? strongest[0])?.span ?? null;
          });
        }
      }
      this.shade(stale);
    }

    async shade(cards) {
      const { selected } = this;
      for (const card of cards) card.stale = false;
      const parted = (card) => selected && card.byTarget && typeof DecompressionStream === "function";
      const found = await Promise.all(cards.map((card) => (parted(card) ? this.bytesOf(card) : null)));
      if (this.selected !== selected) return; // another was chosen meanwhile
      cards.forEach((card, n) => {
        const values = found[n] ? this.summed(card, found[n], selected.targets) : card.whole;
        if (values) this.paint(card, values, selected && !found[n]);
      });
      for (const look of cards.map((card) => card.text?.toLook?.())) look?.();
    }

    paint(card, values, ofWhole) {
      card.values = values;
      const peak = peakOf(values, this.sinks);
      card.spans.forEach((span, n) => {
        const empty = card.void[n] ? " void" : "";
        setClass(span, (shadeOf(stepOf(values[n], peak)) + empty + card.quiet[n]).trim());
        if (span.title) span.removeAttribute("title");
      });
      this.sayStrongest(card, ofWhole);
    }

    async bytesOf(card) {
      card.inflated ??= inflated(card.byTarget);
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
      if (!card.values) return [];
      let order = card.spans.map((span, n) => ({ span, n, value: card.values[n] }));
      order = order.filter(({ n }) => !this.sinks.has(n));
      order.sort((a, b) => Math.abs(b.value) - Math.abs(a.value) || a.n - b.n);
      return order.slice(0, STRONGEST).filter(({ value }) => value);
    }

    sayStrongest(card, ofWhole) {
      const list = card.element.querySelector(".strongest ul");
      if (!list) return;
      const items = this.strongest(card).map(({ span, value }) => {
        const item = made("li");
        item.append(made("q", named(span.textContent)), ` ${this.partText(card, value)}`);
        return item;
      });
      list.replaceChildren(...items);
      list.previousElementSibling.textContent = ofWhole ? "Strongest tokens, for the whole generation" : "Strongest tokens";
    }

    // ------------------------------------------------------------------------------------- search

    textOf(card) {
      if (!card.text) return "";
      if (card.spans.length) return card.text.textContent;
      return [...card.text.children].map((part) => part.textContent).join("\n");
    }

    matches(card) {
      if (!this.words) return true;
      card.lower ??= this.textOf(card).toLowerCase();
      return card.lower.includes(this.words) || String(card.hit.index) === this.words.replace(/^#/, "");
    }

    search(words) {
      this.words = words.trim().toLowerCase();
      this.show();
      this.shade(this.shown.filter((card) => card.near && card.stale));
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
      const walker = document.createTreeWalker(card.text, NodeFilter.SHOW_TEXT);
      const nodes = [];
      let text = "";
      while (walker.nextNode()) {
        nodes.push({ node: walker.currentNode, start: text.length });
        text += walker.currentNode.data;
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

  // Of several queries one is on the screen; what it needs is made when it first is.
  function open(n, focus) {
    sections.forEach((section, other) => (section.hidden = other !== n));
    links.forEach((link, other) => {
      if (other === n) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
    const section = sections[n];
    if (!queries.has(n) && section.querySelector(".hits")) {
      queries.set(n, new Query(section, data[n]));
      queries.get(n).show();
    }
    queries.get(n)?.mark();
    if (focus) section.querySelector("h2").focus({ preventScroll: true });
  }

  links.forEach((link, n) =>
    link.addEventListener("click", (event) => {
      event.preventDefault();
      open(n, true);
    }),
  );
  if (sections.length) open(Math.max(0, sections.findIndex((section) => "#" + section.id === location.hash)), false);

  const current = () => queries.get(sections.findIndex((section) => !section.hidden));
  addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLInputElement;
    if (event.key === "Escape" && !typing) current()?.clear();
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && current()) {
      event.preventDefault();
      current().section.querySelector(".search input").focus();
    }
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
