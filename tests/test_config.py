"""A configuration is read strictly, says what is wrong with the nearest name, and survives YAML."""

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay import config
from assay.config import RunConfig, parse_arm
from assay.errors import UsageError
from assay.measure.record import Scalar


def refused(values: dict[str, Any]) -> str:
    """The one line that a configuration is refused with."""
    with pytest.raises(UsageError) as caught:
        config.from_mapping(values).validate()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_arm(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_arm(text)
    return str(caught.value)


# Values


def test_defaults_are_those_of_the_original_and_valid() -> None:
    given = RunConfig()
    given.validate()
    assert given.arms == ["eager", "fused"]
    assert (given.warmup_steps, given.launches, given.margin) == (10, 5, 0.01)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dtype", "bf61", "unknown --dtype 'bf61'; expected one of auto, bf16-autocast, bf16, fp16, fp32"),
        ("dtype", [], "--dtype names nothing"),
        ("workload", [], "--workload names nothing"),
        (
            "weights",
            "share",
            "unknown --weights 'share'; expected one of shared, own; did you mean 'shared'?",
        ),
        ("isolation", "proces", "did you mean 'process'?"),
        ("compile_mode", "max", "unknown --compile-mode 'max'"),
        ("device", "gpu", "unknown device 'gpu'; expected auto, cpu, cuda or cuda:N"),
        ("device", "cuda:", "unknown device 'cuda:'"),
        ("warmup_steps", -1, "--warmup-steps is too small; expected at least 0; got -1"),
        ("benchmark_steps", 0, "--benchmark-steps is too small; expected at least 1; got 0"),
        ("gen_num_iterations", 0, "--gen-num-iterations is too small"),
        ("launches", 0, "--launches is too small; expected at least 1; got 0"),
        ("seed", -1, "--seed is too small"),
        ("seed", 10**18 * 10, "--seed is too large"),
        ("benchmark_steps", 3, "expected at least one block for each of 5 launches; got 3"),
        ("rel_ci", 0.0, "--rel-ci must be positive"),
        ("time_budget_s", -1.0, "--time-budget must be positive"),
        ("time_budget_s", 1e9, "--time-budget leaves no time for anything else before --timeout"),
        ("time_budget_s", 4500.0, "expected less than 4500 s for 5 launches; got 4500 s; raise --timeout"),
        ("timeout_s", float("nan"), "--timeout must be positive"),
        ("timeout_s", float("inf"), "--timeout is too large"),
        ("timeout_s", 1e10, "--timeout is too large"),
        ("time_budget_s", float("inf"), "--time-budget is too large"),
        ("rel_ci", float("inf"), "--rel-ci is too large"),
        ("margin", 1.0, "--margin or --confidence is out of range"),
        ("confidence", 1.0, "--margin or --confidence is out of range"),
        ("arms", [], "no arm to measure; expected one or more arms"),
        ("attribute", True, "--attribute explains one arm by another"),
    ],
)
def test_value_that_no_machine_could_honour_is_refused(key: str, value: Any, said: str) -> None:
    assert said in refused({"arms": ["a", "b", "c"], key: value})


def test_launches_until_a_verdict_may_not_be_fewer_than_those_asked_for() -> None:
    assert "--max-launches is too small" in refused({"until_verdict": True, "launches": 5, "max_launches": 4})
    config.from_mapping({"launches": 5, "max_launches": 4}).validate()


def test_generation_has_its_own_number_of_blocks() -> None:
    both = RunConfig(benchmark_steps=50, gen_num_iterations=20)
    assert (both.blocks("train"), both.blocks("generate")) == (50, 20)
    assert RunConfig(benchmark_steps=50).blocks("generate") == 50
    assert RunConfig(gen_num_iterations=20).blocks("infer") is None


# Mappings and YAML


def test_unknown_key_names_the_nearest_and_its_source() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'lanches' in mine.yaml.*did you mean 'launches'\?"):
        config.from_mapping({"lanches": 3}, "mine.yaml")


@pytest.mark.parametrize("values", [{"launches": "many"}, {"seed": 1.5}, {"compile": "yes"}, {"arms": 3}])
def test_value_of_another_type_is_refused(values: dict[str, Any]) -> None:
    assert "has the wrong type" in refused(values)


def test_parameters_must_be_a_mapping() -> None:
    assert refused({"params": [1, 2]}).startswith("'params' in configuration is not a mapping")


def test_single_values_are_lists_of_one() -> None:
    read = config.from_mapping({"workload": "infer", "dtype": "fp32", "params": {"batch_size": 4}})
    assert (read.workload, read.dtype, read.params) == (["infer"], ["fp32"], {"batch_size": [4]})


words = st.text("abcdefghij_-.", min_size=1, max_size=8)
scalars = st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text())


@given(
    read=st.builds(
        RunConfig,
        arms=st.lists(st.text(), max_size=3),
        params=st.dictionaries(words, st.lists(scalars, min_size=1, max_size=3), max_size=3),
        seed=st.integers(0, 2**40),
        benchmark_steps=st.none() | st.integers(1, 1000),
        rel_ci=st.floats(1e-9, 1.0),
        compile=st.booleans(),
    )
)
def test_yaml_gives_back_the_same_configuration_and_hash(
    read: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(config.to_yaml(read), encoding="utf-8")
    again = config.load(file)
    assert again == read
    assert again.hash == read.hash


def test_hash_changes_with_every_field() -> None:
    base = RunConfig()
    changed = {
        field: msgspec.structs.replace(base, **{field: value})
        for field, value in {
            "arms": ["eager", "sdpa"],
            "params": {"shape": ["tiny"]},
            "seed": 1,
            "launches": 4,
            "compile": False,
            "time_budget_s": 61.0,
        }.items()
    }
    assert len({base.hash, *(c.hash for c in changed.values())}) == 1 + len(changed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "is not YAML"),
        ("- eager", "holds no configuration"),
        ("", "holds no configuration"),
        ("lunches: 3", "did you mean 'launches'?"),
    ],
)
def test_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        config.load(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not YAML"):
        config.load(tmp_path / "binary.yaml")


# Arms


names = st.text("abcdefghijklmnop_", min_size=1, max_size=8).filter(lambda n: n not in ("python", "cwd"))
plain = st.one_of(
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(-1e6, 1e6).filter(lambda f: not f.is_integer()),
    st.text("abcdefgh/._-+", min_size=1, max_size=10).filter(
        lambda t: isinstance(config.parse_scalar(t), str)
    ),
)


@given(
    target=st.from_regex(r"[a-z][a-z0-9_./-]{0,12}(:[a-z]+)?", fullmatch=True),
    options=st.dictionaries(names, plain, max_size=4),
    env=st.dictionaries(st.from_regex(r"[A-Z][A-Z_]{0,8}", fullmatch=True), words, max_size=3),
    gap=st.sampled_from(["", " "]),
)
def test_arm_is_read_back_as_it_was_written(
    target: str, options: dict[str, Scalar], env: dict[str, str], gap: str
) -> None:
    pairs = [f"{k}{gap}={gap}{v}" for k, v in options.items()] + [f"env.{k}={v}" for k, v in env.items()]
    text = f"{target}[{gap}{f'{gap},{gap}'.join(pairs)}{gap}]" if pairs else target
    arm = parse_arm(text)
    assert (arm.name, arm.target, arm.options, arm.env) == (text, target, options, env)
    assert (arm.python, arm.cwd) == (None, None)


def test_arm_may_bring_its_interpreter_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "python").symlink_to(sys.executable)
    arm = parse_arm("m.py:build[python=venv/python,cwd=venv]")
    assert arm.python == str(tmp_path / "venv" / "python"), "its own path, not where the link leads"
    assert arm.cwd == str(tmp_path / "venv")
    assert arm.options == {}


def test_option_and_variable_of_one_name_are_two_things() -> None:
    arm = parse_arm("fused[env.compile=1,compile=false]")
    assert (arm.env, arm.options) == ({"compile": "1"}, {"compile": False})


@pytest.mark.parametrize(
    ("text", "changes", "wanted"),
    [
        ("eager", {"compile": True}, "eager[compile=true]"),
        ("eager", {}, "eager"),
        ("eager[]", {}, "eager"),
        (" fused[ compile = false ] ", {"loss": "torch"}, "fused[compile=false,loss=torch]"),
        ("fused[compile=false,env.A=1]", {"compile": True}, "fused[compile=true,env.A=1]"),
    ],
)
def test_arm_is_spelled_with_its_changes(text: str, changes: dict[str, Scalar], wanted: str) -> None:
    assert config.spelled(text, changes) == wanted
    assert parse_arm(wanted).options == parse_arm(text).options | changes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fused[compile=false", "arm 'fused[compile=false' cannot be read; expected name or name[option"),
        ("fused]", "cannot be read"),
        ("[compile=false]", "cannot be read"),
        ("", "cannot be read"),
        ("fused[compile]", "option 'compile' of arm 'fused[compile]' cannot be read; expected option=value"),
        ("fused[=1]", "cannot be read"),
        ("fused[env.=1]", "option 'env.=1'"),
        ("fused[compile=1,compile=2]", "gives 'compile' twice"),
        ("fused[env.A=1,env.A=2]", "gives 'env.A' twice"),
        ("fused[python=no/such/python]", "no interpreter 'no/such/python'"),
        ("fused[cwd=no/such/folder]", "no folder 'no/such/folder'"),
    ],
)
def test_arm_that_cannot_be_read_is_refused(text: str, said: str) -> None:
    assert said in refused_arm(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("-1", -1), ("0.5", 0.5), ("1e-3", 1e-3), ("True", True), ("false", False), ("4x", "4x")],
)
def test_scalars_are_read_by_their_look(text: str, value: Scalar) -> None:
    read = config.parse_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert parse_arm("eager[cwd=~]").cwd == str(tmp_path)
