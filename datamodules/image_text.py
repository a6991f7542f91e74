"""Images with captions, for text-to-image models: the sources and rules of images.py, labels all 0.

Captions come from a table's column or several columns, from the metadata file of a folder, or from text files beside
the images. A row may have several (COCO has five): training draws one by (seed, epoch, row), so each is seen in time
and a resumed run draws the same; validation takes the first. Blank captions count as none; a row without any cannot be
used (images.py, `on_bad`). Batches: {"image": uint8 (B,3,S,S), "label": int64 (B,), "caption": list of B strings}.
"""

from datamodules.folders import FileStore
from datamodules.image_rows import ImageRows, OnBad
from datamodules.images import ImageData
from datamodules.sources import ArrowStore
from datamodules.stream_counts import StatedRows


class ImageTextData(ImageData):
    """Rows of `source`, which may be all that ImageData reads and has to have captions.

    columns: {image: jpg, caption: txt}; {caption: [caption_a, caption_b]} takes one of both; {caption: .txt} reads
    a.txt beside a.png, one caption in a line; {label: ...} adds labels, which are left out otherwise. What it does not
    mention is guessed: a caption is called caption, captions, text or txt. Images are not flipped unless `flip`, since
    captions tell left from right. Streams (`streaming`, `shard_rows`, `shuffle_buffer`) are those of ImageData; a crop
    cache is not, since it would keep one caption of each image. Raises ValueError for a source without captions.
    """

    need_caption = True

    def __init__(
        self,
        source: str,
        image_size: int = 256,
        *,
        batch_size: int = 256,
        split: str = "train",
        val_split: str | None = "auto",
        columns: dict[str, str | list[str] | None] | None = None,
        flip: bool = False,
        exif: bool = True,
        on_bad: OnBad = "skip",
        streaming: bool = False,
        shard_rows: StatedRows | None = None,
        shuffle_buffer: int = 1000,
        num_workers: int = 8,
        cache_dir: str | None = None,
        limit_n: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            source,
            image_size,
            batch_size=batch_size,
            split=split,
            val_split=val_split,
            columns={"label": None} | (columns or {}),
            flip=flip,
            exif=exif,
            on_bad=on_bad,
            streaming=streaming,
            shard_rows=shard_rows,
            shuffle_buffer=shuffle_buffer,
            num_workers=num_workers,
            cache_dir=cache_dir,
            limit_n=limit_n,
            seed=seed,
        )

    def _rows(self, store: FileStore | ArrowStore, *, training: bool) -> ImageRows:
        if not store.captioned:
            raise ValueError(
                f"'{self.source}' has no captions: name their column with columns={{caption: ...}}, or give a folder a"
                ' metadata.jsonl of lines {"file_name": "a.png", "text": "..."}, or columns={caption: .txt}'
            )
        return super()._rows(store, training=training)
