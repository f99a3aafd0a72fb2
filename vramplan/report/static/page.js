// The picture of one optimizer step. All numbers are those in the element "data"; nothing is loaded, nothing invented.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const GIB = 2 ** 30, MIB = 2 ** 20, KIB = 2 ** 10;
  const TENSORS = 12; // listed at a point
  const PHASE_PIXELS = 66; // at least, for its name

  function fixed(value, digits) { // as Python rounds: 16.25 is 16.2, where toFixed says 16.3
    const scaled = value * 10 ** digits, floor = Math.floor(scaled);
    return ((scaled - floor === 0.5 ? floor + (floor % 2) : Math.round(scaled)) / 10 ** digits).toFixed(digits);
  }

  const human = (size) =>
    Math.abs(size) >= GIB ? `${fixed(size / GIB, 2)} GiB`
      : Math.abs(size) >= MIB ? `${fixed(size / MIB, 1)} MiB`
        : Math.abs(size) >= KIB ? `${fixed(size / KIB, 1)} KiB` : `${size} B`;
  const count = (number) => number.toLocaleString("en-US");

  // ------------------------------------------------------------------------------------------------- the step
  // kinds: [name, group, bytes, rows, columns, dtype]; an event +k is the birth of a tensor of kinds[k - 1], -k a death.
  const kinds = data.kinds;
  const events = [], passages = []; // passages: {phase, layer, first, end} in points
  for (const [phase, layer, section] of data.passages) {
    const first = events.length + 1;
    for (const event of data.sections[section]) events.push(event);
    passages.push({ phase: data.phases[phase], layer, first, end: events.length + 1 });
  }
  const points = events.length + 1;
  const levels = data.groups.map(() => new Float64Array(points));
  const totals = new Float64Array(points);
  const now = data.groups.map(() => 0);
  for (const k of data.resident) now[kinds[k - 1][1]] += kinds[k - 1][2];
  const tails = new Map(data.tails); // point -> bytes from there on
  const overhead = data.groups.findIndex((group) => group.name === "overhead");
  for (let point = 0, tail = 0; point < points; point++) {
    if (point > 0) {
      const event = events[point - 1], kind = kinds[Math.abs(event) - 1];
      now[kind[1]] += event > 0 ? kind[2] : -kind[2];
    }
    tail = tails.get(point) ?? tail;
    for (let group = 0; group < now.length; group++) {
      levels[group][point] = now[group] + (group === overhead ? tail : 0);
      totals[point] += levels[group][point];
    }
  }
  const peak = totals.indexOf(totals.reduce((a, b) => Math.max(a, b)));
  const stretches = [];
  for (const { phase, first, end } of passages) {
    const last = stretches.at(-1);
    if (last && last.phase === phase) last.end = end;
    else stretches.push({ phase, first: stretches.length ? first : 0, end });
  }

  function passageAt(point) {
    let low = 0, high = passages.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (point < passages[middle].end) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  function liveAt(point) {
    const counts = new Int32Array(kinds.length + 1);
    for (const k of data.resident) counts[k] += 1;
    for (let at = 0; at < point; at++) {
      const event = events[at];
      if (event > 0) counts[event] += 1;
      else counts[-event] -= 1;
    }
    const found = [];
    counts.forEach((many, k) => many && found.push({ kind: kinds[k - 1], many, bytes: many * kinds[k - 1][2] }));
    return found.sort((a, b) => b.bytes - a.bytes);
  }

  // -------------------------------------------------------------------------------------------- words and cells
  function cell(row, text, className) {
    const td = document.createElement("td");
    td.textContent = text;
    if (className) td.className = className;
    row.append(td);
    return td;
  }

  const swatch = (colour) => {
    const mark = document.createElement("span");
    mark.className = "swatch";
    mark.style.background = colour;
    return mark;
  };
  const shapeOf = ([, , , rows, columns, dtype]) => (dtype ? ` ${count(rows)} × ${count(columns)} ${dtype}` : "");
  const where = ({ phase, layer }) => (layer >= 0 ? `${phase} of layer ${layer}` : phase);

  let shown = -1, kept = peak;

  function show(point, speak) {
    if (point === shown && !speak) return;
    shown = point;
    const place = passages[passageAt(point)];
    const isPeak = point === peak ? ", the peak" : "";
    const title = `${human(totals[point])}, ${where(place)}${isPeak}`;
    $("point-title").textContent = title;
    const event = point ? events[point - 1] : 0, kind = event ? kinds[Math.abs(event) - 1] : null;
    const what = kind ? `${event > 0 ? "+" : "−"} ${human(kind[2])} ${kind[0]}` : "as the step begins";
    $("point-event").textContent = `Point ${count(point)} of ${count(points - 1)}: ${what}`;
    const groups = $("point-groups").tBodies[0];
    groups.replaceChildren();
    for (let group = data.groups.length - 1; group >= 0; group--) {
      const row = groups.insertRow();
      cell(row, data.groups[group].name).prepend(swatch(data.groups[group].colour));
      cell(row, human(levels[group][point]), "n");
    }
    const tensors = $("point-tensors").tBodies[0], live = liveAt(point);
    tensors.replaceChildren();
    for (const { kind: of, many, bytes } of live.slice(0, TENSORS)) {
      const row = tensors.insertRow();
      const name = cell(row, (many > 1 ? `${many} × ` : "") + of[0]);
      name.prepend(swatch(data.groups[of[1]].colour));
      const shape = document.createElement("span");
      shape.className = "shape";
      shape.textContent = shapeOf(of);
      name.append(shape);
      cell(row, human(bytes), "n");
    }
    const rest = live.slice(TENSORS);
    if (rest.length) {
      const row = tensors.insertRow();
      cell(row, `${count(rest.length)} more kinds`, "dim");
      cell(row, human(rest.reduce((sum, item) => sum + item.bytes, 0)), "n dim");
    }
    const slider = $("chart");
    slider.setAttribute("aria-valuenow", String(point));
    slider.dataset.bytes = String(totals[point]);
    if (speak) slider.setAttribute("aria-valuetext", `${title}. ${what}. Largest: ${live[0].kind[0]}`);
  }

  // ------------------------------------------------------------------------------------------------ the picture
  const visible = data.groups.map(() => true);
  let fromZero = data.bottom === 0, part = -1, plot = null, places = [], ends = [];
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawnCards = data.cards.filter((card) => card.drawn);

  function layout(pixels) { // phases by their events, none too narrow for its name
    const least = Math.min(PHASE_PIXELS / pixels, 0.8 / stretches.length);
    const shares = stretches.map(({ first, end }) => (end - first) / points);
    const small = shares.filter((share) => share < least);
    const left = 1 - small.length * least, large = 1 - small.reduce((a, b) => a + b, 0);
    places = new Float64Array(points);
    ends = [];
    let at = 0;
    stretches.forEach(({ first, end }, index) => {
      const width = shares[index] < least ? least : (shares[index] / large) * left;
      for (let point = first; point < end; point++) places[point] = at + ((point - first) / (end - first)) * width;
      ends.push([at, at + width]);
      at += width;
    });
  }

  function stacked() { // from the top of the stack to the bottom: each is painted over the one before
    const series = [], sum = new Float64Array(points + 1);
    data.groups.forEach((_, group) => {
      if (visible[group]) for (let point = 0; point < points; point++) sum[point] += levels[group][point];
      sum[points] = sum[points - 1];
      series.unshift(sum.slice());
    });
    return [[...places, 1], ...series];
  }

  function reach() {
    const weights = data.groups.findIndex((group) => group.name === "weights");
    const all = visible.every(Boolean);
    let top = 1;
    for (let point = 0; point < points; point++) {
      let sum = 0;
      for (let group = 0; group < levels.length; group++) if (visible[group]) sum += levels[group][point];
      top = Math.max(top, sum);
    }
    for (const card of drawnCards) if (all) top = Math.max(top, card.usable_bytes);
    const bottom = fromZero || !visible[weights] ? 0 : data.bottom;
    return [bottom, bottom + (top - bottom) * 1.06];
  }

  function ticks(low, high) {
    const unit = high - low > GIB ? GIB : MIB, least = (high - low) / unit / 6;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least * 0.999) * unit;
    const found = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(tick);
    return found;
  }

  function decorate(u) {
    const { ctx, bbox } = u, ratio = devicePixelRatio;
    const px = (size) => size * ratio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top - px(20), bbox.width, bbox.height + px(50));
    ctx.clip();
    ctx.font = `${px(12)}px system-ui, sans-serif`;
    ctx.textBaseline = "alphabetic";
    ctx.lineWidth = px(1);
    const right = bbox.left + bbox.width, low = bbox.top + bbox.height;
    stretches.forEach(({ phase }, index) => {
      const [begin, end] = ends[index].map((value) => u.valToPos(value, "x", true));
      ctx.strokeStyle = style("--dim");
      ctx.globalAlpha = 0.5;
      line(ctx, begin, bbox.top, begin, low + px(5), []);
      ctx.globalAlpha = 1;
      const from = Math.max(begin, bbox.left) + px(4);
      ctx.fillStyle = style("--text");
      ctx.textAlign = "left";
      if (ctx.measureText(phase).width < Math.min(end, right) - from) ctx.fillText(phase, from, low + px(17));
    });
    const within = (size) => size >= u.scales.y.min && size <= u.scales.y.max;
    for (const [phase, measured] of data.measured) {
      stretches.forEach((stretch, index) => {
        if ((data.measured_as[stretch.phase] ?? stretch.phase) !== phase || !within(measured)) return;
        const [begin, end] = ends[index].map((value) => u.valToPos(value, "x", true));
        const at = u.valToPos(measured, "y", true);
        ctx.strokeStyle = style("--text");
        ctx.lineWidth = px(2);
        line(ctx, begin, at, end, at, [px(2), px(3)]);
      });
    }
    let before = Infinity, side = 0;
    for (const card of drawnCards) {
      if (!visible.every(Boolean) || !within(card.usable_bytes)) continue;
      const at = u.valToPos(card.usable_bytes, "y", true);
      ctx.strokeStyle = style(card.verdict === "does_not_fit" ? "--refused" : "--fits");
      ctx.lineWidth = px(1.5);
      line(ctx, bbox.left, at, right, at, [px(7), px(4)]);
      side = before - at < px(16) ? 1 - side : 0; // two that are close: one label left, one right
      before = at;
      ctx.textAlign = side ? "left" : "right";
      label(ctx, `${card.gpu}: ${human(card.usable_bytes)} usable`, side ? bbox.left + px(6) : right - px(4), at - px(5));
    }
    if (visible.every(Boolean)) {
      const x = u.valToPos(places[peak], "x", true), y = u.valToPos(totals[peak], "y", true);
      ctx.fillStyle = "#d55e00";
      ctx.beginPath();
      ctx.arc(x, y, px(4), 0, 7);
      ctx.fill();
      ctx.textAlign = x > (bbox.left + right) / 2 ? "right" : "left";
      label(ctx, `peak ${human(totals[peak])}`, x + px(ctx.textAlign === "left" ? 8 : -8), y - px(5));
    }
    ctx.restore();
  }

  function label(ctx, text, x, y) { // readable on whatever lies below
    ctx.lineWidth = 3 * devicePixelRatio;
    ctx.lineJoin = "round";
    ctx.setLineDash([]);
    ctx.strokeStyle = style("--ground");
    ctx.strokeText(text, x, y);
    ctx.fillStyle = style("--text");
    ctx.fillText(text, x, y);
  }

  function line(ctx, x0, y0, x1, y1, dash) {
    ctx.setLineDash(dash);
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
  }

  const pointsFrom = (value) => { // the first point at or after a place
    let low = 0, high = points;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (places[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  };

  function underPointer(u) { // the highest of all points that share this column of pixels
    const low = pointsFrom(u.posToVal(u.cursor.left - 0.5, "x"));
    const high = pointsFrom(u.posToVal(u.cursor.left + 0.5, "x"));
    let best = Math.min(Math.max(low - (low === high ? 1 : 0), 0), points - 1);
    for (let point = low; point < high; point++) if (totals[point] > totals[best]) best = point;
    return best;
  }

  function build() {
    const box = $("chart"), width = Math.floor(box.clientWidth);
    const height = Math.round(Math.min(Math.max(width * 0.52, 300), 560));
    layout(Math.max(width - 60, 100));
    const grid = { stroke: style("--line"), width: 1 }, text = style("--text");
    plot?.destroy();
    plot = new uPlot({
      width, height,
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false } },
      scales: { x: { time: false, range: (u, min, max) => [min, max] }, y: { range: reach } },
      padding: [22, 8, 0, 0],
      axes: [
        { size: 26, values: () => [], splits: () => [], grid: { show: false }, ticks: { show: false } },
        {
          size: 52, stroke: text, grid, ticks: { show: false }, font: "12px system-ui, sans-serif",
          splits: (u, axis, min, max) => ticks(min, max),
          values: (u, found) => {
            const unit = u.scales.y.max - u.scales.y.min > GIB ? [GIB, "GiB"] : [MIB, "MiB"];
            return found.map((tick, at) => String(Math.round((tick / unit[0]) * 100) / 100) + (at ? "" : ` ${unit[1]}`));
          },
        },
      ],
      series: [{}, ...[...data.groups].reverse().map((group) => ({
        fill: group.colour, width: 0, points: { show: false }, paths: uPlot.paths.stepped({ align: 1 }),
      }))],
      hooks: {
        draw: [decorate],
        setCursor: [(u) => show(u.cursor.left >= 0 ? underPointer(u) : kept, false)],
      },
    }, stacked(), box);
    zoom(part);
    moveCursor();
  }

  function moveCursor() {
    const left = plot.valToPos(places[kept], "x");
    const seen = left >= 0 && left <= plot.over.clientWidth;
    plot.setCursor({ left: seen ? left : -10, top: seen ? 0 : -10 }, false);
    show(kept, false);
  }

  function keep(point, speak) {
    kept = Math.min(Math.max(point, 0), points - 1);
    const place = places[kept], { min, max } = plot.scales.x;
    if (place < min || place > max) zoom(-1);
    moveCursor();
    show(kept, speak);
  }

  // -------------------------------------------------------------------------------------------------- controls
  function button(text, pressed, press) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", () => press(made));
    return made;
  }

  function restack() {
    plot.setData(stacked(), false);
    zoom(part);
  }

  function zoom(index) {
    part = index;
    const [min, max] = index < 0 ? [0, 1] : ends[index];
    plot.batch(() => {
      plot.setScale("x", { min, max });
      const [low, high] = reach();
      plot.setScale("y", { min: low, max: high });
    });
    [...$("zoom").querySelectorAll("[data-part]")].forEach((made) =>
      made.setAttribute("aria-pressed", String(Number(made.dataset.part) === index)));
  }

  function controls() {
    for (let group = data.groups.length - 1; group >= 0; group--) {
      const made = button(data.groups[group].name, true, (self) => {
        visible[group] = !visible[group];
        self.setAttribute("aria-pressed", String(visible[group]));
        restack();
      });
      made.prepend(swatch(data.groups[group].colour));
      $("legend").append(made);
    }
    const seen = new Map(); // a phase that comes again is numbered
    const parts = stretches.map(({ phase }, index) => {
      seen.set(phase, (seen.get(phase) ?? 0) + 1);
      return [seen.get(phase) > 1 ? `${phase} ${seen.get(phase)}` : phase, index];
    });
    [["whole step", -1], ...parts].forEach(([name, index]) => {
      const made = button(name, index < 0, () => zoom(index));
      made.dataset.part = index;
      $("zoom").append(made);
    });
    if (data.bottom) {
      $("zoom").append(button("axis from zero", false, (self) => {
        fromZero = !fromZero;
        self.setAttribute("aria-pressed", String(fromZero));
        restack();
      }));
    }
    $("controls").hidden = $("point").hidden = false;
  }

  const moves = {
    ArrowLeft: () => kept - 1, ArrowRight: () => kept + 1, ArrowDown: () => kept - 1, ArrowUp: () => kept + 1,
    Home: () => 0, End: () => points - 1, p: () => peak, P: () => peak,
    PageUp: () => passages[Math.max(passageAt(kept) - 1, 0)].first,
    PageDown: () => passages[Math.min(passageAt(kept) + 1, passages.length - 1)].first,
  };
  $("chart").addEventListener("keydown", (event) => {
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keep(moves[event.key](), true);
  });
  $("chart").addEventListener("click", () => { if (plot.cursor.left >= 0) keep(shown, true); });
  $("chart").setAttribute("aria-valuemin", "0");
  $("chart").setAttribute("aria-valuemax", String(points - 1));

  // ---------------------------------------------------------------------------------------------- sorted tables
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead button").forEach((made) => made.addEventListener("click", () => {
      const head = made.closest("th"), column = head.cellIndex, body = table.tBodies[0];
      const numeric = head.classList.contains("n");
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      const next = head.getAttribute("aria-sort") === first ? other : first;
      table.querySelectorAll("th[aria-sort]").forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => (numeric ? Number(value(a)) - Number(value(b)) : value(a).localeCompare(value(b)));
      const rows = [...body.rows].sort((a, b) => (next === "ascending" ? order(a, b) : order(b, a)));
      body.append(...rows);
    }));
  }

  controls();
  build();
  show(peak, true);
  let width = $("chart").clientWidth;
  new ResizeObserver(() => {
    if ($("chart").clientWidth === width) return;
    width = $("chart").clientWidth;
    requestAnimationFrame(build);
  }).observe($("chart"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);
})();
