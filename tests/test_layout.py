"""The shape of the house: import layers, length of files and functions, what lies at the top level."""

import ast
import io
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modip_sb3"
FILES = sorted(PACKAGE.rglob("*.py"))

BLOCKS = {"networks", "checks", "storage"}
PARTS = {"denoisers", "schedulers", "diffusion", "world_model", "critics", "planner", "buffers", "datasets"}
PARTS |= {"env_state"}
ON_THE_PARTS = {"acting", "diffusion_policy", "policies", "offline", "weights", "base", "modip", "baselines", "envs"}
ON_THE_PARTS |= {"checkpoint", "faults", "mixing", "pretrained", "resume", "rollouts", "trial"}
ON_TOP = {"evaluation", "benchmark", "zoo", "video", "__init__"}
TOP_LEVEL = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt"}
TOP_LEVEL |= {"modip_sb3", "examples", "tests", "zoo_configs"}

per_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def allowed_imports(room: str) -> set[str]:
    """What a module or subpackage directly under modip_sb3 may import from the package, besides itself."""
    if room in BLOCKS:
        return set()
    if room in PARTS:
        return BLOCKS | {"diffusion": {"denoisers", "schedulers"}}.get(room, set())
    if room in ON_THE_PARTS:
        return BLOCKS | PARTS | ON_THE_PARTS - {"modip": {"baselines"}, "baselines": {"modip"}}.get(room, set())
    return BLOCKS | PARTS | ON_THE_PARTS | ON_TOP


def imported_rooms(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parts[:-1]
    rooms = {p.stem for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"}
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        for _, *rest in (name.split(".") for name in names if name.split(".")[0] == "modip_sb3"):
            yield rest[0] if rest and rest[0] in rooms else "__init__"


@per_file
def test_imports_go_down(path: Path) -> None:
    room = Path(path.relative_to(PACKAGE).parts[0]).stem
    assert room in BLOCKS | PARTS | ON_THE_PARTS | ON_TOP, f"{room} has no layer: give it one in the design and here"
    wrong = set(imported_rooms(path)) - allowed_imports(room) - {room}
    assert not wrong, f"{room} imports {sorted(wrong)}"


def code_lines(source: str) -> set[int]:
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {n for t in tokens if t.type not in layout for n in range(t.start[0], t.end[0] + 1)}


@per_file
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400, "a file above 400 lines is two files"
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body  # the signature is not counted
            length = sum(n in lines for n in range(body[0].lineno, (body[-1].end_lineno or 0) + 1)) if body else 0
            longest = 60 if node.name in ("train", "__init__") else 40  # a constructor keeps every argument
            assert length <= longest, f"{node.name} has {length} lines of code"


@per_file
def test_library_does_not_print(path: Path) -> None:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def test_top_level_holds_nothing_else() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    found = {line.strip('"').split("/")[0] for line in listing.splitlines()}
    assert not {name for name in found - TOP_LEVEL if not name.startswith(".")}
