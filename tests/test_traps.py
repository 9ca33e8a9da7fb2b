"""The traps that users of transparent proxies fall into most, and those of a fast relay, each with tests against it.

By number: the twenty of the project's research on interception, with one issue of many where somebody fell in. The
relay's: those that its prototypes fell into, and what they were fast by.
"""

import ast
import re

import pytest

from tests.skips import function_of, skips

TRAPS: dict[str, tuple[str, ...]] = {
    "1 legacy or nft: rules written where nobody looks (istio#15519)": (
        "tests/init/test_backends.py::test_auto_takes_legacy_where_others_have_rules_there_istio15519",
        "tests/init/test_backends.py::test_the_older_backends_rules_go_when_the_newer_ones_are_in_force",
    ),
    "2 kernel modules or tables that are missing (istio#28897)": (
        "tests/init/test_missing.py::test_auto_takes_what_the_kernel_has_istio28897",
        "tests/init/test_missing.py::test_a_kernel_with_neither_is_told_with_what_to_load_istio44118",
        "tests/init/test_missing.py::test_a_kernel_with_nfnetlink_alone_takes_nothing_by_nft_istio28897",
        "tests/init/test_missing.py::test_auto_passes_over_whose_kernel_lacks_a_kind_of_rule_that_the_plan_has",
        "tests/init/test_missing.py::test_a_kind_that_one_familys_tables_lack_is_named_with_what_to_type",
        "tests/init/test_missing.py::test_a_table_that_a_kernel_lacks_is_loaded_by_the_module_of_its_kind",
        "tests/init/test_missing.py::test_where_no_backend_has_it_each_says_what_it_lacks",
        "tests/init/test_scratch.py::test_a_trial_that_hangs_is_ended_with_what_it_has_started",
        "tests/init/test_keep.py::test_what_comes_later_is_tried_and_another_backend_taken_if_need_be",
    ),
    "3 the xtables lock (istio#58507)": (
        "tests/init/test_legacy.py::test_who_holds_the_lock_of_the_legacy_tables_is_waited_for",
        "tests/init/test_legacy_lock.py::test_who_writes_at_the_same_time_loses_no_rule_and_neither_do_we_istio58507",
    ),
    "4 init that runs again (istio#42792)": (
        "tests/init/test_backends.py::test_twice_is_once_down_to_the_handles",
        "tests/pod/test_pod.py::test_trap_4_init_that_runs_again_cuts_nothing",
    ),
    "5 init containers without a network (istio#11130)": (
        "tests/pod/test_pod.py::test_traps_5_and_6_init_containers_and_the_application_find_the_proxy_ready",
        "tests/pod/test_pod.py::test_trap_5_a_container_that_runs_before_the_proxy_is_left_alone_by_its_group",
    ),
    "6 an application that starts before the proxy (linkerd2#2704)": (
        "tests/pod/test_pod.py::test_traps_5_and_6_init_containers_and_the_application_find_the_proxy_ready",
    ),
    "7 a proxy that ends before the application, jobs that never end (istio#6324)": (
        "tests/pod/test_pod.py::test_trap_7_a_job_ends_and_its_sidecar_behind_it",
        "tests/pod/test_pod.py::test_sigterm_with_the_application_still_calling_out",
    ),
    "8 an application with the proxy's own uid (istio#4286)": (
        "tests/init/test_capture.py::test_an_application_with_the_proxy_s_own_uid_is_captured_istio4286",
        "tests/init/test_capture.py::test_the_proxys_group_lets_its_connections_pass",
        "tests/cli/kubernetes/test_inject.py::"
        "test_trap_8_a_container_in_the_sidecar_s_group_would_pass_by_the_mesh_and_is_refused",
    ),
    "9 a host that calls itself (istio#23369)": (
        "tests/init/test_capture.py::test_loopback_and_own_address_stay_on_the_host_istio23369",
        "tests/proxy/test_hairpin.py::test_a_service_on_the_caller_s_own_host_is_reached_without_a_tunnel_istio23369",
    ),
    "10 an application bound to one address only (kuma#4630)": (
        "tests/proxy/test_lives.py::test_an_application_bound_to_loopback_only_stays_closed_kuma4630",
        "tests/proxy/test_lives.py::test_an_application_bound_to_the_hosts_address_only_is_reached_istio14738",
    ),
    "11 servers that speak first (istio#10832)": (
        "tests/traffic/test_programs.py::test_a_server_that_speaks_first_is_heard_by_a_client_that_says_nothing_istio10832",
    ),
    "12 INVALID packets that reset (istio#36489)": ("tests/init/test_invalid.py::test_they_can_be_dropped_istio36489",),
    "13 half-closed connections that conntrack forgets (istio#43297)": (
        "tests/faults/test_half_closed.py::test_an_end_that_comes_late_is_heard_at_the_other_side_of_the_proxy_istio43297",
        "tests/faults/test_half_closed.py::test_an_end_that_comes_late_from_outside_is_heard_by_the_application_istio43297",
        "tests/net/test_sockets.py::test_probes_come_before_conntrack_forgets_a_half_closed_connection_istio43297",
        "tests/init/test_open_connections.py::test_a_half_closed_connection_is_waited_for_too",
    ),
    "14 UDP DNS and conntrack: it is not captured, and not refused (istio#33469)": (
        "tests/init/test_guard.py::test_who_asks_from_a_port_that_the_proxy_has_just_used_hears_its_own_resolver_istio33469",
        "tests/init/test_guard.py::test_other_udp_can_be_refused_but_for_what_the_host_cannot_do_without",
    ),
    "15 IPv6 that is missing or half there (istio#57199)": (
        "tests/proxy/test_capture.py::test_one_family_lost_is_capture_lost",
        "tests/init/test_guard.py::test_ipv6_can_be_refused_so_that_nothing_leaks",
    ),
    "16 the original destination of dual-stack sockets (mitmproxy#2869)": (
        "tests/net/test_original.py::test_an_ipv4_connection_at_a_dual_stack_socket_tells_its_ipv4_destination_mitmproxy2869",
    ),
    "17 pods on the node's network (linkerd2#366)": (
        "tests/cli/kubernetes/test_inject.py::test_trap_17_a_pod_of_the_host_s_network_is_left_out_by_its_label",
        "tests/cli/kubernetes/test_inject.py::test_what_cannot_be_in_the_mesh_is_refused_with_the_reason",
    ),
    "18 bridges of containers (istio#27728)": (
        "tests/init/test_beside_others.py::test_containers_go_out_and_their_published_ports_are_reached_istio27728",
        "tests/init/test_beside_others.py::test_containers_are_captured_where_that_is_asked_for_istio44996",
    ),
    "19 probes that mTLS refuses or the proxy accepts (osm#4434)": (
        "tests/proxy/test_probes.py::test_trap_19_a_redirected_probe_is_accepted_by_the_sidecar_and_the_relay_asks_the_application",
        "tests/pod/test_pod.py::test_probes_of_each_shape_tell_the_truth",
    ),
    "20 TPROXY, src_valid_mark and rp_filter (tailscale#19796)": (
        "tests/init/test_tproxy.py::test_neither_rp_filter_nor_src_valid_mark_is_in_its_way_tailscale19796",
        "tests/init/test_tproxy.py::test_where_nobody_listens_it_does_not_go_on_to_the_application_in_plain",
    ),
    "also: joining cuts open connections (istio#48876)": (
        "tests/init/test_open_connections.py::test_connections_live_through_install_reinstall_and_change",
        "tests/init/test_tproxy.py::test_open_connections_live_through_installation_and_removal_istio48876",
    ),
    "also: rules that vanish later (istio#61182)": (
        "tests/proxy/test_capture.py::test_rules_that_vanish_later_take_readiness_away_and_their_return_gives_it_back",
        "tests/init/test_guard.py::test_when_the_redirects_are_lost_connections_are_refused_and_not_passed_in_plain_istio61182",
    ),
    "also: QUIC goes beside the proxy (istio#1430)": (
        "tests/init/test_guard.py::test_a_quic_client_learns_at_once_that_it_must_fall_back_istio1430",
    ),
    "also: a newer nft's rules crash an older one (istio#58492)": (
        "tests/init/test_foreign.py::test_an_nft_that_crashes_on_what_a_newer_one_wrote_is_in_nobodys_way_istio58492",
        "tests/init/test_backends.py::test_the_text_says_the_same_as_what_the_backend_writes",
    ),
    "also: many ports turned to one (istio#38982)": (
        "tests/init/test_capture.py::test_one_port_of_a_client_for_two_captured_ports_is_two_connections_istio38982",
    ),
    "also: a connection succeeds though nobody is there (istio#41090)": (
        "tests/proxy/test_ends.py::test_no_application_at_any_endpoint_is_an_rst_for_the_client_and_not_an_end_istio41090",
        "tests/proxy/test_ends.py::test_a_pass_through_that_is_refused_is_an_rst_for_the_client",
    ),
    "also: a table of connections that is full (k8s#71261)": (
        "tests/faults/test_shortage.py::test_a_full_table_of_connections_costs_new_ones_and_none_that_is_open",
    ),
    "also: users and groups by name (istio#48416)": (
        "tests/init/test_values.py::test_what_is_no_id_is_refused_istio48416",
        "tests/init/test_capture.py::test_excluded_users_and_groups_are_left_alone",
    ),
    "also: saved rules that come back at boot (sshuttle#629)": (
        "tests/cli/test_check.py::test_rules_that_somebody_saved_come_back_at_boot",
    ),
    "also: rules placed after others (istio#56414)": (
        "tests/init/test_beside_others.py::test_a_service_of_kube_proxy_whose_rules_came_later_is_captured_again",
        "tests/init/test_beside_others.py::test_a_published_port_of_docker_whose_rules_came_later_is_captured_again",
        "tests/init/test_keep.py::test_rules_that_are_put_ahead_of_ours_are_put_behind_again_and_stay",
        "tests/init/test_foreign.py::test_rules_of_every_kind_of_tables_are_found_in_order",
        "tests/init/test_verify.py::test_somebody_elses_rules_ahead_of_ours_take_the_visitor_away",
        "tests/init/test_fail.py::test_what_comes_in_and_is_taken_by_another_program_makes_the_sidecar_not_ready",
    ),
}

SPEED: dict[str, tuple[str, ...]] = {
    "more than one recv and one send for a message and a leg": (
        "tests/relay/native/faulty.py::test_a_message_costs_one_recv_and_one_send_a_leg",
    ),
    "bulk that is copied": ("tests/relay/native/faulty.py::test_much_is_spliced",),
    "buffers that idle connections keep": (
        "tests/relay/native/test_idle.py::test_an_idle_tunnel_keeps_no_buffer",
        "tests/relay/native/test_idle.py::test_a_tunnel_whose_peer_was_slow_keeps_no_buffer_for_it",
        "tests/relay/contract.py::test_what_was_read_before_the_hand_over_comes_first",
    ),
    "a slow reader's bytes in our memory": (
        "tests/relay/contract.py::test_a_stuck_reader_stops_the_writer_and_loses_nothing",
    ),
    "edge-triggered epoll, and a FIN that comes in the same event as data": (
        "tests/relay/contract.py::test_a_fin_right_behind_data_loses_neither",
        "tests/relay/native/test_hostile.py::test_an_end_right_behind_the_last_bytes_of_a_tunnel_is_found",
    ),
    "the first leg closed before the second is there": (
        "tests/relay/native/test_lifetimes.py::test_both_legs_may_be_full_of_events_before_the_link_begins",
    ),
    "partial writes and moving buffers, which broke streams after 30 to 230 MB": (
        "tests/relay/test_gigabyte.py::test_a_gigabyte_arrives_unharmed",
    ),
    "a wheel that needs more than libc": (
        "tests/relay/test_wheel.py::test_the_built_extension_needs_libc_and_nothing_else",
    ),
    "an installation that needs a compiler, or libssl's headers": (
        "tests/cli/test_without_core.py::test_check_says_what_is_missing_and_what_mends_it",
        "tests/cli/test_without_core.py::test_two_such_hosts_call_each_other_through_a_tunnel",
    ),
    "a fallback that nobody is told of": (
        "tests/cli/test_without_core.py::test_the_python_relay_serves_and_log_and_status_say_why",
        "tests/relay/test_ladder.py::test_where_the_core_is_not_built_it_says_so",
        "tests/relay/test_ladder.py::test_the_fastest_or_the_one_that_was_asked_for",
    ),
    "a rung of the ladder with a contract of its own": (
        "tests/relay/contract.py::test_half_close_passes_and_the_other_direction_goes_on",
        "tests/relay/contract.py::test_a_reset_reaches_the_other_application",
        "tests/relay/contract.py::test_every_byte_arrives_in_order_in_both_directions_at_once",
        "tests/relay/native/test_hostile.py::test_small_frames_overtake_none_that_wait_for_a_slow_application",
        "tests/relay/contract.py::test_cancel_resets_both_legs_and_the_tally_is_exact",
    ),
    "a peer that dies during the handshake": (
        "tests/relay/handshake_contract.py::test_a_peer_that_dies_in_the_handshake_fails_it",
    ),
    "an endpoint that cannot be reached": (
        "tests/relay/native/test_orders.py::test_a_client_whose_endpoint_refuses_is_given_back_whole",
        "tests/relay/native/test_orders.py::test_a_client_whose_endpoint_is_silent_is_given_back_in_time",
    ),
    "a thread that waits and burns": ("tests/relay/contract.py::test_a_waiting_connection_costs_no_cpu",),
    "a chain that is built and verified anew for each handshake": (
        "tests/relay/native/test_handshakes.py::test_it_shows_its_own_certificate_and_not_the_bundle_s",
    ),
    "a certificate that is read anew for each handshake": (
        "tests/relay/native/test_handshakes.py::test_a_certificate_that_comes_again_is_not_read_again",
    ),
    "a call that fails, and nobody looked": ("tests/relay/native/test_faults.py::test_every_call_may_fail",),
}


# Where a run in CI, as root, has what is asked for.
NEED_MORE = {"tests/pod/conftest.py::_cluster"}


def names(trap: str) -> re.Pattern[str]:
    """What a test's name or docstring says of the trap: its issue (`istio15519`, `istio#15519`), or `trap 1`."""
    number = trap.split()[0]
    issue = trap.rpartition("(")[2].rstrip(")").replace("#", "#?")
    # The name of a test that shows two of them: traps_5_and_6.
    listed = rf"|traps?[ _](\d+[ _]and[ _])?{number}(?!\d)" if number.isdecimal() else ""
    return re.compile(rf"{issue}(?!\d){listed}")


@pytest.mark.parametrize("trap", [*TRAPS, *SPEED])
def test_a_trap_is_kept_closed_by_tests_that_are_there_and_not_skipped(trap: str) -> None:
    for test in (TRAPS | SPEED)[trap]:
        assert skips(test) <= NEED_MORE, f"{test} may be skipped"


def test_where_a_test_may_be_skipped_is_found_in_what_it_uses() -> None:
    """By a fixture of a fixture in the conftest above it, by a function of its module; what is not used is not."""
    found = {place for tests in (TRAPS | SPEED).values() for test in tests for place in skips(test)}
    assert found == NEED_MORE
    assert skips("tests/relay/native/test_near.py::test_so_are_those_of_tunnels")
    assert skips("tests/init/test_scratch.py::test_the_keeper_tries_every_kind_in_a_namespace_of_its_own")
    assert not skips("tests/init/test_scratch.py::test_a_trial_that_hangs_is_ended_with_what_it_has_started")


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_named_by_a_test_against_it(trap: str) -> None:
    functions = [function_of(test) for test in TRAPS[trap]]
    assert any(names(trap).search(f"{each.name} {ast.get_docstring(each)}") for each in functions)


def test_none_of_the_twenty_is_left_out() -> None:
    numbers = [int(trap.split()[0]) for trap in TRAPS if trap[0].isdecimal()]
    assert numbers == list(range(1, 21))
