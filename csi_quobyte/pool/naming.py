"""The names of a pool's files: which path an object has, and what a name says of the file that has it. Pure.

    format.json  lock  collector.json  tmp/  reserve/  nodes/<digest>.json
    volumes/<2 hex>/<id>.json            and <id>.content-<uid>, <id>.closed-<uid> (written by the node that has it)
    snapshots/<2 hex>/<id>.json
    images/<2 hex>/<id>.json
    jobs/<id>.json
    trash/<id>-<uid>.json                and <id>-<uid>.restore-<uid> (a record that is to be published)
    layers/<2 hex>/<id>.json  <id>.<format>  <id>.refs/<marker>

A record's claim has its name and `.g<generation>`; see pool/versions.
"""

import re
from dataclasses import dataclass

from csi_quobyte.pool import records
from csi_quobyte.pool.records import (
    Deletable,
    ImageRecord,
    JobRecord,
    LayerRecord,
    LeaseRecord,
    NodeRecord,
    SnapshotRecord,
    VolumeRecord,
    trash_id,
)

SHARD = re.compile(r"[0-9a-f]{2}")
TEMPORARY = re.compile(r"(init|[0-9a-f]{16})\.[0-9a-f]{12}")
RESERVE = re.compile(r"[0-9a-f]{32}")
NODE = re.compile(r"[0-9a-f]{32}\.json")
JOB = re.compile(r"[0-9a-f]{24}\.json(\.g[0-9]+)?")
TRASH = re.compile(r"[0-9a-f]{8}-(vol|snap)-[0-9a-f]{32}-[0-9a-f]{8}\.(json(\.g[0-9]+)?|restore-[0-9a-f]{8})")
LEASE_CLAIM = re.compile(rf"{records.LEASE_ID}\.json\.g[0-9]+")

# of objects, live and in the trash; of layers and jobs; of nodes; the lease
_RECORD = re.compile(
    rf"([0-9a-f]{{8}}-(vol|snap|img)-[0-9a-f]{{32}}(-[0-9a-f]{{8}})?|[0-9a-f]{{24}}|[0-9a-f]{{32}}|{records.LEASE_ID})\.json"
)
_CLAIM = re.compile(r".*\.json\.g[0-9]+")


def is_claim(name: str) -> bool:
    """Say whether a file beside a record is a claim on one, by its name."""
    return _CLAIM.fullmatch(name) is not None


def is_record(name: str) -> bool:
    """Say whether a file is a record's own, by its name; a copy that somebody has made of one is not."""
    return _RECORD.fullmatch(name) is not None


@dataclass(frozen=True)
class Paths:
    """Where everything of the pool at `root` (an absolute path) lies."""

    root: str

    def record(self, folder: str, record_id: str) -> str:
        """The path of a record in a folder with shards."""
        return f"{self.root}/{folder}/{records.shard_of(record_id)}/{record_id}.json"

    def of(self, record: records.Record) -> str:
        """The path of a record that is not in the trash."""
        match record:
            case VolumeRecord():
                return self.record("volumes", record.id)
            case SnapshotRecord():
                return self.record("snapshots", record.id)
            case ImageRecord():
                return self.record("images", record.id)
            case LayerRecord():
                return self.record("layers", record.id)
            case JobRecord():
                return self.job(record.id)
            case NodeRecord():
                return self.node(record.id)
            case LeaseRecord():
                return self.lease

    @property
    def lease(self) -> str:
        """The path of the lease's record."""
        return f"{self.root}/{records.LEASE_ID}.json"

    def node(self, node_id: str) -> str:
        """The path of a node's record."""
        return f"{self.root}/nodes/{records.node_digest(node_id)}.json"

    def job(self, job_id: str) -> str:
        """The path of a job's record."""
        return f"{self.root}/jobs/{job_id}.json"

    def layer_file(self, layer_id: str, name: str) -> str:
        """The path of a file beside a layer's record."""
        return f"{self.root}/layers/{layer_id[:2]}/{name}"

    def refs(self, layer_id: str) -> str:
        """The directory of a layer's markers."""
        return self.layer_file(layer_id, f"{layer_id}.refs")

    def announcement(self, volume_id: str, head: str) -> str:
        """The path of the record-to-be of a blank volume."""
        return f"{self._beside_volume(volume_id)}.new-{head}"

    def content(self, volume: VolumeRecord) -> str:
        """The path of the note of what is on a volume's device."""
        return f"{self._beside_volume(volume.id)}.content-{volume.uid}"

    def closed(self, volume: VolumeRecord) -> str:
        """The path of the note that a volume's node has closed it in order."""
        return f"{self._beside_volume(volume.id)}.closed-{volume.uid}"

    def _beside_volume(self, volume_id: str) -> str:
        return self.record("volumes", volume_id).removesuffix(".json")

    def trashed(self, entry_id: str) -> str:
        """The path of an entry of the trash."""
        return f"{self.root}/trash/{entry_id}.json"

    def restore(self, entry: Deletable, uid: str) -> str:
        """The path of the record that an entry of the trash is to be published as."""
        return f"{self.root}/trash/{trash_id(entry)}.restore-{uid}"
