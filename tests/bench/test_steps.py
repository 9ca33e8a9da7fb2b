from collections import Counter

from tests.bench.steps import by_step, table

ACCEPT = """relay
        ffffffff81a4 inet_csk_accept ([kernel.kallsyms])
        ffffffff81a5 do_accept ([kernel.kallsyms])
        ffffffff81a6 __x64_sys_accept4 ([kernel.kallsyms])
        ffffffff81a7 do_syscall_64 ([kernel.kallsyms])
            7f3690d8 accept4 (/usr/lib/libc.so.6)"""
ENTRY = """relay
        ffffffff8100 entry_SYSCALL_64 ([kernel.kallsyms])"""
OWN = """python
            7f369001 _PyEval_EvalFrameDefault (/usr/bin/python3)"""


def test_a_sample_belongs_to_the_call_that_its_thread_was_in() -> None:
    seen = by_step([ACCEPT, ACCEPT, ENTRY, OWN, ""])
    assert seen == {
        ("relay", "accept"): 2,
        ("relay", "the kernel outside of a call (entry, interrupts, switches)"): 1,
        ("python", "its own code"): 1,
    }


def test_steps_are_parts_of_what_a_unit_takes() -> None:
    lines = table(Counter({("relay", "accept"): 3, ("python", "its own code"): 1}), 200.0, "connection")
    assert lines[1:] == [
        "| thread | step | us/connection |",
        "|---|---|---|",
        "| **relay** | | **150.0** |",
        "| | accept | 150.0 |",
        "| **python** | | **50.0** |",
        "| | its own code | 50.0 |",
    ]
