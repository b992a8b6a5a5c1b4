/* One latent: facts, histogram, images by group, what is near it and what fires with it. */
(() => {
  "use strict";
  const GROUPS = { top: "Top images", q4: "Fourth quarter", q3: "Third quarter", q2: "Second quarter", q1: "First quarter", random: "Random images" };
  const LISTED = 8;
  const tenths = (share) => `${(100 * share).toFixed(1)}%`;

  /* Bars of a histogram; heights are log10(1 + count), so that rare large values show. */
  function histogram(packed) {
    const counts = packed.n;
    const [low, high] = packed.edges;
    const [width, height, n] = [512, 110, counts.length];
    const top = Math.log10(1 + counts.reduce((a, b) => Math.max(a, b), 0)) || 1;
    const edge = (i) => (packed.scale === "log" ? low * (high / low) ** (i / n) : low + ((high - low) * i) / n);
    const bars = Array.from(counts, (count, i) => {
      const tall = (height * Math.log10(1 + count)) / top;
      return count > 0 && saev.svg("rect", { x: (i * width) / n, y: height - tall, width: width / n - 1, height: tall },
        saev.svg("title", null, `${saev.number(edge(i))} to ${saev.number(edge(i + 1))}: ${saev.count(count, "patch").replace("patchs", "patches")}`));
    });
    const total = counts.reduce((a, b) => a + b, 0);
    const label = `Histogram of ${total.toLocaleString("en")} values from ${saev.number(low)} to ${saev.number(high)}`;
    return saev.el("figure", { class: "histogram" },
      saev.svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label }, bars),
      saev.el("div", { class: "ends" }, saev.el("span", null, saev.number(low)),
        saev.el("span", null, `value on a patch (${packed.scale} scale); bars: log of the number of patches`), saev.el("span", null, saev.number(high))));
  }

  function facts(row, latent) {
    const { columns, source, scorer } = saev.gallery;
    const freq = columns.freq[row];
    const live = freq > 0;
    const each = live ? ` (1 in ${Math.round(1 / freq).toLocaleString("en")})` : "";
    const items = [
      ["Fires on", live ? `${saev.percent(freq)} of patches${each}` : "no patch of these activations"],
      ["Images", `${columns.n_images[row].toLocaleString("en")} of ${source.n_images.toLocaleString("en")}`],
      [saev.capital(saev.meanWords()), saev.number(columns.mean[row])], ["Maximum", saev.number(columns.max[row])],
    ];
    return saev.el("section", { class: "facts" }, saev.el("dl", null, items.map(([k, v]) => saev.el("div", null, saev.el("dt", null, k), saev.el("dd", null, v)))),
      live && histogram(latent.histogram), saev.el("p", { class: "hint" }, scorer.fires));
  }

  /* A list of names with a bar for a share from 0 to 1. */
  const ranking = (title, words, items, none = "None.") =>
    saev.el("section", { class: "ranking" }, saev.el("h3", null, title), saev.el("p", { class: "hint" }, words),
      items.length ? saev.el("ol", null, items.map(([name, value, share]) => saev.el("li", null, name, saev.el("span", { class: "number" }, value),
        saev.el("span", { class: "share", style: `width:${100 * Math.min(Math.max(share, 0), 1)}%` })))) : saev.el("p", null, none));

  function aside(row, latent) {
    const { classes, columns: { id }, scorer } = saev.gallery;
    const { trait, ap } = saev.traits.columns;
    const best = saev.slots(trait, row).filter((j) => trait[j] >= 0);
    const lifts = latent.classes.slice(0, LISTED);
    return [
      trait && ranking("Traits", "average precision on the train images; the traits with the largest AP above prevalence", best.map((j) => {
        const { name } = saev.traits.traits[trait[j]];
        return [saev.el("a", { href: saev.href("trait", name) }, saev.name(name)), saev.fixed(ap[j]), ap[j]];
      }), saev.tookPart(id[row]) || "None."),
      classes.length > 0 && ranking("Classes", "more often among the images that it fires on than among all: images, and how many times as often", lifts.map(([c, images, lift]) =>
        [saev.name(classes[c]), `${images.toLocaleString("en")}, ${saev.number(lift)}×`, lift / lifts[0][2]])),
      scorer.kind !== "units" && ranking(saev.capital(`nearest ${saev.noun}s`), "cosine of the directions", latent.neighbours.slice(0, LISTED).map(([r, other, cosine]) =>
        [saev.latentLink(r, other), saev.fixed(cosine), cosine]), "There is no other one."),
      scorer.noun !== "prototype" && ranking("Fires together with", "share of its patches on which the other one fires", latent.together.slice(0, LISTED).map(([r, other, share]) =>
        [saev.latentLink(r, other), tenths(share), share]), "No other one fires on its patches."),
    ];
  }

  function groups(id, latent) {
    const shown = latent.groups.filter((group) => group.image.length > 0);
    if (!shown.length) return saev.el("p", null, "There are no images to show.");
    return [saev.heatControls(latent.low, latent.high), ...shown.map((group) =>
      saev.el("section", { class: "group", "data-group": group.name }, saev.el("h3", null, GROUPS[group.name] ?? group.name), saev.el("p", { class: "hint" }, group.words), saev.figures(group, { id })))];
  }

  const note = (id) => {
    const area = saev.el("textarea", { rows: "2", placeholder: "What does it fire on?", "aria-label": `Note on ${saev.noun} ${id}`, value: saev.stars.note(id),
      onchange: () => saev.stars.setNote(id, area.value.trim()) });
    return area;
  };

  saev.views.latent = (main, { argument }) => {
    const { columns, rowOf, shown, scorer } = saev.gallery;
    const id = Number(argument);
    const row = rowOf.get(id);
    if (row === undefined || argument === "")
      throw new Error(`${saev.capital(scorer.noun)} ${argument} is not among the ${shown.n.toLocaleString("en")} of this gallery (${shown.filters}).`);
    saev.title(`${saev.capital(saev.noun)} ${id}`);
    const rows = saev.rowsOr(() => saev.list(saev.state.params));
    const steps = saev.steps(saev.noun, (by) => {
      const next = saev.beside(rows, row, by);
      return next === undefined ? undefined : saev.href("latent", columns.id[next]);
    });
    const back = () => saev.go("map", "", { at: id });
    const other = saev.compare.columns.best && saev.el("a", { href: saev.href("compare", id) }, "Its match in the other dictionary");
    main.append(
      saev.el("div", { class: "heading" }, saev.el("a", { href: saev.href("map", "", { at: id }) }, "Map"), saev.el("h2", null, `${saev.capital(saev.noun)} ${id}`), saev.starButton(id),
        steps.element, other),
      saev.later(saev.latentAt(row), (latent) => [
        saev.el("div", { class: "about" }, facts(row, latent), note(id)),
        saev.el("div", { class: "columns" }, saev.el("div", { class: "groups" }, groups(id, latent)), saev.el("aside", null, aside(row, latent))),
      ], { class: "later" }));
    return { update: saev.applyHeat, ...steps.handlers, star: () => saev.stars.toggle(id), escape: back };
  };
})();
