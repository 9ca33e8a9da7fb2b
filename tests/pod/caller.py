"""A pod's application that calls the service."""

import http.client
from contextlib import closing

from tests.pod.conftest import API, PORT
from tests.pod.kubelet import Pod


class Caller:
    """A connection of the pod's application to the service, over which it asks as often as it likes."""

    def __init__(self, pod: Pod, address: str = API) -> None:
        self.connection = http.client.HTTPConnection(address, PORT)
        self.connection.sock = pod.host.connect(address, PORT)

    def asks(self) -> str:
        self.connection.request("GET", "/")
        return self.connection.getresponse().read().decode()

    def close(self) -> None:
        self.connection.close()


def asks_once(pod: Pod, address: str = API) -> str:
    with closing(Caller(pod, address)) as caller:
        return caller.asks()
