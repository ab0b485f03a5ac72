"""Which format a checkpoint has: no two layouts are confused, and what cannot be read is refused by name, in a line."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import pytest
import torch
from foreign_files import CHECKPOINTS, D, F, K, plain_tensors, write
from safetensors.torch import save_file

from actcache import PipelineError
from saetrain.interop.formats import FORMATS, read_foreign
from saetrain.interop.recognition import recognize

T = plain_tensors()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_layout_is_recognized_as_a_folder_and_as_a_file_and_read_by_no_other_reader(
    tmp_path: Path, name: str
) -> None:
    folder = write(name, tmp_path / "in")
    wanted = name.split()[0]
    kind, path = recognize(folder)
    assert kind == wanted
    weights = [file for file in folder.iterdir() if file.suffix not in (".json", ".yaml")]
    assert [recognize(file)[0] for file in weights] == [wanted]
    for other in set(FORMATS) - {wanted}:
        for given in {path, folder, *weights}:
            with pytest.raises((PipelineError, IsADirectoryError)):
                FORMATS[other].read(given)


def test_every_format_has_a_layout_in_these_tests() -> None:
    of_their_own = {"ra_sae", "published"}  # test_ra_sae.py and tests/analysis/publication
    assert {name.split()[0] for name in CHECKPOINTS} == set(FORMATS) - of_their_own


def test_looking_for_the_format_does_not_read_the_tensors(tmp_path: Path) -> None:
    """Twice the weights of an SAE in memory may be too much; a wrong byte in them is the reader's to find."""
    path = foreign_files.write_patchsae(tmp_path / "x", {"d_in": D}, T) / "out.pt"
    data = bytearray(path.read_bytes())
    at = data.index(T["W_dec"].numpy().tobytes())
    data[at + 100] ^= 0xFF
    path.write_bytes(data)
    assert recognize(path) == ("patchsae", path)
    with pytest.raises(PipelineError, match="a wrong checksum"):
        read_foreign(path)


def test_a_file_of_a_known_name_is_read_although_others_lie_beside_it(tmp_path: Path) -> None:
    """PatchSAE's folder of weights may hold checkpoints of the training too."""
    folder = write("patchsae", tmp_path / "in")
    saved(folder / "step_100.pt", T)
    (folder / "old.pt").mkdir()
    assert recognize(folder) == ("patchsae", folder / "out.pt")


@pytest.mark.parametrize("name", ["clipscope", "msae", "visaebench topk", "saelens_pickle", "saev relu"])
def test_a_path_that_is_not_utf_8_is_read(tmp_path: Path, name: str) -> None:
    folder = tmp_path / os.fsdecode(b"M\xfcnchen")
    assert read_foreign(write(name, folder)).format == name.split()[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refused(path: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        read_foreign(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message.replace(str(path.parent), "")) < 600
    return message


def saved(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def varied(name: str, **changes: Any) -> Callable[[Path], Path]:
    return lambda path: write(name, path, CHECKPOINTS[name][1]() | changes)


def overcomplete(config: dict[str, Any], tensors: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda path: foreign_files.write_overcomplete(path, config, tensors)


def msae(name: str) -> Callable[[Path], Path]:
    content = {"model": foreign_files.msae_tensors(), **foreign_files.msae_config()}
    return lambda path: saved(path / name, content)


ROWS = {"dictionary._weights": T["W_dec"], "dictionary.multiplier": torch.tensor(0.0)}
LINEAR = foreign_files.overcomplete_tensors()
BY_NAME: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a transcoder of Prisma": (varied("prisma relu", is_transcoder=True), "predicts one hook point from another"),
    "a transcoder of SAELens": (varied("saelens 6 standard", architecture="transcoder"), "transcoder"),
    "a transcoder of SAELens with a skip": (
        varied("saelens 6 standard", architecture="jumprelu_skip_transcoder"), "predicts one hook point from another",
    ),
    "a transcoder of sparsify": (varied("sparsify", transcode=True), "predicts one hook point from another"),
    "signed codes": (varied("saelens 6 topk", architecture="abstopk"), "whatever their sign"),
    "pursuit of SAELens": (varied("saelens 6 standard", architecture="matching_pursuit"), "matching pursuit"),
    "over a sequence": (varied("saelens 6 standard", architecture="temporal"), "together with the others"),
    "pursuit of overcomplete": (overcomplete({"k": K}, ROWS), "matching pursuit"),
    "pursuit of overcomplete, by its settings": (overcomplete({"architecture": "MpSAE"}, LINEAR), "matching pursuit"),
    "orthogonal pursuit of overcomplete": (overcomplete({"architecture": "omp"}, LINEAR), "matching pursuit"),
    "levels of overcomplete": (overcomplete({}, LINEAR | {"Q": torch.linspace(0, 1, 4)}), "levels that it learned"),
    "layers of overcomplete": (
        overcomplete({"architecture": "topk", "k": K}, LINEAR | {"encoder.mlp_blocks.0.0.weight": T["W_enc"]}),
        "several layers",
    ),
    "experts": (
        lambda path: saved(
            path / "1.pt", {"model_state_dict": {"pre_b": 1, "enc": 1, "dec": 1, "router": 1, "router_b": 1}, "k": K}
        ),
        "several small SAEs",
    ),
    "signed codes of MSAE": (msae(f"{F}_{D}_TopKabs_{K}_False_False_0.0_cc3m.pth"), "whatever their sign"),
    "bent codes of MSAE": (msae(f"{F}_{D}_TopKReLU_{K}_RW_False_False_30.0_cc3m.pth"), r"cap tanh\(code / cap\)"),
    "tokens normalized by MSAE": (msae(f"{F}_{D}_TopKReLU_{K}_RW_False_True_0.0_cc3m.pth"), "normalizes each token"),
    "an activation of MSAE": (msae(f"{F}_{D}_Identity_False_False_0.0_cc3m.pth"), "activation 'Identity'"),
    "MSAE under another name": (msae("model.pth"), "the name under which it was published"),
    "MSAE under a wrong name": (msae(f"{F + 8}_{D}_TopKReLU_{K}_False_False_0.0_x.pth"), "its name says"),
    "a text encoder": (
        lambda path: saved(path / "CLIP-SAE-ViT-L-14.pt", {"text_model.embeddings.token_embedding.weight": T["W_enc"]}),
        "not an SAE, whatever its name says",
    ),
    "a whole CLIP": (
        lambda path: saved(path / "x.pt", {"state_dict_of": {"visual.proj": T["W_enc"], "logit_scale": T["b_enc"]}}),
        "not an SAE",
    ),
    "an unknown layout": (
        lambda path: saved(path / "Layer8_epoch100_lr1e-05.pth", {"W\x1b[2J": T["W_enc"], "bias": T["b_dec"]}),
        "'W.x1b.2J', 'bias', which is the layout of no package known here",
    ),
    "an unknown layout of many names": (
        lambda path: saved(path / "sparse_autoencoder_128.pth", {f"layer{i}": T["b_dec"] for i in range(9)}),
        "'layer0', 'layer1', 'layer2', 'layer3' and 5 more",
    ),
    "a module": (lambda path: saved(path / "x.pth", torch.nn.Linear(2, 2)), "names 'torch.nn.modules.linear.Linear'"),
    "components": (
        lambda path: saved(
            path / "x.pt", {"tied_bias": T["b_dec"].expand(3, D), "encoder._weight": T["W_enc"].T.expand(3, F, D),
                            "decoder._weight": T["W_dec"].T.expand(3, D, F), "encoder._bias": T["b_enc"].expand(3, F)}
        ),
        "3 components",
    ),
    "copies that differ": (
        lambda path: saved(
            path / "x.pt", {"tied_bias": T["b_dec"], "encoder._weight": T["W_enc"].T, "encoder._bias": T["b_enc"],
                            "decoder._weight": T["W_dec"].T, foreign_files.COPIES[1]: T["b_dec"] + 1}
        ),
        "although it is a copy of it",
    ),
    "the wrong tower": (
        lambda path: write("universal_sae", path).joinpath("checkpoint_29.pth").rename(path / "uni_DinoV2_1.pth"),
        "whose width is 384, but it reads width 32",
    ),
    "no settings": (lambda path: saved(path / "sae.pt", LINEAR), "has no config.json or config.yaml beside it"),
    "nested settings": (
        lambda path: (overcomplete({}, LINEAR)(path), (path / "config.json").unlink(),
                      (path / "config.yaml").write_text("sae:\n  k: 5\n"), path)[3],
        "one `name: value` a line",
    ),
    "no threshold": (overcomplete({"architecture": "batchtopk", "k": K}, LINEAR), "threshold must be a number"),
    "a threshold that was never set": (
        lambda path: write(
            "dictionary_learning BatchTopK", path,
            tensors=CHECKPOINTS["dictionary_learning BatchTopK"][2]() | {"threshold": torch.tensor(-1.0)},
        ),
        "before its threshold was set",
    ),
    "several files": (
        lambda path: (saved(path / "a.pt", T), saved(path / "b.pth", T), path)[2], r"2 checkpoints \('a.pt', 'b.pth'\)",
    ),
    "no file": (lambda path: (path.mkdir(), path)[1], "holds no file that ends in .pt"),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_what_no_sae_here_can_be_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, reason = BY_NAME[name]
    path = make(tmp_path / "in")
    with pytest.raises(PipelineError, match=reason):
        read_foreign(path)
    refused(path)


PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 302064768\n"


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xef\xbb\xbf\n" + PAGE, "web page"), (POINTER, "pointer of Git LFS")]
)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_was_not_really_downloaded_says_so(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    folder = write(name, tmp_path / "in")
    for file in sorted(folder.iterdir()):
        kept = file.read_bytes()
        file.write_bytes(content)
        assert reason in refused(folder)
        file.write_bytes(kept)


@pytest.mark.parametrize("name", ["clipscope", "msae", "saelens_pickle", "saev relu", "discover_then_name"])
def test_a_cut_download_says_so(tmp_path: Path, name: str) -> None:
    folder = write(name, tmp_path / "in")
    file = next(folder.iterdir())
    for share in (0.5, 0.98):
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        assert "Download it again" in refused(folder)


def test_sizes_that_a_file_only_claims_take_no_memory(tmp_path: Path) -> None:
    many = torch.zeros(1).expand(1 << 20, 1 << 20)  # 4 TiB in one number
    content = {"model_state_dict": {"pre_b": T["b_dec"], "enc": many, "dec": many}, "n_features": F, "d_in": D, "k": K}
    assert "claim" in refused(saved(tmp_path / "1.pt", content))
    with open(tmp_path / "2.pkl", "wb") as file:
        pickle.dump({"cfg": {}, "state_dict": {"W_enc": many}}, file)
    assert "claim" in refused(tmp_path / "2.pkl")
    (tmp_path / "3.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert "larger than 16 MiB" in refused(tmp_path / "3.safetensors")
    loop: dict[str, Any] = {}
    loop["model_state_dict"] = loop
    assert "could not be read as tensors" in refused(saved(tmp_path / "4.pt", loop))


class Malice:
    def __init__(self, what: Any, *arguments: Any) -> None:
        self.call = what, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("name", ["clipscope", "universal_sae", "msae", "saelens_pickle"])
def test_code_in_a_file_is_never_run(tmp_path: Path, name: str) -> None:
    witness = tmp_path / "witness"
    inner = io.BytesIO()
    torch.save(Malice(Path.touch, witness), inner)
    for number, bad in enumerate(
        (
            Malice(Path.touch, witness),
            Malice(eval, f"open({str(witness)!r}, 'w')"),
            Malice(torch.storage._load_from_bytes, inner.getvalue()),
            Malice(torch.load, str(tmp_path / "x.pt")),
        )
    ):
        path = write(name, tmp_path / str(number), CHECKPOINTS[name][1]() | {"more": bad})
        assert "could not be read as tensors" in refused(path)
    assert not witness.exists()


def test_a_safetensors_file_of_another_kind_is_named(tmp_path: Path) -> None:
    save_file({"model.layers.0.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    assert "'model.layers.0.weight'" in refused(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as archive:
        archive.writestr("x", "y")
    assert "could not be read as safetensors" in refused(tmp_path)
