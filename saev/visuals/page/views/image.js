/* One image: which latents fire where. Choose a patch to see its latents, and a latent to see its heat. */
(() => {
  "use strict";
  const FOUND = 48; // images that a search lists
  const LISTED = 60; // latents that a list shows

  /* What writes more images into the image view: twice as many as it has, but at least 500, and at most all. */
  const command = () => {
    const { source, files } = saev.gallery;
    return `uv run visuals.py … --image-view ${Math.min(Math.max(500, 2 * files.n_codes), source.n_images)}`;
  };

  const code = (codes, i) => ({ row: codes.row[i], value: codes.value[i], rank: codes.rank[i] / 65535 });

  /* For each row that fires: its largest value. The values that are largest among the latent's own come first, because a share of
     the maximum means nothing for scores that may be negative, and is small where one value is far above all others. */
  function strongest(codes) {
    const best = new Map(); // row -> place of its largest value
    codes.row.forEach((row, i) => { if (!(codes.value[best.get(row)] >= codes.value[i])) best.set(row, i); });
    return Array.from(best.values(), (i) => code(codes, i)).sort((a, b) => b.rank - a.rank);
  }

  const inPatch = (codes, patch) =>
    Array.from({ length: codes.start[patch + 1] - codes.start[patch] }, (_, i) => code(codes, codes.start[patch] + i));

  function valuesOf(codes, row) {
    const values = new Float32Array(codes.start.length - 1).fill(-Infinity);
    for (let p = 0; p + 1 < codes.start.length; p++)
      for (let i = codes.start[p]; i < codes.start[p + 1]; i++) if (codes.row[i] === row) values[p] = codes.value[i];
    return values;
  }

  /* Places of the images whose path and class have all words of `find`: those in the image view, or all if there is none. */
  function listed(paths) {
    const { classes, files } = saev.gallery;
    const words = (saev.state.params.get("find") ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    const has = (i) => {
      const text = `${paths.path[i]} ${classes[paths.class[i]] ?? ""}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    const places = [];
    for (let i = 0; i < paths.path.length; i++) if ((paths.code[i] >= 0 || !files.n_codes) && has(i)) places.push(i);
    return places;
  }

  function picker(main, paths) {
    const search = saev.searchField("images", "part of a path or class", "find", () => list(), () => move(1));
    const found = saev.el("p", { class: "found", role: "status" });
    const pictures = saev.el("div", { class: "pictures" });
    const move = (by) => {
      const links = [...pictures.querySelectorAll("a[href]")];
      const place = links.indexOf(document.activeElement);
      links[place < 0 ? 0 : place + by]?.focus();
    };

    function list() {
      const places = listed(paths);
      found.textContent = `${saev.count(places.length, "image")}${places.length > FOUND ? `, the first ${FOUND} are shown` : ""}`;
      pictures.replaceChildren(...places.slice(0, FOUND).map((i) => saev.figure(i, null, { caption: `Image ${paths.n[i]}` })));
    }
    main.append(saev.el("div", { class: "bar" }, search, found),
      ...(saev.gallery.files.n_codes ? [] : [saev.absent(`This gallery has no image view: which ${saev.noun}s fire on a patch is not in it. This writes it:`, command())]), pictures);
    list();
    return { update: list, move, arrow: move };
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
      const span = latent.high - latent.low;
      const heat = valuesOf(codes, row).map((v) => (span > 0 ? Math.max(0, (v - latent.low) / span) : 0));
      picture.setHeat(heat, `${saev.noun} ${columns.id[row]}`);
      controls.replaceChildren(saev.heatControls(latent.low, latent.high));
    }

    const item = (entry, row, format) => {
      const id = columns.id[entry.row];
      return saev.el("li", null, saev.el("button", { type: "button", "aria-pressed": entry.row === row ? "true" : "false",
        onclick: () => { saev.setParams({ latent: entry.row === row ? null : id }); update(); } },
      saev.el("span", null, id), saev.el("span", { class: "number" }, format(entry.value)),
      saev.el("span", { class: "number" }, `${(100 * entry.rank).toFixed(1)}%`), saev.el("span", { class: "share", style: `width:${100 * entry.rank}%` })),
      saev.el("a", { href: saev.href("latent", id), "aria-label": `Open ${saev.noun} ${id}` }, "open"));
    };

    function update() {
      const [row, patch] = [chosenRow(), chosenPatch()];
      const entries = patch === null ? all : inPatch(codes, patch);
      const where = patch === null ? "this image" : saev.patchWords(patch, grid);
      heading.textContent = `${saev.count(entries.length, saev.noun)} on ${where}`;
      const order = patch === null ? "largest value on this image, and the share of {} with a smaller one, by which they are sorted" : "value, by which they are sorted, and the share of {} with a smaller one";
      hint.textContent = order.replace("{}", `the ${saev.noun}'s patches`) + (entries.length > LISTED ? `; the first ${LISTED}` : "");
      const shown = entries.slice(0, LISTED);
      const format = saev.aligned(shown.map((entry) => entry.value));
      saev.refill(items, shown.map((entry) => item(entry, row, format)));
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
    const group = latent?.groups.find(({ image }) => image.includes(place));
    if (!group) return [saev.el("div", { class: "board" }, picture.frame)];
    const id = columns.id[row];
    picture.setHeat(saev.heatOf(group, group.image.indexOf(place)), `${saev.noun} ${id}`);
    return [saev.el("div", { class: "board" }, picture.frame), saev.heatControls(latent.low, latent.high),
      saev.el("p", null, "Heat of ", saev.el("a", { href: saev.href("latent", id) }, `${saev.noun} ${id}`), ".")];
  }

  function heading(image, steps) {
    return saev.el("div", { class: "heading" }, saev.el("a", { href: saev.href("image") }, "Images"), saev.el("h2", null, `Image ${image.n}`), steps,
      saev.el("p", null, saev.name(image.path), image.class >= 0 && [" · ", saev.name(saev.gallery.classes[image.class])]));
  }

  saev.views.image = (main, { argument }) => {
    const handlers = { escape: () => (argument ? leaveStep() : undefined) };
    const leaveStep = () => {
      if (!saev.state.params.has("patch")) return saev.go("image");
      saev.setParams({ patch: null });
      return handlers.update();
    };
    const isLeft = () => saev.state.view !== "image" || saev.state.argument !== argument;
    handlers.ready = saev.paths().then((paths) => { // the keys need no more
      if (isLeft()) return null;
      const place = paths.placeOf.get(Number(argument));
      const places = listed(paths);
      const steps = saev.steps("image", (by) => {
        const next = saev.beside(places, place, by);
        return next === undefined ? undefined : saev.href("image", paths.n[next], { latent: saev.state.params.get("latent") });
      });
      Object.assign(handlers, argument === "" ? picker(main, paths) : steps.handlers);
      return { paths, place, steps };
    });
    handlers.ready.then(async (found) => {
      if (!found || argument === "") return;
      const { paths, place, steps } = found;
      if (place === undefined) throw new Error(`Image ${argument} is not in this gallery: it holds ${saev.count(paths.n.length, "image")}.`);
      const image = await saev.imageAt(place);
      const codes = paths.code[place] < 0 ? null : await saev.codesAt(paths.code[place]);
      const alone = codes ? [] : await outside(place);
      if (isLeft()) return;
      saev.title(`Image ${image.n}`);
      main.append(heading(image, steps.element));
      if (codes) {
        const view = explorer(place, saev.gridOf(image), codes);
        main.append(view.element);
        handlers.update = view.update;
        saev.applyHeat();
      } else {
        main.append(...alone, saev.absent(`Which ${saev.noun}s fire on each patch of this image is not in the gallery. This takes more images into the image view:`, command()));
      }
    }).catch((error) => isLeft() || main.append(saev.problem(error)));
    return handlers;
  };
})();
