"""The Dockerfile against the rest of the tree: what can be wrong with it without building it.

Whether the image works is looked at by `make image` itself, in the image.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

TREE = Path(__file__).resolve().parents[2]
Instruction = tuple[str, str]


def stages() -> list[list[Instruction]]:
    """Return the instructions (name, arguments) of each stage; what comes before the first FROM is left out."""
    text = (TREE / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: list[list[Instruction]] = []
    for line in joined.splitlines():
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, arguments))
    return found


def copied_from_tree(stage: list[Instruction]) -> set[str]:
    """Return what a stage copies from the tree; what it copies from another stage does not count."""
    sources = (words.split()[:-1] for name, words in stage if name == "COPY" and "--from=" not in words)
    return {source for words in sources for source in words}


def packages_of(stage: list[Instruction]) -> set[str]:
    """Return the Debian packages that a stage installs."""
    commands = " && ".join(words for name, words in stage if name == "RUN").split("&&")
    installs = (command.split("apt-get install")[1] for command in commands if "apt-get install" in command)
    return {word for words in installs for word in words.split() if not word.startswith("-")}


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((TREE / "pyproject.toml").read_text(encoding="utf-8"))


def test_build_stage_has_all_that_the_package_is_built_from(project: dict[str, Any]) -> None:
    hook = Path(project["tool"]["hatch"]["build"]["hooks"]["custom"]["path"])
    wanted = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"],
        hook.parts[0],
        "deploy/build.lock",
        "deploy/requirements.lock",
    }
    assert copied_from_tree(stages()[0]) == wanted


def test_what_is_copied_exists_and_is_let_through() -> None:
    allowed = (TREE / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for source in copied_from_tree(stages()[0]):
        assert (TREE / source).exists()
        assert f"!{source}" in allowed


def test_stubs_of_the_tree_do_not_get_into_the_build() -> None:
    rules = (TREE / ".dockerignore").read_text(encoding="utf-8").splitlines()
    # The last rule that fits decides.
    assert rules.index("csi_quobyte/pb") > rules.index("!csi_quobyte")


def test_image_takes_nothing_from_the_tree_and_no_build_tools() -> None:
    build, image = stages()
    assert not copied_from_tree(image)
    assert packages_of(image) >= {"python3", "qemu-utils"}
    assert packages_of(image) & packages_of(build) == {"python3"}


def test_image_runs_the_command_without_privileges(project: dict[str, Any]) -> None:
    image = stages()[-1]
    assert [words for name, words in image if name == "USER"] == ["65532:65532"]
    (command,) = project["project"]["scripts"]
    assert [words for name, words in image if name == "ENTRYPOINT"] == [f'["{command}"]']


def test_every_package_has_its_hash() -> None:
    for _, words in stages()[0]:
        for command in words.split("&&"):
            if "/build/bin/pip" in command:
                assert "--require-hashes" in command or "--no-index" in command
