"""What the verbs `compare`, `run`, `report` and those of the suites do: measure, judge, show, write."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from assay import plugins, session, suite
from assay.config import RunConfig, from_mapping
from assay.contracts import Attempted, Options
from assay.errors import UsageError
from assay.measure.device import load_calibration
from assay.measure.record import Case, Record
from assay.measure.store import check_writable, write_atomically
from assay.measure.verdict import Comparison, StoredScatter, compare_records, exit_code
from assay.plan import make_plan

__all__ = ["check_output", "execute", "execute_suite", "judged", "show"]

RESULTS = Path("assay-results")
INTERRUPTED = "interrupted: not all was measured; the same command with --resume goes on"


def execute(config: RunConfig, folder: str | None, output: str, *, resume: bool, verbose: bool) -> int:
    """Measure what the configuration asks for, print the verdicts, write the report; return the exit code."""
    from rich.console import Console

    from assay.report.progress import RichProgress

    plan = make_plan(config)
    place = _folder(config, folder, resume=resume)
    check_writable(place)
    check_output(output)
    console = Console(stderr=True)
    outcome = session.run(plan, place, RichProgress(console), resume=resume)
    if not outcome.records:
        console.print("nothing was measured before the run was stopped")
        return 130
    code = show(outcome.records, place, output, verbose=verbose)
    if outcome.interrupted:
        console.print(INTERRUPTED, soft_wrap=True)
    return 5 if outcome.interrupted and config.fail_if_slower and not code else code  # not all is judged


def check_output(output: str) -> None:
    """Find an --output that cannot be written before anything is measured or printed."""
    if Path(output).is_dir():
        raise UsageError(f"--output '{output}' is a folder", expected="the path of a JSON file")
    check_writable(Path(output).absolute().parent)


def trial_line(tried: Attempted) -> str:
    """What became of a trial for size."""
    params = ", ".join(f"{k}={v}" for k, v in tried.asked.case.params.items())
    became = f"fits, {tried.peak_mib:,.1f} MiB" if tried.fits else str(tried.status)
    return f"{tried.asked.arm.name} {params}: {became}"


def execute_suite(name: str, options: Options, folder: str | None, *, device: str, resume: bool) -> int:
    """Run a suite, print its KPIs and where its files are; return the exit code."""
    from rich.console import Console

    from assay.report.progress import RichProgress
    from assay.report.suite import render_findings

    console = Console(stderr=True)

    def observe(case: Case) -> RichProgress:
        console.print(str(case), markup=False, highlight=False, soft_wrap=True, style="dim")
        return RichProgress(console)

    def tell(tried: Attempted) -> None:
        console.print(trial_line(tried), markup=False, highlight=False, soft_wrap=True, style="dim")

    found = plugins.find("suites", name)
    place = Path(folder) if folder else None
    run, paths = suite.run_suite(
        name, found, options, place, where=device, resume=resume, observe=observe, tell=tell
    )
    out = Console()
    render_findings(run.findings, out)
    if printed := found.printed(run):
        out.print(f"\n{printed}\n", soft_wrap=True, highlight=False, markup=False)
    if run.state == "interrupted":
        begun = run.folder is not None and run.folder.exists()
        out.print(INTERRUPTED if begun else "interrupted: nothing was measured", soft_wrap=True)
    out.print("written: " + ", ".join(map(str, paths)), soft_wrap=True, highlight=False, markup=False)
    return suite.exit_code(run)


def show(records: Sequence[Record], folder: Path, output: str | None, *, verbose: bool) -> int:
    """Judge the records, print the summary, write the report and the exports; return the exit code."""
    from rich.console import Console

    from assay.report.html import Bundle
    from assay.report.markdown import render_markdown
    from assay.report.seed_json import seed_results
    from assay.report.terminal import render_summary
    from assay.report.write import write_report

    bundle = Bundle()  # the charts' script is made in a process of its own meanwhile
    config = from_mapping(records[0].config, "the records")
    comparisons = judged(records, config)
    console = Console()
    if verbose:
        console.print(render_markdown(records, comparisons), soft_wrap=True, markup=False, highlight=False)
    render_summary(records, comparisons, console, verbose=verbose)
    paths = list(write_report(folder, records, comparisons, bundle=bundle))
    if output is not None:
        path = Path(output)
        text = msgspec.json.format(msgspec.json.encode(seed_results(records, comparisons)), indent=2)
        write_atomically(path, text + b"\n")
        paths.append(path)
    pages = [p for p in paths if p.suffix in (".html", ".md", ".json")]
    console.print("written: " + ", ".join(str(p) for p in pages), soft_wrap=True, highlight=False)
    return exit_code(comparisons, records, config.fail_if_slower)


def judged(records: Sequence[Record], config: RunConfig) -> list[Comparison]:
    """The comparisons that the records support, with the stored scatter of their own machine, if here."""
    key = next((r.environment.device_uuid for r in records if r.environment), None)
    return compare_records(
        records,
        margin=config.margin,
        confidence=config.confidence,
        stored=load_calibration(key, StoredScatter) if key else None,
        asked_launches=config.launches,
        anytime=config.until_verdict,
    )


def _folder(config: RunConfig, given: str | None, *, resume: bool) -> Path:
    """The run's folder: the one given, the latest of this configuration to resume, or a new one."""
    if given is not None:
        place = Path(given)
        held = (place / "records.jsonl").exists()
        if resume and not held:
            raise UsageError(
                f"'{given}' holds no run to resume", remedy="leave out --resume to start one there"
            )
        if held and not resume:
            raise UsageError(
                f"'{given}' already holds a run",
                expected="a new folder",
                remedy="add --resume to go on with it, or choose another --dir",
            )
        return place
    if resume:
        earlier = sorted(RESULTS.glob(f"*-{config.hash[:6]}"))
        if not earlier:
            raise UsageError(
                "no run of this configuration to resume",
                expected=f"a folder {RESULTS}/*-{config.hash[:6]}",
                remedy="name it with --dir, or leave out --resume",
            )
        return earlier[-1]
    return RESULTS / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{config.hash[:6]}"
