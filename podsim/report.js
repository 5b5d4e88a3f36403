"use strict";
(() => {
  // Draws the charts in #data: `lines`, stacked `areas` and stacked `bars`.
  const { charts } = JSON.parse(document.getElementById("data").textContent);
  const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  const text = (value) => String(value).replace(/[&<>"]/g, (c) => escapes[c]);
  const colour = (c) => (typeof c === "number" ? `var(--c${c % 9})` : `var(--${c})`);
  const number = (v) => {
    if (v === null || v === undefined) return "-";
    if (v !== 0 && Math.abs(v) < 0.01) return v.toExponential(1);
    return Number(v.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 4 });
  };

  // Drawn as wide as shown, so that letters are as large on a phone as on a laptop.
  const drawnWidth = (figure) => Math.max(figure.clientWidth, 300);

  const evenTicks = (low, high, room = 400) => {
    const raw = (high - low) / Math.min(7, room / 50);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= high * 1.0001; i++) ticks.push(i * step);
    return ticks;
  };
  const logTicks = (low, high) => {
    const ticks = [];
    const marks = high / low > 300 ? [1] : high / low > 12 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      for (const m of marks) {
        const tick = m * 10 ** p;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    return ticks;
  };

  const scales = (chart, width, height, tops) => {
    const box = { left: 58, right: width - 10, top: 8, bottom: height - 38 };
    const xs = chart.series.flatMap((s) => s.x);
    const lowX = chart.x.min ?? xs.reduce((a, b) => Math.min(a, b), Infinity);
    let highX = chart.x.max ?? xs.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!(highX > lowX)) highX = lowX * 1.1 + 1e-9;
    const highY = chart.y.max ?? (tops.reduce((a, b) => Math.max(a, b), 0) * 1.05 || 1);
    const along = chart.x.log ? (v) => Math.log(v / lowX) / Math.log(highX / lowX) : (v) => (v - lowX) / (highX - lowX);
    return {
      box, lowX, highX, highY,
      x: (v) => box.left + along(v) * (box.right - box.left),
      y: (v) => box.bottom - (Math.min(v, highY) / highY) * (box.bottom - box.top),
    };
  };

  const frame = (chart, s) => {
    const { box } = s;
    let svg = "";
    for (const v of evenTicks(0, s.highY))
      svg += `<line class="grid" x1="${box.left}" x2="${box.right}" y1="${s.y(v)}" y2="${s.y(v)}"/>` +
        `<text x="${box.left - 6}" y="${s.y(v) + 4}" text-anchor="end">${number(v)}</text>`;
    for (const v of chart.x.log ? logTicks(s.lowX, s.highX) : evenTicks(s.lowX, s.highX, box.right - box.left))
      svg += `<line class="grid" x1="${s.x(v)}" x2="${s.x(v)}" y1="${box.bottom}" y2="${box.bottom + 4}"/>` +
        `<text x="${s.x(v)}" y="${box.bottom + 17}" text-anchor="middle">${number(v)}</text>`;
    const middle = (box.top + box.bottom) / 2;
    return svg + `<text x="${(box.left + box.right) / 2}" y="${box.bottom + 33}" text-anchor="middle">${text(chart.x.label)}</text>` +
      `<text transform="translate(11 ${middle}) rotate(-90)" text-anchor="middle">${text(chart.y.label)}</text>`;
  };

  const drawLines = (chart, s) => chart.series.map((line) => {
    let path = "", dots = "", pen = false;
    line.x.forEach((x, i) => {
      const y = line.y[i];
      if (y === null) { pen = false; return; }
      const at = `${s.x(x).toFixed(1)} ${s.y(y).toFixed(1)}`;
      path += (pen ? "L" : "M") + at;
      const alone = !pen && (line.y[i + 1] ?? null) === null;
      if (alone) dots += `<circle cx="${s.x(x)}" cy="${s.y(y)}" r="2.5" fill="${colour(line.colour)}"/>`;
      pen = true;
    });
    const kind = line.dashed ? "line dashed" : "line";
    return `<path class="${kind}" d="${path}" stroke="${colour(line.colour)}"/>${dots}`;
  }).join("");

  const drawAreas = (chart, s) => {
    const base = chart.series[0].x.map(() => 0);
    return chart.series.map((area) => {
      const at = (i, y) => `${s.x(area.x[i]).toFixed(1)} ${s.y(y).toFixed(1)}`;
      const under = base.map((y, i) => at(i, y)).reverse();
      area.y.forEach((y, i) => { base[i] += y ?? 0; });
      const over = base.map((y, i) => at(i, y));
      return `<path d="M${[...over, ...under].join("L")}Z" fill="${colour(area.colour)}" fill-opacity="0.8"/>`;
    }).join("");
  };

  const legend = (chart) => {
    const kind = chart.type === "lines" ? "" : "block";
    return `<div class="legend">` + chart.series.map((s) =>
      `<span><i class="${s.dashed ? "dashed" : kind}" style="border-color:${colour(s.colour)}"></i>${text(s.name)}</span>`
    ).join("") + "</div>";
  };

  const plot = (figure, chart) => {
    const width = drawnWidth(figure), height = 250;
    const stacked = chart.type === "areas";
    const length = chart.series.length ? chart.series[0].y.length : 0;
    const tops = stacked
      ? Array.from({ length }, (_, i) => chart.series.reduce((sum, s) => sum + (s.y[i] ?? 0), 0))
      : chart.series.flatMap((s) => s.y.filter((y) => y !== null));
    const s = scales(chart, width, height, tops);
    figure.innerHTML = `<figcaption>${text(chart.title)}</figcaption>` +
      `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${text(chart.title)}">` +
      (chart.series.length ? frame(chart, s) + (stacked ? drawAreas : drawLines)(chart, s) : "") +
      `<line class="cursor" y1="${s.box.top}" y2="${s.box.bottom}"/></svg>` + (chart.legend ? legend(chart) : "");
    if (chart.series.length) follow(figure, chart, s, width);
  };

  const bars = (figure, chart) => {
    figure.classList.add("bars");
    const rows = chart.y.rows;
    const width = drawnWidth(figure), right = width - 60;
    const room = 20 + 7.5 * Math.max(...rows.map((row) => row.length));
    const above = room > width / 3; // long names stand above their bars
    const left = above ? 8 : room, step = above ? 42 : 26;
    const height = rows.length * step + 40;
    const totals = rows.map((_, i) => chart.series.reduce((sum, s) => sum + s.values[i], 0));
    const high = Math.max(...totals, 1e-9);
    const x = (v) => left + (v / high) * (right - left);
    let svg = "";
    rows.forEach((row, i) => {
      let sum = 0;
      const top = (i + 1) * step - 22;
      svg += above
        ? `<text class="name" x="${left}" y="${top - 5}">${text(row)}</text>`
        : `<text class="name" x="${left - 8}" y="${top + 13}" text-anchor="end">${text(row)}</text>`;
      for (const s of chart.series) {
        const share = ((s.values[i] / totals[i]) * 100).toFixed(0);
        svg += `<rect x="${x(sum)}" y="${top}" width="${Math.max(0, x(sum + s.values[i]) - x(sum))}" height="19" fill="${colour(s.colour)}">` +
          `<title>${text(row)}, ${text(s.name)}: ${number(s.values[i])} ms, ${share}%</title></rect>`;
        sum += s.values[i];
      }
      svg += `<text x="${x(sum) + 6}" y="${top + 13}">${number(totals[i])}</text>`;
    });
    for (const v of evenTicks(0, high, right - left))
      svg += `<text x="${x(v)}" y="${height - 20}" text-anchor="middle">${number(v)}</text>`;
    svg += `<text x="${(left + right) / 2}" y="${height - 4}" text-anchor="middle">${text(chart.x.label)}</text>`;
    figure.innerHTML = `<figcaption>${text(chart.title)}</figcaption>` +
      `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${text(chart.title)}">${svg}</svg>` + legend(chart);
  };

  const tip = document.createElement("div");
  tip.id = "tip";
  document.body.append(tip);

  // Under the pointer: each line's value where its x is nearest (of a distribution: its y).
  const follow = (figure, chart, s, width) => {
    const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor");
    const nearest = (line, px) => {
      let best = 0;
      line.x.forEach((x, i) => { if (Math.abs(s.x(x) - px) < Math.abs(s.x(line.x[best]) - px)) best = i; });
      return best;
    };
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const px = ((event.clientX - frame.left) / frame.width) * width;
      const first = chart.series[0];
      const x = first.x[nearest(first, px)];
      cursor.setAttribute("x1", s.x(x));
      cursor.setAttribute("x2", s.x(x));
      cursor.style.visibility = "visible";
      tip.textContent = [`${chart.x.label}: ${number(x)}`,
        ...chart.series.map((line) => `${line.name}: ${number(line.y[nearest(line, s.x(x))])}`)].join("\n");
      tip.style.visibility = "visible";
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
    });
    svg.addEventListener("pointerleave", () => {
      cursor.style.visibility = tip.style.visibility = "hidden";
    });
  };

  let drawn = 0;
  for (const chart of charts) {
    const figure = document.getElementById(chart.id);
    if (chart.type === "bars") bars(figure, chart);
    else plot(figure, chart);
    drawn += 1;
  }
  document.documentElement.dataset.drawn = drawn;
})();
