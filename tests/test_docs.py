"""The documents are true: their programs run, their commands parse, their tables match the code."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from cyclopts.exceptions import CycloptsError

from assay import cli, gate, show, yardstick
from assay.config import RunConfig
from assay.measure import record
from assay.observer import NullObserver
from assay.plan import Plan, make_plan
from assay.report.seed_json import seed_results
from assay.session import run
from tests.report.fixtures import finished

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "assay"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
EXAMPLE = "examples/own_model.py"
PLANNED = PAGES["docs/seeds.md"].partition("## Planned")[2]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_lines(program: str) -> list[str]:
    """Lines of the shell blocks that call a program, each once."""
    found = [line for text in PAGES.values() for block in blocks(text, "sh") for line in block.splitlines()]
    return sorted({line for line in found if line.split(maxsplit=1)[:1] == [program]})


def spans(text: str) -> list[str]:
    """Commands of ours in running text, each once."""
    return sorted(set(re.findall(r"`(assay [a-z][^`\n]*)`", text)))


COMMANDS = sorted(
    {*shell_lines("assay"), *(s for text in PAGES.values() for s in spans(text.replace(PLANNED, "")))}
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents' commands name: examples, wrong models, a run, another environment."""
    for name in ("examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    other = tmp_path / "other"
    shutil.copytree(ROOT / "examples", other / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (other / ".venv" / "bin").mkdir(parents=True)
    (other / ".venv" / "bin" / "python").touch()
    written = finished()
    lines = b"".join(msgspec.json.encode(r) + b"\n" for r in written.records)
    for folder in ("run", "assay-results/example"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "records.jsonl").write_bytes(lines)
    results = seed_results(written.records, written.comparisons)
    (tmp_path / "benchmark_results.json").write_bytes(msgspec.json.encode(results))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Programs


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("README.md", "by hand"),
        ("docs/python.md", "by hand"),
        ("docs/library.md", "after 20 steps"),
        ("docs/op.md", "True"),
        ("docs/phase2-model.md", "after 20 steps"),
        ("docs/phase2.md", "True"),
        ("docs/offload.md", "after 20 steps"),
        ("docs/capacity.md", "bytes predicted"),
    ],
)
def test_python_of_a_page_runs(page: str, printed: str, workplace: Path) -> None:
    programs = blocks(PAGES[page], "python")
    assert programs
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(programs)],
        cwd=workplace, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert printed in done.stdout
    shown = blocks(PAGES[page], "text") if page in ("docs/library.md", "docs/phase2-model.md") else []
    assert all(block in done.stdout for block in shown)


def test_refusal_that_the_python_page_shows_is_the_one_printed(workplace: Path) -> None:
    page = PAGES["docs/python.md"]
    first, refused, *_ = blocks(page, "python")
    program = first.partition("found = ")[0] + refused
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (shown,) = blocks(page, "text")
    assert done.stdout == shown


def test_operators_of_the_page_are_judged_as_it_says(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGES["docs/op.md"]
    good, _, wrong = blocks(page, "sh")[0].splitlines()
    quick = shlex.split("--launches 1 --benchmark-steps 4 --warmup-steps 1 --isolation inline --device cpu")
    for command, code in ((good, 0), (wrong, 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main([*shlex.split(command)[1:], *quick, "--dir", f"op-{code}"])
        printed = capsys.readouterr()
        assert ended.value.code == code, printed.err
    (shown,) = blocks(page, "text")
    assert shown.strip() in " ".join(printed.out.split())


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("recipe", shell_lines("jq"))
def test_jq_recipe_gives_figures(recipe: str, workplace: Path) -> None:
    done = subprocess.run(
        shlex.split(recipe), cwd=workplace, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() not in ("", "null")


# Commands


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(
    command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags and arguments exist; a comparison is planned too, so that its arms and parameters exist."""
    _, *tokens = shlex.split(command)
    if tokens[0] not in ("compare", "op") or len(tokens) == 1:
        cli.app.parse_args([*tokens, *_missing_arguments(tokens)], exit_on_error=False, print_error=False)
        return
    plans: list[Plan] = []

    def plan_only(config: RunConfig, *_where: object, **_how: object) -> int:
        plans.append(make_plan(msgspec.structs.replace(config, device="cpu")))  # whatever runs this test
        return 0

    monkeypatch.setattr(show, "execute", plan_only)
    with pytest.raises(SystemExit) as ended:
        cli.main(tokens)
    assert (ended.value.code, capsys.readouterr().err) == (0, "")
    assert len(plans[0].cases) > 0


def _missing_arguments(tokens: list[str]) -> list[str]:
    """What running text leaves out when it names a verb alone."""
    left_out = {"run": ["config.yaml"], "report": ["run"], "list": ["shapes"]}
    return left_out.get(tokens[0], []) if len(tokens) == 1 else []


def test_documents_show_every_verb() -> None:
    verbs = {command.split()[1] for command in COMMANDS}
    assert verbs == {"compare", "doctor", "list", "op", "phase2", "report", "run", "vram"}


@pytest.mark.parametrize("command", sorted({" ".join(span.split()[:2]) for span in spans(PLANNED)}))
def test_planned_command_is_unknown_so_far(command: str) -> None:
    with pytest.raises(CycloptsError):
        cli.app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)


# Tables


STRUCTS = [
    record.Record, record.Case, record.Arm, record.Attribution, record.Work, record.Summary, record.Memory,
    record.PhaseMemory, record.Timeline, record.Saved, record.SavedShare, record.Cold, record.GateReport,
    record.Figure, record.Spread, record.Environment, record.Method, record.SampleLine,
]  # fmt: skip


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_of_a_record_is_described(struct: type[msgspec.Struct]) -> None:
    described = set(re.findall(r"`(\w+)`", PAGES["docs/records.md"]))
    assert set(struct.__struct_fields__) - described == set()


def test_every_status_is_described() -> None:
    table = PAGES["docs/method.md"].partition("## Statuses")[2].partition("## ")[0]
    assert {status.value for status in record.Status} - set(re.findall(r"`(\w+)`", table)) == set()


def test_tolerances_are_those_of_the_gate() -> None:
    rows = re.findall(r"^\| `(\w+)[`:].*\| (\d\S*) \|$", PAGES["docs/method.md"], re.MULTILINE)
    assert {name: float(limit) for name, limit in rows} == gate.MEANING_LIMIT
    text = " ".join(PAGES["docs/method.md"].split())
    assert f"may be at most {gate.K:g} times the error that the reference makes" in text
    assert f"or {yardstick.OPAQUE_ROUNDING:g} roundings of the output's dtype" in text


def test_map_of_the_house_names_every_module() -> None:
    table = PAGES["docs/design.md"].partition("## The house")[2].partition("## ")[0]
    rooms = {p.name for p in SRC.iterdir() if not p.name.startswith(("_", "py.typed"))}
    named = {
        name if name.endswith(".py") else name.partition("/")[0] for name in re.findall(r"`([\w/.]+)`", table)
    }
    assert rooms - named == set()


# The example, and what its page says of wrong ones


@pytest.mark.slow
def test_example_arms_do_the_same_work(workplace: Path) -> None:
    config = RunConfig(
        arms=[f"{EXAMPLE}:plain", f"{EXAMPLE}:sdpa", f"{EXAMPLE}:wrapped"],
        workload=["train", "generate"],
        params={
            "batch_size": [1], "seq_length": [16], "gen_input_length": [4], "gen_output_length": [3],
        },
        device="cpu",
        isolation="inline",
        launches=1,
        warmup_steps=1,
        benchmark_steps=2,
    )  # fmt: skip
    records = run(make_plan(config), None, NullObserver()).records
    assert [(r.status, r.reason) for r in records] == [(record.Status.OK, "")] * 8
    assert {r.proof["full_recompute"] for r in records if r.case.workload == "generate"} == {True}
    assert all(r.gate is not None and r.gate.passed for r in records)


MINE = """
from torch import nn
from assay_user_own_model import Model

class NoIds(nn.Module):
    def forward(self, x):
        return x

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, input_ids):
        return self.table(input_ids).sum(-1)

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Model(fused=True)

    def forward(self, input_ids):
        return self.inner(input_ids)

def raises():
    raise ValueError("no weights here")

def text():
    return "a string"

no_ids, flat, renamed = NoIds, Flat, Renamed

def mapped():
    return Renamed()

mapped.state_map = {"iner.head.weight": "head.weight"}
"""

BAD_ARMS = {
    "no file": "examples/own_modl.py:sdpa",
    "has no 'sdp'": f"{EXAMPLE}:sdp",
    "nosuch.module": "nosuch.module:build",
    ":raises'": "mine.py:raises",
    ":text'": "mine.py:text",
    ":no_ids'": "mine.py:no_ids",
    ":flat'": "mine.py:flat",
    ":renamed'": "mine.py:renamed",
    ":mapped'": "mine.py:mapped",
    "/nope/python": f"{EXAMPLE}:sdpa[python=/nope/python]",
}
MESSAGES = blocks(PAGES["docs/own-models.md"], "text")[-1].splitlines()

Refuse = Callable[[str], str]


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Compare the example with a bad arm inside this process; returns the one line that is printed."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / EXAMPLE, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)

    def call(arm: str) -> str:
        options = (
            "--workload infer --batch-size 1 --seq-length 8 --device cpu --isolation inline --launches 1"
        )
        more = ["--weights", "own"] if arm.endswith("flat") else []
        with pytest.raises(SystemExit) as ended:
            cli.main(["compare", f"{EXAMPLE}:plain", arm, *options.split(), *more])
        assert ended.value.code == 4
        assert {p.name for p in tmp_path.iterdir()} <= {"mine.py", "examples", "__pycache__"}
        return capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.mark.parametrize("sign", BAD_ARMS)
def test_bad_arm_gets_the_line_that_the_page_shows(sign: str, refuse: Refuse, tmp_path: Path) -> None:
    (shown,) = [line for line in MESSAGES if sign in line]
    line = refuse(BAD_ARMS[sign])
    assert line.replace(str(tmp_path), "/home/me") == shown


def test_page_shows_no_other_line() -> None:
    assert len(MESSAGES) == len(BAD_ARMS)
