"""eai-sparsify: its SparseCoder, saved and loaded by itself."""

import torch
from shared import D, F, K, keep, read_arguments, shake
from sparsify import Sae, SparseCoder, SparseCoderConfig

MADE = {
    "factor": SparseCoderConfig(expansion_factor=2, k=K),
    "latents": SparseCoderConfig(num_latents=F, k=K, normalize_decoder=False),
    "multi": SparseCoderConfig(num_latents=F, k=K, multi_topk=True),
}


def main() -> None:
    x, out = read_arguments()
    for name, config in MADE.items():
        torch.manual_seed(0)
        sae = SparseCoder(D, config)
        shake(sae)
        sae.save_to_disk(out / name)
        loaded = Sae.load_from_disk(out / name)
        found = loaded.encode(x)
        codes = torch.zeros(len(x), loaded.num_latents).scatter_(1, found.top_indices, found.top_acts)
        keep(out, name, codes, loaded.decode(found.top_acts, found.top_indices))


if __name__ == "__main__":
    with torch.no_grad():
        main()
