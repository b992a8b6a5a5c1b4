/* A table of any length: only the rows in sight are elements. Arrows, Page Up and Down, Home, End move; Enter opens. */
(() => {
  "use strict";
  const HEIGHT = 36; // of a row, in pixels; style.css has the same
  const SPARE = 6; // rows above and below those in sight
  let tables = 0;

  /* columns: [{key, label, hint, width, narrow: width on a phone, wide: not on a phone, cell: row -> text or node, number, sort}].
     Returns {element, show(rows, sort, selected), move(step), selected(), open()}. */
  saev.table = ({ label, columns, onsort, onselect, onopen }) => {
    const prefix = `table${tables++}`;
    const state = { rows: [], sort: "", place: -1 };
    const widths = (list) => list.map((c) => c.width).join(" ");
    const least = (list) => `${list.reduce((sum, c) => sum + Number(/[\d.]+/.exec(c.width)[0]), 1)}rem`;
    const narrow = columns.filter((c) => !c.wide).map((c) => ({ ...c, width: c.narrow ?? c.width }));
    const head = saev.el("div", { role: "row", class: "row head", "aria-rowindex": "1" });
    const space = saev.el("div", { class: "space", role: "rowgroup" });
    const body = saev.el("div", { class: "body", role: "presentation" }, space);
    const element = saev.el("div", { class: "table", role: "grid", tabindex: "0", "aria-label": label, onkeydown: press,
      style: `--widths:${widths(columns)};--narrow:${widths(narrow)};--least:${least(columns)};--least-narrow:${least(narrow)}` }, head, body);
    element.addEventListener("scroll", draw);
    new ResizeObserver(draw).observe(element);

    const cellClass = (c) => [c.number && "number", c.wide && "wide"].filter(Boolean).join(" ");

    function drawHead() {
      saev.refill(head, columns.map((c) => {
        const down = state.sort === `-${c.key}`;
        const active = down || state.sort === c.key;
        const order = active ? (down ? "descending" : "ascending") : "none";
        const text = [c.label, active && saev.el("span", { "aria-hidden": "true" }, down ? " ↓" : " ↑")];
        const content = c.sort && onsort
          ? saev.el("button", { type: "button", title: c.hint, onclick: () => onsort(next(c)) }, text) : saev.el("span", { title: c.hint }, text);
        return saev.el("div", { role: "columnheader", class: cellClass(c), "aria-sort": c.sort ? order : null }, content);
      }));
    }
    const next = (c) => (state.sort === `-${c.key}` ? c.key : state.sort === c.key || c.number ? `-${c.key}` : c.key);

    function draw() {
      const first = Math.max(0, Math.floor(element.scrollTop / HEIGHT) - SPARE);
      const last = Math.min(state.rows.length, first + Math.ceil(element.clientHeight / HEIGHT) + 2 * SPARE);
      const lines = [];
      for (let place = first; place < last; place++) lines.push(line(place));
      space.replaceChildren(...lines);
      if (state.place >= 0) element.setAttribute("aria-activedescendant", `${prefix}-${state.place}`);
      else element.removeAttribute("aria-activedescendant");
    }

    function line(place) {
      const row = state.rows[place];
      return saev.el("div", {
        role: "row", class: "row", id: `${prefix}-${place}`, "aria-rowindex": place + 2, "aria-selected": place === state.place ? "true" : "false",
        style: `top:${place * HEIGHT}px`, onclick: () => choose(place), ondblclick: open,
      }, columns.map((c) => saev.el("div", { role: "gridcell", class: cellClass(c) }, c.cell(row))));
    }

    function choose(place, tell = true) {
      if (!state.rows.length) return;
      state.place = Math.min(Math.max(place, 0), state.rows.length - 1);
      const [top, room] = [state.place * HEIGHT, element.clientHeight - HEIGHT];
      if (top < element.scrollTop) element.scrollTop = top;
      else if (top + HEIGHT > element.scrollTop + room) element.scrollTop = top + HEIGHT - room;
      draw();
      if (tell) onselect?.(state.rows[state.place]);
    }
    const open = () => state.place >= 0 && onopen?.(state.rows[state.place]);

    function press(event) {
      const page = Math.max(1, Math.floor(element.clientHeight / HEIGHT) - 2);
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
      if (event.target !== element) return;
      if (event.key === "Enter") open();
      else if (event.key in steps) choose(state.place + steps[event.key]);
      else return;
      event.preventDefault();
      event.stopPropagation();
    }

    return {
      element, open, move: (step) => choose(state.place + step),
      redraw: draw, selected: () => state.rows[state.place],
      show(rows, sort, selected) {
        const place = selected === undefined ? -1 : rows.indexOf(selected);
        const same = rows === state.rows && place === state.place && sort === state.sort;
        if (same) return;
        const moved = rows !== state.rows || place !== state.place;
        Object.assign(state, { rows, sort, place });
        element.setAttribute("aria-rowcount", rows.length + 1);
        space.style.height = `${rows.length * HEIGHT}px`;
        drawHead();
        draw();
        if (moved && place >= 0) requestAnimationFrame(() => choose(place, false));
      },
    };
  };

  /* Rows by `find` and `by` in the URL, or by `first` where it has no `by`. Raises an Error in words for a search that cannot be read. */
  saev.found = (fields, n, first) => {
    const { params } = saev.state;
    const by = params.get("by") ?? first;
    const rows = saev.filterRows(saev.parseSearch(params.get("find") ?? ""), fields, n);
    const field = fields[by.replace(/^-/, "")];
    return field?.number ? saev.sortRows(rows, by, field.number) : rows;
  };

  /* The row that comes by steps after a row in such a list, if any. */
  saev.beside = (rows, row, by) => {
    const place = rows.indexOf(row);
    return place < 0 ? rows[0] : rows[place + by];
  };

  /* A search field above a table, with `find`, `by` (sort) and `on` (selected row) in the URL.
     keys: what `on` holds for each row. Returns {bar, element, handlers}. */
  saev.searchTable = ({ label, noun, placeholder, columns, fields, keys, by: first, onopen }) => {
    const change = (changes) => {
      saev.setParams(changes);
      update();
    };
    const search = saev.searchField(label, placeholder, "find", update, () => table.element.focus());
    const found = saev.el("p", { class: "found", role: "status" });
    const table = saev.table({ label, columns, onopen, onsort: (by) => change({ by }), onselect: (row) => change({ on: keys[row] }) });
    let [about, rows] = [null, []];
    function update() {
      const { params } = saev.state;
      const by = params.get("by") ?? first;
      const now = JSON.stringify([params.get("find"), by]);
      if (now !== about) {
        about = now;
        let problem = "";
        try {
          rows = saev.found(fields, keys.length, first);
        } catch (error) {
          problem = error.message;
        }
        found.textContent = saev.visible(problem || `${rows.length.toLocaleString("en")} of ${saev.count(keys.length, noun)}`);
        found.classList.toggle("problem", Boolean(problem));
      }
      const selected = params.has("on") ? keys.findIndex((key) => String(key) === params.get("on")) : -1;
      table.show(rows, by, selected < 0 ? undefined : selected);
    }
    const handlers = { update, list: table.element, move: table.move, open: table.open, escape: () => change({ on: null }) };
    return { bar: saev.el("div", { class: "bar" }, search, found), element: table.element, handlers };
  };

  /* A search field whose text is the URL's parameter `name`. */
  saev.searchField = (label, placeholder, name, onchange, onenter) => {
    const field = saev.el("input", {
      type: "search", placeholder, "aria-label": `Search: ${label}`, value: saev.state.params.get(name) ?? "", spellcheck: "false", autocomplete: "off",
      oninput: () => {
        saev.setParams({ [name]: field.value });
        onchange();
      },
      onkeydown: (event) => {
        if (event.key !== "Enter" || !onenter) return;
        field.blur();
        onenter();
      },
    });
    return field;
  };
})();
