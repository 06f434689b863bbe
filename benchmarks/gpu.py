"""How long does a training step take on a GPU, beside those of others, and what is left of what the GPU could do?

    python benchmarks/gpu.py

Three cases: R50x1 at 128 and at 480 pixels, R101x3 at 128; ten classes, random weights, bf16, pictures that are on the device
already. All ways of a case run in one process, one after the other in each round, and take a few steps each; a rate of 0 leaves
the weights as they are, so that losses must agree. The floor is what a step would take if each layer reached either the rate of
the largest matrix product or the bandwidth of the largest copy measured here, whichever costs it more time. Writes as it goes:
what does not fit into --seconds is left out, and said so.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
import timm
import torch
import torch.nn.functional as F
import triton
from accelerate import Accelerator
from harness import Work, interleave, machine, table
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bit_mixup.environment import Speedups
from bit_mixup.hyperrule import HyperParameters
from bit_mixup.laws import TrainingLaw
from bit_mixup.layers import fused_norm, make_quick
from bit_mixup.objectives import SoftmaxCrossEntropy
from bit_mixup.sampling import cut_batch
from bit_mixup.training import StepWork

CLASSES, RATE = 10, 0.0


@dataclass(frozen=True)
class Case:
    """A network, and what it is shown."""

    architecture: str
    edge: int
    batch_size: int

    steps: int  # of a way in a round

    @property
    def name(self) -> str:
        return f"{self.architecture.removeprefix('resnetv2_').removesuffix('_bit').upper().replace('X', 'x')} at {self.edge} px"

    def model(self) -> ResNetV2:
        torch.manual_seed(0)
        with torch.device("cuda"):  # where random weights take least time
            model = timm.create_model(self.architecture, num_classes=CLASSES)
        assert isinstance(model, ResNetV2)
        nn.init.normal_(model.head.fc.weight, std=0.01)  # timm's zeros would leave the body without gradients
        return model


CASES = (Case("resnetv2_50x1_bit", 128, 256, 5), Case("resnetv2_50x1_bit", 480, 32, 3), Case("resnetv2_101x3_bit", 128, 64, 3))


class Resident(StepWork):
    """The backward passes of a step, with pictures that are on the device already, as for the others."""

    batch: tuple[Tensor, Tensor]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        return self.batch


class Nothing:
    """A stream that is never read."""

    def ids(self, positions: Sequence[int]) -> list[str]:
        return [str(position) for position in positions]

    def __getitems__(self, positions: Sequence[int]) -> Any:
        return np.zeros((len(positions), 3, 1, 1), np.uint8), np.zeros(len(positions), np.int64)


def ours(case: Case, pictures: Tensor, labels: Tensor, accelerator: Accelerator, **off: Any) -> Callable[[], Tensor]:
    """What `bit_mixup.train` does in a step, without its log, checkpoints and signals."""
    speedups, law = Speedups(**off), TrainingLaw()
    hyper = HyperParameters(
        resize_size=case.edge, crop_size=case.edge, steps=2**20, warmup_steps=0, decay_steps=(), batch_size=case.batch_size,
        base_lr=peers.RATE,
    )  # fmt: skip
    model = case.model().train()
    work = Resident(model, Nothing(), hyper, accelerator, law, SoftmaxCrossEntropy(), None, speedups, 0, 0)
    work.cut(cut_batch(case.batch_size, micro_batch=case.batch_size, group_size=law.group_size), first_step=0)
    work.batch = pictures, labels
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=peers.MOMENTUM, fused=speedups.fused_optimizer)

    def step() -> Tensor:
        loss, _ = work.backward(0, work.own)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def plain(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """The step of the others: autocast, loss, backward, torch's SGD as it comes; the loss is not read in each step."""
    network = network.cuda().train()
    optimizer = peers.momentum_sgd(network, RATE)

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            outputs = network(images)
            loss = F.cross_entropy(outputs if isinstance(outputs, Tensor) else outputs.logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def captured(case: Case, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Our layers; forward, backward and the optimizer recorded once as a CUDA graph, which is then replayed."""
    model = case.model().cuda().to(memory_format=torch.channels_last).train()
    make_quick(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=peers.MOMENTUM, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step()

    def replay(kept: Any = (model, optimizer)) -> Tensor:  # whose memory the graph writes to
        graph.replay()
        return loss.detach()

    return replay


def ways(case: Case, accelerator: Accelerator, *, compiled: bool) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """By name what makes each way ready."""
    draw = np.random.default_rng(0)
    shown = draw.integers(0, 256, (case.batch_size, case.edge, case.edge, 3), dtype=np.uint8)
    pictures = torch.from_numpy(shown).cuda().permute(0, 3, 1, 2)  # lie channels last, as decoded ones do
    labels = (torch.arange(case.batch_size) % CLASSES).cuda()
    images = pictures.float().div(255).sub(0.5).div(0.5).contiguous()
    last = images.contiguous(memory_format=torch.channels_last)

    def timms() -> ResNetV2:
        return case.model().to(memory_format=torch.channels_last)

    yield "timm, channels last", lambda: plain(timms(), last, labels)
    if case is CASES[0]:
        yield "timm", lambda: plain(case.model(), images, labels)
    yield "big_transfer", lambda: plain(peers.big_transfer_of(case.model()), images, labels)
    yield "transformers", lambda: plain(peers.transformers_of(case.model()), images, labels)
    yield "ours", lambda: ours(case, pictures, labels, accelerator)
    yield "ours, normalisation not fused", lambda: ours(case, pictures, labels, accelerator, fused_norms=False)
    if case is CASES[0]:
        yield "ours, timm's layers", lambda: ours(case, pictures, labels, accelerator, quick_layers=False)
    yield "ours, CUDA graph", lambda: captured(case, last, labels)
    if compiled:
        yield "timm, channels last, torch.compile", lambda: plain(torch.compile(timms()), last, labels)  # type: ignore[arg-type]


def seconds_of(work: Callable[[], Any], repeats: int = 10) -> float:
    """The least time of some, by the device's own clock."""
    work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


def ceilings() -> dict[str, float]:
    """Operations a second of a large bf16 matrix product, bytes a second (read and written) of a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return {
        "operations": 2 * 8192**3 / seconds_of(lambda: a @ b),
        "bytes": 2 * source.nbytes / seconds_of(lambda: target.copy_(source)),
    }


def floor(case: Case, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that a step takes at the least, by kind of layer; and the operations of its convolutions.

    bf16 maps are read and written once by each operation that must: a convolution and its two gradients; normalisation with ReLU,
    and its gradient; the sum at the end of each block, and that of gradients at its start. Weights are fp32: read for
    standardisation and its gradient, and by the optimizer; their gradients and momenta are fp32, too.
    """
    found: Counter[str] = Counter()
    model = case.model().to("meta")
    hooks = []

    def at_conv(conv: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        work = 2.0 * output.numel() * conv.weight[0].numel() * case.batch_size
        moved = 2.0 * ((inputs[0].numel() + output.numel()) * case.batch_size + conv.weight.numel())
        passes = 2 if inputs[0].shape[1] == 3 else 3  # no gradient by pictures
        found["convolutions"] += passes * max(work / rates["operations"], moved / rates["bytes"])
        found["operations"] += passes * work

    def at_norm(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        found["normalisation and ReLU"] += 5 * 2.0 * output.numel() * case.batch_size / rates["bytes"]

    def at_block(block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        found["sums of branches"] += 3 * 2.0 * (output.numel() + inputs[0].numel()) * case.batch_size / rates["bytes"]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(at_conv))  # type: ignore[arg-type]
        elif isinstance(module, nn.GroupNorm):
            hooks.append(module.register_forward_hook(at_norm))  # type: ignore[arg-type]
        elif hasattr(module, "conv3"):
            hooks.append(module.register_forward_hook(at_block))  # type: ignore[arg-type]
    model(torch.zeros(1, 3, case.edge, case.edge, device="meta"))
    count = sum(parameter.numel() for parameter in model.parameters())
    found["weights"] += count * (4 + 2 + 4 + 2 + 4 + 5 * 4) / rates["bytes"]
    return dict(found)


KINDS = {  # by what the names of kernels hold, in this order
    "normalisation and ReLU": (
        "_forward",
        "_backward",
        "group_norm",
        "GroupNorm",
        "RowwiseMoments",
        "ComputeFused",
        "InternalGrad",
    ),
    "weight standardisation": ("layer_norm", "LayerNorm", "GammaBeta", "batch_norm", "bn_fw", "bn_bw"),
    "optimizer": ("multi_tensor", "FusedSgd", "fused_sgd"),
    "convolutions": ("conv", "gemm", "xmma", "cutlass", "cudnn", "wgrad", "dgrad", "nvjet", "sm90_", "sm80_", "nchw", "nhwc"),
    "copies and casts": ("copy", "Memcpy", "Memset", "transpose", "cat"),
    "sums and other elementwise operations": ("elementwise", "reduce", "pool", "softmax", "nll"),
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "other")


def profiled(step: Callable[[], Tensor]) -> dict[str, Any]:
    """Seconds of a step on the device by kind of kernel, the kernels that take most, and the share of time without any."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / 3
    kinds: defaultdict[str, float] = defaultdict(float)
    kernels: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            took = event.device_time_total / 3e6
            kinds[kind_of(event.name)] += took
            kernels[event.name][0] += took
            kernels[event.name][1] += 1 / 3
    most = sorted(kernels.items(), key=lambda item: -item[1][0])[:15]
    return {
        "seconds": seconds,
        "device_seconds": sum(kinds.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [{"name": name[:160], "seconds": took, "calls": calls} for name, (took, calls) in most],
    }


def kernel_alone(rates: dict[str, float]) -> list[dict[str, Any]]:
    """Normalisation and ReLU of single layers: the fused kernel, torch's own, and the least time that their bytes take.

    Seconds on the device, without those of launching: of replays of a CUDA graph.
    """
    rows = []
    kernel: Any = fused_norm()
    for count, channels, edge in ((256, 64, 32), (256, 256, 32), (256, 1024, 8), (32, 256, 120)):
        x = torch.randn(count, channels, edge, edge, device="cuda", dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (torch.randn(channels, device="cuda").requires_grad_() for _ in range(2))
        row: dict[str, Any] = {"shape": [count, channels, edge, edge]}
        for side in ("fused", "torch"):

            def forward(side: str = side, inputs: Any = (x, weight, bias)) -> Tensor:
                with torch.autocast("cuda", torch.bfloat16):  # as in a step
                    if side == "fused":
                        found: Tensor = kernel.apply(*inputs, 32, 1e-5, True)
                        return found
                    return F.relu(F.group_norm(inputs[0], 32, *inputs[1:], 1e-5))

            given = torch.randn_like(forward())

            def both(inputs: Any = (x, weight, bias), given: Tensor = given) -> None:
                torch.autograd.grad(forward(), inputs, given)

            row[f"{side} forward"], whole = (
                triton.testing.do_bench_cudagraph(work, return_mode="median") / 1000 for work in (forward, both)
            )
            row[f"{side} backward"] = whole - row[f"{side} forward"]
        row |= {"floor forward": 2 * x.nbytes / rates["bytes"], "floor backward": 3 * x.nbytes / rates["bytes"]}
        rows.append(row)
        print(f"{row['shape']}: " + ", ".join(f"{name} {1e6 * row[name]:.0f} us" for name in row if name != "shape"), flush=True)
    return rows


def waits(step: Callable[[], Tensor]) -> str:
    """What in a step waits for the device, as torch says it; nothing, it is to be hoped."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def measured(case: Case, accelerator: Accelerator, rates: dict[str, float], *, rounds: int, compiled: bool) -> dict[str, Any]:
    """All of a case."""
    steps, memories, ready = {}, {}, {}
    for name, make in ways(case, accelerator, compiled=compiled):
        torch.cuda.empty_cache()
        held, start = torch.cuda.memory_allocated(), time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.device("cuda"):
                steps[name] = make()
            float(steps[name]()), float(steps[name]())
        except Exception as error:  # a way that fails here is said so, and the others go on
            steps.pop(name, None)
            print(f"{name} is left out: {type(error).__name__}: {error}", flush=True)
            continue
        memories[name] = torch.cuda.max_memory_allocated() - held
        ready[name] = time.perf_counter() - start
        print(f"{case.name}: {name} ready after {ready[name]:.1f} s", flush=True)

    def timed(name: str) -> Callable[[], Work]:
        def run() -> Work:
            torch.backends.cudnn.benchmark = not name.startswith("transformers")  # as timm's and big_transfer's scripts, and we
            for _ in range(case.steps):
                loss = steps[name]()
            return Work(steps=case.steps, images=case.steps * case.batch_size, value=float(loss))

        return run

    rows = interleave({name: timed(name) for name in steps}, rounds=rounds, tolerance={name: 0.02 for name in steps})
    limits = floor(case, rates)
    operations = limits.pop("operations")
    least = sum(limits.values())
    shares = {row.name: least / (sorted(row.wall)[len(row.wall) // 2] / case.steps) for row in rows}
    assert all(operations < 1.02 * rates["operations"] * min(row.wall) / case.steps for row in rows), "more than the GPU can do"
    print(f"\n{case.name}, batch {case.batch_size}: {operations / 1e12:.2f} TFLOP a step, floor {1000 * least:.2f} ms\n")
    print(table(rows))
    print(json.dumps({"share_of_floor": {name: round(share, 3) for name, share in shares.items()}}), flush=True)
    result = {
        "case": {**asdict(case), "name": case.name}, "rows": [asdict(row) for row in rows], "memory": memories,
        "ready_seconds": ready, "operations": operations, "floor": limits, "share_of_floor": shares,
    }  # fmt: skip
    if "ours" in steps:
        result["waits"] = waits(steps["ours"])
        print(f"what waits for the device in a step: {result['waits'] or 'nothing'}")
    result["profile"] = {name: profiled(steps[name]) for name in ("ours", "timm, channels last") if name in steps}
    for name, seen in result["profile"].items():
        spent = ", ".join(f"{kind} {1000 * took:.2f}" for kind, took in seen["kinds"].items())
        print(f"{name}: {1000 * seen['seconds']:.2f} ms a step, on the device {1000 * seen['device_seconds']:.2f}: {spent}")
        for kernel in seen["kernels"][:10]:
            print(f"    {1000 * kernel['seconds']:.3f} ms, {kernel['calls']:.0f} calls: {kernel['name'][:110]}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3600, help="no case is begun, and nothing compiled, after so long")
    parser.add_argument("--compile", type=int, nargs="*", default=[0, 1, 2], help="cases that torch.compile is measured for, too")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/gpu.json"))
    asked = parser.parse_args(argv)
    start = time.monotonic()
    torch.backends.cudnn.benchmark = True
    assert fused_norm() is not None, "the fused kernel does not work here"
    accelerator = Accelerator(mixed_precision="bf16")
    rates = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: {rates['operations'] / 1e12:.0f} TFLOP/s, {rates['bytes'] / 1e12:.2f} TB/s", flush=True
    )
    written: dict[str, Any] = {
        "machine": machine(), "device": torch.cuda.get_device_name(), "rates": rates, "layers": kernel_alone(rates), "cases": [],
    }  # fmt: skip

    def save() -> None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    save()
    for number, case in enumerate(CASES):
        if time.monotonic() - start > asked.seconds:
            print(f"{case.name} is left out: no time")
            continue
        written["cases"].append(measured(case, accelerator, rates, rounds=asked.rounds, compiled=number in asked.compile))
        save()
        torch._dynamo.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
