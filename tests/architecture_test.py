"""The layout of `DESIGN.md` section 8, enforced by reading the sources."""

import ast
import collections
import dataclasses
import functools
import graphlib
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]

# Packages and modules of infinite_llm, each layer above those that may import
# it. Those of one layer may import each other, as long as no cycle results.
_LAYERS = (
  (
    "types",
    "errors",
    "rules",
    "cache_config",
    "lending_config",
    "config",
    "sampling_params",
  ),
  ("cache",),
  ("scheduler",),
  ("distributed",),
  ("attention",),
  ("models",),
  ("engine",),
  ("simulator",),
)
_RANK = {name: rank for rank, layer in enumerate(_LAYERS) for name in layer}

# Control plane: it runs in the simulator too, by the hundred.
_WITHOUT_JAX = (
  "infinite_llm.scheduler",
  "infinite_llm.cache.block_entries",
  "infinite_llm.cache.rblock",
  "infinite_llm.cache.block_pool",
  "infinite_llm.cache.block_table",
  "infinite_llm.cache.content_tag",
  "infinite_llm.cache.table_store",
  "infinite_llm.distributed.transport",
  "infinite_llm.simulator",
)
_JAX = ("jax", "jaxlib", "flax", "pallas_kernels")

_COLLECTIVES = frozenset(
  {
    "all_gather",
    "all_to_all",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "psum_scatter",
    "ragged_all_to_all",
  }
)
_INSTANCE_COLLECTIVES = (
  "infinite_llm.attention.decode_exchange",
  "infinite_llm.attention.dist_attention",
  "infinite_llm.cache.movement",
  "infinite_llm.distributed.meeting",  # Before there is anything to attend.
)
_TENSOR_COLLECTIVES = "infinite_llm.models"

# Most lines of a file, by its first folder.
_MOST_LINES = {
  "configs": 400,
  "experiments": 400,
  "infinite_llm": 400,
  "pallas_kernels": 600,
  "tests": 700,
}


@dataclasses.dataclass(frozen=True)
class _Module:
  """One source file.

  Attributes:
    name: Dotted name; a package's is that of its `__init__.py`.
    source: Its text.
  """

  name: str
  source: str

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.source)

  def is_in(self, *names: str) -> bool:
    """Whether this is one of some modules, or inside of one."""
    return any(_is_in(self.name, name) for name in names)

  @functools.cached_property
  def imports(self) -> tuple[str, ...]:
    """Dotted names that it imports, wherever in the file.

    `from a import b` imports `a.b`, which may be a module or not.
    """
    names = []
    for node in ast.walk(self.tree):
      if isinstance(node, ast.Import):
        names += [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        origin = "." * node.level + (node.module or "")
        names += [f"{origin}.{alias.name}" for alias in node.names]
    return tuple(names)


def _is_in(name: str, package: str) -> bool:
  return name == package or name.startswith(package + ".")


def _paths() -> list[pathlib.Path]:
  return sorted(
    path for folder in _MOST_LINES for path in (_ROOT / folder).rglob("*.py")
  )


@functools.cache
def _modules() -> tuple[_Module, ...]:
  modules = []
  for path in _paths():
    parts = path.relative_to(_ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
      parts = parts[:-1]
    modules.append(_Module(".".join(parts), path.read_text("utf-8")))
  return tuple(modules)


def _library() -> list[_Module]:
  return [m for m in _modules() if m.is_in("infinite_llm", "pallas_kernels")]


# The rules: each gives what breaks it, in words.


def _wrong_layers(modules) -> list[str]:
  """Imports of what stands below in the layout."""
  wrong = []
  for module in modules:
    if not module.is_in("infinite_llm") or module.name == "infinite_llm":
      continue  # The package itself offers the library's entry points.
    here = module.name.split(".")[1]
    if here not in _RANK:
      wrong.append(f"{module.name}: {here} has no place in the layout")
      continue
    for name in module.imports:
      if _is_in(name, "infinite_llm"):
        there = name.split(".")[1] if "." in name else ""
        if _RANK.get(there, len(_LAYERS)) > _RANK[here]:
          wrong.append(f"{module.name} imports {name}")
  return wrong


def _forbidden(modules, importers, imported) -> list[str]:
  """Imports of some packages by others that must do without them."""
  return [
    f"{module.name} imports {name}"
    for module in modules
    if module.is_in(*importers)
    for name in module.imports
    if any(_is_in(name, package) for package in imported)
  ]


def _cycle(modules) -> list[str]:
  """Modules that import each other in a circle; none is no circle."""
  names = {module.name for module in modules}
  graph = {}
  for module in modules:
    edges = set()
    for name in module.imports:
      # The module itself, or the one that the name is in.
      for target in (name, name.rpartition(".")[0]):
        if target in names:
          edges.add(target)
          break
    graph[module.name] = edges
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return list(error.args[1])
  return []


def _collectives(module: _Module) -> list[tuple[str, str]]:
  """Collectives that a module calls: name, and source of the call."""
  calls = []
  for node in ast.walk(module.tree):
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func).rpartition(".")[2]
      if name in _COLLECTIVES:
        calls.append((name, ast.unparse(node)))
  return calls


def _misplaced_collectives(modules) -> list[str]:
  """Collectives elsewhere than at the joints, or over the other axis."""
  wrong = []
  for module in modules:
    if not module.is_in("infinite_llm"):
      continue
    for name, call in _collectives(module):
      if module.is_in(*_INSTANCE_COLLECTIVES):
        is_right = re.search("tensor_axis", call.lower()) is None
      else:
        is_right = module.is_in(_TENSOR_COLLECTIVES) and "instance" not in (
          call.lower()
        )
      if not is_right:
        wrong.append(f"{module.name} calls {name}: {call}")
  return wrong


# The sources keep them.


def test_imports_follow_the_layers():
  assert _wrong_layers(_library()) == []


def test_no_module_imports_itself_in_a_circle():
  assert _cycle(_library()) == []


def test_kernels_know_nothing_of_serving():
  assert _forbidden(_library(), ["pallas_kernels"], ["infinite_llm"]) == []


def test_control_plane_does_without_jax():
  assert _forbidden(_library(), _WITHOUT_JAX, _JAX) == []


def test_models_know_nothing_of_rblocks():
  below = ("infinite_llm.attention", "infinite_llm.cache", "pallas_kernels")
  assert _forbidden(_library(), ["infinite_llm.models"], below) == []


def test_flags_and_config_files_stay_at_the_edge():
  edge = ("absl.flags", "absl.app", "ml_collections", "configs", "experiments")
  assert _forbidden(_library(), ["infinite_llm", "pallas_kernels"], edge) == []


def test_collectives_stand_only_at_the_joints():
  assert _misplaced_collectives(_library()) == []


def test_the_library_imports_nothing_of_the_tests():
  everything_else = ["infinite_llm", "pallas_kernels", "experiments", "configs"]
  assert _forbidden(_modules(), everything_else, ["tests"]) == []


def test_imports_are_absolute():
  relative = ""  # Their names start with a dot.
  assert _forbidden(_modules(), _MOST_LINES, [relative]) == []


def test_files_stay_short():
  long = {}
  for path in _paths():
    name = path.relative_to(_ROOT)
    lines = len(path.read_text("utf-8").splitlines())
    if lines > _MOST_LINES[name.parts[0]]:
      long[str(name)] = lines
  assert long == {}


def test_nothing_is_left_to_do():
  mark = re.compile("TODO|FIXME|XXX")
  marked = [m.name for m in _modules() if mark.search(m.source)]
  assert marked == ["tests.architecture_test"]  # For naming them.


def test_no_module_is_a_drawer():
  drawers = {"util", "utils", "helper", "helpers", "misc", "common", "new"}
  names = [module.name for module in _modules()]
  assert [name for name in names if drawers & set(name.split("."))] == []


def test_tests_mirror_the_packages():
  folders = collections.defaultdict(list)
  for path in (_ROOT / "tests").rglob("*_test.py"):
    folder = path.relative_to(_ROOT / "tests").parts[0]
    folders[folder].append(path.name)
  packages = {"infinite_llm": _RANK, "pallas_kernels": ("pallas_kernels",)}
  known = {name for names in packages.values() for name in names}
  known |= {"e2e", "experiments", "multihost", "sm90a"}
  top = {folder for folder in folders if not folder.endswith("_test.py")}
  assert top - known == set()


# The rules bite.


@pytest.mark.parametrize(
  ("name", "source"),
  [
    ("cache.rblock", "import infinite_llm.scheduler.request"),
    ("cache.rblock", "from infinite_llm import scheduler"),
    ("scheduler.request", "from infinite_llm.engine.llm import LLM"),
    ("types", "def f():\n  from infinite_llm.cache import rblock"),
    ("models.layers", "import infinite_llm"),
    ("surprise", "import infinite_llm.types"),
  ],
)
def test_layers_rule_finds(name, source):
  assert _wrong_layers([_Module(f"infinite_llm.{name}", source)])


def test_cycle_rule_finds():
  modules = [
    _Module("a.x", "from a import y"),
    _Module("a.y", "def f():\n  from a.z import g"),
    _Module("a.z", "import a.x"),
  ]
  assert _cycle(modules)
  assert not _cycle(modules[:2])


@pytest.mark.parametrize(
  "source", ["import jax", "import jax.numpy as jnp", "from flax import nnx"]
)
def test_forbidden_rule_finds(source):
  module = _Module("infinite_llm.scheduler.request", source)
  assert _forbidden([module], _WITHOUT_JAX, _JAX)
  assert not _forbidden([module], ["infinite_llm.engine"], _JAX)


@pytest.mark.parametrize(
  ("name", "source", "is_wrong"),
  [
    ("engine.programs", "jax.lax.psum(x, 'tensor')", True),
    ("models.layers", "lax.all_gather(x, INSTANCE_AXIS)", True),
    ("models.layers", "jax.lax.psum(x, self.tensor_axis)", False),
    ("cache.movement", "all_to_all(x, TENSOR_AXIS, 0, 0)", True),
    ("cache.movement", "jax.lax.all_to_all(x, INSTANCE_AXIS, 0, 0)", False),
    ("cache.kv_pool", "jax.lax.psum(x, 'instance')", True),
  ],
)
def test_collectives_rule_finds(name, source, is_wrong):
  module = _Module(f"infinite_llm.{name}", source)
  assert bool(_misplaced_collectives([module])) == is_wrong
