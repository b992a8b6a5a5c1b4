/* The traits of protoeval: the table, and the best prototype of every scorer for one trait, side by side. */
(() => {
  "use strict";
  const COMMAND = "uv run protoeval.py … --gallery GALLERY";

  const absent = () => (saev.traits.problem ? saev.problem(saev.traits.problem)
    : saev.absent("This gallery has no traits. This chooses the best prototype for each, and writes them into the gallery:", COMMAND));
  const bestOf = (trait, scorer) => trait.best.find((best) => best.scorer === scorer);

  function fields(traits, scorers) {
    const number = (get) => ({ number: (row) => get(traits[row]) ?? NaN });
    const own = scorers.findIndex((scorer) => scorer.here);
    const text = (get) => ({ test: (value) => (row) => get(traits[row]).toLowerCase().includes(value) });
    return {
      "": text((trait) => `${trait.name} ${trait.group}`), trait: text((trait) => trait.name), group: text((trait) => trait.group),
      prevalence: number((trait) => trait.prevalence), ap: number((trait) => bestOf(trait, Math.max(own, 0))?.test_ap),
      id: number((trait) => bestOf(trait, Math.max(own, 0))?.prototype),
      ...Object.fromEntries(scorers.map((_, i) => [`ap${i}`, number((trait) => bestOf(trait, i)?.test_ap)])),
    };
  }

  saev.views.traits = (main) => {
    const { traits, scorers, settings } = saev.traits;
    if (!traits?.length) {
      main.append(saev.el("h2", null, "Traits"), absent());
      return {};
    }
    const known = fields(traits, scorers);
    const columns = [
      { key: "name", label: "Trait", width: "minmax(11rem,3fr)", narrow: "minmax(11rem,2fr)", cell: (row) => saev.el("a", { href: saev.href("trait", traits[row].name), tabindex: "-1", class: "cut" }, saev.traitName(traits[row].name)) },
      { key: "prevalence", label: "Prevalence", hint: "share of the test images with the trait: the AP of a constant score", number: true, sort: true, wide: true, width: "minmax(6rem,1fr)", cell: (row) => saev.fixed(traits[row].prevalence) },
      ...scorers.map((scorer, i) => ({ key: `ap${i}`, label: saev.name(scorer.name, { class: "cut" }), hint: `${scorer.name}: AP of its best prototype on the test images`, number: true, sort: true, width: "minmax(7rem,1.4fr)", narrow: "minmax(5rem,1fr)",
        cell: (row) => {
          const best = bestOf(traits[row], i);
          const top = Math.max(...traits[row].best.map((b) => b.test_ap));
          return best ? saev.el(best.test_ap === top ? "b" : "span", { title: `${scorer.noun} ${best.prototype}, AP ${saev.fixed(best.train_ap)} on the train images` }, saev.fixed(best.test_ap)) : "–";
        } })),
    ];
    const table = saev.searchTable({ label: "traits", noun: "trait", placeholder: "wing ap>.6", columns, fields: known, keys: traits.map((trait) => trait.name), by: "",
      onopen: (row) => saev.go("trait", traits[row].name) });
    main.append(table.bar, saev.el("p", { class: "hint" }, `Average precision on the test images. ${settings.words}`), table.element);
    table.handlers.update();
    return table.handlers;
  };

  /* Pictures of one scorer's best prototype, right and wrong ones marked. */
  function pictures(entry, best, scorer) {
    if (!entry) return saev.el("p", null, "No test image scores higher than the others.");
    return saev.figures(entry, { id: best.prototype, latent: best.row >= 0 ? best.prototype : undefined, noun: scorer.noun, imageAt: saev.traitImageAt, marks: ({ right }, k) => ({
      mark: right[k] ? "right" : "wrong", words: right[k] ? "right: it has the trait" : "wrong: it does not have the trait", sign: saev.el("span", { class: "sign" }, right[k] ? "✓ " : "✗ "),
    }) });
  }

  function side(best, scorer, entry) {
    const name = `${scorer.noun} ${best.prototype}`;
    const right = entry?.right ?? [];
    const hits = right.reduce((a, b) => a + b, 0);
    return saev.el("section", { class: "side" }, saev.el("h3", null, saev.name(scorer.name)),
      saev.el("p", null, best.row >= 0 ? saev.el("a", { href: saev.href("latent", best.prototype) }, name) : name, ` of ${scorer.n.toLocaleString("en")}`,
        ` · AP ${saev.fixed(best.test_ap)} test, ${saev.fixed(best.train_ap)} train${entry ? ` · ${hits} of ${right.length} right` : ""}`),
      pictures(entry, best, scorer));
  }

  saev.views.trait = (main, { argument }) => {
    const { traits, scorers, settings } = saev.traits;
    if (!traits?.length) {
      main.append(saev.el("h2", null, "Traits"), absent());
      return {};
    }
    const place = traits.findIndex((trait) => trait.name === argument);
    if (place < 0) throw new Error(`There is no trait "${argument}".`);
    const trait = traits[place];
    saev.title(trait.name);
    const rows = saev.rowsOr(() => saev.found(fields(traits, scorers), traits.length, ""));
    const steps = saev.steps("trait", (by) => {
      const next = saev.beside(rows, place, by);
      return next === undefined ? undefined : saev.href("trait", traits[next].name);
    });
    main.append(
      saev.el("div", { class: "heading" }, saev.el("a", { href: saev.href("traits", "", { on: trait.name }) }, "Traits"), saev.el("h2", null, saev.name(trait.name)), steps.element),
      saev.el("p", { class: "hint" }, `${saev.percent(trait.prevalence)} of ${saev.count(trait.n_test, "test image")} have it. `,
        trait.best.length ? "For each scorer: the prototype with the highest AP on the train images, and the test images that it scores highest. " : "No train image has it, so no prototype is chosen. ", settings.words),
      saev.el("p", { class: "key" }, saev.el("span", { class: "right" }, "✓ has the trait"), saev.el("span", { class: "wrong" }, "✗ does not")),
      saev.heatControls("low", "highest"),
      saev.el("p", { class: "hint" }, "Heat of a prototype goes from 0 (latents) or its mean score on these patches (other prototypes) to its highest score."),
      saev.later(saev.traitAt(place), (entries) => trait.best.map((best) => side(best, scorers[best.scorer], entries.find((entry) => entry.scorer === best.scorer))), { class: "sides" }));
    return { update: saev.applyHeat, ...steps.handlers, escape: () => saev.go("traits", "", { on: trait.name }) };
  };
})();
