"""Is mixup the convex combination of each example with another one, the same however a batch is cut?"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from bit_mixup.errors import ConfigError
from bit_mixup.hyperrule import LamLaw
from bit_mixup.mixup import Mixup, choose_partners, draw_lam, mix
from bit_mixup.sampling import cut_batch, group_sizes

LAWS: tuple[LamLaw, ...] = ("step", "example")


def batch(count: int, classes: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random pictures and targets."""
    numbers = torch.Generator().manual_seed(count)
    images = torch.rand(count, 3, 4, 5, generator=numbers).to(dtype)
    labels = torch.randint(classes, (count,), generator=numbers)
    return images, torch.nn.functional.one_hot(labels, classes).to(dtype)


def weights_of_mixing(mixup: Mixup, *, step: int, start: int, groups: list[int], seed: int = 0) -> list[float]:
    """The lam that each example was mixed with: example i alone has class i."""
    count = sum(groups)
    _, targets = mixup(
        torch.zeros(count, 3, 1, 1), torch.eye(count, dtype=torch.float64), seed=seed, step=step, start=start, groups=groups
    )
    return targets.diag().tolist()


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, "per example"])
def test_mix_is_a_loop_over_examples(lam: float | str) -> None:
    images, targets = batch(11, dtype=torch.float64)
    partners = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(11, dtype=torch.float64) if lam == "per example" else torch.full((11,), float(lam), dtype=torch.float64)
    mixed_images, mixed_targets = mix(images, targets, weights if lam == "per example" else float(lam), partners)
    for i, (weight, partner) in enumerate(zip(weights.tolist(), partners.tolist(), strict=True)):
        np.testing.assert_allclose(
            mixed_images[i], images[i].numpy() * weight + images[partner].numpy() * (1 - weight), rtol=1e-15
        )
        np.testing.assert_allclose(
            mixed_targets[i], targets[i].numpy() * weight + targets[partner].numpy() * (1 - weight), rtol=1e-15
        )
    assert i == 10


def test_lam_one_gives_the_example_and_lam_zero_its_partner() -> None:
    images, targets = batch(8)
    partners = torch.arange(8).roll(3)
    for one, zero in ((1.0, 0.0), (torch.ones(8), torch.zeros(8))):
        assert all(map(torch.equal, mix(images, targets, one, partners), (images, targets)))
        assert all(map(torch.equal, mix(images, targets, zero, partners), (images[partners], targets[partners])))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("alpha", [0.1, 1.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_stay_shares_and_arguments_stay_as_they_are(law: LamLaw, alpha: float, dtype: torch.dtype) -> None:
    images, targets = batch(20, dtype=dtype)
    kept = images.clone(), targets.clone()
    mixed_images, mixed_targets = Mixup(alpha=alpha, lam=law)(images, targets, seed=0, step=1, start=20, groups=[8, 8, 4])
    assert torch.equal(images, kept[0])
    assert torch.equal(targets, kept[1])
    assert (mixed_images.shape, mixed_images.dtype) == (images.shape, dtype)
    assert (mixed_targets.shape, mixed_targets.dtype) == (targets.shape, dtype)
    assert (mixed_targets >= 0).all()
    torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(20, dtype=dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(mixed_images.mean(), images.mean()) if law == "step" else None
    assert not torch.equal(mixed_images, images)


def test_alpha_zero_changes_no_bit() -> None:
    images, targets = batch(9)
    for law in LAWS:
        mixed = Mixup(alpha=0.0, lam=law)(images, targets, seed=0, step=3, start=27, groups=[9])
        assert all(map(torch.equal, mixed, batch(9)))
    assert draw_lam(0.0, seed=1, index=2) == 1.0


@pytest.mark.parametrize("law", LAWS)
def test_alpha_infinity_mixes_half_and_half(law: LamLaw) -> None:
    assert weights_of_mixing(Mixup(alpha=math.inf, lam=law), step=0, start=0, groups=[8, 2]) == [0.5] * 10


@pytest.mark.parametrize("batch_size", [2, 7, 8, 9, 10, 17, 64, 71, 73])
def test_each_example_has_one_partner_in_its_group_and_never_itself(batch_size: int) -> None:
    groups = group_sizes(batch_size)
    group_of = np.repeat(np.arange(len(groups)), groups)
    for step in range(20):
        partners = choose_partners(step * batch_size, groups, seed=step % 3).numpy()
        assert sorted(partners) == list(range(batch_size))
        assert (partners != np.arange(batch_size)).all()
        assert (group_of[partners] == group_of).all()


def test_every_other_member_of_a_group_is_as_likely_a_partner() -> None:
    count = 3_000
    for size in (2, 3, 8):
        partners = torch.stack([choose_partners(position, [size], seed=0) for position in range(count)])
        for example in range(size):
            shares = torch.bincount(partners[:, example], minlength=size) / count
            wanted = torch.full((size,), 1 / (size - 1)).index_fill(0, torch.tensor([example]), 0.0)
            assert (shares - wanted).abs().max() <= 4.5 * (wanted.max() * (1 - wanted.max()) / count).sqrt()


def test_partners_are_a_function_of_seed_and_position() -> None:
    orders = {
        (seed, start): tuple(choose_partners(start, [8, 9], seed=seed).tolist()) for seed in range(5) for start in range(20)
    }
    assert len(set(orders.values())) > 95
    for (seed, start), partners in orders.items():
        assert tuple(choose_partners(start, [8, 9], seed=seed).tolist()) == partners


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("batch_size", [16, 41, 64, 70])
def test_no_cut_changes_a_bit(law: LamLaw, batch_size: int) -> None:
    """Whole, or cut into micro-batches and processes of any size: the same pictures and targets, bit for bit."""
    mixup = Mixup(alpha=0.4, lam=law)
    images, targets = batch(batch_size, classes=batch_size)
    cuttings = {(1, None), (1, 9), (1, 16), (1, 17), (1, 30), (2, None), (2, 9), (2, 17)}
    seen = Counter[int]()
    for step in (0, 3):
        place = {"seed": 6, "step": step}
        whole = mixup(images, targets, **place, start=step * batch_size, groups=group_sizes(batch_size))
        for processes, micro_batch in cuttings:
            parts = []
            for share in cut_batch(batch_size, num_processes=processes, micro_batch=micro_batch):
                for cut in (cut for cut in share if cut.weight):
                    chosen = slice(cut.start, cut.start + cut.size)
                    start = cut.positions(step, batch_size)[0]
                    parts.append(mixup(images[chosen], targets[chosen], **place, start=start, groups=cut.groups))
            seen[len(parts)] += 1
            for together, separate in zip(whole, zip(*parts, strict=True), strict=True):
                assert torch.equal(together, torch.cat(separate)), (processes, micro_batch)
    assert len(seen) >= 2, "nothing was cut"


def test_lam_per_step_is_one_number_for_all_of_a_step() -> None:
    mixup = Mixup(alpha=0.4)
    by_step = [
        {
            lam
            for start, groups in ((0, [8, 8]), (160, [9]), (999, [2]))
            for lam in weights_of_mixing(mixup, step=step, start=start, groups=groups)
        }
        for step in range(30)
    ]
    assert all(len(lams) == 1 for lams in by_step)
    assert [lams.pop() for lams in by_step] == [draw_lam(0.4, seed=0, index=step) for step in range(30)]
    assert len({draw_lam(0.4, seed=0, index=step) for step in range(30)}) == 30
    assert draw_lam(0.4, seed=1, index=0) != draw_lam(0.4, seed=0, index=0)


def test_lam_per_example_depends_on_the_position_alone() -> None:
    mixup = Mixup(alpha=0.4, lam="example")
    whole = weights_of_mixing(mixup, step=0, start=100, groups=[8, 8, 8])
    assert len(set(whole)) == 24
    assert weights_of_mixing(mixup, step=5, start=100, groups=[8, 8, 8]) == whole
    assert weights_of_mixing(mixup, step=0, start=108, groups=[8, 8]) == whole[8:]
    assert weights_of_mixing(mixup, step=0, start=100, groups=[8, 8, 8], seed=1) != whole


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 5.0])
def test_lam_has_the_moments_of_the_beta_distribution(alpha: float) -> None:
    count = 4_000
    lams = np.array([draw_lam(alpha, seed=seed, index=3) for seed in range(count)])
    assert ((lams >= 0) & (lams <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = variance**2 * (3 - 6 / (2 * alpha + 3))  # central moment
    assert abs(lams.mean() - 0.5) < 4 * math.sqrt(variance / count)
    assert abs(((lams - 0.5) ** 2).mean() - variance) < 4 * math.sqrt((fourth - variance**2) / count)
    assert (lams > 0.5).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(count)), "not folded to one side"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": -0.1}, "alpha is -0.1"), ({"alpha": math.nan}, "alpha is nan"), ({"alpha": 0.1, "lam": "batch"}, '"batch"')],
)
def test_impossible_laws_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixup(**options)  # type: ignore[arg-type]
