"""What all tests share: one thread, no network but loopback, a stand-in of the hub, and a tiny BiT."""

import os
import socket
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "recipes"), str(TESTS.parent / "benchmarks")]

from hub import LoopbackHub  # noqa: E402  (must run before the libraries read HF_ENDPOINT)

HUB = LoopbackHub()
SCRATCH = tempfile.TemporaryDirectory(prefix="bit_mixup_tests_")
os.environ.update(
    {
        "HF_ENDPOINT": HUB.url,
        "HF_HOME": SCRATCH.name,
        "XDG_CACHE_HOME": SCRATCH.name,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HYPOTHESIS_STORAGE_DIRECTORY": SCRATCH.name,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",  # so that kernels of GPUs can be tested without one
    }
)
for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")]:
    del os.environ[name]

_connect = socket.socket.connect


def _connect_to_loopback_only(self: socket.socket, address: object) -> object:
    if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple):
        assert address[0] in ("127.0.0.1", "::1", "localhost"), f"a test opened a connection to {address}"
    return _connect(self, address)  # type: ignore[arg-type]


socket.socket.connect = _connect_to_loopback_only  # type: ignore[method-assign, assignment]

import datasets  # noqa: E402
import pytest  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

from bit_mixup import environment  # noqa: E402
from bit_mixup.images import View  # noqa: E402
from bit_mixup.models import save_model  # noqa: E402

datasets.config.USE_PARQUET_EXPORT = False
environment.CPU_INFO = Path(SCRATCH.name) / "no_cpuinfo"  # a processor without bf16, so that tests are the same on all
torch.set_num_threads(1)

# Stock timm builds it: one normalisation group lets channels be few. The last feature map of a 40 px picture is 2 x 2.
TINY_ARGS = {"channels": (32, 32, 64, 64), "stem_chs": 16, "norm_layer": "groupnorm1"}


@pytest.fixture(scope="session")
def hub() -> LoopbackHub:
    return HUB


@pytest.fixture(scope="session")
def tiny_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BiT of few parameters with random weights, in timm's hub layout, with a head of 4 classes."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    torch.manual_seed(0)
    model = timm.create_model("resnetv2_50x1_bit", pretrained=False, num_classes=4, **TINY_ARGS)
    view = View(resize_size=48, crop_size=40, flip=True, interpolation="bilinear")
    save_model(model, folder, label_names=["a", "b", "c", "d"], view=view, std_eps=1e-8)
    return folder


@pytest.fixture
def quick(tiny_bit: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a run of 6 steps on 40 digits that takes well under a second or two."""
    return {
        "dataset": "digits",
        "model": str(tiny_bit),
        "examples_per_class": 4,
        "steps": 6,
        "batch_size": 16,
        "resize_size": 48,
        "crop_size": 40,
        "flip": False,
        "threads": 1,
        "save_every": 2,
        "output_dir": tmp_path / "run",
    }
