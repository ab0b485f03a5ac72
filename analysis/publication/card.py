"""The card of an SAE: README.md of its folder, with front matter that the hub reads, and everything a reader needs.

In: what is known of the SAE, and how its folder is reached. Out: Markdown. Whatever people or files may have named is
escaped.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from analysis.concepts import ConceptTable
from analysis.publication.markdown import code, draw_rows, escape, write_front_matter
from saetrain.interop import PublishedSAE, PublishedTower

N_NAMED = 30
TAGS = ("sparse-autoencoder", "interpretability", "vision", "patchsae")
NO_LICENSE = "none given"


@dataclass(frozen=True)
class Address:
    """How a folder is reached.

    Attributes:
        ours: what `--sae` takes: hf://OWNER/REPO/folder, or a folder.
        repo: OWNER/REPO on the hub; None for a local folder.
        folder: the SAE's folder in the repository.
    """

    ours: str
    repo: str | None
    folder: str


def write_card(
    published: PublishedSAE, address: Address, *, caption: str, picture: str, holds_saelens: bool,
    base_model: str | None = None, concepts: ConceptTable | None = None, names: Mapping[int, Mapping[str, str]],
    gallery: bool = False, left_out: Mapping[str, str],
) -> str:  # fmt: skip
    """The text of the card.

    Args:
        picture, caption: the file of the picture, and what it shows.
        holds_saelens: whether the folder has SAELens's files.
        base_model: OWNER/REPO of the tower on the hub.
        names: of latents: `name`, `note` and `by`, each if there is one.
        left_out: what a reader may miss -> why.
    """
    lines = [
        *front_matter(published.license, [base_model] if base_model else [], holds_saelens),
        "",
        f"# Sparse autoencoder at {code(published.hook_point)} of {code(name_tower(published.tower))}",
        "",
        f"{published.sae.variant} with {published.sae.n_latents:,} latents over activations of width "
        f"{published.d_model:,}, trained on {_say_tokens(published.training.tokens)}. "
        f"License: {escape(published.license or NO_LICENSE)}.",
        "",
        f"![{caption}]({picture})",
        "",
        caption,
        *_section("How good it is", _describe_quality(published)),
        *_section("How to use it", _describe_use(published, address, holds_saelens)),
        *_section("What it reads", _describe_tower(published.tower)),
        *_section("What it was trained on", _describe_training(published)),
    ]
    if concepts is not None:
        lines += _section("What its latents are", _describe_concepts(concepts, names, gallery))
    if left_out:
        missing = [f"- {escape(what)}: {escape(why)}." for what, why in left_out.items()]
        lines += _section("What is not here", missing)
    lines += _section("License", _describe_license(published.license, gallery))
    return "\n".join(lines) + "\n"


def front_matter(license: str | None, base_models: list[str], holds_saelens: bool) -> list[str]:
    """The fields that the hub reads. SAELens is a library that it knows."""
    return write_front_matter(
        {
            "license": license,
            "library_name": "saelens" if holds_saelens else "patchsae",
            "tags": [*TAGS, *(["saelens"] if holds_saelens else [])],
            "base_model": base_models,
        }
    )


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _say_tokens(tokens: str) -> str:
    return {"all": "all tokens", "patch": "patch tokens", "cls": "CLS tokens"}[tokens]


def name_tower(tower: PublishedTower) -> str:
    """The tower in a few words, as plain text."""
    parts = [tower.model or tower.model_file or tower.only_name, tower.pretrained or tower.weights_file]
    return " ".join(dict.fromkeys(part for part in parts if part)) or f"model {tower.model_id}"


def _describe_quality(published: PublishedSAE) -> list[str]:
    quality = published.quality
    kinds = [(kind, values) for kind in ("all", "cls", "patch") if (values := quality.get(kind)) is not None]
    rows = [
        [kind, f"{values['fvu']:.4f}", f"{values['l0']:.1f}", f"{values['cosine']:.4f}"]  # type: ignore[index]
        for kind, values in kinds
    ]
    trained_here = published.training.imported is None  # nobody counted the dead latents of others
    shares = [(name, quality.get(name)) for name in ("dead", "silent", "dense") if trained_here or name != "dead"]
    window = published.training.settings.get("dead_tokens")
    last = f"{window:,} tokens" if isinstance(window, int) else "tokens"
    said = ", ".join(f"{value:.1%} {name}" for name, value in shares if isinstance(value, float))
    return [
        f"Measured on {quality['n_tokens']:,} tokens of images that were held out of the training. Of the latents, "
        f"{said}.",
        "",
        *draw_rows(["tokens", "FVU", "L0", "cosine"], rows),
        "",
        "FVU = Σ‖x - x̂‖² / Σ‖x - mean(x)‖², with sums in float64 over the tokens of a kind. L0 is the mean number of "
        "active latents of a token, cosine the mean cosine of x and x̂. "
        + (f"Dead: silent for the last {last} of the training. " if trained_here else "")
        + "Silent: on none of the held-out tokens. Dense: on more than 10 % of them.",
    ]


def _describe_use(published: PublishedSAE, address: Address, holds_saelens: bool) -> list[str]:
    hook = published.hook_point
    lines = [
        "With patchsae, on a photograph of yours:",
        "", "```bash", f"patchsae look photo.jpg --sae {address.ours}{_name_files(published.tower)}", "```",
    ]  # fmt: skip
    if not holds_saelens:
        return [*lines, "", "SAELens cannot hold this SAE, so its files are not here."]
    load = (
        f'SAE.from_pretrained("{address.repo}", "{address.folder}")'
        if address.repo
        else f'SAE.load_from_disk("{address.ours}")'
    )
    return [
        *lines, "",
        "With SAELens. The normalization of the input is folded into these weights, so that they take activations as "
        "they are:",
        "", "```python", "from sae_lens import SAE", "", f"sae = {load}", f"codes = sae.encode(activations)  # {hook}",
        "```",
        "",
        "`patchsae.safetensors` holds the weights as they were trained: x' = (x - mean) · scale, z = encoder (x' - "
        "b_dec) + b_enc, codes f = the variant's function of z, x̂ = (decoderᵀ f + b_dec) / scale + mean.",
    ]  # fmt: skip


def _name_files(tower: PublishedTower) -> str:
    """The flags for a tower that was read from files, which a reader needs to have: their names, without a folder. A
    word in capitals stands for what nobody knows but its author.
    """
    if tower.only_name is not None:
        return " --model MODEL --pretrained WEIGHTS"
    flags = {"--model": tower.model_file, "--pretrained": tower.weights_file}
    return "".join(f" {flag} {shlex.quote(name)}" for flag, name in flags.items() if name)


def _describe_tower(tower: PublishedTower) -> list[str]:
    """The tower, as a table of what is known of it."""
    preprocess = tower.preprocess or {}
    size, grid = preprocess.get("size"), tower.grid
    facts = {
        "model": tower.model and code(tower.model), "weights": tower.pretrained and code(tower.pretrained),
        "name given to the model": tower.only_name and code(tower.only_name),
        "architecture in the file": tower.model_file and code(tower.model_file),
        "weights in the file": tower.weights_file and code(tower.weights_file),
        "sha256 of the weights": tower.weights_sha256 and code(tower.weights_sha256),
        "model id": code(tower.model_id),
        "image size": f"{size[0]} x {size[1]}" if isinstance(size, list | tuple) else None,
        **{name: code(preprocess[key]) for name, key in _PREPARED.items() if key in preprocess},
        "patches": f"{grid[0]} x {grid[1]}" if grid else None,
        "tokens before the patches": None if tower.prefix is None else ", ".join(tower.prefix) or "none",
        "computed in": tower.precision,
        "prompts": tower.prompts and code(tower.prompts.get("method")),
    }  # fmt: skip
    known = [[name, str(value)] for name, value in facts.items() if value]
    return draw_rows(["", ""], known)


_PREPARED = {
    "mean": "mean", "std": "std", "interpolation": "interpolation", "resize": "resize_mode",
    "share that is cropped": "crop_pct", "crop": "crop_mode",
}  # fmt: skip
"""What a card calls the fields of the preprocessing."""


def _describe_training(published: PublishedSAE) -> list[str]:
    training = published.training
    if training.imported is not None:
        place = f", {code(training.source)}" if training.source else ""
        return [f"The weights were read from a checkpoint of {code(training.imported)}{place}, which does not say it."]
    count = "an unknown number of" if training.n_images is None else f"{training.n_images:,}"
    part = " A filter chose them among the images of their store." if training.is_part else ""
    rows = ", ".join(map(code, training.rows)) or "not recorded"
    lines = [f"{count[0].upper()}{count[1:]} images.{part} Hash of the images and their order (`rows_id`): {rows}."]
    if training.images_sha256:
        lines += [f"Hash of the contents of all training images: {code(training.images_sha256)}."]
    return [*lines, "The settings of the training are in `config.json`."]


def _describe_concepts(concepts: ConceptTable, names: Mapping[int, Mapping[str, str]], gallery: bool) -> list[str]:
    numbers = concepts.summary_numbers()
    lines = [
        f"`concepts.parquet` has a row of statistics for each of {concepts.table.num_rows:,} latents, over "
        f"{numbers['n_images']:,} images and {numbers['n_tokens']:,} tokens; {numbers['n_alive']:,} latents fired.",
        "`gallery.parquet` and `gallery/` hold the strongest images of some latents and where in them a latent fires."
        if gallery
        else "No images are published.",
    ]
    if not names:
        return lines
    density = concepts.table["density"]
    own = sorted(names, key=lambda latent: (names[latent].get("by") != "person", latent))[:N_NAMED]
    rows = [
        [str(latent), escape(names[latent].get("name", "")), escape(names[latent].get("by", "")),
         f"{density[latent].as_py():.3%}", escape(names[latent].get("note", ""))]
        for latent in own
    ]  # fmt: skip
    more = f" {N_NAMED} of {len(names):,} are shown; `names.json` has all." if len(names) > N_NAMED else ""
    how = f"Names by a person, or found by CLIP from the top images or the latent's direction (lens).{more}"
    return [*lines, "", how, "", *draw_rows(["latent", "name", "by", "density", "note"], rows)]


def _describe_license(license: str | None, gallery: bool) -> list[str]:
    said = (
        f"The SAE, its card and its statistics: {escape(license)}."
        if license
        else "None given: nobody has said under which license this SAE may be used. Ask its author."
    )
    return [
        f"{said} The image tower has a license of its own.",
        *(["The pictures show images that have licenses and rights of their own."] if gallery else []),
    ]
