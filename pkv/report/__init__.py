"""What happened in a run, as one HTML file and two pictures; reads the run directory only."""

from __future__ import annotations

from pathlib import Path

from pkv.config import UserError

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html (returned), RUN/curves.png and, where a competition was kept, RUN/competition.png.

    Raises UserError when the directory holds no run, or matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("pkv report draws with matplotlib, which is missing: pip install 'pkv[report]'") from error
    from pkv.report.charts import draw_charts, draw_curves
    from pkv.report.page import page
    from pkv.report.picture import draw_competition
    from pkv.report.reading import charts, read_run

    run = read_run(Path(run_dir))
    plotted = charts(run)
    draw_curves(run, plotted, run.folder / "curves.png")
    best = run.best_competition()
    if best is not None:
        draw_competition(best, run.folder / "competition.png")
    file = run.folder / "report.html"
    file.write_text(page(run, draw_charts(run, plotted)), encoding="utf-8")
    return file
