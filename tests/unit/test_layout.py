"""The shape of the house: who imports whom, what stays light, what is never loaded, what every stage says of itself."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import schemas
from gr2.config import PROJECT, Config
from gr2.pipeline import STAGES, Stage
from gr2.prompts import COLUMNS, DERIVED

pytestmark = pytest.mark.unit
MAY_IMPORT = {  # DESIGN section 1
    "gr2": set(),
    "schemas": {"gr2"},
    "validation": {"gr2", "schemas"},
    "scoring": {"gr2", "schemas"},
    "training": {"gr2", "schemas", "validation", "scoring"},
    "spark_jobs": {"gr2", "schemas", "validation", "scoring", "training"},
    "dags": {"gr2"},
}
HEAVY = {"torch", "pyspark", "pandas", "pyarrow", "transformers", "vllm", "deepspeed", "duckdb", "deltalake", "great_expectations", "delta"}
LEAVES_OUT = {  # what no module of a room may load, itself or through what it imports
    "gr2": HEAVY | {"airflow", "matplotlib", "lightgbm", "sklearn", "polars", "tokenizers"},
    "dags": HEAVY,  # a DAG file imports Airflow itself; its worker nothing else
    "schemas": {"torch", "pyspark", "airflow", "vllm", "transformers", "great_expectations"},
    "validation": {"torch", "great_expectations", "airflow", "vllm", "transformers"},
    "scoring": {"pyspark", "airflow", "delta", "vllm"},
    "training": {"pyspark", "airflow", "delta", "vllm"},
}
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
NEVER_CALLED = {"eval", "exec", "compile", "torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
NEVER_TRUE = {"trust_remote_code", "shell", "allow_pickle"}


def sources(*rooms: str) -> list[Path]:
    """Python files of the rooms."""
    return sorted(p for room in rooms for p in (PROJECT / room).rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names imported anywhere in a file, inside functions too; relative ones as "."."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." if node.level else node.module or ""


def breaches(room: str, tree: ast.AST) -> list[str]:
    """Imports of a room that its place in the house forbids."""
    rooms = set(MAY_IMPORT) - {room} - MAY_IMPORT[room]
    return [f"line {line}: {name}" for line, name in imported(tree) if name.split(".")[0] in rooms or name == "."]


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Constructs that run foreign code (DESIGN contract 13)."""
    for line, name in imported(tree):
        if name.split(".")[0] in PICKLES:
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            yield f"line {node.lineno}: imports torch.load"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in NEVER_CALLED or name.endswith(("read_pickle", "to_pickle")):
                yield f"line {node.lineno}: calls {name}"
            for k in node.keywords:
                if k.arg in NEVER_TRUE and not (isinstance(k.value, ast.Constant) and k.value.value is False):
                    yield f"line {node.lineno}: {k.arg}={ast.unparse(k.value)}"


# -- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    found = {str(p.relative_to(PROJECT)): b for p in sources(room) if (b := breaches(room, tree_of(p)))}
    assert not found


@pytest.mark.parametrize("room", LEAVES_OUT)
def test_a_fresh_interpreter_that_imports_the_room_stays_light(room: str, tmp_path: Path) -> None:
    """Transitively: all modules of the room in one new process, then a look at sys.modules."""
    modules = [m for p in sources(room) if not (m := module_of(p)).endswith("__main__")]
    assert modules
    code = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    for heavy in json.loads(sys.argv[2]):\n"
        "        if heavy in sys.modules: loaded.setdefault(heavy, name)\n"
        "print(json.dumps(loaded))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    command = [sys.executable, "-c", code, json.dumps(modules), json.dumps(sorted(LEAVES_OUT[room]))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}, "heavy package -> first module that loads it"


# -- files that are never loaded --------------------------------------------------------------------------------------


def test_nothing_runs_foreign_code() -> None:
    found = {str(p.relative_to(PROJECT)): b for p in sources(*MAY_IMPORT, "benchmarks") if (b := list(forbidden(tree_of(p))))}
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "from torch import load",
        "torch.load('x')",
        "eval('1')",
        "yaml.load(text)",
        "np.load('x')",
        "pd.read_pickle('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "load('x', trust_remote_code=flag)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_the_net_catches(code: str) -> None:
    assert list(forbidden(ast.parse(code)))


def test_the_net_lets_pass_what_is_safe() -> None:
    assert not list(forbidden(ast.parse("model.eval()\nyaml.safe_load(t)\nload('x', trust_remote_code=False)\nre.compile('x')")))
    assert breaches("gr2", ast.parse("def f():\n    import schemas.lake")) == ["line 2: schemas.lake"]
    assert breaches("scoring", ast.parse("from training.data import pack")) == ["line 1: training.data"]
    assert not breaches("training", ast.parse("from scoring.model import load\nimport torch"))


# -- one module a stage, one module a table ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_a_stage_is_a_module_that_says_what_it_does(stage: Stage) -> None:
    """What it reads and writes (every table and model by name), what makes a rerun harmless, the command; `run(cfg, ctx)`."""
    path = PROJECT / f"{stage.module.replace('.', '/')}.py"
    assert path.exists(), f"stage {stage.name!r} has no module"
    tree = tree_of(path)
    said = ast.get_docstring(tree) or ""
    missing = [word for word in ("reads", "writes", "rerun", f"gr2 stage {stage.name}") if word not in said.lower()]
    missing += [f"`{made}`" for made in (*stage.writes, *stage.makes) if f"`{made}`" not in said]
    assert not missing, f"the docstring of {stage.module} does not say: {missing}"
    runs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    assert [[a.arg for a in run.args.args] for run in runs] == [["cfg", "ctx"]]
    only = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    at_import = [node.lineno for node in tree.body[1:] if not isinstance(node, only)]
    assert not at_import, f"lines of {stage.module} that run at import: {at_import}"


def test_stage_modules_are_distinct_and_every_table_has_one_writer() -> None:
    assert len({s.module for s in STAGES}) == len(STAGES)
    writers = {table: [s.name for s in STAGES if table in s.writes] for table in schemas.NAMES}
    assert {t for t, w in writers.items() if not w} == set(), "tables that no stage writes"
    assert {t for t, w in writers.items() if len(w) > 1} == {"quarantine", "audits"}, "only refused rows and findings come from several"
    assert {t for s in STAGES for t in (*s.reads, *s.writes)} <= set(schemas.NAMES)


def test_a_stage_reads_only_what_an_earlier_one_made() -> None:
    tables: set[str] = set()
    models: set[str] = set()
    for stage in STAGES:
        assert set(stage.uses) <= models, stage.name
        assert set(stage.reads) <= tables, stage.name
        assert set(stage.sections) <= set(Config.model_fields), stage.name
        tables |= set(stage.writes)
        models |= set(stage.makes)


def test_no_baseline_and_no_grade_reaches_a_prompt() -> None:
    """What a prompt may show are columns of the evidence; the orders of LambdaMART and the others are read where they are judged."""
    assert set(schemas.get("candidate_features").names()) - {"grade", "grade_weight"} >= COLUMNS - DERIVED
    reads = re.compile(r"baselines|.*\b(FROM|JOIN) baselines\b.*", re.DOTALL)  # the table's name alone, or a query of it
    files = [p for p in sources(*MAY_IMPORT) if p.parent.name != "schemas"]
    readers = {p.stem for p in files for n in ast.walk(tree_of(p)) if isinstance(n, ast.Constant) and reads.fullmatch(str(n.value))}
    assert readers == {"pipeline", "baselines", "evaluation"}


def test_one_schema_module_a_table() -> None:
    helpers = {"__init__", "base", "lake", "query"}
    modules = {p.stem for p in sources("schemas")} - helpers
    assert modules == set(schemas.NAMES)
    for name in modules:
        table = schemas.get(name)
        assert (table.name, bool(table.key), table.grain[:4]) == (name, True, "one ")
        assert set(table.key) <= set(table.names()), name
        assert (ast.get_docstring(tree_of(PROJECT / "schemas" / f"{name}.py")) or "").strip(), name
    with pytest.raises(KeyError, match="declares a table"):
        schemas.get("nothing")
