"use strict";
(() => {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (target, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(box.left + box.width / 2 - own.width / 2, document.documentElement.clientWidth - own.width - 8);
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (box.top > own.height + 8 ? box.top - own.height - 8 : box.bottom + 8) + "px";
  };
  window.addEventListener("scroll", hide, true);
  document.querySelectorAll("[data-tip]").forEach(target => {
    target.addEventListener("mouseenter", () => { if (target.dataset.tip) show(target, target.dataset.tip); });
    target.addEventListener("mouseleave", hide);
  });

  const theme = document.querySelector(".theme"), themes = ["system", "light", "dark"];
  let current = "system";
  const remember = name => { try { localStorage.setItem("secateur-theme", name); } catch { /* not for files */ } };
  const apply = name => {
    current = themes.includes(name) ? name : "system";
    if (current === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = current;
    theme.textContent = "Theme: " + current;
  };
  try { apply(localStorage.getItem("secateur-theme")); } catch { apply("system"); }
  theme.hidden = false;
  theme.addEventListener("click", () => { apply(themes[(themes.indexOf(current) + 1) % 3]); remember(current); });

  document.querySelectorAll(".map").forEach(map => {
    const rows = [...map.querySelectorAll(".grid tbody tr")].map(row => [...row.querySelectorAll("button")]);
    const heads = rows.flat(), store = map.querySelector(".maps");
    const maps = store ? JSON.parse(store.textContent) : null, decoded = new Map();
    const drawing = map.querySelector(".attention"), say = name => map.querySelector(name);
    let chosen = null;

    const mapOf = (site, head) => {
      const entry = maps && Object.hasOwn(maps.sites, site) ? maps.sites[site] : null;
      const row = entry ? entry.heads.indexOf(head) : -1;
      if (row < 0) return null;
      if (!decoded.has(site)) decoded.set(site, Uint8Array.from(atob(entry.levels), c => c.charCodeAt(0)));
      const n = maps.tokens, bytes = decoded.get(site);
      return { n, at: (i, j) => bytes[(row * n + i) * n + j] / 255 * entry.peaks[row], peak: entry.peaks[row] };
    };
    const mean = (found, pick) => {
      let sum = 0, count = 0;
      for (let i = 0; i < found.n; i++) {
        const j = pick(i);
        if (j >= 0 && j < found.n) { sum += found.at(i, j); count++; }
      }
      return Math.round(100 * sum / Math.max(1, count)) + " %";
    };
    const draw = head => {
      if (!drawing) return;
      const found = mapOf(head.dataset.site, Number(head.dataset.head));
      drawing.toggleAttribute("hidden", !found);
      drawing.replaceChildren();
      say(".reading").textContent = "";
      say(".looks").textContent = !found ? "There is no attention map of this head." : "";
      if (!found) return;
      const { n, at, peak } = found;
      drawing.setAttribute("viewBox", `0 0 ${n} ${n}`);
      for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
        const square = document.createElementNS(drawing.namespaceURI, "rect");
        for (const [name, value] of Object.entries({ x: j, y: i, width: 1, height: 1 })) square.setAttribute(name, value);
        square.setAttribute("fill-opacity", Math.sqrt(at(i, j) / peak).toFixed(2));
        drawing.append(square);
      }
      const words = `On average ${mean(found, () => 0)} of a token's attention goes to the first token, ${mean(found, i => i)} to ` +
        `itself, ${mean(found, i => i - 1)} to the token before, ${mean(found, i => i + 1)} to the token after.`;
      say(".looks").textContent = words;
      drawing.setAttribute("aria-label", `Attention map of ${n} by ${n} tokens. ${words}`);
      drawing.onpointermove = event => {
        const index = [...drawing.children].indexOf(event.target);
        if (index < 0) return;
        const i = Math.floor(index / n), j = index % n;
        say(".reading").textContent = `Token ${i} → token ${j}: ${at(i, j).toFixed(3)}`;
      };
    };
    const choose = head => {
      if (chosen) chosen.removeAttribute("aria-current");
      chosen = head;
      head.setAttribute("aria-current", "true");
      say(".facts-line").textContent = head.getAttribute("aria-label") + " (" + head.dataset.site + ")";
      draw(head);
    };
    // One tab stop for the whole map: the arrow keys move inside it.
    const stop = head => heads.forEach(other => { other.tabIndex = other === head ? 0 : -1; });
    rows.forEach((row, r) => row.forEach((head, c) => {
      head.addEventListener("mouseenter", () => show(head, head.getAttribute("aria-label")));
      head.addEventListener("mouseleave", hide);
      head.addEventListener("focus", () => { stop(head); show(head, head.getAttribute("aria-label")); });
      head.addEventListener("blur", hide);
      head.addEventListener("click", () => choose(head));
      head.addEventListener("keydown", event => {
        const to = { ArrowRight: [r, c + 1], ArrowLeft: [r, c - 1], ArrowDown: [r + 1, c], ArrowUp: [r - 1, c],
                     Home: [r, 0], End: [r, row.length - 1] }[event.key];
        if (event.key === "Escape") hide();
        if (!to || !rows[to[0]]) return;
        event.preventDefault();
        const target = rows[to[0]];
        target[Math.max(0, Math.min(to[1], target.length - 1))].focus();
      });
    }));
    stop(heads[0]);
    // The head of the highest score is shown at first, so that a reader sees what choosing one does.
    const place = head => Number(head.style.getPropertyValue("--m"));
    if (maps) choose(heads.reduce((best, head) => (place(head) > place(best) ? head : best)));
  });
})();
