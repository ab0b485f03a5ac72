"""ViSAEBench: folders in its own layout, and what its loader and GenericSAE compute of them.

The package only reads, so the files are written here, in the two layouts that its `hub/sae_wrapper.py` knows.
"""

import json

import torch
import yaml
from safetensors.torch import save_file
from shared import D, F, K, keep, read_arguments
from visaebench.hub.loader import load_sae


def main() -> None:
    x, out = read_arguments()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, by: float = 0.25) -> torch.Tensor:
        return by * torch.randn(shape, generator=generator)

    simple = {
        "encoder.weight": random(F, D), "encoder.bias": random(F), "decoder.weight": random(F, D, by=1.0),
        "decoder.bias": random(D),
    }  # fmt: skip
    no_bias = {name: value for name, value in simple.items() if name != "decoder.bias"}
    unit = torch.nn.functional.normalize(simple["decoder.weight"])  # its loader does not divide by the rows' norms
    overcomplete = {
        "encoder.final_block.0.weight": simple["encoder.weight"], "encoder.final_block.0.bias": simple["encoder.bias"],
        "dictionary._weights": unit, "dictionary.multiplier": torch.tensor(0.4),
    }  # fmt: skip
    named = {"backbone": "clip_vitb16", "layer": 11, "d_model": D, "dict_size": F, "expansion_factor": 1, "seed": 0}
    widths = {"input_dim": D, "hidden_dim": F}
    batchtopk = {"architecture": "batchtopk", "k": K, **named}
    made = {
        "topk": ("sae.pt", "config.json", {"architecture": "topk", "k": K, **named}, simple),
        "topk-safetensors": ("model.safetensors", "config.json", {"activation": "topk", "k": K, **widths}, no_bias),
        "batchtopk": ("sae.pt", "config.json", {"threshold": 0.9, **batchtopk}, simple),
        "batchtopk-running": (
            "sae.pt", "config.json", {"sae_type": "batchtopk", "k": K, **widths},
            {**simple, "_running_threshold": torch.tensor(0.7)},
        ),
        "jumprelu": (
            "sae.pt", "config.yaml", {"activation": "jumprelu", **widths},
            {**simple, "jump_thresholds": torch.linspace(0, 1.5, F)},
        ),
        "published": ("sae.pt", "config.json", {"threshold": 1.1, **batchtopk}, overcomplete),
    }  # fmt: skip
    for name, (weights, settings, config, tensors) in made.items():
        folder = out / name
        folder.mkdir()
        if weights.endswith(".safetensors"):
            save_file(tensors, folder / weights)
        else:
            torch.save(tensors, folder / weights)
        (folder / settings).write_text((yaml.safe_dump if settings.endswith("yaml") else json.dumps)(config))
        codes, decoded = load_sae(str(folder), device="cpu")(x)
        keep(out, name, codes, decoded)


if __name__ == "__main__":
    with torch.no_grad():
        main()
