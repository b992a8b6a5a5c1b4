/* Elements, and text from data files. All text goes through createTextNode or setAttribute: no data is read as HTML. */
(() => {
  "use strict";
  // Controls, and marks that change the direction of the text after them, are shown by their code.
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

  saev.visible = (text) =>
    String(text).replace(HIDDEN, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  const make = (element, attributes, children) => {
    for (const [key, value] of Object.entries(attributes ?? {})) {
      if (value === undefined || value === null || value === false) continue;
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else if (key === "value" || key === "checked") element[key] = value;
      else element.setAttribute(key, value === true ? "" : saev.visible(value));
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
      .map((child) => (child instanceof Node ? child : document.createTextNode(saev.visible(child)))));
    return element;
  };

  saev.el = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
  saev.svg = (tag, attributes, ...children) =>
    make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  /* A name from the data: its own direction does not touch the text around it. */
  saev.name = (text, attributes) => saev.el("bdi", attributes, text);

  /* A trait's name for a narrow column; its title is the whole name. */
  saev.traitName = (name) => saev.name(name.replace(/^has_/, ""), { class: "cut", title: name });

  /* Three digits; a missing number is a dash. */
  saev.number = (x) => {
    if (!Number.isFinite(x)) return "–";
    if (x === 0 || (Number.isInteger(x) && Math.abs(x) < 1e6)) return x.toLocaleString("en");
    const size = Math.abs(x);
    if (size >= 1e6 || size < 1e-3) return x.toExponential(1);
    return size >= 1000 ? Math.round(x).toLocaleString("en") : x.toPrecision(3);
  };
  saev.percent = (x) => (Number.isFinite(x) ? `${saev.number(Number((100 * x).toPrecision(3)))}%` : "–");
  /* Three decimals, for shares, cosines, correlations and average precision: one below the other in a table. */
  saev.fixed = (x) => (Number.isFinite(x) ? x.toFixed(3) : "–");

  /* A format for a column of other numbers: spaces as wide as digits put the decimal points below each other. */
  saev.aligned = (values, format = saev.number) => {
    const decimals = (text) => (text.includes(".") ? text.replace("%", "").length - text.indexOf(".") - 1 : 0);
    let [least, most] = [Infinity, 0]; // the smaller a number, the more decimals it has
    for (const x of values) if (Number.isFinite(x) && x !== 0) [least, most] = [Math.min(least, Math.abs(x)), Math.max(most, Math.abs(x))];
    const places = Math.min(5, Math.max(decimals(format(least)), decimals(format(most))));
    return (x) => {
      const text = format(x);
      if (!Number.isFinite(x) || !places) return text;
      return `${text}${text.includes(".") ? "" : "\u2008"}${"\u2007".repeat(Math.max(0, places - decimals(text)))}`;
    };
  };

  saev.count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  /* The column `mean` is of absolute values. */
  saev.meanWords = () => (saev.gallery.scorer.signed ? "mean |value|" : "mean value");
  saev.capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  saev.problem = (error) => saev.el("p", { class: "problem", role: "alert" }, error.message ?? error);

  /* Replaces the items of a list. The place that had the focus keeps it. */
  saev.refill = (list, items) => {
    const place = [...list.children].findIndex((item) => item.contains(document.activeElement));
    list.replaceChildren(...items);
    list.children[place]?.querySelector("a, button")?.focus();
  };

  /* Links to what comes before and after, and the same for keys. hrefOf(-1) and hrefOf(1): undefined at an end. */
  saev.steps = (noun, hrefOf) => {
    const step = (by) => {
      const href = hrefOf(by);
      if (href) location.hash = href;
    };
    const link = (by, sign, label) => {
      const href = hrefOf(by);
      return href ? saev.el("a", { class: "step", href, "aria-label": label, title: label }, sign) : saev.el("span", { class: "step", "aria-hidden": "true" }, sign);
    };
    const element = saev.el("span", { class: "steps" }, link(-1, "‹", `Previous ${noun} (k)`), link(1, "›", `Next ${noun} (j)`));
    return { element, handlers: { move: step, arrow: step } };
  };

  /* A place whose content arrives later, or a message in its stead. */
  saev.later = (promise, fill, attributes) => {
    const place = saev.el("div", attributes, saev.el("p", { class: "wait" }, "Reading …"));
    promise.then(fill).then((node) => place.replaceChildren(...[node].flat()),
      (error) => place.replaceChildren(saev.problem(error)));
    return place;
  };

  /* What to run for data that this gallery does not have. */
  saev.absent = (what, command) =>
    saev.el("div", { class: "absent" }, saev.el("p", null, what), saev.el("pre", null, saev.el("code", null, command)));
})();
