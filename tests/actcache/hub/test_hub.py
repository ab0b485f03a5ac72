"""The hub's room with the real client, in processes of their own, against a server on loopback."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Handler, HubServer, run_client

FILES = {
    "a/config.json": b'{"k": 5}',
    "a/sae.pt": bytes(range(256)) * 6000,
    "a/optimizer.pt": b"x" * 99,
    "README.md": b"#",
}
FETCH = """
listing = list_files(parse_address(sys.argv[1]))
seen = []
files = fetch_files(listing, ["config.json", "sae.pt"], on_progress=lambda *at: seen.append(at))
answer = {"names": [each.name for each in listing.files], "sizes": listing.sizes(), "commit": files.commit,
          "sha256": files.files, "content": {name: len((files.folder / name).read_bytes()) for name in files.files},
          "seen": seen, "address": str(files.address)}
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.put("lab/sae", FILES)
        yield server


def one_line(refused: list[str], kind: str, *words: str) -> None:
    assert refused[0] == kind, refused
    assert "\n" not in refused[1]
    assert len(refused[1]) < 420, refused[1]
    for word in words:
        assert word in refused[1], refused[1]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_named_files_are_fetched_once_and_a_commit_needs_no_call(server: HubServer, tmp_path: Path) -> None:
    commit = server.commit_of("lab/sae", "main")
    first = run_client(server, tmp_path, FETCH, "hf://lab/sae/a")
    assert first["names"] == ["config.json", "optimizer.pt", "sae.pt"]
    assert first["commit"] == commit
    assert first["address"] == f"hf://lab/sae/a@{commit}"
    assert first["sha256"] == {n: hashlib.sha256(FILES[f"a/{n}"]).hexdigest() for n in ("config.json", "sae.pt")}
    total = sum(len(FILES[f"a/{name}"]) for name in ("config.json", "sae.pt"))
    assert first["seen"][0] == [0, total]
    assert first["seen"][-1] == [total, total]
    assert first["seen"] == sorted(first["seen"])
    assert not [request for request in server.requests if "optimizer" in request or "README" in request]
    assert [r for r in server.requests if "/resolve/" in r and commit not in r] == []  # all by commit
    assert len([request for request in server.requests if "/revision/main" in request]) == 1

    server.requests.clear()
    pinned = run_client(server, tmp_path, FETCH, f"hf://lab/sae/a@{commit}")
    assert server.requests == []
    assert pinned == first | {"seen": []}

    server.put("lab/sae", {"a/config.json": b'{"k": 6}'})  # the branch goes on; the commit does not
    moved = run_client(server, tmp_path, FETCH, "hf://lab/sae/a")
    assert moved["content"]["config.json"] == 8
    assert moved["sha256"]["config.json"] != first["sha256"]["config.json"]
    assert moved["sha256"]["sae.pt"] == first["sha256"]["sae.pt"]
    assert not [request for request in server.requests if request.startswith("GET") and "sae.pt" in request]
    server.requests.clear()
    assert run_client(server, tmp_path, FETCH, f"hf://lab/sae/a@{commit}") == pinned
    assert server.requests == []


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "closed port"])
def test_without_the_hub_the_cache_is_used_and_half_of_it_is_one_line(
    server: HubServer, tmp_path: Path, way: str
) -> None:
    first = run_client(server, tmp_path, FETCH, "hf://lab/sae/a")
    variables = {"HF_HUB_OFFLINE": "1"} if way == "HF_HUB_OFFLINE" else {}
    server.requests.clear()
    code = (
        FETCH
        + """
address = parse_address("hf://lab/sae")
answer["half"] = refusal(fetch_files, parse_address("hf://lab/sae/a"), ["config.json", "optimizer.pt"])
answer["pinned half"] = refusal(fetch_files, files.address, ["optimizer.pt"])
answer["other"] = refusal(list_files, parse_address("hf://lab/other"))
answer["other commit"] = refusal(list_files, replace(address, revision="0" * 40))
"""
    )
    again = run_client(None, tmp_path, code, "hf://lab/sae/a", **variables)
    assert server.requests == []
    assert {name: again[name] for name in first} == first | {"seen": []}
    word = "HF_HUB_OFFLINE" if variables else "could not be reached"
    for name in ("half", "pinned half", "other", "other commit"):
        one_line(again[name], "HubError", word, "hf://lab/")
    assert "optimizer.pt" in again["half"][1]
    told = run_client(None, tmp_path, FETCH, "hf://lab/sae/a", **variables, stderr="1")
    assert (first["commit"] in told) == (not variables)  # who asks to be offline knows it


def test_what_others_put_into_the_cache_is_used(server: HubServer, tmp_path: Path) -> None:
    code = """
import huggingface_hub
huggingface_hub.hf_hub_download("lab/sae", "a/config.json")
huggingface_hub.hf_hub_download("lab/sae", "a/sae.pt")
answer = None
"""
    run_client(server, tmp_path, code)
    answer = run_client(server, tmp_path, FETCH, "hf://lab/sae/a", HF_HUB_OFFLINE="1")
    assert answer["names"] == ["config.json", "sae.pt"]
    assert answer["commit"] == server.commit_of("lab/sae", "main")


def test_a_repository_of_data_a_tag_and_a_file_are_read(server: HubServer, tmp_path: Path) -> None:
    server.put("datasets/lab/many", {"x/sae.pt": b"data", "x/config.yaml": b"k: 1"}, branch="v1")
    answer = run_client(server, tmp_path, """
listing = list_files(parse_address("hf://datasets/lab/many/x/sae.pt@v1"))
files = fetch_files(listing, [listing.named, "config.yaml"])
plain = copy_files(files)
answer = [listing.named, str(listing.address), (files.folder / "sae.pt").read_bytes().decode(),
          (files.folder / "sae.pt").is_symlink(), (plain / "sae.pt").is_symlink(), (plain / "sae.pt").read_text(),
          plain == copy_files(files)]
""")  # fmt: skip
    commit = server.commit_of("datasets/lab/many", "v1")
    assert answer == ["sae.pt", f"hf://datasets/lab/many/x@{commit}", "data", True, False, "data", True]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_every_refusal_of_the_server_is_one_line(server: HubServer, tmp_path: Path) -> None:
    server.closed = {
        "lab/private": (401, "", "Invalid username or password."),
        "lab/gone": (403, "", "Access to this resource is disabled."),
        "lab/gated": (403, "GatedRepo", "Access to model lab/gated is restricted"),
        "lab/hidden": (401, "RepoNotFound", "Repository not found"),
        "lab/busy": (429, "", "Too many requests"),
        "lab/broken": (503, "", "Service unavailable"),
        "lab/forbidden": (403, "", "Your token may not"),
    }
    server.special = [(r"lab/login", Handler.page)]
    texts = [f"hf://lab/{name}" for name in (*[key.partition("/")[2] for key in server.closed], "absent", "login")]
    texts += ["hf://lab/sae@v9", "hf://lab/sae@" + "0" * 40, "hf://lab/sae/b", "hf://lab/sae/a/none.pt"]
    code = "answer = {text: refusal(list_files, parse_address(text)) for text in json.loads(sys.argv[1])}"
    answer = run_client(server, tmp_path, code, json.dumps(texts))
    one_line(answer["hf://lab/private"], "HubError", "hf://lab/private", "token")
    one_line(answer["hf://lab/gone"], "HubError", "disabled")
    one_line(answer["hf://lab/gated"], "HubError", "hf://lab/gated is gated", "Ask for access", "hf auth login")
    for name in ("absent", "hidden"):
        one_line(
            answer[f"hf://lab/{name}"], "HubError", f"hf://lab/{name} does not exist, or it is private", "HF_TOKEN"
        )
    one_line(answer["hf://lab/busy"], "HubError", "429", "Wait")
    one_line(answer["hf://lab/broken"], "HubError", "503", "later")
    one_line(answer["hf://lab/forbidden"], "HubError", "403", "token")
    one_line(answer["hf://lab/login"], "CorruptError", "login page", server.url)
    one_line(answer["hf://lab/sae@v9"], "HubError", "hf://lab/sae has no revision v9")
    one_line(answer["hf://lab/sae@" + "0" * 40], "HubError", "no revision 000")
    one_line(answer["hf://lab/sae/b"], "HubError", "hf://lab/sae/b holds no files", "folders a.")
    one_line(answer["hf://lab/sae/a/none.pt"], "HubError", "none.pt holds no files")


def cut(handler: Handler) -> None:
    """Half of a file, and then the end of the connection, whatever part was asked for."""
    data = FILES["a/sae.pt"]
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def tamper(handler: Handler) -> None:
    handler.send(b"\xff" + FILES["a/sae.pt"][1:])


def flood(handler: Handler) -> None:
    """A file that does not end."""
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    piece = b"x" * (1 << 20)
    with contextlib.suppress(OSError):  # when the client has had enough
        while True:
            handler.wfile.write(piece)


FAULTS: dict[str, tuple[Callable[[Handler], None], str]] = {
    "cut": (cut, "cut off before its end, and nothing of it is kept"),
    "endless": (flood, "cut off"),
    "page": (Handler.page, "cut off"),
    "tampered": (tamper, "differs from what the hub lists"),
}


def test_what_is_not_the_file_is_refused_and_nothing_of_it_is_kept(server: HubServer, tmp_path: Path) -> None:
    server.special = [(rf"GET .*{name}/resolve/.*sae\.pt", fault) for name, (fault, _) in FAULTS.items()]
    for name in FAULTS:
        server.put(f"lab/{name}", FILES)
    code = """
answer = {name: refusal(fetch_files, parse_address(f"hf://lab/{name}/a"), ["sae.pt"]) for name in sys.argv[1:]}
"""
    answer = run_client(server, tmp_path, code, *FAULTS)
    for name, (_, words) in FAULTS.items():
        one_line(answer[name], "CorruptError", f"hf://lab/{name}/a", "sae.pt", words)
    assert [file for file in (tmp_path / "hub").rglob("*") if file.is_file() and file.stat().st_size > 1000] == []
    server.special = []
    assert run_client(server, tmp_path, FETCH, "hf://lab/tampered/a")["content"]["sae.pt"] == len(FILES["a/sae.pt"])


def test_a_download_that_is_cut_once_goes_on(server: HubServer, tmp_path: Path) -> None:
    def cut_once(handler: Handler) -> None:
        server.special = []
        cut(handler)

    server.special = [(r"GET .*sae\.pt", cut_once)]
    answer = run_client(server, tmp_path, FETCH, "hf://lab/sae/a")
    assert answer["sha256"]["sae.pt"] == hashlib.sha256(FILES["a/sae.pt"]).hexdigest()


def test_a_page_instead_of_what_is_known_of_a_file_and_another_commit_are_refused(
    server: HubServer, tmp_path: Path
) -> None:
    code = 'answer = [refusal(fetch_files, parse_address("hf://lab/sae/a"), [name]) for name in sys.argv[1:]]'
    server.special = [
        (r"HEAD .*sae\.pt", Handler.page),
        (r"/resolve/.*config\.json", lambda handler: handler.send(b"123", ETag='"x"', X_Repo_Commit="1" * 40)),
    ]
    page, commit = run_client(server, tmp_path, code, "sae.pt", "config.json")
    one_line(page, "CorruptError", "sae.pt", "login page")
    one_line(commit, "CorruptError", "config.json", "the hub gave another commit, which is not used")
    assert not [request for request in server.requests if request.startswith("GET") and "sae.pt" in request]


def test_a_redirect_to_another_host_gets_no_token_and_is_checked(server: HubServer, tmp_path: Path) -> None:
    data = FILES["a/sae.pt"]
    with HubServer() as other:
        other.special = [(r"/bucket/sae\.pt", lambda h: h.send(data)), (r"/login", Handler.page)]

        elsewhere = other.url.replace("127.0.0.1", "localhost")  # another port of one host is not yet another host
        commit, sha256 = server.commit_of("lab/sae", "main"), hashlib.sha256(data).hexdigest()

        def redirect(handler: Handler) -> None:
            handler.send(
                b"", 302, Location=f"{elsewhere}/bucket/sae.pt", X_Linked_Size=str(len(data)),
                X_Linked_Etag=f'"{sha256}"', X_Repo_Commit=commit,
            )  # fmt: skip

        server.special = [(r"/resolve/.*sae\.pt", redirect)]
        answer = run_client(server, tmp_path / "1", FETCH, "hf://lab/sae/a", HF_TOKEN="hf_secret")
        assert answer["sha256"]["sae.pt"] == sha256
        assert "Bearer hf_secret" in server.tokens
        assert other.requests == ["GET /bucket/sae.pt"]
        assert other.tokens == [None]

        code = 'answer = refusal(fetch_files, parse_address("hf://lab/sae/a"), ["sae.pt"])'
        other.special.insert(0, (r"/bucket/sae\.pt", lambda h: h.send(bytes(len(data)))))
        one_line(run_client(server, tmp_path / "2", code), "CorruptError", "differs from what the hub lists")
        server.special = [(r"/resolve/.*sae\.pt|/api/", lambda h: h.send(b"", 302, Location=f"{elsewhere}/login"))]
        one_line(run_client(server, tmp_path / "3", code), "CorruptError", "login page")


def test_names_that_escape_are_refused(server: HubServer, tmp_path: Path) -> None:
    for number, name in enumerate(
        ("../../evil.pt", "/etc/evil.pt", "a/../../evil.pt", "a\\..\\evil.pt", "a/e\nvil.pt")
    ):
        server.put(f"lab/evil{number}", {name: b"x", "sae.pt": b"y"})
    answer = run_client(server, tmp_path / "home", """
answer = [refusal(list_files, parse_address(f"hf://lab/evil{number}")) for number in range(5)]
listing = list_files(parse_address("hf://lab/sae/a"))
answer += [refusal(fetch_files, listing, [name]) for name in ("../README.md", "/etc/passwd", "none.pt")]
""")  # fmt: skip
    for refused in answer[:5]:
        one_line(refused, "CorruptError", "leaves its folder", "Nothing was downloaded")
    one_line(answer[5], "HubError", "'../README.md' is not the name of a file inside hf://lab/sae/a")
    one_line(answer[6], "HubError", "not the name of a file")
    one_line(answer[7], "HubError", "has no file none.pt")
    assert not [request for request in server.requests if "/resolve/" in request]
    assert list(tmp_path.rglob("*evil*.pt")) == []


def test_a_disk_that_is_too_small_is_known_before_and_a_refusal_of_it_is_one_line(
    server: HubServer, tmp_path: Path
) -> None:
    huge = [{"type": "file", "path": "sae.pt", "size": 10**16, "oid": "0" * 40}]
    server.put("lab/huge", {"sae.pt": b""})
    server.special = [(r"lab/huge/tree", lambda h: h.tell(huge))]
    answer = run_client(server, tmp_path, """
import resource
answer = [refusal(fetch_files, parse_address("hf://lab/huge"), ["sae.pt"])]
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
answer.append(refusal(fetch_files, parse_address("hf://lab/sae/a"), ["sae.pt"]))
""")  # fmt: skip
    one_line(answer[0], "StorageError", "needs 10,000,000,000,000,000 bytes", "HF_HOME")
    one_line(answer[1], "StorageError", "a/sae.pt", "ulimit -f")
    assert not [request for request in server.requests if "resolve" in request and "huge" in request]
    assert list((tmp_path / "hub").rglob("*.incomplete")) == []


def wait(done: threading.Event) -> None:
    done.wait(20)


def test_a_server_that_does_not_answer_is_one_line(server: HubServer, tmp_path: Path) -> None:
    done = threading.Event()
    server.special = [(r"/api/", lambda _: wait(done))]
    code = """
from actcache.hub import client
client.TIMEOUT_S = 0.3
answer = refusal(list_files, parse_address("hf://lab/sae"))
"""
    one_line(run_client(server, tmp_path, code), "HubError", "did not answer in time")
    done.set()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


UPLOAD = """
from actcache.hub import upload
upload.PART_FILES = 4
folder, address = Path(sys.argv[1]), parse_address(sys.argv[2])
seen = []
commit = upload_folder(folder, address, message="Add an SAE", on_progress=lambda *at: seen.append(at))
names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
back = fetch_files(replace(address, revision=commit), names)
answer = {"commit": commit, "seen": seen, "back": back.files}
"""


def test_what_is_uploaded_is_read_back(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "pictures").mkdir(parents=True)
    content = {"README.md": b"---\nlicense: mit\n---\n", "sae.safetensors": b"w" * 5000}
    content |= {f"pictures/{number}.png": b"png %d" % number for number in range(5)}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    first = run_client(server, tmp_path / "home", UPLOAD, str(folder), "hf://me/new/layer_2", HF_TOKEN="hf_x")
    assert first["back"] == hashes
    assert first["seen"][-1] == [sum(map(len, content.values()))] * 2
    assert server.repos["me/new"]["main"].keys() == {".gitattributes", *(f"layer_2/{name}" for name in content)}
    assert len([request for request in server.requests if "/commit/" in request]) == 1
    assert len([request for request in server.requests if request.startswith("PUT")]) == 6
    assert len([request for request in server.requests if "/preupload/" in request]) == len(first["seen"]) == 2

    server.requests.clear()
    (folder / "README.md").write_bytes(b"---\nlicense: apache-2.0\n---\n")
    second = run_client(server, tmp_path / "home", UPLOAD, str(folder), "hf://me/new/layer_2", HF_TOKEN="hf_x")
    assert second["commit"] != first["commit"]
    assert second["back"] == hashes | {"README.md": hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()}
    assert "POST /api/repos/create" not in server.requests
    server.put("datasets/lab/many", {"x": b"1"})
    data = run_client(server, tmp_path / "home", UPLOAD, str(folder), "hf://datasets/lab/many", HF_TOKEN="hf_x")
    assert data["back"] == second["back"]


def test_what_cannot_be_uploaded_is_one_line(server: HubServer, tmp_path: Path) -> None:
    for name, text in (("card", "---\nlicense: [\n---\n"), ("plain", "hello")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
    (tmp_path / "empty").mkdir()
    server.closed = {"lab/gated": (403, "GatedRepo", "restricted")}
    server.special = [(r"POST /api/repos/create", lambda h: h.refuse(403, "", "You may not create this"))]
    answer = run_client(server, tmp_path / "home", """
def upload(name, text):
    return refusal(upload_folder, Path(sys.argv[1]) / name, parse_address(text), message="m")
answer = [upload("card", "hf://lab/sae"), upload("empty", "hf://lab/sae"), upload("plain", "hf://lab/sae@" + "0" * 40),
          upload("plain", "hf://lab/gated"), upload("plain", "hf://lab/new"), upload("plain", "hf://lab/sae@v9")]
""", str(tmp_path), HF_TOKEN="hf_x")  # fmt: skip
    one_line(answer[0], "SettingsError", "license is not text")
    one_line(answer[1], "SettingsError", "holds no files")
    one_line(answer[2], "SettingsError", "names a commit")
    one_line(answer[3], "HubError", "gated")
    one_line(answer[4], "HubError", "403", "token")
    one_line(answer[5], "HubError", "has no revision v9")
    assert not [request for request in server.requests if "/commit/" in request]
    offline = 'answer = refusal(upload_folder, sys.argv[1], parse_address("hf://lab/sae"), message="m")'
    one_line(run_client(None, tmp_path / "home", offline, str(tmp_path / "plain")), "HubError", "could not be reached")
