"use strict";
(() => {
  const { sites, rows, first } = JSON.parse(document.getElementById("data").textContent);
  const all = (query, within = document) => [...within.querySelectorAll(query)];
  const byId = (id) => document.getElementById(id);
  const at = new Map(sites.map((site, i) => [site.id, i]));
  const cellOf = new Map(sites.map((site, i) => [`${site.row}/${site.tensor}`, i]));
  const tip = byId("tip");
  let current = null;

  /* Choosing a site marks it, and its layer, wherever it is shown. */
  const marked = new Map();
  for (const element of all("[data-s]")) {
    const i = Number(element.dataset.s);
    marked.set(i, [...(marked.get(i) ?? []), element]);
  }
  const columns = new Map();
  for (const hit of all(".hit")) {
    const row = Number(hit.dataset.r);
    columns.set(row, [...(columns.get(row) ?? []), hit]);
  }

  function choose(i, { reveal = false } = {}) {
    if (!sites[i]) return;
    for (const element of all(".on, .cur")) element.classList.remove("on", "cur");
    const { row } = sites[i];
    sites.forEach((site, j) => {
      if (j === i || (row !== null && site.row === row)) {
        for (const element of marked.get(j) ?? []) element.classList.add(j === i ? "cur" : "on");
      }
    });
    for (const hit of columns.get(row) ?? []) hit.classList.add("on");
    for (const cell of all(".map a")) cell.tabIndex = -1;
    for (const element of marked.get(i) ?? []) if (element.closest(".map")) element.tabIndex = 0;
    current = i;
    describe(sites[i]);
    if (reveal) {
      history.replaceState(null, "", `#${encodeURI(sites[i].id)}`);
    }
  }

  function describe(site) {
    const panel = byId("panel");
    const title = panel.querySelector("h2");
    title.textContent = site.id;
    title.className = site.verdict;
    panel.querySelector("h2 + p").textContent = site.words;
    panel.querySelector("dl").replaceChildren(...site.facts.flatMap(([name, value]) => {
      const [dt, dd] = ["dt", "dd"].map((tag) => document.createElement(tag));
      dt.textContent = name;
      dd.textContent = value;
      return [dt, dd];
    }));
  }

  /* Hovering */
  function show(text, event) {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - width - 8);
    const top = event.clientY + height + 26 > innerHeight ? event.clientY - height - 12 : event.clientY + 16;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }
  const inShort = (site) => [
    site.id,
    ...site.facts.filter(([name]) => ["introduced", "cumulative", "limit", "NaN or Inf"].includes(name))
      .map(([name, value]) => `${name}: ${value}`),
  ].join("\n");
  const siteUnder = (element) => {
    const hit = element.closest(".hit");
    if (hit) return cellOf.get(`${hit.dataset.r}/${hit.closest("svg").dataset.tensor}`);
    const own = element.closest("[data-s]");
    return own ? Number(own.dataset.s) : undefined;
  };
  function hovered(event) {
    const hit = event.target.closest(".hit");
    const i = siteUnder(event.target);
    if (i === undefined) return hit ? `${rows[hit.dataset.r]}: not compared` : "";
    const site = sites[i];
    const kind = hit?.closest("svg").dataset.kind;
    if (kind === "range") {
      const ranges = site.facts.filter(([name]) => name.startsWith("range"));
      return [site.id, ...ranges.map(([name, value]) => `${name.slice(7)}: ${value}`)].join("\n");
    }
    if (kind === "head" || kind === "token") return cellUnder(site, kind, hit, event);
    return event.target.closest("#table") ? "" : inShort(site);
  }
  function cellUnder(site, kind, hit, event) {
    const values = site[kind];
    const bins = Number(hit.closest("svg").dataset.bins);
    const box = hit.getBoundingClientRect();
    const bin = Math.min(bins - 1, Math.floor(((event.clientY - box.top) / box.height) * bins));
    if (!(bin >= 0 && bin < values.length)) return site.id;
    return `${site.id}\n${kind} ${binned(site, kind, bin)}: ${values[bin] === null ? "none" : short(values[bin])}`;
  }
  function binned(site, kind, bin) {
    const size = site.sizes[kind];
    const [from, to] = [bin, bin + 1].map((n) => Math.floor((n * size) / site[kind].length));
    return to - from > 1 ? `${from} to ${to - 1}` : `${from}`;
  }
  const short = (value) => (typeof value === "number" ? value.toExponential(1).replace("+", "") : value);
  document.addEventListener("pointermove", (event) => {
    const text = event.target instanceof Element ? hovered(event) : "";
    if (text) show(text, event);
    else tip.hidden = true;
  });
  document.addEventListener("pointerleave", () => { tip.hidden = true; });

  /* Clicking */
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    const i = link ? named(link.getAttribute("href").slice(1)) : siteUnder(event.target);
    if (i === undefined) return;
    if (link) event.preventDefault();
    choose(i, { reveal: true });
  });
  addEventListener("hashchange", fromAddress);
  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }
  /* The site of that name, or the first of the layer of that name. */
  function named(text) {
    const name = at.has(text) ? text : decoded(text);
    if (!name) return undefined;
    if (at.has(name)) return at.get(name);
    const i = sites.findIndex((site) => site.id.startsWith(`${name}.`));
    return i >= 0 ? i : undefined;
  }
  function fromAddress() {
    const i = named(location.hash.slice(1));
    if (i !== undefined) choose(i);
    return i !== undefined;
  }

  /* The table: sorted by any column, filtered by name, tensor and verdict. */
  const body = document.querySelector("#table tbody");
  const lines = body ? [...body.rows] : [];
  const rank = (value) => (typeof value === "number" ? value : value === null ? -Infinity : Infinity);
  function sort(button) {
    const head = button.closest("th");
    const column = Number(button.dataset.c);
    const down = head.getAttribute("aria-sort") !== "descending" && column >= 0;
    for (const th of all("#table thead th")) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (line) => (column < 0 ? 0 : rank(sites[line.dataset.s].values[column]));
    const order = [...lines].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return x === y ? 0 : (x < y ? -1 : 1) * (down ? -1 : 1);
    });
    body.append(...order);
  }
  function filter() {
    const [name, tensor, state] = ["filter", "tensor", "state"].map((id) => byId(id).value.trim());
    const pattern = new RegExp(
      name.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*"), "i");
    let shown = 0;
    for (const line of lines) {
      const site = sites[line.dataset.s];
      line.hidden = !(pattern.test(site.id) && (!tensor || site.tensor === tensor)
        && (!state || line.classList.contains(state)));
      shown += line.hidden ? 0 : 1;
    }
    byId("count").textContent = `${shown} of ${lines.length}`;
  }
  for (const button of all("#table thead button")) button.addEventListener("click", () => sort(button));
  for (const field of all(".filter input, .filter select")) field.addEventListener("input", filter);
  document.querySelector(".filter")?.addEventListener("submit", (event) => event.preventDefault());

  /* The keyboard */
  function neighbour(step) {
    const { row, tensor } = sites[current];
    return row === null ? undefined : cellOf.get(`${row + step}/${tensor}`);
  }
  function failing(step) {
    for (let n = 1; n <= sites.length; n += 1) {
      const i = (current + step * n + sites.length * 2) % sites.length;
      if (sites[i].verdict !== "pass") return i;
    }
    return undefined;
  }
  function otherTensor(step) {
    const own = sites[current].row;
    const i = current + step;
    return own !== null && sites[i]?.row === own ? i : undefined;
  }
  const moves = {
    ArrowLeft: () => neighbour(-1),
    ArrowRight: () => neighbour(1),
    n: () => failing(1),
    p: () => failing(-1),
  };
  for (const button of all("[data-step]")) {
    button.addEventListener("click", () => choose(failing(Number(button.dataset.step)), { reveal: true }));
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    const inMap = event.target.closest(".map");
    const move = { ...moves, ...(inMap && { ArrowUp: () => otherTensor(-1), ArrowDown: () => otherTensor(1) }) };
    if (event.key === "/" && byId("filter")) byId("filter").focus();
    else if (event.key === "t") theme();
    else if (event.key in move && current !== null) {
      const i = move[event.key]();
      if (i !== undefined) choose(i, { reveal: true });
      if (inMap) document.querySelector(".map .cur")?.focus();
    } else return;
    event.preventDefault();
  });

  /* Light and dark: the reader's system, until the reader says otherwise. */
  function theme() {
    const root = document.documentElement;
    const dark = getComputedStyle(root).colorScheme === "dark"
      || (root.style.colorScheme === "" && matchMedia("(prefers-color-scheme: dark)").matches);
    root.style.colorScheme = dark ? "light" : "dark";
  }
  byId("theme").addEventListener("click", theme);

  if (matchMedia("(max-width: 1000px)").matches) byId("panel")?.querySelector("details").removeAttribute("open");
  if (sites.length && !fromAddress()) choose(at.get(first) ?? 0);
})();
