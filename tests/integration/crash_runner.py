"""A process that runs one operation after the other in children, each of which kills itself before a chosen step.

Reads lines of JSON from standard input: {"root", "operation", "kill_at"}; answers each with one line {"steps",
"killed"}: how many durable steps the child began, and whether it was killed (kill_at 0: never). It has one thread
and imports everything before the first fork, so that a kill costs milliseconds and not the start of a Python.
"""

import json
import os
import signal
import struct
import sys
from collections.abc import Callable

from controller_kit import SIZE_BYTES, Kit

from csi_quobyte.engine import collector
from csi_quobyte.engine.layers import drop_upwards
from csi_quobyte.pool.sizes import SizeRange
from csi_quobyte.pool.store import Store

_COUNT = struct.Struct("<I")


def drop_released(kit: Kit) -> None:
    """What the collector does when it is told that the head of the volume "gone" has lost its reference."""
    for layer_id in list(kit.store.layer_ids()):
        drop_upwards(kit.store, layer_id)


OPERATIONS: dict[str, Callable[[Kit], object]] = {
    "create blank": lambda kit: kit.create("new"),
    "create raw": lambda kit: kit.create("new", image_format="raw"),
    "create from snapshot": lambda kit: kit.create("new", source=kit.from_snapshot("s")),
    "create from volume": lambda kit: kit.create("new", source=kit.from_volume("v"), size=SizeRange(2 * SIZE_BYTES)),
    "create from untouched volume": lambda kit: kit.create("new", source=kit.from_volume("c")),
    "snapshot": lambda kit: kit.snapshot("new", of="v"),
    "snapshot of untouched volume": lambda kit: kit.snapshot("new", of="c"),
    "delete volume": lambda kit: kit.delete("v"),
    "delete snapshot": lambda kit: kit.delete_snapshot("s"),
    "attach": lambda kit: kit.attach("v"),
    "detach": lambda kit: kit.detach("a"),
    "expand": lambda kit: kit.expand("v", 2 * SIZE_BYTES),
    "drop": drop_released,
    "sweep": lambda kit: collector.sweep(kit.store),
}


def run_child(root: str, operation: str, kill_at: int, report: int) -> None:
    """Run an operation in this process, which dies before its step number `kill_at`; counts the steps to `report`."""
    steps = 0

    def observe(step: str, path: str) -> None:
        nonlocal steps
        steps += 1
        os.pwrite(report, _COUNT.pack(steps), 0)
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    OPERATIONS[operation](Kit(Store(root, observer=observe)))


def run(root: str, operation: str, kill_at: int) -> dict[str, object]:
    """Run an operation in a child and say how it ended."""
    report = os.memfd_create("steps")
    os.pwrite(report, _COUNT.pack(0), 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_child(root, operation, kill_at, report)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    (steps,) = _COUNT.unpack(os.pread(report, _COUNT.size, 0))
    os.close(report)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{operation} failed by itself at step {steps}")
    return {"steps": steps, "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL}


def main() -> None:
    """Serve requests until standard input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["root"], asked["operation"], asked["kill_at"])), flush=True)


if __name__ == "__main__":
    main()
