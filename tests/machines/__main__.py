"""The story of two machines, from a fresh Debian to one on which nothing of meshnet is left."""

import fcntl
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import click

from tests.machines import cases, container, image, settings, state, traffic
from tests.machines.machine import Failed, Machine, make_switch, remove_switch
from tests.machines.steps import Steps

ADDRESSES = {"web": ("192.168.56.21", "fd56::21"), "api": ("192.168.56.22", "fd56::22")}


@click.command()
@click.option("--only", type=click.Choice(list(image.SUITES)), help="Both machines of this release.")
@click.option("--keep", is_flag=True, help="Leave the machines running at the end.")
def main(only: str | None, keep: bool) -> None:
    """Exit code 1 as soon as anything is not as it should be."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up
    web_suite, api_suite = (only, only) if only else tuple(image.SUITES)
    hosts = "".join(f"{address} {name}\n" for name, addresses in ADDRESSES.items() for address in addresses)
    web = Machine("web", web_suite, *ADDRESSES["web"], "iptables", hosts)
    api = Machine("api", api_suite, *ADDRESSES["api"], "nft", hosts)
    steps = Steps()
    with ExitStack() as stack:
        image.CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = stack.enter_context((image.CACHE / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # one run at a time: they have the same names and addresses
        make_switch()
        stack.callback(remove_switch)
        for machine in (web, api):
            stack.callback(machine.destroy)
        try:
            _story(steps, web, api)
        except Failed as error:
            print(error, file=sys.stderr)
            for machine in (web, api):
                print(f"--- {machine.name}'s journal\n{state.journal(machine)}", file=sys.stderr)
            if keep:
                _wait(web, api)
            sys.exit(1)
        machines = ", ".join(f"{it.name} is {it.suite} with rules by {it.backend}" for it in (web, api))
        print(f"all {steps.done} steps: {machines}; {steps.seconds():.0f} s")
        if keep:
            _wait(web, api)


def _story(steps: Steps, web: Machine, api: Machine) -> None:
    step, both = steps.step, (web, api)
    with step(f"images: {web.suite}, {api.suite}"):
        for machine in both:
            image.build(machine.suite)
            image.wheels(machine.suite)
    if container.suite() in (web.suite, api.suite):
        with step("init/Containerfile: its lines, then rules by each backend"):
            container.build(cases.checkout())
    with step("boot"):
        _at_once(Machine.boot, *both)
    with step("vagrant/provision.sh on both"):
        _at_once(cases.provision, *both)
    with step("PostgreSQL, Redis, ssh and iperf3 on both"):
        _at_once(traffic.install, *both)
        traffic.may_log_in(web, api)
        traffic.may_log_in(api, web)
        _at_once(cases.choose_backend, *both)
    with step("identities from one authority, the same mesh files"):
        cases.issue_identities(web, api)
        cases.write_mesh(both)
    before = {machine: state.leftovers(machine) for machine in both}

    with step("an open connection lives through meshnet up"):
        direct = traffic.OpenConnection(web, api)
        _at_once(cases.up, *both)
        direct.need_alive()
    with step("a second meshnet up changes nothing and says so"):
        _at_once(cases.up_again, *both)
    with step("settings that the keeper may not read are named"):
        cases.close_settings(web)
    with step("the exposure of both units is at most 2.0; neither is root"):
        _at_once(cases.need_hardened, *both)
    with step("their keeper proves capture in both directions"):
        _at_once(cases.need_proofs, *both)
    with step("meshnet check finds no error"):
        _at_once(lambda machine: machine.run("meshnet check"), *both)
    with step("traffic web to api, all by mTLS"):
        traffic.all_programs(web, api)
        traffic.need_mtls(web, api)
    with step("traffic api to web, all by mTLS"):
        traffic.all_programs(api, web)
        traffic.need_mtls(api, web)
    with step("the sidecar is killed: the rules stay, systemd starts it again"):
        cases.kill_sidecar(api)
        traffic.all_programs(web, api)
    with step("the rules are deleted, the keeper is killed: they are there"):
        _at_once(cases.lose_rules, *both)
        traffic.all_programs(web, api)
    with step("its loop stands still: the watchdog ends it, the rules stay"):
        cases.freeze_sidecar(api)
    with step("systemctl stop while it starts again: traffic goes direct"):
        cases.stop_between_lives(api)
        cases.start_service(api)
    with step("systemctl restart: the rules never go, and nobody is refused"):
        cases.restart_service(api, web)
        traffic.all_programs(web, api)
    with step("systemctl stop: what is captured drains, new goes direct"):
        captured = traffic.OpenConnection(api, web)
        cases.stop_while_open(api, captured)
        captured.close()
        cases.start_service(api)
    with step("a newer package in place, then a restart"):
        cases.upgrade(api)
        traffic.all_programs(api, web)
    with step("meshnet set takes effect; a way in is not captured by it"):
        _at_once(settings.change, *both)
    with step("meshnet set whose proof fails: rules and file are as before"):
        _at_once(settings.fail_proof, *both)
    with step("a later meshnet up whose proof fails: the rules are as before"):
        settings.fail_up(api)
    with step("meshnet set is killed amid its proof: all is put back"):
        _at_once(settings.kill_amid_proof, *both)
    with step("meshnet set proxy.workers=2: traffic by two workers"):
        settings.two_workers(api)
        traffic.all_programs(web, api)
        settings.one_worker(api)
    with step("rules by legacy: traffic both ways, then back"), settings.by_legacy(web):
        cases.need_proofs(web)
        traffic.need_carried(web, api)
        traffic.need_carried(api, web)
        direct.need_alive()
    with step("by TPROXY in clients' names: traffic both ways, then back"), settings.in_clients_names(api):
        cases.need_proofs(api)
        traffic.need_carried(web, api)
        traffic.need_carried(api, web)
        traffic.need_client_address(web, api)
        settings.restart_networkd(api)
        traffic.need_client_address(web, api)
        direct.need_alive()
    with step("the state's disk is full: the sidecar goes on, errors are clear"):
        cases.full_disk(api)
    with step("reboot of both"):
        direct.close()
        _at_once(Machine.reboot, *both)
        _at_once(state.wait_for_capture, *both)
    with step("traffic after the reboot, all by mTLS"):
        traffic.all_programs(web, api)
        traffic.need_mtls(web, api)
        traffic.all_programs(api, web)
        traffic.need_mtls(api, web)
    with step("meshnet down --purge cuts nothing and leaves nothing"):
        captured = traffic.OpenConnection(web, api)
        cases.purge(web, captured, before[web])
        captured.close()
        cases.purge(api, None, before[api])
    for name in cases.PHASES:
        with step(f"meshnet up is killed in its phase {name}: all is put back"):
            _at_once(partial(cases.kill_up, name=name, before=before), *both)
    with step("the SSH session of meshnet up is cut: all is put back"):
        cases.cut_session(web, api, before[api])
    with step("the machine loses power during meshnet up: the next puts back"):
        cases.lose_power(api, before[api])


def _at_once(do: Callable[[Machine], object], *machines: Machine) -> None:
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(do, machine) for machine in machines]:
            done.result()


def _wait(*machines: Machine) -> None:
    for machine in machines:
        print(f"{machine.name}: {machine.how_to_enter()}")
    print("Ctrl-C ends them")
    try:
        while True:
            time.sleep(3600)  # noqa: TID251 - for as long as somebody wants to look at them
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
