"""Files are written in one place, and artifacts are begun under a lock: the source says so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(file for name in ("actcache", "saetrain", "analysis") for file in sorted((ROOT / name).rglob("*.py"))),
    ROOT / "cli.py",
]

MAY_WRITE = {
    "actcache/artifacts/files.py": "it is the one place",
    "actcache/artifacts/locks.py": "the lock's file is never renamed: a lock belongs to the file itself",
    "actcache/store/writer.py": "a shard goes to an object store by way of a file in the system's temporary folder",
    "actcache/compiler.py": "a lock beside machine code, which can be made again; on NFS a folder cannot be locked",
    "actcache/demo/training.py": "it trains the demo's model, which ships with the package; no verb calls it",
}
WRITERS = {
    "write_bytes", "write_text", "touch", "save_file", "savez", "savefig", "tofile", "to_parquet", "to_csv", "mkstemp",
    "NamedTemporaryFile", "copyfile", "copy", "copytree", "move", "symlink_to", "hardlink_to", "write_csv",
}  # fmt: skip
TO_MEMORY = {"sink", "buffer", "file"}
"""Names of buffers, and of a file that `open_atomic` has opened."""


def calls(file: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield node


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def owner_of(call: ast.Call) -> str:
    return ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""


def is_memory(call: ast.Call, position: int) -> bool:
    return len(call.args) > position and ast.unparse(call.args[position]) in TO_MEMORY


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file other than through files.py."""
    name, owner = name_of(call), owner_of(call)
    if name == "open":
        words = [arg.value for arg in [*call.args, *(k.value for k in call.keywords)] if isinstance(arg, ast.Constant)]
        flags = " ".join(ast.unparse(arg) for arg in call.args) if owner == "os" else ""
        modes = [word for word in words if isinstance(word, str) and set(word) <= set("rwaxbt+U") and word]
        return any(set(mode) & set("wax+") for mode in modes) or any(
            flag in flags for flag in ("O_CREAT", "O_WRONLY", "O_RDWR")
        )
    if name == "write_table" and owner == "writer":  # a ParquetWriter, whose file is looked at where it is made
        return False
    if name in ("write_table", "write_csv", "ParquetWriter", "write_feather"):
        return not is_memory(call, 0 if name == "ParquetWriter" else 1)
    if name == "save" and owner in ("np", "numpy", "torch"):
        return not is_memory(call, 1 if owner == "torch" else 0)
    if name == "save":  # of a picture; safetensors' save returns bytes
        return bool(owner) and not is_memory(call, 0)
    if name == "copy":
        return owner == "shutil"
    if name in ("replace", "rename", "link"):
        return owner == "os"
    if name in ("create_group", "open_group", "create_array") and owner == "zarr":
        return not ast.unparse(call.args[0]).startswith(("files", "{}")) and "mode='r'" not in ast.unparse(call)
    return name in WRITERS


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_one_module_opens_files_for_writing(file: Path) -> None:
    found = [f"line {call.lineno}: {ast.unparse(call)[:80]}" for call in calls(file) if writes(call)]
    assert not found or str(file.relative_to(ROOT)) in MAY_WRITE, found


def test_the_exceptions_are_needed() -> None:
    assert [name for name in MAY_WRITE if not any(writes(call) for call in calls(ROOT / name))] == []


def test_every_artifact_is_begun_under_a_lock() -> None:
    begun = [
        (str(file.relative_to(ROOT)), {keyword.arg for keyword in call.keywords})
        for file in SOURCES
        for call in calls(file)
        if name_of(call) in ("begin_artifact", "begin_store")
    ]
    assert len(begun) >= 7
    assert [file for file, keywords in begun if "lock" not in keywords] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("open(p, 'w')", True), ("open(p, mode='ab')", True), ("open(p)", False), ("p.open('wb')", True),
        ("open(p, 'rb')", False), ("p.write_text('x')", True), ("np.save(p, x)", True), ("np.save(file, x)", False),
        ("torch.save(x, p)", True), ("torch.save(x, buffer)", False), ("pq.write_table(t, p)", True),
        ("pq.write_table(t, sink)", False), ("os.open(p, os.O_WRONLY | os.O_CREAT)", True), ("os.replace(a, b)", True),
        ("text.replace(a, b)", False), ("picture.save(p, format='PNG')", True), ("save(tensors)", False),
        ("zarr.create_group(folder)", True), ("zarr.create_group(files)", False), ("shutil.copyfile(a, b)", True),
    ],
)  # fmt: skip
def test_what_counts_as_writing(text: str, expected: bool) -> None:
    (call,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert writes(call) is expected
