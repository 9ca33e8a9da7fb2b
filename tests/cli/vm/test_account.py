"""Which files are the sidecar's to be given. Users themselves are made on whole machines: tests/machines."""

from pathlib import Path

from meshnet_cli.vm.account import is_own_folder
from meshnet_cli.vm.ledger import Ledger


def test_a_folder_that_others_use_is_not_handed_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    (tmp_path / "srv").mkdir()
    (tmp_path / "lib" / "meshnet").mkdir(parents=True)
    made = tmp_path / "srv" / "mesh-state"
    ledger.note_folders(made)
    made.mkdir()
    assert is_own_folder(made, ledger)
    assert is_own_folder(tmp_path / "lib" / "meshnet", ledger)
    assert not is_own_folder(tmp_path / "srv", ledger)
