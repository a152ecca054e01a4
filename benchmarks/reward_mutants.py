"""Mutation check of the reward: each expression of `gr2/rewards.py` is broken once, and its tests must notice each time.

    python -m benchmarks.reward_mutants [--jobs 2]        (about five minutes on two cores)

Comparisons, arithmetic, `and`/`or`, `not`, `min`/`max`, `any`/`all`, conditions and numbers are changed, one at a time. Prints the mutants
that `tests/unit/test_rewards.py` lets live, and exits with 1 if there is one.
"""

import argparse
import ast
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TARGET, TESTS = PROJECT / "gr2" / "rewards.py", "tests/unit/test_rewards.py"
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# The tests run against the mutant: this plugin puts it in the module's place before they import it.
PLUGIN = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("gr2.rewards", os.environ["MUTANT"])
module = importlib.util.module_from_spec(spec)
sys.modules["gr2.rewards"] = module
spec.loader.exec_module(module)
import gr2
gr2.rewards = module
"""


def changed(node: ast.AST) -> Iterator[ast.AST]:
    """Broken copies of one node."""
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            if type(op) in SWAPPED:
                new = copy.deepcopy(node)
                new.ops[place] = SWAPPED[type(op)]()  # type: ignore[call-overload]
                yield new
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED:
        new_op = copy.deepcopy(node)
        new_op.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
        yield new_op
    elif isinstance(node, ast.UnaryOp):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        yield ast.Name(NAMES[node.id], ast.Load())
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If):
        new_if = copy.deepcopy(node)
        new_if.test = ast.UnaryOp(ast.Not(), new_if.test)
        yield new_if


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what became of it, the whole module) of every mutant of what runs within functions."""
    tree = ast.parse(source)
    bodies = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and not _is_stub(f)]
    for function in bodies:
        inside = [node for statement in function.body for node in ast.walk(statement)]
        for node in inside:
            for new in changed(node):
                whole = copy.deepcopy(tree)
                spot = next(n for n in ast.walk(whole) if _same_place(n, node))
                _replace(whole, spot, ast.fix_missing_locations(ast.copy_location(new, spot)))
                told = f"{ast.unparse(node).splitlines()[0]}  ->  {ast.unparse(new).splitlines()[0]}"
                yield getattr(node, "lineno", function.lineno), told, ast.unparse(ast.fix_missing_locations(whole))


def _is_stub(function: ast.FunctionDef) -> bool:
    last = function.body[-1]
    return isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant) and last.value.value is ...


def _same_place(a: ast.AST, b: ast.AST) -> bool:
    places = ("lineno", "col_offset", "end_lineno", "end_col_offset")
    return type(a) is type(b) and all(getattr(a, p, None) == getattr(b, p, None) for p in places) and ast.dump(a) == ast.dump(b)


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(v is old for v in value):
                setattr(parent, name, [new if v is old else v for v in value])


def survives(text: str) -> bool:
    """Whether the tests pass on a mutant."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mutant.py").write_text(text)
        (Path(folder) / "mutant_plugin.py").write_text(PLUGIN)
        env = {**os.environ, "MUTANT": str(Path(folder) / "mutant.py"), "PYTHONPATH": f"{folder}{os.pathsep}{PROJECT}"}
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "mutant_plugin", "-p", "no:cacheprovider", TESTS]
        try:
            return subprocess.run(words, cwd=PROJECT, env=env, capture_output=True, check=False, timeout=120).returncode == 0
        except subprocess.TimeoutExpired:
            return False  # it runs for ever: noticed


def main() -> None:
    """Breaks, tests, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    source = TARGET.read_text()
    if not survives(source):
        parser.exit(2, "the tests do not pass on the reward as it is\n")
    made = list(mutants(source))
    with ThreadPoolExecutor(given.jobs) as pool:
        alive = [m for m, lives in zip(made, pool.map(lambda m: survives(m[2]), made), strict=True) if lives]
    print(f"{len(made)} mutants of {len({line for line, *_ in made})} lines, {len(alive)} live")
    for line, told, _ in alive:
        print(f"{TARGET.name}:{line}: {told}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
