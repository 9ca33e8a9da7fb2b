"""What a sidecar's health port says, read as Prometheus reads it."""

import http.client

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.world import Host

HEALTH_PORT = 15120


def get(host: Host, path: str) -> tuple[int, str]:
    """Status and body, asked from the host itself."""
    connection = http.client.HTTPConnection("127.0.0.1", HEALTH_PORT)
    connection.sock = host.connect("127.0.0.1", HEALTH_PORT)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def samples(host: Host) -> list[Sample]:
    status, text = get(host, "/metrics")
    assert status == 200
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def value(host: Host, name: str, **labels: str) -> float:
    """The sum of the samples with this name and at least these labels."""
    found = [each for each in samples(host) if each.name == name and labels.items() <= each.labels.items()]
    return sum(each.value for each in found)
