"""The two containers that go into a pod, and the volumes they share.

`meshnet-init` has the one right it needs and is gone before anything else runs; the sidecar has none at all. Both get
the same settings, so that the rules fit the sidecar.
"""

from collections.abc import Mapping

from meshnet.codec.probes import Checks, write_checks
from meshnet.model.canary import READINESS_PORT
from meshnet.model.settings import Settings
from meshnet_cli.kubernetes.manifests import Object
from meshnet_cli.kubernetes.wishes import Wishes

INIT = "meshnet-init"
PROXY = "meshnet-proxy"
CONFIG, IDENTITY, RUN = "meshnet-config", "meshnet-identity", "meshnet-run"
VOLUMES = (CONFIG, IDENTITY, RUN)

_DEFAULTS = Settings()
GID = _DEFAULTS.capture.gid
HEALTH_PORT = _DEFAULTS.admin.health_port
PROBES_PORT = _DEFAULTS.probes.port
OWN_PORTS = _DEFAULTS.own_ports() | {PROBES_PORT, READINESS_PORT}

_ETC = "/etc/meshnet"
_SLOWEST_START = 120  # seconds
_AT_LEAST = 5  # seconds that an ordinary sidecar, which ends together with the application, waits for it
_GRACE = 5  # seconds that are kept for the end behind the drain


def drain_within(grace: int) -> int:
    """Seconds that a sidecar may drain for in a pod with `grace` seconds to end, so that it is never killed."""
    return grace - min(_GRACE, (grace + 1) // 2)


def stays(grace: int) -> int:
    """Seconds that an ordinary sidecar stays after it was asked to end, before it drains."""
    return min(_AT_LEAST, grace // 3)


def environment(wishes: Wishes, checks: Checks, drain: int) -> list[Object]:
    """The variables of both containers: what the manifest relies on, whatever meshnet.toml says, and the wishes."""
    pinned = {
        "MESHNET_MESH__DIRECTORY": _ETC,
        "MESHNET_MESH__LAST_GOOD": "/run/meshnet/last-good.json",
        "MESHNET_ADMIN__HEALTH_ADDRESS": "*",
        "MESHNET_ADMIN__HEALTH_PORT": str(HEALTH_PORT),
        "MESHNET_CAPTURE__GID": str(GID),
        "MESHNET_CAPTURE__READINESS_PORT": str(READINESS_PORT),
        "MESHNET_CAPTURE__REQUIRED": "true",
        "MESHNET_CAPTURE__STRICT": "true",
        # A pod's routes are symmetric, and of its packets none is another's: what fits nowhere would only reset.
        "MESHNET_CAPTURE__DROP_INVALID": "true",
        "MESHNET_PROXY__DRAIN_TIMEOUT": f"{drain}s",
    }
    if checks:
        pinned |= {"MESHNET_PROBES__PORT": str(PROBES_PORT), "MESHNET_PROBES__CHECKS": write_checks(checks)}
    # Kubernetes puts the variable X in the place of $(X), and one $ in that of two.
    named = [{"name": name, "value": value.replace("$", "$$")} for name, value in (pinned | wishes.settings).items()]
    return [{"name": "MESHNET_NODE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}, *named]


def init_container(wishes: Wishes, env: list[Object]) -> Object:
    """Puts the rules in and proves them, again if it runs again. Root, as the rules of a namespace are root's."""
    rights = ["NET_ADMIN", "NET_RAW"] if wishes.is_legacy else ["NET_ADMIN"]
    return {
        "name": INIT,
        "image": wishes.image,
        "command": ["meshnet-init", "--verify"],
        "env": [*env, {"name": "XTABLES_LOCKFILE", "value": "/run/meshnet/xtables.lock"}],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        "securityContext": _security({"add": rights, "drop": ["ALL"]}, runAsUser=0, runAsGroup=0, runAsNonRoot=False),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [_mount(CONFIG, _ETC), _mount(RUN, "/run/meshnet", read_only=False)],
    }


def proxy_container(wishes: Wishes, env: list[Object], grace: int) -> Object:
    """The sidecar: native if wished, which starts before the application and ends behind it."""
    container: Object = {
        "name": PROXY,
        "image": wishes.image,
        "command": ["meshnet", "proxy"],
        "env": env,
        "ports": [
            {"name": "meshnet-tunnel", "containerPort": _DEFAULTS.proxy.tunnel_port},
            {"name": "meshnet-health", "containerPort": HEALTH_PORT},
        ],
        "startupProbe": _asks("/readyz", periodSeconds=1, failureThreshold=_SLOWEST_START),
        # Through the rules, which proves again and again that what comes in is captured. The others ask directly: a
        # sidecar that is started again mends no rules.
        "readinessProbe": _asks("/readyz", READINESS_PORT, periodSeconds=5),
        "livenessProbe": _asks("/healthz", periodSeconds=10, failureThreshold=6),
        "resources": {key: dict(value) for key, value in _resources(wishes).items() if value},
        "securityContext": _security({"drop": ["ALL"]}, runAsUser=GID, runAsGroup=GID, runAsNonRoot=True),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            _mount(CONFIG, _ETC),
            _mount(IDENTITY, "/var/lib/meshnet/identity"),
            _mount(RUN, "/run/meshnet", read_only=False),
        ],
    }
    if wishes.native_sidecar:
        return {**container, "restartPolicy": "Always"}
    # A kubelet starts the next container when this hook has ended (linkerd2#2704), and sends SIGTERM behind the other.
    wait = {"exec": {"command": ["meshnet", "wait", "--timeout", f"{_SLOWEST_START}s"]}}
    stay = {"exec": {"command": ["sleep", str(stays(grace))]}}
    return {**container, "lifecycle": {"postStart": wait, "preStop": stay}}


def volumes(wishes: Wishes, service_account: str) -> list[Object]:
    """A ConfigMap or Secret that is missing keeps the pod from starting: better than one out of the mesh unnoticed."""
    secret = wishes.identity_secret or f"{IDENTITY}-{service_account}"
    return [
        {"name": CONFIG, "configMap": {"name": wishes.config_map}},
        {"name": IDENTITY, "secret": {"secretName": secret}},
        {"name": RUN, "emptyDir": {"sizeLimit": "64Mi"}},
    ]


def _resources(wishes: Wishes) -> Mapping[str, Mapping[str, str]]:
    return {
        "requests": {str(name): amount for name, amount in wishes.requests.items()},
        "limits": {str(name): amount for name, amount in wishes.limits.items()},
    }


def _security(capabilities: Object, **who: object) -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": capabilities,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        **who,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _asks(path: str, port: int = HEALTH_PORT, **how: int) -> Object:
    return {"httpGet": {"path": path, "port": port}, **how, "timeoutSeconds": 3}


def _mount(name: str, path: str, *, read_only: bool = True) -> Object:
    mount: Object = {"name": name, "mountPath": path}
    return {**mount, "readOnly": True} if read_only else mount
