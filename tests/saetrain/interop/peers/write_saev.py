"""saev 0.1.0, the version on PyPI: its one class, dumped and loaded by itself."""

import torch
from saev import config, nn
from shared import D, keep, read_arguments, shake


def main() -> None:
    x, out = read_arguments()
    torch.manual_seed(0)
    sae = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=2, n_reinit_samples=0))
    shake(sae)
    nn.dump(str(out / "relu" / "sae.pt"), sae)
    decoded, codes, _ = nn.load(str(out / "relu" / "sae.pt"))(x)
    keep(out, "relu", codes, decoded)


if __name__ == "__main__":
    main()
