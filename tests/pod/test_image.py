"""init/Containerfile, as far as it goes without building it: it fits the tree and what `meshnet inject` writes."""

import re
import tomllib
from pathlib import Path

from meshnet import __version__
from meshnet_cli.kubernetes import containers
from meshnet_cli.kubernetes.wishes import IMAGE, Wishes
from tests.pod.kubelet import GROUPS, USERS

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "init/Containerfile").read_text()
LINES = [line for line in re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", TEXT)).splitlines() if line]
BUILD, FINAL = [stage.splitlines() for stage in re.split(r"(?m)^(?=FROM )", "\n".join(LINES)) if stage]


def arguments(stage: list[str], instruction: str) -> list[list[str]]:
    return [line.split()[1:] for line in stage if line.split()[0] == instruction]


def test_everything_that_is_copied_is_there_and_everything_that_the_build_needs_is_copied() -> None:
    copied = {source for *sources, _ in arguments(BUILD, "COPY") for source in sources}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["where"]
    assert copied >= {"pyproject.toml", project["project"]["readme"], "meshnet", *(set(packages) - {"."})}
    assert "-c scripts/constraints.txt ." in TEXT


def test_images_are_pinned_and_no_tool_of_the_first_stage_stays() -> None:
    images = [words[0] for stage in (BUILD, FINAL) for words in arguments(stage, "FROM")]
    assert len(set(images)) == 1
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim-\w+", images[0])
    assert arguments(FINAL, "COPY") == [["--from=build", "/opt/meshnet", "/opt/meshnet"]]
    assert not re.search(r"gcc|-dev|pip", "\n".join(FINAL))


def test_its_programs_are_those_that_the_manifests_start() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for container in (containers.init_container(Wishes(), []), containers.proxy_container(Wishes(), [], 30)):
        assert container["command"][0] in scripts
        assert container["image"] == IMAGE == f"meshnet:{__version__}"
    assert f"-t {IMAGE} -f init/Containerfile" in TEXT
    assert any("PATH=/opt/meshnet/bin:$PATH" in words for words in arguments(FINAL, "ENV"))


def test_its_user_is_the_sidecar_s_and_root_is_in_the_group() -> None:
    assert arguments(FINAL, "USER") == [[f"{containers.GID}:{containers.GID}"]]
    assert f"groupadd --system --gid {containers.GID} meshnet" in TEXT
    assert f"useradd --system --uid {containers.GID} --gid {containers.GID}" in TEXT
    assert "usermod --append --groups meshnet root" in TEXT
    # What the tests of this folder run the containers with.
    assert f"meshnet:x:{containers.GID}:{containers.GID}:" in USERS
    assert f"meshnet:x:{containers.GID}:root" in GROUPS
