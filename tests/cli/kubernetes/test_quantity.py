"""What the containers of a pod request, and whether the sidecar has room beside them."""

from decimal import Decimal

import pytest

from meshnet_cli.kubernetes.manifests import Object
from meshnet_cli.kubernetes.quantity import amount, requested
from tests.cli.kubernetes.manifests import injected, pods, refusal, with_spec


def with_bounds(bounds: Object, *requests: str) -> Object:
    """A pod with resources of its own, and a container for each request of memory."""
    containers = [{"name": f"c{at}", "resources": {"requests": {"memory": it}}} for at, it in enumerate(requests)]
    return with_spec(resources=bounds, containers=containers)


@pytest.mark.parametrize(
    ("bounds", "fits"),
    [
        ({"requests": {"memory": "164Mi"}}, True),
        ({"requests": {"memory": "163Mi"}}, False),
        ({"limits": {"memory": "163Mi"}}, False),
        ({"requests": {"memory": "164Mi"}, "limits": {"memory": "1Gi"}}, True),
        ({"requests": {"cpu": "100m"}}, True),
        ({"requests": {"cpu": 0.09}}, False),
        ({"limits": {"hugepages-2Mi": "1Mi"}}, True),
    ],
)
def test_a_pod_whose_own_bounds_the_sidecar_would_break_is_refused(bounds: Object, fits: bool) -> None:
    """The API server would refuse it; no schema says so."""
    pod = with_bounds(bounds, "40Mi", "60Mi")
    if fits:
        assert list(pods(injected([pod])))
        return
    said = str(refusal(pod))
    assert "Pod/one: spec.resources: " in said
    assert "is less than its containers request together" in said
    less = {"proxy-memory-request": "1Mi", "proxy-cpu-request": "1m"}
    pod["metadata"]["annotations"] = {f"meshnet.dev/{name}": value for name, value in less.items()}
    assert list(pods(injected([pod])))


def test_who_requests_at_once_is_added_up_as_kubernetes_does() -> None:
    def asks(cpu: object, **more: object) -> Object:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {
        "initContainers": [asks("1"), asks("0.2", restartPolicy="Always"), asks("2500m"), {}],
        "containers": [asks(1), {"resources": {"limits": {"cpu": "0.1"}}}],
    }
    assert requested(spec, "cpu") == amount("2700m")
    spec["initContainers"][2] = asks("1e-1")
    assert requested(spec, "cpu") == amount("1.3")
    assert requested(spec, "memory") == 0
    # Not so in floating point.
    assert requested({"containers": [asks("0.1"), asks("0.2")]}, "cpu") == amount("0.3")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1", 1),
        ("100m", "0.1"),
        ("1.5", "1.5"),
        (".5Gi", 1 << 29),
        ("2e3", 2000),
        ("64Mi", 64 << 20),
        (3, 3),
        ("1n", "1e-9"),
    ],
)
def test_a_quantity_is_read_as_kubernetes_reads_it(written: object, value: int | str) -> None:
    assert amount(written) == Decimal(value)


@pytest.mark.parametrize("written", ["", "x", "-1", "1 Mi", "1mi", "1e", "1e9999", "Mi", None, True, [], {}])
def test_what_is_no_quantity_has_no_amount(written: object) -> None:
    assert amount(written) is None
