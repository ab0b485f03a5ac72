"""Parents, models and images are found after a move, whoever moved; and nothing is fetched because a file says so."""

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from damage import reseal
from typer.testing import CliRunner, Result

import cli
from actcache import ArtifactNotFoundError, PipelineError, SettingsError, describe, extract
from actcache.store import find_image_source, find_origin
from analysis import AnalyzeConfig, analyze, find_images
from analysis.lineage import open_parents
from saetrain import CodeStore, Run, SAEConfig, TrainConfig, encode, train

SMALL = TrainConfig(n_steps=20, batch_size=64, lr=3e-3)


def ask(command: str) -> Result:
    return CliRunner().invoke(cli.app, ["--quiet", "--json", *command.split()])


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: dict[str, str], make_images: Callable[..., Path]
) -> Path:
    """A folder with images/, model/, s.acts, run, x.codes, made with absolute paths."""
    folder = tmp_path_factory.mktemp("made")
    make_images(folder / "images", 40)
    (folder / "model").mkdir()
    model = {name: shutil.copy(path, folder / "model") for name, path in tiny_model.items()}
    extract(folder / "images", folder / "s.acts", **model, layers=[2], shard_images=16, precision="float32")
    train(folder / "s.acts", folder / "run", sae=SAEConfig(n_latents=32, k=4), config=SMALL)
    encode(folder / "run", folder / "s.acts", folder / "x.codes")
    return folder


def check_everything_is_there(codes: Path) -> None:
    opened = CodeStore.open(codes)
    store = open_parents(opened)
    artifact = store.stores[0].artifact
    assert Path(find_origin(artifact, "model")).exists()
    assert Path(find_origin(artifact, "pretrained")).exists()
    assert Path(find_image_source(artifact)).is_dir()
    assert find_images(opened).all_there()
    for path in (codes, artifact.path):
        parents = describe(path)["parents"]
        assert isinstance(parents, dict)
        assert parents
        assert all(parent["state"].startswith("there") for parent in parents.values()), parents


MOVES: dict[str, Callable[[Path, Path], Path]] = {
    "nothing": lambda old, new: old / "x.codes",
    "all of it": lambda old, new: Path(shutil.move(old, new)) / "x.codes",
    "codes alone": lambda old, new: Path(shutil.move(old / "x.codes", new / "deep" / "x.codes")),
    "codes and store": lambda old, new: (
        [shutil.move(old / name, new / name) for name in ("s.acts", "x.codes")] and new / "x.codes"
    ),
    "a copy of the codes": lambda old, new: Path(shutil.copytree(old / "x.codes", new / "elsewhere" / "y.codes")),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_it_was_made_from_is_found(tmp_path: Path, made: Path, move: str) -> None:
    """Made in one place with absolute paths, moved in part or as a whole, opened again."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(made, old)
    (new / "deep").mkdir(parents=True)
    remember(old, made)
    if move == "all of it":
        new = new / "all"
    codes = MOVES[move](old, new)
    if move == "all of it":
        assert not old.exists()
    check_everything_is_there(codes)


def remember(folder: Path, original: Path) -> None:
    """Make a copied folder look as if its artifacts had been made there."""
    from actcache.artifacts import digest

    for file in folder.glob("*/places.json"):
        fields = json.loads(file.read_text().replace(str(original), str(folder)))
        fields.pop("digest")
        file.write_text(json.dumps({**fields, "digest": digest(fields)}))


def test_absolute_paths_enter_neither_identity_nor_seal(tmp_path: Path, made: Path) -> None:
    for artifact in ("s.acts", "run", "x.codes"):
        for name in ("artifact.json", "manifest.json"):
            assert str(made) not in (made / artifact / name).read_text()
        assert str(made) in (made / artifact / "places.json").read_text()
    copy = shutil.copytree(made, tmp_path / "copy")
    for artifact in ("s.acts", "run", "x.codes"):
        (copy / artifact / "places.json").unlink()
        assert json.loads(ask(f"verify {copy / artifact}").stdout)["ok"]
    check_everything_is_there(copy / "x.codes")


def test_another_folder_of_the_same_name_is_not_taken_for_the_images(tmp_path: Path, made: Path) -> None:
    codes = Path(shutil.copytree(made / "x.codes", tmp_path / "there" / "x.codes"))
    (tmp_path / "there" / "images" / "holiday").mkdir(parents=True)
    (tmp_path / "there" / "images" / "holiday" / "1.png").write_bytes(b"x")
    assert find_images(CodeStore.open(codes)).folders == (made / "images",)


def test_a_folder_that_holds_the_parent_may_be_named(tmp_path: Path, made: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    for artifact in ("s.acts", "x.codes"):
        (copy / artifact / "places.json").unlink()
    (tmp_path / "stores").mkdir()
    shutil.move(copy / "s.acts", tmp_path / "stores" / "s.acts")
    codes = CodeStore.open(copy / "x.codes")
    with pytest.raises(ArtifactNotFoundError, match="name its new path with --store"):
        open_parents(codes, has_flag=True)
    with pytest.raises(ArtifactNotFoundError, match=r"made from it; move it back\.$"):
        open_parents(codes)
    for given in (tmp_path / "stores", tmp_path / "stores" / "s.acts"):
        assert open_parents(codes, given).path == tmp_path / "stores" / "s.acts"


def test_the_hint_about_missing_images_leads_to_the_pictures(tmp_path: Path, made: Path) -> None:
    """Without images and run first; then, as the output advises, with --images and --run. Notes stay."""
    codes = Path(shutil.copytree(made / "x.codes", tmp_path / "x.codes"))
    (codes / "places.json").unlink()
    config = AnalyzeConfig(n_gallery=4)
    table = analyze(codes, tmp_path / "x.concepts", config=config)
    assert {"pictures", "nearest"} <= table.left_out.keys()
    done = ask(f"name {tmp_path / 'x.concepts'} --set 3=mine")
    assert done.exit_code == 0, done.output
    notes = (tmp_path / "x.concepts" / "notes" / "own.json").read_bytes()
    more = f"--images {made / 'images'} --run {made / 'run'} --n-gallery 4"
    done = ask(f"analyze {codes} {tmp_path / 'x.concepts'} {more}")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["left_out"] == {}
    assert (tmp_path / "x.concepts" / "notes" / "own.json").read_bytes() == notes
    assert list((tmp_path / "x.concepts" / "gallery").glob("*.jpg"))
    with pytest.raises(SettingsError, match="other settings"):  # less than is there, or something else, is refused
        analyze(codes, tmp_path / "x.concepts", config=config)
    with pytest.raises(SettingsError, match="n_top"):
        analyze(codes, tmp_path / "x.concepts", config=AnalyzeConfig(n_gallery=4, n_top=3), images=made / "images")


# ---------------------------------------------------------------------------------------------------------------------
# Other hosts


@pytest.fixture
def host() -> Iterator[tuple[str, list[str]]]:
    """A web server on this machine, and the requests and connections that it has received."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            requests.append("connection")
            super().handle_one_request()

        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


URLS = [
    "http://{}/x",
    "simplecache::http://{}/x",
    "filecache::http://{}/x",
    "https://{}/x",
    "s3://bucket/x",
    "hf-hub:{}/x",
]


@pytest.mark.parametrize("url", URLS)
def test_no_host_is_called_because_a_file_names_it(
    tmp_path: Path, made: Path, host: tuple[str, list[str]], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, requests = host
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    monkeypatch.setenv("HF_ENDPOINT", f"http://{address}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_connection(tuple(address.split(":"))):  # type: ignore[arg-type]
        pass  # the server does see who calls
    where = url.format(address)
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    table = analyze(folder / "x.codes", folder / "x.concepts", config=AnalyzeConfig(n_gallery=2))
    assert table.artifact.complete
    for artifact in ("s.acts", "run", "x.codes", "x.concepts"):
        (folder / artifact / "places.json").unlink()
        file = folder / artifact / "artifact.json"
        value = json.loads(file.read_text())
        for parent in value["parents"].values():
            parent["path"] = where
        for name in value["provenance"].get("paths", {}):
            value["provenance"]["paths"][name] = where
        reseal(folder / artifact, file, value)
    while not requests:
        pass
    requests.clear()
    commands = [
        *(f"info {folder / name}" for name in ("s.acts", "run", "x.codes", "x.concepts")),
        f"analyze {folder / 'x.codes'} {folder / 'y.concepts'} --n-gallery 2",
        f"analyze {folder / 'x.codes'} {folder / 'z.concepts'} --embeddings clip",
        f"query {folder / 'x.codes'} --latent 3 --sheet {folder / 'sheet.png'}",
        f"name {folder / 'x.concepts'}",
        f"name {folder / 'x.concepts'} --codes {folder / 'x.codes'} --run {folder / 'run'} --store {folder / 's.acts'}",
        f"report {folder / 'x.concepts'} {folder / 'page.html'}",
        f"localize {folder / 'x.codes'}",
        f"evaluate {folder / 'run'} {folder / 's.acts'}",
        f"verify {folder / 's.acts'}",
        f"compare {folder / 'x.concepts'} {folder / 'x.concepts'} {folder / 'c.json'}",
    ]
    for command in commands:
        done = ask(command)
        assert done.exit_code in (0, 1), (command, done.output, done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit | PipelineError), command
        assert requests == [], command
    (folder / "s.acts" / "images.parquet").write_bytes(b"")
    assert ask(f"verify {folder / 's.acts'} --repair").exit_code == 1
    assert requests == []


def test_a_url_that_the_user_names_is_read(made: Path, host: tuple[str, list[str]]) -> None:
    address, requests = host
    done = ask(f"info http://{address}/s.acts")
    assert done.exit_code == 1
    assert any(request.startswith("/s.acts") for request in requests)


def test_run_is_opened(made: Path) -> None:
    assert Run.open(made / "run").d_model == 32
