"""Do the counts that plans are made of agree with the networks that timm builds?"""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from bit_mixup.catalog import ARCHITECTURES, DEFAULT_MODEL, PUBLISHED, list_bit_models
from bit_mixup.models import load_bit
from bit_mixup.weights import BUNDLED, find_weights


def test_all_published_weights_are_listed() -> None:
    assert len(list_bit_models()) == len(set(list_bit_models())) == 15
    assert set(list_bit_models()) == set(timm.list_pretrained("resnetv2_*_bit*"))
    assert set(ARCHITECTURES) == set(timm.list_models("resnetv2_*_bit"))
    assert DEFAULT_MODEL in list_bit_models()
    assert all(model.upstream.startswith("ImageNet-") for model in PUBLISHED.values())


@pytest.mark.parametrize("name", list_bit_models())
def test_the_table_agrees_with_timm(name: str) -> None:
    published = PUBLISHED[name]
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.input_size == (3, published.input_size, published.input_size)
    assert (cfg.num_classes, cfg.interpolation) == (published.num_classes, published.interpolation)
    assert cfg.hf_hub_id == f"timm/{name}"  # what is fetched
    weights = find_weights(name)
    assert (weights.pretrained_cfg["mean"], weights.pretrained_cfg["std"]) == (cfg.mean, cfg.std)
    assert (weights.input_size, weights.interpolation) == (published.input_size, published.interpolation)
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert published.parameters == parameters
    assert published.download_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert published.architecture.num_features == model.num_features
    assert published.architecture.stem_channels == model.stem.conv.out_channels
    head = sum(parameter.numel() for parameter in model.get_classifier().parameters())
    assert published.architecture.parameter_count() == parameters - head
    assert published.architecture.parameter_count(7) == parameters - head + 7 * (model.num_features + 1)


def saved_bytes(model: torch.nn.Module, size: int, count: int) -> int:
    """Bytes of all storages that autograd keeps for the backward pass of `count` pictures."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.rand(count, 3, size, size)).sum()
        assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("name", "size"), [("resnetv2_50x1_bit", 64), ("resnetv2_50x1_bit", 96), ("tiny", 40), ("tiny", 57), (BUNDLED, 40)]
)
def test_activation_memory_is_what_autograd_keeps(name: str, size: int, tiny_bit: Path) -> None:
    """For each further picture: what does not grow with the batch (weights, standardised weights) cancels."""
    if name in ARCHITECTURES:
        model, shape = timm.create_model(name, pretrained=False, num_classes=10), ARCHITECTURES[name]
    else:
        path = str(tiny_bit) if name == "tiny" else name
        model, shape = load_bit(path, num_classes=10), find_weights(path).shape
    measured = (saved_bytes(model, size, 3) - saved_bytes(model, size, 1)) / 2
    assert shape.activation_bytes(size) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", BUNDLED])
def test_parameters_of_narrow_networks_are_counted(name: str, tiny_bit: Path) -> None:
    path = str(tiny_bit) if name == "tiny" else name
    model = load_bit(path, num_classes=11)
    assert find_weights(path).shape.parameter_count(11) == sum(parameter.numel() for parameter in model.parameters())
