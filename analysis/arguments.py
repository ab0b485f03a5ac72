"""The arguments of the verbs: help, and what is checked before the library is loaded (`analysis.terminal.checks`).

Options that are fields of a configuration are not here: their flags come from the fields.
"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from analysis.terminal import (
    WORDS,
    Makes,
    OneOf,
    Publishes,
    Reads,
    Takes,
    Writes,
    at_least_one,
    takes_address,
    takes_device,
    takes_images,
    takes_model,
    takes_result,
    takes_run_or_concepts,
    takes_template,
    takes_weights,
)

ImagesPath = Annotated[
    Path,
    Argument(metavar="IMAGES", help="Folder, CSV or Parquet table of paths, tar files, or Hugging Face dataset."),
    takes_images,
]
NewStore = Annotated[
    str, Argument(metavar="STORE", help="Activations, e.g. val.acts or s3://bucket/val.acts."), Makes("acts")
]
StorePath = Annotated[
    str, Argument(metavar="STORE", help="Activations, e.g. val.acts or s3://bucket/val.acts."), Takes("acts")
]
StorePaths = Annotated[
    list[str], Argument(metavar="STORE...", help="One or several activation stores of one model."), Takes("acts")
]
RunPath = Annotated[Path, Argument(metavar="RUN", help="A trained SAE, e.g. runs/l10."), Takes("run")]
NewRun = Annotated[Path, Argument(metavar="RUN", help="A trained SAE, e.g. runs/l10."), Makes("run")]
Runs = Annotated[Path, Argument(metavar="RUN", help="A trained SAE, e.g. runs/l10."), Takes("run", folders=True)]
CodesPath = Annotated[Path, Argument(metavar="CODES", help="Sparse codes, e.g. val.codes."), Takes("codes")]
NewCodes = Annotated[Path, Argument(metavar="CODES", help="Sparse codes, e.g. val.codes."), Makes("codes")]
ConceptsPath = Annotated[
    Path, Argument(metavar="CONCEPTS", help="Concept statistics, e.g. val.concepts."), Takes("concepts")
]
NewConcepts = Annotated[
    Path, Argument(metavar="CONCEPTS", help="Concept statistics, e.g. val.concepts."), Makes("concepts")
]
Acts = Annotated[
    list[Path],
    Argument(metavar="ACTS...", help="Files of activations in their order, a folder of them, or saev's shards."),
    Reads("a .npy, .pt or .safetensors file, a folder of them, or saev's shards", folder=None),
]
ImportImages = Annotated[
    Path | None,
    Option(
        "--images",
        help="The images in the order of the activations: a folder (sorted names), a table (its rows), or what else "
        "`extract` takes. Without them, an image is known by its place.",
    ),
    takes_images,
]
AnyPath = Annotated[str, Argument(metavar="PATH", help="Path of any artifact."), Takes(None)]
JSON = Writes((".json",))
ResultPath = Annotated[Path | None, Argument(metavar="[OUT]", help="JSON file to write the result to."), JSON]
ResultFile = Annotated[Path | None, Option(help="JSON file to write the result to; `report --result` reads it."), JSON]
TablePath = Annotated[
    Path | None, Option(help="File to write the answer to: .csv, .parquet or .json."),
    Writes((".csv", ".parquet", ".json")),
]  # fmt: skip
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.")]

PathColumn = Annotated[str | None, Option(help="Column of a table that holds the images' paths, or the images.")]
LabelColumn = Annotated[str | None, Option(help="Column of a table that holds the labels.")]
Device = Annotated[str, Option(help="Device: auto, cpu, cuda, cuda:1, mps. Affects speed only."), takes_device]
BatchImages = Annotated[
    int,
    Option(
        help="Images per forward pass. Affects speed, and the lowest bit of few values: another size changes 2.4e-4 of "
        "the float16 values computed in float32."
    ),
    at_least_one,
]
Workers = Annotated[int | None, Option(help="Number of local dask worker processes. Affects speed only."), at_least_one]
Scheduler = Annotated[str | None, Option(help="Address of a dask scheduler, e.g. tcp://10.0.0.1:8786."), takes_address]
CheckpointEvery = Annotated[int, Option(help="Steps between checkpoints."), at_least_one]

With = Annotated[
    str | None,
    Option("--with", help="Activations of the same images by another model, which has texts or embeds images better."),
    Takes("acts"),
]
MovedImages = Annotated[Path | None, Option(help="Where the images are, if they have moved."), takes_images]
MovedStore = Annotated[Path | None, Option(help="Where the activation store is, if it has moved."), Takes("acts")]
MovedRun = Annotated[Path | None, Option(help="Where the run is, if it has moved."), Takes("run")]
Where = Annotated[str | None, Option(help="Filter over the columns of images.parquet: \"split == 'test'\".")]
Vocabulary = Annotated[
    Path | None, Option(help="File with one word or phrase per line; general words by default."), WORDS
]


# Arguments of a single verb

QuickstartOut = Annotated[Path, Argument(metavar="[OUT]", help="Folder to write everything to.")]
NImages = Annotated[int, Option(help="Number of images to generate."), at_least_one]
Seed = Annotated[int, Option(help="Random seed for the images, their order and the training.")]
NThreads = Annotated[int | None, Option(help="Number of decoding threads. Affects speed only."), at_least_one]
OnError = Annotated[
    str, Option(help="What to do with an unreadable image: stop, or skip (its row stays)."), OneOf(("stop", "skip"))
]
DryRun = Annotated[bool, Option("--dry-run", help="Only report what would be written and how long it would take.")]
Layer = Annotated[list[int] | None, Option(help="Layer to train on, if the store holds several.")]
Site = Annotated[str | None, Option(help="Site within that layer, if the store holds several.")]
LogEvery = Annotated[int, Option(help="Steps between lines of metrics.jsonl."), at_least_one]
LogTo = Annotated[
    list[str],
    Option(help="Also show the metrics in tensorboard or wandb; repeat for both."),
    OneOf(("tensorboard", "wandb")),
]
WandbProject = Annotated[str | None, Option(help="Project in wandb; the variable WANDB_PROJECT by default.")]
Embeddings = Annotated[
    str | None,
    Option(help="Image embeddings for monosemanticity: clip (the store's model), or an .npy file."),
    Reads("an .npy file", words=("clip",)),
]
Names = Annotated[
    Path | None,
    Option(help="Concepts that name the latents; by default, those of these codes that lie beside them."),
    Takes("concepts"),
]
Sheet = Annotated[
    Path | None,
    Option(help="Picture file for a contact sheet with heat maps: .png, .jpg or .webp."),
    Writes((".png", ".jpg", ".jpeg", ".webp")),
]
Method = Annotated[
    list[str],
    Option(help="How to find names: images (top images) or lens (decoder direction); repeat for both."),
    OneOf(("images", "lens")),
]
Template = Annotated[str, Option(help="Text around each word; {} stands for the word."), takes_template]
LookImages = Annotated[
    list[Path],
    Argument(metavar="IMAGE...", help="Image files."),
    Reads("an image file"),
]
LookSAE = Annotated[
    str,
    Option(
        "--sae",
        help="A run, another package's checkpoint, or hf://OWNER/REPO on the Hugging Face hub.",
    ),
    Reads("a run, or a checkpoint of another package", folder=None),
]
LookLatents = Annotated[
    list[int], Option(help="Show this latent instead of the strongest ones; repeat for several.", min=0)
]
LookAt = Annotated[str | None, Option(help="Show the strongest latents of a patch or a region: ROW,COLUMN or 0:3,2:5.")]
LookTop = Annotated[int, Option(help="Number of latents for each image."), at_least_one]
LookConcepts = Annotated[
    Path | None,
    Option(help="Concepts that name the latents of a run; by default, those near the run."),
    Takes("concepts"),
]
LookOut = Annotated[
    Path | None,
    Option(help="File for the heat maps: .html (a page by itself), or .png, .jpg or .webp (a sheet)."),
    Writes((".html", ".png", ".jpg", ".jpeg", ".webp")),
]
OwnName = Annotated[list[str], Option("--set", help='Only set your own name for a latent: "907=red stripes".')]
OwnNote = Annotated[list[str], Option(help='Only set your own note on a latent: "907=see image 12".')]
MovedCodes = Annotated[
    Path | None, Option(help="Where the codes of the table are, if they have moved."), Takes("codes")
]
AnyMovedStore = Annotated[str | None, Option(help="Where the activation store is, if it has moved."), Takes("acts")]
EmbeddedImages = Annotated[
    Path | None, Option(help="Embed these image files instead of the activations."), takes_images
]
ReportOut = Annotated[
    Path, Argument(metavar="OUT", help="HTML file to write, e.g. report.html."), Writes((".html", ".htm"))
]
Results = Annotated[
    list[Path],
    Option("--result", help="Result of a measuring verb, or x.prompts; repeat for several."),
    takes_result,
]
Host = Annotated[str, Option(help="Address to answer on. Other machines reach 0.0.0.0, and then have to know a token.")]
Port = Annotated[int, Option(help="Port to answer on; 0 takes a free one.", min=0, max=65535)]
Compare = Annotated[
    Path | None,
    Option(help="Result of `compare`: the base model beside the adapted one, latent by latent."),
    takes_result,
]
OpenBrowser = Annotated[bool, Option("--open/--no-open", help="Also open the address in a browser.")]
SetLatents = Annotated[list[str], Option("--set", help="Hold a latent at a value on every token instead: 907=5.")]
AddToLatents = Annotated[list[str], Option(help="Raise or lower a latent by a value instead: 907=-2.")]
ChosenOn = Annotated[Path | None, Option(help="Codes of other images to choose latents on."), Takes("codes")]
Judge = Annotated[
    Path | None,
    Option(help="Codes to judge the rules on; by default, the last 20 % of the images."),
    Takes("codes"),
]
Concepts = Annotated[
    Path | None,
    Option(help="Concepts of these codes, from which the latents take their names."),
    Takes("concepts"),
]
ProbeConcepts = Annotated[
    Path | None,
    Option("--concepts", help="Concepts that name the latents; by default, those of these codes beside them."),
    Takes("concepts"),
]
Masks = Annotated[
    Path | None,
    Option(help="Folder of PNG masks named like the images; by default, the store's own."),
    Reads("a folder of PNG masks", folder=True),
]
Legend = Annotated[
    Path | None,
    Option(help="Table that explains the numbers in the masks: columns number and name, or uri and one per concept."),
    Reads("a .csv or .parquet table"),
]
Latent = Annotated[int | None, Option(help="Judge this latent instead of the best one of each concept.")]
NTop = Annotated[int, Option(help="Number of latents for each concept.", min=1)]
LocalizeOut = Annotated[
    Path | None,
    Option(help="File to write to: .csv, .parquet, or .json for `report --result`."),
    Writes((".csv", ".parquet", ".json")),
]
InspectRuns = Annotated[
    list[Path], Argument(metavar="RUN...", help="Trained SAEs, or folders of them."), Takes("run", folders=True)
]
BenchmarkOut = Annotated[
    Path,
    Argument(metavar="OUT", help="JSON file to write; baselines and codes are kept beside it, in OUT's .work."),
    JSON,
]
BenchmarkCodes = Annotated[
    list[Path], Option(help="Codes of a run on STORE, which are made otherwise; repeat for several."), Takes("codes")
]
BenchmarkTable = Annotated[
    list[Path],
    Option(
        help="Also write the tables, as .md, .tex or .csv; repeat for several. The finished command writes them anew."
    ),
    Writes((".md", ".tex", ".csv")),
]
InspectStore = Annotated[
    list[str], Option(help="Activations of their model; repeat for several stores."), Takes("acts")
]
NTokens = Annotated[int, Option(help="Number of held-out tokens to encode by matching pursuit."), at_least_one]
InspectSeed = Annotated[int, Option(help="Random seed for the sample of tokens.")]
Truth = Annotated[
    Path | None, Option(help="A known dictionary [N, D] to match with, as a .npy file."), Reads("an .npy file")
]
Prompts = Annotated[Path, Argument(metavar="PROMPTS", help="Artifact to write, e.g. maple.prompts."), Makes("prompts")]
Model = Annotated[str, Option(help="open_clip architecture, or the path of an open_clip config JSON."), takes_model]
Pretrained = Annotated[
    str | None,
    Option(help="Tag, file or folder of weights, or random:SEED; a folder's own weights by default."),
    takes_weights,
]
ImageSize = Annotated[
    str | None, Option(help="Height, or height x width such as 224x336, of the model's images; its own by default.")
]
Preprocess = Annotated[
    str | None,
    Option(
        help="How images are prepared, where the weights do not say it: a JSON file, an open_clip or timm name with a "
        "tag (NAME.TAG) whose preprocessing is taken, or default."
    ),
]
Test = Annotated[
    Path | None,
    Option(help="Images to measure accuracy on; by default, all images that are not shots."),
    takes_images,
]
Precision = Annotated[
    str,
    Option(help="Precision of the computation: auto, float32 or bfloat16."),
    OneOf(("auto", "float32", "bfloat16")),
]
Base = Annotated[Path, Argument(metavar="CONCEPTS_BASE", help="Concepts of the plain model."), Takes("concepts")]
Adapted = Annotated[
    Path,
    Argument(
        metavar="CONCEPTS_ADAPTED",
        help="Concepts of the adapted model, made from the same images with the same SAE.",
    ),
    Takes("concepts"),
]
CompareOut = Annotated[
    Path, Argument(metavar="OUT", help="JSON file to write; an HTML page is written beside it."), JSON
]
SecondRun = Annotated[
    Path | None,
    Option(help="Run trained on the adapted model's activations, to compare both dictionaries."),
    Takes("run"),
]
Src = Annotated[
    str,
    Argument(metavar="SRC", help="A run, or another package's checkpoint: a path or hf://OWNER/REPO/FOLDER."),
    Reads("a run, or a checkpoint of another package", folder=None),
]
Dst = Annotated[Path, Argument(metavar="DST", help="Folder to write: a checkpoint or a run.")]
To = Annotated[
    str | None,
    Option(help="Format: saelens, dictionary_learning, sparsify, saev, prisma or patchsae."),
    OneOf(("saelens", "dictionary_learning", "sparsify", "saev", "prisma", "patchsae")),
]
ConvertStore = Annotated[
    str | None,
    Option(help="Activations to compare the two SAEs on; required to read a checkpoint."),
    Takes("acts"),
]
PublishSrc = Annotated[
    Path, Argument(metavar="RUN|CONCEPTS", help="A trained SAE, or concept statistics of one."), takes_run_or_concepts
]
PublishDst = Annotated[
    str | None,
    Argument(metavar="[DST]", help="hf://OWNER/REPO, hf://OWNER/REPO/FOLDER, or a local folder for the repository."),
    Publishes(),
]
SiteFolder = Annotated[
    Path | None,
    Option("--site", help="Instead of DST: a folder for the explorer as files, which any web host can serve."),
    Publishes(),
]
License = Annotated[
    str | None, Option("--license", help="License of the SAE as the hub calls it, e.g. mit; none given by default.")
]
Gallery = Annotated[
    bool, Option("--gallery", help="Also publish the pictures of the concepts, which show your images.")
]
Yes = Annotated[bool, Option("--yes", help="Upload without asking.")]
PublishDryRun = Annotated[bool, Option("--dry-run", help="Only list the files and their bytes, and write nothing.")]
ConvertLayer = Annotated[
    int | None, Option(help="Layer of the SAE; by default the one that a checkpoint names, or the store's only one.")
]
AnyModel = Annotated[
    bool, Option("--any-model", help="Accept activations of another model than the one that a checkpoint names.")
]
InputMean = Annotated[
    str | None,
    Option(
        metavar="FILE|NUMBER",
        help="What the package subtracts from its input before the SAE: a number, or a .npy file of one per channel. "
        "By default what the files say; `convert` otherwise estimates it from the store.",
    ),
]
InputScale = Annotated[
    str | None,
    Option(
        metavar="FILE|NUMBER",
        help="What the package then multiplies it by (1 / deviation): a number, or a .npy file of one per channel.",
    ),
]
Repair = Annotated[bool, Option("--repair", help="Extract only the damaged shards again.")]
VerifyImages = Annotated[
    Path | None, Option(help="With --repair: where the images are, if they have moved."), takes_images
]
VerifyModel = Annotated[
    str | None, Option(help="With --repair: the architecture, if its config file has moved."), takes_model
]
VerifyPretrained = Annotated[str | None, Option(help="With --repair: the weights, if they have moved."), takes_weights]
VerifyPrompts = Annotated[
    str | None,
    Option(help="With --repair: the prompts, if they have moved."),
    Reads("x.prompts or a checkpoint", folder=None),
]
