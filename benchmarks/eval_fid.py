"""A published figure, by the published path: `python -m benchmarks.eval_fid png/ --stats jit_in256_stats.npz`.

PNG files of a folder (`make eval SAVE=png/`) go through torch-fidelity's own reader, extractor and formulas, as in
MAR's and JiT's evaluations; only the statistics of the real images come from an npz file, which the released
torch-fidelity cannot read by itself. What `make eval` reports must agree with it.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_fidelity import metric_fid, metric_isc
from torch_fidelity.utils import extract_featuresdict_from_input_id

from experiments.errors import one_line_errors
from lightning_modules.extractors import InceptionV3
from lightning_modules.reference import load_reference


def fidelity(folder: Path, stats: Path, network: Any, *, batch_size: int) -> dict[str, float]:
    """FID, and IS where `network` gives logits too, of PNG files by torch-fidelity's code.

    `network` is an extractor of torch-fidelity's kind: its `features_list` names features and, if it has them, logits.
    """
    cuda = next(network.parameters()).is_cuda
    options = {"input1": str(folder), "cuda": cuda, "batch_size": batch_size, "verbose": False}
    rows = extract_featuresdict_from_input_id(1, network, **options)
    features, *logits = (rows[layer] for layer in network.features_list)
    ours, reference = metric_fid.fid_features_to_statistics(features), load_reference(stats)
    # the library wants both means to be of one type, which is the features' float32
    real = {"mu": reference.mu.numpy().astype(ours["mu"].dtype), "sigma": reference.sigma.numpy()}
    result = metric_fid.fid_statistics_to_metric(ours, real, False)
    for part in logits:
        result |= metric_isc.isc_features_to_metric(part)
    return {name: float(np.real(value)) for name, value in result.items()}


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="PNG files")
    parser.add_argument("--stats", type=Path, required=True, help="npz with mu and sigma")
    parser.add_argument("--inception", type=Path, help="the Inception weights file, if not in torch's cache folder")
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    network = InceptionV3(options.inception).net.to("cuda" if torch.cuda.is_available() else "cpu")
    result = fidelity(options.folder, options.stats, network, batch_size=options.batch_size)
    for name, value in result.items():
        print(f"{name:32} {value:.6g}")


if __name__ == "__main__":
    main()
