"use strict";
// Draws the page from the data in its script elements. Text of models is only ever set as text (`make`), or
// through temml, which builds MathML elements and is told to trust nothing.

let run;                       // the main block: see slm/report/page.py
let groups = [];               // what the list shows: the episodes of one problem in one step
let shown = [];                // the groups that pass the filters
const details = [];            // place of an episode -> its conversation, as far as unpacked
const texts = [];              // the same in lower case, for the search
let unpacked = 0;              // how many of them
const state = {};              // what the address holds: see NAMES
const NAMES = ["step", "q", "only", "who", "reason", "sort", "open", "at", "n", "raw", "side", "color", "live"];
const DEFAULTS = {sort: "order", color: "none"};
const $ = id => document.getElementById(id);

// ---- small tools ----------------------------------------------------------------------------------------

// An element with properties and children; a string child becomes a text node.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && !name.includes("-")) element[name] = value;
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return element;
}

function draw(tag, attributes, ...children) {  // the same for SVG
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function unpack(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const percent = share => (100 * share).toFixed(1);
const signed = x => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(1);
const mean = values => values.reduce((sum, x) => sum + x, 0) / values.length;

function figure(x) {  // a number for people
  if (typeof x !== "number") return x === null || x === undefined ? "" : String(x);
  if (Number.isInteger(x)) return x.toLocaleString("en");
  return Math.abs(x) >= 0.0001 && Math.abs(x) < 1e5 ? String(Number(x.toPrecision(3))) : x.toExponential(1);
}

// ---- the state and the address ---------------------------------------------------------------------------

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of NAMES) state[name] = given.get(name) ?? DEFAULTS[name] ?? "";
}

// Changes the state. `step` back in the browser's history undoes what was opened, not each letter of a search.
function go(changes, remember = false) {
  Object.assign(state, changes);
  const told = NAMES.filter(name => state[name] !== (DEFAULTS[name] ?? "") && state[name] !== "");
  const address = new URLSearchParams(told.map(name => [name, state[name]])).toString();
  history[remember ? "pushState" : "replaceState"](null, "", "#" + address);
  update();
}

const only = () => state.only.split(".").filter(Boolean);

// ---- head, tables, settings --------------------------------------------------------------------------------

const KINDS = {grpo: "Reinforcement learning", sft: "Supervised fine-tuning", eval: "Evaluation", run: "Run",
  agents: "Agent workflows", data: "Training data", verifier: "Verifier data", compare: "Comparison"};

function drawHead() {
  $("kind").textContent = KINDS[run.kind] + (run.finished ? "" : " (not finished)");
  const meta = [run.started && `Started ${run.started}`, `written ${run.written}`].filter(Boolean).join(", ");
  $("meta").append(make("span", {}, meta));
  if (!run.finished) {
    const box = make("input", {type: "checkbox", checked: state.live === "1"});
    box.onchange = () => { go({live: box.checked ? "1" : ""}); watch(); };
    $("meta").append(make("label", {}, box, " reload every 30 s"));
  }
  if (run.command) $("meta").append(make("code", {}, run.command));
}

let timer;
function watch() {  // the page on disk is written anew while the run goes on
  clearTimeout(timer);
  if (!run.finished && state.live === "1") timer = setTimeout(() => location.reload(), 30000);
}

function drawNav() {
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    const button = make("button", {type: "button"}, section.querySelector("h2").textContent);
    button.onclick = () => section.scrollIntoView();
    $("nav").append(button);
  }
}

function drawTables() {
  for (const table of run.tables) {
    $("figures").append(make("div", {className: "wide"}, tableOf(table)));
    const told = table.columns.indexOf("tokens");
    if (table.columns.includes("p") && told > 0 && table.rows.length > 1) {
      $("figures").append(scatter(table.rows.map(row => ({name: row[0], x: row[told], ...row[2]}))));
    }
  }
  for (const name of ["source", "round", "teacher", "effort"]) {
    const rows = run.about.summary?.[name];
    if (run.kind === "data" && rows) $("figures").append(tree(rows, `By ${name}`));
  }
  $("figures").hidden = !run.tables.length;
}

function tableOf(table) {
  const head = make("tr", {}, ...table.columns.map(name => make("th", {scope: "col"}, name)));
  const columns = table.columns.map((_, k) => table.rows.map(row => row[k]));
  const body = table.rows.map(row => make("tr", {}, ...row.map((cell, k) =>
    k ? make("td", {}, ...cellOf(cell, columns[k])) : make("th", {scope: "row"}, figure(cell)))));
  return make("table", {}, make("caption", {}, table.title), make("thead", {}, head), make("tbody", {}, ...body));
}

function cellOf(cell, column) {
  if (cell === null || typeof cell !== "object") return [figure(cell)];
  if ("bar" in cell) {
    const meter = make("span", {className: "meter"});
    meter.style.width = `${180 * cell.bar / Math.max(...column.map(other => other.bar))}px`;
    return [figure(cell.bar), make("span", {className: "beside"}, meter)];
  }
  if ("share" in cell) return [`${percent(cell.share)} % (${percent(cell.low)}–${percent(cell.high)})`, forest(cell, column, "share")];
  return [`${signed(100 * cell.difference)} [${signed(100 * cell.low)}, ${signed(100 * cell.high)}]`,
          forest(cell, column, "difference")];
}

function forest(cell, column, name) {  // a dot on its interval; all of a column on one scale
  const cells = column.filter(other => other && typeof other === "object");
  const ends = cells.flatMap(other => [other.low, other.high]).concat(name === "difference" ? [0] : []);
  const low = Math.min(...ends), width = (Math.max(...ends) - low) || 1;
  const at = x => `${4 + 92 * (x - low) / width}%`;
  const line = make("i"), dot = make("b"), parts = [line, dot];
  line.style.left = at(cell.low);
  line.style.width = `${92 * (cell.high - cell.low) / width}%`;
  dot.style.left = at(cell[name]);
  if (name === "difference") {
    parts.unshift(make("u"));
    parts[0].style.left = at(0);
  }
  return make("span", {className: "forest", "aria-hidden": "true"}, ...parts);
}

function scatter(points) {  // accuracy against what it costs in tokens
  const width = 560, height = 230, left = 40, bottom = 26;
  const x = scale([0, ...points.map(p => p.x)], left, width - 150);
  const y = scale(points.flatMap(p => [p.low, p.high]), height - bottom, 12);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "accuracy against tokens"});
  svg.style.maxWidth = `${width}px`;
  for (const tick of y.ticks) svg.append(draw("line", {class: "rule", x1: left, x2: width - 150, y1: y(tick), y2: y(tick)}),
    draw("text", {x: left - 6, y: y(tick) + 3.5, "text-anchor": "end"}, `${Math.round(100 * tick)} %`));
  for (const tick of x.ticks) svg.append(draw("text", {x: x(tick), y: height - 10, "text-anchor": "middle"}, figure(tick)));
  svg.append(draw("text", {x: width - 150, y: height - 10, dx: 26}, "tokens an answer"));
  const placed = points.map(p => ({x: x(p.x) - 6, end: x(p.x) + 6, y: y(p.share) + 3.5}));  // what no label may hide
  const kindOf = p => p.name.split("@")[0], kinds = [...new Set(points.map(kindOf))];
  for (const kind of kinds) {  // one workflow with several budgets is one line
    const some = points.filter(p => kindOf(p) === kind).sort((a, b) => a.x - b.x);
    svg.append(draw("polyline", {points: some.map(p => `${x(p.x)},${y(p.share)}`).join(" "), fill: "none",
      style: `stroke: ${tone(kinds.indexOf(kind))}`}));
    some.at(-1).label = kind;
  }
  points.forEach(p => {
    const n = kinds.indexOf(kindOf(p));
    svg.append(draw("line", {x1: x(p.x), x2: x(p.x), y1: y(p.low), y2: y(p.high), style: `stroke: ${tone(n)}`, opacity: .6}),
      draw("circle", {cx: x(p.x), cy: y(p.share), r: 4, style: `fill: ${tone(n)}`}));
    if (!p.label) return;
    const label = {x: x(p.x) + 8, y: y(p.share) + 3.5, end: x(p.x) + 14 + 5.5 * p.label.length};
    while (placed.some(one => one.x < label.end && label.x < one.end && Math.abs(one.y - label.y) < 11)) label.y += 11;
    placed.push(label);
    svg.append(draw("text", {x: label.x, y: label.y, style: `fill: ${tone(n)}`}, p.label));
  });
  return make("div", {className: "wide scatter"}, make("h3", {}, "Right answers against tokens"), svg);
}

function drawAbout() {
  const parts = Object.entries(run.about).filter(([, value]) => value && Object.keys(value).length);
  for (const [name, value] of parts) {
    $("about").append(make("details", {}, make("summary", {}, name), tree(value)));
  }
  $("about").hidden = !parts.length;
}

function tree(value, title = "") {  // any JSON value
  if (Array.isArray(value)) {
    const many = value.length > 12 && value.every(x => typeof x !== "object");
    return make("span", {}, many ? `(${value.length} values)` : value.map(x => typeof x === "object" ? JSON.stringify(x) : String(x)).join(", "));
  }
  if (value === null || typeof value !== "object") return make("span", {}, figure(value));
  const inner = Object.values(value), flat = x => x !== null && typeof x === "object" && !Array.isArray(x)
    && Object.values(x).every(y => y === null || typeof y !== "object");
  if (inner.length && inner.every(flat)) {  // a dict of dicts: a row for each
    const columns = [...new Set(inner.flatMap(Object.keys))];
    return make("div", {className: "wide"}, tableOf({title, columns: ["", ...columns],
      rows: Object.entries(value).map(([name, row]) => [name, ...columns.map(one => row[one] ?? null)])}));
  }
  const rows = Object.entries(value).map(([name, inner]) => make("tr", {}, make("th", {}, name), make("td", {}, tree(inner))));
  return make("table", {className: "about"}, make("tbody", {}, ...rows));
}

// ---- curves ----------------------------------------------------------------------------------------------

const tone = n => `light-dark(hsl(${[212, 28, 150, 330, 265, 190, 90, 0][n % 8]} 50% 40%), hsl(${[212, 28, 150, 330, 265, 190, 90, 0][n % 8]} 60% 70%))`;
const panels = [];   // functions that put the cursor of each panel at a step

function scale(values, from, to) {  // a linear map with round ticks
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) [low, high] = [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)];
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find(step => step * power >= rough) * power;
  const map = x => from + (to - from) * (x - low) / (high - low);
  map.ticks = [];
  for (let k = Math.ceil(low / unit); k * unit <= high * (1 + 1e-9); k++) map.ticks.push(Number((k * unit).toPrecision(12)));
  map.inverse = place => low + (high - low) * (place - from) / (to - from);
  return map;
}

// The metrics that change (if none does: all), each with a line for every run or bunch of seeds.
function curves() {
  const rows = Object.values(run.metrics).flat(2), names = new Set(rows.flatMap(Object.keys));
  const parts = [...names].filter(name => /^(reward|solved)\//.test(name));  // of a part, or of a role
  const titles = {reward: run.headlines.reward, ...(parts.length > 1
    ? Object.fromEntries(parts.map(name => [name, name.replace("/", ": ")])) : {}), ...run.headlines};
  const found = Object.entries(titles).filter(([name]) => names.has(name)).map(([name, title]) => ({title,
    lines: Object.values(run.metrics).map((seeds, n) => ({n, ...together(seeds, name)})).filter(line => line.x.length)}));
  const moving = found.filter(({lines}) => new Set(lines.flatMap(line => line.y)).size > 1);
  return moving.length ? moving : found;
}

// A metric of some seeds: their mean at each step, with its interval or else the lowest and highest seed.
function together(seeds, name) {
  const at = new Map();
  for (const row of seeds.flat()) if (name in row) at.set(row.step, [...(at.get(row.step) ?? []), row]);
  const x = [...at.keys()].sort((a, b) => a - b), values = step => at.get(step).map(row => row[name]);
  const ends = ["low", "high"].map(end => x.map(step => at.get(step)[0][`${name}_${end}`]));
  if (seeds.length > 1) ends[0] = x.map(step => Math.min(...values(step))), ends[1] = x.map(step => Math.max(...values(step)));
  const whole = [...ends[0], ...ends[1]].every(value => value !== undefined);
  return {x, y: x.map(step => mean(values(step))), low: whole ? ends[0] : null, high: whole ? ends[1] : null};
}

function smooth(y) {  // a running mean over the last fifteenth
  const width = Math.max(1, Math.floor(y.length / 15));
  return y.map((_, k) => mean(y.slice(Math.max(0, k + 1 - width), k + 1)));
}

function drawCurves() {
  const found = curves(), labels = Object.keys(run.metrics);
  if (!found.length) return;
  $("curves").hidden = false;
  if (labels.length > 1) $("legend").append(...labels.map((label, n) => {
    const mark = make("i");
    mark.style.background = tone(n);
    return make("span", {}, mark, label);
  }));
  const steps = new Set(run.columns.step);
  $("curves").classList.toggle("jumps", steps.size > 1);
  $("curves").querySelector(".clickable").hidden = steps.size < 2;
  found.forEach((panel, n) => (n < 6 ? $("first") : $("more").lastElementChild).append(panelOf(panel, steps)));
  $("more").hidden = found.length <= 6;
  $("more").firstElementChild.textContent = `${found.length - 6} more curves`;
}

function panelOf({title, lines}, steps) {
  const width = 320, height = 128, left = 38, bottom = 110;
  const x = scale(lines.flatMap(line => line.x), left, width - 4);
  const y = scale(lines.flatMap(line => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]), bottom, 6);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": title});
  for (const tick of y.ticks) svg.append(draw("line", {class: "rule", x1: left, x2: width - 4, y1: y(tick), y2: y(tick)}),
    draw("text", {x: left - 6, y: y(tick) + 3.5, "text-anchor": "end"}, figure(tick)));
  const first = Math.min(...lines.flatMap(line => line.x[0])), last = Math.max(...lines.flatMap(line => line.x.at(-1)));
  svg.append(draw("text", {x: left, y: height - 4}, `step ${first}`),
             draw("text", {x: width - 4, y: height - 4, "text-anchor": "end"}, figure(last)));
  for (const line of lines) svg.append(...curveOf(line, x, y));
  const chosen = draw("line", {class: "chosen", y1: 6, y2: bottom, visibility: "hidden"});
  const cursor = draw("line", {class: "cursor", y1: 6, y2: bottom, visibility: "hidden"});
  svg.append(chosen, cursor);
  const ends = lines.map(line => `${figure(smooth(line.y)[0])} → ${figure(smooth(line.y).at(-1))}`);
  const value = make("output", {}, lines.length === 1 ? ends[0] : "");
  panels.push((kind, step) => {
    const mark = kind === "chosen" ? chosen : cursor;
    mark.setAttribute("visibility", step === null || step < first || step > last ? "hidden" : "visible");
    if (step === null) { if (kind === "cursor") value.textContent = lines.length === 1 ? ends[0] : ""; return; }
    for (const end of ["x1", "x2"]) mark.setAttribute(end, x(step));
    const there = lines.map(line => line.y[line.x.indexOf(step)]).filter(one => one !== undefined);
    if (kind === "cursor") value.textContent = `step ${step}: ${there.map(figure).join(", ") || "none"}`;
  });
  steer(svg, lines, x, width, steps);
  return make("div", {className: "panel"}, make("header", {}, make("h3", {title}, title), value), svg);
}

function curveOf(line, x, y) {
  const path = values => "M" + line.x.map((step, k) => `${x(step).toFixed(1)},${y(values[k]).toFixed(1)}`).join("L");
  const parts = [];
  if (line.low) {
    const back = line.x.map((step, k) => `${x(step).toFixed(1)},${y(line.low[k]).toFixed(1)}`).reverse().join("L");
    parts.push(draw("path", {class: "band", d: `${path(line.high)}L${back}Z`, style: `fill: ${tone(line.n)}`}));
  }
  if (line.x.length < 3) parts.push(...line.x.map((step, k) =>
    draw("circle", {cx: x(step), cy: y(line.y[k]), r: 2.5, style: `fill: ${tone(line.n)}`})));
  return [...parts, draw("path", {class: "raw", d: path(line.y), style: `stroke: ${tone(line.n)}`}),
          draw("path", {class: "smooth", d: path(smooth(line.y)), style: `stroke: ${tone(line.n)}`})];
}

// Pointer and arrow keys move one cursor over all panels; a click or Enter opens the step.
function steer(svg, lines, x, width, steps) {
  const all = [...new Set(lines.flatMap(line => line.x))].sort((a, b) => a - b);
  let at = null;
  const put = step => { at = step; panels.forEach(panel => panel("cursor", step)); };
  const choose = () => {
    if (at === null || !steps.has(at)) return;
    go({step: String(at), open: "", at: "", n: ""}, true);
    $("read").scrollIntoView();
  };
  svg.onpointermove = event => {
    const box = svg.getBoundingClientRect(), step = x.inverse((event.clientX - box.left) * width / box.width);
    put(all.reduce((best, one) => Math.abs(one - step) < Math.abs(best - step) ? one : best));
  };
  svg.onpointerleave = svg.onblur = () => put(null);
  svg.onclick = event => { svg.onpointermove(event); choose(); };
  svg.onkeydown = event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (move) put(all[Math.min(all.length - 1, Math.max(0, (at === null ? 0 : all.indexOf(at) + move)))]);
    else if (event.key === "Enter") choose();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
}

// ---- groups and filters ------------------------------------------------------------------------------------

const column = name => run.columns[name];
const has = (i, flag) => (column("flags")[i] & run.flags[flag]) > 0;

function buildGroups() {
  const known = new Map();
  run.columns.right.forEach((_, i) => {
    const key = `${column("problem")[i]}/${column("step")[i]}/${has(i, "discarded")}`;
    if (!known.has(key)) known.set(key, {problem: column("problem")[i], step: column("step")[i], members: []});
    known.get(key).members.push(i);
  });
  groups = [...known.values()];
  groups.forEach((group, place) => {
    const told = name => group.members.map(i => column(name)[i]).filter(x => x !== null);
    Object.assign(group, {place, rights: told("right"), rewards: told("reward"), tokens: told("tokens")});
    group.hits = group.members;
  });
}

// What a sort orders by, smallest first.
const SORTS = {
  order: ["in order", group => group.place],
  hardest: ["fewest right first", group => group.rights.length ? mean(group.rights) : 2],
  spread: ["most divided first", group => group.rights.length ? Math.abs(mean(group.rights) - 0.5) : 1],
  reward: ["highest reward first", group => group.rewards.length ? -mean(group.rewards) : Infinity],
  long: ["longest first", group => group.tokens.length ? -Math.max(...group.tokens) : 0],
  short: ["shortest first", group => group.tokens.length ? Math.min(...group.tokens) : Infinity],
};

const divided = group => new Set(group.rights).size > 1;

// A test for an episode, by the word on a button.
const labelled = word => word === "right" ? i => column("right")[i] === 1
  : word === "wrong" ? i => column("right")[i] === 0 : i => has(i, word);

function passes() {  // a test for an episode, from the state
  const wanted = only().filter(name => name !== "divided"), q = state.q.toLowerCase();
  const tests = wanted.map(labelled);
  if (state.who) tests.push(i => run.who[column("who")[i]] === state.who);
  if (state.reason) tests.push(i => run.reasons[column("reason")[i]] === state.reason);
  if (q) {
    const found = run.problems.map(([id, question]) => `${id}\n${question}`.toLowerCase().includes(q));
    tests.push(i => found[column("problem")[i]] || String(column("answer")[i] ?? "").toLowerCase().includes(q)
      || (texts[i] ?? "").includes(q));
  }
  return i => tests.every(test => test(i));
}

let filtered = null;
function filter() {
  const key = ["step", "q", "only", "who", "reason", "sort"].map(name => state[name]).join("\n") + unpacked;
  if (key === filtered) return;
  filtered = key;
  const test = passes(), both = only().includes("divided");
  shown = groups.filter(group => {
    if (state.step !== "" && group.step !== Number(state.step)) return false;
    if (both && !divided(group)) return false;
    group.hits = group.members.filter(test);
    return group.hits.length > 0;
  });
  const by = SORTS[state.sort]?.[1] ?? SORTS.order[1];
  shown = shown.map(group => [by(group), group]).sort((a, b) => a[0] - b[0] || a[1].place - b[1].place).map(([, group]) => group);
}

function drawBar() {
  const flags = Object.keys(run.flags).filter(name => run.columns.flags.some((_, i) => has(i, name)));
  const rights = new Set(run.columns.right);
  const names = [...(rights.has(1) ? ["right"] : []), ...(rights.has(0) ? ["wrong"] : []),
                 ...(groups.some(divided) ? ["divided"] : []), ...flags];
  for (const name of names) {
    const test = labelled(name), every = run.columns.right;
    const count = name === "divided" ? groups.filter(divided).length : every.filter((_, i) => test(i)).length;
    const chip = make("button", {type: "button", id: `only-${name.replaceAll(" ", "-")}`, "aria-pressed": "false"},
      name === "divided" && run.kind === "compare" ? "disagreement" : name, " ", make("small", {}, figure(count)));
    chip.onclick = () => {
      const now = only();
      go({only: (now.includes(name) ? now.filter(other => other !== name) : [...now, name]).join(".")});
    };
    $("chips").append(chip);
  }
  options("who", run.who.length > 1 ? run.who : [], "everyone");
  options("reason", run.reasons.length > 2 ? run.reasons.filter(Boolean).sort() : [], "any reason");
  options("sort", Object.keys(SORTS), null, name => SORTS[name][0]);
  $("step-label").hidden = new Set(run.columns.step).size < 2;
  $("q").oninput = () => go({q: $("q").value});
  $("step").oninput = () => go({step: $("step").value});
  $("bar").onsubmit = event => event.preventDefault();
}

function options(id, values, every, word = value => value) {
  $(id).hidden = !values.length;
  if (every) $(id).append(make("option", {value: ""}, every));
  $(id).append(...values.map(value => make("option", {value}, word(value).slice(0, 60))));
  $(id).onchange = () => go({[id]: $(id).value});
}

function syncBar() {
  for (const id of ["q", "step", "who", "reason", "sort"]) if ($(id).value !== state[id]) $(id).value = state[id];
  const now = only();
  for (const chip of $("chips").children) {
    chip.setAttribute("aria-pressed", now.some(name => chip.id === `only-${name.replaceAll(" ", "-")}`));
  }
  const hits = shown.reduce((sum, group) => sum + group.hits.length, 0), waiting = unpacked < run.columns.right.length;
  $("count").textContent = `${figure(shown.length)} of ${figure(groups.length)} problems, ${figure(hits)} episodes`
    + (state.q && waiting ? ", searching the replies …" : "");
}

// ---- the list ----------------------------------------------------------------------------------------------

const ROW = 58;  // its height, as in page.css

function dotOf(i, group) {
  const right = column("right")[i], reward = column("reward")[i];
  const dot = make("i", {className: "dot" + (right === 1 ? " full" : "") + (group.hits.includes(i) ? "" : " dim")
    + (has(i, "discarded") ? " gone" : ""), title: caption(i)});
  const [low, high] = run.range, share = reward === null || low === high ? right : (reward - low) / (high - low);
  if (share !== null) {
    dot.style.setProperty("--tone", `color-mix(in oklab, var(--right) ${Math.round(100 * share)}%, var(--wrong))`);
  }
  return dot;
}

// Why a group taught nothing.
function waste(group) {
  const i = group.members[0], same = `all ${column("right")[i] ? "right" : "wrong"}`;
  return has(i, "discarded") ? `discarded, another problem took its place: ${same}`
    : group.members.every(one => has(one, "no signal")) ? `no advantage: ${divided(group) ? "equal rewards" : same}` : "";
}

function caption(i) {  // an episode in a few words
  const reward = column("reward")[i], advantage = column("advantage")[i], tokens = column("tokens")[i];
  return [reward === null ? null : `reward ${figure(reward)}`, advantage === null ? null : `advantage ${figure(advantage)}`,
          tokens === null ? null : `${figure(tokens)} tokens`].filter(Boolean).join(", ");
}

function drawList() {
  const {scrollTop, clientHeight} = $("list");
  const first = Math.max(0, Math.min(shown.length - 1, Math.floor(scrollTop / ROW) - 4));
  const last = Math.min(shown.length, first + Math.ceil(clientHeight / ROW) + 9);
  $("rows").style.height = `${shown.length * ROW}px`;
  const now = opened();
  $("rows").replaceChildren(...shown.slice(first, last).map((group, k) => {
    const [id, question, gold] = run.problems[group.problem];
    const dots = group.members.slice(0, 16).map(i => dotOf(i, group));
    const more = group.members.length > 16 ? ` +${group.members.length - 16}` : "";
    const row = make("div", {className: "row", role: "option", "aria-selected": String(group === now)},
      make("p", {}, question.slice(0, 200) || id),
      make("p", {className: "under"}, make("span", {className: "dots"}, ...dots, more),
        group.step === null ? "" : make("span", {}, `step ${group.step}`),
        make("span", {}, gold === null ? id : String(gold).slice(0, 40))));
    row.style.top = `${(first + k) * ROW}px`;
    row.onclick = () => open(group, group.hits[0], true);
    return row;
  }));
}

function opened() {  // the group that is read; where there is room beside the list, the first one to begin with
  if (state.open === "") return innerWidth > 820 ? shown[0] ?? null : null;
  return groups.find(group => run.problems[group.problem][0] === state.open
    && String(group.step ?? "") === state.at && (state.n === "" || Number(state.n) < group.members.length)) ?? null;
}

function open(group, i, remember = false) {
  go({open: run.problems[group.problem][0], at: String(group.step ?? ""), n: String(group.members.indexOf(i))}, remember);
}

function move(by) {  // to the next or previous problem
  const place = shown.indexOf(opened()), next = shown[Math.max(0, place + by)];
  if (!next) return;
  open(next, next.hits[0]);
  const list = $("list"), top = shown.indexOf(next) * ROW;
  if (top < list.scrollTop || top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 3;
  if ($("detail").getBoundingClientRect().top < 0) $("read").scrollIntoView();
}

function turn(by) {  // to the next or previous sample of the problem
  const group = opened();
  if (group) open(group, group.members[(Number(state.n) + by + group.members.length) % group.members.length]);
}

// ---- the details -------------------------------------------------------------------------------------------

const loading = new Map();   // chunk -> promise
const arrivals = new Map();  // chunk -> what takes it, for chunks that lie in files beside the page

window.receive = (n, packed) => arrivals.get(n)(packed);

function chunk(n) {
  if (!loading.has(n)) loading.set(n, (async () => {
    const packed = run.beside ? await new Promise(resolve => {
      arrivals.set(n, resolve);
      document.body.append(make("script", {src: `${run.beside}/${n}.js`}));
    }) : $(`chunk-${n}`).textContent;
    (await unpack(packed)).forEach((detail, k) => {
      details[n * run.chunk + k] = detail;
      unpacked++;
      texts[n * run.chunk + k] = detail.turns.map(one => one.text).join("\n").toLowerCase();
    });
  })());
  return loading.get(n);
}

async function loadAll() {  // after the first paint, so that a search finds what was said
  if (unpacked === run.columns.right.length) return;
  if (run.beside && !state.q) return;  // files beside the page: only when somebody searches
  for (let n = 0; n < run.chunks; n++) await chunk(n);
  if (state.q) update();
}

let drawn = "";  // what the detail shows now
async function drawDetail() {
  const group = opened(), box = $("detail");
  document.body.classList.toggle("reading", group !== null);
  const key = group && [group.place, state.n, state.raw, state.side, state.color, group.hits.join()].join("\n");
  if (key === drawn) return;
  drawn = key;
  if (!group) return box.replaceChildren(make("p", {className: "empty"}, "Choose a problem to read what was said."));
  const n = state.open === "" ? group.members.indexOf(group.hits[0]) : Math.max(0, Number(state.n)), side = state.side === "1" && group.members.length > 1;
  const wanted = side ? group.members : [group.members[n]];
  const missing = wanted.filter(i => !details[i]).map(i => Math.floor(i / run.chunk));
  if (missing.length) {
    await Promise.all(missing.map(chunk));
    drawn = "";
    return drawDetail();  // the state may have changed meanwhile
  }
  const [id, question, gold, level, subject] = run.problems[group.problem];
  const episodes = make("div", {className: "episodes"}, ...wanted.map(i => episodeOf(i, gold, side)));
  episodes.style.setProperty("--across", side ? Math.min(3, wanted.length) : 1);
  box.classList.toggle("raw", state.raw === "1");
  box.replaceChildren(placeOf(group, [id, level && `level ${level}`.replace(/^level level/i, "level"), subject, group.step === null ? null : `step ${group.step}`]),
    make("div", {className: "said question"}, prose(question)),
    gold === null ? "" : make("p", {className: "gold"}, "Right answer: ", make("b", {}, formula(String(gold)))),
    make("p", {className: "note"}, waste(group)),
    group.members.length > 1 ? make("div", {className: "members"}, ...group.members.map((i, k) => memberOf(group, i, k === n && !side))) : "",
    episodes);
}

function placeOf(group, facts) {
  const back = make("button", {type: "button", className: "back"}, "← list");
  back.onclick = () => go({open: "", at: "", n: ""});
  const [before, after] = [["↑ previous", -1], ["↓ next", 1]].map(([word, by]) => {
    const button = make("button", {type: "button"}, word);
    button.onclick = () => move(by);
    return button;
  });
  const raw = toggle("raw text", "raw"), side = group.members.length > 1 ? toggle("side by side", "side") : "";
  return make("div", {className: "place"}, back, before, after, make("span", {}, facts.filter(Boolean).join(", ")),
    make("span", {className: "far"}), side, raw);
}

function toggle(word, name) {
  const button = make("button", {type: "button", "aria-pressed": String(state[name] === "1")}, word);
  button.onclick = () => go({[name]: state[name] === "1" ? "" : "1"});
  return button;
}

function memberOf(group, i, pressed) {
  const who = run.who[column("who")[i]], name = run.who.length > 1 ? who : `sample ${column("sample")[i]}`;
  const answer = column("answer")[i];
  const button = make("button", {type: "button", className: "member" + (group.hits.includes(i) ? "" : " dim"), "aria-pressed": String(pressed)},
    dotOf(i, group), make("span", {}, name), make("small", {}, answer === null ? "no answer" : `answer ${answer.slice(0, 24)}`), ...caption(i).split(", ").map(line => make("small", {}, line)));
  button.onclick = () => { state.side = ""; open(group, i); };
  return button;
}

function episodeOf(i, gold, named) {
  const right = column("right")[i], detail = details[i], reason = run.reasons[column("reason")[i]], answer = column("answer")[i];
  const word = right === null ? "Not judged" : right ? "Right" : "Wrong";
  const said = answer === null ? "no answer" : `answer ${answer}`;
  const facts = [caption(i), ...Object.entries(detail.parts ?? {}).map(([name, value]) => `${name} ${figure(value)}`),
    detail.first_answer && detail.first_answer !== answer ? `first answer ${detail.first_answer}` : null,
    ...Object.keys(run.flags).filter(name => has(i, name)), ...(detail.failures ?? [])];
  return make("div", {}, named ? make("h3", {}, run.who[column("who")[i]] || `sample ${column("sample")[i]}`) : "",
    make("p", {className: `verdict ${right === null ? "" : right ? "right" : "wrong"}`},
      `${word}: ${said}${reason && reason !== "right" ? ` (${reason})` : ""}`),
    make("p", {className: "facts"}, facts.filter(Boolean).join(", ")),
    ...(detail.records ? tokensOf(detail.records, column("advantage")[i]) : []),
    ...detail.turns.map(one => turnOf(one, detail.turns.length > 1 || one.asked.length > 0)));
}

function turnOf(one, named) {
  const asked = one.asked.map(text => fold(`prompt to the ${one.role}`, make("div", {className: "said"}, prose(text))));
  const runs = one.runs.flatMap(ran => [
    ran.code ? fold(`code that ran (${ran.seconds} s)`, make("pre", {}, ran.code)) : "",
    make("pre", {className: "out"}, ran.out || (ran.error ? "" : "(no output)"),
      ran.error ? make("span", {className: "bad"}, `${ran.out ? "\n" : ""}${ran.error}`) : "")]);
  return make("div", {className: "turn"}, named ? make("h4", {}, one.role) : "", ...asked,
    one.thinking ? fold("thinking", make("div", {className: "said"}, prose(one.thinking))) : "",
    make("div", {className: "said"}, prose(one.text)),
    one.finish === "length" ? make("p", {className: "note"}, "cut at the token limit") : "",
    one.error ? make("p", {className: "note"}, one.error) : "", ...runs);
}

const fold = (title, ...children) => make("details", {className: "fold"}, make("summary", {}, title), ...children);

// ---- text with formulas ------------------------------------------------------------------------------------

// Thinking, code, formulas, bold. A $ that stands before a blank or a digit ends no formula: it is money.
const MARKS = new RegExp([/<think>[\s\S]*?(?:<\/think>|$)/, /```[\s\S]*?(?:```|$)/, /\$\$[\s\S]+?\$\$/,
  /\\\[[\s\S]+?\\\]/, /\\\([\s\S]+?\\\)/, /\$(?=\S)(?:[^$\n]*?[^\s$\\])\$(?!\d)/,
  /\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}/, /\*\*[^*\n]+\*\*/].map(one => one.source).join("|"), "g");

function prose(text) {
  const found = document.createDocumentFragment();
  if (state.raw === "1") {
    found.append(text);
    return found;
  }
  let end = 0;
  for (const match of text.matchAll(MARKS)) {
    found.append(text.slice(end, match.index), marked(match[0]));
    end = match.index + match[0].length;
  }
  found.append(text.slice(end));
  return found;
}

function marked(text) {
  if (text.startsWith("<think>")) return fold("thinking", make("div", {className: "said"}, prose(text.slice(7).replace(/<\/think>$/, "").trim())));
  if (text.startsWith("```")) return make("pre", {}, text.replace(/^```\w*\n?/, "").replace(/\n?```$/, ""));
  if (text.startsWith("**")) return make("span", {className: "bold"}, text.slice(2, -2));
  if (text.startsWith("\\boxed")) return formula(text);
  const wide = text.startsWith("$$") || text.startsWith("\\["), cut = wide || text.startsWith("\\(") ? 2 : 1;
  return formula(text.slice(cut, -cut), wide);
}

function formula(tex, wide = false) {
  const place = make("span", {className: wide ? "display" : ""});
  if (state.raw === "1" || tex.length > 3000) return make("span", {}, tex);
  try {
    temml.render(tex, place, {displayMode: wide, trust: false, throwOnError: true, maxExpand: 200, maxSize: [20, 20]});
  } catch {
    place.replaceChildren(tex);  // what can't be typeset stays as it was written
  }
  return place;
}

// ---- tokens ------------------------------------------------------------------------------------------------

// Colouring -> [the value of a token, the ends of the scale, what the colours mean].
const COLORS = {
  "log-prob": [t => t.logp, [-4, 0], "dark: the sampler found the token unlikely (−4 or less)"],
  ratio: [t => t.ratio === null ? null : Math.log(t.ratio), [-0.2, 0.2], "red: the trainer finds it less likely than the sampler, green: more (0.8 to 1.2)"],
  advantage: [t => t.advantage, [-2, 2], "green: made more likely by this step, red: less (−2 to 2)"],
  mask: [t => t.mask, [0, 1], "marked: trained"],
};

function tokensOf(records, advantage) {
  const bar = make("div", {className: "place colors"}, "tokens by");
  const there = {ratio: records.some(r => r.old?.length), advantage: advantage !== null || records.some(r => r.advantage || r.teacher?.length)};
  for (const name of Object.keys(COLORS).filter(name => there[name] ?? true)) {
    const button = make("button", {type: "button", "aria-pressed": String(state.color === name)}, name);
    button.onclick = () => go({color: state.color === name ? "none" : name});
    bar.append(button);
  }
  if (!COLORS[state.color]) return [bar];
  const readout = make("p", {className: "readout"}, "Point at a token.");
  return [bar, make("p", {className: "hint"}, COLORS[state.color][2]), readout,
          ...records.map(record => coloured(record, advantage, state.color, readout))];
}

function coloured(record, advantage, color, readout) {
  const [value, [low, high]] = COLORS[color], box = make("div", {className: "tokens"});
  let k = -1;  // place among the trained tokens: the trainer's numbers are only there
  const tokens = record.text.map((text, place) => {
    const mask = record.mask[place];
    k += mask;
    const logp = mask ? record.logp?.[k] ?? null : null, old = mask ? record.old?.[k] ?? null : null;
    return {text, mask, logp, old, ratio: logp === null || old === null ? null : Math.exp(old - logp),
            advantage: mask ? record.teacher?.[k] ?? record.advantage?.[k] ?? advantage : null};
  });
  box.append(...tokens.map(token => {
    const span = make("span", {}, token.text), x = value(token);
    if (x !== null && x !== undefined) span.style.background = shade(Math.min(1, Math.max(0, (x - low) / (high - low))), color);
    return span;
  }));
  box.onpointerover = event => {
    const token = tokens[[...box.children].indexOf(event.target)];
    if (token && readout) readout.textContent = aboutToken(token);
  };
  return box;
}

function aboutToken(t) {
  const facts = [t.mask ? "trained" : "not trained", t.logp === null ? null : `log-prob ${t.logp} (probability ${percent(Math.exp(t.logp))} %)`,
    t.old === null ? null : `trainer's log-prob ${t.old}`, t.ratio === null ? null : `ratio ${t.ratio.toFixed(3)}`,
    t.advantage === null ? null : `advantage ${figure(t.advantage)}`];
  return `${JSON.stringify(t.text)}: ${facts.filter(Boolean).join(", ")}`;
}

function shade(share, color) {
  if (color === "mask") return share ? "color-mix(in oklab, var(--right) 28%, transparent)" : "none";
  if (color === "log-prob") return `color-mix(in oklab, var(--warm) ${Math.round(70 * (1 - share))}%, transparent)`;
  const strength = Math.round(Math.abs(share - 0.5) * 140);
  return `color-mix(in oklab, var(--${share > 0.5 ? "right" : "wrong"}) ${strength}%, transparent)`;
}

// ---- keys, start -------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return document.activeElement.blur(), go({open: "", at: "", n: ""});
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || $("read").hidden) return;
  const listed = event.target === $("list");
  const colors = ["none", ...Object.keys(COLORS)];
  const act = {
    j: () => move(1), k: () => move(-1), ArrowRight: () => turn(1), ArrowLeft: () => turn(-1),
    "/": () => { $("q").focus(); $("read").scrollIntoView(); }, r: () => go({raw: state.raw === "1" ? "" : "1"}),
    s: () => go({side: state.side === "1" ? "" : "1"}),
    c: () => go({color: colors[(colors.indexOf(state.color) + 1) % colors.length]}),
    ...(listed ? {ArrowDown: () => move(1), ArrowUp: () => move(-1)} : {}),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function update() {
  if ($("read").hidden) return;
  if (state.q) loadAll();
  filter();
  syncBar();
  drawList();
  drawDetail();
  panels.forEach(panel => panel("chosen", state.step === "" ? null : Number(state.step)));
}

async function start() {
  run = await unpack($("main").textContent);
  const rewards = run.columns.reward.filter(x => x !== null);
  run.range = [rewards.reduce((a, b) => Math.min(a, b), Infinity), rewards.reduce((a, b) => Math.max(a, b), -Infinity)];
  readAddress();
  drawHead();
  drawTables();
  drawCurves();
  drawAbout();
  if (run.tokens.text) {
    $("trained").hidden = false;
    $("trained").lastElementChild.replaceWith(coloured(run.tokens, null, "mask", null));
  }
  $("read").hidden = !run.columns.right.length;
  if (!$("read").hidden) {
    buildGroups();
    drawBar();
  }
  drawNav();
  update();
  if (state.open) $("read").scrollIntoView();
  $("list").onscroll = drawList;
  window.onresize = drawList;
  window.onkeydown = onKey;
  window.onhashchange = window.onpopstate = () => { readAddress(); update(); };
  watch();
  document.body.dataset.ready = "1";
  requestAnimationFrame(() => setTimeout(loadAll, 50));
}

start();
