"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // A page that is followed loads itself anew, and stays as it was: what is unfolded, the layer that was chosen.
  const kept = (() => { try { return JSON.parse(sessionStorage.getItem("lipcore") ?? "{}"); } catch { return {}; } })();
  const folds = [...document.querySelectorAll("details")];
  if (data.reload) {
    folds.forEach((fold, i) => { fold.open ||= Boolean(kept.open?.includes(i)); });
    setTimeout(() => {
      kept.open = folds.flatMap((fold, i) => fold.open ? [i] : []);
      try { sessionStorage.setItem("lipcore", JSON.stringify(kept)); } catch { /* a browser that keeps nothing */ }
      location.reload();
    }, 1000 * data.reload);
  }
  const ready = () => { document.body.dataset.ready = "yes"; };
  if (!data.plots.items[0].root_ids.length) return ready();

  // On a narrow screen the figures need the room that names take on a wide one.
  const narrow = window.innerWidth < 640;
  await Bokeh.embed.embed_items(data.plots.docs, data.plots.items);
  const bokeh = Bokeh.documents[Bokeh.documents.length - 1];
  const model = (name) => bokeh.get_model_by_name(name);
  if (narrow) for (const root of bokeh.roots()) root.min_border_left = 90;

  // Paper is narrower than the screen, and a printer does not wait until figures have drawn themselves anew. On paper
  // there are pictures of them, which are made at once: finer than a screen's, and narrow, so that texts are large.
  const views = (Bokeh.index[Symbol.iterator] ? [...Bokeh.index] : Object.values(Bokeh.index))
    .filter((view) => view.el?.parentElement?.matches(".plot"));
  const places = views.map((view) => view.el.parentElement);
  const fineness = Object.getOwnPropertyDescriptor(window, "devicePixelRatio");
  window.addEventListener("beforeprint", () => {
    const fine = Math.max(2, window.devicePixelRatio);
    if (fineness?.configurable) Object.defineProperty(window, "devicePixelRatio", { value: fine, configurable: true });
    views.forEach((view, i) => {
      places[i].style.width = "800px";
      view.after_resize();
      const picture = view.export("auto", true).canvas;
      picture.className = "paper";
      places[i].style.width = "";
      places[i].after(picture);
    });
  });
  window.addEventListener("afterprint", () => {
    if (fineness?.configurable) Object.defineProperty(window, "devicePixelRatio", fineness);
    document.querySelectorAll("canvas.paper").forEach((picture) => picture.remove());
    for (const view of views) view.after_resize();
  });

  for (const link of document.querySelectorAll("a.csv")) {
    const fill = () => { link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csv(link.dataset.figure)); };
    link.addEventListener("click", fill);
    link.addEventListener("auxclick", fill);
  }
  function csv(figure) {
    if (map && figure === map.key) return mapCsv();
    const lines = ["line,first_step,last_step,least,mean,greatest"];
    for (let i = 0; ; i++) {
      const source = model(`${figure}-${i}`);
      if (!source) break;
      const columns = source.data;
      for (let k = 0; k < columns.end.length; k++) {
        const begin = columns.begin ? columns.begin[k] : columns.end[k];
        lines.push([i, begin, columns.end[k], columns.low[k], columns.mean[k], columns.high[k]].join(","));
      }
    }
    return lines.join("\n");
  }

  const map = data.map;
  if (!map) return ready();
  const rows = map.names.length, bins = map.bins;
  const grid = (text) => new Int16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const away = grid(map.away), low = grid(map.low), mean = grid(map.mean), high = grid(map.high);
  const lost = grid(map.lost);
  const NONE = -32768, ZERO = -32767, LOST = 0xff7d45a8;
  const value = (code) => code === NONE ? NaN : code === ZERO ? 0 : 10 ** (code / map.scale);
  const begin = (bin) => map.first + bin * map.width;
  const end = (bin) => Math.min(map.first - 1 + (bin + 1) * map.width, map.last);
  const steps = (bin) => begin(bin) === end(bin) ? `step ${begin(bin).toLocaleString("en")}`
    : `steps ${begin(bin).toLocaleString("en")} to ${end(bin).toLocaleString("en")}`;
  const text = (x) => Number.isNaN(x) ? "no number" : x === 0 ? "0" : Math.abs(x) >= 1e-4 && Math.abs(x) < 1e6
    ? Number(x.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 }) : x.toExponential(2);
  const element = (id) => document.getElementById(id);
  const layer = (name) => /^\d+$/.test(name) ? "layer " : "";

  // Colours: by lightness alone they can be told apart, in print and by colour-blind people (cividis, and blue to orange).
  const CIVIDIS = [[0, 32, 81], [18, 53, 112], [60, 77, 110], [87, 100, 110], [112, 123, 117], [138, 147, 119], [168, 172, 112],
    [203, 197, 94], [243, 225, 70], [255, 240, 120]];
  const AWAY = [[8, 48, 107], [33, 113, 181], [107, 174, 214], [198, 219, 239], [247, 247, 247], [253, 208, 162], [253, 141, 60],
    [217, 72, 1], [127, 39, 4]];
  function colour(table, share) {
    const at = Math.max(0, Math.min(0.99999, share)) * (table.length - 1), i = Math.floor(at), f = at - i;
    const [r, g, b] = table[i].map((c, k) => Math.round(c + f * (table[i + 1][k] - c)));
    return (255 << 24) | (b << 16) | (g << 8) | r;
  }

  function scale(relative) {
    if (relative) return [-map.scale, map.scale]; // the same in every run: a tenth to ten times
    const found = high.filter((code) => code > ZERO).sort();
    if (!found.length) return [0, 1];
    return [found[Math.floor(0.002 * found.length)], Math.max(found[found.length - 1], found[0] + 1)];
  }

  function paint() {
    const relative = element("map-relative").checked, table = relative ? AWAY : CIVIDIS, codes = relative ? away : high;
    const [least, most] = scale(relative), pixels = new Uint32Array(rows * bins);
    for (let row = 0; row < rows; row++) for (let bin = 0; bin < bins; bin++) {
      const at = row * bins + bin;
      let shown = 0xffe3e3e3;
      if (lost[at]) shown = LOST;
      else if (high[at] === ZERO) shown = 0xff000000;
      else if (codes[at] !== NONE) shown = colour(table, (codes[at] - least) / (most - least));
      else if (high[at] !== NONE) shown = 0xfff7f7f7;
      pixels[(rows - 1 - row) * bins + bin] = shown;
    }
    const image = Bokeh.require("core/util/ndarray").ndarray(pixels, { dtype: "uint32", shape: [rows, bins] });
    model(`${map.key}-image`).data = { image: [image], x: [map.first - 0.5], w: [bins * map.width] };
    const strip = element("map-colors").getContext("2d"), line = strip.createImageData(256, 10);
    const words = new Uint32Array(line.data.buffer);
    for (let y = 0; y < 10; y++) for (let x = 0; x < 256; x++) words[256 * y + x] = colour(table, x / 255);
    strip.putImageData(line, 0, 0);
    const ends = [least, most].map((code) => 10 ** (code / map.scale));
    element("map-low").textContent = relative ? "a tenth or less" : text(ends[0]);
    element("map-high").textContent = relative ? "10 times or more" : text(ends[1]);
  }

  const cursor = { row: map.start[1], bin: map.start[0] };
  if (data.reload && map.names.includes(kept.layer)) cursor.row = map.names.indexOf(kept.layer);
  if (data.reload && kept.relative === false) element("map-relative").checked = false;
  function tell() {
    const at = cursor.row * bins + cursor.bin, code = away[at];
    const times = lost[at] ? (high[at] === NONE ? "" : "; not finite in some of these steps") : code === NONE ? "" : `; ${text(10 ** (Math.abs(code) / map.scale))} times ${code < 0 ? "smaller" : "larger"} than before`;
    const range = lost[at] && high[at] === NONE ? "not finite" : low[at] === high[at] ? text(value(high[at])) : `${text(value(low[at]))} to ${text(value(high[at]))}`;
    element("map-told").textContent = "";
    const name = document.createElement("bdi");
    name.className = "name";
    name.textContent = map.names[cursor.row];
    element("map-told").append(layer(map.names[cursor.row]), name, `, ${steps(cursor.bin)}: ${range}${times}`);
  }
  function mark() { model(`${map.key}-cursor`).data = { x: [(begin(cursor.bin) + end(cursor.bin)) / 2], y: [rows - cursor.row - 0.5] }; }
  const told = document.createElement("span");
  told.className = "screen";
  told.textContent = " Click a cell of the map for another layer.";
  function choose() {
    const columns = { begin: [], end: [], low: [], mean: [], high: [], floor: [] }, from = cursor.row * bins;
    for (let bin = 0; bin < bins; bin++) {
      columns.begin.push(begin(bin));
      columns.end.push(end(bin));
      for (const [key, codes] of [["low", low], ["mean", mean], ["high", high]]) {
        columns[key].push(value(codes[from + bin]));
      }
      columns.floor.push(columns.low[bin] > 0 ? columns.low[bin] : columns.high[bin]); // a logarithmic axis has no zero
    }
    model(`${map.chosen}-0`).data = columns;
    kept.layer = map.names[cursor.row];
    const name = document.createElement("bdi");
    name.className = "name";
    name.textContent = map.names[cursor.row];
    element("chosen").textContent = "";
    element("chosen").append(layer(map.names[cursor.row]), name, `: median ${text(map.usual[cursor.row] ?? NaN)}.`, told);
  }
  function mapCsv() {
    const lines = ["layer,first_step,last_step,least,mean,greatest,not_finite"];
    for (let row = 0; row < rows; row++) for (let bin = 0; bin < bins; bin++) {
      const at = row * bins + bin;
      if (high[at] === NONE && !lost[at]) continue;
      const quoted = `"${map.names[row].replaceAll('"', '""')}"`;
      lines.push([quoted, begin(bin), end(bin), ...[low, mean, high].map((codes) => value(codes[at]).toPrecision(4)), lost[at]].join(","));
    }
    return lines.join("\n");
  }

  function move(event) {
    if (event.x === undefined || Number.isNaN(event.x)) return;
    const row = rows - 1 - Math.floor(event.y), bin = Math.floor((event.x - (map.first - 0.5)) / map.width);
    if (row < 0 || row >= rows || bin < 0 || bin >= bins) return;
    cursor.row = row;
    cursor.bin = bin;
    tell();
  }
  const figure = bokeh.roots().find((root) => root.name === map.key);
  figure.on_event("mousemove", move);
  figure.on_event("tap", (event) => { move(event); mark(); choose(); });
  const place = element(`plot-${map.key}`);
  place.tabIndex = 0;
  place.setAttribute("role", "application");
  place.setAttribute("aria-describedby", "map-told");
  place.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Enter: [0, 0] }[event.key];
    if (!by) return;
    event.preventDefault();
    cursor.row = Math.max(0, Math.min(rows - 1, cursor.row + by[0]));
    cursor.bin = Math.max(0, Math.min(bins - 1, cursor.bin + by[1]));
    tell();
    mark();
    if (event.key === "Enter") choose();
  });
  element("map-relative").addEventListener("change", () => { kept.relative = element("map-relative").checked; paint(); });
  paint();
  tell();
  choose();
  delete kept.layer; // until somebody chooses one
  ready();
})();
