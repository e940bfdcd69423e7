"""From a configuration to cases and arms, and every refusal that needs no process."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay import plugins
from assay.config import RunConfig
from assay.errors import UsageError
from assay.plan import Plan, make_plan

TINY = {"shape": ["tiny"], "batch_size": [2], "seq_length": [32]}


def plan(arms: list[str] | None = None, workload: str = "infer", **more: Any) -> Plan:
    params = TINY | more.pop("params", {})
    known = plugins.find("workloads", workload).params if workload in plugins.names("workloads") else params
    return make_plan(
        RunConfig(
            arms=arms or ["eager", "sdpa"],
            workload=[workload],
            params={k: v for k, v in params.items() if k in known or k not in TINY},
            device="cpu",
            **more,
        )
    )


def refused(*args: Any, **more: Any) -> str:
    with pytest.raises(UsageError) as caught:
        plan(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Arms


def test_first_arm_is_the_baseline_of_every_pair() -> None:
    made = plan(["eager", "sdpa", "fused"])
    assert [(p.baseline.name, p.other.name) for p in made.pairs] == [("eager", "sdpa"), ("eager", "fused")]
    assert made.launches() == 2 * 5


def test_arm_against_itself_is_told_apart_by_a_number() -> None:
    assert [a.name for a in plan(["eager", "eager", "sdpa", "eager"]).arms] == [
        "eager",
        "eager#2",
        "sdpa",
        "eager#3",
    ]


def test_file_whose_name_holds_the_numbers_sign_is_told_apart_too(tmp_path: Path) -> None:
    file = tmp_path / "a#b.py"
    file.write_text("")
    assert [a.name for a in plan([f"{file}:build"] * 2).arms] == [f"{file}:build", f"{file}:build#2"]


def test_own_options_stand_before_the_runs_flags_and_those_before_defaults() -> None:
    made = plan(["fused", "fused[compile=true]"], compile=False, compile_mode="max-autotune")
    assert [(a.options["compile"], a.options["compile_mode"]) for a in made.arms] == [
        (False, "max-autotune"),
        (True, "max-autotune"),
    ]


def test_compiling_by_default_gives_it_to_no_arm_that_has_none() -> None:
    assert [a.options["compile"] for a in plan(["eager", "compile"]).arms] == [False, True]


def test_ingredients_that_do_not_go_together_are_refused_before_any_process() -> None:
    with pytest.raises(UsageError, match="cuda_graph=true needs a CUDA device"):
        plan(["eager", "compile[cuda_graph=true]"])
    with pytest.raises(UsageError, match="attention=flash is a kernel for 16-bit values; expected bf16"):
        plan(["eager", "eager[attention=flash]"], dtype=["fp32"])


def test_builders_file_is_looked_for_in_the_arms_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "inner" / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    made = plan(["mine.py:build", "mine.py:build[cwd=inner]"])
    assert [a.target for a in made.arms] == ["mine.py:build"] * 2, "as typed: no folder of the machine's"
    with pytest.raises(UsageError, match=r"no file 'inner/mine\.py'"):
        plan(["mine.py:build", "inner/mine.py:build[cwd=inner]"])


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (
            "egaer",
            "unknown variant 'egaer'; expected one of activations, compile, cudnn, eager, flash, fused, hf",
        ),
        (
            "fused[compil=false]",
            "has no option 'compil'; expected one of compile_mode, attention, norm",
        ),
        ("fused[compile=maybe]", "option 'compile' of arm 'fused[compile=maybe]' cannot be maybe"),
        ("fused[compile_mode=defualt]", "did you mean 'default'?"),
        ("hf[x=1]", "has no option 'x'; expected one of attn_implementation"),
        ("eager[norm=ligre]", "did you mean 'liger'?"),
        ("gone.py:build", "no file 'gone.py'"),
        ("mine.py", "arm 'mine.py' names no builder; expected mine.py:NAME"),
        ("mine.py:", "arm 'mine.py:' names no builder"),
        (":build", "arm ':build' names no builder"),
    ],
)
def test_wrong_arm_is_refused(arm: str, said: str) -> None:
    assert said in refused(["eager", arm])


@pytest.mark.parametrize("place", ["env.OMP_NUM_THREADS=1", "cwd=."])
def test_arm_with_a_place_of_its_own_cannot_run_inline(place: str) -> None:
    """It would be measured in this process's environment instead, and the record would not say so."""
    assert "asks for a process of its own" in refused(["eager", f"sdpa[{place}]"], isolation="inline")
    plan(["eager", f"sdpa[{place}]"])


def test_workload_that_a_variant_cannot_do_is_refused() -> None:
    assert "arm 'eager' cannot do the workload 'call'" in refused(workload="call")


# Cases


@given(
    batch=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    length=st.lists(st.integers(1, 128), min_size=1, max_size=3),
    dtypes=st.lists(st.sampled_from(["fp32", "bf16", "bf16-autocast", "auto"]), min_size=1, max_size=3),
)
def test_grid_is_every_combination_once(batch: list[int], length: list[int], dtypes: list[str]) -> None:
    made = plan(params={"batch_size": batch, "seq_length": length}, dtype=dtypes)
    wanted = {(b, n, "fp32" if d == "auto" else d) for b in batch for n in length for d in dtypes}
    found = [(c.params["batch_size"], c.params["seq_length"], c.dtype) for c in made.cases]
    assert set(found) == wanted
    assert len(found) == len(wanted)


def test_parameters_go_to_the_workloads_that_know_them() -> None:
    made = make_plan(
        RunConfig(
            workload=["infer", "generate"],
            params={"shape": ["tiny"], "seq_length": [64], "gen_input_length": [8], "gen_output_length": [4]},
            device="cpu",
        )
    )
    infer, generate = (c.params for c in made.cases)
    assert infer == {"shape": "tiny", "batch_size": 2, "seq_length": 64}
    assert generate == {
        "shape": "tiny",
        "gen_batch_size": 1,
        "gen_input_length": 8,
        "gen_output_length": 4,
    }


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"batch_size": [0]}, "--batch-size is too small; expected at least 1; got 0"),
        ({"batch_size": ["two"]}, "--batch-size is not a whole number; expected a whole number; got 'two'"),
        ({"batch_size": [True]}, "--batch-size is not a whole number"),
        ({"seq_length": [1.5]}, "--seq-length is not a whole number"),
        ({"batch_size": []}, "parameter 'batch_size' has no value"),
        ({"btach_size": [2]}, "unknown parameter 'btach_size' for infer; expected one of shape, batch_size"),
        ({"shape": ["tny"]}, "did you mean 'tiny'?"),
        ({"seq_length": [129]}, "sequence length beyond the positions of shape 'tiny'; expected at most 128"),
    ],
)
def test_wrong_parameter_is_refused(params: dict[str, list[Any]], said: str) -> None:
    assert said in refused(params=params)


def test_unknown_workload_names_the_nearest() -> None:
    assert "unknown workload 'trian'" in refused(workload="trian")
    assert "did you mean 'train'?" in refused(workload="trian")


def test_prompt_and_output_beyond_the_positions_are_refused() -> None:
    lengths = {"gen_input_length": [100], "gen_output_length": [29]}
    assert "prompt + output beyond the positions of shape 'tiny'; expected at most 128; got 129" in refused(
        workload="generate", params=lengths
    )


def test_unknown_optimizer_names_the_nearest() -> None:
    said = refused(workload="train", params={"optimizer": ["adam"]})
    assert said.startswith("--optimizer cannot be 'adam'; expected one of none, sgd, adamw; did you mean")


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": 15}, "odd head size; expected an even head_dim, since RoPE turns halves; got 15"),
        ({"num_key_value_heads": 3}, "KV heads do not divide heads"),
        ({"architectures": ["GPT2LMHeadModel"]}, "unsupported architecture 'GPT2LMHeadModel'"),
        ({"hidden_size": None}, "config.json: bad 'hidden_size'"),
    ],
)
def test_impossible_config_json_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    assert plan(params={"shape": [str(file)]}).cases[0].params["shape"] == str(file)
    file.write_text(json.dumps({**LLAMA, **change}))
    assert said in refused(params={"shape": [str(file)]})
