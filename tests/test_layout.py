"""Rules of the package's layout that a reader can rely on."""

import ast
import functools
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "traj_merge_callback"
FILES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
DOORS = {"lightning.__init__", "offline.__init__", "transformers.__init__"}
COLLECTIVES = {
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "barrier",
    "gather",
}
COLLECTIVES |= {"all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single", "send"}
COLLECTIVES |= {"recv", "scatter", "reduce", "all_to_all", "new_group", "monitored_barrier", "scatter_object_list"}
WRITES = {
    "write_text",
    "write_bytes",
    "mkdir",
    "makedirs",
    "unlink",
    "rmtree",
    "rmdir",
    "rename",
    "symlink_to",
    "touch",
}
WRITES |= {"save_file", "save_pretrained", "memmap", "copy2", "copyfile", "copytree", "truncate", "move", "fsync"}


@functools.cache
def tree(module):
    return ast.parse(FILES[module].read_text())


def called(module):
    """Dotted names of everything that is called in a module."""
    return [ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]


@functools.cache
def imports(module):
    """The modules of the package that a module imports, at the top or in functions, and other packages' names."""
    ours, others = set(), set()
    folder = module.split(".")[:-1]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            others.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            for name in [[alias.name] for alias in node.names] + [[]]:
                found = ".".join([*base, *name])
                ours |= {found} & FILES.keys() | ({f"{found}.__init__"} & FILES.keys() if not name else set())
    return ours - {module}, others


def room(name):
    return [module for module in FILES if module.startswith(f"{name}.")]


def test_folders_and_files_are_small():
    for folder in {path.parent for path in FILES.values()}:
        names = [path.name for path in folder.iterdir() if path.name != "__pycache__"]
        assert len(names) <= 15, (folder, names)
    assert max(len(path.read_text().splitlines()) for path in FILES.values()) <= 500


def test_imports_have_no_circle_and_at_most_ten_levels():
    levels = {}

    def level(module, above):
        assert module not in above, f"circle: {' > '.join([*above, module])}"
        if module not in levels:
            below = [level(other, [*above, module]) for other in imports(module)[0]]
            # A package's __init__ that only passes names on is a door, not a level.
            levels[module] = max(below, default=0) + (module not in DOORS)
        return levels[module]

    assert max(level(module, []) for module in FILES) <= 10, sorted(levels.items(), key=lambda item: item[1])


def test_search_imports_no_torch():
    seen, waiting = set(), set(room("search"))
    while waiting:
        module = waiting.pop()
        seen.add(module)
        ours, others = imports(module)
        assert not [
            name for name in others if name.split(".")[0] in ("torch", "safetensors", "lightning", "transformers")
        ]
        waiting |= ours - seen


def test_only_distributed_calls_collectives():
    for module in FILES.keys() - {"distributed"}:
        for name in called(module):
            owner, _, function = name.rpartition(".")
            assert function not in COLLECTIVES or owner.split(".")[-1] not in ("dist", "distributed"), (module, name)


def test_only_disk_writes_files():
    for module in FILES.keys() - set(room("disk")):
        for name in called(module):
            assert name.rpartition(".")[2] not in WRITES, (module, name)
            assert name not in ("torch.save", "os.replace", "os.remove", "np.save"), (module, name)
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "open":
                modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                assert not [mode for mode in modes if set(str(mode)) & set("wax+")], module


def test_adapters_are_thin():
    for module in room("lightning") + room("transformers"):
        assert len(FILES[module].read_text().splitlines()) < 300
        # Types, and no arithmetic.
        nodes = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ImportFrom)]
        names = {alias.name for node in nodes if str(node.module).split(".")[0] == "torch" for alias in node.names}
        assert names <= {"Tensor", "nn", "Optimizer"}
        assert "import torch\n" not in FILES[module].read_text()
