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

  const plots = [];
  const place = (holder, data, layout) => {
    // The buttons are listed one by one: Plotly's own choice has one that uploads the chart.
    const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
    const config = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: buttons };
    const legend = { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" };
    const full = { xaxis: {}, yaxis: {}, ...layout, legend: { ...legend, ...layout.legend } };
    if (!plots.includes(holder)) plots.push(holder);
    return Plotly.react(holder, data, full, config).then(() => Plotly.relayout(holder, theme(holder.layout)));
  };
  const draw = (figure) => {
    const holder = figure.querySelector(".plot");
    const spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    place(holder, spec.data, spec.layout);
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
  };
  if (window.Plotly) document.querySelectorAll("figure.chart:not(.picked)").forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    plots.forEach((holder) => Plotly.relayout(holder, theme(holder.layout)));
  });

  // ---- the curve of one class, chosen in the table of thresholds
  const picked = document.getElementById("class-curve");
  if (picked && window.Plotly) {
    const stored = JSON.parse(document.getElementById("class-curves").textContent);
    const tables = stored.tables.map((text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
    document.getElementById("score-table").addEventListener("click", (event) => {
      const button = event.target.closest("[data-curve]");
      if (!button) return;
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

  // ---- data to save
  const save = (text, name, kind) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
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
