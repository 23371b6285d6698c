"""Commands and detached processes: limits of time, output and memory, and what is left behind.

Axes: how the child ends (status, signal, time limit, too much output, not started) × what it leaves (processes, open
pipes); for detached ones: who dies first (process, supervisor, we) × who asks.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from host_fixtures import Standin, standin_mount, wait_until

from csi_quobyte.errors import Unavailable
from csi_quobyte.host import command
from csi_quobyte.host.command import CommandFailed, CommandTimedOut, Detached, Limits, ProcessIdentity

pytest_plugins = ["host_fixtures"]


def state_of(pid: int) -> str:
    """The one-letter state of a process, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def zombies() -> list[int]:
    """Our children that nobody has reaped."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    return [pid for pid in pids if state_of(pid) == "Z"]


class Spawned:
    """A place for one detached process."""

    def __init__(self, directory: Path) -> None:
        self.log_path = str(directory / "log")
        self.status_path = str(directory / "status")
        self.pid_path = str(directory / "pid")

    def spawn(self, *argv: str) -> Detached:
        return command.spawn_detached(
            argv, log_path=self.log_path, status_path=self.status_path, pid_path=self.pid_path
        )

    def status(self, detached: Detached) -> int | None:
        assert command.wait_exit(detached.supervisor, 5)
        return command.find_exit_status(detached, self.status_path)


@pytest.fixture
def spawned(tmp_path: Path) -> Iterator[Spawned]:
    place = Spawned(tmp_path)
    yield place
    detached = command.find_detached(place.pid_path)
    if detached is not None:
        command.send_signal(detached.process, "", signal.SIGKILL)
        assert command.wait_exit(detached.supervisor, 5)


def test_run_returns_status_and_both_outputs() -> None:
    done = command.run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=5, ok_statuses=(0, 3))
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_run_passes_input_and_a_bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSI_SECRET", "hidden")
    script = "cat; env; pwd"
    done = command.run(["sh", "-c", script], timeout_s=5, input=b"given\n" * 100_000, env_extra={"EXTRA": "1"})
    lines = done.stdout.splitlines()
    assert lines[:100_000] == ["given"] * 100_000
    assert {"LC_ALL=C", "EXTRA=1", f"PATH={os.environ['PATH']}", "/"} <= set(lines)
    assert "hidden" not in done.stdout


def test_run_without_input_reads_end_of_file() -> None:
    assert command.run(["cat"], timeout_s=5).stdout == ""


def test_run_unexpected_status_names_command_and_last_line() -> None:
    with pytest.raises(CommandFailed) as caught:
        command.run(["sh", "-c", "echo first >&2; echo the reason >&2; exit 4"], timeout_s=5)
    assert caught.value.status == 4
    assert caught.value.stderr == "first\nthe reason\n"
    assert str(caught.value).startswith("sh -c ")
    assert str(caught.value).endswith("failed with status 4: the reason")


def test_run_killed_by_signal_counts_as_shells_count() -> None:
    with pytest.raises(CommandFailed) as caught:
        command.run(["sh", "-c", "kill -9 $$"], timeout_s=5)
    assert caught.value.status == 137


def test_run_missing_program_fails() -> None:
    with pytest.raises(CommandFailed) as caught:
        command.run(["no-such-program-here"], timeout_s=5)
    assert caught.value.status == 127


def test_run_timeout_kills_the_whole_group(tmp_path: Path) -> None:
    script = f"sleep 1000 & echo $! > {tmp_path}/inner; echo working >&2; sleep 1000"
    started = time.monotonic()
    with pytest.raises(CommandTimedOut, match="working"):
        command.run(["sh", "-c", script], timeout_s=0.5)
    assert time.monotonic() - started < 2
    inner = int((tmp_path / "inner").read_text())
    wait_until(lambda: state_of(inner) in ("", "Z"), "the process in the background is dead")
    assert zombies() == []


def test_run_does_not_wait_for_what_a_command_leaves_behind(tmp_path: Path) -> None:
    started = time.monotonic()
    done = command.run(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/inner; echo done"], timeout_s=5)
    try:
        assert done.stdout == "done\n"
        assert time.monotonic() - started < 2
    finally:
        os.kill(int((tmp_path / "inner").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("stream", ["1", "2"])
def test_run_too_much_output_is_killed(stream: str) -> None:
    with pytest.raises(CommandFailed, match="more than"):
        command.run(["sh", "-c", f"yes >&{stream}"], timeout_s=30)
    assert zombies() == []


def test_run_steady_output_does_not_outlast_the_time_limit() -> None:
    started = time.monotonic()
    with pytest.raises(CommandTimedOut):
        command.run(["sh", "-c", "while :; do echo x; sleep 0.01; done"], timeout_s=0.5)
    assert time.monotonic() - started < 2


@pytest.mark.root
def test_run_stuck_in_the_kernel_is_abandoned_and_reaped_later(standin: Standin, tmp_path: Path) -> None:
    # A request that its FUSE server has taken cannot be given up, not even on SIGKILL. The upper server takes it and
    # then hangs in the lower one, which is stopped.
    (standin.directory / "file").write_bytes(b"x" * 4096)
    with standin_mount(standin.mountpoint, tmp_path / "upper") as upper:
        os.kill(standin.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(CommandTimedOut):
            command.run(["sh", "-c", f"echo $$ > {tmp_path}/child; exec cat {upper.mountpoint}/file"], timeout_s=0.5)
        assert time.monotonic() - started < 3
        child = int((tmp_path / "child").read_text())
        assert state_of(child) == "D"
        os.kill(standin.pid, signal.SIGCONT)
        wait_until(lambda: state_of(child) == "", "the abandoned child is reaped")


def test_run_address_space_limit_holds() -> None:
    script = "x = bytearray(600 << 20); print('fits')"
    small = Limits(address_space_bytes=400 << 20, cpu_s=None)
    with pytest.raises(CommandFailed, match="MemoryError"):
        command.run([sys.executable, "-c", script], timeout_s=20, limits=small)
    large = Limits(address_space_bytes=2 << 30, cpu_s=None)
    assert command.run([sys.executable, "-c", script], timeout_s=20, limits=large).stdout == "fits\n"


def test_run_cpu_limit_holds() -> None:
    with pytest.raises(CommandFailed) as caught:
        command.run(["sh", "-c", "while :; do :; done"], timeout_s=20, limits=Limits(None, cpu_s=1))
    assert caught.value.status == 128 + signal.SIGXCPU


_ASKS = 'test -t 0 && test -t 1 || exit 9; printf "first? "; read a; printf "second? "; read b; echo "$a $b"; exit 3'


def test_questions_are_answered_on_a_terminal() -> None:
    asked: list[str] = []

    def answer(said: str) -> str:
        if not said.endswith("? "):
            return ""
        asked.append(said)
        return f"{len(asked)}\n"

    done = command.run_answering(["sh", "-c", _ASKS], answer, timeout_s=10, ok_statuses=(3,))
    assert done.status == 3
    assert len(asked) == 2
    assert asked[0] == "first? "
    assert done.stdout.splitlines()[-1] == "1 2"


def test_a_question_that_is_refused_ends_the_command_without_an_answer(tmp_path: Path) -> None:
    def refuse(said: str) -> str:
        raise Unavailable("no")

    answered = tmp_path / "answered"
    with pytest.raises(Unavailable, match="no"):
        command.run_answering(["sh", "-c", f'printf "really? "; read a; touch {answered}'], refuse, timeout_s=10)
    assert not answered.exists()


def test_a_question_that_nobody_answers_ends_at_the_time_limit() -> None:
    began = time.monotonic()
    with pytest.raises(command.CommandTimedOut):
        command.run_answering(["sh", "-c", 'printf "well? "; read a'], lambda _: "", timeout_s=0.3)
    assert time.monotonic() - began < 5
    with pytest.raises(command.CommandFailed, match="status 4"):
        command.run_answering(["sh", "-c", "exit 4"], lambda _: "", timeout_s=10)


def test_run_from_many_threads_at_once() -> None:
    results: list[str] = []

    def echo(number: int) -> None:
        results.append(command.run(["echo", str(number)], timeout_s=20).stdout)

    threads = [threading.Thread(target=echo, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results, key=int) == [f"{number}\n" for number in range(32)]
    assert zombies() == []


def test_detached_runs_in_its_own_session_and_is_recognised(spawned: Spawned) -> None:
    detached = spawned.spawn("sleep", "1000")
    assert command.find_detached(spawned.pid_path) == detached
    assert os.getsid(detached.process.pid) == os.getsid(detached.supervisor.pid) != os.getsid(0)
    assert os.readlink(f"/proc/{detached.process.pid}/cwd") == "/"
    wait_until(lambda: command.is_running(detached.process, "sleep 1000"), "the shell has become the program")
    assert not command.is_running(detached.process, "another program")
    other_time = ProcessIdentity(detached.process.pid, detached.process.start_time_ticks + 1)
    assert not command.is_running(other_time, "sleep 1000")
    assert not command.send_signal(other_time, "sleep 1000", signal.SIGTERM)
    assert command.wait_exit(other_time, 0)
    assert not command.wait_exit(detached.process, 0.05)


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
def test_detached_status_is_recorded(spawned: Spawned, script: str, status: int) -> None:
    detached = spawned.spawn("sh", "-c", f"echo said; echo complained >&2; {script}")
    assert spawned.status(detached) == status
    assert command.log_tail(spawned.log_path).startswith("said\ncomplained\n")
    assert not command.is_running(detached.process, "")
    wait_until(lambda: zombies() == [], "the supervisor is reaped")


def test_detached_program_that_cannot_be_executed_is_recorded(spawned: Spawned) -> None:
    assert spawned.status(spawned.spawn("/no/such/program")) == 127
    assert "not found" in command.log_tail(spawned.log_path)


def test_detached_arguments_are_not_interpreted(spawned: Spawned) -> None:
    odd = "$(touch /tmp/never) `x` \"'; exit 9 *"
    assert spawned.status(spawned.spawn("printf", "%s|", odd, "", "two words")) == 0
    assert command.log_tail(spawned.log_path) == f"{odd}||two words|"


def test_detached_supervisor_outlives_signals_to_the_group(spawned: Spawned) -> None:
    script = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nprint('ready', flush=True)\n"
    )
    detached = spawned.spawn(sys.executable, "-c", script + "time.sleep(1000)")
    wait_until(lambda: "ready" in command.log_tail(spawned.log_path), "the program has set its handler")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(detached.supervisor.pid, number)
    assert command.is_running(detached.process, "")
    os.killpg(os.getpgid(detached.process.pid), signal.SIGTERM)
    assert spawned.status(detached) == 5


def test_detached_program_gets_default_signals(spawned: Spawned) -> None:
    detached = spawned.spawn("sleep", "1000")
    ignored = int(Path(f"/proc/{detached.process.pid}/status").read_text().split("SigIgn:")[1].split()[0], 16)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        # what this process was started to ignore (nohup), a shell below it cannot take back
        given = signal.getsignal(number) is signal.SIG_IGN and number is not signal.SIGPIPE
        assert given or not ignored & 1 << (number - 1)


def test_detached_supervisor_is_small(spawned: Spawned) -> None:
    detached = spawned.spawn("sleep", "1000")
    resident_kib = int(Path(f"/proc/{detached.supervisor.pid}/status").read_text().split("VmRSS:")[1].split()[0])
    assert resident_kib < 2048


def test_detached_killed_supervisor_leaves_no_status(spawned: Spawned) -> None:
    detached = spawned.spawn("sleep", "1000")
    os.kill(detached.supervisor.pid, signal.SIGKILL)
    assert command.wait_exit(detached.supervisor, 5)
    assert command.is_running(detached.process, "sleep")
    assert command.send_signal(detached.process, "sleep", signal.SIGTERM)
    assert command.wait_exit(detached.process, 5)
    assert command.find_exit_status(detached, spawned.status_path) is None


def test_detached_late_status_of_an_earlier_process_is_not_taken(spawned: Spawned) -> None:
    first = spawned.spawn("sleep", "1000")
    os.kill(first.supervisor.pid, signal.SIGSTOP)
    command.send_signal(first.process, "sleep", signal.SIGKILL)
    wait_until(lambda: not command.is_running(first.process, ""), "the first one is dead")
    second = spawned.spawn("sleep", "1000")
    os.kill(first.supervisor.pid, signal.SIGCONT)
    assert spawned.status(first) == 137
    assert command.find_exit_status(second, spawned.status_path) is None
    assert command.find_detached(spawned.pid_path) == second


def test_detached_outlives_its_starter_and_is_found_by_another_process(spawned: Spawned) -> None:
    program = (
        "import json, os, signal, sys\n"
        "from csi_quobyte.host import command\n"
        "command.spawn_detached(['sleep', '1000'], **json.loads(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = {name: getattr(spawned, name) for name in ("log_path", "status_path", "pid_path")}
    starter = subprocess.run([sys.executable, "-c", program, json.dumps(paths)], check=False, timeout=20)
    assert starter.returncode == -signal.SIGKILL
    detached = command.find_detached(spawned.pid_path)
    assert detached is not None
    assert command.is_running(detached.process, "sleep")
    assert command.send_signal(detached.process, "sleep", signal.SIGTERM)
    assert spawned.status(detached) == 143


def test_detached_is_running_while_it_executes_other_programs(spawned: Spawned) -> None:
    # Within execve(2) a process has no command line for a moment; each step is one more chance to meet it.
    program = Path(spawned.log_path).with_name("the-mark")
    program.write_text('[ "$1" -eq 0 ] || exec sh "$0" $(($1 - 1))')
    detached = spawned.spawn("sh", str(program), "500")
    while not command.wait_exit(detached.process, 0):
        assert command.is_running(detached.process, "the-mark") or command.wait_exit(detached.process, 0)
    assert spawned.status(detached) == 0


def test_detached_without_a_place_for_the_pid_file_runs_nothing(tmp_path: Path) -> None:
    mark = f"sleep 98{os.getpid()}"
    with pytest.raises(CommandFailed):
        command.spawn_detached(
            mark.split(),
            log_path=str(tmp_path / "log"),
            status_path=str(tmp_path / "status"),
            pid_path=str(tmp_path / "missing" / "pid"),
        )
    cmdlines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            cmdlines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    assert not [line for line in cmdlines if line.startswith(mark)]
    assert zombies() == []


@pytest.mark.parametrize("content", ["", "12", "1 2 3", "1 2 3 x", "-1 2 3 4"])
def test_find_detached_with_a_torn_file_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "pid").write_text(content)
    assert command.find_detached(str(tmp_path / "pid")) is None
    assert command.find_detached(str(tmp_path / "absent")) is None
