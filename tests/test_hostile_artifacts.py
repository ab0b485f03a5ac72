"""Artifacts with any field removed, of another type or out of range, and with any byte changed: an answer or one line.

The base is what an older version wrote (tests/golden/pipeline). Fields are changed with ids and checksums made right
again; bytes are changed without. tests/fuzz/fuzz_artifacts.py tries the same through every verb for as long as wanted.
"""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import (
    ARTIFACTS,
    REMOVED,
    RESULTS,
    USES,
    VALUES,
    attempt,
    change_bytes,
    json_files,
    replace,
    reseal,
    spots,
    use_any,
)

from actcache import CorruptError, verify
from analysis import ConceptTable, name_latents, read_names, set_name
from analysis.report.sections import SECTIONS
from analysis.results import Result, finish_result, read_result
from saetrain import CodeStore, Run

GOLDEN = Path(__file__).parent / "golden" / "pipeline"
EACH = 1
"""Of the values that a field may be replaced by, those that one run of the test tries."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "pipeline"))


@contextmanager
def restored(*files: Path) -> Iterator[None]:
    """Put files back afterwards."""
    kept = {file: file.read_bytes() for file in files}
    try:
        yield
    finally:
        for file, data in kept.items():
            file.write_bytes(data)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_any_field_may_hold_anything(golden: Path, name: str) -> None:
    artifact, use, rng, refused = golden / name, USES[name], random.Random(name), 0
    for file in json_files(artifact):
        value = json.loads(file.read_bytes())
        for place in spots(value):
            for new in rng.sample(VALUES, EACH):
                with restored(file, artifact / "manifest.json"):
                    reseal(artifact, file, replace(value, place, new))
                    refused += isinstance(attempt(rng.choice([use_any, use, use, use]), artifact), str)
    assert refused > 20
    assert not isinstance(attempt(use, artifact), str)


@pytest.mark.parametrize(
    ("name", "place", "new", "said"),
    [
        ("a.acts", ("settings", "grid"), "x", r"grid should be tuple\[int, int\], got 'x'"),
        ("a.acts", ("settings", "shard_images"), 24, "multiple of chunk_images"),
        ("a.acts", ("settings", "d_model"), 0, "d_model should be int at least 1, got '0'"),
        ("a.codes", ("settings", "n_tokens"), 11, r"n_tokens must be 1 \+ 3 x 3 \(grid\), got 11"),
        ("a.codes", ("settings", "shard_sizes", 0), 15, "shard_sizes must add up to 48"),
        ("a.codes", ("settings", "dtypes", "latent"), "<f8", "dtypes.latent must be <u2 or <u4"),
        ("a.concepts", ("provenance", "quality", "all", "fvu"), "low", "quality.all.fvu should be float, got 'low'"),
        ("run", ("settings", "sae", "k"), -1, "k"),
        ("run", ("settings", "sae", "k"), 65, r"k must lie in 1\.\.64"),
        ("run", ("settings", "train", "tokens"), "some", "tokens"),
        ("a.prompts", ("settings", "config", "n_prompts"), REMOVED, "config.n_prompts is missing"),
        ("a.concepts", ("settings", "n_top"), None, "n_top should be int, got 'None'"),
    ],
)
def test_the_message_names_file_field_and_what_was_there(
    golden: Path, name: str, place: tuple[Any, ...], new: Any, said: str
) -> None:
    artifact, file = golden / name, golden / name / "artifact.json"
    with restored(file, artifact / "manifest.json"):
        reseal(artifact, file, replace(json.loads(file.read_bytes()), place, new))
        with pytest.raises(CorruptError, match=said) as caught:
            USES[name](artifact)
    assert "settings of this store" in str(caught.value) or str(file) in str(caught.value)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_changed_byte_is_an_error_or_changes_no_answer(golden: Path, name: str) -> None:
    """In every file; and `verify` finds each change of a file that carries a checksum."""
    artifact, use, rng = golden / name, USES[name], random.Random(name)
    right = use(artifact)
    assert isinstance(right, list)
    files = sorted(file for file in artifact.rglob("*") if file.is_file())
    for file in files if len(files) < 60 else rng.sample(files, 60):
        data = file.read_bytes()
        for changed in [change_bytes(data, rng) for _ in range(3)]:
            if changed == data:
                continue
            with restored(file):
                file.write_bytes(changed)
                answer, facts = attempt(use, artifact), attempt(use_any, artifact)
            if "notes" not in file.parts:  # what the older version wrote there has no checksum
                assert isinstance(answer, str) or answer == right, file
                assert isinstance(facts, str) or not facts[1], file
    assert use(artifact) == right


def test_names_and_notes_carry_their_own_checksum(golden: Path) -> None:
    """Nobody loses a name to a flipped bit without a word, and `verify` says which verb writes the file anew."""
    concepts = ConceptTable.open(golden / "a.concepts")
    model = {"model": str(golden / "model/tiny.json"), "pretrained": str(golden / "model/tiny.safetensors")}
    name_latents(concepts, vocabulary=golden / "words.txt", methods=["lens"], **model, device="cpu")
    set_name(concepts, 19, name="stripes of a tiger")
    right, rng = read_names(concepts), random.Random(0)
    for file, verb in ((concepts.path / "notes/names.parquet", "run `patchsae name` again"),
                       (concepts.path / "notes/own.json", "repair it by hand")):  # fmt: skip
        data = file.read_bytes()
        for changed in {change_bytes(data, rng) for _ in range(60)} - {data}:
            with restored(file):
                file.write_bytes(changed)
                answer = attempt(lambda path: [read_names(path)], concepts.path)
                checked = verify(concepts.path)
            if isinstance(answer, str):
                assert [problem.file for problem in checked.problems] == [str(file.relative_to(concepts.path))]
                assert any(verb in remedy for remedy in checked.remedies)
            else:
                assert answer == [right]
    assert verify(concepts.path).ok
    own = json.loads((concepts.path / "notes/own.json").read_text())
    (concepts.path / "notes/own.json").write_text(json.dumps({"19": own["19"], "20": {"name": "by hand"}}))
    assert read_names(concepts)[20] == "by hand"  # a file without a digest may be written by hand


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_with_any_field_replaced_or_byte_changed(golden: Path, tmp_path: Path, name: str) -> None:
    value, rng, file = json.loads((golden / f"{name}.json").read_text()), random.Random(name), tmp_path / "result.json"
    records: list[type[Result]] = list(SECTIONS)
    for place in spots(value):
        for new in rng.sample(VALUES, 3):
            file.write_text(json.dumps(replace(value, place, new)))
            attempt(lambda path: [(result := read_result(path, *records)).tables(), result.lines()], file)
    right = finish_result(file, read_result(golden / f"{name}.json", *records))
    data = file.read_bytes()
    for changed in [change_bytes(data, rng) for _ in range(60)]:
        file.write_bytes(changed)
        answer = attempt(lambda path: [read_result(path, *records)], file)
        assert isinstance(answer, str) or answer == [right]


@pytest.mark.parametrize("last", [b"", b"{", b'{"step": "70"}\n', b"\xff\xfe\n", b"null\n", b"[" * 9999])
def test_lines_of_metrics_that_are_damaged_are_left_out(golden: Path, tmp_path: Path, last: bytes) -> None:
    """While a run is unfinished; the seal of a finished one covers its metrics."""
    from saetrain.run import read_metrics, truncate_metrics

    lines = (golden / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(lines + last)
    assert [line["step"] for line in read_metrics(tmp_path)] == [50, 60]
    truncate_metrics(tmp_path, 55)
    assert [line["step"] for line in read_metrics(tmp_path)] == [50]
    with restored(golden / "run" / "metrics.jsonl"):
        (golden / "run" / "metrics.jsonl").write_bytes(lines.replace(b"loss", b"lo\xffs", 1))
        with pytest.raises(CorruptError, match=r"metrics\.jsonl"):
            Run.open(golden / "run").curves()


@pytest.mark.parametrize("column", ["indptr", "latent", "value", "latent_indptr", "row", "latent_value"])
def test_codes_out_of_range_are_an_error_in_every_reader(golden: Path, column: str) -> None:
    """Checksums made right again, so that only the structure can tell; in codes too large to be checked whole."""
    from damage import sign_shard

    from saetrain.codes.checks import ArrayChecks

    file = golden / "a.codes" / "codes.zarr" / "1" / column / "c" / "0"
    record = golden / "a.codes" / "commits" / "000001.json"
    data = file.read_bytes()
    dtype = CodeStore.open(golden / "a.codes").dtypes[column]
    with restored(file, record, golden / "a.codes" / "manifest.json"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArrayChecks, "check_once", lambda self, shard: None)
        for place in (0, 5, -1):
            for largest in (True, False):
                values = np.frombuffer(data, dtype).copy()
                bits = values.view(f"u{dtype.itemsize}")
                bits[place] = np.iinfo(bits.dtype).max if largest else np.iinfo(bits.dtype).max // 2 + 1
                file.write_bytes(values.tobytes())
                sign_shard(golden / "a.codes", 1)
                message = attempt(USES["a.codes"], golden / "a.codes")
                assert isinstance(message, str), (column, place)
                assert "Shard 1" in message or "do not ascend" in message
