"use strict";
// The files of the page's folder call `report.columns` and `report.details`; names of files and classes become
// text and nothing else.
const report = (() => {
  const told = JSON.parse(document.getElementById("told").textContent);
  const at = id => document.getElementById(id);
  const outcomes = ["fooled", "not fooled", "wrong before"];
  const collator = new Intl.Collator("en", { numeric: true });
  let table = null, columns = [], shown = [], page = 0, sorted = { key: "index", direction: 1 };

  // ------------------------------------------------------------ the columns

  function take(given) {
    const numbers = of => Object.fromEntries(Object.entries(of).map(([name, values]) => [name, Float64Array.from(values)]));
    const measures = new Map(given.measures.map(([name, values]) => [name, Float64Array.from(values)]));
    const { index, outcome, class: real, before, after } = given.integers;
    table = { classes: given.classes, file: given.file, index, outcome, real, before, after, numbers: numbers(given.numbers), measures };
    table.lowered = given.file.map(name => name.toLowerCase());
    table.loweredClasses = given.classes.map(name => name.toLowerCase());
  }

  // of each image, its place by that column; NaN, which is missing, comes last in either direction
  const ranks = new Map();
  function keys(key) {
    if (key === "index") return table.index;
    if (key.startsWith("measure ")) return table.measures.get(key.slice(8));
    if (key === "drop") return table.numbers.drop;
    if (key === "outcome") return table.outcome;
    if (!ranks.has(key)) {
      if (key === "file") ranks.set(key, placesOf(table.file));
      else {
        const places = placesOf(table.classes), of = { class: table.real, before: table.before, after: table.after }[key];
        ranks.set(key, Float64Array.from(of, k => places[k]));
      }
    }
    return ranks.get(key);
  }
  function placesOf(names) {
    const order = names.map((_, k) => k).sort((a, b) => collator.compare(names[a], names[b]));
    const places = new Float64Array(names.length);
    order.forEach((k, place) => { places[k] = place; });
    return places;
  }

  const measure = () => at("measure").value;
  const nearerIfHigher = name => told.nearer[name.split(",")[0].split(" to ")[0]] !== "lower";
  const written = value => Number.isNaN(value) ? "–" : value === Infinity ? "infinite" : String(Number(value.toPrecision(3)));
  const fixed = value => Number.isNaN(value) ? "–" : value.toFixed(2);
  const said = kind => k => `${table.classes[table[kind][k]]} ${fixed(table.numbers[kind][k])}`;

  function columnsShown() {
    const names = [...new Set(["PSNR dB", "SSIM", measure()])].filter(name => table.measures.has(name));
    return [
      { key: "file", title: "name" },
      { key: "class", title: "class", text: k => table.classes[table.real[k]] },
      { key: "outcome", title: "outcome", text: k => outcomes[table.outcome[k]] },
      { key: "before", title: "before", text: said("before"), label: "before" },
      { key: "after", title: "after", text: said("after"), label: "after" },
      { key: "drop", title: "confidence drop", text: k => fixed(table.numbers.drop[k]), number: true, label: "confidence drop" },
      ...names.map(name => ({ key: `measure ${name}`, title: name, text: k => written(table.measures.get(name)[k]), number: true, label: name })),
    ];
  }

  // ------------------------------------------------------------ which images, in which order

  function filtered() {
    const name = at("name").value.toLowerCase(), outcome = at("outcome").value;
    const having = id => {
      const part = at(id).value.toLowerCase();
      return part && Uint8Array.from(table.loweredClasses, other => other.includes(part));
    };
    const real = having("class"), answer = having("answer"), values = table.measures.get(measure());
    const low = at("low").value === "" ? null : at("low").valueAsNumber, high = at("high").value === "" ? null : at("high").valueAsNumber;
    const found = [];
    for (let k = 0; k < table.file.length; k++) {
      if (outcome !== "" && table.outcome[k] !== Number(outcome)) continue;
      if (name && !table.lowered[k].includes(name)) continue;
      if (real && !real[table.real[k]] || answer && !answer[table.after[k]]) continue;
      if (low !== null && !(values[k] >= low) || high !== null && !(values[k] <= high)) continue;
      found.push(k);
    }
    return found;
  }
  function order(found) {
    const by = keys(sorted.key), direction = sorted.direction;
    const before = (a, b) => by[a] < by[b] ? -direction : by[a] > by[b] ? direction : 0;
    const last = k => Number.isNaN(by[k]) ? 1 : 0;
    return found.sort((a, b) => last(a) - last(b) || before(a, b) || a - b);
  }
  function arrange() {
    shown = order(filtered());
    at("count").textContent = `${shown.length.toLocaleString("en")} of ${table.file.length.toLocaleString("en")} images`;
    const visible = nearerIfHigher(measure()) ? 1 : -1, byVisibility = sorted.key === `measure ${measure()}`;
    at("most").setAttribute("aria-pressed", byVisibility && sorted.direction === visible);
    at("least").setAttribute("aria-pressed", byVisibility && sorted.direction === -visible);
    drawHeads();
    turnTo(0);
  }
  function sortBy(key, direction) {
    sorted = { key, direction };
    arrange();
  }
  const sortByVisibility = sign => sortBy(`measure ${measure()}`, nearerIfHigher(measure()) ? sign : -sign);

  // ------------------------------------------------------------ the table

  function element(name, properties = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in made && !key.startsWith("aria")) made[key] = value; else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }
  function drawHeads() {
    columns = columnsShown();
    const sortable = [{ key: "index", title: "order of the run" }, ...columns];
    at("sort").replaceChildren(...sortable.map(({ key, title }) => element("option", { value: key, textContent: title })));
    at("sort").value = sorted.key;
    at("direction").value = sorted.direction;
    const focused = document.activeElement?.closest("#heads th")?.dataset.key;
    at("heads").replaceChildren(element("th", { scope: "col", role: "columnheader", textContent: "clean, adversarial" }), ...columns.map(({ key, title }) => {
      const head = element("th", { scope: "col", role: "columnheader" });
      head.dataset.key = key;
      const button = element("button", { type: "button", textContent: title });
      if (sorted.key === key) {
        head.setAttribute("aria-sort", sorted.direction > 0 ? "ascending" : "descending");
        button.append(element("span", { "aria-hidden": true, textContent: sorted.direction > 0 ? "▲" : "▼" }));
      }
      button.addEventListener("click", () => sortBy(key, sorted.key === key ? -sorted.direction : 1));
      head.append(button);
      return head;
    }));
    if (focused) [...at("heads").children].find(head => head.dataset.key === focused)?.querySelector("button").focus();
  }
  const size = () => Number(at("size").value);
  const pages = () => Math.max(1, Math.ceil(shown.length / size()));
  const inFolders = (kind, number, ending) => `${told.files}/${kind}/${Math.floor(number / told.folder)}/${number}${ending}`;

  function turnTo(number) {
    page = Math.min(Math.max(0, number), pages() - 1);
    at("body").replaceChildren(...shown.slice(page * size(), (page + 1) * size()).map(rowOf));
    at("page").value = page + 1;
    at("page").max = pages();
    at("pages").textContent = pages().toLocaleString("en");
    at("first").disabled = at("previous").disabled = page === 0;
    at("next").disabled = at("last").disabled = page === pages() - 1;
  }
  function rowOf(k) {
    const source = inFolders("thumbnails", table.index[k], ".webp");
    const pictures = ["clean", "adversarial"].map(kind =>
      element("img", { loading: "lazy", decoding: "async", width: 64, height: 64, alt: `${table.file[k]}, ${kind}`, src: source }));
    const row = element("tr", { role: "row" }, element("td", { role: "cell", className: "pictures" }, element("div", { className: "pair" }, ...pictures)));
    row.dataset.place = k;
    for (const { key, text, number, label } of columns) {
      if (key === "file") {
        const button = element("button", { type: "button", textContent: table.file[k], "aria-haspopup": "dialog" });
        row.append(element("th", { scope: "row", role: "rowheader" }, button));
        continue;
      }
      const cell = element("td", { role: "cell", textContent: text(k) });
      if (number) cell.className = key.startsWith("measure") ? "number measured" : "number";
      if (key === "class" || key === "before" || key === "after") cell.className = "class";
      if (key === "outcome") cell.className = `outcome ${outcomes[table.outcome[k]].split(" ")[0]}`;
      if (label) cell.dataset.label = label;
      row.append(cell);
    }
    return row;
  }
  const buttonOf = place => at("body").children[place]?.querySelector("button");
  function goTo(place) {  // to the image of that place among all that are shown
    if (place < 0 || place >= shown.length) return;
    if (Math.floor(place / size()) !== page) turnTo(Math.floor(place / size()));
    const button = buttonOf(place % size());
    button.focus({ preventScroll: true });
    button.closest("tr").scrollIntoView({ block: "nearest" });
  }
  function turnByKey(number) {
    if (number === page || number < 0 || number >= pages()) return;
    turnTo(number);
    goTo(page * size());
  }
  function moveByKey(event) {
    const row = event.target.closest("#body tr");
    if (!row || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const place = page * size() + [...at("body").children].indexOf(row);
    const moves = {
      ArrowUp: () => goTo(place - 1), ArrowDown: () => goTo(place + 1),
      ArrowLeft: () => turnByKey(page - 1), ArrowRight: () => turnByKey(page + 1),
      Home: () => turnByKey(0), End: () => turnByKey(pages() - 1),
    };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    moves[event.key]();
  }

  // ------------------------------------------------------------ an image that is opened

  const loaded = new Map();  // what was read last of details, by the number of the file: promises of a map by index
  const waiting = new Map();
  let opened = null;  // its place among those that are shown

  function details(number, entries) {
    waiting.get(number)?.(new Map(entries.map(entry => [entry.index, entry])));
  }
  function detailsOf(k) {
    const number = Math.floor(table.index[k] / told.each);
    if (!loaded.has(number)) {
      loaded.set(number, new Promise((resolve, reject) => {
        waiting.set(number, resolve);
        const script = element("script", { src: inFolders("details", number, ".js") });
        script.addEventListener("error", () => { loaded.delete(number); reject(new Error()); });
        script.addEventListener("load", () => { waiting.delete(number); script.remove(); });
        document.head.append(script);
      }));
      if (loaded.size > 10) loaded.delete(loaded.keys().next().value);
    }
    return loaded.get(number).then(entries => entries.get(table.index[k]));
  }

  async function open(place) {
    if (place < 0 || place >= shown.length) return;
    opened = place;
    const k = shown[place];
    at("opened-file").textContent = table.file[k];
    at("opened-outcome").textContent = outcomes[table.outcome[k]];
    at("opened-outcome").className = `outcome ${outcomes[table.outcome[k]].split(" ")[0]}`;
    at("opened-class").textContent = `true class: ${table.classes[table.real[k]]}`;
    at("opened-place").textContent = `${(place + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
    at("opened-previous").disabled = place === 0;
    at("opened-next").disabled = place === shown.length - 1;
    at("opened-missing").hidden = true;
    if (!at("dialog").open) {
      at("dialog").showModal();
      at("opened-file").focus();
    } else if (document.activeElement === document.body || document.activeElement?.disabled) at("opened-file").focus();
    let of = null;
    try { of = await detailsOf(k); } catch { /* said below */ }
    if (opened !== place || shown[place] !== k) return;  // another one was opened meanwhile
    show(k, of);
  }
  function show(k, of) {
    at("opened-missing").hidden = Boolean(of);
    at("opened-missing").textContent = "The details of this image cannot be read: write the page again.";
    for (const [kind, name] of [["clean", "originImage"], ["adversarial", "adv_image"], ["difference", "diff_absolute"]]) {
      const image = at("compare").querySelector(`.${kind}`);
      image.alt = `${table.file[k]}, ${kind}`;
      if (of) image.src = `${of.pictures}${name}.png`; else image.removeAttribute("src");
    }
    const predictions = told.models.flatMap(model => of?.predictions.filter(([name]) => name === model) ?? []);
    const reconstructed = predictions.some(of => of[3]);
    const kinds = reconstructed ? ["before", "reconstructed", "after"] : ["before", "after"];
    at("opened-class").textContent += of?.target ? `, target: ${of.target}` : "";
    at("opened-heads").replaceChildren(...["classifier", ...kinds].map(text => element("th", { scope: "col", textContent: text })));
    at("opened-predictions").replaceChildren(...predictions.map(([model, before, after, between]) => element("tr", {},
      element("th", { scope: "row", textContent: model }),
      ...(reconstructed ? [before, between, after] : [before, after]).map(said =>
        element("td", { textContent: said ? said[2] ?? `${said[0]} ${fixed(said[1] ?? NaN)}` : "–" })))));
    at("opened-quality").replaceChildren(...(of?.quality ?? []).map(([name, value]) =>
      element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: written(value ?? Infinity) }))));
    at("opened-charts").replaceChildren(...(of?.charts ?? []).map(chart));
  }
  function drawn(name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }
  function chart(of) {  // as the macro of page_macros.html does
    const svg = drawn("svg", { viewBox: "0 0 260 120", role: "img", "aria-label": of.title });
    svg.append(
      drawn("text", { x: 38, y: 118 }, of.title), drawn("path", { class: "axis", d: "M38 8V92H254" }),
      drawn("text", { x: 34, y: 14, "text-anchor": "end" }, of.high), drawn("text", { x: 34, y: 92, "text-anchor": "end" }, of.low),
      drawn("text", { x: 38, y: 103 }, of.x[0]), drawn("text", { x: 254, y: 103, "text-anchor": "end" }, of.x[1]),
      ...(of.mark === null ? [] : [drawn("line", { x1: of.mark, x2: of.mark, y1: 8, y2: 92, stroke: "#D55E00", "stroke-dasharray": "3 2" })]),
      ...of.bars.map(([fill, x, y, width, height]) => drawn("rect", { x, y, width, height, fill })),
      ...of.lines.flatMap(([stroke, pieces]) => pieces.map(points => drawn("polyline", { points, fill: "none", stroke, "stroke-width": 1.5 }))));
    return svg;
  }
  function toggleDifference() {
    const differing = at("compare").classList.toggle("differing");
    at("difference").setAttribute("aria-pressed", differing);
  }
  function actInDialog(event) {
    if (!at("dialog").open || event.ctrlKey || event.metaKey || event.altKey) return;
    const isSlider = event.target === at("share") && !at("compare").classList.contains("differing");
    if (event.key === "ArrowLeft" && !isSlider) open(opened - 1);
    else if (event.key === "ArrowRight" && !isSlider) open(opened + 1);
    else if (event.key.toLowerCase() === "d" && !event.repeat) toggleDifference();
    else return;
    event.preventDefault();
  }

  // ------------------------------------------------------------ what the controls do

  function start() {
    if (!table) {
      at("missing").hidden = false;
      at("count").textContent = "";
      return;
    }
    at("measure").replaceChildren(...[...table.measures.keys()].map(name => element("option", { textContent: name, value: name })));
    if (table.measures.has("PSNR dB")) at("measure").value = "PSNR dB";
    at("measure").querySelector(":checked")?.setAttribute("selected", "");  // what a reset comes back to
    const present = [...new Set(table.real)].map(k => table.classes[k]).sort(collator.compare).slice(0, 1000);
    at("classes").replaceChildren(...present.map(name => element("option", { value: name })));

    at("most").addEventListener("click", () => sortByVisibility(1));
    at("least").addEventListener("click", () => sortByVisibility(-1));
    for (const id of ["sort", "direction"]) at(id).addEventListener("change", () => sortBy(at("sort").value, Number(at("direction").value)));
    at("filters").addEventListener("submit", event => event.preventDefault());
    at("filters").addEventListener("reset", () => setTimeout(() => at("measure").dispatchEvent(new Event("change"))));
    let typed = 0;
    at("filters").addEventListener("input", event => {
      if (event.target.matches("select")) return;
      clearTimeout(typed);
      typed = setTimeout(arrange, 150);
    });
    at("outcome").addEventListener("change", arrange);
    let last = measure();
    at("measure").addEventListener("change", () => {
      at("low").value = at("high").value = "";  // they were of the other measure
      if (sorted.key === `measure ${last}`) {  // the most visible stay first, or the least
        sorted = { key: `measure ${measure()}`, direction: nearerIfHigher(last) === nearerIfHigher(measure()) ? sorted.direction : -sorted.direction };
      }
      last = measure();
      arrange();
    });
    for (const [id, to] of [["first", () => 0], ["previous", () => page - 1], ["next", () => page + 1], ["last", () => pages() - 1]]) {
      at(id).addEventListener("click", () => {
        turnTo(to());
        at("table").scrollIntoView({ block: "nearest" });
        if (document.activeElement === document.body) at("page").focus({ preventScroll: true });  // the button is off now
      });
    }
    at("page").addEventListener("change", () => turnTo((at("page").valueAsNumber || 1) - 1));
    at("size").addEventListener("change", () => {
      const place = page * size();
      turnTo(Math.floor(place / size()));
    });
    at("body").addEventListener("click", event => {
      const row = event.target.closest("tr");
      if (row && (event.target.closest("button") || getSelection().isCollapsed)) open(page * size() + [...at("body").children].indexOf(row));
    });
    at("body").addEventListener("keydown", moveByKey);

    at("share").addEventListener("input", () => at("compare").style.setProperty("--at", `${at("share").value}%`));
    at("difference").addEventListener("click", toggleDifference);
    at("opened-previous").addEventListener("click", () => open(opened - 1));
    at("opened-next").addEventListener("click", () => open(opened + 1));
    at("close").addEventListener("click", () => at("dialog").close());
    at("dialog").addEventListener("click", event => {
      const { left, right, top, bottom } = at("dialog").getBoundingClientRect();
      const isInside = event.clientX >= left && event.clientX <= right && event.clientY >= top && event.clientY <= bottom;
      if (event.target === at("dialog") && !isInside) at("dialog").close();
    });
    document.addEventListener("keydown", actInDialog);  // a button that has gone off keeps no focus
    at("dialog").addEventListener("close", () => {
      goTo(opened);
      opened = null;
    });
    arrange();
    performance.mark("drawn");
  }

  return { columns: take, details, start };
})();
