"use strict";
// The page's scripts hand over what it shows by `report.table` and `report.images`; names of files and classes
// become text and nothing else.
const report = (() => {
  const at = id => document.getElementById(id);
  const collator = new Intl.Collator("en", { numeric: true });
  let table = null, columns = [], shown = [], page = 0, sorted = { key: "place", direction: 1 };

  // ------------------------------------------------------------ the columns

  // a row: file, outcome, class, before and how sure, after and how sure, drop, measures, pictures
  function take(head, rows) {
    const column = (place, missing) => Float64Array.from(rows, row => row[place] ?? missing);
    table = { ...head, file: rows.map(row => row[0]), pictures: rows.map(row => row[9]), place: Float64Array.from(rows.keys()) };
    ["outcome", "class", "before", "sureBefore", "after", "sureAfter", "drop"].forEach((name, k) => { table[name] = column(k + 1, NaN); });
    const number = value => value === false ? NaN : value ?? Infinity;
    table.measures = new Map(head.measures.map(([name], k) => [name, Float64Array.from(rows, row => number(row[8][k]))]));
    table.higher = new Map(head.measures);
    table.lowered = table.file.map(name => name.toLowerCase());
    table.loweredClasses = table.classes.map(name => name.toLowerCase());
  }

  // of each image, its place by that column; NaN, which is missing, comes last in either direction
  const ranks = new Map();
  function keys(key) {
    if (["place", "drop", "outcome"].includes(key)) return table[key];
    if (key.startsWith("measure ")) return table.measures.get(key.slice(8));
    if (!ranks.has(key)) {
      const places = placesOf(key === "file" ? table.file : table.classes);
      ranks.set(key, key === "file" ? places : table[key].map(k => places[k]));
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
  const nearerIfHigher = name => table.higher.get(name);
  const written = value => Number.isNaN(value) ? "–" : value === Infinity ? "infinite" : String(Number(value.toPrecision(3)));
  const fixed = value => Number.isNaN(value) ? "–" : value.toFixed(2);
  const kindOf = outcome => `outcome ${outcome.split(" ")[0]}`;

  function columnsShown() {
    const names = [...new Set(["PSNR dB", "SSIM", measure()])].filter(name => table.measures.has(name));
    return [
      { key: "file", title: "name" },
      { key: "class", title: "class", text: k => table.classes[table.class[k]] },
      { key: "outcome", title: "outcome", text: k => table.outcomes[table.outcome[k]] },
      { key: "before", title: "before", text: k => `${table.classes[table.before[k]]} ${fixed(table.sureBefore[k])}`, label: "before" },
      { key: "after", title: "after", text: k => `${table.classes[table.after[k]]} ${fixed(table.sureAfter[k])}`, label: "after" },
      { key: "drop", title: "confidence drop", text: k => fixed(table.drop[k]), number: true, label: "confidence drop" },
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
      if (real && !real[table.class[k]] || answer && !answer[table.after[k]]) continue;
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
    const sortable = [{ key: "place", title: "order of the run" }, ...columns];
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
    const pictures = ["clean", "adversarial"].map((kind, j) =>
      element("img", { loading: "lazy", decoding: "async", width: 64, height: 64, alt: `${table.file[k]}, ${kind}`, src: table.pictures[k][j] }));
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
      if (key === "outcome") cell.className = kindOf(text(k));
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

  const loaded = new Map();  // by the number of their script, promises of images; of many the last
  let arrived = null, opened = null;  // what a script handed over; the place of an image among those that are shown

  function images(number, given) {
    arrived = given;
    if (!table) loaded.set(number, Promise.resolve(given));  // as part of the page
  }
  function imagesOf(number) {
    if (!loaded.has(number)) {
      loaded.set(number, new Promise((resolve, reject) => {
        const script = element("script", { src: `${at("table").dataset.files}/images_${number}.js` });
        script.addEventListener("error", () => { loaded.delete(number); reject(new Error()); });
        script.addEventListener("load", () => { script.remove(); resolve(arrived); });
        document.head.append(script);
      }));
      if (loaded.size > 10) loaded.delete(loaded.keys().next().value);
    }
    return loaded.get(number);
  }

  async function open(place) {
    if (place < 0 || place >= shown.length) return;
    opened = place;
    const k = shown[place];
    at("opened-file").textContent = table.file[k];
    at("opened-outcome").textContent = table.outcomes[table.outcome[k]];
    at("opened-outcome").className = kindOf(table.outcomes[table.outcome[k]]);
    at("opened-class").textContent = `true class: ${table.classes[table.class[k]]}`;
    at("opened-place").textContent = `${(place + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
    at("opened-previous").disabled = place === 0;
    at("opened-next").disabled = place === shown.length - 1;
    at("opened-missing").hidden = true;
    if (!at("dialog").open) {
      at("dialog").showModal();
      at("opened-file").focus();
    } else if (document.activeElement === document.body || document.activeElement?.disabled) at("opened-file").focus();
    let of = null;
    try { of = (await imagesOf(Math.floor(k / table.each)))[k % table.each]; } catch { /* the page says so below */ }
    if (opened !== place || shown[place] !== k) return;  // another one was opened meanwhile
    show(k, of);
  }
  function show(k, of) {
    at("opened-missing").hidden = Boolean(of);
    at("opened-missing").textContent = "The details of this image cannot be read: write the page again.";
    ["clean", "adversarial", "difference"].forEach((kind, j) => {
      const image = at("compare").querySelector(`.${kind}`);
      image.alt = `${table.file[k]}, ${kind}`;
      image.src = table.pictures[k][j];
    });
    const predictions = of?.predictions ?? [];
    const sides = predictions.some(([,,, reconstructed]) => reconstructed) ? { before: 1, reconstructed: 3, after: 2 } : { before: 1, after: 2 };
    at("opened-class").textContent += of?.target ? `, target: ${of.target}` : "";
    at("opened-heads").replaceChildren(...["classifier", ...Object.keys(sides)].map(text => element("th", { scope: "col", textContent: text })));
    at("opened-predictions").replaceChildren(...predictions.map(of => element("tr", {},
      element("th", { scope: "row", textContent: of[0] }),
      ...Object.values(sides).map(side => element("td", { textContent: of[side] ?? "–" })))));
    at("opened-quality").replaceChildren(...(of?.quality ?? []).map(([name, value]) =>
      element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: written(value ?? Infinity) }))));
    at("opened-charts").replaceChildren(...(of?.curves ?? []).map(chart));
  }

  // ------------------------------------------------------------ its curves

  function drawn(name, attributes, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }
  function chart(of) {
    const left = 38, right = 254, top = 30, bottom = 112, last = of.x.length - 1, isLog = of.highest === null;
    const values = of.lines.flat().filter(value => value !== null).map(Math.log10);
    const [least, most] = values.length ? [Math.min(...values), Math.max(...values)] : [-1, -1];
    const low = isLog ? Math.floor(least) : 0, high = isLog ? Math.floor(most) + 1 : of.highest;
    const across = k => left + (right - left) * (last ? k / last : 0.5);
    const up = value => bottom - (bottom - top) * ((isLog ? Math.log10(value) : value) - low) / (high - low);
    const svg = drawn("svg", { viewBox: "0 0 260 128", role: "img", "aria-label": of.title });
    const text = (x, y, content, anchor = "start") => drawn("text", { x, y, "text-anchor": anchor }, content);
    const ends = isLog ? [`1e${low}`, `1e${high}`] : ["0", String(Number(high.toPrecision(2)))];
    svg.append(
      text(2, 10, of.title), drawn("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }),
      text(left - 4, bottom, ends[0], "end"), text(left - 4, top + 6, ends[1], "end"),
      text(left, bottom + 11, of.x[0]), text(right, bottom + 11, of.x[last], "end"));
    if (of.mark !== null) svg.append(drawn("line", { x1: across(of.mark - 1), x2: across(of.mark - 1), y1: top, y2: bottom, stroke: "#D55E00", "stroke-dasharray": "3 2" }));
    const legend = text(2, 22, "");
    of.lines.forEach((line, j) => {
      const [name, colour] = of.looks[j];
      if (name) legend.append(drawn("tspan", { fill: colour }, "\u25cf "), drawn("tspan", {}, `${name}\u2002`));
      if (line.length === 1 && last) {
        const width = (right - left) / of.x.length;
        svg.append(drawn("rect", { x: left + width * (j + 0.1), y: up(line[0]), width: 0.8 * width, height: bottom - up(line[0]), fill: colour }));
      } else svg.append(...polylines(line, across, up).map(points => drawn("polyline", { points, fill: "none", stroke: colour, "stroke-width": 1.5 })));
    });
    svg.append(legend);
    return svg;
  }
  function polylines(line, across, up) {  // with gaps where values are missing; a single point is a short dash
    const pieces = [[]];
    line.forEach((value, k) => {
      if (value === null) pieces.push([]); else pieces.at(-1).push([across(k), up(value)]);
    });
    return pieces.filter(piece => piece.length).map(piece => piece.length > 1 ? piece : [piece[0], [piece[0][0] + 2, piece[0][1]]])
      .map(piece => piece.map(point => point.map(value => value.toFixed(1)).join()).join(" "));
  }

  // ------------------------------------------------------------ what the dialog's keys do

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
    at("outcome").append(...table.outcomes.map((name, k) => element("option", { textContent: name, value: k })));
    const present = [...new Set(table.class)].map(k => table.classes[k]).sort(collator.compare).slice(0, 1000);
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

  return { table: take, images, start };
})();
