"""Where the map between pixels and JetFormer's decoder starts from, other than from the identity.

For the ablations of the paper (arXiv 2411.19722): a flow that was trained alone, and principal components of the
training images. In: files and data modules. Out: the weights, in place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Generator, Tensor, nn

from layers.checkpoint import check_fit
from layers.flows.linear import PCA
from layers.tokenizers.base import Tokenizer
from lightning_modules.weights import read_own

FIT_IMAGES = 4096  # training images that principal components are fitted to
FLOWS = ("net.", "front.jet.")  # what a flow's couplings are below: in a Jet's checkpoint, in a JetFormer's


def load_flow(flow: nn.Module, path: str | Path) -> None:
    """Replace a flow's weights by those of a checkpoint of ours, of a Jet or of a JetFormer.

    Raises FileNotFoundError, or ValueError for a file of another kind or a flow that does not fit.
    """
    state = read_own(path, None)
    if state is None:
        raise ValueError(f"{path} (flow_from) is no checkpoint of ours: name one of a run, such as of EXP=jet_digits")
    found = {
        name.removeprefix(prefix): tensor
        for prefix in FLOWS
        for name, tensor in state.items()
        if name.startswith(f"{prefix}couplings.")
    }
    check_fit(found, flow.state_dict(), origin=f"the flow of {path} (flow_from)")
    flow.load_state_dict(found)


def fit_components(pca: PCA, tokenizer: Tokenizer, datamodule: Any) -> None:
    """Fit principal components to the tokens of the first training images; every process has the same."""
    pca.fit(_tokens(tokenizer, datamodule))


def _tokens(tokenizer: Tokenizer, datamodule: Any) -> Iterator[Tensor]:
    images = 0
    for batch in datamodule.ordered_loader("train"):
        if images >= FIT_IMAGES:
            return
        yield tokenizer(batch, Generator().manual_seed(images)).x
        images += len(batch["label"])
