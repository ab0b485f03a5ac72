"""clipscope: a checkpoint as its training saved it, and what its TopKSAE computes of it."""

import torch
from clipscope import TopKSAE
from shared import D, F, K, keep, read_arguments, shake


def main() -> None:
    x, out = read_arguments()
    torch.manual_seed(0)
    sae = TopKSAE(k=K, n_features=F, d_in=D, device="cpu")
    shake(sae)
    file = out / "topk" / "1200013184.pt"
    file.parent.mkdir()
    torch.save({"model_state_dict": sae.state_dict(), "n_features": F, "d_in": D, "k": K}, file)
    checkpoint = torch.load(file, weights_only=True)
    loaded = TopKSAE(k=checkpoint["k"], n_features=checkpoint["n_features"], d_in=checkpoint["d_in"], device="cpu")
    loaded.load_state_dict(checkpoint["model_state_dict"])
    found = loaded(x)
    keep(out, "topk", found["latent"], found["reconstruction"])


if __name__ == "__main__":
    with torch.no_grad():
        main()
