"""What gcc's sanitizers need of a copy of the tree (builds.py), and what they have found in it."""

from pathlib import Path

from tests.relay.native.builds import run

FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}


def environment(name: str, folder: Path) -> dict[str, str]:
    """For a process that loads a native relay built with the FLAGS of that name; reports go into `folder`."""
    log = f"log_path={folder}/report"
    return {
        "LD_PRELOAD": run("gcc", f"-print-file-name={RUNTIMES[name]}").strip(),
        "ASAN_OPTIONS": f"{log}:detect_leaks=1",
        "LSAN_OPTIONS": "exitcode=0",  # Python itself leaves much behind
        "TSAN_OPTIONS": f"{log}:report_signal_unsafe=0:history_size=4",
    }


def reports(folder: Path) -> str:
    return "".join(report.read_text(errors="replace") for report in folder.glob("report.*"))


def ours(reports: str) -> str:
    """Those of them that our own code has a part in; what only Python or OpenSSL has done is not looked at."""
    return "\n\n".join(block for block in reports.split("\n\n") if "/meshnet/relay/native/" in block)
