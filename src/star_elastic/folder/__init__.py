"""Model folders on disk: read with suspicion, written whole or not at all."""

from star_elastic.folder.atomic import (
    atomic_folder,
    check_room,
    replace_file,
    replace_json,
    siblings,
    sync,
    write_json,
)
from star_elastic.folder.digests import digest
from star_elastic.folder.header import Spec, Stored, parse_file
from star_elastic.folder.index import INDEX, WEIGHTS, stored_tensors
from star_elastic.folder.one_file import atomic_file, is_same
from star_elastic.folder.output import copy_file, write_file
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
    "atomic_file",
    "atomic_folder",
    "check_links",
    "check_room",
    "copy_file",
    "digest",
    "is_same",
    "one_line",
    "open_inside",
    "parse_file",
    "parse_json",
    "read_bytes",
    "read_json",
    "replace_file",
    "replace_json",
    "siblings",
    "stored_tensors",
    "sync",
    "write_file",
    "write_json",
]
