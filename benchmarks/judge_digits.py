"""Are samples of a digits recipe digits? `python -m benchmarks.judge_digits out/samples.npz`.

A judge of another kind than the generator, an RBF support vector machine on 8x8 pixels trained on the real training
split, says which digit each sample is; the pixel variance within classes, against the real one, says whether they
differ.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

from datamodules.digits import DigitsData


def pixels(images: torch.Tensor) -> np.ndarray:
    """uint8 (N, 3, S, S) -> (N, 64) in 0..1: grey, averaged down to 8x8."""
    grey = images.float().mean(1, keepdim=True) / 255
    return torch.nn.functional.adaptive_avg_pool2d(grey, 8).flatten(1).numpy()


def real(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of the real "train" or "val" split."""
    data = DigitsData(image_size=8, batch_size=1)
    data.setup()
    rows = data.train_set if split == "train" else data.val_set
    return pixels(rows.images), rows.labels.numpy()


def within_class_variance(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the summed pixel variance."""
    return float(np.mean([x[labels == label].var(0).sum() for label in np.unique(labels)]))


def judge(images: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """uint8 (N, 3, S, S) and the asked labels -> accuracy of the samples and of real test digits, variance ratio."""
    train_x, train_y = real("train")
    test_x, test_y = real("val")
    machine = SVC(kernel="rbf").fit(train_x, train_y)
    x = pixels(images)
    return {
        "samples": len(images),
        "accuracy": float((machine.predict(x) == labels).mean()),
        "accuracy_of_real_test_digits": float((machine.predict(test_x) == test_y).mean()),
        "variance_ratio": within_class_variance(x, labels) / within_class_variance(train_x, train_y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", type=Path, help="samples.npz of make sample")
    arrays = np.load(parser.parse_args().samples)
    for name, value in judge(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), arrays["labels"]).items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()
