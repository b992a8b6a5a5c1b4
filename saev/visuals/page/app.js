/* Routes: all state is in the URL's hash, `#/view/argument?parameters`. Header, theme, keys and help. */
(() => {
  "use strict";
  const VIEWS = [["map", "Map"], ["image", "Images"], ["traits", "Traits"], ["compare", "Compare"]];
  const LIST = ["q", "sort", "x", "y", "value"]; // which latents, in which order: j and k follow it in every view
  const OWN = ["find", "by"]; // the same for traits, pairs and images: kept where a view and its list share them
  const KEYS = [
    ["j  k", "next and previous row, latent, trait, pair or image"], ["Enter", "open the selected one"], ["Escape", "leave a field, a selection, a view"],
    ["/", "search; then Enter for the list"], ["s", "star"], ["← →", "previous and next latent, trait, pair or image"],
    ["↑ ↓", "in a table: rows (also Page Up, Page Down, Home, End)"], ["← ↑ → ↓", "in a picture: patches"],
    ["← ↑ → ↓", "in the map: move the cross (with Shift: farther). Enter selects the nearest point, and Enter again opens it. The space bar begins a region and ends it"],
    ["Tab", "what comes next: links, buttons, the map, tables, pictures"], ["?", "this help"],
  ];
  const SEARCH = [
    ["trait:wing ap>.6", "one of its best traits (by AP above prevalence) has wing in its name, and AP above 0.6"], ["freq<.01 max>3", "fires on less than 1% of patches, up to more than 3"],
    ["id:185", "this latent; id:1,2,3 for several"], ["class:gull", "a class that is over-represented among its images"],
    ["star: note:beak", "with a star; with a note that has this word"], ["-trait:blue", "not"], ["images>100 mean<2", "images that it fires on; mean value"],
  ];
  let current = { view: null, argument: null, handlers: {} };
  let shown = null; // the hash of what is on the page

  function parse(hash = location.hash) {
    const [path, query] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
    const [view, ...rest] = path.split("/");
    let argument = rest.join("/");
    try {
      argument = decodeURIComponent(argument);
    } catch (error) {
      argument = "";
    }
    return { view: view || "map", argument, params: new URLSearchParams(query ?? "") };
  }

  const hash = (view, argument, params) => {
    const query = params.toString().replace(/%2C/g, ",").replace(/%3A/g, ":");
    return `#/${[view, argument].filter((part) => part !== "" && part !== undefined).map(encodeURIComponent).join("/")}${query && `?${query}`}`;
  };

  const tab = (view) => ({ latent: "map", trait: "traits" })[view] ?? view;

  /* Gives a link's parameters those of this view that go with it: the list, and the heat's settings. */
  function carry(view, params) {
    for (const name of [...LIST, ...saev.HEAT_SETTINGS, ...(tab(view) === tab(saev.state.view) ? OWN : [])]) {
      if (saev.state.params.has(name)) params.set(name, saev.state.params.get(name));
      else params.delete(name);
    }
    return params;
  }

  /* A link to a view. `changes` are more parameters. */
  saev.href = (view, argument = "", changes = {}) => {
    const params = carry(view, new URLSearchParams());
    for (const [name, value] of Object.entries(changes)) if (value !== undefined && value !== null) params.set(name, value);
    return hash(view, String(argument), params);
  };
  saev.go = (...where) => { location.hash = saev.href(...where); };

  /* Changes parameters of this view without a new entry in the history; null removes one. */
  saev.setParams = (changes) => {
    const { view, argument, params } = saev.state;
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === undefined || value === "") params.delete(name);
      else params.set(name, value);
    }
    history.replaceState(null, "", hash(view, argument, params));
    shown = location.hash;
    links();
  };

  /* A link to a latent, or its number alone where the gallery does not show it. */
  saev.latentLink = (row, id) =>
    row >= 0 ? saev.el("a", { href: saev.href("latent", id) }, id) : saev.el("span", { title: "not in this gallery" }, id);

  function links() {
    for (const [view, label] of VIEWS) {
      const link = document.getElementById(`to-${view}`);
      link.href = saev.href(view, "", view === "map" ? { at: saev.state.params.get("at") } : {});
      if (tab(saev.state.view) === view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    for (const link of document.querySelectorAll("main a[href^='#/']")) {
      const { view, argument, params } = parse(link.getAttribute("href"));
      link.setAttribute("href", hash(view, argument, carry(view, params)));
    }
  }

  /* The event of a new hash comes late: keys are pressed, and links opened, before it. */
  function follow() {
    if (location.hash !== shown) route();
  }

  function route() {
    shown = location.hash;
    const state = parse();
    saev.state = state;
    links();
    if (current.view === state.view && current.argument === state.argument && current.handlers.update) {
      current.handlers.update();
      saev.applyHeat();
      return;
    }
    const main = document.getElementById("main");
    const view = saev.views[state.view];
    const hadFocus = main.contains(document.activeElement);
    current.handlers.leave?.();
    current = { view: state.view, argument: state.argument, handlers: {} };
    main.replaceChildren();
    main.className = state.view;
    saev.title(VIEWS.find(([name]) => name === state.view)?.[1] ?? state.view);
    try {
      if (!view) throw new Error(`There is no view "${state.view}".`);
      current.handlers = view(main, state) ?? {};
    } catch (error) {
      main.append(saev.problem(error), saev.el("p", null, saev.el("a", { href: "#/map" }, "To the map")));
    }
    saev.applyHeat();
    scrollTo(0, 0);
    if (hadFocus) (current.handlers.list ?? main).focus({ preventScroll: true }); // so that Tab and the arrows go on from there
  }

  saev.title = (text) => { document.title = saev.visible(`${text} · ${saev.gallery.title}`); };

  // ---- theme ----

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  try {
    if (themes.includes(localStorage.getItem("saev-theme"))) theme = localStorage.getItem("saev-theme");
  } catch (error) { /* then it is not kept */ }

  function applyTheme() {
    document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    current.handlers.repaint?.();
  }
  dark.addEventListener("change", applyTheme);
  applyTheme();

  function nextTheme(button) {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try {
      localStorage.setItem("saev-theme", theme);
    } catch (error) { /* then it is not kept */ }
    button.textContent = `Theme: ${theme}`;
    applyTheme();
  }

  // ---- header, help, stars ----

  function header() {
    const { title, source, shown } = saev.gallery;
    const themeButton = saev.el("button", { type: "button", onclick: () => nextTheme(themeButton) }, `Theme: ${theme}`);
    document.getElementById("header").replaceChildren(
      saev.el("div", { class: "title" }, saev.el("h1", null, saev.name(title)),
        saev.el("p", null, saev.name(source.vit), ` · layer ${source.layer} · `, saev.name(source.data),
          ` · ${saev.count(source.n_images, "image")} · ${shown.n.toLocaleString("en")} of ${saev.count(shown.of, saev.noun)}`)),
      saev.el("nav", { "aria-label": "Views" }, VIEWS.map(([view, label]) => saev.el("a", { id: `to-${view}`, href: `#/${view}` }, label))),
      saev.el("div", { class: "tools" },
        saev.el("button", { type: "button", onclick: showStars }, "★ Stars"), themeButton,
        saev.el("button", { type: "button", onclick: showHelp, "aria-label": "Help: keys and search" }, "?")));
  }

  function dialog(label, ...content) {
    const box = saev.el("dialog", { "aria-label": label, onclose: () => box.remove(), onclick: (event) => event.target === box && box.close() },
      saev.el("form", { method: "dialog" }, saev.el("h2", null, label), saev.el("button", { "aria-label": "Close" }, "×")), ...content);
    document.body.append(box);
    box.showModal();
    return box;
  }
  const pairs = (items) => saev.el("dl", { class: "keys" },
    items.map(([key, words]) => [saev.el("dt", null, saev.el("kbd", null, key)), saev.el("dd", null, words)]));

  function showHelp() {
    if (document.querySelector("dialog")) return;
    const { scorer, source, shown } = saev.gallery;
    const patches = source.transform.startsWith("resized whole") ? `at most ${source.n_patches}` : source.grid.join(" x ");
    dialog("Help", saev.el("h3", null, "Keys"), pairs(KEYS), saev.el("h3", null, "Search"), pairs(SEARCH),
      saev.el("h3", null, "This gallery"), saev.el("p", null, saev.name(scorer.name), `: ${scorer.kind}. ${scorer.fires}`),
      saev.el("p", null, `Shown: ${shown.filters}. Images: ${source.transform}, ${patches} patches.`));
  }

  function showStars() {
    const said = saev.el("p", { role: "status" });
    const counts = saev.el("p");
    const count = () => {
      const { stars, notes } = saev.stars.count();
      counts.textContent = `${saev.count(stars, "star")}, ${saev.count(notes, "note")}. ${saev.stars.kept
        ? "Kept in this browser." : "This browser does not keep them: export them before the page closes."}`;
    };
    count();
    const file = saev.el("input", {
      type: "file", accept: ".json,application/json",
      onchange: async () => {
        try {
          said.textContent = saev.visible(saev.stars.add(await file.files[0].text()));
        } catch (error) {
          said.textContent = saev.visible(`${error.message} Nothing was imported.`);
        }
        count();
        file.value = "";
      },
    });
    const save = () => {
      const url = URL.createObjectURL(new Blob([JSON.stringify(saev.stars, null, 2)], { type: "application/json" }));
      saev.el("a", { href: url, download: `stars-${saev.gallery.scorer.sha256.slice(0, 12)}.json` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    };
    dialog("Stars and notes", counts, saev.el("p", { class: "choices" },
      saev.el("button", { type: "button", onclick: save }, "Export JSON"), saev.el("label", null, "Import JSON ", file)), said);
  }

  // ---- keys ----

  let pressed = Promise.resolve();

  /* Keys may come faster than views open: each waits for the view that those before it have opened. */
  function press(event) {
    const field = event.target.closest("input, textarea, select, dialog");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && field && !field.matches("dialog") && !field.closest("dialog")) {
      field.blur();
      return;
    }
    if (field || document.querySelector("dialog")) return;
    const actions = {
      j: ({ move }) => move?.(1), k: ({ move }) => move?.(-1), s: ({ star }) => star?.(), "?": showHelp,
      "/": () => document.querySelector("main input[type=search]")?.focus(),
      Enter: ({ open }) => event.target.closest("a, button, summary") || open?.(), Escape: ({ escape }) => escape?.(),
      ArrowLeft: ({ arrow }) => arrow?.(-1), ArrowRight: ({ arrow }) => arrow?.(1),
    };
    const act = actions[event.key];
    if (!act) return;
    if (event.key === "/" || event.key === "?") event.preventDefault();
    pressed = pressed.catch(() => undefined).then(async () => {
      follow();
      const { handlers } = current;
      await handlers.ready?.catch(() => undefined); // the view says what is wrong
      act(handlers);
    });
  }

  saev.open().then(() => {
    saev.stars.open();
    saev.state = parse();
    header();
    addEventListener("hashchange", follow);
    addEventListener("keydown", press);
    saev.stars.onchange(() => current.handlers.marks?.());
    route();
    performance.mark("saev-shown");
  }).catch((error) => document.getElementById("main").replaceChildren(saev.problem(error)));
})();
