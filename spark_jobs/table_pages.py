"""A page for each table: grain, key, columns, laws, rows, and what questions of docs/queries.md it answers. Not a stage."""

import re

import jinja2

import schemas
from gr2 import PROJECT
from gr2.context import Context
from gr2.pipeline import STAGES


def questions() -> list[tuple[str, str]]:
    """Every question of docs/queries.md with its query, in order."""
    page = (PROJECT / "docs" / "queries.md").read_text()
    return re.findall(r"^### \d+\. ([^\n]+)\n[^#]*?^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def write(ctx: Context, environment: jinja2.Environment) -> list[str]:
    """Writes root/reports/tables/<name>.html for each table that exists; returns their names."""
    template = environment.get_template("table.html.jinja")
    folder = ctx.root / "reports" / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {name: stage.name for stage in reversed(STAGES) for name in stage.writes}
    names = [name for name in schemas.NAMES if ctx.lake.exists(name)]
    for name in names:
        opened = ctx.lake.open(name)
        asked = [(question, query) for question, query in questions() if re.search(rf"\b{name}\b", query)]
        page = template.render(
            table=schemas.get(name), names=names, rows=opened.to_pyarrow_dataset().count_rows(), version=opened.version(),
            stage=made_by.get(name, "every stage"), profile=ctx.cfg.profile, questions=asked,
        )  # fmt: skip
        (folder / f"{name}.html").write_text(page)
    return names
