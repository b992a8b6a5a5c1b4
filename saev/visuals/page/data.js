/* The gallery's data files. Each is a script that calls saev.put(name, value) once; it is added to the page when it is needed.
   docs/gallery.md describes them. */
var saev = { views: {} };

(() => {
  "use strict";
  const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
  const KEPT = 200; // files in memory; the one used longest ago goes first
  const files = new Map(); // name -> promise of its value
  const arrived = new Map();

  saev.put = (name, value) => arrived.set(name, value);

  /* Promise of the value of data/NAME.js. A file that is missing or broken is an Error with words for the page. */
  saev.load = (name) => {
    const found = files.get(name) ?? read(name);
    files.delete(name);
    files.set(name, found); // the newest last
    if (files.size > KEPT) files.delete(files.keys().next().value);
    return found;
  };

  function read(name) {
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => {
        script.remove();
        if (arrived.has(name)) resolve(arrived.get(name));
        else reject(new Error(`data/${name}.js is broken: it holds no data. Write the gallery again.`));
        arrived.delete(name);
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`data/${name}.js cannot be read. Copy the whole folder of the gallery, or write it again.`));
      };
      document.head.append(script);
    });
    promise.catch(() => files.delete(name)); // the next view tries again
    return promise;
  }

  /* A packed array as a typed array, without its shape. */
  saev.unpack = (packed) => {
    const text = atob(packed.b);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const array = new TYPES[packed.t](bytes.buffer);
    if (array.length !== packed.n.reduce((a, b) => a * b, 1)) throw new Error("An array has another size than it says.");
    return array;
  };

  const unpackAll = (columns) =>
    Object.fromEntries(Object.entries(columns ?? {}).map(([key, packed]) => [key, saev.unpack(packed)]));

  const inFile = async (folder, i, perFile, key) => {
    const file = await saev.load(`${folder}/${String(Math.floor(i / perFile)).padStart(3, "0")}`);
    const entry = file[key]?.[i % perFile];
    if (entry === undefined) throw new Error(`data/${folder}: number ${i} is missing. Write the gallery again.`);
    return entry;
  };

  /* What all views share. Traits and the other dictionary are optional: a file that cannot be read becomes `problem`. */
  saev.open = async () => {
    const optional = (name) => saev.load(name).catch((error) => ({ problem: error.message }));
    const [stats, traits, compare] = await Promise.all([saev.load("stats"), optional("traits"), optional("compare")]);
    if (stats.format !== 1) throw new Error(`This page reads format 1 and the data have format ${stats.format}.`);
    const columns = unpackAll(stats.columns);
    const rowOf = new Map();
    columns.id.forEach((id, row) => rowOf.set(id, row));
    saev.gallery = { ...stats, columns, rowOf, n: columns.id.length };
    saev.traits = { ...traits, columns: unpackAll(traits.columns) };
    saev.compare = { ...compare, columns: unpackAll(compare.columns) };
    saev.noun = stats.scorer.noun;
  };

  saev.latentAt = (row) => inFile("latents", row, saev.gallery.files.latents, "latents");
  saev.imageAt = (place) => inFile("images", place, saev.gallery.files.images, "images");
  saev.codesAt = (place) => inFile("codes", place, saev.gallery.files.codes, "images");
  saev.traitAt = (place) => inFile(saev.traits.files.folder, place, saev.traits.files.traits, "traits");
  saev.traitImageAt = (place) => inFile(`${saev.traits.files.folder}/images`, place, saev.traits.files.images, "images");
  saev.otherAt = (row) => inFile("compare", row, saev.compare.files.compare, "latents");

  /* Paths of all images: {path, class, n, code, placeOf: from the number in the dump}. */
  saev.paths = async () => {
    const file = await saev.load("paths");
    if (!file.placeOf) {
      Object.assign(file, { class: saev.unpack(file.class), n: saev.unpack(file.n), code: saev.unpack(file.code) });
      file.placeOf = new Map();
      file.n.forEach((n, place) => file.placeOf.set(n, place));
    }
    return file;
  };

  /* The k-th image of a group as heat (0 to 1) on every patch. */
  saev.heatOf = (group, k) => {
    const heat = new Float32Array(saev.gallery.source.n_patches);
    for (let i = group.start[k]; i < group.start[k + 1]; i++) heat[group.patch[i]] = group.heat[i] / 255;
    return heat;
  };

  saev.unpackGroup = (group) => ({ ...group, ...unpackAll(Object.fromEntries(
    Object.entries(group).filter(([, value]) => value?.b !== undefined))) });
})();
