/* The list of latents that a view shows: search, brush and sort, all read from the URL's parameters. */
(() => {
  "use strict";
  const TERM = /(-?)(?:([a-z_]+)(>=|<=|:(?!:)|=|>|<)("[^"]*"?|\S*)|("[^"]*"?|\S+))/gi;
  const COMPARE = {
    ">": (a, b) => a > b, "<": (a, b) => a < b, ">=": (a, b) => a >= b, "<=": (a, b) => a <= b,
    "=": (a, b) => a === b, ":": (a, b) => a === b,
  };

  /* Terms of a search, e.g. `trait:wing ap>.6 -class:gull "long bill"`: [{not, field, op, value}]. */
  saev.parseSearch = (text) =>
    [...text.matchAll(TERM)].map(([, not, field, op, value, word]) => {
      const plain = (value ?? word).replace(/^"|"$/g, "");
      return { not: not === "-", field: (field ?? "").toLowerCase(), op: op ?? ":", value: plain.toLowerCase() };
    });

  /* A table's rows that all terms accept. fields: {name: {number: row -> number} | {test: (row, value) -> bool}}.
     Terms without a field go to `fields[""]`. Raises an Error that names an unknown field or a value that is no number. */
  saev.filterRows = (terms, fields, n) => {
    const tests = terms.map(({ not, field, op, value }) => {
      const known = fields[field];
      if (!known) throw new Error(`No field "${field}". Fields: ${Object.keys(fields).filter(Boolean).join(", ")}.`);
      if (known.test) {
        const test = known.test(value);
        return (row) => test(row) !== not;
      }
      const values = value.split(",").map(Number);
      if (value === "" || values.some(Number.isNaN)) throw new Error(`${field}${op}${value}: ${value || "nothing"} is no number.`);
      return (row) => values.some((v) => COMPARE[op](known.number(row), v)) !== not;
    });
    const rows = [];
    for (let row = 0; row < n; row++) if (tests.every((test) => test(row))) rows.push(row);
    return rows;
  };

  const contains = (names, value) => names.map((name) => name.toLowerCase().includes(value));
  /* The places of a row in a column with several values for each row, such as its best traits. */
  saev.slots = (column, row) => {
    const n = column ? column.length / saev.gallery.n : 0;
    return Array.from({ length: n }, (_, k) => n * row + k);
  };

  function latentFields() {
    const { columns, classes } = saev.gallery;
    const traits = saev.traits.columns;
    const traitNames = (saev.traits.traits ?? []).map((trait) => trait.name);
    const numbers = { id: columns.id, freq: columns.freq, mean: columns.mean, max: columns.max, images: columns.n_images };
    const fields = Object.fromEntries(Object.entries(numbers).map(([k, c]) => [k, { number: (row) => c[row] }]));
    const text = (names, places) => (value) => {
      const hit = contains(names, value);
      return (row) => saev.slots(places, row).some((j) => places[j] >= 0 && hit[places[j]]);
    };
    const { id } = columns;
    fields.trait = { test: text(traitNames, traits.trait) };
    fields.class = { test: text(classes, columns.class) };
    fields.note = { test: (value) => (row) => saev.stars.note(id[row]).toLowerCase().includes(value) && saev.stars.note(id[row]) !== "" };
    fields.star = { test: (value) => (row) => saev.stars.has(id[row]) === (value !== "no") };
    fields.ap = { number: (row) => traits.ap?.[saev.traitPlace(row)] ?? NaN };
    fields[""] = {
      test: (value) => {
        const tests = [fields.trait, fields.class, fields.note].map((field) => field.test(value));
        return (row) => String(id[row]) === value || tests.some((test) => test(row));
      },
    };
    return fields;
  }

  /* Says that only the first latents took part in protoeval, if the last one (or this one) did not; else "". */
  saev.tookPart = (id = saev.gallery.scorer.n - 1) => {
    const n = saev.traits.scorers?.[0]?.n ?? Infinity;
    return id < n ? "" : `Only the first ${n.toLocaleString("en")} ${saev.noun}s took part (--n-prototypes).`;
  };

  /* `trait:` and `ap` speak of one trait: a latent is kept if one of its traits meets them all.
     Returns the other terms, and for each row the place in the columns of its first trait that does, or -1. */
  function traitTest(terms) {
    const traits = saev.traits.columns;
    const asked = terms.filter(({ field, not }) => (field === "trait" || field === "ap") && !not);
    if (!asked.some(({ field }) => field === "trait") || !traits.trait) return [terms, firstTrait];
    const names = saev.traits.traits.map((trait) => trait.name);
    const tests = asked.map(({ field, op, value }) => {
      const hit = contains(names, value);
      const limit = Number(value);
      if (field === "ap" && (value === "" || Number.isNaN(limit))) throw new Error(`ap${op}${value}: no number.`);
      return field === "trait" ? (j) => hit[traits.trait[j]] : (j) => COMPARE[op](traits.ap[j], limit);
    });
    const place = (row) => saev.slots(traits.trait, row).find((j) => traits.trait[j] >= 0 && tests.every((test) => test(j))) ?? -1;
    return [terms.filter((term) => !asked.includes(term)), place];
  }

  saev.range = (text) => {
    const [low, high] = (text ?? "").split(",").map((part) => (part === "" ? NaN : Number(part)));
    return [Number.isNaN(low) ? -Infinity : low, high === undefined || Number.isNaN(high) ? Infinity : high];
  };

  /* The value axis of the map: log10 for scorers whose values are positive. */
  saev.axis = (params) => {
    const column = saev.gallery.columns[params.get("value") === "mean" ? "mean" : "max"];
    return saev.gallery.scorer.signed ? (row) => column[row] : (row) => Math.log10(column[row]);
  };
  saev.logFreq = (row) => Math.log10(saev.gallery.columns.freq[row]);

  /* Rows of a list, or none if its search cannot be read. The list itself says so; what is opened from it is shown all the same. */
  saev.rowsOr = (list) => {
    try {
      return list();
    } catch (error) {
      return [];
    }
  };

  /* Any sort key: -1 and 1 order rows by a column, and missing numbers come last. */
  saev.sortRows = (rows, sort, numberOf) => {
    const sign = sort.startsWith("-") ? -1 : 1;
    const keys = new Map(rows.map((row) => [row, numberOf(row)]));
    const last = (x) => (Number.isNaN(x) ? 1 : 0);
    return rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      return last(x) - last(y) || sign * (x - y) || a - b;
    });
  };

  const firstTrait = (row) => ((saev.traits.columns.trait?.length ?? 0) / saev.gallery.n) * row;
  saev.traitPlace = firstTrait; // which of a row's traits the table shows: the best, or the one that was searched
  let cached = { about: null, rows: null };
  saev.SORT = "-freq";

  /* Rows that the URL's parameters ask for, in order. Raises an Error in words for a search that cannot be read. */
  saev.list = (params) => {
    const parts = ["q", "x", "y", "value", "sort"].map((name) => params.get(name) ?? "");
    const about = JSON.stringify([parts, saev.stars.version]);
    if (cached.about === about) return cached.rows;
    const fields = latentFields();
    const [terms, place] = traitTest(saev.parseSearch(parts[0]));
    saev.traitPlace = place;
    const [x, y] = [saev.range(parts[1]), saev.range(parts[2])];
    const [valueOf, brushed] = [saev.axis(params), Boolean(parts[1] || parts[2])];
    const inside = (value, [low, high]) => value >= low && value <= high;
    const rows = saev.filterRows(terms, fields, saev.gallery.n).filter(
      (row) => place(row) >= 0 && (!brushed || (inside(saev.logFreq(row), x) && inside(valueOf(row), y))));
    const sort = parts[4] || saev.SORT;
    const field = fields[sort.replace(/^-/, "")];
    const sorted = field?.number ? saev.sortRows(rows, sort, field.number) : rows;
    cached = { about, rows: sorted };
    return sorted;
  };
})();
