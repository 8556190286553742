"""The same image-caption pairs in every layout that a channel may have.

write[layout](folder, pairs)   pairs: (name without suffix, PNG bytes, captions), sorted by name
contents(opened(folder))       what is read: the number of each picture, and its captions
"""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq

from dalle.preprocess.images import encode_image
from tests.training.pairs import SIZE, picture, put, tar_of
from training.data.sources.channel import open_channel

PAIRS = [
    (
        f"{number:03}",
        encode_image(picture(number), "png"),
        tuple(f"picture {number}{', again' * version}" for version in range(1 + number % 2)),
    )
    for number in range(12)
]
PNG = PAIRS[7][1]


def opened(folder, **options):
    options = {"image_size": SIZE, "channel": "train", "max_bad_share": 1.0} | options
    return open_channel(folder, **options)


def contents(dataset):
    return [
        (int(dataset.image(index)[0, 0, 0]), dataset.captions(index))
        for index in range(len(dataset))
    ]


def images(folder, pairs):
    for name, image, _ in pairs:
        put(folder, name, image)


def text_files(folder, pairs):
    for name, image, captions in pairs:
        put(folder, name, image, "\n".join(captions).encode())


def json_files(folder, pairs):
    """JSON beside each image, as img2dataset writes files."""
    images(folder, pairs)
    for name, _, captions in pairs:
        about = {"caption": list(captions), "status": "success", "width": 8}
        (folder / f"{name}.json").write_text(json.dumps(about))


def shards(folder, pairs, size=50):
    for start in range(0, len(pairs), size):
        members = [
            member
            for name, image, captions in pairs[start : start + size]
            for member in ((f"{name}.png", image), (f"{name}.txt", "\n".join(captions).encode()))
        ]
        tar_of(folder / f"{start:05}.tar", members)


def img2dataset_shards(folder, pairs):
    """Shards with JSON beside text, and their statistics beside them."""
    members = []
    for name, image, captions in pairs:
        about = {"caption": captions[0], "status": "success", "url": f"https://x.test/{name}"}
        members += [
            (f"{name}.png", image),
            (f"{name}.txt", "\n".join(captions).encode()),
            (f"{name}.json", json.dumps(about).encode()),
        ]
    tar_of(folder / "00000.tar", members)
    keys = [name for name, _, _ in pairs]
    status = ["success"] * len(keys)
    pq.write_table(pa.table({"key": keys, "status": status}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"successes": len(keys)}))


def metadata_jsonl(folder, pairs):
    images(folder, pairs)
    rows = [{"file_name": f"{name}.png", "text": list(texts)} for name, _, texts in pairs]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metadata_csv(folder, pairs):
    """One row a caption."""
    images(folder, pairs)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "width", "text"])
        for name, _, captions in pairs:
            writer.writerows([f"{name}.png", 8, caption] for caption in captions)


def list_tsv(folder, pairs):
    """A list without a header, the caption first, as Conceptual Captions has it."""
    images(folder / "images", pairs)
    with (folder / "train.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        for name, _, captions in pairs:
            writer.writerows([caption, f"images/{name}.png"] for caption in captions)


def parquet(folder, pairs, row_group_size=64):
    """As Hugging Face's datasets write it: a struct of bytes and path."""
    folder.mkdir(parents=True, exist_ok=True)
    column = [{"bytes": image, "path": f"{name}.png"} for name, image, _ in pairs]
    table = pa.table({"image": column, "text": [list(captions) for _, _, captions in pairs]})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=row_group_size)


def coco(folder, pairs):
    images(folder / "train2017", pairs)
    captions = [(number, text) for number, (_, _, texts) in enumerate(pairs) for text in texts]
    table = {
        "info": {},
        "images": [{"id": n, "file_name": f"{name}.png"} for n, (name, _, _) in enumerate(pairs)],
        "annotations": [
            {"id": number, "image_id": image, "caption": text}
            for number, (image, text) in enumerate(captions)
        ],
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(table))


write = {
    "text files": text_files,
    "JSON files": json_files,
    "tar shards": shards,
    "img2dataset's shards": img2dataset_shards,
    "metadata.jsonl": metadata_jsonl,
    "metadata.csv": metadata_csv,
    "list": list_tsv,
    "Parquet": parquet,
    "COCO": coco,
}
