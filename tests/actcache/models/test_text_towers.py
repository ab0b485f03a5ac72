"""Texts of towers that look both ways are embedded as in open_clip: with all the padding, never cut in silence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from other_tokenizers import Ended, Words

from actcache import SettingsError
from actcache.models import TextTower, load_clip, make_text_tower
from actcache.models.device import choose_device

PLAIN: dict[str, Any] = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TRUNK: dict[str, Any] = {
    "image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none",
    "timm_model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32},
}  # fmt: skip
NATIVE: dict[str, Any] = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
COCA = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "SigLIP": {"vision_cfg": TRUNK, "init_logit_bias": -10, "custom_text": True,
               "text_cfg": PLAIN | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}},
    "CLIPA": {"vision_cfg": NATIVE, "text_cfg": PLAIN | {"no_causal_mask": True, "pool_type": "last"}},
    "bidirectional, pooled at EOT": {"vision_cfg": NATIVE, "text_cfg": PLAIN | {"no_causal_mask": True},
                                     "custom_text": True},
    "CoCa": {"vision_cfg": NATIVE | {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
             "text_cfg": PLAIN | {"embed_cls": True, "output_tokens": True}, "multimodal_cfg": COCA,
             "custom_text": True},
    "worldwide": {"vision_cfg": NATIVE, "text_cfg": PLAIN | {"pool_type": "eos", "eos_id": 2}},
    "CLIP with a trunk": {"vision_cfg": TRUNK, "text_cfg": PLAIN, "custom_text": True},
}  # fmt: skip
TEXTS = ["a dog", "a photo of a cat .", "dog", "two small dogs and a cat"]


def tower_of(config: dict[str, Any], tmp_path: Path, tokenize: Any) -> tuple[TextTower, Any]:
    (tmp_path / "model.json").write_text(json.dumps({"embed_dim": 32, **config}))
    clip = load_clip(str(tmp_path / "model.json"), "random:0")
    if tokenize is None:
        return make_text_tower(clip, device="cpu"), clip
    bias = clip.module.logit_bias
    return TextTower(clip.module, tokenize, clip.model_id, choose_device("cpu"), 10.0, 32,
                     None if bias is None else float(bias)), clip  # fmt: skip


AT_EOT = ("CLIP with a trunk", "bidirectional, pooled at EOT")
"""They read the embedding at the largest number, which is EOT in CLIP's own tokenizer alone."""
TOKENIZED = [(name, kind) for name in CONFIGS for kind in (["CLIP's"] if name in AT_EOT else ["SigLIP's", "ended"])]


@pytest.mark.parametrize(("name", "tokenizer"), TOKENIZED)
def test_embeddings_are_open_clips_own(name: str, tokenizer: str, tmp_path: Path) -> None:
    tokenize: Any = {"CLIP's": None, "SigLIP's": Words(), "ended": Ended()}[tokenizer]
    tower, clip = tower_of(CONFIGS[name], tmp_path, tokenize)
    ids = (tokenize or open_clip.SimpleTokenizer(context_length=12))(TEXTS)
    with torch.no_grad():
        wanted = clip.module.encode_text(ids, normalize=True)
    torch.testing.assert_close(tower.embed(TEXTS), wanted, rtol=1e-5, atol=1e-6)
    for one, row in zip(TEXTS, wanted, strict=True):  # alone, so that shorter batches are tried too
        torch.testing.assert_close(tower.embed([one])[0], row, rtol=1e-5, atol=1e-6)
    assert tower.embed_dim == 32
    assert tower.embed([]).shape == (0, 32)
    assert tower.causal == (name == "CLIP with a trunk")


def test_the_bias_of_a_sigmoid_loss_is_exposed(tmp_path: Path) -> None:
    tower, clip = tower_of(CONFIGS["SigLIP"], tmp_path, None)
    assert tower.logit_bias == float(clip.module.logit_bias) == -10
    assert tower.logit_scale == pytest.approx(1 / 0.07)
    assert tower_of(CONFIGS["CLIPA"], tmp_path, None)[0].logit_bias is None


@pytest.mark.parametrize("tokenize", [Words(), Ended()], ids=["padded with its end", "padded with 0"])
def test_only_a_text_that_was_cut_is_refused(tokenize: Any, tmp_path: Path) -> None:
    tower, _ = tower_of(CONFIGS["SigLIP"], tmp_path, tokenize)
    fits = " ".join(f"word{i}" for i in range(11))
    tower.embed([fits, f"{fits} .", "dog .", "a", ""])  # a full stop is no token, so its absence shows nothing
    for longer in (f"{fits} more", f"{fits} more and more . .", f"{fits} {fits} {fits}"):
        with pytest.raises(SettingsError, match="longer than the context of 12 tokens"):
            tower.embed(["dog", longer])


OFFLINE = """
import json, sys, torch
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from actcache.models import load_clip, make_text_tower
folder = Path(sys.argv[1])
words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "dog", "cat", "photo", "of"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
made = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="</s>", eos_token="</s>", unk_token="<unk>")
made.save_pretrained(folder)
tower = make_text_tower(load_clip(f"local-dir:{folder}", "random:0"), device="cpu")
ids = tower.tokenize(["A dog.", "a photo of a cat"])
assert ids.tolist() == [[3, 4] + [1] * 10, [3, 6, 7, 3, 5] + [1] * 7], ids
with torch.no_grad():
    wanted = tower.module.encode_text(ids, normalize=True)
torch.testing.assert_close(tower.embed(["A dog.", "a photo of a cat"]), wanted)
tower.embed(["a " * 11, "dog ."])
try:
    tower.embed(["a " * 12])
    print("not refused")
except ValueError as error:
    print(error)
"""


def test_a_tokenizer_in_the_models_folder_needs_no_network(tmp_path: Path, run_peers: Callable[..., str]) -> None:
    config = {"embed_dim": 32, **CONFIGS["SigLIP"]}
    tokenizer = {"hf_tokenizer_name": "lab/absent", "tokenizer_kwargs": {"clean": "canonicalize"}}
    config["text_cfg"] = config["text_cfg"] | tokenizer
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    printed = run_peers("-c", OFFLINE, tmp_path, PYTHONPATH=str(Path(__file__).parents[3]))
    assert printed.startswith("A text of 12 words is longer than the context of 12 tokens")


def test_without_transformers_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"embed_dim": 32, **CONFIGS["SigLIP"]}
    config["text_cfg"] = config["text_cfg"] | {"hf_tokenizer_name": "lab/absent"}
    (tmp_path / "model.json").write_text(json.dumps(config))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(SettingsError, match=r"transformers\. Install it with `pip install transformers`") as caught:
        make_text_tower(load_clip(str(tmp_path / "model.json"), "random:0"), device="cpu")
    assert "\n" not in str(caught.value)


HOSTILE = """
import json, sys
from pathlib import Path
from actcache.models import load_clip, make_text_tower
try:
    make_text_tower(load_clip(f"local-dir:{sys.argv[1]}", "random:0"), device="cpu")
    print("not refused")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("options", [{"clean": "canonicalize"}, {"trust_remote_code": True}], ids=["plain", "asking"])
def test_code_in_the_folder_of_a_tokenizer_does_not_run(
    options: dict[str, object], tmp_path: Path, run_peers: Callable[..., str]
) -> None:
    mark, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    config = {"embed_dim": 32, **CONFIGS["SigLIP"]}
    config["text_cfg"] = config["text_cfg"] | {"hf_tokenizer_name": "lab/absent", "tokenizer_kwargs": options}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    auto = {"AutoTokenizer": ["theirs.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", "auto_map": auto}))
    (folder / "config.json").write_text(json.dumps({"auto_map": auto}))
    printed = run_peers("-c", HOSTILE, folder, PYTHONPATH=str(Path(__file__).parents[3]))
    asking = "trust_remote_code" in options
    expected = "options that are not known: trust_remote_code" if asking else "could not be loaded"
    assert expected in printed
    assert not mark.exists()
