"""Logs with the context of the request they belong to, and every metric in one list."""

import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram

_context: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("log_context", default=None)

OPERATIONS = Counter("csi_quobyte_operations", "Finished CSI calls", ["method", "code"])
OPERATION_SECONDS = Histogram(
    "csi_quobyte_operation_seconds",
    "Duration of finished CSI calls",
    ["method"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
OPERATIONS_RUNNING = Gauge("csi_quobyte_operations_running", "CSI calls in progress")
UNEXPECTED_ERRORS = Counter("csi_quobyte_unexpected_errors", "Exceptions that nobody expected: bugs", ["method"])
POOL_UP = Gauge("csi_quobyte_pool_up", "1 when the pool is mounted and answers", ["pool"])
POOL_TOTAL_BYTES = Gauge("csi_quobyte_pool_total_bytes", "Size of the Quobyte volume", ["pool"])
POOL_AVAILABLE_BYTES = Gauge("csi_quobyte_pool_available_bytes", "Free space of the Quobyte volume", ["pool"])
LAYERS_DROPPED = Counter("csi_quobyte_layers_dropped", "Unreferenced layers removed", ["pool"])
LAYERS_MERGED = Counter("csi_quobyte_layers_merged", "Layers folded into others, heads flattened", ["pool", "kind"])
COLLECTOR_FAILURES = Counter("csi_quobyte_collector_failures", "Collector passes that ended with an error", ["pool"])
COLLECTOR_PASS_SECONDS = Gauge(
    "csi_quobyte_collector_pass_seconds",
    "How long the collector's last look at everything took; the next one begins no sooner than nine times that later",
    ["pool"],
)
FENCE_LAST_LOOK = Gauge(
    "csi_quobyte_fence_last_look_timestamp_seconds",
    "When the node last looked at every staged volume whether it was taken away (Unix time)",
)
UNFLUSHED_CLOSES = Counter(
    "csi_quobyte_unflushed_closes",
    "Volumes closed on this node whose last writes could not be flushed, or were dropped because they were taken away",
)
STAGED_VOLUMES = Gauge("csi_quobyte_staged_volumes", "Volumes staged on this node", ["data_path"])


@contextmanager
def bind(**fields: str) -> Iterator[None]:
    """Add fields to every log line written inside the block (by this thread, and where its context is copied to)."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class _Formatter(logging.Formatter):
    """One line a record: text for people or JSON for machines, with the bound fields."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        fields = _context.get() or {}
        if self._as_json:
            line = {"time": moment, "level": record.levelname, "logger": record.name, "message": message, **fields}
            return json.dumps(line, ensure_ascii=False)
        suffix = "".join(f" {key}={value}" for key, value in fields.items())
        return f"{moment} {record.levelname:<7} {message}{suffix}"


def setup_logging(level: str, as_json: bool) -> None:
    """Send all logs to standard error in one format; `level` is a standard level name in any case."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("qemu.qmp", "asyncio", "qemu"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
