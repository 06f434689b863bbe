"""Which BiT models are there, and how large are they?

Pure Python, so that `bit-mixup models` and `bit-mixup plan` answer without importing torch. Counts are computed from the
architecture; a test compares them with the networks that timm builds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

DEFAULT_MODEL = "resnetv2_50x1_bit.goog_in21k"
_UPSTREAM = {
    "goog_in21k": "ImageNet-21k",
    "goog_in21k_ft_in1k": "ImageNet-21k, then ImageNet-1k",
    "goog_distilled_in1k": "ImageNet-1k, distilled from R152x2",
    "goog_teacher_in21k_ft_in1k": "ImageNet-21k, then ImageNet-1k (teacher)",
    "goog_teacher_in21k_ft_in1k_384": "ImageNet-21k, then ImageNet-1k (teacher)",
}


def _make_divisible(channels: float) -> int:
    """Channels rounded to a multiple of 8, but never down by more than a tenth (timm's rule for widths)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a BiT ResNetV2 with bottleneck blocks; the fields are timm's arguments."""

    layers: tuple[int, ...]
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_chs: int = 64
    width_factor: int = 1
    bottle_ratio: float = 0.25

    @property
    def num_features(self) -> int:
        return _make_divisible(self.channels[-1] * self.width_factor)

    @property
    def stem_channels(self) -> int:
        return _make_divisible(self.stem_chs * self.width_factor)

    def _blocks(self) -> list[tuple[int, int, int, int]]:
        """Per block: input, inner and output channels, and stride."""
        blocks = []
        inputs = self.stem_channels
        for stage, (depth, width) in enumerate(zip(self.layers, self.channels, strict=True)):
            outputs = _make_divisible(width * self.width_factor)
            inner = _make_divisible(outputs * self.bottle_ratio)
            for block in range(depth):
                blocks.append((inputs, inner, outputs, 2 if stage and not block else 1))
                inputs = outputs
        return blocks

    def parameter_count(self, num_classes: int = 0) -> int:
        """Trainable numbers, with a head of `num_classes` (0: without one)."""
        return 3 * 7 * 7 * self.stem_channels + self._tail_count(self._blocks()) + self.head_count(num_classes)

    def last_stage_count(self, num_classes: int = 0) -> int:
        """Numbers of the last stage, of the normalisation behind it, and of the head."""
        return self._tail_count(self._blocks()[-self.layers[-1] :]) + self.head_count(num_classes)

    def head_count(self, num_classes: int) -> int:
        """Numbers of a head (0 classes: none)."""
        return num_classes * (self.num_features + 1) if num_classes else 0

    def _tail_count(self, blocks: list[tuple[int, int, int, int]]) -> int:
        """Numbers of some blocks that start with a stage, and of the last normalisation."""
        count, previous = 2 * self.num_features, -1
        for inputs, inner, outputs, stride in blocks:
            count += inputs * inner + 9 * inner * inner + inner * outputs + 2 * inputs + 4 * inner
            if stride > 1 or outputs != previous:
                count += inputs * outputs  # the first block of a stage projects its shortcut
            previous = outputs
        return count

    def activation_bytes(self, size: int) -> int:
        """Memory in bytes that the backward pass of one fp32 image of `size` x `size` pixels needs to be kept."""
        edge = -(-size // 2)
        floats = 3 * size * size + self.stem_channels * (edge + 2) ** 2  # the image; the padded stem output
        edge = (edge + 2 - 3) // 2 + 1
        floats += 2 * self.stem_channels * edge * edge  # the pool's indices, 64 bits each
        for inputs, inner, _, stride in self._blocks():
            area, out_edge = edge * edge, -(-edge // stride)
            # Each normalisation keeps its input, and its rectified output is the next convolution's input.
            floats += 2 * inputs * area + 2 * inner * area + 2 * inner * out_edge * out_edge
            edge = out_edge
        floats += 2 * self.num_features * (edge * edge + 1)
        return 4 * floats

    def forward_bytes(self, size: int) -> int:
        """Memory in bytes that an fp32 image of `size` x `size` pixels takes at most on its way forward, with nothing kept."""
        edge = -(-size // 2)
        live = [3 * size * size + self.stem_channels * (edge * edge + (edge + 2) ** 2)]  # its output, and that padded
        edge = (edge + 2 - 3) // 2 + 1
        for inputs, inner, outputs, stride in self._blocks():
            area, out_area = edge * edge, (-(-edge // stride)) ** 2
            # A block's input before and after its normalisation, the shortcut, the output; two maps of the inner convolutions.
            live.append(2 * inputs * area + 2 * outputs * out_area + inner * (area + max(area, out_area)))
            edge = -(-edge // stride)
        return 4 * max(live)

    def probing_bytes(self, size: int, *, examples: int, num_classes: int, num_train: int) -> int:
        """Memory in bytes that a process takes to compute features of pictures and to train a head on them, as `training_bytes`.

        With a third more for scratch space, and the largest filters standardised, peaks on a CPU are met within a quarter (one
        thread; 50x1 at 128 and 224 px, 101x3 at 128 px).

        Args:
            size: edge in pixels.
            examples: of a forward pass.
            num_classes: of the head.
            num_train: features that are held, twice while they are gathered.
        """
        features = 2 * 4 * num_train * self.num_features
        filters = max(9 * inner * inner for _, inner, _, _ in self._blocks())
        weights = 4 * (self.parameter_count(num_classes) + filters + 4 * self.head_count(num_classes))
        return 32_000_000 + weights + features + self.forward_bytes(size) * examples * 4 // 3

    def training_bytes(
        self,
        size: int,
        *,
        examples: int,
        num_classes: int,
        half: bool = False,
        num_processes: int = 1,
        activations: int = 1,
        trained: int | None = None,
    ) -> int:
        """Memory in bytes that a process takes to train on pictures of `size` x `size` pixels, beside the libraries.

        Weights, gradients, momentum and standardised weights; saved activations, and a third as much again for the gradients
        and the scratch space on the way back through them; 32 MB of compiled kernels and the like. The third and the 32 MB are
        measured on a CPU (tests/fault_worker.py).

        Args:
            size: edge in pixels.
            examples: of the largest backward pass.
            num_classes: of the head.
            half: whether activations are held in 16 bits.
            num_processes: several hold two more copies, while gradients are summed.
            activations: how many times they are held.
            trained: numbers that have gradients and momentum. None: all. Activations count as if all had.
        """
        count = self.parameter_count(num_classes)
        learning = count if trained is None else trained
        numbers = 2 * count + (4 if num_processes > 1 else 2) * learning
        saved = activations * self.activation_bytes(size) // (2 if half else 1)
        return 32_000_000 + 4 * numbers + saved * examples * 4 // 3

    def overridden(self, model_args: Mapping[str, Any]) -> "Architecture":
        """The same with timm's `model_args` of a configuration file taken into account."""
        known = {
            name: model_args[name] for name in ("channels", "stem_chs", "width_factor", "bottle_ratio") if name in model_args
        }
        if "channels" in known:
            known["channels"] = tuple(known["channels"])
        return replace(self, **known)


ARCHITECTURES = {
    "resnetv2_50x1_bit": Architecture(layers=(3, 4, 6, 3)),
    "resnetv2_50x3_bit": Architecture(layers=(3, 4, 6, 3), width_factor=3),
    "resnetv2_101x1_bit": Architecture(layers=(3, 4, 23, 3)),
    "resnetv2_101x3_bit": Architecture(layers=(3, 4, 23, 3), width_factor=3),
    "resnetv2_152x2_bit": Architecture(layers=(3, 8, 36, 3), width_factor=2),
    "resnetv2_152x4_bit": Architecture(layers=(3, 8, 36, 3), width_factor=4),
}


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One of the weights that timm publishes on the hub.

    Args:
        name: timm's full `architecture.tag`.
        input_size: edge in pixels that the published accuracy was measured at.
        num_classes: of the upstream head.
        interpolation: for resizing, as in its pretrained configuration.
    """

    name: str
    input_size: int
    num_classes: int
    interpolation: str

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.name.split(".")[0]]

    @property
    def upstream(self) -> str:
        return _UPSTREAM[self.name.split(".")[1]]

    @property
    def parameters(self) -> int:
        return self.architecture.parameter_count(self.num_classes)

    @property
    def download_bytes(self) -> int:
        """Size of the published fp32 file, without its header of some kilobytes."""
        return 4 * self.parameters


def _published() -> dict[str, PublishedModel]:
    models = []
    for architecture in ARCHITECTURES:
        models.append(
            PublishedModel(name=f"{architecture}.goog_in21k", input_size=224, num_classes=21_843, interpolation="bilinear")
        )
        size = 480 if architecture == "resnetv2_152x4_bit" else 448
        models.append(
            PublishedModel(name=f"{architecture}.goog_in21k_ft_in1k", input_size=size, num_classes=1000, interpolation="bilinear")
        )
    for name, size in (
        ("resnetv2_50x1_bit.goog_distilled_in1k", 224),
        ("resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k", 224),
        ("resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384", 384),
    ):
        models.append(PublishedModel(name=name, input_size=size, num_classes=1000, interpolation="bicubic"))
    return {model.name: model for model in models}


PUBLISHED = _published()


def list_bit_models() -> list[str]:
    """Names of all published weights, as `architecture.tag`."""
    return list(PUBLISHED)
