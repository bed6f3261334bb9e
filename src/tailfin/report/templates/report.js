"use strict";
(() => {
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axes = (layout) => Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));

  // ---- charts: drawn in the colours of the page, again when the reader's theme changes
  const theme = (layout) => {
    const ink = style("--ink"), muted = style("--muted"), grid = style("--grid"), card = style("--card");
    const themed = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.family": style("--sans"),
      "font.color": muted,
      "font.size": 12.5,
      "hoverlabel.bgcolor": card,
      "hoverlabel.bordercolor": style("--faint"),
      "hoverlabel.font.color": ink,
      "legend.font.color": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": muted,
      "modebar.activecolor": style("--accent"),
    };
    for (const axis of axes(layout)) {
      Object.assign(themed, {
        [axis + ".gridcolor"]: grid,
        [axis + ".zerolinecolor"]: grid,
        [axis + ".linecolor"]: style("--faint"),
        [axis + ".tickfont.color"]: muted,
        [axis + ".title.font.color"]: muted,
        [axis + ".automargin"]: true,
      });
    }
    (layout.annotations || []).forEach((_, index) => { Object.assign(themed, { [`annotations[${index}].font.color`]: muted, [`annotations[${index}].font.size`]: 13 }); });
    return themed;
  };

  // ---- narrow pages: small charts below each other, bars with long names lie down
  const narrow = matchMedia("(max-width: 600px)");
  const stacked = (layout) => {
    const keys = axes(layout).filter((key) => key[0] === "x");
    const across = keys.length > 4 ? 2 : 1, down = Math.ceil(keys.length / across);
    const height = 90 + 190 * down;
    const changed = { ...layout, height, legend: { ...layout.legend, y: 1 + 20 / height } };
    const wide = across === 2 ? 0.42 : 1, high = 0.7 / down;
    const titles = (layout.annotations || []).slice(0, keys.length).map((title) => ({ ...title }));
    keys.forEach((key, place) => {
      const other = key.replace("x", "y");
      const left = (place % across) * 0.58, top = 1 - Math.floor(place / across) / down - 0.08 / down;
      const { title, ...untitled } = layout[key];
      const lowest = place + across >= keys.length;
      changed[key] = { ...untitled, ...(lowest && title ? { title } : {}), domain: [left, left + wide] };
      changed[other] = { ...layout[other], domain: [Math.max(0, top - high), top] };
      if (titles[place]) Object.assign(titles[place], { x: left + wide / 2, y: top, yanchor: "bottom" });
    });
    return { ...changed, annotations: [...titles, ...(layout.annotations || []).slice(keys.length)] };
  };
  const lying = (data, layout) => {
    const bars = data.map((trace) => ({ ...trace, x: trace.y, y: trace.x, orientation: "h",
      hovertemplate: (trace.hovertemplate || "").replace(/%\{([xy])([^}]*)\}/g, (_, axis, form) => `%{${axis === "x" ? "y" : "x"}${form}}`) }));
    const number = data.length ? values((data[0].x && Array.isArray(data[0].x[0])) ? data[0].x[0] : data[0].x).length : 0;
    const rows = layout.barmode === "stack" ? number : number * data.length + number;
    const { tickangle, ...category } = layout.xaxis || {};
    return [bars, { ...layout, height: 130 + 26 * rows, xaxis: layout.yaxis, yaxis: { ...category, autorange: "reversed", automargin: true } }];
  };
  const fitted = (data, layout) => {
    if (!narrow.matches) return [data, layout];
    if (layout.meta && layout.meta.lies) return lying(data, layout);
    return axes(layout).filter((key) => key[0] === "x").length > 1 ? [data, stacked(layout)] : [data, layout];
  };

  const plots = new Map();  // holder -> [data, layout] as they came
  const place = (holder, data, layout) => {
    plots.set(holder, [data, layout]);
    // The buttons are listed one by one: Plotly's own choice has one that uploads the chart.
    const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
    const config = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: buttons };
    const legend = { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" };
    const [bars, fit] = fitted(data, layout);
    const full = { xaxis: {}, yaxis: {}, ...fit, legend: { ...legend, ...fit.legend } };
    if (full.height) holder.style.height = `${full.height}px`;
    return Plotly.react(holder, bars, full, config).then(() => Plotly.relayout(holder, theme(holder.layout)));
  };

  // ---- the numbers of a chart, as a table and as a file
  const TYPES = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u4: Uint32Array, i2: Int16Array, u2: Uint16Array, i1: Int8Array, u1: Uint8Array };
  const values = (column) => {
    if (column === undefined || column === null) return [];
    if (!column.bdata) return [...column];
    const bytes = Uint8Array.from(atob(column.bdata), (letter) => letter.charCodeAt(0));
    const flat = [...new TYPES[column.dtype](bytes.buffer)];
    if (!column.shape) return flat;
    const wide = Number(String(column.shape).split(",").pop());
    return Array.from({ length: flat.length / wide }, (_, row) => flat.slice(row * wide, (row + 1) * wide));
  };
  const plain = (text) => new DOMParser().parseFromString(String(text ?? "").replace(/<br>/g, ", "), "text/html").body.textContent;
  const lines = (data) => data.flatMap((trace) => {
    const name = plain(trace.name);
    if (trace.z) return values(trace.z).flatMap((row, at) => [...row].map((value, to) => [name, plain(trace.y[at]), plain(trace.x[to]), value]));
    const several = Array.isArray(trace.x) && Array.isArray(trace.x[0]);
    const x = several ? trace.x[0].map((_, at) => trace.x.map((part) => plain(part[at])).join(", ")) : values(trace.x);
    const y = values(trace.y), notes = Array.isArray(trace.text) && trace.mode ? trace.text : [];
    return y.map((value, at) => [name, typeof x[at] === "string" ? plain(x[at]) : x[at], value, plain(notes[at])]).filter((row) => row[2] !== null);
  });
  const save = (text, name, kind) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const quoted = (value) => (/[",\n]/.test(String(value ?? "")) ? `"${String(value).replace(/"/g, '""')}"` : String(value ?? ""));
  const show = (figure, data) => {
    const holder = figure.querySelector(".values");
    if (holder) { holder.remove(); return false; }
    const frame = document.createElement("div"), table = document.createElement("table");
    Object.assign(frame, { className: "values", tabIndex: 0 });
    table.className = "numbers";
    for (const row of lines(data).slice(0, 2000)) {
      const line = table.insertRow();
      row.forEach((value) => { line.insertCell().textContent = typeof value === "number" ? Number(value.toPrecision(6)) : value ?? ""; });
    }
    frame.append(table);
    figure.append(frame);
    return true;
  };

  const draw = (figure) => {
    const holder = figure.querySelector(".plot");
    const spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const above = figure.parentElement.querySelector("h3") || figure.closest("section").querySelector("h2");
    holder.setAttribute("role", "img");
    holder.setAttribute("aria-label", `Chart: ${above ? above.textContent.trim() : ""}; its numbers are behind the button`);
    const button = figure.querySelector("[data-log]");
    if (button) button.addEventListener("click", () => {
      const log = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(log));
      const change = {};
      for (const axis of axes(holder.layout)) if (axis[0] === "y") {
        change[axis + ".type"] = log ? "log" : "linear";
        change[axis + ".autorange"] = true;
      }
      Plotly.relayout(holder, change);
    });
    const table = figure.querySelector("[data-table]");
    table.addEventListener("click", () => table.setAttribute("aria-expanded", String(show(figure, spec.data))));
    figure.querySelector("[data-csv]").addEventListener("click", () => {
      const rows = [["series", "x", "y", "note"], ...lines(spec.data)];
      save(rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n", `${(above ? above.textContent : "chart").trim().replace(/\W+/g, "-")}.csv`, "text/csv");
    });
    if (window.Plotly) place(holder, spec.data, spec.layout);
  };
  const figures = [...document.querySelectorAll("figure.chart:not(.picked)")];
  const next = () => { const figure = figures.shift(); if (figure) { draw(figure); setTimeout(next, 0); } };
  // Plotly is packed: it is unpacked once the page is there, and charts are drawn one after another
  const unpacked = async () => {
    const packed = document.getElementById("plotly");
    if (!packed || !figures.length) return;
    const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
    const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
  };
  unpacked().catch(() => document.querySelectorAll(".plot").forEach((holder) => { holder.textContent = "This browser cannot unpack the chart library."; })).then(next);
  narrow.addEventListener("change", () => [...plots].forEach(([holder, [data, layout]]) => place(holder, data, layout)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    [...plots.keys()].forEach((holder) => Plotly.relayout(holder, theme(holder.layout)));
  });

  // ---- the curve of one class, chosen in the table of thresholds
  const picked = document.getElementById("class-curve");
  if (picked) {
    const stored = JSON.parse(document.getElementById("class-curves").textContent);
    const tables = stored.tables.map((text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
    document.getElementById("score-table").addEventListener("click", (event) => {
      const button = event.target.closest("[data-curve]");
      if (!button || !window.Plotly) return;
      const row = Number(button.dataset.curve);
      const data = stored.runs.map(([name, tone], run) => {
        const values = [...tables[run].slice(51 * row, 51 * row + 51)];
        const end = values.reduce((last, value, index) => (value ? index : last), 0) + 1;
        return { x: values.slice(0, end).map((_, index) => index / 50), y: values.slice(0, end).map((value) => value / 2.55),
          mode: "lines", line: { color: tone, width: 2 }, name: name.replace(/&/g, "&amp;").replace(/</g, "&lt;"), hovertemplate: "recall %{x}: <b>%{y:.0f} %</b>" };
      });
      picked.hidden = false;
      picked.querySelector("figcaption").textContent = `${button.textContent.trim()}: precision against recall`;
      place(picked.querySelector(".plot"), data, { height: 300, margin: { l: 60, r: 20, t: 30, b: 50 }, showlegend: data.length > 1,
        xaxis: { title: { text: "recall" }, range: [0, 1.01] }, yaxis: { title: { text: "precision (%)" }, range: [0, 103] } });
      picked.scrollIntoView({ block: "nearest" });
    });
  }

  // ---- tables: sort by a column, filter by name and group
  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const text = head.dataset.type === "text";
      const now = head.getAttribute("aria-sort");
      const up = now ? now !== "ascending" : text;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const keyed = [...body.rows].map((row, place) => {
        const cell = row.cells[column];
        return { row, place, key: text ? cell.textContent.trim() : Number(cell.dataset.value) };
      });
      keyed.sort((a, b) => (text ? a.key.localeCompare(b.key) : a.key - b.key) * (up ? 1 : -1) || a.place - b.place);
      body.append(...keyed.map((item) => item.row));
    }));
    const find = (kind) => document.querySelector(`[data-${kind}="${table.id}"]`);
    const input = find("filter"), groups = find("groups"), counter = find("count");
    let group = "";
    const filter = () => {
      const wanted = input.value.trim().toLowerCase();
      let shown = 0;
      for (const row of body.rows) {
        row.hidden = Boolean((group && row.dataset.group !== group) || !row.cells[0].textContent.toLowerCase().includes(wanted));
        shown += !row.hidden;
      }
      counter.textContent = shown === 1 ? "1 class" : `${shown} classes`;
    };
    if (input) input.addEventListener("input", filter);
    if (groups) groups.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      group = button.dataset.group;
      groups.querySelectorAll("button").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
      filter();
    });
  });

  document.querySelectorAll("[data-save]").forEach((button) => button.addEventListener("click", () => {
    save(document.getElementById(button.dataset.save).textContent, button.dataset.name, "application/json");
  }));

  // ---- from the class table to the class's row in the others
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-find]");
    if (!link) return;
    document.querySelectorAll("input[data-filter]").forEach((input) => {
      if (input.dataset.filter === "class-table") return;
      input.value = link.dataset.find;
      input.dispatchEvent(new Event("input", { bubbles: true }));
    });
  });

  // ---- navigation: mark the section in view
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const inView = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) inView[entry.isIntersecting ? "add" : "delete"](entry.target.id);
    const first = [...links.keys()].find((id) => inView.has(id));
    links.forEach((link, id) => link.classList.toggle("here", id === first));
  }, { rootMargin: "-30% 0px -60% 0px" });
  document.querySelectorAll("main section").forEach((section) => watcher.observe(section));

  // ---- live: reload when the files of the run have changed; the place on the page and the switch are kept
  if ("live" in document.body.dataset) {
    const toggle = document.getElementById("live");
    const set = (on) => { toggle.setAttribute("aria-pressed", String(on)); sessionStorage.setItem("live", on ? "on" : "off"); };
    set(sessionStorage.getItem("live") !== "off");
    toggle.addEventListener("click", () => set(toggle.getAttribute("aria-pressed") !== "true"));
    window.scrollTo(0, Number(sessionStorage.getItem("scroll") || 0));
    let known = null;
    setInterval(async () => {
      if (document.hidden || toggle.getAttribute("aria-pressed") !== "true") return;
      try {
        const version = await (await fetch("/version", { cache: "no-store" })).text();
        if (known !== null && version !== known) {
          sessionStorage.setItem("scroll", String(window.scrollY));
          location.reload();
        }
        known = version;
      } catch { /* the server is gone; the page stays as it is */ }
    }, 5000);
  }
})();
