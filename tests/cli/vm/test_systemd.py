"""What is looked at before systemd is asked to run a sidecar. Whole services run on machines: tests/machines."""

from pathlib import Path

import pytest

from meshnet.errors import CommandError
from meshnet_cli.vm import systemd
from tests.cli.sidecar import clean_environment


@pytest.mark.parametrize(
    ("variable", "value", "setting"),
    [("MESHNET_CAPTURE__GID", "15138", "capture.gid=15138"), ("MESHNET_RELAY", "python", "proxy.relay=python")],
)
def test_a_setting_that_the_service_would_not_see_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, value: str, setting: str
) -> None:
    config = tmp_path / "meshnet.toml"
    config.write_text("[log]\nlevel = 'debug'\n")
    monkeypatch.setattr("os.environ", clean_environment() | {"MESHNET_NODE": "db-1"})
    systemd.need_settings_kept(str(config))
    monkeypatch.setenv(variable, value)
    with pytest.raises(CommandError) as refused:
        systemd.need_settings_kept(str(config))
    assert refused.value.what.startswith(f"{variable} is set here")
    assert refused.value.fix == f"unset {variable}; sudo meshnet set {setting}"
