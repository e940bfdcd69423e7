"""The public surface, written down once: a name changes here and in the changelog, or not at all."""

from collections.abc import Sequence

import pytest

import assay
from assay import contracts
from assay.cli import app
from assay.systems import decoder, offload, resolvent

WHAT = [
    "--workload",
    "--shape",
    "--batch-size",
    "--seq-length",
    "--gen-batch-size",
    "--gen-input-length",
    "--gen-output-length",
    "--optimizer",
    "--set",
    "--dtype",
    "--device",
    "--seed",
    "--weights",
    "--no-compile",
    "--compile-mode",
    "--attribute",
]
HOW = [
    "--warmup-steps",
    "--benchmark-steps",
    "--gen-num-iterations",
    "--launches",
    "--until-verdict",
    "--max-launches",
    "--rel-ci",
    "--time-budget",
    "--timeout",
    "--margin",
    "--confidence",
    "--fail-if-slower",
    "--fresh-compile",
    "--isolation",
]
WHERE = ["--output", "-o", "--dir", "--resume", "--verbose", "-v"]

FLAGS = {
    "compare": ["ARMS", *WHAT, *HOW, *WHERE],
    "op": [
        *("FUNCTIONS", "--inputs", "--direction", "--cache", "--timing", "--set"),
        *("--dtype", "--device", "--seed", *HOW, *WHERE),
    ],
    "run": ["FILE", "--file", *WHERE],
    "report": ["FOLDER", "--folder", "--output", "-o"],
    "list": ["WHAT", "--what"],
    "doctor": ["--device", "--calibrate", "--launches", "--workload"],
    "phase2": ["--case", "--kpi", "--launches", "--time-budget", "--device", "--dir", "--resume"],
    "vram": [
        *("--mode", "--batch-sizes", "--sequence-lengths", "--shape", "--policy", "--base", "--dtype"),
        *("--memory-budget-mib", "--launches", "--time-budget", "--device", "--dir", "--resume"),
    ],
}


def flags(command: str) -> list[str]:
    """Every name that a command takes, in order; arguments that hold others have none of their own."""
    arguments = app[command].assemble_argument_collection(default_parameter=app.default_parameter)
    return [name for a in arguments if not a.children for name in a.names]


def test_commands_are_frozen() -> None:
    assert [name for name in app if not name.startswith("-")] == list(FLAGS)


@pytest.mark.parametrize(("command", "names"), FLAGS.items())
def test_flags_of_every_command_are_frozen(command: str, names: Sequence[str]) -> None:
    assert flags(command) == [name for name in names if name in ("ARMS", "FUNCTIONS") or not name.isupper()]


def test_flags_of_the_original_are_all_there() -> None:
    original = {
        "--batch-size",
        "--seq-length",
        "--warmup-steps",
        "--benchmark-steps",
        "--no-compile",
        "--compile-mode",
        "--verbose",
        "-v",
        "--output",
        "-o",
        "--gen-batch-size",
        "--gen-input-length",
        "--gen-output-length",
        "--gen-num-iterations",
    }
    assert original <= set(flags("compare"))


def test_names_of_the_package_are_frozen() -> None:
    assert assay.__all__ == [
        "AssayError",
        "Comparisons",
        "Measurement",
        "StoreError",
        "Unavailable",
        "UsageError",
        "WorkerError",
        "compare",
        "load",
        "measure",
    ]


def test_names_of_the_contracts_are_frozen() -> None:
    assert contracts.__all__ == [
        "KPI",
        "Arm",
        "Attempt",
        "Attempted",
        "Case",
        "Claim",
        "Dataset",
        "Decoding",
        "Entry",
        "Example",
        "Finding",
        "Ingredient",
        "LanguageModel",
        "Mark",
        "Metric",
        "Option",
        "Options",
        "Probe",
        "Record",
        "Scalar",
        "Suite",
        "SuiteRun",
        "System",
        "Trial",
        "Variant",
        "Work",
        "Workload",
    ]


def test_names_of_the_decoder_are_frozen() -> None:
    assert decoder.__all__ == [
        "SHAPES",
        "Decoder",
        "DecoderConfig",
        "Generator",
        "Parts",
        "RopeScaling",
        "load",
        "save",
    ]
    assert set(decoder.__all__) <= set(dir(decoder))
    with pytest.raises(AttributeError, match=r"'assay.systems.decoder' has no attribute 'lod'"):
        _ = decoder.lod


def test_names_of_the_offloader_are_frozen() -> None:
    assert offload.__all__ == [
        *("BlockProfile", "Candidate", "Choice", "Link", "Offloader", "Piece", "Plan", "PlannedOffloader"),
        *("Prediction", "Profile", "Skipped", "Statistics", "gradient_errors", "make_plan"),
        *("offload_activations", "plan_activations", "profile_step", "simulate"),
    ]
    assert set(offload.__all__) <= set(dir(offload))
    with pytest.raises(AttributeError, match=r"'assay.systems.offload' has no attribute 'ofload'"):
        _ = offload.ofload


def test_names_of_the_resolvent_are_frozen() -> None:
    assert resolvent.__all__ == [
        "IMPLEMENTATIONS",
        "PRESETS",
        "Phase2Config",
        "Phase2Model",
        "Phase2State",
        "create_phase2_model",
        "resolvent_diagonal",
    ]
    assert set(resolvent.__all__) <= set(dir(resolvent))
    with pytest.raises(AttributeError, match=r"'assay.systems.resolvent' has no attribute 'diagnal'"):
        _ = resolvent.diagnal


@pytest.mark.parametrize("module", [assay, contracts, decoder, offload, resolvent])
def test_every_name_that_is_promised_exists(module: object) -> None:
    names: list[str] = module.__all__  # type: ignore[attr-defined]  # a module that has one
    assert [n for n in names if not hasattr(module, n)] == []
