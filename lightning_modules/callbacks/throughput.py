"""Images per second, FLOP/s and MFU, measured between logging steps so that no step waits for the device."""

import time
from typing import Any

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.base import GenerativeModule, batch_rows

# Dense bf16 peaks in FLOP/s from the makers' data sheets; the longest matching name wins.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name, None where unknown."""
    found = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def count_flops(step: Any) -> int:
    """FLOPs (2 per multiply-accumulate) of matmuls, convolutions and attention in one call of `step`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class Throughput(L.Callback):
    """Logs train/images_per_s, train/tflops (all processes together) and train/mfu (per device, where known).

    FLOPs of a training step are three times the forward's, the convention of the field.
    """

    def __init__(self) -> None:
        self.images_per_s: float | None = None
        self._images = 0
        self._measured_at = -1
        self._since: float | None = None
        self._flops_per_image: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: GenerativeModule, batch: Any, batch_idx: int) -> None:
        if self._flops_per_image is None:
            size = batch_rows(batch)
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                generator = torch.Generator(pl_module.device).manual_seed(0)
                forward = count_flops(lambda: pl_module.training_loss(batch, generator))
            self._flops_per_image = 3 * forward / size

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: GenerativeModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += batch_rows(batch) * trainer.world_size
        step, every = trainer.global_step, trainer.log_every_n_steps
        if not every or step % every or step == self._measured_at:
            return
        self._measured_at = step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._since is not None:  # the first interval holds compilation and warm-up
            self.images_per_s = self._images / (now - self._since)
            pl_module.log_dict(self._rates(trainer, pl_module))
        self._images, self._since = 0, now

    def _rates(self, trainer: L.Trainer, pl_module: GenerativeModule) -> dict[str, float]:
        flops = self.images_per_s * self._flops_per_image
        rates = {"train/images_per_s": self.images_per_s, "train/tflops": flops / 1e12}
        name = torch.cuda.get_device_name() if pl_module.device.type == "cuda" else "cpu"
        if peak := peak_flops(name):
            rates["train/mfu"] = flops / trainer.world_size / peak
        return rates
