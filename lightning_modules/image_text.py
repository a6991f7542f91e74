"""What a model of images and texts says of given ones: likelihoods of both, captions, the likeliest of some texts.

JetFormer is trained by the likelihoods, and evaluated so (Tschannen et al., arXiv 2411.19722; official `train.py` and
`predict_fns.py`). Unusual: classification is asking which of the classes' names is likeliest behind an image. In: uint8
images (B, 3, H, W), texts or labels. Out: nats, bits, texts. A level becomes a point of its interval by chance, so that
likelihoods of images are bounds, by one draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.flows.factored import FactoredFlow, Latents
from layers.flows.jet import normal_nats
from layers.heads.gmm import GMMHead
from layers.heads.mixtures import quantile
from layers.likelihood import bits_per_dim
from layers.networks.jetformer import Hidden, JetFormerDecoder
from layers.random import Generators, randn
from layers.samplers.autoregressive import autoregress
from layers.text.base import TextTokenizer
from layers.text.batches import TextBatch, label_batch
from layers.tokenizers.base import Tokenizer, Tokens
from lightning_modules.base import eval_mode

Asked = Tensor | Sequence[int] | Sequence[str]  # what images are said to show: labels (B,), or B captions


class TextNats(NamedTuple):
    """-log p in nats of ids (B, T), and which of them count (B, T): padding does not."""

    nats: Tensor
    counted: Tensor

    def of_texts(self) -> Tensor:
        """(B,), in nats of the whole text."""
        return (self.nats * self.counted).sum(1)

    def per_word(self) -> Tensor:
        """(B,), means over the ids that count."""
        return self.of_texts() / self.counted.sum(1)


class ImageText(nn.Module):
    """Put before GenerativeModule and behind WithText. The module makes the parts that are named here."""

    tokenizer: Tokenizer
    text: TextTokenizer | None
    text_len: int
    ignore_pad: bool
    front: FactoredFlow
    net: JetFormerDecoder
    head: GMMHead

    # Likelihoods

    def hidden(
        self, soft: Tensor, texts: Mapping[str, Any], text_first: Tensor, dropped: Tensor | None = None
    ) -> Hidden:
        """What each token is predicted from; see the decoder."""
        return self.net(soft, texts["text"], text_first, text_mask=self.mask_of(texts), drop_prefix=dropped)

    def mask_of(self, texts: Mapping[str, Any]) -> Tensor | None:
        """Which ids are there; None where all are, which spares the mask."""
        return texts["text_mask"] if self.ignore_pad else None

    def image_nats(self, h: Tensor, latents: Latents) -> Tensor:
        """-log p of images' tokens (B,) from h (B, N, E): mixture, standard normal and volume."""
        unused = h.new_zeros(1, 1)  # the contract's times and noise, which a mixture has no use for
        nll = self.head(latents.soft.flatten(0, 1), h.flatten(0, 1), unused, unused)["nll"].view(h.shape[:2])
        return nll.sum(1) + normal_nats(latents.rest) - latents.logdet

    def text_nats(self, h: Tensor, texts: Mapping[str, Any]) -> TextNats:
        """-log p of ids (B, T) from h (B, T, E)."""
        logits = self.net.text_logits(h).float()
        nats = F.cross_entropy(logits.flatten(0, 1), texts["text"].flatten(), reduction="none")
        return TextNats(nats.view(texts["text"].shape), texts["text_loss"])

    def bits(self, nats: Tensor, tokens: Tokens) -> Tensor:
        """Bits per dimension of pixels (B,) from -log p of their tokens (B,)."""
        return bits_per_dim(-nats, tokens.logdet, tokens.x[0].numel()).float()

    def image_bits(self, images: Tensor, asked: Asked, generator: Generators = None) -> Tensor:
        """Bits per dimension (B,) of each image behind its class label, or behind its caption."""
        return self._given(images, asked, generator, text_first=True)[0]

    def caption_nats(self, images: Tensor, captions: Sequence[str], generator: Generators = None) -> Tensor:
        """-log p of each image's caption behind it, in nats per word (B,), its end being one."""
        self._check_text()
        return self._given(images, captions, generator, text_first=False)[1]

    @torch.no_grad()
    def _given(self, images: Tensor, asked: Asked, generator: Generators, *, text_first: bool) -> tuple[Tensor, Tensor]:
        """Bits of images (B,), nats per word of texts (B,), in this order of the two.

        Raises ValueError for more or fewer labels or captions than images, and for labels where captions are learnt.
        """
        if len(asked) != len(images):
            raise ValueError(f"{len(asked)} labels or captions were given for {len(images)} images: give each its own")
        with eval_mode(self):
            texts, (tokens, latents) = self._encoded_texts(asked), self._encoded_images(images, generator)
            h = self.hidden(latents.soft, texts, torch.full((len(images),), text_first, device=self.device))
            return self.bits(self.image_nats(h.image, latents), tokens), self.text_nats(h.text, texts).per_word()

    # Captions

    @torch.no_grad()
    def caption(self, images: Tensor, *, temperature: float = 0.0, generator: Generators = None) -> list[str]:
        """A text for each image, word by word. Logits are divided by the temperature; 0: always the likeliest word.

        Raises ValueError for a model of class labels, a negative temperature and images of another size.
        """
        self._check_text()
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: it must not be negative (0: always the likeliest word)")
        with eval_mode(self):
            _, latents = self._encoded_images(images, generator)
            h, cache = self.net.prefill(self.net.text_prompt(latents.soft), room=self.text_len - 1)

            def draw(h: Tensor, i: int) -> Tensor:
                logits = self.net.text_logits(h).float()
                if temperature == 0:
                    return logits.argmax(-1)
                uniform = torch.special.ndtr(randn((len(h), 1), generator, device=h.device))[:, 0]
                return quantile(logits / temperature, uniform)

            ids = autoregress(h, lambda ids, i: self.net.step_text(ids, cache), draw, self.text_len)
        return self.decode_text(ids)

    @torch.no_grad()
    def text_log_probs(self, images: Tensor, texts: Sequence[str], generator: Generators = None) -> Tensor:
        """log p of each of K texts behind each image: (B, K), in nats of whole texts, their ends included.

        One forward pass for each text. Raises ValueError as `caption` does, and without texts.
        """
        self._check_text()
        if not texts:
            raise ValueError("no texts were given to compare: give one or more")
        with eval_mode(self):
            _, latents = self._encoded_images(images, generator)
            encoded, columns = self.encode_text(texts), []
            last = torch.zeros(len(images), dtype=torch.bool, device=self.device)
            for k in range(len(texts)):
                own = {name: tensor[k].expand(len(images), -1) for name, tensor in encoded.items()}
                columns.append(-self.text_nats(self.hidden(latents.soft, own, last).text, own).of_texts())
        return torch.stack(columns, dim=1)

    def classify(self, images: Tensor, texts: Sequence[str], generator: Generators = None) -> Tensor:
        """Which of the texts is likeliest behind each image: int64 (B,). Zero-shot classification by classes' names."""
        return self.text_log_probs(images, texts, generator).argmax(1)

    def _encoded_images(self, images: Tensor, generator: Generators) -> tuple[Tokens, Latents]:
        tokens = self.tokenizer({"image": images.to(self.device)}, generator)
        return tokens, self.front(tokens.x)

    def _encoded_texts(self, asked: Asked) -> TextBatch:
        if all(isinstance(one, str) for one in asked):
            return self.encode_text(asked)
        if self.text is not None:
            raise ValueError("this model was trained on captions and knows no labels: give one text for each image")
        return label_batch(self.checked_labels(asked).to(self.device))

    def _check_text(self) -> None:
        if self.text is None:
            raise ValueError("this model was trained on class labels and knows no text: captions need one that does")
