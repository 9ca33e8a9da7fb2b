"""Envoy as a sidecar: tcp_proxy, a thread for each worker beside its main one, SPIFFE ids checked on both sides."""

from typing import Any

import msgspec

from meshnet_cli.demo.world import Process
from tests.bench.subjects.hops import BUNDLE, KEY, LEAF, Hop

_TYPE = "type.googleapis.com/envoy.extensions"
_TLS = f"{_TYPE}.transport_sockets.tls.v3"


def start(hop: Hop, workers: int) -> Process:
    config = hop.host.directory / "envoy.json"
    config.write_bytes(
        msgspec.json.encode({"static_resources": {"listeners": [_listener(hop)], "clusters": [_to(hop)]}})
    )
    options = ("--disable-hot-restart", "--log-level", "error", "--concurrency", str(workers))
    return hop.host.spawn("envoy", "-c", config, *options)


def _listener(hop: Hop) -> dict[str, Any]:
    chain: dict[str, Any] = {
        "filters": [
            {
                "name": "envoy.filters.network.tcp_proxy",
                "typed_config": {
                    "@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
                    "stat_prefix": "sidecar",
                    "cluster": "next",
                },
            }
        ]
    }
    if hop.accepts_tls:
        chain["transport_socket"] = _transport_socket(hop, "DownstreamTlsContext", require_client_certificate=True)
    return {"name": "sidecar", "address": _address(hop.listen), "filter_chains": [chain]}


def _to(hop: Hop) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(hop.to)}}
    cluster: dict[str, Any] = {
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [{"max_connections": 65536, "max_pending_requests": 65536}]},
        "load_assignment": {"cluster_name": "next", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    if hop.dials_tls:
        cluster["transport_socket"] = _transport_socket(hop, "UpstreamTlsContext")
    return cluster


def _transport_socket(hop: Hop, kind: str, **more: bool) -> dict[str, Any]:
    directory = hop.host.directory
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TLS}.{kind}",
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(directory / LEAF)},
                        "private_key": {"filename": str(directory / KEY)},
                    }
                ],
                "validation_context": {
                    "trusted_ca": {"filename": str(directory / BUNDLE)},
                    "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": hop.identity}}],
                },
            },
        }
        | more,
    }


def _address(address: tuple[str, int]) -> dict[str, Any]:
    return {"socket_address": {"address": address[0], "port_value": address[1]}}
