"""Which versions belong together: readers go through the promoted one."""

from schemas.base import LONG, STRING, TIMESTAMP, Column, Table

TABLE = Table(
    name="releases",
    version="1.0",
    grain="one release",
    key=("release_id",),
    columns=(
        Column("release_id", STRING, "hash of the pins"),
        Column("status", STRING, "promoted: the one to read; superseded; retired", values=("promoted", "superseded", "retired")),
        Column("profile", STRING, "profile"),
        Column("run_id", STRING, "run"),
        Column("pins", STRING, "JSON: table versions, model hashes", long=True),
        Column("code", STRING, "code commit"),
        Column("config_hash", STRING, "hash of the configuration"),
        Column("lock_hash", STRING, "hash of uv.lock"),
        Column("seed", LONG, "seed"),
        Column("promoted_at", TIMESTAMP, "when", volatile=True),
    ),
)
