"""`meshnet proxy`, where it cannot start."""

import pytest

from tests.cli.machine import Machine
from tests.cli.sidecar import WITHOUT_POWERS

pytestmark = pytest.mark.netns


def test_without_the_right_to_its_admin_socket_s_folder_it_says_so_and_exits_with_5(machine: Machine) -> None:
    folder = machine.admin.parent
    folder.mkdir()
    folder.chmod(0o500)
    done = machine.meshnet("proxy", "--config", str(machine.config), by=WITHOUT_POWERS)
    assert done.returncode == 5
    assert f"cannot listen at {machine.admin}: Permission denied\n" in done.stderr
    assert "the folder belongs to somebody else\n" in done.stderr
    assert "sudo meshnet proxy\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_no_folder_for_its_admin_socket_at_all_it_is_no_matter_of_rights(machine: Machine) -> None:
    machine.admin.parent.write_text("a file")
    done = machine.meshnet("proxy", "--config", str(machine.config))
    assert done.returncode == 1
    assert f"cannot listen at {machine.admin}: File exists\n" in done.stderr
