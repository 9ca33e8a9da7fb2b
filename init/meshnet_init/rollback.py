"""Back to the rules that were in force before."""

from collections.abc import Callable

from meshnet.model.capture import StandDown, TakeUp
from meshnet.net.keeper import tell_keeper
from meshnet_init.apply import apply_plan
from meshnet_init.backends import Installed
from meshnet_init.choose import every_backend
from meshnet_init.remove import remove


def put_back(
    before: tuple[Installed, ...],
    drain: float = 5.0,
    cut: Callable[[], object] = lambda: None,
    *,
    take_up: bool = False,
) -> None:
    """Makes the kernel hold what `installed_rules` returned earlier; nothing, after `drain` seconds, if that was empty.

    Open connections live on as with `apply` and `remove`, which may have to call `cut`. `take_up`: the settings are
    those of these rules again, and a keeper goes on by them. Raises CommandError.
    """
    in_force = next((installed for installed in before if not installed.draining()), None)
    if in_force is None:
        remove(drain, cut=cut)
        return
    tell_keeper(StandDown())  # these are not what its settings ask for
    apply_plan(in_force.plan(), next(backend for backend in every_backend() if backend.name == in_force.backend))
    if take_up:
        tell_keeper(TakeUp())
