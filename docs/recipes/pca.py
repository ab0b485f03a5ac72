"""Held-out FVU of PCA with as many components as an SAE has active latents, on the same activations.

python docs/recipes/pca.py TRAIN.acts TEST.acts LAYER COMPONENTS...
"""

import sys

import numpy as np
from sklearn.decomposition import PCA

from actcache import ActivationStore


def main(train: str, test: str, layer: int, components: list[int]) -> None:
    x = rows(train, layer)
    y = rows(test, layer)
    pca = PCA(n_components=max(components), svd_solver="covariance_eigh").fit(x)
    projected = pca.transform(y)
    total = ((y - y.mean(0)) ** 2).sum()
    for n in components:
        reconstruction = projected[:, :n] @ pca.components_[:n] + pca.mean_
        print(f"PCA {n:>3} components: held-out FVU {((y - reconstruction) ** 2).sum() / total:.4f}")


def rows(path: str, layer: int) -> np.ndarray:
    store = ActivationStore.open(path)
    return store.read(layer, images=np.flatnonzero(store.valid)).reshape(-1, store.layout.d_model).astype(np.float64)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(word) for word in sys.argv[4:]])
