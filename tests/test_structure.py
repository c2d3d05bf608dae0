"""The package's own rules: a module imports only those above it, says what it is, and has no endless function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import manyicl

PACKAGE = Path(manyicl.__file__).parent
MOST_LINES = 60
# Where a name after `import` is a module, not something in one.
FOLDERS = ("manyicl", "manyicl.world", "manyicl.report")

# In the order of the pipeline. Each may import only those above it; a new module takes its place here.
MODULES = (
    "errors",  # what a user did wrong
    "refusals",  # what the operating system refused
    "files",  # whole or absent
    "claims",  # work that several processes share
    "locks",  # one writer
    "seeds",  # of random streams, each with its purpose
    "shots",  # a number of them, or as many as fit
    # Data in: labelled rows, to text, to ids, to rows of a batch.
    "faults",  # mistakes in data files
    "json_text",
    "columns",  # where the cells of a row stand
    "readers",  # files to records
    "shapes",  # well-known shapes of records
    "rows",
    "choices",  # answers that name an option
    "layouts",  # a folder to the files of each task
    "spellings",  # labels that may be one
    "math_answers",  # compared by value
    "scoring",  # was it right
    "task_settings",
    "tasks",
    "label_names",
    "templates",
    "episodes",
    "tokens",
    "tokenized",  # flat ids of a task, and their cache
    "packing",
    "segments",  # where the episodes of a row lie
    "batches",
    # The model and its objective.
    "flash_attention",  # version 3 in place of torch's own, where it is installed
    "partial_attention",
    "segment_kernels",  # attention of each segment to itself
    "attention",
    "world.__init__",
    "world.seed",  # the packaged model's place and template
    "config_shapes",  # head dimensions, windows and chunks of every config class
    "precision",  # bf16 or fp32, by what the device multiplies
    "trials",  # ordinary text to try a model on
    "models",
    "saving",
    "windows",  # how many tokens a model reads
    "costs",  # weights and FLOPs, from a config alone
    "heads",  # logits in float32
    "loss",
    "isolation",  # does a model keep the episodes of a row apart?
    "lean_layers",  # norms and rotary positions in fewer kernels
    "joined_adapters",  # of one input, in what torch.compile makes of a layer
    "layers",  # which are recomputed, and whether they are compiled
    "footprint",  # memory of a training step, predicted
    "throughput",
    "usage",  # seconds and bytes
    "metrics",
    "config",
    "validation",  # rows of it, packed once
    "launch",  # what accelerate may have set up
    "training",
    # Asking it: score against number of shots.
    "memory",
    "tries",
    "query_rows",
    "prefix_trial",  # same logits behind a prefix as by the model itself?
    "sharing",
    "prefix",
    "prefix_store",
    "fused",  # pieces of a model compiled while it is asked
    "answering",
    "intervals",
    "cells",
    "copies",
    "overlap",  # of tasks that are not trained on with those that are
    "sweep",
    "shot_curve",
    "held_out",
    "ranks",
    "parts",
    "results",
    "difference",
    "evaluation",
    "endpoint",
    "endpoint_sweep",
    # The embedded world: words, text, tasks, and the small model that has read them.
    "world.lexicon",
    "world.grammar",
    "world.prose",
    "world.patterns",
    "world.relations",
    "world.text",
    "world.rules",
    "world.classification",
    "world.nli",
    "world.qa",
    "world.summarization",
    "world.arithmetic",
    "world.tasks",
    "world.documents",
    "world.regimes",
    # Runs, and what a person sees of all this.
    "report.__init__",
    "report.numbers",
    "progress",
    "terminal",  # tables of any width
    "run_progress",
    "preparation",  # a recipe to the plan of packs
    "run_folder",
    "runs",
    "audit",
    "preview",
    "devices",  # accelerators by name
    "fitting",
    "forecast",  # `plan`: what a recipe will do
    "export",  # built episodes for other trainers
    "report.comparison",
    "report.tables",
    "report.rates",
    "report.verdict",
    "report.matchings",
    "report.svg",  # a plot as a piece of the page
    "report.plots",
    "report.figures",
    "report.page",
    "report.markdown",
    "report.document",
    "model_card",
    "display",
    "run_display",
    # The comparison of arms.
    "arms",
    "forgetting",
    "comparison_inputs",  # hashes of the data that it began with
    "comparison",  # the grid of cells, and the work
    "comparison_forecast",  # `plan` of a comparison
    "pooling",  # over seeds and tasks
    "findings",
    "comparison_scores",
    "comparison_forgetting",
    "comparison_analysis",
    "comparison_summary",
    "comparison_display",
    "outcome",
    "demo",
    "cli",
    "__init__",
    "__main__",
)


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imports_of(tree: ast.Module) -> set[str]:
    """Return the modules of this package that are imported anywhere in `tree`, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in FOLDERS:
            found |= {f"{node.module}.{alias.name}".removeprefix("manyicl.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("manyicl."):
            found.add(str(node.module).removeprefix("manyicl."))
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("manyicl.")]
            found |= {name.removeprefix("manyicl.") for name in names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"
    return found


def test_every_module_is_in_the_list_and_every_name_in_it_is_a_module():
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert sorted(MODULES) == sorted(".".join(path.parts) for path in paths)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_those_above_it(module):
    above = MODULES[: MODULES.index(module)]
    assert imports_of(parse(module)) <= set(above)


def test_a_backward_import_would_be_found():
    tree = ast.parse("from manyicl import cli\ndef f():\n    from manyicl.runs import train\n    import manyicl.demo\n")
    assert imports_of(tree) == {"cli", "runs", "demo"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_in_one_line_what_it_is(module):
    first, *_ = (ast.get_docstring(parse(module)) or "").splitlines() or [""]
    assert first.endswith((".", "?"))
    assert len(first.split()) >= 5


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_endless(module):
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            num_lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert num_lines <= MOST_LINES, f"{module}.{node.name} has {num_lines} lines"


def test_what_is_exported_exists_and_is_sorted():
    assert manyicl.__all__ == sorted(manyicl.__all__)
    assert dir(manyicl) == manyicl.__all__
    for name in manyicl.__all__:
        assert getattr(manyicl, name).__name__ == name
        assert getattr(manyicl, name).__doc__


def test_what_is_exported_is_what_type_checkers_see():
    guarded = next(node for node in parse("__init__").body if isinstance(node, ast.If))
    names = [alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == manyicl.__all__
    homes = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: f"manyicl.{home}" for name, home in manyicl._HOMES.items()} == homes


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'manyicl' has no attribute 'trian'"):
        manyicl.trian  # noqa: B018
