// Draw the charts of the report when they come near the view, and the rest when the page has nothing to do.
// Colours are CSS variables inside SVG: dark mode and paper need no redrawing.
(() => {
  const { config, specs, rows } = JSON.parse(document.getElementById("data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const EAGER = 80; // charts drawn without waiting for the reader, so that they print

  const OPTIONS = { actions: false, renderer: "svg", ast: true };
  const contents = document.querySelector("nav details");
  if (matchMedia("(max-width: 1079px)").matches) contents.open = false;

  async function draw(plot) {
    if (plot.dataset.state || !plot.clientWidth) return;
    plot.dataset.state = "drawing";
    const { kind, rows: key, height } = plot.dataset;
    const spec = { ...specs[kind], height: Number(height), datasets: { rows: rows[key] } };
    try {
      await vegaEmbed(plot, spec, { config, ...OPTIONS });
      plot.dataset.state = "drawn";
    } catch (error) {
      plot.dataset.state = "failed";
      plot.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    }
  }

  const near = new IntersectionObserver(
    (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => draw(e.target)),
    { rootMargin: "600px" },
  );
  plots.forEach((plot) => near.observe(plot));

  const waiting = plots.slice(0, EAGER);
  const later = window.requestIdleCallback ?? ((work) => setTimeout(work, 50));
  const next = () => later(async () => {
    const plot = waiting.shift();
    if (!plot) return;
    await draw(plot);
    next();
  });
  next();
})();
