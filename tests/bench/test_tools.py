from tests.bench.tools import calls, functions, symbols


def test_samples_are_counted_by_function_once_a_stack() -> None:
    table = functions(["run;loop;work 30", "run;loop;loop;wait 10"])
    assert table[0] == "40 samples.\n"
    assert "| 75.0% | 75.0% | work |" in table
    assert functions([]) == []


def test_symbols_are_split_into_kernel_and_user() -> None:
    report = "# comment\n    60.00% |[kernel.kallsyms]|[k] tcp_sendmsg\n    40.00% |libssl.so.3|[.] SSL_read\n"
    assert symbols(report)[0].startswith("Kernel 60%, user 40%; [kernel.kallsyms] 60%, libssl.so.3 40%")
    assert "| 60.00% | [k] tcp_sendmsg | [kernel.kallsyms] |" in symbols(report)


def test_calls_are_divided_by_the_units_of_work() -> None:
    table = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.020000           2      2000       500 recvfrom
 40.00    0.010000           1      1000           sendto
------ ----------- ----------- --------- --------- ----------------
100.00    0.030000           1      3000       500 total
"""
    seen = calls(table, 500, "request")
    assert seen[0] == "6 calls for each request (500 of them, all sidecars).\n"
    assert seen[-2:] == ["| recvfrom | 4 | 1 |", "| sendto | 2 | 0 |"]
    assert calls("", 500, "request") == []
