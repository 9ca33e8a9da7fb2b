"""A keeper that runs on the lab's host."""

from meshnet.model.capture import KeeperReport
from meshnet.net.keeper import ask_keeper
from tests.init.kernel import Lab
from tests.world import Process, wait_for


class Kept:
    """A keeper on the lab's host, with settings in a file."""

    def __init__(self, lab: Lab) -> None:
        self.host, self.lab = lab.app, lab
        self.config = lab.app.directory / "meshnet.toml"
        self.configure()
        self.process: Process | None = None

    def configure(self, more: str = "") -> None:
        self.config.write_text(
            f"[admin]\nsocket = '{self.host.directory}/admin.sock'\n[capture]\nbackend = '{self.lab.backend.name}'\n"
            f"exclude_inbound_ports = []\nproof_interval = '500ms'\n{more}"
        )

    def start(self, **environment: str) -> KeeperReport:
        self.process = self.host.spawn(
            "meshnet", "rules", "keep", "--config", self.config, name="keeper", **environment
        )
        return wait_for(lambda: self.now() if self.is_captured() else None, what="the rules are in")

    def ask(self) -> KeeperReport | None:
        with self.host.entered():
            return ask_keeper()

    def now(self) -> KeeperReport:
        report = self.ask()
        if report is None:
            raise ConnectionError("no keeper answers")
        return report

    def is_captured(self) -> bool:
        with self.host.entered():
            installed = self.lab.backend.installed()
        return installed is not None and not installed.draining() and bool(installed.redirect_ports())

    def repaired(self, times: int = 1) -> KeeperReport:
        return wait_for(lambda: report if (report := self.now()).repairs >= times else None, what="a repair")

    def flush(self) -> None:
        """What another program does that takes all tables for its own."""
        if self.lab.backend.name == "nft":
            self.host.run("nft", "flush", "ruleset")
        else:
            suffix = "-legacy" if self.lab.backend.name == "legacy" else ""
            for command in ("iptables", "ip6tables"):
                self.host.run(f"{command}{suffix}", "-t", "nat", "-F")

    @property
    def log(self) -> str:
        assert self.process is not None
        return self.process.output
