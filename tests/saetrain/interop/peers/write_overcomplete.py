"""overcomplete: state dicts of its classes in evaluation, with the settings beside them that ViSAEBench writes, and the
pickled module with an archetypal dictionary of RA-SAE-DINOv2-32k.

A state dict holds neither k nor the threshold of batchtopk, so the settings tell them.
"""

import json

import torch
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, RelaxedArchetypalDictionary, TopKSAE
from shared import D, F, K, keep, read_arguments, shake


def main() -> None:
    x, out = read_arguments()
    torch.manual_seed(0)
    linear = {"encoder_module": "linear", "device": "cpu"}
    made = {
        "relu": (SAE(D, F, **linear), {}),
        "topk": (TopKSAE(D, F, top_k=K, **linear), {"k": K}),
        "topk-multiplied": (TopKSAE(D, F, top_k=K, dictionary_params={"use_multiplier": True}, **linear), {"k": K}),
        "topk-norm": (TopKSAE(D, F, top_k=K, encoder_module="mlp_bn_1", device="cpu"), {"k": K}),
        "batchtopk": (BatchTopKSAE(D, F, top_k=K * len(x), **linear), {"k": K}),
        "jumprelu": (JumpSAE(D, F, **linear), {}),
    }
    for name, (sae, config) in made.items():
        for shift in (0, 0.1, -0.2):  # for the running statistics and the running threshold
            sae(x + shift)
        with torch.no_grad():
            for key, value in sae.named_parameters():
                if "dictionary" not in key:
                    value.add_(0.1 * torch.randn_like(value))
            if name == "topk-multiplied":
                sae.dictionary.multiplier.fill_(0.4)
            sae.dictionary._weights.mul_(torch.linspace(0.5, 2, F)[:, None])  # the layer divides by the norms again
            if name == "batchtopk":
                config = config | {"threshold": float(sae.running_threshold)}
            (out / name).mkdir()
            torch.save(sae.state_dict(), out / name / "sae.pt")
            settings = {"architecture": name.split("-")[0], "d_model": D, "dict_size": F, **config}
            (out / name / "config.json").write_text(json.dumps(settings))
            sae.eval()
            _, codes, decoded = sae(x)
        keep(out, name, codes, decoded)
    sae = BatchTopKSAE(D, F, top_k=K * len(x), encoder_module="mlp_ln_1", device="cpu")
    sae.dictionary = RelaxedArchetypalDictionary(D, F, torch.randn(50, D), delta=0.5)
    shake(sae, 0.3)
    (out / "ra_sae").mkdir()
    torch.save(torch.nn.DataParallel(sae), out / "ra_sae" / "ra.pth")
    sae.running_threshold = 0.4
    (out / "ra_sae" / "config.json").write_text(json.dumps({"running_threshold": sae.running_threshold}))
    with torch.no_grad():
        _, codes, decoded = sae.eval()(x)
    keep(out, "ra_sae", codes, decoded)


if __name__ == "__main__":
    main()
