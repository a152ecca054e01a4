"""The static report: one HTML file that opens without a network, and a page for each table.

Reads every table of the run, the models' curves and the audits; writes root/reports/index.html and root/reports/tables/*.html. A part
whose tables are not built yet stays empty. A rerun writes the same files.

    gr2 stage report --profile demo        or: gr2 report
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import jinja2

import schemas
from gr2 import PROJECT, artifacts
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import MissingInputError
from gr2.pipeline import STAGES, read_record
from schemas.candidates import TIMES
from schemas.query import connect
from spark_jobs import charts, table_pages

HEADLINE = ("recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "mrr")
FEWEST = 10  # requests of a slice from which it is drawn
SLICES = ("all", *TIMES)


def run(cfg: Config, ctx: Context) -> Result:
    """Renders the report. Raises MissingInputError before the first table."""
    facts = Facts(ctx)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PROJECT / "conf"), autoescape=True, undefined=jinja2.StrictUndefined)
    if not (tables := table_pages.write(ctx, environment)):
        raise MissingInputError(f"there is no table under {ctx.place}: run `gr2 run` first")
    page = environment.get_template("report.html.jinja").render(
        profile=cfg.profile, run_id=ctx.run_id, protocol=cfg.data.protocol, order=cfg.data.same_day_order, teacher=cfg.traces.teacher,
        release=facts.release(), results=facts.results(), retrieval=facts.retrieval(), quality=facts.quality(), flow=facts.flow(),
        refused=facts.refused(), sids=facts.sids(), curves=facts.curves(), traces=facts.traces(), ranks=facts.ranks(),
        position=facts.audits("position", "reward_hacking"), other=facts.audits("reconciliation", "leakage", "sid_health", "traces"),
        rollouts=facts.rollouts(), costs=facts.costs(), tables=tables,
    )  # fmt: skip
    path = ctx.root / "reports" / "index.html"
    artifacts.write_whole(path, page)
    ctx.log(f"report: {path}")
    return Result(detail={"bytes": len(page)})


class Facts:
    """What the report shows, each part asked of the tables with one query."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.sql = connect(ctx.lake)

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Rows of a query, none where a table that it names was not built yet; parameters are bound, never pasted."""
        named = set(re.findall(r"\b(?:FROM|JOIN) (\w+)", query)) & set(schemas.NAMES)
        if not all(self.ctx.lake.exists(name) for name in named):
            return []
        result = self.sql.execute(query, list(values))
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]

    def release(self) -> dict[str, Any]:
        """The promoted release, or an empty mapping before the first."""
        found = self.rows("SELECT * FROM releases WHERE status = 'promoted'")
        return {**found[0], "pins": json.loads(found[0]["pins"])} if found else {}

    def results(self) -> list[dict[str, Any]]:
        """A table for each slice: models down, metrics across, each with its interval and its difference to the incoming order."""
        found = []
        for slice_ in SLICES:
            for population in ("overall", "conditional"):
                rows = self.rows(
                    "SELECT * FROM metrics WHERE run_id = ? AND slice = ? AND population = ? AND mode <> 'full' ORDER BY model, mode",
                    self.ctx.run_id, slice_, population,
                )  # fmt: skip
                if rows:
                    found.append({"slice": slice_, "population": population, "n": rows[0]["n"], "rows": self._pivot(rows)})
        return found

    def _pivot(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        keys = list(dict.fromkeys((r["model"], r["mode"]) for r in rows))
        cells = {(r["model"], r["mode"], r["metric"], r["reference"]): r for r in rows}
        table = []
        for model, mode in keys:
            metrics = [
                {"name": m, "value": cells.get((model, mode, m, "")), "gain": cells.get((model, mode, m, "prerank"))} for m in HEADLINE
            ]
            first = cells.get((model, mode, HEADLINE[0], ""), {}).get("value", 0.0)
            table.append({"model": model, "mode": mode, "metrics": metrics, "first": first})
        return sorted(table, key=lambda r: -r["first"])

    def retrieval(self) -> list[dict[str, Any]]:
        """The pre-ranker's full ranking over all items."""
        return self.rows(
            "SELECT slice, metric, value, low, high, n FROM metrics "
            "WHERE run_id = ? AND mode = 'full' AND reference = '' ORDER BY slice, metric",
            self.ctx.run_id,
        )

    def quality(self) -> list[str]:
        """A dot-and-interval plot for each slice and headline metric."""
        plots = []
        for slice_ in SLICES:
            for metric in ("recall@1", "ndcg@3"):
                rows = self.rows(
                    "SELECT model, mode, value, low, high FROM metrics WHERE run_id = ? AND slice = ? AND metric = ? AND n >= ? "
                    "AND population = 'conditional' AND reference = '' AND mode <> 'full' AND model <> 'oracle' ORDER BY value DESC",
                    self.ctx.run_id, slice_, metric, FEWEST,
                )  # fmt: skip
                if rows:
                    names = [r["model"] if r["mode"] == "order" else f"{r['model']} ({r['mode']})" for r in rows]
                    mark = next((r["value"] for r in rows if r["model"] == "prerank"), None)
                    values, lows, highs = ([r[k] for r in rows] for k in ("value", "low", "high"))
                    plots.append(
                        charts.intervals(
                            f"{metric} on {slice_}, target in the list", names, values, lows, highs, mark, "dashed: incoming order"
                        )
                    )
        return plots

    def flow(self) -> list[dict[str, Any]]:
        """Stages in order with what they read, published, refused."""
        rows = []
        for stage in STAGES:
            record = read_record(self.ctx, stage.name)
            if record:
                rows.append(
                    {
                        "name": stage.name,
                        "room": stage.module.split(".")[0],
                        **record,
                        "tables": [self._table(t) for t in stage.writes],
                        "makes": stage.makes,
                    }
                )
        return rows

    def _table(self, name: str) -> dict[str, Any]:
        rows = self.ctx.lake.dataset(name).count_rows() if self.ctx.lake.exists(name) else 0
        return {"name": name, "rows": rows, "grain": schemas.get(name).grain}

    def refused(self) -> list[dict[str, Any]]:
        """Quarantined rows by reason."""
        return self.rows("SELECT target, reason, count(*) AS n, min(record) AS example FROM quarantine GROUP BY ALL ORDER BY n DESC")

    def sids(self) -> list[str]:
        """Use of each codebook: how items spread over its codes."""
        if "tokenizer" not in artifacts.names(self.ctx.root):
            return []
        rows = self.rows("SELECT codes FROM semantic_ids WHERE tokenizer = ?", self.ctx.model("tokenizer").id)
        if not rows:
            return []
        levels = list(zip(*(r["codes"] for r in rows), strict=True))
        series = {}
        for number, codes in enumerate(levels):
            counts = sorted((codes.count(c) for c in set(codes)), reverse=True)
            series[f"level {number} ({len(counts)} codes used)"] = (list(range(1, len(counts) + 1)), counts)
        return [charts.lines("Items per code, codes by rank", series, "code, most used first", "items", smooth=False)]

    def curves(self) -> list[str]:
        """Training curves of every model, those of one kind together."""
        kinds: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        for name in artifacts.names(self.ctx.root):
            path = artifacts.resolve(self.ctx.root, name).path / "metrics.jsonl"
            for key in ("loss", "reward"):
                points = [(r["step"], r[key]) for r in _jsonl(path) if r.get(key) is not None and r.get("step") is not None]
                if points:
                    kinds.setdefault(f"{name.split('-')[0]}: {key}", {})[name] = ([p[0] for p in points], [p[1] for p in points])
        return [charts.lines(title, series, "step", title.split(": ")[1]) for title, series in kinds.items()]

    def traces(self) -> dict[str, Any]:
        """Acceptance by the target's incoming rank, and verdicts."""
        by_rank = self.rows(
            "SELECT mode, incoming_rank AS r, avg((verdict = 'accepted')::INT) AS share FROM reasoning_traces "
            "WHERE incoming_rank IS NOT NULL GROUP BY ALL ORDER BY r"
        )
        groups: dict[str, tuple[list[float], list[float]]] = {}
        for row in by_rank:
            groups.setdefault(row["mode"], ([], []))[0].append(row["r"])
            groups[row["mode"]][1].append(row["share"])
        verdicts = self.rows("SELECT mode, verdict, reason, count(*) AS n FROM reasoning_traces GROUP BY ALL ORDER BY n DESC LIMIT 20")
        plot = (
            charts.columns("Share of samples accepted, by the target's incoming rank", groups, "incoming rank", "accepted")
            if groups
            else ""
        )
        sample = self.rows("SELECT text, mode, teacher FROM reasoning_traces WHERE verdict = 'accepted' ORDER BY sample_id LIMIT 2")
        return {"plot": plot, "verdicts": verdicts, "samples": sample}

    def ranks(self) -> str:
        """Where targets stand when they come in: train and test must look alike."""
        rows = self.rows(
            "SELECT split, target_rank AS r, count(*) AS n FROM candidates WHERE target_rank IS NOT NULL GROUP BY ALL ORDER BY r"
        )
        totals: dict[str, int] = {}
        for row in rows:
            totals[row["split"]] = totals.get(row["split"], 0) + row["n"]
        groups = {
            s: ([r["r"] for r in rows if r["split"] == s], [r["n"] / totals[s] for r in rows if r["split"] == s]) for s in sorted(totals)
        }
        return (
            charts.columns("Incoming rank of the target, by split", groups, "incoming rank", "share of targets in the list")
            if groups
            else ""
        )

    def audits(self, *kinds: str) -> list[dict[str, Any]]:
        """Audit rows of this run of the given kinds."""
        marks = ", ".join("?" for _ in kinds)
        return self.rows(
            f"SELECT * FROM audits WHERE run_id = ? AND audit IN ({marks}) ORDER BY audit, stage, subject", self.ctx.run_id, *kinds
        )

    def rollouts(self) -> list[str]:
        """What answers did over training: reward, copies of either order, likeness to them, the pull of the first slot, failures."""
        rows = self.rows(
            """
            WITH said AS (
                SELECT r.*, p.shown, list_position(p.shown, regexp_extract(r.text, '\\["([A-T])"[^\\]]*\\]\\s*$', 1)) AS slot
                FROM rollouts r LEFT JOIN rl_prompts p USING (prompt_id))
            SELECT run, step, avg((status <> 'ok')::INT) AS invalid, avg((tau_incoming > 0.999)::INT) AS copies, avg(reward) AS reward,
                avg((tau_shown > 0.999)::INT) AS shown, avg(tau_incoming) AS tau, avg(tau_shown) AS tau_shown,
                avg((slot = 1)::INT * len(shown)) FILTER (status = 'ok') AS lift
            FROM said GROUP BY ALL ORDER BY step
            """
        )
        plots = []
        for key, title in (
            ("reward", "Mean reward of rollouts"),
            ("copies", "Share that copies the incoming order"),
            ("shown", "Share that copies the order shown"),
            ("tau", "Kendall's tau with the incoming order"),
            ("tau_shown", "Kendall's tau with the order shown"),
            ("lift", "First choices from the first slot, over chance"),
            ("invalid", "Share of invalid answers"),
        ):
            series: dict[str, tuple[list[float], list[float]]] = {}
            for row in rows:
                xs, ys = series.setdefault(row["run"].split("@")[0], ([], []))
                xs.append(row["step"])
                ys.append(row[key] if row[key] is not None else 0.0)
            if series:
                plots.append(charts.lines(title, series, "step", title.lower().split(",")[0], smooth=False))
        return plots

    def costs(self) -> dict[str, Any]:
        """Seconds per stage."""
        records = [(s.name, read_record(self.ctx, s.name)) for s in STAGES]
        known = [(name, r["seconds"], r["peak_mib"], r["tokens"]) for name, r in records if r]
        plot = charts.bars("Seconds per stage", [k[0] for k in known], [k[1] for k in known], "seconds") if known else ""
        return {
            "plot": plot,
            "total": sum(k[1] for k in known),
            "peak": max((k[2] for k in known), default=0),
            "tokens": sum(k[3] for k in known),
        }


def _jsonl(path: Any) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []
