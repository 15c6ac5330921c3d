"use strict";
// The theme follows the system until the button is pressed; the choice is remembered where it may be.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const asked = new URLSearchParams(location.search).get("theme");
  let chosen = ["light", "dark"].includes(asked) ? asked : remembered();

  function remembered() {
    try {
      return localStorage.getItem("dominie-theme");
    } catch {
      return null;
    }
  }

  function show() {
    const dark = chosen ? chosen === "dark" : system.matches;
    if (chosen) root.dataset.theme = chosen;
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${dark ? "light" : "dark"} theme`);
    return dark;
  }

  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = show() ? "light" : "dark";
    show();
    try {
      localStorage.setItem("dominie-theme", chosen);
    } catch {
      // a page opened from a file may not store anything
    }
  });
  system.addEventListener("change", show);
  show();

  for (const hint of document.querySelectorAll(".scripted")) hint.hidden = false;
  for (const figure of document.querySelectorAll("#curves figure")) makeReadable(figure);

  // A curve is read off its path: the pointer or the arrow keys choose a step, the legend tells.
  function makeReadable(figure) {
    const chart = figure.querySelector("svg");
    const across = axis(chart.dataset.x);
    const upwards = axis(chart.dataset.y);
    const lines = [...chart.querySelectorAll("[data-line]")].map((path) => ({
      points: [...path.getAttribute("d").matchAll(/([\d.]+) ([\d.]+)/g)].map(([, x, y]) => [+x, +y]),
      last: figure.querySelectorAll(".last")[+path.dataset.line],
      style: path.getAttribute("class"),
    }));
    if (!lines.length) return;
    const step = figure.querySelector(".step");
    const last = lines.map((line) => line.last.textContent);
    const places = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
    let at = places.length;
    let drawn = [];

    function show(index) {
      clear();
      at = Math.min(Math.max(index, 0), places.length - 1);
      const x = places[at];
      draw("line", { x1: x, x2: x, y1: upwards.end, y2: upwards.start, class: "cursor" });
      for (const line of lines) {
        const [px, py] = line.points[nearest(line.points.map(([each]) => each), x)];
        draw("circle", { cx: px, cy: py, r: 3.2, class: line.style.replace("series", "point") });
        line.last.textContent = +upwards.value(py).toPrecision(3);
      }
      step.textContent = `step ${Math.round(across.value(x)).toLocaleString("en")}`;
    }

    function clear() {
      for (const shape of drawn) shape.remove();
      drawn = [];
      step.textContent = "";
      lines.forEach((line, index) => (line.last.textContent = last[index]));
    }

    function draw(name, attributes) {
      const shape = document.createElementNS(chart.namespaceURI, name);
      for (const [key, value] of Object.entries(attributes)) shape.setAttribute(key, value);
      drawn.push(chart.appendChild(shape));
    }

    chart.tabIndex = 0;
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      show(nearest(places, ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width));
    });
    chart.addEventListener("pointerleave", clear);
    chart.addEventListener("blur", clear);
    chart.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: places.length - 1 }[event.key];
      if (event.key === "Escape") clear();
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }

  function axis(written) {
    const [low, high, start, end, kind] = written.split(" ").map((each) => (each === "log" ? each : +each));
    const value = (place) => {
      const part = (place - start) / (end - start);
      return kind === "log" ? low * (high / low) ** part : low + part * (high - low);
    };
    return { start, end, value };
  }

  function nearest(sorted, x) {
    let best = 0;
    for (let i = 1; i < sorted.length; i++) if (Math.abs(sorted[i] - x) < Math.abs(sorted[best] - x)) best = i;
    return best;
  }

  // On paper nothing can be unfolded.
  window.addEventListener("beforeprint", () => {
    for (const folded of document.querySelectorAll("details")) folded.open = true;
  });
})();
