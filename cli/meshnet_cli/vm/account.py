"""The users and the groups that the sidecar of a host and the keeper of its rules run with, and what has to be theirs.

The group `meshnet` may look at the sidecar (meshnet.model.admin); the sidecar's own primary group is `capture.gid`,
whose traffic the rules let pass. They are two, or whoever may look could also get past the rules.
"""

import grp
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

from meshnet.errors import CommandError
from meshnet.model.admin import GROUP
from meshnet.model.capture import KEEPER_USER
from meshnet.model.settings import Settings
from meshnet_cli.configuration import DEFAULT_CONFIG
from meshnet_cli.vm.ledger import Entry, Ledger, rights_of
from meshnet_cli.vm.units import USER

PROXY_GROUP = "meshnet-proxy"
_STATE_MODE = 0o1770  # sticky: the sidecar keeps its own files in it, and cannot touch those of root


def why_none() -> str:
    """Why no user can be made here, or could not run the sidecar. Empty: one can."""
    if os.geteuid() != 0 or _mapped_users() == 1:
        return "this user namespace has one user"
    if not _files_are_the_hosts():
        return "/etc belongs to another mount namespace"  # of a host, which a user would be left on
    if missing := [name for name in ("useradd", "groupadd") if shutil.which(name) is None]:
        return f"there is no {missing[0]}"
    return next((f"{path} is closed to others" for path in _way_to(sys.executable) if not path.stat().st_mode & 1), "")


def make(gid: int, ledger: Ledger) -> str:
    """What of user and groups is not there. Says what there is now. Raises CommandError."""
    made = []
    if not _group_exists(GROUP):
        ledger.note("group", GROUP)
        _run("groupadd", "--system", GROUP)
        made.append(f"group {GROUP}")
    proxy_group = _group_of(gid)
    if not proxy_group:
        if _group_exists(PROXY_GROUP):
            raise CommandError(
                f"the group {PROXY_GROUP} has the number {grp.getgrnam(PROXY_GROUP).gr_gid}, capture.gid says {gid}",
                why="the rules let the sidecar's group pass by its number",
                fix=f"groupmod --gid {gid} {PROXY_GROUP}; or: "
                f"sudo meshnet set capture.gid={grp.getgrnam(PROXY_GROUP).gr_gid}",
            )
        ledger.note("group", PROXY_GROUP)
        _run("groupadd", "--gid", str(gid), PROXY_GROUP)
        made.append(f"group {PROXY_GROUP}")
        proxy_group = PROXY_GROUP
    if not _user(USER):
        _add_user(USER, proxy_group, "meshnet sidecar", ledger)
        made.append(f"user {USER}")
    return f"made {', '.join(made)}" if made else f"user {USER}, group {proxy_group} ({gid})"


def make_keeper(ledger: Ledger) -> None:
    """The user of the keeper's unit, if it is not there; the group that may ask the sidecar is. Raises CommandError."""
    if not _user(KEEPER_USER):
        _add_user(KEEPER_USER, GROUP, "meshnet rules", ledger)


def hand_over(settings: Settings, ledger: Ledger) -> None:
    """Gives the sidecar's user what it has to write, and its own key. Raises CommandError."""
    user = _user(USER)
    if not user:
        raise CommandError(f"there is no user {USER}", fix="sudo meshnet up")
    last_good, identity = Path(settings.mesh.last_good), settings.identity
    state = last_good.parent
    if not is_own_folder(state, ledger):
        return  # it is everybody's: what the sidecar may read and write there is its administrator's business
    try:
        _give(last_good.parent, 0, settings.capture.gid, _STATE_MODE, ledger)
        if last_good.exists():
            _give(last_good, user.pw_uid, settings.capture.gid, 0o600, ledger)
        else:
            ledger.note_file(last_good)
        files = [Path(file) for file in (identity.certificate, identity.key, identity.bundle)]
        files = [file for file in files if file.is_relative_to(state)]
        for folder in {file.parent for file in files} - {state}:
            _give(folder, user.pw_uid, settings.capture.gid, 0o700, ledger)
        for file in files:
            if file.exists():
                _give(file, user.pw_uid, settings.capture.gid, 0o600, ledger)
    except OSError as error:
        raise CommandError(
            f"cannot give {error.filename} to the user {USER}",
            why=error.strerror or str(error),
            fix=f"ls -l {error.filename}",
        ) from error


def is_own_folder(folder: Path, ledger: Ledger) -> bool:
    """Whether it is meshnet's alone, by its name or because meshnet made it: /srv or /etc/ssl are others' too."""
    return folder.name == "meshnet" or Entry("directory", str(folder)) in ledger.entries


def need_readable(settings: Settings, config: str | None) -> None:
    """Raises CommandError for the first file that the sidecar has to read and its user may not."""
    identity = settings.identity
    files = (settings.mesh.directory, identity.key, identity.certificate, identity.bundle)
    groups = (f"--regid={settings.capture.gid}", "--init-groups")
    _need_readable("sidecar", USER, groups, (sys.executable, config or DEFAULT_CONFIG, *files))


def need_readable_by_keeper(config: str | None) -> None:
    """The same for the keeper, with the groups that its unit gives it."""
    groups = ("--regid=0", f"--groups={GROUP}")
    _need_readable("keeper", KEEPER_USER, groups, (sys.executable, config or DEFAULT_CONFIG))


def _need_readable(who: str, user: str, groups: tuple[str, ...], paths: tuple[str, ...]) -> None:
    def may(how: str, path: str | Path) -> bool:
        command = ["setpriv", f"--reuid={user}", *groups, "--", "test", how, path]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    for path in paths:
        if not os.path.exists(path) or may("-r", path):
            continue
        closed = next((folder for folder in reversed(Path(path).parents) if not may("-x", folder)), None)
        raise CommandError(
            f"the {who}'s user {user} may not read {path}",
            why=f"the folder {closed} is closed to others" if closed else "it is closed to others",
            fix=f"namei -l {path}; " + (f"chmod a+x {closed}" if closed else f"chmod a+r {path}"),
        )


def give_folder(folder: Path, gid: int) -> None:
    """Lets the sidecar have files of its own in it, beside those of root, which it cannot touch. Raises OSError."""
    os.chown(folder, 0, gid)
    folder.chmod(_STATE_MODE | 0o005)


def user_id() -> int | None:
    """The sidecar's user, where there is one that it can run as."""
    user = _user(USER)
    return None if user is None or why_none() else user.pw_uid


def _files_are_the_hosts() -> bool:
    try:
        return os.path.samestat(os.stat("/proc/1/ns/mnt"), os.stat("/proc/self/ns/mnt"))
    except OSError:
        return False  # not even root may look at process 1 from in here


def _mapped_users() -> int:
    """Of this user namespace: user_namespaces(7), /proc/PID/uid_map."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    return sum(int(line.split()[2]) for line in lines)


def _way_to(program: str) -> list[Path]:
    """The folders that lead to it, by name and where its links lead."""
    return [folder for path in (Path(program), Path(program).resolve()) for folder in path.parents]


def _give(path: Path, user: int, group: int, mode: int, ledger: Ledger) -> None:
    before = rights_of(path)
    if before == f"{user}:{group}:{mode:o}":
        return
    if not any(entry.kind in ("directory", "file") and entry.name == str(path) for entry in ledger.entries):
        ledger.note("rights", path, before)
    os.chown(path, user, group)
    os.chmod(path, mode)


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _add_user(name: str, group: str, about: str, ledger: Ledger) -> None:
    ledger.note("user", name)
    _run(
        "useradd", "--system", "--gid", group, "--groups", GROUP, "--no-create-home", "--home-dir", "/nonexistent",
        "--shell", "/usr/sbin/nologin", "--comment", about, name,
    )  # fmt: skip


def _group_exists(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _group_of(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CommandError(
            f"there is no {command[0]}", why="it makes meshnet's users", fix="apt-get install passwd"
        ) from error
    if done.returncode:
        raise CommandError(
            f"{' '.join(command)} failed", why=done.stderr.strip(), fix="df -h /etc; ls -l /etc/passwd /etc/group"
        )
