"""Universal SAE: one .pth a tower, {"epoch", "model_state_dict": the names of overcomplete, "optimizer_state_dict",
"learning_rate"}.

encoder.final_block.0 is linear and encoder.final_block.1 a BatchNorm over the latents, which is folded. The activations
are standardized by one mean and deviation of all channels. These and k are in the settings of the authors' training,
not in the file; they are taken from there (`universal_towers.py`) where the file has the name under which it was
published.
"""

from pathlib import Path

import torch

from actcache import SettingsError
from saetrain.interop.constants import Statistics
from saetrain.interop.fields import Fields, check_fields, names
from saetrain.interop.files import load_tensors, read_k, take_state
from saetrain.interop.foreign import build_sae, set_input
from saetrain.interop.overcomplete import read_weights
from saetrain.interop.universal_towers import UNIVERSAL_EPS, UNIVERSAL_K, UNIVERSAL_TOWERS, find_universal_tower
from saetrain.model import SAE

STATE = "model_state_dict"
FIELDS = Fields("Universal SAE", names(STATE), names("epoch optimizer_state_dict learning_rate"))


def read(path: Path) -> SAE:
    """Read a file, on raw activations if its name says of which tower. Raises CorruptError, SettingsError."""
    content = load_tensors(path)
    check_fields(content, FIELDS, path)
    tensors = take_state(content, STATE, path)
    weights = read_weights(tensors, path)
    n_latents, d_model = weights["encoder"].shape
    sae = build_sae("topk", weights | {"b_dec": torch.zeros(d_model)}, k=read_k(UNIVERSAL_K, n_latents, path))
    if (found := find_universal_tower(path)) is None:
        return sae
    name, tower = found
    if tower.d_model != d_model:
        raise SettingsError(
            f"{path} is named after {name}, whose width is {tower.d_model}, but it reads width {d_model}. "
            "Give the file the name under which it was published."
        )
    return set_input(sae, torch.tensor(tower.mean), 1 / (tower.deviation + UNIVERSAL_EPS))


def lacking(path: Path) -> Statistics | None:
    """The constants of a tower that is none of the published ones lie in no file."""
    return None if find_universal_tower(path) else Statistics("all", "patch")


def remark(path: Path) -> tuple[str, ...]:
    k = f"k = {UNIVERSAL_K} is from the settings of the authors' training; it is in no file."
    found = find_universal_tower(path)
    if found is None:
        towers = ", ".join(f"uni_{name}_checkpoint_29.pth" for name in UNIVERSAL_TOWERS)
        return k, f"Its name is none of {towers}, for which the mean and deviation of the activations are published."
    name, tower = found
    notes = [
        k, f"The activations are standardized by mean {tower.mean:.6f} and deviation {tower.deviation:.6f}, which the "
        f"settings of the authors' training give for {name}.",
    ]  # fmt: skip
    if name == "DinoV2":
        notes.append("The authors resample DINOv2's 16 x 16 patches to 14 x 14 before the SAE.")
    return tuple(notes)
