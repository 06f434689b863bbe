"""How do others fine-tune a BiT? Their networks and their steps, written plainly from what their scripts and documentation show.

- big_transfer: google-research/big_transfer, bit_pytorch/models.py and bit_pytorch/train.py (commit 140de6e).
- timm: train.py of pytorch-image-models, `--opt momentum`, with `--amp --amp-dtype bfloat16` for bf16.
- transformers: `BitForImageClassification` and `Trainer`, with `bf16=True` for bf16.

All start from the weights of one timm network, so that they must arrive at the same loss.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import transforms

RATE, MOMENTUM = 0.003, 0.9


# ---- big_transfer


class StdConv2d(nn.Conv2d):
    """Its convolution: standardised by var_mean in each pass."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        v, m = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (w - m) / torch.sqrt(v + 1e-10), self.bias, self.stride, self.padding, self.dilation, self.groups)


class PreActBottleneck(nn.Module):
    """Its residual unit, pre-activated."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        cmid = cout // 4
        self.gn1, self.conv1 = nn.GroupNorm(32, cin), StdConv2d(cin, cmid, 1, bias=False)
        self.gn2, self.conv2 = nn.GroupNorm(32, cmid), StdConv2d(cmid, cmid, 3, stride=stride, padding=1, bias=False)
        self.gn3, self.conv3 = nn.GroupNorm(32, cmid), StdConv2d(cmid, cout, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = StdConv2d(cin, cout, 1, stride=stride, bias=False) if stride != 1 or cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.gn1(x))
        residual = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.gn2(out)))
        out = self.conv3(self.relu(self.gn3(out)))
        return out + residual


class BigTransfer(nn.Module):
    """Its network."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        cin = widths[0] // 4
        stem = [("conv", StdConv2d(3, cin, 7, stride=2, padding=3, bias=False)), ("pad", nn.ConstantPad2d(1, 0))]
        self.root = nn.Sequential(OrderedDict([*stem, ("pool", nn.MaxPool2d(3, stride=2, padding=0))]))
        blocks: list[nn.Module] = []
        for number, (depth, cout) in enumerate(zip(depths, widths, strict=True)):
            units = []
            for unit in range(depth):
                units.append(PreActBottleneck(cin, cout, 2 if unit == 0 and number else 1))
                cin = cout
            blocks.append(nn.Sequential(*units))
        self.body = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            OrderedDict([
                ("gn", nn.GroupNorm(32, cin)), ("relu", nn.ReLU(inplace=True)), ("avg", nn.AdaptiveAvgPool2d(1)),
                ("conv", nn.Conv2d(cin, num_classes, 1)),
            ])
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.root(x)))[..., 0, 0]


def shape_of(model: nn.Module) -> tuple[list[int], list[int]]:
    """Blocks and channels of each stage of timm's network."""
    stages: Any = model.stages
    return [len(stage.blocks) for stage in stages], [stage.blocks[-1].conv3.out_channels for stage in stages]


def big_transfer_of(model: nn.Module) -> BigTransfer:
    """Its network with the weights of timm's."""
    names = {"gn1": "norm1", "gn2": "norm2", "gn3": "norm3", "downsample": "downsample.conv"}
    theirs = model.state_dict()
    network = BigTransfer(*shape_of(model), int(model.num_classes))
    state = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "root":
            source = f"stem.{'.'.join(parts[1:])}"
        elif parts[0] == "head":
            source = f"norm.{parts[2]}" if parts[1] == "gn" else f"head.fc.{parts[2]}"
        else:
            source = f"stages.{parts[1]}.blocks.{parts[2]}.{names.get(parts[3], parts[3])}.{parts[4]}"
        state[name] = theirs[source].reshape(tensor.shape)
    network.load_state_dict(state)
    return network


# ---- transformers


def transformers_of(model: nn.Module) -> nn.Module:
    """`BitForImageClassification` with the weights of timm's network."""
    from transformers import BitConfig, BitForImageClassification

    depths, widths = shape_of(model)
    config = BitConfig(
        layer_type="preactivation", depths=depths, hidden_sizes=widths, embedding_size=widths[0] // 4, num_groups=32,
        num_labels=int(model.num_classes),
    )  # fmt: skip
    network = BitForImageClassification(config)
    theirs = model.state_dict()
    state = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if name.startswith("bit.embedder.convolution"):
            source = f"stem.conv.{parts[-1]}"
        elif name.startswith("bit.encoder.stages"):
            source = f"stages.{parts[3]}.blocks.{parts[5]}.{'.'.join(parts[6:])}"
        elif name.startswith("bit.norm"):
            source = f"norm.{parts[-1]}"
        else:
            source = f"head.fc.{parts[-1]}"
        state[name] = theirs[source].reshape(tensor.shape)
    network.load_state_dict(state)
    return network


# ---- steps


def r50x1(num_classes: int = 10) -> nn.Module:
    """timm's R50x1 with random weights, always the same."""
    torch.manual_seed(0)
    return timm.create_model("resnetv2_50x1_bit", num_classes=num_classes)


def autocast(bf16: bool) -> AbstractContextManager[Any]:
    """As timm's and transformers' scripts enter it."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


def plain_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, bf16: bool = False, split: int = 1
) -> float:
    """A step as all of them write it: forward, loss, backward by micro-batch, then the optimizer. The mean loss."""
    total = 0.0
    for some, theirs in zip(images.chunk(split), labels.chunk(split), strict=True):
        with autocast(bf16):
            outputs = network(some)
            logits = outputs if isinstance(outputs, Tensor) else outputs.logits
            loss = F.cross_entropy(logits, theirs) / split
        loss.backward()
        total += float(loss.detach())  # each of the scripts reads the loss of each step
    optimizer.step()
    optimizer.zero_grad()
    return total


def momentum_sgd(network: nn.Module, rate: float = RATE) -> torch.optim.Optimizer:
    """What all of them build: torch's SGD as it comes."""
    return torch.optim.SGD(network.parameters(), lr=rate, momentum=MOMENTUM)


# ---- input


class EncodedPictures(Dataset[tuple[Tensor, int]]):
    """Pictures in memory as a PyTorch data set reads them: decoded and transformed one by one."""

    def __init__(self, encoded: Sequence[bytes], labels: Sequence[int], transform: Callable[[Image.Image], Tensor]) -> None:
        self.encoded, self.labels, self.transform = encoded, labels, transform

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.open(io.BytesIO(self.encoded[index])).convert("RGB")), self.labels[index]


def big_transfer_transform(resize: int, crop: int) -> Callable[[Image.Image], Tensor]:
    """The training transform of big_transfer's script."""
    steps = [
        transforms.Resize((resize, resize)), transforms.RandomCrop((crop, crop)), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]  # fmt: skip
    return transforms.Compose(steps)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Passes over a loader without end, as big_transfer's `recycle`."""
    while True:
        yield from loader


def trainer_run(
    network: nn.Module, data: Dataset[Any], *, steps: int, batch_size: int, folder: Path, bf16: bool = False, rate: float = RATE
) -> float:
    """So many steps of transformers' `Trainer`; its mean training loss."""
    from transformers import Trainer, TrainingArguments

    def collate(rows: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([row[0] for row in rows]), "labels": torch.tensor([row[1] for row in rows])}

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=rate, use_cpu=True,
        bf16=bf16, save_strategy="no", report_to="none", disable_tqdm=True, lr_scheduler_type="constant", max_grad_norm=0.0,
        logging_strategy="no", remove_unused_columns=False, dataloader_num_workers=0, seed=0,
    )  # fmt: skip
    optimizer = momentum_sgd(network, rate)
    trainer = Trainer(model=network, args=arguments, train_dataset=data, data_collator=collate, optimizers=(optimizer, None))
    return float(trainer.train().training_loss)
