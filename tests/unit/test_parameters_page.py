"""docs/parameters.md: it is what the code says, has every parameter, and a difference between the two is found.

Axes: what changed, the page or the code.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from csi_quobyte.host import filesystem_options
from csi_quobyte.operations.volumes import DEFAULT_FILESYSTEM
from csi_quobyte.rpc import convert, parameters
from csi_quobyte.rpc.parameters import FSTYPE, Parameter

TOOL = Path(__file__).resolve().parents[1] / "tools" / "parameters_page.py"


def load() -> ModuleType:
    """Import the generator, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("parameters_page", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the generator puts the tree into it
    return load()


@pytest.fixture
def page(tool: ModuleType) -> str:
    made: str = tool.page()
    return made


def rows(page: str) -> dict[str, list[str]]:
    """Return the cells of every table's rows, by the first cell."""
    lines = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| "))
    return {first: rest for first, *rest in lines}


def test_page_in_the_tree_is_what_the_code_says(tool: ModuleType, page: str) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == page
    assert tool.main(["--check"]) == 0


def test_every_parameter_is_there_with_values_default_and_meaning(page: str) -> None:
    found = rows(page)
    for parameter in (*parameters.VOLUME_PARAMETERS, *parameters.SNAPSHOT_PARAMETERS):
        values, default, meaning = found[f"`{parameter.name}`"]
        assert all(f"`{value}`" in values for value in parameter.values)
        assert parameter.default in default
        assert meaning == parameter.meaning
    for name in (*parameters.RESERVED_VOLUME_PARAMETERS, *parameters.RESERVED_SNAPSHOT_PARAMETERS):
        assert f"`{name}`" in page


def test_table_of_parameters_has_the_file_systems_that_there_are() -> None:
    (fstype,) = (parameter for parameter in parameters.VOLUME_PARAMETERS if parameter.name == FSTYPE)
    assert (fstype.values, fstype.default) == (filesystem_options.SUPPORTED, DEFAULT_FILESYSTEM)


def test_every_option_of_mount_without_a_value_is_accepted_as_the_page_writes_it(page: str) -> None:
    for name in filesystem_options.SUPPORTED:
        section = page.split(f"### {name}\n")[1].split("`mountOptions`: ")[1].split("\n")[0].partition(". ")[0]
        options = [option.strip("`.") for option in section.split(", ")]
        plain = [option for option in options if "=" not in option]
        assert "noatime" in plain
        for option in plain:
            filesystem_options.check_mount_options(name, [option])


def test_example_is_accepted_and_stands_on_the_page(tool: ModuleType, page: str) -> None:
    read = parameters.volume_parameters(tool.EXAMPLE_PARAMETERS)
    assert (read.pool, read.preallocation, read.filesystem) == ("main", "off", "ext4")
    parameters.mkfs_options(read.filesystem, read.mkfs_options)
    filesystem_options.check_mount_options(read.filesystem, tool.EXAMPLE_MOUNT_OPTIONS)
    example = page.split("```yaml\n")[1].split("```")[0]
    lines = [line.strip() for line in example.split("parameters:\n")[1].split("mountOptions:")[0].splitlines()]
    written = {name: value.strip('"') for name, value in (line.split(": ", 1) for line in lines)}
    assert written == tool.EXAMPLE_PARAMETERS
    assert 'preallocation: "off"' in lines, "YAML reads a bare off as false"


def test_contradictions_are_found_by_trying(tool: ModuleType) -> None:
    found = {frozenset(claim.items()) for claim, _ in tool.contradictions()}
    assert frozenset({("dataPath", "loop")}) in found
    assert frozenset({("volumeFormat", "raw"), ("preallocation", "metadata")}) in found
    assert frozenset({("mkfsOptions", "-m 1"), ("volumeMode", "Block")}) in found
    assert not any(claim < other for claim in found for other in found), "only the smallest combinations"


@pytest.mark.parametrize(
    ("wanted", "changed"),
    [("`qcow2`, `raw`", "`qcow2`"), ("metadata needs volumeFormat qcow2", "metadata needs qcow2"), ("8 MiB", "9 MiB")],
)
def test_change_of_the_page_is_found_and_shown(
    tool: ModuleType,
    page: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wanted: str,
    changed: str,
) -> None:
    monkeypatch.setattr(tool, "PAGE", tmp_path / "parameters.md")
    assert wanted in page
    drifted = page.replace(wanted, changed)
    tool.PAGE.write_text(drifted, encoding="utf-8")
    assert tool.main(["--check"]) == 1
    shown = capsys.readouterr().err
    assert "make docs" in shown
    assert any(changed in line for line in shown.splitlines() if line.startswith("-"))
    assert tool.PAGE.read_text(encoding="utf-8") == drifted, "a check changes nothing"
    assert tool.main(["--write"]) == 0
    assert tool.main(["--check"]) == 0


def test_missing_page_is_found(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tool, "PAGE", tmp_path / "parameters.md")
    assert tool.main(["--check"]) == 1


def test_change_of_a_meaning_in_the_code_is_found(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = parameters.VOLUME_PARAMETERS
    monkeypatch.setattr(parameters, "VOLUME_PARAMETERS", (replace(first, meaning="Something else."), *others))
    assert tool.main(["--check"]) == 1
    assert "+| `pool` | text | the only pool | Something else. |" in capsys.readouterr().err


def test_new_parameter_has_to_get_into_the_example(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = Parameter("colour", ("red",), "red", "Colour of the volume.")
    monkeypatch.setattr(parameters, "VOLUME_PARAMETERS", (*parameters.VOLUME_PARAMETERS, new))
    assert tool.main(["--check"]) == 1
    assert "example" in capsys.readouterr().err


def test_page_is_not_made_when_what_it_calls_refused_is_accepted(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert, "check_mount_options", lambda _, options: tuple(options))
    assert tool.main(["--check"]) == 1
    assert "errors=panic" in capsys.readouterr().err


def test_pattern_without_words_is_named(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**filesystem_options.MOUNT["xfs"], "colour": "=[a-f]{6}"}
    monkeypatch.setattr(filesystem_options, "MOUNT", {**filesystem_options.MOUNT, "xfs": options})
    with pytest.raises(ValueError, match="a-f"):
        tool.page()
