"""Plug-ins by name, by entry point and by dotted path, and what a wrong name is told."""

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from assay import plugins
from assay.errors import UsageError


@pytest.fixture(autouse=True)
def unchanged_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading a target adds to sys.path and sys.modules; what came from the test's folder goes with it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's variants: `theirs`, and one that takes a built-in's name."""
    module = ModuleType("their_package")
    module.__dict__["CHOSEN"] = SimpleNamespace(summary="theirs by attribute")
    module.__dict__["VARIANT"] = SimpleNamespace(summary="theirs by default")
    monkeypatch.setitem(sys.modules, "their_package", module)
    entries = [
        importlib.metadata.EntryPoint("theirs", "their_package:CHOSEN", "assay.variants"),
        importlib.metadata.EntryPoint("plain", "their_package", "assay.variants"),
        importlib.metadata.EntryPoint("mine", "their_package:CHOSEN", "assay.variants"),
    ]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [e for e in entries if e.group == group]
    )


@pytest.fixture
def builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in variants: a plug-in, a private helper, and one that must not be imported."""
    package = tmp_path / "house_variants"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(
        "from types import SimpleNamespace\nVARIANT = SimpleNamespace(summary='ours')\n"
    )
    (package / "_helper.py").write_text("")
    (package / "two_words.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_PACKAGES", {**plugins._PACKAGES, "variants": "house_variants"})


def message(call: str) -> str:
    """The one line that loading a target is refused with."""
    with pytest.raises(UsageError) as refused:
        plugins.load_target(call)
    text = str(refused.value)
    assert "\n" not in text
    return text


@pytest.mark.usefixtures("builtin")
def test_names_list_files_without_importing_them_and_hide_private_ones() -> None:
    assert plugins.names("variants") == ["mine", "two-words"]


@pytest.mark.usefixtures("builtin", "installed")
def test_entry_points_join_the_list_and_never_replace_a_builtin() -> None:
    assert plugins.names("variants") == ["mine", "plain", "theirs", "two-words"]
    assert plugins.find("variants", "theirs").summary == "theirs by attribute"
    assert plugins.find("variants", "plain").summary == "theirs by default"
    assert plugins.find("variants", "mine").summary == "ours"


@pytest.mark.usefixtures("builtin")
def test_unknown_name_lists_the_known_and_names_the_nearest() -> None:
    with pytest.raises(UsageError) as refused:
        plugins.find("variants", "mien")
    assert str(refused.value) == (
        "unknown variant 'mien'; expected one of mine, two-words; did you mean 'mine'?"
    )


@pytest.mark.parametrize("group", plugins.GROUPS)
def test_every_group_says_its_kind_when_a_name_is_unknown(group: str) -> None:
    with pytest.raises(UsageError, match=f"unknown {group[:-1]} 'no-such-thing'; expected"):
        plugins.find(group, "no-such-thing")


@pytest.mark.parametrize("group", plugins.GROUPS)
def test_every_installed_plugin_has_a_summary_of_one_line(group: str) -> None:
    found = plugins.summaries(group)
    assert list(found) == plugins.names(group)
    assert all(text and "\n" not in text for text in found.values())


def test_a_colon_makes_a_target() -> None:
    assert plugins.is_target("mine.py:build")
    assert plugins.is_target("pkg.module:build")
    assert not plugins.is_target("eager")


def test_target_in_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 7\n")
    (tmp_path / "mine.py").write_text("from neighbour_of_mine import WIDTH\ndef build():\n    return WIDTH\n")
    assert plugins.load_target(f"{tmp_path / 'mine.py'}:build")() == 7


def test_target_in_a_module_is_found_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models_of_mine.py").write_text("def build():\n    return 'built'\n")
    monkeypatch.chdir(tmp_path)
    assert plugins.load_target("models_of_mine:build")() == "built"


@pytest.mark.parametrize("text", ["mine.py", "mine.py:", ":build", ""])
def test_target_without_a_place_or_a_name_is_told_how_to_write_one(text: str) -> None:
    assert message(text) == (
        f"'{text}' cannot be read; expected a builder, pkg.module:NAME or path/to/file.py:NAME"
    )


def test_missing_module_is_named_with_the_remedy() -> None:
    assert message("no_such_pkg.models:build") == (
        "module 'no_such_pkg.models' does not import; "
        "got ModuleNotFoundError: No module named 'no_such_pkg'; "
        "run from the folder that holds it, or install it"
    )


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert (
        message(f"{tmp_path}/gone.py:build")
        == f"no file '{tmp_path}/gone.py'; expected path/to/file.py:build"
    )


def test_missing_attribute_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def build_fast(): ...\n")
    file = tmp_path / "mine.py"
    assert message(f"{file}:build_fats") == (
        f"'{file}' has no 'build_fats'; expected a builder; did you mean 'build_fast'?"
    )


def test_module_that_raises_says_what_it_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_of_mine.py").write_text("raise ValueError('weights are missing')\n")
    monkeypatch.chdir(tmp_path)
    assert "got ValueError: weights are missing" in message("raising_of_mine:build")
    assert "got ValueError: weights are missing" in message("raising_of_mine.py:build")


def test_syntax_error_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def build(:\n")
    assert "got SyntaxError: " in message(f"{tmp_path / 'mine.py'}:build")


def test_attribute_that_cannot_be_called_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("build = 3\n")
    assert message(f"{tmp_path / 'mine.py'}:build").endswith("is not callable; expected a builder; got int")
