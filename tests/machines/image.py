"""What the machines boot: a fresh Debian as it comes, and beside it the packages that provision.sh will ask for.

The machines reach nobody but each other. So apt finds its lists and packages in the image, as if they had been fetched,
and pip finds wheels in a folder; what is installed, and how, is provision.sh's business as on any machine.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

SUITES = {"bookworm": "3.11", "trixie": "3.13"}  # and the Python of each
CACHE = Path(os.environ.get("MESHNET_MACHINES", "/var/tmp/meshnet-machines"))
WHEELS = "/var/lib/wheels"  # in the machine
ROOT = Path(__file__).parents[2]

# As in a Vagrant box, or a cloud's image: no venv, no compiler, no iptables.
_FRESH = (
    "systemd-sysv,udev,dbus,libpam-systemd,openssh-server,sudo,iproute2,procps,kmod,netbase,python3,"
    "util-linux-extra,ca-certificates"
)
# What the test itself talks to; servers do not start before they are told to.
_TRAFFIC = ("postgresql", "postgresql-client", "redis-server", "redis-tools", "iperf3")
_TABLES = ("iptables",)  # for the backend of that name


def build(suite: str) -> Path:
    """The folder with the image of `suite`, made where it is not there as wanted. Raises CalledProcessError."""
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (CACHE / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(suite)


def _build(suite: str) -> Path:
    packages = [*_provisioned(), *_TRAFFIC, *_TABLES]
    wanted = hashlib.sha256(repr((_FRESH, packages, _hook(packages))).encode()).hexdigest()
    target, stamp = CACHE / suite, CACHE / f"{suite}.stamp"
    if target.is_dir() and stamp.exists() and stamp.read_text() == wanted:
        return target
    stamp.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    mirror, security = _mirrors()
    subprocess.run(
        [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory", f"--include={_FRESH}",
            '--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"',
            "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--skip=cleanup/apt", "--skip=cleanup/reproducible",
            f"--customize-hook={_hook(packages)}",
            suite, str(target),
            f"deb {mirror} {suite} main", f"deb {mirror} {suite}-updates main",
            f"deb {security} {suite}-security main",
        ],
        check=True,
    )  # fmt: skip
    stamp.write_text(wanted)
    return target


def wheels(suite: str) -> Path:
    """A folder with what pip installs on a machine of `suite`, fetched once. Raises CalledProcessError."""
    folder = CACHE / f"wheels-{suite}"
    stamp = folder / "stamp"
    wanted = (ROOT / "pyproject.toml").read_text() + (ROOT / "scripts/constraints.txt").read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    project = re.search(r"^dependencies = \[(.*?)^\]", wanted, re.MULTILINE | re.DOTALL)
    assert project is not None
    asked = [*re.findall(r'"(.+?)"', project[1]), "setuptools>=77"]
    subprocess.run(
        [
            ROOT / ".venv/bin/python", "-m", "pip", "download", "-qq", "--disable-pip-version-check",
            "--only-binary=:all:", f"--python-version={SUITES[suite]}", "-c", ROOT / "scripts/constraints.txt",
            "-d", folder, *asked,
        ],
        check=True,
    )  # fmt: skip
    stamp.write_text(wanted)
    return folder


def _provisioned() -> list[str]:
    """The packages that provision.sh installs: read there, so that the two never differ."""
    script = (ROOT / "vagrant/provision.sh").read_text()
    found = re.search(r"^packages='(.*?)'", script, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].split()


def _hook(packages: list[str]) -> str:
    """Run on the finished tree `$1`."""
    return " && ".join(
        (
            'chroot "$1" apt-get -qq -o APT::Install-Recommends=false install --download-only ' + " ".join(packages),
            'chroot "$1" useradd -m -s /bin/bash vagrant',
            'echo "vagrant ALL=(ALL) NOPASSWD: ALL" > "$1/etc/sudoers.d/vagrant"',
            'chmod 440 "$1/etc/sudoers.d/vagrant"',
            'echo "UseDNS no" > "$1/etc/ssh/sshd_config.d/local.conf"',
            f'printf "[global]\\nno-index = true\\nfind-links = {WHEELS}\\n" > "$1/etc/pip.conf"',
            'printf "#!/bin/sh\\nexit 101\\n" > "$1/usr/sbin/policy-rc.d" && chmod 755 "$1/usr/sbin/policy-rc.d"',
            ': > "$1/etc/machine-id" && rm -f "$1/var/lib/dbus/machine-id"',
            'printf "127.0.0.1 localhost\\n::1 localhost\\n" > "$1/etc/hosts"',
            'chroot "$1" systemctl enable -q systemd-networkd.service',
            'chroot "$1" systemctl mask -q systemd-networkd-wait-online.service',
            'chroot "$1" systemctl mask -q apt-daily.timer apt-daily-upgrade.timer',
        )
    )


def _mirrors() -> tuple[str, str]:
    """The Debian archive that this machine itself uses, and that of its security updates."""
    text = "\n".join(
        file.read_text()
        for file in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*")))
        if file.is_file()
    )
    found = re.findall(r"^(?:URIs: *|deb (?:\[[^]]*\] *)?)(\S+)", text, re.MULTILINE)
    main = next((uri for uri in found if re.search(r"/debian/?$", uri)), "http://deb.debian.org/debian")
    security = next((uri for uri in found if "security" in uri), "http://deb.debian.org/debian-security")
    return main, security
