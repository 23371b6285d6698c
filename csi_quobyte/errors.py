"""The ways an operation can fail, one class for each thing the caller may do about it.

`rpc/server.py` maps every class to one gRPC code. A *final* class (all but Busy and Unavailable) is only
raised when nothing is in progress any more and nothing of ours is left behind: the CSI sidecars forget the
object after a final code.
"""


class DriverError(Exception):
    """Base of all expected failures; the message is shown to users and names what was found and wanted."""


class InvalidArgument(DriverError):
    """The request itself is wrong."""


class NotFound(DriverError):
    """A named thing does not exist (deletes turn this into success)."""


class AlreadyExists(DriverError):
    """The name is taken by an object made with other parameters."""


class OutOfRange(DriverError):
    """A size that cannot be given, or a shrink."""


class Exhausted(DriverError):
    """No space or no room for one more; nothing of the attempt is left behind."""


class Refused(DriverError):
    """In use, stale attachment or wrong state: retrying alone will not help."""


class Busy(DriverError):
    """Another operation holds this object now; retry."""


class Unavailable(DriverError):
    """Transient, or the outcome is unknown; retry."""


class Corrupt(DriverError):
    """What is on disk contradicts itself; a human has to look."""


FINAL = (InvalidArgument, NotFound, AlreadyExists, OutOfRange, Exhausted, Refused, Corrupt)
"""The final classes: before one is raised, what the attempt has made so far is undone."""
