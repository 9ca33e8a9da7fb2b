"""The systemd units of a VM, as text. Pure: `meshnet up` writes them, tests/cli/vm/golden shows them.

Two units, for two sets of rights: the sidecar is a user of its own that may mark packets, the keeper of the rules is
another that may change them. systemd itself then does what has to be done in which order:

    start, boot    meshnet-rules is wanted by meshnet, and started once that has said READY: no rule leads nowhere
    stop           meshnet-rules requires meshnet, so that it is stopped too, and first: the rules drain while the
                   sidecar still carries what they captured, then the sidecar ends
    restart, crash the same units stop and start again, but `--if-stopping` tells that this is no end, and the rules
                   stay: what is captured is refused for a moment, and never goes out in plain text
"""

import re
from pathlib import PurePosixPath

from meshnet.model.admin import GROUP
from meshnet.model.capture import KEEPER_USER
from meshnet.model.duration import parse_duration
from meshnet.model.settings import Settings

SIDECAR, RULES = "meshnet.service", "meshnet-rules.service"
USER = "meshnet"
ENVIRONMENT_FILE = "/etc/default/meshnet"
XTABLES_LOCK = "/run/xtables.lock"  # iptables(8)
WATCHDOG = 30  # seconds that trio's loop may stand still
START_TIMEOUT = 60  # seconds until it says its first word
REMOVAL_DRAIN = 30  # seconds that captured connections get when the rules' unit is stopped
_SLACK = 15  # seconds beyond a drain until systemd kills
_WRITTEN_BY = (
    "# Written by `meshnet up`, which writes it again when settings change. For changes of your own: systemctl edit"
)

# Of code below these a unit with ProtectHome=yes would see nothing.
_HOMES = ("/home", "/root", "/run/user")

# systemd.exec(5). What both units can do without.
_HARDENED = """\
NoNewPrivileges=yes
ProtectSystem=strict
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
"""


def sidecar_unit(settings: Settings, meshnet: tuple[str, ...], config: str | None, systemd: int = 252) -> str:
    """`meshnet` is the command line that starts meshnet; `config` its --config, if there is one.

    `systemd` is the version that will read it: one that does not know a line warns of it each time.
    """
    slower = "RestartSteps=8\nRestartMaxDelaySec=30\n" if systemd >= 254 else ""
    socket, last_good = PurePosixPath(settings.admin.socket), PurePosixPath(settings.mesh.last_good)
    written = [last_good.parent]
    runtime = ""
    if socket.parent.parent == PurePosixPath("/run"):
        # The rules' unit and `meshnet up` use it too: it stays when the sidecar ends.
        runtime = f"RuntimeDirectory={_word(socket.parent.name)}\nRuntimeDirectoryPreserve=yes\n"
    else:
        written.append(socket.parent)
    drain = parse_duration(settings.proxy.drain_timeout)
    mesh = settings.mesh
    read = (mesh.directory, mesh.resolv_conf, mesh.hosts_file, settings.identity.certificate)
    seen = (*meshnet, config or "", *read, str(last_good))
    return f"""\
{_WRITTEN_BY} {SIDECAR.removesuffix(".service")}
[Unit]
Description=meshnet sidecar
After=network.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={_line(*meshnet, "proxy", *_config(config))}
ExecReload=/bin/kill -HUP $MAINPID
EnvironmentFile=-{ENVIRONMENT_FILE}
User={USER}
Group={settings.capture.gid}
# The rules stay where they are, so without a sidecar nothing of this host works: it is started again for ever.
Restart=always
RestartSec=1
{slower}WatchdogSec={WATCHDOG}
TimeoutStartSec={START_TIMEOUT}
TimeoutStopSec={round(drain) + _SLACK}
LimitNOFILE=1048576
# Its listeners: who connects while it is started again waits, and is not refused.
FileDescriptorStoreMax=16
{runtime}# No StateDirectory=: systemd would make a present of the authority's key in it to the sidecar's user.
ReadWritePaths={" ".join(f"-{_word(str(path))}" for path in written)}

# SO_MARK, IP_TRANSPARENT, and the queue of capture.truthful_connect.
AmbientCapabilities=CAP_NET_ADMIN
CapabilityBoundingSet=CAP_NET_ADMIN
{_HARDENED}ProtectHome={_protect_home(seen)}
ProtectProc=invisible
ProcSubset=pid
PrivateIPC=yes
RemoveIPC=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallFilter=chown fchown fchownat lchown
SystemCallErrorNumber=EPERM
DevicePolicy=closed
KeyringMode=private
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def rules_unit(settings: Settings, meshnet: tuple[str, ...], config: str | None) -> str:
    """The rules: put in once the sidecar is there, and held there; taken out when it is stopped for good.

    It names a user that has to be there: `meshnet_cli.vm.account.make_keeper`.
    """
    seen = (*meshnet, config or "")
    # What the switches of capture.original_source are in. Where they could not be written, the plan would be another.
    switches = settings.capture.original_source
    hardened = _HARDENED.replace("ProtectKernelTunables=yes", "ProtectKernelTunables=no") if switches else _HARDENED
    # The programs of iptables make their lock for root alone, and to take it, it has to be readable.
    lock = f"ExecStartPre=-+/bin/chmod -f g+r {XTABLES_LOCK}\n"
    if settings.capture.backend == "legacy":  # then there may have been none of them here
        lock = f'ExecStartPre=+/bin/sh -c "umask 077; : >>{XTABLES_LOCK}"\n{lock}'
    remove = ("init", "remove", "--drain", f"{REMOVAL_DRAIN}s", "--if-stopping", RULES)
    return f"""\
{_WRITTEN_BY} {RULES.removesuffix(".service")}
[Unit]
Description=meshnet rules: turn this host's TCP to the sidecar
Requires={SIDECAR}
After={SIDECAR}
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
{lock}ExecStart={_line(*meshnet, "rules", "keep", *_config(config))}
ExecReload=/bin/kill -HUP $MAINPID
# As root, who asks systemd itself what is to become of the unit: there may be no D-Bus.
ExecStopPost=!{_line(*meshnet, *remove)}
Restart=always
RestartSec=1
WatchdogSec={WATCHDOG}
EnvironmentFile=-{ENVIRONMENT_FILE}
TimeoutStartSec={START_TIMEOUT}
TimeoutStopSec={REMOVAL_DRAIN + _SLACK}

# Not root: who is that may ask systemd for anything.
User={KEEPER_USER}
# Which legacy tables there are, and their lock, are for root's group to read.
Group=root
# That may ask the sidecar.
SupplementaryGroups={GROUP}
# NET_RAW: the legacy tables are read and written through a raw socket.
AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW
{hardened}ProtectHome={_protect_home(seen)}
ProtectProc=invisible
PrivateIPC=yes
RemoveIPC=yes
PrivateMounts=yes
KeyringMode=private
DevicePolicy=closed
# Of network namespaces: to try rules in, and for the visitor that proves inbound capture, who has a user's as well.
RestrictNamespaces=net user
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
UMask=0077

[Install]
WantedBy={SIDECAR}
"""


def _config(config: str | None) -> tuple[str, ...]:
    return ("--config", config) if config else ()


def _protect_home(paths: tuple[str, ...]) -> str:
    below = any(PurePosixPath(path).is_relative_to(home) for path in paths if path for home in _HOMES)
    return "read-only" if below else "yes"


def _line(*words: str) -> str:
    return " ".join(map(_word, words))


def _word(text: str) -> str:
    """One word of a unit's line, whatever it holds: systemd.service(5), systemd.syntax(7)."""
    text = text.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
