/* One image: which latents fire where. Choose a patch to see its latents, and a latent to see its heat. */
(() => {
  "use strict";
  const FOUND = 48; // images that a search lists
  const LISTED = 60; // latents that a list shows
  const COMMAND = "uv run visuals.py … --image-view 500";

  /* For each row that fires: its largest value and that value's share of the latent's maximum, largest share first. */
  function strongest(codes) {
    const best = new Map();
    codes.row.forEach((row, i) => { if (!(best.get(row) >= codes.value[i])) best.set(row, codes.value[i]); });
    return Array.from(best, ([row, value]) => ({ row, value, share: share(row, value) })).sort((a, b) => b.share - a.share);
  }
  const share = (row, value) => value / saev.gallery.columns.max[row];

  function inPatch(codes, patch) {
    const out = [];
    for (let i = codes.start[patch]; i < codes.start[patch + 1]; i++)
      out.push({ row: codes.row[i], value: codes.value[i], share: share(codes.row[i], codes.value[i]) });
    return out;
  }

  function valuesOf(codes, row) {
    const values = new Float32Array(codes.start.length - 1).fill(-Infinity);
    for (let p = 0; p + 1 < codes.start.length; p++)
      for (let i = codes.start[p]; i < codes.start[p + 1]; i++) if (codes.row[i] === row) values[p] = codes.value[i];
    return values;
  }

  const unpack = (codes) => ({ start: saev.unpack(codes.start), row: saev.unpack(codes.row), value: saev.unpack(codes.value) });

  function picker(main, paths) {
    const { classes } = saev.gallery;
    const search = saev.searchField("images", "part of a path or class", "find", () => list());
    const found = saev.el("p", { class: "found", role: "status" });
    const place = saev.el("div", { class: "pictures" });
    const lower = paths.path.map((path, i) => `${path} ${classes[paths.class[i]] ?? ""}`.toLowerCase());
    const inView = paths.code.some((code) => code >= 0);

    function list() {
      const words = (saev.state.params.get("find") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
      const places = [];
      let count = 0;
      for (let i = 0; i < lower.length; i++) {
        if ((inView && paths.code[i] < 0) || !words.every((word) => lower[i].includes(word))) continue;
        if (count++ < FOUND) places.push(i);
      }
      found.textContent = `${saev.count(count, "image")}${count > FOUND ? `, the first ${FOUND} are shown` : ""}`;
      place.replaceChildren(...places.map((i) => saev.figure(i, null, { caption: `Image ${paths.n[i]}` })));
    }
    main.append(saev.el("div", { class: "bar" }, search, found), !inView && saev.absent(`This gallery has no image view: which ${saev.noun}s fire on a patch is not in it. This writes it:`, COMMAND) || "", place);
    list();
    return list;
  }

  /* The picture whose patches can be chosen by pointer and arrow keys. */
  function board(place, grid, onpatch) {
    const [rows, columns] = grid;
    const picture = saev.picture(place, null);
    const cursor = saev.el("span", { class: "cursor" });
    cursor.hidden = true;
    picture.frame.append(cursor);
    const element = saev.el("div", { class: "board", tabindex: "0", role: "application", "aria-roledescription": "picture in patches",
      "aria-label": `Picture in ${rows} rows and ${columns} columns of patches. Arrow keys choose a patch, Escape none.` }, picture.frame);
    let chosen = null;
    element.addEventListener("click", (event) => {
      const box = picture.frame.getBoundingClientRect();
      const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      const patch = Math.min(Math.floor(y * rows), rows - 1) * columns + Math.min(Math.floor(x * columns), columns - 1);
      if (x >= 0 && y >= 0 && x < 1 && y < 1) onpatch(patch === chosen ? null : patch);
    });
    element.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!steps) return;
      event.preventDefault();
      event.stopPropagation();
      const [y, x] = chosen === null ? [0, 0] : [Math.floor(chosen / columns) + steps[0], (chosen % columns) + steps[1]];
      if (y >= 0 && y < rows && x >= 0 && x < columns) onpatch(y * columns + x);
    });
    const choose = (patch) => {
      chosen = patch;
      cursor.hidden = patch === null;
      if (patch !== null) cursor.style.cssText = saev.patchBox(patch, grid);
    };
    return { ...picture, element, choose };
  }

  function explorer(place, grid, codes) {
    const { columns, rowOf } = saev.gallery;
    const controls = saev.el("div");
    const heading = saev.el("h3", { role: "status" });
    const hint = saev.el("p", { class: "hint" });
    const items = saev.el("ol", { class: "firing" });
    const picture = board(place, grid, (patch) => { saev.setParams({ patch }); update(); });
    const all = strongest(codes);

    const chosenRow = () => (saev.state.params.has("latent") ? rowOf.get(Number(saev.state.params.get("latent"))) : undefined);
    const chosenPatch = () => {
      const patch = Number(saev.state.params.get("patch") ?? NaN);
      return Number.isInteger(patch) && patch >= 0 && patch < grid[0] * grid[1] ? patch : null;
    };

    async function paint(row) {
      const latent = await saev.latentAt(row);
      if (row !== chosenRow()) return;
      const heat = valuesOf(codes, row).map((v) => Math.max(0, (v - latent.low) / (latent.high - latent.low)));
      picture.setHeat(heat, `${saev.noun} ${columns.id[row]}`);
      controls.replaceChildren(saev.heatControls(latent.low, latent.high));
    }

    const item = (entry, row) => {
      const id = columns.id[entry.row];
      return saev.el("li", null, saev.el("button", { type: "button", "aria-pressed": entry.row === row ? "true" : "false",
        onclick: () => { saev.setParams({ latent: entry.row === row ? null : id }); update(); } },
      saev.el("span", null, id), saev.el("span", { class: "number" }, saev.number(entry.value)),
      saev.el("span", { class: "number" }, saev.percent(Number(entry.share.toFixed(3)))), saev.el("span", { class: "share", style: `width:${100 * Math.min(Math.max(entry.share, 0), 1)}%` })),
      saev.el("a", { href: saev.href("latent", id), "aria-label": `Open ${saev.noun} ${id}` }, "open"));
    };

    function update() {
      const [row, patch] = [chosenRow(), chosenPatch()];
      const entries = patch === null ? all : inPatch(codes, patch);
      const where = patch === null ? "this image" : saev.patchWords(patch, grid);
      heading.textContent = `${saev.count(entries.length, saev.noun)} on ${where}`;
      hint.textContent = `value, and its share of the ${saev.noun}'s maximum${entries.length > LISTED ? `; the first ${LISTED}` : ""}`;
      const focused = items.contains(document.activeElement) ? [...items.children].findIndex((li) => li.contains(document.activeElement)) : -1;
      items.replaceChildren(...entries.slice(0, LISTED).map((entry) => item(entry, row)));
      items.children[focused]?.firstChild.focus();
      picture.choose(patch);
      if (row === undefined) {
        picture.setHeat(null, "");
        controls.replaceChildren(saev.el("p", { class: "hint" }, `Click a patch, or move with the arrow keys, to see its ${saev.noun}s; choose one to see where it fires.`));
      } else paint(row).catch((error) => controls.replaceChildren(saev.problem(error)));
    }
    update();
    const element = saev.el("div", { class: "columns" }, saev.el("div", { class: "left" }, picture.element, controls),
      saev.el("div", { class: "right" }, heading, hint, items));
    return { element, update };
  }

  /* A picture outside the image view, with the heat of the latent in the URL if that latent's page shows the image. */
  async function outside(place) {
    const { columns, rowOf } = saev.gallery;
    const picture = saev.picture(place, null);
    const row = saev.state.params.has("latent") ? rowOf.get(Number(saev.state.params.get("latent"))) : undefined;
    const latent = row === undefined ? null : await saev.latentAt(row);
    const group = latent?.groups.map(saev.unpackGroup).find(({ image }) => image.includes(place));
    if (!group) return [saev.el("div", { class: "board" }, picture.frame)];
    const id = columns.id[row];
    picture.setHeat(saev.heatOf(group, group.image.indexOf(place)), `${saev.noun} ${id}`);
    return [saev.el("div", { class: "board" }, picture.frame), saev.heatControls(latent.low, latent.high),
      saev.el("p", null, "Heat of ", saev.el("a", { href: saev.href("latent", id) }, `${saev.noun} ${id}`), ".")];
  }

  function heading(image) {
    return saev.el("div", { class: "heading" }, saev.el("a", { href: saev.href("image") }, "Images"), saev.el("h2", null, `Image ${image.n}`),
      saev.el("p", null, saev.name(image.path), image.class >= 0 && [" · ", saev.name(saev.gallery.classes[image.class])]));
  }

  saev.views.image = (main, { argument }) => {
    const handlers = { escape: () => (argument ? leaveStep() : undefined) };
    const leaveStep = () => {
      if (!saev.state.params.has("patch")) return saev.go("image");
      saev.setParams({ patch: null });
      return handlers.update();
    };
    saev.paths().then(async (paths) => {
      if (saev.state.view !== "image" || saev.state.argument !== argument) return;
      if (argument === "") {
        handlers.update = picker(main, paths);
        return;
      }
      const place = paths.placeOf.get(Number(argument));
      if (place === undefined) throw new Error(`Image ${argument} is not in this gallery: it holds ${saev.count(paths.n.length, "image")}.`);
      const image = await saev.imageAt(place);
      saev.title(`Image ${image.n}`);
      const code = paths.code[place];
      const codes = code < 0 ? null : unpack(await saev.codesAt(code));
      const alone = codes ? [] : await outside(place);
      if (saev.state.view !== "image" || saev.state.argument !== argument) return;
      main.append(heading(image));
      if (codes) {
        const view = explorer(place, saev.gridOf(image), codes);
        main.append(view.element);
        handlers.update = view.update;
        saev.applyHeat();
      } else {
        main.append(...alone, saev.absent(`Which ${saev.noun}s fire on each patch of this image is not in the gallery. This takes more images into the image view:`, COMMAND));
      }
    }).catch((error) => main.append(saev.problem(error)));
    return handlers;
  };
})();
