"""The server as a browser and as an attacker meet it: a real one, on a port of this machine."""

import gzip
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explorer import PAGE, Client, serving

from actcache import SettingsError
from analysis.explore.data import Data
from analysis.explore.serving import is_loopback, open_socket
from analysis.naming import read_own_names, set_name

ROOT = Path(__file__).parents[3]
POLICY = "default-src 'none'; script-src 'self'"


@pytest.mark.parametrize("path", ["site.json", "atlas.bin", "images.json", "latents/19.json", "images/47.json",
                                  "pictures/3.bin"])  # fmt: skip
def test_the_server_answers_what_the_records_say(client: Client, sources: Any, path: str) -> None:
    answer = client.ask(f"data/{path}")
    assert answer.status == 200
    assert answer.headers["content-security-policy"].startswith(POLICY)
    assert answer.headers["x-content-type-options"] == "nosniff"
    if path != "site.json":
        assert answer.body == Data(sources).answer(path).body
    else:
        assert answer.json()["live"]


def test_the_page_comes_from_its_folder_and_nothing_else_does(client: Client, page: dict[str, bytes]) -> None:
    for path, name in (
        ("", "index.html"),
        ("index.html", "index.html"),
        ("app.js", "app.js"),
        ("style.css", "style.css"),
    ):
        answer = client.ask(path)
        assert (answer.status, answer.body) == (200, PAGE[name])
        assert answer.headers["content-security-policy"].startswith(POLICY)
    for path in ("server.py", "data.py", "__init__.py", "app.js.map", "data", "api", "api/notes/1"):
        answer = client.ask(path)
        assert answer.status in (404, 405)
        assert set(answer.json()) == {"error"}


def test_a_page_that_was_not_built_is_one_line(client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from analysis.explore import page_files

    monkeypatch.setattr(page_files, "files", lambda package: tmp_path)
    answer = client.ask("")
    assert answer.status == 404
    assert "has not been built" in answer.json()["error"]


@pytest.mark.parametrize("path", [
    "data/../../../../etc/passwd", "data/..%2f..%2f..%2fetc/passwd", "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "data/latents/..%2f..%2fartifact.json", "data//etc/passwd", "data/latents/0.json/../../..",
    "....//....//etc/passwd",
    "data/latents/%00.json", "data/pictures/0.bin%00.txt", "api/picture/../../etc/passwd", "data/names.json/",
    "data/artifact.json", "data/concepts.parquet",
])  # fmt: skip
def test_no_path_leads_out(client: Client, path: str) -> None:
    told = client.raw(f"GET /{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"404", b"400", b"405")
    assert b"root:" not in told
    assert b"error" in body


def test_another_name_of_the_server_and_another_page_are_refused(client: Client) -> None:
    """A page that makes its own name point to this machine, and one that sends a request across."""
    assert client.ask("data/site.json", Host="evil.example").status == 400
    assert client.ask("data/site.json", Host="localhost:1").status == 200
    fields = {"name": "x", "note": "", "version": ""}
    assert client.ask("api/notes/1", fields, "PUT", Origin="http://evil.example").status == 403
    assert client.ask("api/edit", {"image": 0, "drop": [1]}, Origin="null").status == 403


def test_unchanged_answers_are_not_sent_twice(client: Client) -> None:
    first = client.ask("data/latents/19.json")
    assert client.ask("data/latents/19.json", If_None_Match=first.headers["etag"]).status == 304
    assert client.ask("data/names.json").headers["cache-control"] == "no-store"


def test_long_answers_are_compressed_for_those_who_can_read_it(
    client: Client, sources: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from analysis.explore import server

    monkeypatch.setattr(server, "LEAST_PACKED", 100)
    for path in ("names.json", "images.json", "latents/19.json"):
        plain, packed = client.ask(f"data/{path}"), client.ask(f"data/{path}", Accept_Encoding="br, gzip")
        assert plain.headers["content-encoding"] is None
        assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "accept-encoding")
        assert gzip.decompress(packed.body) == plain.body == Data(sources).answer(path).body
    assert client.ask("data/atlas.bin", Accept_Encoding="gzip").headers["content-encoding"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Notes


@pytest.fixture
def own(golden: Path, tmp_path: Path) -> Any:
    from analysis.explore.sources import open_sources

    folder = Path(shutil.copytree(golden / "a.concepts", tmp_path / "a.concepts"))
    return open_sources(folder, codes=golden / "a.codes")


def test_two_pages_do_not_lose_each_others_notes(own: Any) -> None:
    with serving(own) as client:
        version = client.ask("data/names.json").json()["version"]
        first = client.ask("api/notes/5", {"name": "<b>wheel</b>", "note": "round", "version": version}, "PUT")
        assert first.status == 200
        assert first.json()["names"]["latents"]["5"] == {
            "name": "<b>wheel</b>", "origin": "by hand", "own": True, "note": "round",
        }  # fmt: skip
        other = client.ask("api/notes/6", {"name": "tail", "version": version}, "PUT")  # another latent: no conflict
        assert other.status == 200
        late = client.ask("api/notes/5", {"name": "hub", "note": "", "version": version}, "PUT")
        assert late.status == 409
        assert late.json()["names"]["latents"]["5"]["name"] == "<b>wheel</b>"
        again = client.ask("api/notes/5", {"name": "hub", "version": late.json()["names"]["version"]}, "PUT")
        assert again.status == 200
        assert read_own_names(own.concepts)[5] == {"name": "hub", "note": "round"}
        set_name(own.concepts, 5, name="by another program")
        assert (
            client.ask("api/notes/5", {"name": "x", "version": again.json()["names"]["version"]}, "PUT").status == 409
        )
        assert client.ask("api/notes/5", {"name": "x", "version": "of an earlier server"}, "PUT").status == 409
        now = client.ask("data/names.json").json()
        gone = client.ask("api/notes/5", {"name": "", "note": "", "version": now["version"]}, "PUT").json()["names"]
        assert not gone["latents"].get("5", {}).get("own", False)
    assert read_own_names(own.concepts)[6] == {"name": "tail"}


def test_many_writers_at_once_lose_nothing(own: Any) -> None:
    with serving(own) as client:
        version = client.ask("data/names.json").json()["version"]

        def write(latent: int) -> None:
            fields = {"name": f"name {latent}", "note": f"note {latent}", "version": version}
            assert client.ask(f"api/notes/{latent}", fields, "PUT").status == 200

        threads = [threading.Thread(target=write, args=(latent,)) for latent in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    written = read_own_names(own.concepts)
    assert all(written[n] == {"name": f"name {n}", "note": f"note {n}"} for n in range(12))


@pytest.mark.parametrize(("body", "status"), [
    (b"", 400), (b"[]", 400), (b"{", 400), (b"[" * 20_000, 400), (b"\xff\xfe", 400),
    ({"name": 3}, 422), ({"name": "a\nb"}, 422), ({"note": "x" * 2001}, 422), (b'{"name": "\\ud800"}', 422),
    ({"name": "x" * 70_000}, 413),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_bad_notes_are_refused_in_one_line(client: Client, body: Any, status: int) -> None:
    answer = client.ask("api/notes/1", body, "PUT")
    assert answer.status == status
    assert answer.json()["error"].count("\n") == 0
    assert client.ask("api/notes/64", {"name": "x"}, "PUT").status == 422


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.fixture(scope="module")
def reference(sources: Any) -> Any:
    """The same classifier, opened apart."""
    from analysis.config import ModelOptions
    from analysis.explore.live import LiveModel

    return LiveModel(sources, ModelOptions(device="cpu"))


def test_an_edit_equals_the_classifier_with_the_edited_stream(client: Client, sources: Any, reference: Any) -> None:
    import torch

    codes, classifier, sae = sources.codes, reference.classifier, reference.pair.sae
    image, latent, value = 4, 19, 7.5
    entries = codes.read_rows(image * codes.n_tokens + np.arange(codes.n_tokens))
    x = classifier.read([image])
    for at in (None, [0], [2], [6], [8], [0, 4]):  # corners, and two patches at once
        answer = client.ask("api/edit", {"image": image, "at": at, "set": {str(latent): value}}).json()
        moved = x.clone()
        for token in range(codes.n_tokens) if at is None else [1 + patch for patch in at]:
            mine = (entries.row == image * codes.n_tokens + token) & (entries.latent == latent)
            old = float(entries.value[mine].sum())
            moved[0, token] += (value - old) * (sae.decoder[latent] / sae.scale)
        with torch.no_grad():
            before, after = classifier.logits(torch.cat([x, moved])).double().softmax(1).numpy()
        got = {row["name"]: row for row in answer["classes"]}
        for number, name in enumerate(classifier.names):
            np.testing.assert_allclose(got[name]["before"], before[number], rtol=1e-3)
            np.testing.assert_allclose(got[name]["after"], after[number], atol=2e-3)
        assert answer["random_latent"] not in (None, latent)
        fired = sources.n_fired
        assert abs(np.log(fired[answer["random_latent"]] / fired[latent])) < 2
        density = np.asarray(sources.concepts.table["density"])[[latent, answer["random_latent"]]]
        np.testing.assert_allclose(answer["frequency"], density, rtol=1e-3)
    assert answer["judge"] == "zero-shot"


def test_what_is_dropped_and_what_is_kept_are_two_halves(client: Client, sources: Any, reference: Any) -> None:
    """Dropping all latents that fire equals keeping none; keeping all of them changes nothing."""
    codes = sources.codes
    entries = codes.read_rows(3 * codes.n_tokens + np.arange(codes.n_tokens))
    live = np.unique(entries.latent).tolist()
    dropped = client.ask("api/edit", {"image": 3, "drop": live}).json()["classes"]
    none = client.ask("api/edit", {"image": 3, "keep": []}).json()["classes"]
    both = [{row["name"]: row["after"] for row in rows} for rows in (dropped, none)]
    for name in both[0]:
        np.testing.assert_allclose(both[0][name], both[1][name], rtol=1e-2)
    for row in client.ask("api/edit", {"image": 3, "keep": live}).json()["classes"]:
        np.testing.assert_allclose(row["after"], row["before"], rtol=1e-2)


@pytest.mark.parametrize("fields", [
    {}, {"image": 3}, {"image": "3", "drop": [1]}, {"image": 48, "drop": [1]}, {"image": 3, "drop": [64]},
    {"image": 3, "drop": [-1]}, {"image": 3, "set": {"1": "x"}}, {"image": 3, "set": {"a": 1}},
    {"image": 3, "set": {"1": 1e300}}, {"image": 3, "set": [1]}, {"image": 3, "drop": [1], "at": [9]},
    {"image": 3, "drop": [True]}, {"upload": "nothing", "drop": [1]}, {"upload": 3, "drop": [1]},
    {"image": True, "drop": [1]}, {"image": 3, "keep": "all"},
], ids=str)  # fmt: skip
def test_bad_edits_are_refused_in_one_line(client: Client, fields: Any) -> None:
    answer = client.ask("api/edit", fields)
    assert answer.status == 422
    assert answer.json()["error"].count("\n") == 0


def test_an_uploaded_image_has_the_codes_of_the_stored_one(client: Client, golden: Path, sources: Any) -> None:
    codes = sources.codes
    image = 11
    uri = sources.concepts.images["uri"][image].as_py()
    answer = client.ask("api/upload", (golden / "images" / uri).read_bytes())
    assert answer.status == 200
    got, stored = answer.json()["record"], client.ask(f"data/images/{image}.json").json()[0]
    dense = [np.zeros((codes.n_tokens, codes.n_latents)) for _ in range(2)]
    for record, out in zip((got, stored), dense, strict=True):
        token = np.repeat(np.arange(codes.n_tokens), np.diff(record["indptr"]))
        out[token, record["latent"]] = record["value"]
    assert abs(dense[0] - dense[1]).max() < 0.05 * dense[1].max()
    assert answer.json()["picture"].startswith("data:image/jpeg;base64,")
    edited = client.ask("api/edit", {"upload": answer.json()["upload"], "set": {"19": 5}}).json()["classes"]
    same = client.ask("api/edit", {"image": image, "set": {"19": 5}}).json()["classes"]
    after = [{row["name"]: row["after"] for row in rows} for rows in (edited, same)]
    for name in after[0]:
        np.testing.assert_allclose(after[0][name], after[1][name], atol=0.02)


def test_broken_large_and_exploding_uploads_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import zlib

    from PIL import Image

    from analysis.explore import live, server

    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    cut = buffer.getvalue()[:-20]
    header = b"\x89PNG\r\n\x1a\n"
    size = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    bomb = header + (13).to_bytes(4, "big") + size + zlib.crc32(size).to_bytes(4, "big")
    for body in (b"", b"not an image", cut, bomb, b"<svg onload=alert(1)>", b"GIF89a"):
        answer = client.ask("api/upload", body or b" ")
        assert answer.status == 422
        assert answer.json()["error"].count("\n") == 0
    monkeypatch.setattr(live, "MAX_PIXELS", 399)
    assert client.ask("api/upload", buffer.getvalue()).status == 422
    monkeypatch.setattr(server, "MAX_UPLOAD_BYTES", 1000)
    assert client.ask("api/upload", b"x" * 5000).status == 413


def test_texts_find_latents(client: Client, sources: Any, reference: Any) -> None:
    found = client.ask("api/search?q=red%20ring").json()["latents"]
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    assert all(sources.n_fired[latent] for latent, _ in found)
    assert [list(pair) for pair in reference.search("red ring")["latents"]] == found
    assert client.ask("api/search?q=").status == 400
    assert client.ask("api/search?q=" + "x" * 301).status == 400


def test_a_whole_picture(client: Client, sources: Any) -> None:
    import io

    from PIL import Image

    answer = client.ask("api/picture/5")
    assert Image.open(io.BytesIO(answer.body)).size == (24, 24)
    assert client.ask("api/picture/48").status == 404


# ---------------------------------------------------------------------------------------------------------------------
# Who may ask


def test_a_token_opens_the_server_once_and_then_a_cookie(sources: Any, page: dict[str, bytes]) -> None:
    with serving(sources, hosts=frozenset(), token="right") as client:
        for headers in ({}, {"x_token": "wrong"}, {"Cookie": "patchsae-token=wrong"}, {"Cookie": "\x01;=;"}):
            assert client.ask("data/site.json", **headers).status == 403
        assert client.ask("?token=wrong").status == 403
        opened = client.ask("?token=right")
        assert (opened.status, opened.headers["location"]) == (303, "/")
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        assert client.ask("", Cookie=cookie.split(";")[0]).body == PAGE["index.html"]
        assert client.ask("data/site.json", x_token="right").status == 200


def test_addresses_of_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.9.9.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))


def test_without_its_libraries_the_verb_says_how_to_install_them(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analysis import explore_concepts

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SettingsError, match=r"pip install 'patchsae\[explore\]'"):
        explore_concepts(golden / "a.concepts")


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SettingsError, match="is taken") as error:
        open_socket("127.0.0.1", taken.getsockname()[1])
    assert "\n" not in str(error.value)
    for host in ("no.such.host.invalid", "a\u202eb", "a\0b", "a" * 300):
        with pytest.raises(SettingsError, match="--host"):
            open_socket(host, 0)


def test_the_verb_prints_its_address_and_ends_with_ctrl_c(golden: Path) -> None:
    import urllib.request

    command = [sys.executable, str(ROOT / "cli.py"), "--json", "explore", "a.concepts", "--port", "0"]
    with subprocess.Popen(command, cwd=golden, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        with urllib.request.urlopen(address + "data/site.json", timeout=60) as answer:
            assert json.loads(answer.read())["n_latents"] == 64
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=60)
    assert (process.returncode, rest, told) == (0, "", "")
