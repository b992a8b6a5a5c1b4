/* Two dictionaries on the same images: how many latents match, beside matches by chance; the pairs, side by side. */
(() => {
  "use strict";
  const PICTURES = 8; // of each latent of a pair
  const SORT = "-corr";
  const COMMAND = "uv run python -m saev.compare …";

  const absent = () => (saev.compare.problem ? saev.problem(saev.compare.problem)
    : saev.absent("No other dictionary is compared with this one. This matches two dictionaries on the same images and writes the pairs into this gallery:", COMMAND));

  /* Share of latents matched against the threshold, for the pairs and for permuted images. */
  function curve() {
    const { threshold, share, null: chance } = saev.compare.curve;
    const [width, height, left, bottom] = [520, 260, 54, 40];
    const [low, high] = [threshold[0], threshold[threshold.length - 1]];
    const x = (t) => left + ((t - low) / (high - low || 1)) * (width - left - 12);
    const y = (s) => 10 + (1 - s) * (height - bottom - 10);
    const line = (values, kind) => saev.svg("polyline", { class: `line ${kind}`, points: Array.from(threshold, (t, i) => `${x(t).toFixed(1)},${y(values[i]).toFixed(1)}`).join(" ") });
    const marks = [0, 0.25, 0.5, 0.75, 1];
    const half = threshold.findIndex((t) => t >= 0.5);
    const words = half < 0 ? "" : ` At ${Number(threshold[half].toFixed(2))}: ${saev.percent(share[half])}, by chance ${saev.percent(chance[half])}.`;
    return saev.el("figure", { class: "curve" },
      saev.svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Share of ${saev.noun}s matched against the least correlation.${words}` },
        marks.map((s) => [saev.svg("line", { class: "grid", x1: left, x2: width - 12, y1: y(s), y2: y(s) }), saev.svg("text", { x: left - 6, y: y(s) + 4, "text-anchor": "end" }, `${100 * s}%`)]),
        marks.map((m) => low + m * (high - low)).map((t) => saev.svg("text", { x: x(t), y: height - bottom + 18, "text-anchor": "middle" }, String(Number(t.toFixed(2))))),
        saev.svg("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "least correlation of a mutual best match"),
        line(chance, "chance"), line(share, "share")),
      saev.el("figcaption", null, saev.el("span", { class: "swatch share" }), "matched", saev.el("span", { class: "swatch chance" }), "images permuted", saev.el("p", null, words.trim())));
  }

  function fields() {
    const { columns } = saev.compare;
    const number = (array) => ({ number: (row) => (array ? array[row] : NaN) });
    return {
      "": { test: (value) => (row) => String(columns.id[row]) === value }, id: number(columns.id), match: number(columns.best), corr: number(columns.corr),
      mutual: { test: (value) => (row) => Boolean(columns.mutual[row]) === (value !== "no") },
      pair: number(columns.pair), pair_corr: number(columns.pair_corr), cos_match: number(columns.cos_best), cos: number(columns.cos),
    };
  }

  const idOr = (id) => (id >= 0 ? String(id) : "–");

  function tableColumns() {
    const { columns, method } = saev.compare;
    const column = (key, label, hint, cell, wide = false) => ({ key, label, hint, cell, wide, number: true, sort: true, width: "minmax(5.6rem,1fr)" });
    return [
      column("id", "This", `${saev.noun} of this gallery`, (row) => saev.el("a", { href: saev.href("compare", columns.id[row]), tabindex: "-1" }, columns.id[row])),
      column("match", "Match", "the other dictionary's latent with the highest correlation", (row) => idOr(columns.best[row])),
      column("corr", "Corr.", "of activations over the same patches", (row) => saev.fixed(columns.corr[row])),
      { key: "mutual", label: "Mutual", hint: "each is the other's best match", width: "minmax(5rem,.7fr)", cell: (row) => (columns.mutual[row] ? "yes" : "") },
      column("pair", "1:1", "partner in the one-to-one matching", (row) => idOr(columns.pair[row]), true),
      column("pair_corr", "Corr. 1:1", "with the partner of the one-to-one matching", (row) => saev.fixed(columns.pair_corr[row]), true),
      ...(method.one_space ? [column("cos_match", "By cosine", "the other dictionary's latent with the highest cosine", (row) => idOr(columns.cos_best[row]), true), column("cos", "Cosine", "of the decoder rows", (row) => saev.fixed(columns.cos[row]), true)] : []),
    ];
  }

  const dictionary = (label, { title, scorer, source }) => saev.el("div", null, saev.el("dt", null, label),
    saev.el("dd", null, saev.name(title), " · ", saev.name(scorer.name), ` · ${saev.count(scorer.n, scorer.noun)} · `, saev.name(source.vit), ` layer ${source.layer}`));

  function overview(main) {
    const { columns, method, other } = saev.compare;
    const table = saev.searchTable({ label: "pairs", noun: "pair", placeholder: "corr>.5 mutual:yes", columns: tableColumns(), fields: fields(), keys: [...columns.id], by: SORT,
      onopen: (row) => saev.go("compare", columns.id[row]) });
    const chance = saev.compare.null.corr;
    const limit = chance[Math.floor(0.95 * (chance.length - 1))];
    main.append(saev.el("div", { class: "columns" }, saev.el("div", { class: "left" },
      saev.el("dl", { class: "both" }, dictionary("This", saev.gallery), dictionary("Other", other)), curve(),
      saev.el("p", { class: "hint" }, `${method.words} With permuted images, 95% of the correlations are below ${saev.fixed(limit)}.`)),
    saev.el("div", { class: "right" }, table.bar, table.element)));
    table.handlers.update();
    return table.handlers;
  }

  /* The other gallery's page of a latent; only addresses of files and of the web become links. */
  function elsewhere(href, id) {
    if (!href) return null;
    const url = new URL(href, location.href);
    if (!["file:", "http:", "https:"].includes(url.protocol)) return null;
    url.hash = `#/latent/${id}`;
    return saev.el("a", { href: url.href }, "open in its gallery");
  }

  function pages(main, argument) {
    const { columns, other, method } = saev.compare;
    const id = Number(argument);
    const [place, row] = [columns.id.indexOf(id), saev.gallery.rowOf.get(id)];
    if (place < 0 || row === undefined) throw new Error(`${saev.capital(saev.noun)} ${argument} is not in this comparison.`);
    saev.title(`${saev.capital(saev.noun)} ${id}, compared`);
    const rows = saev.rowsOr(() => saev.found(fields(), columns.id.length, SORT));
    const steps = saev.steps("pair", (by) => {
      const next = saev.beside(rows, place, by);
      return next === undefined ? undefined : saev.href("compare", columns.id[next]);
    });
    const tops = (latent) => latent.groups.filter((group) => group.name === "top" && group.image.length > 0);
    const groups = (latent, attributes) => tops(latent).map((group) =>
      saev.el("section", { class: "group" }, saev.el("h4", null, "Top images"), saev.figures(group, { ...attributes, most: PICTURES })));
    const unseen = () => saev.el("p", { class: "hint" }, other.href ? `The other gallery does not show this ${other.scorer.noun}.` : "To see its images here, pass its gallery as --other-gallery.");
    const facts = [["Correlation", saev.fixed(columns.corr[place])], ["Mutual", columns.mutual[place] ? "yes" : "no"],
      ["One to one", `${idOr(columns.pair[place])} (${saev.fixed(columns.pair_corr[place])})`],
      ...(method.one_space ? [["By cosine", `${idOr(columns.cos_best[place])} (${saev.fixed(columns.cos[place])})`]] : [])];
    const best = columns.best[place];
    const fromZero = saev.noun !== "prototype" && other.scorer.noun !== "prototype";
    main.append(
      saev.el("div", { class: "heading" }, saev.el("a", { href: saev.href("compare", "", { on: id }) }, "Compare"), saev.el("h2", null, `${saev.capital(saev.noun)} ${id} and ${idOr(best)}`), saev.starButton(id),
        steps.element),
      saev.el("dl", { class: "facts" }, facts.map(([k, v]) => saev.el("div", null, saev.el("dt", null, k), saev.el("dd", null, v)))),
      saev.heatControls(fromZero ? "0" : "low", "maximum"),
      ...(fromZero ? [] : [saev.el("p", { class: "hint" }, "Heat goes from 0 (latents, units) or the mean score (prototypes) to the maximum.")]),
      saev.el("div", { class: "sides two" },
        saev.el("section", { class: "side" }, saev.el("h3", null, saev.el("a", { href: saev.href("latent", id) }, `${saev.capital(saev.noun)} ${id}`), " · ", saev.name(saev.gallery.title)),
          saev.later(saev.latentAt(row), (latent) => groups(latent, { id }))),
        saev.el("section", { class: "side" }, saev.el("h3", null, `${saev.capital(other.scorer.noun)} ${idOr(best)} · `, saev.name(other.title), " ", best >= 0 && elsewhere(other.href, best)),
          best < 0 ? saev.el("p", null, "It has no match.") : saev.later(saev.otherAt(place), (latent) => (tops(latent).length ? groups(latent, { id: best, latent: undefined, noun: other.scorer.noun, imageAt: saev.otherImageAt, source: other.source }) : unseen())))));
    return { update: saev.applyHeat, ...steps.handlers, star: () => saev.stars.toggle(id), escape: () => saev.go("compare", "", { on: id }) };
  }

  saev.views.compare = (main, { argument }) => {
    if (!saev.compare.columns.id) {
      main.append(saev.el("h2", null, "Compare"), absent());
      return {};
    }
    return argument === "" ? overview(main) : pages(main, argument);
  };
})();
