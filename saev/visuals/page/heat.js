/* Heat over pictures. The canvas has one pixel for each patch, stretched over the picture by the browser: nearest neighbour
   gives exact rectangles, and bilinear is the switch "smooth". One hue; opacity is linear in heat; legends use the same function. */
(() => {
  "use strict";
  const HUE = [255, 0, 128];
  const DEFAULTS = { opacity: "70", smooth: "", scale: "latent", outline: "yes" };
  const raw = new WeakMap(); // canvas -> {heat, columns}

  /* Paints heat (numbers from 0 to 1 in raster order) into a canvas of one pixel a patch. */
  saev.paint = (canvas, heat, columns) => {
    canvas.width = columns;
    canvas.height = heat.length / columns;
    const pixels = new ImageData(columns, heat.length / columns);
    heat.forEach((h, i) => pixels.data.set([...HUE, Math.round(255 * Math.min(Math.max(h, 0), 1))], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  };

  const setting = (name) => saev.state.params.get(name) ?? DEFAULTS[name];
  saev.HEAT_SETTINGS = Object.keys(DEFAULTS);

  function scaled(heat) {
    if (setting("scale") !== "image") return heat;
    const top = heat.reduce((a, b) => Math.max(a, b), 0);
    return top > 0 ? heat.map((h) => h / top) : heat;
  }

  /* Applies the settings in the URL to all pictures in the page. */
  saev.applyHeat = () => {
    const root = document.documentElement;
    root.style.setProperty("--heat-opacity", Number(setting("opacity")) / 100);
    root.classList.toggle("smooth", setting("smooth") === "yes");
    root.classList.toggle("outlined", setting("outline") === "yes");
    for (const canvas of document.querySelectorAll("canvas.heat")) repaint(canvas);
  };

  function repaint(canvas) {
    const { heat, columns, legend } = raw.get(canvas);
    saev.paint(canvas, legend ? heat : scaled(heat), columns);
  }

  /* The rows and columns of an image's patches. Most have the gallery's; with --resize flexible, an image has its own. */
  saev.gridOf = (image) => image?.grid ?? saev.gallery.source.grid;

  /* Where a patch is in its picture, as CSS. */
  saev.patchBox = (patch, [rows, columns]) => {
    const [y, x] = [Math.floor(patch / columns), patch % columns];
    return `left:${(100 * x) / columns}%;top:${(100 * y) / rows}%;width:${100 / columns}%;height:${100 / rows}%`;
  };
  saev.patchWords = (patch, [, columns]) => {
    return `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
  };

  /* A picture with heat: {frame, setHeat(heat or null), ready}. `what` begins the alternative text. `source` has the grid of the
     ViT whose heat it is, and the size of what that ViT saw. */
  saev.picture = (place, heat, what, { imageAt = saev.imageAt, source = saev.gallery.source } = {}) => {
    const [height, width] = source.size;
    const img = saev.el("img", { alt: "Reading …", draggable: "false" });
    const canvas = saev.el("canvas", { class: "heat", "aria-hidden": "true" });
    const outline = saev.el("span", { class: "outline" });
    const frame = saev.el("div", { class: "frame", style: `aspect-ratio:${width}/${height}` }, img, canvas, outline);
    let grid = source.grid;
    let shown = null; // the last arguments of setHeat
    let about = "";
    let described = "";
    const describe = () => img.setAttribute("alt", saev.visible([about, described].filter(Boolean).join(": ") || "Reading …"));
    const setHeat = (given, words = what) => {
      shown = [given, words];
      const values = given?.slice(0, grid[0] * grid[1]);
      const strongest = values ? values.indexOf(values.reduce((a, b) => Math.max(a, b), 0)) : -1;
      const fires = Boolean(values && values[strongest] > 0);
      raw.set(canvas, { heat: values ?? new Float32Array(grid[0] * grid[1]), columns: grid[1] });
      repaint(canvas);
      outline.hidden = !fires;
      if (fires) outline.style.cssText = saev.patchBox(strongest, grid);
      described = [words, fires && `strongest at ${saev.patchWords(strongest, grid)}`].filter(Boolean).join(", ");
      describe();
    };
    setHeat(heat);
    const ready = imageAt(place).then((image) => {
      img.src = image.src;
      if (image.grid) {
        grid = image.grid;
        frame.style.aspectRatio = `${grid[1]}/${grid[0]}`; // patches are square
        setHeat(...shown);
      }
      about = [image.path, saev.gallery.classes[image.class]].filter(Boolean).join(", ");
      describe();
      return image;
    });
    ready.catch((error) => frame.append(saev.problem(error)));
    return { frame, setHeat, ready, img };
  };

  /* A small picture with a caption. It opens the image view, if the gallery has the image (n) there; `latent` selects that
     latent's heat. */
  saev.figure = (place, heat, { what, caption, latent, mark, ...of }) => {
    const { frame, ready } = saev.picture(place, heat, what, of);
    const link = saev.el("a", { class: "picture" }, frame);
    const text = saev.el("figcaption", null, caption);
    ready.then((image) => {
      if (image.n >= 0) link.href = saev.href("image", image.n, { latent });
      const name = saev.gallery.classes[image.class] ?? image.path;
      text.append(saev.el("span", { class: "of", title: image.path }, saev.name(name)));
    }, () => {});
    return saev.el("figure", { class: mark }, link, text);
  };

  /* Pictures of a group, e.g. a latent's top images. `of`: as for a picture. */
  saev.figures = (group, { id, latent = id, noun = saev.noun, most = Infinity, marks = () => ({}), ...of }) =>
    saev.el("div", { class: "pictures" }, Array.from(group.image.slice(0, most), (place, k) => {
      const value = saev.number(group.value[k]);
      const { mark, words, sign } = marks(group, k);
      const what = [`${noun} ${id} has value ${value}`, words].filter(Boolean).join(", ");
      return saev.figure(place, saev.heatOf(group, k, of.source), { what, caption: [sign, saev.el("b", null, value)], latent, mark, ...of });
    }));

  /* The legend: the same painting over dark, middle and light grey, from heat 0 to 255. low and high: their values, or words. */
  saev.legend = (low, high) => {
    const canvas = saev.el("canvas", { class: "heat", "aria-hidden": "true" });
    raw.set(canvas, { heat: Float32Array.from({ length: 256 }, (_, i) => i / 255), columns: 256, legend: true });
    repaint(canvas);
    const perImage = setting("scale") === "image";
    const inWords = (end) => (typeof end === "number" ? saev.number(end) : end);
    const words = [inWords(low), perImage ? "largest of each image" : inWords(high)];
    return saev.el("div", { class: "legend", role: "img", "aria-label": `Legend: transparent at ${words[0]}, opaque at ${words[1]}` },
      saev.el("div", { class: "strip" }, canvas), saev.el("span", null, words[0]), saev.el("span", null, words[1]));
  };

  /* Switches and legend. low and high as for the legend. */
  saev.heatControls = (low, high) => {
    const change = (name, value) => {
      saev.setParams({ [name]: value === DEFAULTS[name] ? null : value });
      saev.applyHeat();
      legend.replaceChildren(saev.legend(low, high));
    };
    const box = (name, label, off) => saev.el("label", null, saev.el("input", {
      type: "checkbox", checked: setting(name) === "yes", onchange: (event) => change(name, event.target.checked ? "yes" : off),
    }), label);
    const opacity = saev.el("input", {
      type: "range", min: "0", max: "100", step: "5", value: setting("opacity"), oninput: (event) => change("opacity", event.target.value),
    });
    const scale = saev.el("select", { onchange: (event) => change("scale", event.target.value) },
      saev.el("option", { value: "latent" }, `one for each ${saev.noun}`), saev.el("option", { value: "image" }, "one for each image"));
    scale.value = setting("scale");
    const legend = saev.el("div", null, saev.legend(low, high));
    return saev.el("div", { class: "controls", role: "group", "aria-label": "Heat" },
      legend, saev.el("label", null, "Opacity", opacity), saev.el("label", null, "Scale", scale),
      box("smooth", "Smooth", ""), box("outline", "Outline the strongest patch", "no"));
  };
})();
