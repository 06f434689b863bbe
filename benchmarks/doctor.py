"""How long do the doctor's checks take on many pictures, how much memory, and how soon does training start on them?

    python benchmarks/doctor.py                       # 100,000 pictures of noise, 32 x 32, in parquet shards of 20,000
    python benchmarks/doctor.py --pictures 20000

Makes the set in a temporary folder, measures in processes of their own, prints, and deletes it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SHARD = 20_000  # pictures
TEST_SHARE = 0.1
CLASSES = 10

FAST = """
from bit_mixup.doctor import visit
findings = visit(folder, preset="code", seed=0, full=False)
"""
FULL = """
from bit_mixup.doctor import visit
findings = visit(folder, preset="code", seed=0, full=True)
"""
TRAIN = """
more = {more}
import bit_mixup.workflow as workflow
from bit_mixup.cli import main

def judge(*arguments, **options):  # comes right after training
    result["seconds"], result["peak"] = time.perf_counter() - start, peak() - before
    raise KeyboardInterrupt
workflow.judge = judge
try:
    main(["fine-tune", "--dataset", folder, "--model", "bundled", "--preset", "light", "--resolution", "model", "--steps", "4",
          "--mixup-alpha", "0", "--batch-size", "16", "--threads", "1", "--output-dir", folder + "/run", "--overwrite", *more])
except KeyboardInterrupt:
    pass
"""
MEASURE = """
import contextlib, json, sys, threading, time
import bit_mixup.planning, bit_mixup.doctor
{imports}
folder, result = sys.argv[1], {{}}

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

def anonymous():
    # What the process itself holds. Mapped pages of the table come and go as the system likes, and are counted in the peak.
    return status("RssAnon")

def peak():
    return status("VmHWM")

most, done = [anonymous()], threading.Event()
def watch():
    while not done.wait(0.02):
        most[0] = max(most[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
before, own, start = peak(), anonymous(), time.perf_counter()
with contextlib.redirect_stdout(sys.stderr):
    exec(compile({work!r}, "work", "exec"))
done.set()
result.setdefault("seconds", time.perf_counter() - start)
result.setdefault("peak", peak() - before)
result["own"] = most[0] - own
result["found"] = [f"{{f.severity}}: {{f.what}}" for f in globals().get("findings", ()) if f.severity != "note"]
print(json.dumps(result))
"""


def make(folder: Path, pictures: int) -> None:
    """Shards of noise with labels, train and test."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features, Image
    from PIL import Image as Pillow

    draw = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {number}" for number in range(CLASSES)])})
    test = round(pictures * TEST_SHARE)
    for split, count in (("train", pictures - test), ("test", test)):
        starts = range(0, count, SHARD)
        for number, start in enumerate(starts):
            encoded = []
            for pixels in draw.integers(0, 256, (min(SHARD, count - start), 32, 32, 3), dtype=np.uint8):
                buffer = io.BytesIO()
                Pillow.fromarray(pixels).save(buffer, "png", compress_level=1)
                encoded.append({"bytes": buffer.getvalue(), "path": None})
            labels = draw.integers(0, CLASSES, len(encoded))
            table = pa.table({"image": encoded, "label": labels}, schema=features.arrow_schema)
            pq.write_table(table, folder / f"{split}-{number:05d}-of-{len(starts):05d}.parquet")


def measure(work: str, folder: Path, *, imports: str = "") -> dict[str, float]:
    """Seconds, and bytes above those of the process that has imported everything."""
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    code = MEASURE.format(work=work, imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def show(what: str, found: dict[str, float]) -> None:
    """Prints a line."""
    memory = f"peak {found['peak'] / 1e6:6.0f} MB, of its own {found['own'] / 1e6:6.0f} MB"
    print(f"{what:<64} {found['seconds']:7.1f} s  {memory}  {found['found'] or ''}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes, measures, prints, deletes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=100_000)
    pictures = parser.parse_args(argv).pictures
    with tempfile.TemporaryDirectory(prefix="bit_mixup_doctor_") as root:
        folder = Path(root) / "set"
        folder.mkdir()
        make(folder, pictures)
        size = sum(file.stat().st_size for file in folder.glob("*.parquet"))
        print(f"{pictures:,} pictures, {size / 1e6:,.0f} MB of parquet; memory above the imported process", flush=True)
        show("fast checks, the table read into the cache of `datasets` first", measure(FAST, folder))
        show("fast checks, the table in that cache", measure(FAST, folder))
        show("full scan", measure(FULL, folder))
        for what, more in (("", []), (", --streaming", ["--streaming"])):
            measured = measure(TRAIN.replace("{more}", repr(more)), folder, imports="import bit_mixup.workflow")
            show(f"fine-tuning{what}, until 4 steps of 16 examples are done", measured)


if __name__ == "__main__":
    main()
