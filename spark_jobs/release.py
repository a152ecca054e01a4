"""Promotes the draft release: which table versions and models belong together (DESIGN contract 6).

Reads the draft's pins and the stages' records; writes `stage_runs` (one run of one stage; run_id, stage) and `releases` (one
release; release_id); how new models compare with those that are out goes into `audits`. A rerun with the same pins finds its
release already promoted and changes nothing. A night promotes its tables with the models that are out.

    gr2 stage release --profile demo
"""

import datetime as dt
import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from gr2 import PROJECT
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import AuditError, InputError
from gr2.pipeline import STAGES, read_record
from spark_jobs.increments import Built, until_settled
from spark_jobs.publish import publish_rows
from validation import gate


def run(cfg: Config, ctx: Context) -> Result:
    """Publishes the stage records, then the release. Raises AuditError while an audit of this run that concerns it stands failed."""
    audits = ctx.lake.read("audits", ["audit", "subject", "stage"], run_id=ctx.run_id, passed=False).to_pylist()
    failed = [a for a in audits if a["stage"] != "release"]  # a comparison that failed is made again
    for audit in [a for a in failed if not concerns(a, cfg.scoring.live)]:
        ctx.log(f"release: {audit['audit']} of {audit['subject']} failed, which scoring.live does not let answer")
    if failed := [a for a in failed if concerns(a, cfg.scoring.live)]:
        raise AuditError(f"not promoted: {len(failed)} failed audit(s), first {failed[0]}")
    if (found := None if ctx.date else gate.compare(cfg, ctx)) is not None:
        ctx.log(f"release: {found['subject']}: {found['value']}, {found['detail']}")
        row = {"run_id": ctx.run_id, "stage": "release", **found}
        publish_rows(ctx, "audits", [row], {"run_id": ctx.run_id, "stage": "release"})
        if not found["passed"]:
            raise AuditError(f"not promoted: {found['subject']}: {found['value']}, at least {found['low']} is asked ({found['detail']})")
    records = stage_rows(ctx)
    publish_rows(ctx, "stage_runs", records, {"run_id": ctx.run_id})
    return until_settled(ctx, lambda: _promote(cfg, ctx, len(records)))


def concerns(audit: Mapping[str, Any], live: Mapping[str, Sequence[str]]) -> bool:
    """Whether a failed audit keeps a release back: all do, but for orders that waver with places where only models are compared.

    The subject of an audit of positions is `model/mode/figure`; `live`: the modes of each model that answer at night.
    """
    if audit["audit"] != "position":
        return True
    model, mode, _ = audit["subject"].split("/")
    return mode in live.get(model, ())


def _promote(cfg: Config, ctx: Context, records: int) -> Result:
    """Puts the release on top of those that are there; another run that does the same is never overwritten."""
    base = ctx.lake.version("releases") if ctx.lake.exists("releases") else -1
    there = ctx.lake.read("releases").to_pylist() if base >= 0 else []
    release = _release(cfg, ctx, next((json.loads(r["pins"]) for r in there if r["status"] == "promoted"), {}))
    rows = succeeded(there, release, cfg.maintenance.keep_releases)
    built = Built("audits", ctx.lake.version("audits"), {"release_id": release["release_id"]}, base)
    publish_rows(ctx, "releases", rows, built=built)
    ctx.log(f"release {release['release_id']} is promoted")
    return Result(rows_in=records, rows_out=1, detail={"release_id": release["release_id"]})


def succeeded(there: list[dict[str, Any]], release: dict[str, Any], keep: int) -> list[dict[str, Any]]:
    """All releases once `release` is promoted: the one before it is superseded, and of the superseded the latest `keep` stay live."""
    others = sorted((r for r in there if r["release_id"] != release["release_id"]), key=lambda r: r["promoted_at"], reverse=True)
    for row in others:
        row["status"] = "superseded" if row["status"] == "promoted" else row["status"]
    for row in [r for r in others if r["status"] == "superseded"][keep:]:
        row["status"] = "retired"
    return [*others, release]


def stage_rows(ctx: Context) -> list[dict[str, Any]]:
    """The last good run of each stage as rows of `stage_runs`: those of this run, and what it found up to date."""
    names = ("stage", "status", "rows_in", "rows_out", "quarantined", "duplicates", "tokens", "seconds", "peak_mib", "fingerprint")
    rows = []
    for stage in STAGES:
        record = read_record(ctx, stage.name)
        if record and stage.name not in ("release", "report", "maintenance"):
            row = {**{c: record[c] for c in names}, "run_id": ctx.run_id}
            if record["run_id"] != ctx.run_id:
                row["status"] = "up_to_date"
            rows.append({**row, "detail": json.dumps(record["detail"], sort_keys=True, default=str)})
    return rows


def manage(ctx: Context, action: str, release_id: str) -> None:
    """`gr2 release list` and `gr2 release retire --release-id ID`. Raises InputError for an unknown release or action."""
    rows = ctx.lake.read("releases", order_by=["promoted_at"]).to_pylist()
    if action == "retire":
        if release_id not in {r["release_id"] for r in rows}:
            raise InputError(f"no release {release_id!r}; there are: {', '.join(r['release_id'] for r in rows)}")
        until_settled(ctx, lambda: _retire(ctx, release_id))
        rows = ctx.lake.read("releases", order_by=["promoted_at"]).to_pylist()
    elif action != "list":
        raise InputError(f"{action!r}: choose list or retire")
    for row in rows:
        print(f"{row['release_id']}  {row['status']:10}  {row['profile']:10}  {row['promoted_at']:%Y-%m-%d %H:%M}  {row['run_id']}")


def _retire(ctx: Context, release_id: str) -> Result:
    """Retires a release among those that are there; one that a run promotes meanwhile is never overwritten."""
    base = ctx.lake.version("releases")
    rows = ctx.lake.read("releases").to_pylist()
    for row in rows:
        row["status"] = "retired" if row["release_id"] == release_id else row["status"]
    built = Built("releases", base, {"retired": release_id}, base)
    return Result(rows_out=publish_rows(ctx, "releases", rows, built=built))


def _release(cfg: Config, ctx: Context, promoted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The draft as a release. Tables that another run published since are as that left them.

    A night's models are the promoted ones, with what judges them (`gate.judged`).
    """
    tables = dict(ctx.pins.get("tables", {}))
    for name, version in promoted.get("tables", {}).items():
        tables[name] = max(version, tables.get(name, -1))
    kept = {k: v for k, v in tables.items() if k not in ("releases", "stage_runs")}
    pins = {**(promoted if ctx.date else {}), **ctx.pins, "tables": kept, "judged": gate.judged(promoted if ctx.date else ctx.pins)}
    content = {
        "pins": json.dumps(pins, sort_keys=True),
        "code": _commit(),
        "config_hash": cfg.digest(),
        "lock_hash": hashlib.sha256((PROJECT / "uv.lock").read_bytes()).hexdigest(),
        "seed": cfg.seed,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "release_id": digest, "status": "promoted", "profile": cfg.profile, "run_id": ctx.run_id, **content,
        "promoted_at": dt.datetime.now(dt.UTC),
    }  # fmt: skip


def _commit() -> str:
    """The code's commit, marked where the tree was changed since; `unknown` outside a repository."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
