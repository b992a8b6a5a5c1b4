/* Stars and notes, kept by the browser for each scorer (by its sha256), exported and imported as JSON. */
(() => {
  "use strict";
  const FORMAT = "saev-stars-1";
  const LONGEST = 10000;
  let marks = { stars: new Set(), notes: new Map() };
  const listeners = new Set();
  const key = () => `${FORMAT}:${saev.gallery.scorer.sha256}`;

  saev.stars = {
    version: 0, // counts the changes
    kept: true, // false if the browser refuses storage, as some do for file://
    open() {
      try {
        const text = localStorage.getItem(key());
        if (text) marks = checked(JSON.parse(text));
      } catch (error) {
        saev.stars.kept = false;
      }
      addEventListener("storage", (event) => {
        if (event.key !== key() || !event.newValue) return;
        marks = checked(JSON.parse(event.newValue));
        saev.stars.version++;
        listeners.forEach((listener) => listener());
      });
    },
    has: (id) => marks.stars.has(id),
    note: (id) => marks.notes.get(id) ?? "",
    count: () => ({ stars: marks.stars.size, notes: marks.notes.size }),
    toggle(id) {
      if (!marks.stars.delete(id)) marks.stars.add(id);
      save();
    },
    setNote(id, text) {
      if (text) marks.notes.set(id, text.slice(0, LONGEST));
      else marks.notes.delete(id);
      save();
    },
    onchange: (listener) => listeners.add(listener),
    toJSON: () => ({
      format: FORMAT, scorer: saev.gallery.scorer.sha256, title: saev.gallery.title,
      stars: [...marks.stars].sort((a, b) => a - b), notes: Object.fromEntries(marks.notes),
    }),
    /* Adds the stars and notes of a file; returns what it held. Raises an Error in words, and then changes nothing. */
    add(text) {
      let given;
      try {
        given = JSON.parse(text);
      } catch (error) {
        throw new Error("This file is not JSON.");
      }
      const found = checked(given);
      found.stars.forEach((id) => marks.stars.add(id));
      found.notes.forEach((note, id) => marks.notes.set(id, note));
      save();
      return `Added ${saev.count(found.stars.size, "star")} and ${saev.count(found.notes.size, "note")}.`;
    },
  };

  function checked(given) {
    const { scorer } = saev.gallery;
    if (given?.format !== FORMAT) throw new Error(`This file has no stars: its format is not ${FORMAT}.`);
    if (given.scorer !== scorer.sha256)
      throw new Error(`These stars belong to another scorer (${String(given.scorer).slice(0, 12)}), not to ${scorer.name}.`);
    const isId = (id) => Number.isInteger(id) && id >= 0 && id < scorer.n;
    if (!Array.isArray(given.stars) || !given.stars.every(isId))
      throw new Error(`"stars" must be a list of numbers below ${scorer.n}.`);
    const notes = Object.entries(given.notes ?? {}).map(([id, note]) => [/^\d+$/.test(id) ? Number(id) : -1, note]);
    if (!notes.every(([id, note]) => isId(id) && typeof note === "string" && note.length <= LONGEST))
      throw new Error(`"notes" must map numbers below ${scorer.n} to texts of at most ${LONGEST} characters.`);
    return { stars: new Set(given.stars), notes: new Map(notes) };
  }

  function save() {
    saev.stars.version++;
    try {
      localStorage.setItem(key(), JSON.stringify(saev.stars));
    } catch (error) {
      saev.stars.kept = false;
    }
    listeners.forEach((listener) => listener());
  }

  function show(button) {
    const on = marks.stars.has(Number(button.dataset.id));
    button.textContent = on ? "★" : "☆";
    button.setAttribute("aria-pressed", on);
  }
  listeners.add(() => document.querySelectorAll("button.star").forEach(show));

  saev.starButton = (id, inTable = false) => {
    const button = saev.el("button", {
      class: "star", type: "button", tabindex: inTable ? "-1" : null, "data-id": id, "aria-label": `Star ${saev.noun} ${id}`,
      onclick: (event) => {
        event.stopPropagation();
        saev.stars.toggle(id);
      },
    });
    show(button);
    return button;
  };
})();
