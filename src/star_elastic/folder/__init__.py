"""Model folders on disk: read with suspicion, written whole or not at all."""

from star_elastic.folder.atomic import (
    atomic_folder,
    check_room,
    replace_json,
    write_json,
)
from star_elastic.folder.digests import digest
from star_elastic.folder.header import Spec, Stored
from star_elastic.folder.index import INDEX, WEIGHTS, stored_tensors
from star_elastic.folder.reader import Reader
from star_elastic.folder.shards import Shards
from star_elastic.folder.trust import (
    CheckpointError,
    check_links,
    one_line,
    open_inside,
    parse_json,
    read_bytes,
    read_json,
)

__all__ = [
    "INDEX",
    "WEIGHTS",
    "CheckpointError",
    "Reader",
    "Shards",
    "Spec",
    "Stored",
    "atomic_folder",
    "check_links",
    "check_room",
    "digest",
    "one_line",
    "open_inside",
    "parse_json",
    "read_bytes",
    "read_json",
    "replace_json",
    "stored_tensors",
    "write_json",
]
