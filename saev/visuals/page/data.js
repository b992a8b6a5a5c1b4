/* The gallery's data files. Each is a script that calls saev.put(name, value) once; it is added to the page when it is needed.
   docs/gallery.md describes them. */
var saev = { views: {} };

(() => {
  "use strict";
  const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };
  const FORMAT = 2;
  const KEPT = 200; // files in memory; the one used longest ago goes first
  const files = new Map(); // name -> promise of its value
  const arrived = new Map();
  const indexed = new WeakMap(); // the file of paths -> what `saev.paths` gives

  const REMEDY = "Copy the gallery's whole folder again, or run again the command that wrote this file.";
  const damaged = (name, what) => new Error(`data/${name}.js is damaged: ${what}. ${REMEDY}`);

  /* Each file also holds its checksum, for the readers in Python: the page cannot see a script's text. */
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
        else reject(damaged(name, "it is cut short, or holds something else"));
        arrived.delete(name);
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`data/${name}.js is missing, or cannot be read. ${REMEDY}`));
      };
      document.head.append(script);
    });
    promise.catch(() => files.delete(name)); // the next view tries again
    return promise;
  }

  /* A packed array as a typed array, without its shape. */
  function numbers(packed) {
    const text = atob(packed.b);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const array = new TYPES[packed.t](bytes.buffer);
    if (array.length !== packed.n.reduce((a, b) => a * b, 1)) throw new Error("an array has another size than it says");
    return array;
  }

  function unpacked(value) {
    if (Array.isArray(value)) return value.map(unpacked);
    if (value === null || typeof value !== "object") return value;
    return value.b === undefined ? Object.fromEntries(Object.entries(value).map(([key, one]) => [key, unpacked(one)])) : numbers(value);
  }

  /* A part of the file NAME with typed arrays for its packed ones. */
  const opened = (name, value) => {
    try {
      return unpacked(value);
    } catch (error) {
      throw damaged(name, error.message);
    }
  };

  const inFile = async (folder, i, perFile, key) => {
    const name = `${folder}/${String(Math.floor(i / perFile)).padStart(3, "0")}`;
    const entry = (await saev.load(name))[key]?.[i % perFile];
    if (entry === undefined) throw damaged(name, `it lacks number ${i}`);
    return opened(name, entry);
  };

  /* What all views share. Traits and the other dictionary are optional: a file that cannot be read becomes `problem`. */
  saev.open = async () => {
    const optional = (name) => saev.load(name).catch((error) => ({ problem: error.message }));
    const [stats, traits, compare] = await Promise.all([saev.load("stats"), optional("traits"), optional("compare")]);
    if (stats.format !== FORMAT) throw damaged("stats", `this page reads format ${FORMAT}, and the data have format ${stats.format}`);
    saev.gallery = opened("stats", stats);
    const { id } = saev.gallery.columns;
    saev.gallery.rowOf = new Map(Array.from(id, (latent, row) => [latent, row]));
    saev.gallery.n = id.length;
    saev.traits = { columns: {}, ...opened("traits", traits) };
    saev.compare = { columns: {}, ...opened("compare", compare) };
    saev.noun = stats.scorer.noun;
  };

  saev.latentAt = (row) => inFile("latents", row, saev.gallery.files.latents, "latents");
  saev.imageAt = (place) => inFile("images", place, saev.gallery.files.images, "images");
  saev.codesAt = (place) => inFile("codes", place, saev.gallery.files.codes, "images");
  saev.traitAt = (place) => inFile(saev.traits.files.folder, place, saev.traits.files.traits, "traits");
  saev.traitImageAt = (place) => inFile(`${saev.traits.files.folder}/images`, place, saev.traits.files.images, "images");
  saev.otherAt = (row) => inFile("compare", row, saev.compare.files.compare, "latents");
  /* Places after this gallery's own pictures are those that came with the comparison. */
  saev.otherImageAt = (place) => {
    const own = saev.gallery.files.n_images;
    return place < own ? saev.imageAt(place) : inFile("compare/images", place - own, saev.compare.files.images, "images");
  };

  /* Paths of all images: {path, class, n, code, placeOf: from the number in the dump}. */
  saev.paths = async () => {
    const file = await saev.load("paths");
    if (!indexed.has(file)) {
      const paths = opened("paths", file);
      paths.placeOf = new Map(Array.from(paths.n, (n, place) => [n, place]));
      indexed.set(file, paths);
    }
    return indexed.get(file);
  };

  /* The k-th image of a group as heat (0 to 1) on every patch. */
  saev.heatOf = (group, k, source = saev.gallery.source) => {
    const heat = new Float32Array(source.n_patches);
    for (let i = group.start[k]; i < group.start[k + 1]; i++) heat[group.patch[i]] = group.heat[i] / 255;
    return heat;
  };
})();
