"""The order of imports, and the size of files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trinity_lib"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
LAYERS = (
    ("variable",),
    ("config", "progress", "world", "plugin", "allocator", "native", "onednn"),
    ("headings", "card_html", "subject", "stage_schema", "planted_text", "plots_rehearsal"),
    ("initial", "muon", "schema", "audited", "ledger", "guise"),
    ("planted_tables", "intervals"),
    ("planted_documents",),
    ("planted_questions",),
    ("planted",),
    ("disk", "corpus", "oracle", "linear", "loads", "gpus", "failure", "workers"),
    ("answers", "forecasts"),
    ("facts",),
    ("consistency",),
    ("association", "fairness", "recall", "calibration", "memorisation", "behaviour"),
    ("record", "sources", "ranks", "mesh", "audit", "items"),
    ("tokenizer", "balance", "metrics", "specialisation", "dynamics"),
    ("auxiliary", "assignment", "outcome", "findings", "browse"),
    ("balancers", "data", "routing", "attention"),
    ("plots", "plots_kernels", "plan_report", "report", "plots_explore", "statements"),
    ("stage_report",),
    ("stage_axes",),
    ("plots_families", "plots_inside"),
    ("plots_study", "plots_simulate", "plots_plan", "plots_posttrain"),
    ("plots_audit", "plots_stages"),
    ("_standins", "fused"),
    ("dropless",),
    ("_megablocks", "exchange", "operators"),
    ("rows", "experts", "simulate"),
    ("model", "agreement", "stability"),
    ("optim", "losses", "generate", "afmoe", "flops", "activations", "serving"),
    ("chat", "_peft"),
    ("asked", "hub", "parallel", "footprint", "lora", "dialogues", "hidden"),
    ("checkpoint", "evaluate", "harness", "rewards", "holdings"),
    ("shards", "lessons", "examination", "polish"),
    ("states", "lm_tasks", "stored"),
    ("drift", "paths", "stage_routing", "lens", "probing", "ablation"),
    ("run", "plan", "probe"),
    ("launch_folder",),
    ("resume", "replay", "posttrain_config"),
    ("preflight",),
    ("destination",),
    ("session",),
    ("step", "trace"),
    ("train", "student", "curriculum", "rehearse"),
    ("stages", "posttrain_session"),
    ("posttrain", "relearning"),
    ("compare", "card", "trial"),
    ("recipes",),
    ("truebase_config",),
    ("chain", "interview", "stage_statements"),
    ("inside", "given"),
    ("stage_cards",),
    ("truebase",),
    ("launch", "articles"),
    ("kernels_config", "study_config", "plan_config", "posttrain_launch"),
    ("interpreted", "grid", "truebase_launch"),
    ("kernels", "study", "planner"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports_of(path: Path) -> list[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trinity_lib":
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "trinity_lib."
        ):
            found.append(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found += [
                a.name.split(".")[1] for a in node.names if a.name.startswith("trinity_lib.")
            ]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    assert name in RANK, f"{name}.py has no level: add it to LAYERS"
    for target in imports_of(PACKAGE / f"{name}.py"):
        assert RANK[target] < RANK[name], f"{name} imports {target}, which is not below it"


def test_the_package_itself_imports_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_only_one_module_may_import_megablocks() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem != "_megablocks":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.split(".")[0] in ("megablocks", "stk")], path


def test_reading_a_run_needs_no_torch() -> None:
    code = (
        "import sys; from trinity_lib.record import open_run, open_runs; "
        "import trinity_lib.plots, trinity_lib.metrics, trinity_lib.plots_study, "
        "trinity_lib.dynamics, trinity_lib.specialisation, trinity_lib.outcome, "
        "trinity_lib.plots_audit, trinity_lib.plots_stages, trinity_lib.card; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_small(name: str) -> None:
    text = (PACKAGE / f"{name}.py").read_text()
    assert text.count("\n") <= 420, f"{name}.py: is there a second noun in it?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            length = (node.end_lineno or 0) - node.lineno - docstring.count("\n")
            assert length <= 60, f"{name}.{node.name} has {length} lines"
