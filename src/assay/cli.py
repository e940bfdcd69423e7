"""The command line: verbs only. Every verb's work is imported when it runs, so that help never waits.

Exit codes: 0 measured and every threshold asked for held; 1 a threshold failed; 2 a gate or proof failed, or
samples are implausible or invalid; 3 nothing could be measured on this machine; 4 bad usage; 5 `unknown`
where a threshold was asked for; 130 stopped by Ctrl-C; 143 by SIGTERM.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from assay.errors import AssayError, UsageError, nearest

if TYPE_CHECKING:
    from assay.config import RunConfig
    from assay.contracts import Suite
    from assay.measure.record import Scalar

__all__ = ["app", "main"]

app = App(
    name="assay",
    help="Put performance claims about PyTorch language models to the proof.",
    help_epilogue="Exit codes: 0 measured, 1 threshold failed, 2 gate or proof failed or samples void, "
    "3 nothing could be measured here, 4 bad usage, 5 unknown where a threshold was asked for.",
    version_flags=["--version"],
    default_parameter=Parameter(negative=()),
    result_action="return_value",
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class What:
    """What is compared."""

    workload: str = "train,infer,generate"
    "Workloads, separated by commas; `assay list workloads` has them all."

    shape: str = "seed"
    "Model shapes: a name of `assay list shapes`, a config.json, a Hugging Face folder or hub id."

    batch_size: str = "2"
    "Sequences per training or inference step; several values make a grid: 1,4,16."

    seq_length: str = "512"
    "Tokens per sequence; several values make a grid."

    gen_batch_size: str = "1"
    "Sequences generated at once."

    gen_input_length: str = "128"
    "Prompt tokens."

    gen_output_length: str = "128"
    "Tokens to generate."

    optimizer: str = "none"
    "A further training phase: none, sgd or adamw."

    set: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    "Any other workload parameter: --set name=value[,value...]; may be repeated."

    dtype: str = "auto"
    "bf16-autocast, bf16, fp16, fp32; auto is bf16-autocast on CUDA and fp32 on the CPU."

    device: str = "auto"
    "auto, cpu, cuda or cuda:N."

    seed: int = 0
    "Seed of weights, inputs and block order."

    weights: str = "shared"
    "shared: every arm takes the first arm's weights; own: builders keep theirs."

    no_compile: bool = False
    "Leave torch.compile out of the variants that use it."

    compile_mode: str = "default"
    "default, reduce-overhead or max-autotune."

    attribute: bool = False
    "Of two arms of the ladder, also measure what each ingredient gives: added alone, and left out."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class How:
    """How it is measured."""

    warmup_steps: int = 10
    "Least warm-up samples of each arm in each launch; more until the times are steady."

    benchmark_steps: int | None = None
    "Blocks over all launches, obeyed exactly; without it --rel-ci and --time-budget decide."

    gen_num_iterations: int | None = None
    "The same for the workload generate."

    launches: int = 5
    "Fresh pairs of processes: the unit of inference."

    until_verdict: bool = False
    "Add launches until there is a verdict."

    max_launches: int = 30
    "Most launches under --until-verdict."

    rel_ci: float = 0.005
    "End a launch when its running interval is this narrow (0.005 is 0.5%)."

    time_budget: float = 60.0
    "Seconds of sampling for each pair in each case, over all launches."

    timeout: float = 900.0
    "Seconds after which a launch is given up."

    margin: float = 0.01
    "Equivalence margin: within it two arms are the same."

    confidence: float = 0.95
    "Confidence of all intervals of the report together."

    fail_if_slower: bool = False
    "Exit with 1 where an arm is slower than the baseline, with 5 where that is unknown."

    fresh_compile: bool = False
    "Give every launch empty compile caches, so that compilation is resampled too."

    isolation: str = "process"
    "process: a worker process for each arm; inline: all in this process, for debugging."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Where:
    """Where the results go."""

    output: Annotated[str, Parameter(name=("--output", "-o"))] = "benchmark_results.json"
    "The comparison as one JSON file, in the layout of the original benchmark."

    dir: str | None = None
    "Folder for records, configuration and report; default assay-results/TIME-CONFIGURATION."

    resume: bool = False
    "Go on with an earlier run of the same configuration; what is complete is not repeated."

    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"))] = False
    "Print the whole report before the summary: method, gate figures, environment, configuration."


@app.command
def compare(
    *arms: str,
    what: What = What(),
    how: How = How(),
    where: Where = Where(),
) -> int:
    """Compare two or more builds of one model: first proved equal, then measured, then judged.

    Parameters
    ----------
    arms:
        The baseline, then the others; default `eager fused`. An arm is a variant's name, a builder
        `pkg.module:build` or `path/file.py:build`, either with options in brackets:
        `fused[compile=false]`, `mine.py:build[python=../b/bin/python,env.OMP_NUM_THREADS=1,cwd=../b]`.
    """
    if len(arms) == 1:
        raise UsageError("one arm cannot be compared", expected="two or more arms", got=arms[0])
    return _execute(_configuration(arms, what, how), where)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Operator:
    """What the functions are called with."""

    inputs: str = ""
    "The maker of the arguments, pkg.module:make or path/file.py:make; make(seed, ...) returns a tuple."

    direction: str = "forward"
    "What is timed: forward, backward (of an output with its graph retained), or both."

    cache: str = "warm"
    "State of the GPU's last cache level before a call: warm or cold."

    timing: str = "kernel"
    "On CUDA: kernel, device time alone; call, the host's launches between the kernels included."

    set: Annotated[tuple[str, ...], Parameter(negative=())] = ()
    "A size that the maker takes: --set name=value[,value...]; may be repeated, values make a grid."

    dtype: str = "auto"
    "auto, as the maker gives them; fp32 or bf16 convert the floating arguments."

    device: str = "auto"
    "auto, cpu, cuda or cuda:N."

    seed: int = 0
    "Seed of the arguments and of the block order."


@app.command
def op(
    *functions: str,
    what: Operator = Operator(),
    how: How = How(),
    where: Where = Where(),
) -> int:
    """Compare kernels with a reference: first proved equal, then measured, then judged.

    The same as `compare --workload op`, with the workload's parameters as flags.

    Parameters
    ----------
    functions:
        The reference, then the kernels: functions `pkg.module:name` or `path/file.py:name` of the arguments
        that the maker gives, or operators of `assay list variants`, either with options in brackets.
    """
    if len(functions) < 2:
        raise UsageError(
            "an operator is compared with a reference",
            expected="two functions or more: assay op pkg:reference pkg:kernel --inputs pkg:make",
            got=" ".join(functions) or "none",
        )
    given = {"inputs": what.inputs, "direction": what.direction, "cache": what.cache, "timing": what.timing}
    params = tuple(f"{name}={text}" for name, text in given.items() if text)
    asked = What(workload="op", set=params + what.set, dtype=what.dtype, device=what.device, seed=what.seed)
    return _execute(_configuration(functions, asked, how), where)


@app.command
def run(file: Path, *, where: Where = Where()) -> int:
    """Repeat the run that a YAML configuration describes; every run saves its own as config.yaml.

    Parameters
    ----------
    file:
        The configuration, such as the config.yaml in a run's folder.
    """
    from assay.config import load

    return _execute(load(file), where)


@app.command
def report(folder: Path, *, output: Annotated[str | None, Parameter(name=("--output", "-o"))] = None) -> int:
    """Draw the report of a run again from its records: terminal, Markdown, HTML, SVG and PNG.

    Parameters
    ----------
    folder:
        The run's folder, or a JSONL file of records.
    output:
        Also write the comparison as one JSON file here.
    """
    from assay import show
    from assay.measure.store import latest, read_records

    if output is not None:
        show.check_output(output)
    records = latest(read_records(folder))  # a launch that died and was repeated counts once
    if not records:
        raise UsageError(f"'{folder}' holds no records", expected="the folder of a run")
    return show.show(records, folder if folder.is_dir() else folder.parent, output, verbose=False)


@app.command(name="list")
def list_(what: str) -> int:
    """List what can be named on the command line.

    Parameters
    ----------
    what:
        variants, workloads, shapes, suites or datasets.
    """
    from assay import plugins

    kinds = [*plugins.GROUPS, "shapes"]
    if what not in kinds:
        raise UsageError(
            f"cannot list '{what}'",
            expected=f"one of {', '.join(sorted(kinds))}",
            remedy=nearest(what, kinds),
        )
    found = plugins.shapes() if what == "shapes" else plugins.summaries(what)
    width = max(map(len, found), default=0)
    for name, summary in found.items():
        print(f"{name:{width}}  {summary}")
    if not found:
        print(f"no {what} yet")
    return 0


@app.command
def doctor(
    *, device: str = "auto", calibrate: bool = False, launches: int = 5, workload: str = "infer"
) -> int:
    """Say what this machine can measure, measure its ceilings, and what is missing.

    Parameters
    ----------
    device:
        auto, cpu, cuda or cuda:N.
    calibrate:
        Also store the machine's launch and block scatter from baseline-against-itself runs.
    launches:
        Launches of each calibration run.
    workload:
        Workloads to calibrate, separated by commas.
    """
    from assay import doctor as checks

    asked = _words(workload) if calibrate else []
    if calibrate and not asked:
        raise UsageError("--workload names nothing", expected="one or more, separated by commas")
    return checks.run(device, asked, launches)


def _configuration(arms: Sequence[str], what: What, how: How) -> RunConfig:
    """Flags -> configuration. Only parameters that the chosen workloads know are passed on."""
    from assay import plugins
    from assay.config import from_mapping

    workloads = _words(what.workload)
    given = {
        "shape": what.shape,
        "batch_size": what.batch_size,
        "seq_length": what.seq_length,
        "gen_batch_size": what.gen_batch_size,
        "gen_input_length": what.gen_input_length,
        "gen_output_length": what.gen_output_length,
        "optimizer": what.optimizer,
    }
    known = {name for w in workloads for name in plugins.find("workloads", w).params}
    params = {n: _scalars(v) for n, v in given.items() if n in known} | _extra(what.set)
    return from_mapping(
        {
            "arms": list(arms) or ["eager", "fused"],
            "workload": workloads,
            "params": params,
            "dtype": _words(what.dtype),
            "device": what.device,
            "seed": what.seed,
            "weights": what.weights,
            "compile": not what.no_compile,
            "compile_mode": what.compile_mode,
            "attribute": what.attribute,
            "warmup_steps": how.warmup_steps,
            "benchmark_steps": how.benchmark_steps,
            "gen_num_iterations": how.gen_num_iterations,
            "launches": how.launches,
            "until_verdict": how.until_verdict,
            "max_launches": how.max_launches,
            "rel_ci": how.rel_ci,
            "time_budget_s": how.time_budget,
            "timeout_s": how.timeout,
            "margin": how.margin,
            "confidence": how.confidence,
            "fail_if_slower": how.fail_if_slower,
            "fresh_compile": how.fresh_compile,
            "isolation": how.isolation,
        },
        "the command line",
    )


def _words(text: str) -> list[str]:
    return [w.strip() for w in text.split(",") if w.strip()]


def _scalars(text: str) -> list[Scalar]:
    from assay.config import parse_scalar

    return [parse_scalar(w) for w in _words(text)]


def _extra(pairs: Sequence[str]) -> dict[str, list[Scalar]]:
    found = {}
    for pair in pairs:
        name, equals, values = pair.partition("=")
        if not equals:
            raise UsageError(f"--set '{pair}' cannot be read", expected="name=value[,value...]")
        found[name.replace("-", "_")] = _scalars(values)
    return found


def _execute(config: RunConfig, where: Where) -> int:
    from assay import show

    return show.execute(config, where.dir, where.output, resume=where.resume, verbose=where.verbose)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SuiteWhere:
    """What every suite takes."""

    device: str = "auto"
    "auto, cpu, cuda or cuda:N."

    dir: str | None = None
    "Folder for the suite's files; records go into its folder runs/."

    resume: bool = False
    "Go on with the latest run of the same options there; what is complete is not repeated."


def mount_suites() -> None:
    """Make every suite a verb with its own options. One that does not import shows in `assay list suites`."""
    from assay import plugins

    for name in plugins.names("suites"):
        with contextlib.suppress(Exception):  # another package's suite must not take the other verbs with it
            app.command(_verb(name, plugins.find("suites", name)), name=name)


def _verb(name: str, suite: Suite) -> Callable[..., int]:
    """A function with the suite's options as its flags."""
    options = make_dataclass(
        "SuiteOptions",
        [
            (key, Annotated[type(o.default), Parameter(help=o.help)], field(default=o.default))
            for key, o in suite.options.items()
        ],
        namespace={"__module__": __name__},  # the default, `types`, is one whose fields cyclopts leaves alone
        frozen=True,
        kw_only=True,
    )
    defaults = options()

    def verb(*, options: Any = defaults, where: SuiteWhere = SuiteWhere()) -> int:
        from assay import show

        return show.execute_suite(name, vars(options), where.dir, device=where.device, resume=where.resume)

    verb.__annotations__ = {
        "options": Annotated[options, Parameter(name="*")],
        "where": SuiteWhere,
        "return": int,
    }
    verb.__doc__ = f"{suite.summary[0].upper()}{suite.summary[1:]}."
    return verb


mount_suites()


class _Terminated(BaseException):
    """SIGTERM came. No SystemExit: those of an arm end a case, not the run."""


def _terminated(number: int, frame: object) -> None:
    from assay import channel

    del frame
    signal.signal(number, signal.SIG_IGN)  # a second one would cut short what cleans up
    channel.LEAVE_S = 0.0  # whoever sent it waits for ten seconds, or less
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Every error of ours is one line on standard error.

    A SIGTERM ends it as Ctrl-C does, at once: workers end, temporary folders go, what is on disk stays.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as e:
        print(f"assay: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    except AssayError as e:
        print(f"assay: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except _Terminated:
        print("assay: ended by SIGTERM; a run that had begun goes on with --resume", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(code or 0)
