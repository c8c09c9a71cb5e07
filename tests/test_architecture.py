"""The rules of the architecture, read from the source: who imports whom, what nobody does, what is tested."""

import ast
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gdl_ray.families import FAMILIES

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("gdl_ray", "jobs", "serve", "infra")

_MODELS = {"gdl_ray.random", "gdl_ray.nn", "gdl_ray.family", "gdl_ray.families"}
_TOOLS = {"gdl_ray.home", "gdl_ray.images"}
_LIBRARY = (
    _MODELS
    | _TOOLS
    | {"gdl_ray.data", "gdl_ray.evaluate", "gdl_ray.train", "gdl_ray.turns", "gdl_ray.rows", "gdl_ray.engine"}
)

# What each part may import of the project, besides itself.
ALLOWED: dict[str, set[str]] = {
    "gdl_ray.random": set(),
    "gdl_ray.nn": {"gdl_ray.random"},
    "gdl_ray.family": {"gdl_ray.random", "gdl_ray.nn"},
    "gdl_ray.families": {"gdl_ray.random", "gdl_ray.nn", "gdl_ray.family"},
    "gdl_ray.home": set(),
    "gdl_ray.images": set(),
    "gdl_ray.client": set(),
    "gdl_ray.data": _LIBRARY,
    "gdl_ray.evaluate": _LIBRARY,
    "gdl_ray.train": _LIBRARY,
    "gdl_ray.turns": set(),
    "gdl_ray.rows": {"gdl_ray.family"},
    "gdl_ray.engine": _LIBRARY,
    "gdl_ray.tracking": _LIBRARY,
    "gdl_ray.registry": {*_LIBRARY, "gdl_ray.tracking"},
    "gdl_ray.pyfunc": {"gdl_ray.registry"},
    "jobs": {*_LIBRARY, "gdl_ray.tracking", "gdl_ray.registry"},
    "serve": {*_LIBRARY, "gdl_ray.registry"},
    "infra": {"gdl_ray.home"},  # so that GDL_RAY_HOME has one meaning
    "gdl_ray": set(),  # the package itself, which every part may import for its version
}

# Where a package from outside may be imported; packages not named here, anywhere but in the library's core.
OUTSIDE = {
    "ray": ("jobs", "serve", "infra", "gdl_ray.train.worker", "gdl_ray.train.judge"),
    "mlflow": ("gdl_ray.registry", "gdl_ray.tracking"),
    "boto3": ("infra",),
}
PURE = {"gdl_ray.random": {"torch"}, "gdl_ray.nn": {"torch"}}
CORE = {"torch", "numpy", "safetensors", "sklearn", "PIL"}
EXTRA = {
    "gdl_ray.client": {"httpx"},
    "gdl_ray.registry.model": {"mlflow", "pandas"},
    "gdl_ray.registry.evaluations": {"mlflow"},
    "gdl_ray.registry.events": {"mlflow"},
    "gdl_ray.registry.extractors": {"mlflow"},
    "gdl_ray.registry.promotion": {"mlflow"},
    "gdl_ray.registry.registration": {"mlflow"},
    "gdl_ray.registry.versions": {"mlflow"},
    "gdl_ray.tracking": {"mlflow", "requests"},
    "gdl_ray.train.store": {"pyarrow"},
    "gdl_ray.train.worker": {"ray"},
    "gdl_ray.train.judge": {"ray"},
}

# Modules that define something and have no test file that mirrors them, and why.
TESTED_ELSEWHERE = {
    "gdl_ray.family": "a contract: tests/families/test_contract.py runs on every family",
    "gdl_ray.families": "a table: tests/families/test_contract.py runs on each of its lines",
    "gdl_ray.home": "tests/infra/test_local.py finds its folder, tests/data/test_arrays.py makes one whole",
    "gdl_ray.rows": "tests/test_engine.py packs them, tests/families/test_contract.py compares their bits",
    "gdl_ray.train.local": "the loop reports to it in tests/train/test_loop.py",
    "gdl_ray.train.plan": "tests/train/test_loop.py follows its rules",
    "gdl_ray.train.judge": "needs Ray: tests/test_end_to_end.py validates apart",
    "gdl_ray.train.task": "a record that jobs.train fills, in tests/test_end_to_end.py",
    "gdl_ray.train.clock": "tests/train/test_loop.py trains for a budget of seconds",
    "gdl_ray.train.snapshot": "tests/train/test_loop.py takes some while training goes on",
    "jobs.evaluate": "needs Ray: tests/test_comparison.py runs it",
    "jobs.tasks": "needs Ray: tests/jobs/test_sample_on_cluster.py draws in some",
    "jobs.pieces": "needs Ray: tests/test_comparison.py has workers measure some",
    "jobs.models": "tests/jobs/test_sample.py resolves what it names",
    "gdl_ray.train.validation": "tests/train/test_loop.py validates, and pictures what it saves",
    "infra.errors": "tests/infra/test_local.py and tests/infra/test_backup.py provoke them",
    "infra.__main__": "tests/infra/test_local.py and tests/infra/test_verbs.py run its verbs",
    "infra.gcloud": "tests/infra/test_gcp.py runs it on a project in a file",
    "infra.gcp_foundation": "tests/infra/test_gcp.py makes and deletes all of it",
    "infra.gcp_nodes": "tests/infra/test_gcp.py finds, labels and deletes them",
    "infra.gcp_machine": "tests/infra/test_gcp.py makes one, in several zones",
    "infra.aws_cloud": "names and questions: tests/infra/test_aws.py finds what was made by them",
    "infra.aws_network": "tests/infra/test_aws_foundation.py opens and closes ports by hand",
    "infra.aws_teardown": "tests/infra/test_aws.py ends stacks with it, wherever it is interrupted",
    "serve.directory": "tests/serve/test_shelf.py resolves names by it",
    "serve.encoding": "tests/serve/test_app.py reads what it writes",
    "serve.model": "tests/serve/test_app.py asks for all that it can",
    "serve.operations": "tests/serve/test_app.py asks for each of them",
    "serve.problems": "tests/serve/test_app.py provokes them",
    "serve.replica": "needs Ray Serve: tests/test_end_to_end.py asks it",
    "serve.requests": "tests/serve/test_app.py sends what it reads",
}


@dataclass(frozen=True)
class Module:
    """A source file: its dotted name, syntax tree, imports (in functions too), whether a test mirrors it."""

    name: str
    tree: ast.Module
    imports: frozenset[str]
    mirrored: bool


Modules = dict[str, Module]
Rule = Callable[[Modules], Iterator[str]]


def read(root: Path) -> Modules:
    """Read every module of the project's packages under a folder."""
    files = {
        _dotted(file.relative_to(root)): file for name in PACKAGES for file in (root / name).rglob("*.py")
    }
    modules = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text(), str(file))
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        imports = frozenset(_imports(tree, package, files.keys()))
        modules[name] = Module(name, tree, imports, (root / _mirror(name)).exists())
    return modules


def _dotted(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _mirror(name: str) -> Path:
    """Name the test file of a module: `tests/train/test_loop.py` of `gdl_ray.train.loop`."""
    *folders, last = name.removeprefix("gdl_ray.").split(".")
    return Path("tests", *folders, f"test_{last.strip('_')}.py")


def _imports(tree: ast.Module, package: str, modules: Collection[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield submodule if submodule in modules else source


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _part(name: str) -> str:
    return next(part for part in ALLOWED if _within(name, part))


def imports_go_one_way(modules: Modules) -> Iterator[str]:
    """Import of the project what the table gives, and nothing else."""
    for module in modules.values():
        part = _part(module.name)
        for target in module.imports:
            known = target.split(".")[0] in PACKAGES and target != "gdl_ray"
            if known and _part(target) not in ALLOWED[part] | {part}:
                yield f"{module.name} imports {target}"


def imports_have_no_cycle(modules: Modules) -> Iterator[str]:
    """Import nothing that imports the importer, by way of others too."""
    rest = {name: {other for other in module.imports if other in modules} for name, module in modules.items()}
    while free := [name for name, targets in rest.items() if not targets & rest.keys()]:
        for name in free:
            del rest[name]
    if rest:
        yield f"these import each other, or what does: {', '.join(sorted(rest))}"


def packages_stay_in_their_place(modules: Modules) -> Iterator[str]:
    """Import Ray, MLflow and boto3 where they belong, and few packages in the library."""
    for module in modules.values():
        for package in {target.split(".")[0] for target in module.imports} - sys.stdlib_module_names:
            if package in PACKAGES:
                continue
            places = OUTSIDE.get(package, PACKAGES)
            in_place = any(_within(module.name, place) for place in places)
            if not in_place or package not in _packages(module.name, package):
                yield f"{module.name} imports {package}"


def _packages(name: str, package: str) -> set[str]:
    """List what a module may import from outside: any package, unless it belongs to the library."""
    if not _within(name, "gdl_ray"):
        return {package}
    pure = [packages for part, packages in PURE.items() if _within(name, part)]
    return pure[0] if pure else CORE | EXTRA.get(name, set())


def code_is_not_made_from_strings(modules: Modules) -> Iterator[str]:
    """Use no pickle, and nothing that turns a string into code."""
    for module in modules.values():
        for target in module.imports:
            if target.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve"}:
                yield f"{module.name} imports {target}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name) and node.id in {"eval", "exec", "globals", "__import__"}:
                yield f"{module.name}:{node.lineno} uses {node.id}"
            if _last_name(node) == "import_module" or "import_module" in _imported_names(node):
                yield f"{module.name} uses import_module"


def _imported_names(node: ast.AST) -> set[str]:
    return {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()


def _last_name(node: ast.AST) -> str | None:
    """Find `c` in `a.b.c` and in `c`; in `c[T]` too."""
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def classes_are_abstract_or_final(modules: Modules) -> Iterator[str]:
    """Extend, of the project's classes, abstract ones alone."""
    classes = [(module, node) for module in modules.values() for node in _classes(module.tree)]
    concrete = {node.name for _, node in classes if not _is_abstract(node)}
    for module, node in classes:
        if _within(module.name, "gdl_ray.families"):
            for base in concrete & {_last_name(base) for base in node.bases}:
                yield f"{module.name}:{node.lineno} {node.name} extends {base}, which is not abstract"


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def _is_abstract(node: ast.ClassDef) -> bool:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    decorators = {_last_name(decorator) for method in methods for decorator in method.decorator_list}
    return "ABC" in {_last_name(base) for base in node.bases} or "abstractmethod" in decorators


def families_are_named_only_at_home(modules: Modules) -> Iterator[str]:
    """Name a family nowhere outside `families/`, but in the concrete command of the demo."""
    for module in modules.values():
        if not _within(module.name, "gdl_ray.families") and module.name != "infra.demo":
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Constant) and node.value in FAMILIES:
                    yield f"{module.name}:{node.lineno} names {node.value!r}"


def modules_have_a_test_that_mirrors_them(modules: Modules) -> Iterator[str]:
    """Give a module its test file or a line of the table that says why not, never both."""
    for name, module in modules.items():
        if module.mirrored and name in TESTED_ELSEWHERE:
            yield f"{name} has {_mirror(name)}, and a line in the table too"
        if not module.mirrored and name not in TESTED_ELSEWHERE and _defines(module.tree):
            yield f"{name} has no {_mirror(name)}"


def _defines(tree: ast.Module) -> bool:
    return any(isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) for node in tree.body)


RULES: list[Rule] = [
    imports_go_one_way,
    imports_have_no_cycle,
    packages_stay_in_their_place,
    code_is_not_made_from_strings,
    classes_are_abstract_or_final,
    families_are_named_only_at_home,
    modules_have_a_test_that_mirrors_them,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule: Rule) -> None:
    assert list(rule(read(PROJECT))) == []


VIOLATIONS: list[tuple[Rule, str, str]] = [
    (imports_go_one_way, "gdl_ray/nn/net.py", "from gdl_ray.family import Family"),
    (imports_go_one_way, "gdl_ray/random.py", "import gdl_ray.nn"),
    (imports_go_one_way, "gdl_ray/families/gan.py", "from gdl_ray import engine"),
    (imports_go_one_way, "gdl_ray/families/gan.py", "from .. import engine"),
    (imports_go_one_way, "gdl_ray/train/loop.py", "def f():\n    from gdl_ray import registry"),
    (imports_go_one_way, "gdl_ray/engine.py", "import serve.model"),
    (imports_go_one_way, "gdl_ray/registry.py", "from jobs import train"),
    (imports_go_one_way, "infra/local.py", "import gdl_ray.family"),
    (imports_have_no_cycle, "gdl_ray/engine.py", "def f():\n    import gdl_ray.family"),
    (packages_stay_in_their_place, "gdl_ray/train/loop.py", "import ray.train"),
    (packages_stay_in_their_place, "gdl_ray/train/checkpoint.py", "def f():\n    import mlflow"),
    (packages_stay_in_their_place, "jobs/train.py", "from mlflow import MlflowClient"),
    (packages_stay_in_their_place, "serve/operator.py", "import boto3"),
    (packages_stay_in_their_place, "gdl_ray/nn/net.py", "import numpy as np"),
    (packages_stay_in_their_place, "gdl_ray/engine.py", "import pandas"),
    (code_is_not_made_from_strings, "gdl_ray/train/checkpoint.py", "import pickle"),
    (code_is_not_made_from_strings, "gdl_ray/train/checkpoint.py", "eval('1')"),
    (code_is_not_made_from_strings, "serve/model.py", "def f(name):\n    return globals()[name]"),
    (code_is_not_made_from_strings, "jobs/train.py", "from importlib import import_module"),
    (code_is_not_made_from_strings, "jobs/train.py", "import importlib\nimportlib.import_module('x')"),
    (classes_are_abstract_or_final, "gdl_ray/families/gan.py", "class A: ...\nclass B(A): ..."),
    (classes_are_abstract_or_final, "gdl_ray/families/gan.py", "class A(Net[int]): ..."),
    (families_are_named_only_at_home, "gdl_ray/engine.py", f"if name == {min(FAMILIES)!r}: pass"),
    (families_are_named_only_at_home, "serve/model.py", f"build({min(FAMILIES)!r}, config)"),
    (modules_have_a_test_that_mirrors_them, "gdl_ray/nn/net.py", "def f(): ..."),
    (modules_have_a_test_that_mirrors_them, "infra/local.py", "class A: ..."),
    (modules_have_a_test_that_mirrors_them, "serve/replica.py", "class A: ..."),
]

CLEAN = {
    "gdl_ray/__init__.py": "",
    "gdl_ray/family.py": "import gdl_ray.engine\nclass Net: ...",
    "gdl_ray/engine.py": "",
    "gdl_ray/registry.py": "",
    "serve/model.py": "",
    "jobs/train.py": "",
    "tests/serve/test_replica.py": "",
}


@pytest.mark.parametrize(("rule", "file", "source"), VIOLATIONS)
def test_a_violation_is_found(rule: Rule, file: str, source: str, tmp_path: Path) -> None:
    for name, clean in (CLEAN | {file: source}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(clean)
    found = list(rule(read(tmp_path)))
    assert any(_dotted(Path(file)) in line for line in found), found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_harmless_source_breaks_no_rule(rule: Rule, tmp_path: Path) -> None:
    file = tmp_path / "gdl_ray" / "families" / "gan.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import math\nfrom abc import ABC\nimport torch\nfrom gdl_ray.family import Family\n"
        "class A(ABC): ...\nclass B(A, Family): ...\nmodel.eval()\n"
    )
    (tmp_path / "tests" / "families").mkdir(parents=True)
    (tmp_path / "tests" / "families" / "test_gan.py").touch()
    assert list(rule(read(tmp_path))) == []


def test_the_table_of_what_is_tested_elsewhere_is_about_modules_and_tests_that_exist() -> None:
    assert TESTED_ELSEWHERE.keys() <= read(PROJECT).keys()
    named = [re.findall(r"tests/[\w/]+\.py", reason) for reason in TESTED_ELSEWHERE.values()]
    assert all(files and all((PROJECT / file).exists() for file in files) for files in named)
