/* The map: all latents by frequency and value, and the table of those that search and brush keep. */
(() => {
  "use strict";
  const MARGIN = { left: 56, right: 12, top: 10, bottom: 38 };
  const NEAR = 14; // a click within so many pixels of a point selects it
  const PREVIEWED = 6;

  /* Limits that hold all numbers, a little wider. */
  function limits(numbers) {
    let [low, high] = [Infinity, -Infinity];
    for (const x of numbers) if (Number.isFinite(x)) [low, high] = [Math.min(low, x), Math.max(high, x)];
    if (low > high) [low, high] = [-1, 1];
    const pad = 0.04 * (high - low) || 0.5;
    return [low - pad, high + pad];
  }

  function ticks([low, high]) {
    const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e3, 1e4, 1e5].find((s) => (high - low) / s <= 7) ?? (high - low) / 5;
    const first = Math.ceil(low / step);
    return Array.from({ length: Math.max(0, Math.floor(high / step) - first + 1) }, (_, i) => (first + i) * step);
  }

  /* The scatter plot. onpick(row), onopen(row), and onbrush(x, y) with ranges. By keyboard, arrows move a cross. */
  function scatter(onpick, onopen, onbrush) {
    const { n, columns } = saev.gallery;
    const canvas = saev.el("canvas", { class: "scatter", role: "application", tabindex: "0", "aria-roledescription": "scatter plot", onkeydown: press, onblur: leave, onfocus: () => draw() });
    const said = saev.el("p", { class: "hint", "aria-live": "off" });
    const X = Float64Array.from({ length: n }, (_, row) => saev.logFreq(row));
    const xLimits = limits(X);
    let [Y, yLimits, listed, chosen, box, drag] = [null, null, [], undefined, null, null];
    let [cross, corner] = [null, null]; // by keyboard: the pixel to act on, and where a region began
    let [width, height] = [0, 0];

    const toX = (x) => MARGIN.left + ((x - xLimits[0]) / (xLimits[1] - xLimits[0])) * (width - MARGIN.left - MARGIN.right);
    const toY = (y) => height - MARGIN.bottom - ((y - yLimits[0]) / (yLimits[1] - yLimits[0])) * (height - MARGIN.top - MARGIN.bottom);
    const fromX = (px) => xLimits[0] + ((px - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (xLimits[1] - xLimits[0]);
    const fromY = (py) => yLimits[0] + ((height - MARGIN.bottom - py) / (height - MARGIN.top - MARGIN.bottom)) * (yLimits[1] - yLimits[0]);
    const plotted = (row) => Number.isFinite(X[row]) && Number.isFinite(Y[row]);

    /* Points as pixels: the more on one pixel, the more opaque. */
    function points(context, ratio, rows, color, faint) {
      const [w, h] = [canvas.width, canvas.height];
      const counts = new Uint16Array(w * h);
      const side = Math.round((n < 400 ? 5 : n < 4000 ? 3 : 2) * ratio);
      for (const row of rows) {
        if (!plotted(row)) continue;
        const [px, py] = [Math.round(toX(X[row]) * ratio), Math.round(toY(Y[row]) * ratio)];
        for (let y = py; y < py + side; y++) for (let x = px; x < px + side; x++) if (x < w && y < h) counts[y * w + x]++;
      }
      const layer = new ImageData(w, h);
      const pixels = new Uint32Array(layer.data.buffer);
      const [r, g, b] = color;
      counts.forEach((count, i) => {
        if (count) pixels[i] = (Math.round(255 * (1 - faint ** count)) << 24) | (b << 16) | (g << 8) | r;
      });
      const sheet = new OffscreenCanvas(w, h);
      sheet.getContext("2d").putImageData(layer, 0, 0);
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.drawImage(sheet, 0, 0);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
    }

    function draw() {
      if (!canvas.isConnected || !Y) return;
      const ratio = devicePixelRatio || 1;
      [width, height] = [canvas.clientWidth, canvas.clientHeight];
      [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (width < 100) return;
      const style = getComputedStyle(document.documentElement);
      const color = (name) => style.getPropertyValue(name).trim();
      const rgb = (name) => color(name).split(" ").map(Number);
      const context = canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.font = `12px ${style.fontFamily || "sans-serif"}`;
      axes(context, color("--line"), color("--soft"));
      if (listed.length < n) points(context, ratio, X.keys(), rgb("--point-off"), 0.7);
      points(context, ratio, listed, rgb("--point"), 0.55);
      if (chosen !== undefined && plotted(chosen)) ring(context, color("--text"), color("--page"));
      if (box) {
        context.strokeStyle = context.fillStyle = color("--accent");
        const area = [box[0], box[1], box[2] - box[0], box[3] - box[1]];
        context.globalAlpha = 0.12;
        context.fillRect(...area);
        context.globalAlpha = 1;
        context.strokeRect(...area);
      }
      if (cross && document.activeElement === canvas) {
        context.strokeStyle = color("--accent");
        for (const [x, y] of [[10, 0], [0, 10]]) {
          context.beginPath();
          context.moveTo(cross[0] - x, cross[1] - y);
          context.lineTo(cross[0] + x, cross[1] + y);
          context.stroke();
        }
      }
    }

    function ring(context, ink, paper) {
      for (const [color, line] of [[paper, 5], [ink, 2]]) {
        context.strokeStyle = color;
        context.lineWidth = line;
        context.beginPath();
        context.arc(toX(X[chosen]) + 1, toY(Y[chosen]) + 1, 6, 0, 2 * Math.PI);
        context.stroke();
      }
      context.lineWidth = 1;
    }

    function axes(context, line, text) {
      context.textAlign = "center";
      for (const x of ticks(xLimits)) {
        context.fillStyle = line;
        context.fillRect(toX(x), MARGIN.top, 1, height - MARGIN.top - MARGIN.bottom);
        context.fillStyle = text;
        context.fillText(Number(x.toFixed(2)), toX(x), height - MARGIN.bottom + 15);
      }
      context.textAlign = "right";
      for (const y of ticks(yLimits)) context.fillText(Number(y.toFixed(2)), MARGIN.left - 6, toY(y) + 4);
      context.fillStyle = line;
      for (const y of ticks(yLimits)) context.fillRect(MARGIN.left, toY(y), width - MARGIN.left - MARGIN.right, 1);
      const { xName, yName } = names();
      context.fillStyle = text;
      context.textAlign = "center";
      context.fillText(xName, (MARGIN.left + width - MARGIN.right) / 2, height - 4);
      context.save();
      context.translate(11, (MARGIN.top + height - MARGIN.bottom) / 2);
      context.rotate(-Math.PI / 2);
      context.fillText(yName, 0, 0);
      context.restore();
    }

    const names = () => {
      const value = saev.state.params.get("value") === "mean" ? "mean value" : "maximum";
      return { xName: "log₁₀ of the fraction of patches it fires on", yName: saev.gallery.scorer.signed ? value : `log₁₀ of its ${value}` };
    };

    function nearest(px, py) {
      let [best, distance] = [undefined, NEAR * NEAR];
      for (const row of listed) {
        if (!plotted(row)) continue;
        const d = (toX(X[row]) - px) ** 2 + (toY(Y[row]) - py) ** 2;
        if (d < distance) [best, distance] = [row, d];
      }
      return best;
    }

    const about = (row) => (row === undefined ? hint()
      : `${saev.capital(saev.noun)} ${columns.id[row]}: ${saev.percent(columns.freq[row])} of patches, maximum ${saev.number(columns.max[row])}`);
    const between = ([x, y], [x1, y1]) => [Math.min(x, x1), Math.min(y, y1), Math.max(x, x1), Math.max(y, y1)];
    const brush = () => onbrush([fromX(box[0]), fromX(box[2])], [fromY(box[3]), fromY(box[1])]);
    const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

    function boxOf(params) {
      if (!params.get("x") && !params.get("y")) return null;
      const [[x0, x1], [y0, y1]] = [saev.range(params.get("x")), saev.range(params.get("y"))];
      const [x, y] = [(v) => toX(clamp(v, ...xLimits)), (v) => toY(clamp(v, ...yLimits))];
      return [x(x0), y(y1), x(x1), y(y0)];
    }

    function leave() {
      if (corner) box = boxOf(saev.state.params);
      corner = null;
      said.setAttribute("aria-live", "off");
      draw();
    }

    function press(event) {
      const step = event.shiftKey ? 40 : 8;
      const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
      if (!move && event.key !== " " && event.key !== "Enter" && !(event.key === "Escape" && corner)) return;
      event.preventDefault();
      event.stopPropagation();
      cross ??= chosen !== undefined && plotted(chosen) ? [toX(X[chosen]), toY(Y[chosen])] : [width / 2, height / 2];
      if (move) cross = [clamp(cross[0] + move[0], MARGIN.left, width - MARGIN.right), clamp(cross[1] + move[1], MARGIN.top, height - MARGIN.bottom)];
      const row = nearest(...cross);
      said.setAttribute("aria-live", "polite");
      said.textContent = about(row);
      if (event.key === "Escape") return leave();
      if (event.key === " " && !corner) corner = cross;
      else if (event.key === " " || (event.key === "Enter" && corner)) {
        corner = null;
        if (box && box[2] > box[0] && box[3] > box[1]) return brush();
      } else if (event.key === "Enter" && row !== undefined) return row === chosen ? onopen(row) : onpick(row);
      if (corner) box = between(corner, cross);
      draw();
    }

    const at = (event) => [event.offsetX, event.offsetY];
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button === 0) drag = { from: at(event), moved: false, brush: event.pointerType !== "touch" };
      if (drag?.brush) canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = at(event);
      if (drag?.brush && Math.hypot(x - drag.from[0], y - drag.from[1]) > 4) drag.moved = true;
      if (drag?.moved) {
        box = between(drag.from, [x, y]);
        draw();
        return;
      }
      const row = nearest(x, y);
      canvas.style.cursor = row === undefined ? "crosshair" : "pointer";
      said.textContent = about(row);
    });
    canvas.addEventListener("pointerup", (event) => {
      const was = drag;
      drag = null;
      if (!was) return;
      if (!was.moved) onpick(nearest(...at(event)));
      else brush();
    });
    canvas.addEventListener("pointercancel", () => { drag = null; });
    new ResizeObserver(draw).observe(canvas);

    let unseen = 0;
    const hint = () => `Drag to choose a region, click a point to select it; ? lists the keys.${unseen ? ` ${saev.count(unseen, saev.noun)} that never fired ${unseen === 1 ? "is" : "are"} not in the plot.` : ""}`;

    return {
      canvas, said, draw,
      show(params, rows, row) {
        const valueOf = saev.axis(params);
        Y = Float64Array.from({ length: n }, (_, i) => valueOf(i));
        yLimits = limits(Y);
        unseen = columns.freq.reduce((count, f) => count + (f > 0 ? 0 : 1), 0);
        [listed, chosen] = [rows, row];
        [width, height] = [canvas.clientWidth, canvas.clientHeight];
        box = boxOf(params);
        said.textContent = hint();
        canvas.setAttribute("aria-label", `Scatter plot of ${saev.count(rows.length, saev.noun)}: ${names().xName}, against ${names().yName}. The table lists them. Arrow keys move a cross, Enter selects the nearest point, the space bar begins and ends a region.`);
        draw();
      },
    };
  }

  function columnsOfTable() {
    const { columns } = saev.gallery;
    const traits = saev.traits.columns;
    const trait = (row) => saev.traits.traits[traits.trait[saev.traitPlace(row)]];
    const number = (key, label, hint, format = saev.number, wide = false) => {
      const column = columns[key === "images" ? "n_images" : key];
      const cell = saev.aligned(column, format);
      return { key, label, hint, number: true, wide, sort: true, width: key === "freq" ? "minmax(6.8rem,1.2fr)" : "minmax(4.8rem,1fr)", cell: (row) => cell(column[row]) };
    };
    return [
      { key: "star", label: "", width: "2.2rem", cell: (row) => saev.starButton(columns.id[row], true) },
      { key: "id", label: saev.capital(saev.noun), hint: "its number", number: true, sort: true, width: "minmax(5.2rem,1fr)",
        cell: (row) => saev.el("a", { href: saev.href("latent", columns.id[row]), tabindex: "-1" }, columns.id[row]) },
      number("freq", "Freq.", "fraction of patches that it fires on", saev.percent),
      number("mean", saev.gallery.scorer.signed ? "Mean |v|" : "Mean", `${saev.meanWords()} where it fires`, saev.number, true),
      number("max", "Max", "largest value"),
      number("images", "Images", "number of images that it fires on", saev.number, true),
      ...(traits.trait ? [
        { key: "ap", label: "AP", hint: "average precision for this trait, on the train images", number: true, sort: true, width: "minmax(4.6rem,.8fr)", cell: (row) => saev.fixed(traits.ap[saev.traitPlace(row)]) },
        { key: "trait", label: "Trait", hint: `the trait that it detects best, or the one that was searched. ${saev.tookPart()}`.trim(), width: "minmax(9rem,2.6fr)",
          cell: (row) => (trait(row) ? saev.traitName(trait(row).name) : "–") },
      ] : []),
    ];
  }

  function preview(row) {
    const { columns } = saev.gallery;
    const id = columns.id[row];
    return saev.el("section", { class: "preview", "aria-label": `${saev.noun} ${id}` },
      saev.el("h2", null, saev.el("a", { href: saev.href("latent", id) }, `${saev.capital(saev.noun)} ${id}`), saev.starButton(id)),
      saev.later(saev.latentAt(row), (latent) => {
        const top = latent.groups.find((group) => group.name === "top");
        if (!top || top.image.length === 0) return saev.el("p", null, "It fires on none of the images.");
        return saev.figures(top, { id, most: PREVIEWED });
      }));
  }

  saev.views.map = (main) => {
    const { columns, rowOf } = saev.gallery;
    const search = saev.searchField(`${saev.noun}s`, "trait:wing ap>.6 freq<.01", "q", () => update(), () => table.element.focus());
    const found = saev.el("p", { class: "found", role: "status" });
    const chart = scatter((row) => select(row), (row) => open(row), (x, y) => change({ x: text(x), y: text(y) }));
    const table = saev.table({
      label: `Table of ${saev.noun}s`, columns: columnsOfTable(), onsort: (sort) => change({ sort: sort === saev.SORT ? null : sort }),
      onselect: (row) => select(row), onopen: (row) => open(row),
    });
    const open = (row) => saev.go("latent", columns.id[row]);
    const shown = saev.el("div", { class: "shown" });
    const value = saev.el("select", { onchange: () => change({ value: value.value === "max" ? null : value.value, y: null }) },
      saev.el("option", { value: "max" }, "maximum"), saev.el("option", { value: "mean" }, saev.meanWords()));
    const ends = Object.fromEntries(["x0", "x1", "y0", "y1"].map((name) => [name, saev.el("input", {
      type: "number", step: "any", "aria-label": `log10 ${name[0] === "x" ? "frequency" : "value"}, ${name[1] === "0" ? "from" : "to"}`,
      onchange: () => change({ x: join("x"), y: join("y") }),
    })]));
    const clear = saev.el("button", { type: "button", onclick: () => {
      table.element.focus(); // this button goes
      change({ x: null, y: null, q: null });
    } }, "Show all");
    const text = (range) => range.map((v) => Number(v.toFixed(3))).join(",");
    const join = (axis) => {
      const pair = [ends[`${axis}0`].value, ends[`${axis}1`].value];
      return pair.some(Boolean) ? pair.join(",") : null;
    };

    main.append(
      saev.el("div", { class: "bar" }, search, found, clear),
      saev.el("div", { class: "columns" },
        saev.el("div", { class: "left" }, chart.canvas, chart.said,
          saev.el("div", { class: "controls" }, saev.el("label", null, "Vertical", value),
            saev.el("span", { class: "ends" }, "Frequency from", ends.x0, "to", ends.x1), saev.el("span", { class: "ends" }, "value from", ends.y0, "to", ends.y1)),
          shown),
        table.element));

    function change(changes) {
      saev.setParams(changes);
      update();
    }
    function select(row) {
      saev.setParams({ at: row === undefined ? null : columns.id[row] });
      update();
    }

    let rows = [];
    let previewed;
    let timer;
    function update() {
      const { params } = saev.state;
      if (document.activeElement !== search) search.value = params.get("q") ?? "";
      value.value = params.get("value") === "mean" ? "mean" : "max";
      for (const axis of ["x", "y"])
        (params.get(axis) ?? ",").split(",").forEach((part, i) => { ends[`${axis}${i}`].value = part; });
      let problem = "";
      try {
        rows = saev.list(params);
      } catch (error) {
        problem = error.message;
      }
      found.classList.toggle("problem", Boolean(problem));
      found.textContent = saev.visible(problem || `${rows.length.toLocaleString("en")} of ${saev.count(saev.gallery.n, saev.noun)}`);
      clear.hidden = !["q", "x", "y"].some((name) => params.has(name));
      const row = params.has("at") ? rowOf.get(Number(params.get("at"))) : undefined;
      table.show(rows, params.get("sort") ?? saev.SORT, row);
      chart.show(params, rows, row);
      if (row === previewed) return;
      previewed = row;
      clearTimeout(timer);
      timer = setTimeout(() => shown.replaceChildren(...(row === undefined ? [] : [preview(row)])), 60);
    }
    update();
    return {
      update, list: table.element, repaint: chart.draw, move: table.move, open: table.open, leave: () => clearTimeout(timer),
      marks: () => { update(); table.redraw(); },
      star: () => {
        const row = table.selected();
        if (row !== undefined) saev.stars.toggle(columns.id[row]);
      },
      escape: () => (saev.state.params.has("x") || saev.state.params.has("y") ? change({ x: null, y: null }) : select(undefined)),
    };
  };
})();
