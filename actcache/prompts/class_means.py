"""Class means: what tells classes apart where no texts do, in a model without a text tower.

    u = (f - center) / |f - center|        f: what the tower pools, center: the mean of f over the shots
    m = the mean of u over the shots of a class, as a unit vector
    logit = <u, m> / 0.07

Center, normalize, nearest class mean: the CL2N classifier of Wang et al. 2019 (SimpleShot). The temperature is that of
DINO's k-NN classifier (Caron et al. 2021), with which CLIP starts too. All of it is measured once, with the plain
tower, and stays fixed, as the texts of a CLIP do: what the prompts gain is not mixed with what a classifier learns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from actcache.models import VisionTower
from actcache.prompts.pixels import Shots, embed_all
from actcache.prompts.towers import run_tower

LOGIT_SCALE = 1 / 0.07


@dataclass(frozen=True)
class ClassMeans:
    """The means of the classes that have shots.

    Attributes:
        center: [E], the mean feature of all shots.
        means: [C, E] unit vectors, in the order of the classes.
    """

    center: Tensor
    means: Tensor

    def embed(self, tower: VisionTower, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> centered unit features [B, E] float32. Gradients flow if they are enabled."""
        return F.normalize(pool_images(tower, images) - self.center, dim=1)


def pool_images(tower: VisionTower, images: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] -> what the tower pools, [B, E] float32."""
    return tower.pool(run_tower(tower, images)).float()


def measure_class_means(tower: VisionTower, shots: Shots) -> ClassMeans:
    """The means of the plain tower's features of the shots. Raises ImageSourceError."""
    features = embed_all(tower, shots.pixels, embed=pool_images)
    center = features.mean(0)
    unit, labels = F.normalize(features - center, dim=1), torch.from_numpy(shots.labels).to(features.device)
    means = torch.stack([unit[labels == number].mean(0) for number in range(len(shots.names))])
    return ClassMeans(center, F.normalize(means, dim=1))
