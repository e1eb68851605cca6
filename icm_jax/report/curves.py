"""Curves of quality over rate: which there are, their points, and their figure."""

import pathlib
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from icm_jax.report.looks import FORMATS, SOURCE, looks_of, name_and_point, save


class Measure(NamedTuple):
    """What is drawn over the rate: records of `curve` that have `key`, times `factor`.

    `parts` is the name under which records have it of parts, of classes or sizes, if they do, and
    `classes` what that is, in words.
    """

    curve: str
    key: str
    title: str
    axis: str
    factor: float = 1.0
    classes: str = ""
    parts: str = "by_class"


def _precisions(curve: str, title: str, prefix: str = "") -> tuple[Measure, Measure]:
    """COCO's two means of a record's average precisions, whose names have that prefix."""
    sizes = "AP@[0.5:0.95] [%], COCO's sizes"
    half = Measure(curve, f"{prefix}map50", f"{title} at IoU 0.5", "mAP@0.5 [%]", 100, "AP@0.5 [%]")
    mean = Measure(curve, f"{prefix}map", f"{title} at IoU 0.5 to 0.95", "mAP@[0.5:0.95] [%]", 100)
    return (
        half._replace(parts=f"{prefix}by_class"),
        mean._replace(classes=sizes, parts=f"{prefix}by_size"),
    )


MEASURES = (
    Measure("classify", "top1", "Classification, tail fine-tuned", "top-1 accuracy [%]", 100),
    Measure("linear", "top1", "Classification, linear", "top-1 accuracy [%]", 100),
    Measure("segment", "miou", "Semantic segmentation", "mIoU [%]", 100, "IoU [%]"),
    *_precisions("detect", "Detection, COCO's mAP"),
    Measure("detect", "voc2007", "Detection, VOC 2007's mAP", "11-point mAP [%]", 100, "AP [%]"),
    Measure("detect", "voc2010", "Detection, VOC 2010's mAP", "area mAP [%]", 100, "AP [%]"),
    *_precisions("instances", "Instance segmentation, COCO's mAP of masks", "mask_"),
    *_precisions("instances", "Instance segmentation, COCO's mAP of boxes"),
    Measure("image", "psnr", "Image quality, PSNR", "PSNR [dB]"),
    Measure("image", "ssim_db", "Image quality, SSIM", "SSIM [dB]"),
    Measure("image", "ms_ssim_db", "Image quality, MS-SSIM", "MS-SSIM [dB]"),
)


def curves_of(records: list[dict], key: str, rate: str = "bpp") -> dict[str, np.ndarray]:
    """Points of each curve, averaged over seeds: {name: float [n, 4]} of (bpp, value, ± both)."""
    points: dict[tuple, list] = {}
    for record in records:
        if rate not in record:
            continue
        name, point = name_and_point(record)
        points.setdefault((name, point), []).append((record[rate], record[key]))
    curves: dict[str, list] = {}
    for (name, _), values in points.items():
        values = np.array(values)
        curves.setdefault(name, []).append([*values.mean(axis=0), *values.std(axis=0)])
    return {name: np.array(sorted(rows)) for name, rows in curves.items()}


def draw_curves(records: list[dict], path: pathlib.Path, measure: Measure) -> str:
    figure = Figure(figsize=(7.5, 5), dpi=120)
    axes, looks = figure.subplots(), looks_of(records)
    for name, rows in curves_of(records, measure.key).items():
        axes.errorbar(
            rows[:, 0],
            measure.factor * rows[:, 1],
            measure.factor * rows[:, 3],
            rows[:, 2],
            marker="o",
            color=looks[name].colour,
            label=looks[name].title,
            capsize=2,
        )
    jpeg = [record for record in records if record["kind"] == "jpeg"]
    for rows in curves_of(jpeg, measure.key, "bpp_without_tables").values():
        axes.plot(
            rows[:, 0],
            measure.factor * rows[:, 1],
            "--",
            color=FORMATS["jpeg"].colour,
            linewidth=1,
            label="JPEG without its tables",
        )
    pixels = [record for record in records if record["kind"] == "pixels"]
    if pixels:
        value = float(measure.factor * np.mean([record[measure.key] for record in pixels]))
        axes.axhline(value, color="grey", linestyle=":", label="uncompressed pixels")
        source = [record["bpp_source"] for record in pixels if "bpp_source" in record]
        if source:
            axes.plot([np.mean(source)], [value], "x", color="grey", label=SOURCE)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("bits per pixel, measured on whole files")
    axes.set_ylabel(measure.axis)
    axes.set_title(measure.title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    return save(figure, path)
