// What the pointer adds: values of all runs at a place, runs shown alone or hidden. The charts are complete without it.
const { names, charts, titles } = JSON.parse(document.getElementById("points").textContent);
const values = document.getElementById("values");
const hidden = new Set();

const nearest = (places, x) =>
  places.reduce((best, place, k) => (Math.abs(place - x) < Math.abs(places[best] - x) ? k : best), 0);

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function showValues(event, svg, lines, title) {
  const frame = svg.getBoundingClientRect();
  const x = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
  const shown = lines.filter((line) => !hidden.has(line.run));
  if (!shown.length) return;
  const found = shown.map((line) => ({ line, k: nearest(line.px, x) }));
  const closest = found.reduce((a, b) =>
    Math.abs(b.line.px[b.k] - x) < Math.abs(a.line.px[a.k] - x) ? b : a);
  const place = closest.line.px[closest.k];
  const cursor = svg.querySelector(".cursor");
  cursor.setAttribute("transform", `translate(${place} 0)`);
  cursor.style.visibility = "visible";
  const rows = found
    .filter(({ line }) => place > line.px[0] - 12 && place < line.px.at(-1) + 12) // others have not begun, or ended
    .sort((a, b) => a.line.py[a.k] - b.line.py[b.k])
    .map(({ line, k }) => {
      const row = element("div", "", "");
      if (names.length > 1) row.append(element("span", `badge run${line.run % 16}`, line.run + 1));
      row.append(element("span", "", names[line.run]), element("b", "", line.y[k]));
      if (line.x[k] !== closest.line.x[closest.k]) row.append(element("span", "soft", `at ${line.x[k]}`));
      return row;
    });
  values.replaceChildren(element("div", "soft", `${title} ${closest.line.x[closest.k]}`), ...rows);
  values.hidden = false;
  const edge = document.documentElement.clientWidth - values.offsetWidth - 8;
  const beside = event.clientX + 16 > edge ? event.clientX - values.offsetWidth - 16 : event.clientX + 16;
  values.style.left = `${Math.max(8, Math.min(edge, beside)) + scrollX}px`;
  values.style.top = `${event.clientY + 16 + scrollY}px`;
}

document.querySelectorAll("figure[data-chart]").forEach((figure) => {
  const svg = figure.querySelector("svg");
  const number = figure.dataset.chart;
  for (const type of ["pointermove", "pointerdown"])
    svg.addEventListener(type, (event) => showValues(event, svg, charts[number], titles[number]));
  svg.addEventListener("pointerleave", () => {
    values.hidden = true;
    svg.querySelector(".cursor").style.visibility = "hidden";
  });
});

document.querySelectorAll("button[data-toggle]").forEach((button) => {
  const run = button.dataset.toggle;
  const parts = document.querySelectorAll(`figure [data-run="${run}"]`);
  button.addEventListener("click", () => {
    const hide = !hidden.delete(Number(run));
    if (hide) hidden.add(Number(run));
    button.setAttribute("aria-pressed", String(!hide));
    parts.forEach((part) => part.classList.toggle("away", hide));
  });
  for (const [type, focused] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]])
    button.addEventListener(type, () => {
      document.querySelectorAll("figure svg").forEach((svg) => svg.classList.toggle("focused", focused));
      parts.forEach((part) => part.classList.toggle("focus", focused));
    });
});
