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

  // On paper nothing can be unfolded.
  window.addEventListener("beforeprint", () => {
    for (const folded of document.querySelectorAll("details")) folded.open = true;
  });
})();
