"""Every parameter, defined once.

Prefect draws its form from these models, YAML files are validated against them, the
command line is built from them and MLflow logs them.
"""

import os
import re
from collections import Counter
from dataclasses import asdict
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from deepfake_core.description import CLASS_NAMES as CLASS_NAMES  # there, as each registered model holds a copy of it
from deepfake_core.description import MAX_IMAGE_SIZE

CLASS_COLOURS = {"real": "#2c7fb8", "fake": "#d95f0e"}
"""In figures, pages and reports."""

REGRESSION = "regression"
"""The split of confirmed reports that no model learns from: the one split that may be empty."""

SPLITS = ("train", "val", "test", REGRESSION)

FEEDBACK = "feedback"
"""Short name of the source that holds the images of confirmed reports."""

MAX_SHORT_NAME = 150
"""Bytes of a source's short name; a file's name, which has more in it, may have 255."""

DEFAULT_MODEL = "deepfake-detector"
"""Name in MLflow's model registry."""

PRODUCTION = "production"
PROMOTED, NOT_PROMOTED, WAITS = "promoted", "not promoted", "waits for approval"
"""What can be decided about a version; a person decides about the last."""

PRODUCTION_URI = f"models:/{DEFAULT_MODEL}@production"
"""Where the production model is in the registry."""

DEFAULT_CACHE_GB = 30.0
"""The three Kaggle data sets at 256 x 256 pixels are 28 GB when they are decoded."""

DEFAULT_KEEP = 3
"""Number of newest data sets, archives of each source, and versions' model files that housekeeping keeps."""

DEFAULT_KEEP_REJECTED_DAYS = 30
"""How long housekeeping keeps the image and the notes of a report that a person rejected."""

DEFAULT_DATA_DIR = "data"

DEFAULT_FEEDBACK = f"{DEFAULT_DATA_DIR}/feedback"
"""Folder of reports on wrong verdicts."""

DEFAULT_OBSERVATIONS = f"{DEFAULT_DATA_DIR}/observations"
"""Folder of what is observed in production, which `watch` reads and housekeeping cleans."""

DEFAULT_KEEP_OBSERVATIONS_DAYS = 90

Architecture = Literal["cnn", "efficientnet_lite0", "efficientnet_v2_b0", "hpf_cnn", "cgface"]
Choice = Annotated[Architecture, WithJsonSchema({"type": "string", "enum": list(get_args(Architecture))})]
"""An architecture, which Prefect's form offers as a list to choose from."""

Normalisation = Literal["none", "reencode"]
Precision = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "cosine"]
ThresholdRule = Literal["false_alarm_rate", "balanced_accuracy", "best_f1"]
Approval = Literal["never", "borderline", "always"]
PrimaryMetric = Literal[
    "auc", "average_precision", "accuracy", "f1", "recall_at_1_percent_fpr", "recall_at_5_percent_fpr"
]


def _state_bounds(schema: dict[str, Any]) -> None:
    """Say each number's bounds in its description: Prefect's form enforces bounds, but does not show them."""
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    for field in schema["properties"].values():
        bounded = field.get("anyOf", [field])[0]
        bounds = [f"{words} {bounded[limit]:,}" for limit, words in limits.items() if limit in bounded]
        if bounds:
            field["description"] = f"{field['description'].rstrip('.')} ({', '.join(bounds)})."


class Parameters(BaseModel):
    """Parameters that can't change and that know no key but their own."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=_state_bounds)


URL = r"[\w+.:-]+:/"
"""How an address begins that is no folder."""


def check_address(address: str) -> str:
    """Return the address of a folder, or a URL that holds no credentials.

    Raises:
        ValueError: for a malformed URL, or one that holds a user name, a password or options.
    """
    rule = "An address must be a folder, or a URL such as s3://bucket/deepfake"
    if not re.match(URL, address):
        return address
    if "@" in address or "?" in address:
        shown = re.sub(r"/[^/].*@", "/...@", address).partition("?")[0]
        raise ValueError(
            f"{rule}, without user name, password or options: they would be logged. Received: {shown}. Set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, instead."
        )
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://(/?[^/].*)", address.rstrip("/")):
        raise ValueError(f"{rule}. Received: {address}")
    return address


Address = Annotated[
    str,
    AfterValidator(check_address),
    Field(min_length=1, json_schema_extra={"pattern": f"^(?!{URL}.*[@?])"}),  # so that Prefect's form refuses it too
]

Cluster = Annotated[str, Field(pattern=r"^(auto|(ray://)?[\w.-]+:\d+|)$")]
"""Of Ray: where it is; empty for this machine's cores."""

FolderName = Annotated[str, Field(min_length=1, pattern=r"^[^/\\]+$")]
Folders = FolderName | Annotated[tuple[FolderName, ...], Field(min_length=1)]
"""Names of folders, or patterns of names (*, ?, [abc])."""


class Source(Parameters):
    """One data set of real and fake faces, and how its folders name the label."""

    name: str = Field(
        json_schema_extra={"pattern": r"^(/|\./|\.\./|~|[\w-]+/[\w-]+$)"},  # so that Prefect's form refuses it too
        description="Kaggle slug (owner/name), or path of a local zip or folder. A path begins with /, ./, ../ or ~.",
    )
    version: int | None = Field(
        default=None, ge=1, description="Kaggle version to stay at. Empty: the newest at each run."
    )
    real_folder: Folders = Field(
        default="real", description="Name of the folders whose images are real, or several; * stands for any text."
    )
    fake_folder: Folders = Field(
        default="fake", description="Name of the folders whose images are fake, or several; * stands for any text."
    )
    csv_real_label: int | None = Field(
        default=None,
        description="Value that means real in the column `label` of the source's csv files. "
        "Where set, the csv files must agree with the folders, or the run stops.",
    )
    follow_links: bool = Field(
        default=False,
        description="Of a local folder: read links to files and folders outside it too. Those inside are always read.",
    )
    drawn: bool = Field(
        default=False,
        description="The images are drawn, not photographs. A model trained on them never replaces one "
        "that was trained on photographs.",
    )

    _names_owner: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.is_local and len([part for part in self.name.split("/") if part]) != 2:
            raise ValueError(
                "`name` must be a Kaggle slug of the form owner/name, or a path that begins with "
                f"/, ./, ../ or ~. Received: {self.name!r}"
            )
        if not self.is_local and not all(
            part.replace("-", "").replace("_", "").isalnum() for part in self.name.split("/")
        ):
            raise ValueError(
                f"A Kaggle slug holds letters, digits, - and _ only (the version goes into `version`). "
                f"Received: {self.name!r}"
            )
        if self.is_local and self.version is not None:
            raise ValueError(f"`version` is for Kaggle sources only. Received: {self.version} for {self.name!r}")
        if self.follow_links and not self.is_local:
            raise ValueError(f"`follow_links` is for local folders only. Received: true for {self.name!r}")
        self._check_short_name()
        real, fake = self.folder_names.values()
        for one, other in product(real, fake):
            if one == other or fnmatchcase(one, other) or fnmatchcase(other, one):
                raise ValueError(f"`real_folder` and `fake_folder` must differ. Received: {one!r} and {other!r}")
        return self

    @property
    def is_local(self) -> bool:
        return self.name.startswith(("/", "./", "../", "~"))

    @property
    def folder_names(self) -> dict[str, tuple[str, ...]]:
        """The names or patterns of each class's folders."""
        folders = (self.real_folder, self.fake_folder)
        names = ((one,) if isinstance(one, str) else one for one in folders)
        return dict(zip(CLASS_NAMES, names, strict=True))

    @property
    def short_name(self) -> str:
        """The last part of the slug or path, without `.zip`: how metrics and manifest name the source.

        Where two of a run would end alike, the owner or folder stands before it: owner.name. What MLflow admits in no
        metric's name becomes `_`.
        """
        path = Path(os.path.abspath(os.path.expanduser(self.name)))  # noqa: PTH100, PTH111 - pathlib keeps `..`
        owner = f"{path.parent.name}." if self._names_owner else ""
        return re.sub(r"[^\w. -]", "_", owner + path.name.removesuffix(".zip"))

    def name_owner(self) -> "Source":
        """Return the same source, with its owner in its short name."""
        copy = self.model_copy()
        copy._names_owner = True
        copy._check_short_name()
        return copy

    def _check_short_name(self) -> None:
        size = len(os.fsencode(self.short_name))
        if not 1 <= size <= MAX_SHORT_NAME:
            raise ValueError(
                f"The last part of a source's name, and the owner before it where two end alike, must have 1 to "
                f"{MAX_SHORT_NAME} bytes without `.zip`, as files are named by it. Received: {size} in {self.name!r}. "
                "Rename the zip or folder."
            )


KAGGLE_SOURCES = (
    Source(name="ciplab/real-and-fake-face-detection", real_folder="training_real", fake_folder="training_fake"),
    Source(name="uditsharma72/real-vs-fake-faces"),
    Source(name="xhlulu/140k-real-and-fake-faces", csv_real_label=1),
)


class DataParameters(Parameters):
    """Where images come from, where they go, and how they are split."""

    sources: tuple[Source, ...] = Field(
        default=KAGGLE_SOURCES,
        min_length=1,
        json_schema_extra={"uniqueItems": True},
        description="Data sets to merge. Where two hold the same picture equally large, the one listed first keeps it.",
    )
    data_dir: Address = Field(
        default=DEFAULT_DATA_DIR,
        description="Folder that holds archives, image indexes and split folders; or a URL that machines share, "
        "without credentials, such as s3://bucket/deepfake.",
    )
    layout: Literal["files", "shards"] = Field(
        default="files",
        description="How images are kept in a split folder: a file each, or in WebDataset tars of 10,000 (shards), for "
        "data sets of more files than a disk or store handles well. The data set's version is the same; one that is "
        "published already is not written again.",
    )
    cluster: Cluster = Field(
        default="",
        description="Ray cluster that indexes large archives: host:6379 or auto on a machine of the cluster, "
        "ray://host:10001 from elsewhere. Empty: this machine's cores.",
    )
    feedback: Address = Field(
        default="auto",
        description="Folder or URL of the reports of wrong verdicts, whose confirmed images are one more source. "
        "auto: feedback/ in data_dir, where that is there. none: reports are left out.",
    )
    test_fraction: float = Field(
        default=0.15,
        gt=0,
        lt=1,
        description="Share of new images that go to the test split. Images of earlier versions stay in "
        "their split, whatever the shares.",
    )
    val_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="Share of new images that go to the validation split."
    )

    normalise: Annotated[Normalisation, WithJsonSchema({"type": "string", "enum": list(get_args(Normalisation))})] = (
        Field(
            default="none",
            description="none: images keep their bytes. reencode: every image is written at one size and JPEG quality, "
            "so that a model can't recognise fakes by their compression.",
        )
    )
    cache_gb: float = Field(
        default=DEFAULT_CACHE_GB,
        ge=0,
        description="GB of disk that the decoded pixels of a data set may take at one input size. Where they need "
        "more, images are decoded as they are read, in each epoch again.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.test_fraction + self.val_fraction >= 1:
            raise ValueError(
                "test_fraction + val_fraction must be less than 1, so that images are left to train on. "
                f"Received: {self.test_fraction} + {self.val_fraction}"
            )
        return self

    @field_validator("sources")
    @classmethod
    def _tell_apart(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        """Put the owner into short names that would be the same, or that of confirmed reports."""
        short = Counter([FEEDBACK, *(source.short_name for source in sources)])
        named = tuple(source.name_owner() if short[source.short_name] > 1 else source for source in sources)
        if len({source.short_name for source in named}) < len(named):
            raise ValueError(
                "Sources must differ in the last part of their names, or in the one before. Received: "
                f"{[source.name for source in sources]}. List each once, or rename a zip or folder."
            )
        return named


class AugmentationParameters(Parameters):
    """Random changes to training images; validation and test images are left as they are."""

    crop: float = Field(
        default=1.0,
        ge=0.1,
        le=1,
        description="Side of the random square that is trained on, as a share of the image's. Only candidates with a "
        "backbone take less than 1: they pool over images of any size.",
    )
    rotation: float = Field(default=20.0, ge=0, le=180, description="Greatest rotation either way, in degrees.")
    width_shift: float = Field(
        default=0.1, ge=0, lt=1, description="Greatest shift left or right, as a share of the width."
    )
    height_shift: float = Field(
        default=0.1, ge=0, lt=1, description="Greatest shift up or down, as a share of the height."
    )
    zoom: float = Field(default=0.1, ge=0, lt=1, description="Greatest zoom in or out: 0.1 is 0.9 to 1.1.")
    horizontal_flip: bool = Field(default=True, description="Mirror half of the images, chosen at random.")
    colours: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of images that are given another brightness, contrast and saturation, grey among them.",
    )
    recompression: float = Field(
        default=0.0, ge=0, le=1, description="Share of images that are recompressed as JPEG, at quality 40 to 95."
    )
    blur: float = Field(
        default=0.0, ge=0, le=1, description="Share of images that are blurred, by a Gaussian of up to 1.5 pixels."
    )
    resize: float = Field(
        default=0.0, ge=0, le=1, description="Share of images that are scaled to 0.5 to 1 of their side, and back."
    )

    @property
    def degrades(self) -> bool:
        """Whether any image is given other colours, recompressed, blurred or scaled."""
        return bool(self.colours or self.recompression or self.blur or self.resize)

    @property
    def resamples(self) -> bool:
        """Whether the warp interpolates between pixels; if not, it moves whole ones."""
        return bool(self.rotation or self.zoom)


class Recipe(Parameters):
    """How one candidate is trained. Each has its own, in its file of `deepfake_core/models`."""

    image_size: int = Field(ge=32, le=MAX_IMAGE_SIZE, description="Side of the input images, in pixels.")
    batch_size: int = Field(default=32, ge=1, le=4096, description="Images per training step, over all devices.")
    epochs: int = Field(ge=1, le=10_000, description="Passes over the training images, at most.")
    patience: int = Field(ge=1, description="Stop after this many epochs without a lower validation loss.")
    learning_rate: float = Field(gt=0, le=1, description="Adam's learning rate, the highest of its schedule.")
    schedule: Schedule = Field(
        default="constant", description="constant, or cosine: the learning rate falls to 0 over the epochs."
    )
    warmup_epochs: float = Field(default=0, ge=0, description="Epochs over which the learning rate rises from 0.")
    weight_decay: float = Field(default=0, ge=0, lt=1, description="AdamW's decay of kernels per step; 0 is Adam.")
    weights: str = Field(
        default="none",
        description="Where a backbone's first weights come from: imagenet, a .weights.h5 file, none, or production: "
        "the network in production, if it is of this architecture and knows no image that is not trained on now.",
    )
    head_epochs: int = Field(
        default=0, ge=0, description="Epochs, of all, in which only the layers behind a pretrained backbone learn."
    )
    head_per_source: bool = Field(
        default=False,
        description="Whether each source's fakes get a head of their own, which learns them against all real images.",
    )
    precision: Precision = Field(
        default="auto", description="auto: bfloat16 where the hardware computes this network faster in it."
    )
    augmentation: AugmentationParameters = Field(
        default=AugmentationParameters(), description="Random changes to training images."
    )


def _override(name: str) -> Any:
    """Make an empty parameter with the description and bounds of the recipe's."""
    field = Recipe.model_fields[name]
    bounds = {limit: value for limits in field.metadata for limit, value in asdict(limits).items()}
    return Field(default=None, description=f"{field.description} Empty: each candidate's own.", **bounds)


LARGE_BATCH_WARMUP_EPOCHS = 5.0


class TrainingParameters(Parameters):
    """What is trained, on what, and what differs from the candidates' own recipes."""

    candidates: tuple[Choice, ...] = Field(
        default=("cnn", "efficientnet_lite0"),
        min_length=1,
        description="Architectures to train. The best on validation is scored on the test split.",
    )
    image_size: int | None = _override("image_size")
    batch_size: int | None = _override("batch_size")
    epochs: int | None = _override("epochs")
    patience: int | None = _override("patience")
    learning_rate: float | None = _override("learning_rate")
    schedule: Schedule | None = _override("schedule")
    warmup_epochs: float | None = _override("warmup_epochs")
    weight_decay: float | None = _override("weight_decay")
    weights: str | None = _override("weights")
    head_epochs: int | None = _override("head_epochs")
    head_per_source: bool | None = _override("head_per_source")
    precision: Precision | None = _override("precision")
    augmentation: AugmentationParameters | None = _override("augmentation")
    devices: int = Field(default=1, ge=1, description="GPUs to train on; each takes its share of every batch.")
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of initial weights, shuffling, augmentation.")

    def adjust(self, recipe: Recipe) -> Recipe:
        """Return a candidate's recipe with what is set here in its place.

        Larger batches make fewer steps. So a batch size above the recipe's raises its learning rate by the square root
        of the factor, and warms it up for 5 epochs at least. The root is Adam's rule: Malladi, Lyu, Panigrahi and
        Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022. In proportion,
        as for plain gradient descent, one of three trainings in batches of 256 did not learn. `learning_rate` and
        `warmup_epochs`, where given, stand.
        """
        given = {name: value for name in Recipe.model_fields if (value := getattr(self, name)) is not None}
        factor = given.get("batch_size", 0) / recipe.batch_size
        if factor > 1:
            given.setdefault("learning_rate", min(1.0, recipe.learning_rate * factor**0.5))
            given.setdefault("warmup_epochs", max(recipe.warmup_epochs, LARGE_BATCH_WARMUP_EPOCHS))
        if self.augmentation:
            changes = self.augmentation.model_dump(exclude_unset=True)
            given["augmentation"] = recipe.augmentation.model_copy(update=changes)
        return Recipe(**{**dict(recipe), **given})


class EvaluationParameters(Parameters):
    """How scores are made comparable, and on what they are tested."""

    threshold: Annotated[ThresholdRule, WithJsonSchema({"type": "string", "enum": list(get_args(ThresholdRule))})] = (
        Field(
            default="false_alarm_rate",
            description="How the threshold is chosen on validation. false_alarm_rate: of each source's real images, so "
            "few are called fake that, with a confidence of 0.9, the rate below holds for new images too; of such "
            "thresholds, the one of the highest balanced accuracy. Or the highest balanced_accuracy or best_f1 of all.",
        )
    )
    false_alarm_rate: float = Field(
        default=0.10,
        ge=0,
        le=1,
        description="Share of each source's real images that may be called fake, for the rule false_alarm_rate. The "
        "fewer validation images there are, the more fakes are missed.",
    )
    max_error: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Share of each source's fakes that may surely be called real, of its reals that may surely be "
        "called fake, and of the sure verdicts of each label that may be wrong. Other verdicts are marked as unsure.",
    )
    holdout_sources: tuple[str, ...] = Field(
        default=(),
        description="Short names of sources that are never trained on, only tested: how well the model does on "
        "another kind of images. The short name is the last part of the name; where two sources share it, owner.name.",
    )
    robustness_images: int = Field(
        default=400,
        ge=0,
        description="Test images, at most, that are recompressed, scaled, blurred and so on to see what that costs. "
        "0: none.",
    )


class PromotionParameters(Parameters):
    """What a model must reach before it goes into production."""

    model_name: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        pattern=r"^[\w.-]+$",
        description="Name in MLflow's model registry.",
    )
    min_precision: float = Field(
        default=0.6, ge=0, le=1, description="Lowest precision on the test split, at the threshold."
    )
    min_recall: float = Field(
        default=0.25, ge=0, le=1, description="Lowest recall on the test split, at the threshold."
    )
    max_false_alarm_rate: float = Field(
        default=0.12,
        ge=0,
        le=1,
        description="Highest share of a source's real test images that are called fake. A source fails if the lower "
        "end of its 95 % interval is above this, so that few images alone refuse no model.",
    )
    metric: Annotated[PrimaryMetric, WithJsonSchema({"type": "string", "enum": list(get_args(PrimaryMetric))})] = Field(
        default="auc", description="Metric on the test split in which a challenger must beat production."
    )
    min_probability: float = Field(
        default=0.95,
        gt=0.5,
        le=1,
        description="Lowest probability that the challenger is better, by the paired bootstrap.",
    )
    max_recall_drop: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="How far a source's recall may be below the lower end of production's 95 % interval.",
    )
    max_latency: float | None = Field(
        default=None, gt=0, description="Milliseconds for one image, at most, on the CPU of the machine that evaluates."
    )
    max_size: float | None = Field(default=None, gt=0, description="Largest model.onnx, in megabytes (10^6 bytes).")
    approval: Annotated[Approval, WithJsonSchema({"type": "string", "enum": list(get_args(Approval))})] = Field(
        default="never",
        description="When a person decides. never: the rule does. borderline: where the only rules missed are the "
        "probability of being better (at least 0.8), the confirmed reports, or both. always: before any "
        "version goes into production.",
    )
    approval_hours: float = Field(
        default=72, gt=0, le=8760, description="How long a version waits for a person; then it is not promoted."
    )


ReviewChoice = Literal["real", "fake", "reject", "withdraw"]


class ReviewDecision(Parameters):
    """What a person decided about an image that was reported."""

    sha256: str = Field(
        pattern=r"^[0-9a-f]{8,64}$", description="The image's SHA-256, or its first 8 or more characters."
    )
    decision: Annotated[ReviewChoice, WithJsonSchema({"type": "string", "enum": list(get_args(ReviewChoice))})] = Field(
        description="What the image is; or reject: learn nothing from it; withdraw: take the last decision back."
    )
    why: str = Field(default="", max_length=1000, description="Recorded with the decision.")


class WatchParameters(Parameters):
    """When what is observed in production counts as drift."""

    observations: str = Field(
        default=DEFAULT_OBSERVATIONS, min_length=1, description="Folder or URL that `--observe` names."
    )
    feedback: str = Field(
        default=DEFAULT_FEEDBACK,
        description="Folder or URL that keeps reports: the confirmed ones are judged again. Empty: none.",
    )
    window_days: int = Field(default=1, ge=1, le=90, description="Days, up to now, whose observations are compared.")
    min_distance: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Smallest change that counts as drift: the distance of Kolmogorov and Smirnov between a column's "
        "distribution and that of the test split.",
    )
    model_name: str = Field(
        default=DEFAULT_MODEL,
        min_length=1,
        pattern=r"^[\w.-]+$",
        description="Name in MLflow's model registry.",
    )
