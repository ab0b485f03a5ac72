"""The embedded demo: generated scenes with ground truth, and a tiny CLIP trained on them. It does not load torch."""

from pathlib import Path

from actcache.demo.dataset import Truth, read_truth, write_demo
from actcache.demo.pairs import ScenePair, render_pair, sample_pair, write_pairs
from actcache.demo.scenes import Scene, caption_scene, concept_names, render_scene, sample_scene

MODEL = str(Path(__file__).parent / "model" / "demo-clip.json")
PRETRAINED = str(Path(__file__).parent / "model" / "demo-clip.safetensors")

__all__ = [
    "MODEL",
    "PRETRAINED",
    "Scene",
    "ScenePair",
    "Truth",
    "caption_scene",
    "concept_names",
    "read_truth",
    "render_pair",
    "render_scene",
    "sample_pair",
    "sample_scene",
    "write_demo",
    "write_pairs",
]
