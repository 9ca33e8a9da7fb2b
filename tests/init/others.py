"""Rules of other software as it writes them, for iptables-restore or ip6tables-restore."""

from tests.init.kernel import OTHER_PORT

CONTAINER = {"ipv4": "172.17.0.2", "ipv6": "fd00:17::2"}
CLUSTER_IP = {"ipv4": "10.96.0.77", "ipv6": "fd96::77"}

_WHOLE = {"ipv4": 32, "ipv6": 128}
_LOOPBACK = {"ipv4": "127.0.0.0/8", "ipv6": "::1/128"}
_CONTAINERS = {"ipv4": "172.17.0.0/16", "ipv6": "fd00:17::/64"}
_PODS = {"ipv4": "10.244.0.0/16", "ipv6": "fd00:10:244::/56"}

_DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d {loopback} -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s {containers} ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport {port} -j DNAT --to-destination {endpoint}
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d {container}/{whole} ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
"""

_KUBE_PROXY = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-API - [0:0]
:KUBE-SEP-API - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-SERVICES -d {service}/{whole} -p tcp -m tcp --dport 443 -j KUBE-SVC-API
-A KUBE-SVC-API ! -s {pods} -j KUBE-MARK-MASQ
-A KUBE-SVC-API -j KUBE-SEP-API
-A KUBE-SEP-API -p tcp -m tcp -j DNAT --to-destination {endpoint}
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
"""

_UFW = """*filter
:INPUT ACCEPT [0:0]
:ufw-before-input - [0:0]
:ufw-user-input - [0:0]
:ufw-reject-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-reject-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -j ufw-user-input
{allowed}
-A ufw-reject-input -p tcp -j REJECT --reject-with tcp-reset
COMMIT
"""


def docker(family: str) -> str:
    """Docker 24 for one container that publishes its port 80 as 8081."""
    return _DOCKER.format(
        loopback=_LOOPBACK[family],
        containers=_CONTAINERS[family],
        container=CONTAINER[family],
        whole=_WHOLE[family],
        endpoint=at(CONTAINER[family], 80),
        port=OTHER_PORT,
    )


def kube_proxy(family: str, endpoint: str) -> str:
    """Kube-proxy for a Service with one endpoint."""
    service, pods = CLUSTER_IP[family], _PODS[family]
    return _KUBE_PROXY.format(service=service, whole=_WHOLE[family], pods=pods, endpoint=endpoint)


def ufw(*ports: int) -> str:
    """After `ufw default reject incoming` and an `ufw allow` for each of `ports`, IPv4."""
    rules = (f"-A ufw-user-input -p tcp -m tcp --dport {port} -j ACCEPT" for port in ports)
    return _UFW.format(allowed="\n".join(rules))


def at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
