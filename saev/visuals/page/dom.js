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
  saev.count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  saev.capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  saev.problem = (error) => saev.el("p", { class: "problem", role: "alert" }, error.message ?? error);

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
