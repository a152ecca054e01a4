"""A page for each table: grain, key, columns, laws, rows, and what questions of docs/queries.md it answers. Not a stage."""

import re

import jinja2

import schemas
from gr2 import PROJECT
from gr2.artifacts import write_whole
from gr2.context import Context
from gr2.pipeline import builder_of
from schemas.lake import dataset_of


def questions() -> list[tuple[str, str]]:
    """Every question of docs/queries.md with its query, in order."""
    page = (PROJECT / "docs" / "queries.md").read_text()
    return re.findall(r"^### \d+\. ([^\n]+)\n[^#]*?^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def write(ctx: Context, environment: jinja2.Environment) -> list[str]:
    """Writes root/reports/tables/<name>.html for each table that exists; returns their names."""
    template, asked = environment.get_template("table.html.jinja"), questions()
    names = [name for name in schemas.NAMES if ctx.lake.exists(name)]
    folder = ctx.root / "reports" / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        opened = ctx.lake.open(name)
        page = template.render(
            table=schemas.get(name), names=names, rows=dataset_of(opened).count_rows(), version=opened.version(),
            stage=builder_of(name), profile=ctx.cfg.profile,
            questions=[(question, query) for question, query in asked if re.search(rf"\b(FROM|JOIN) {name}\b", query)],
        )  # fmt: skip
        write_whole(folder / f"{name}.html", page)
    return names
