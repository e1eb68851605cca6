"""Rate and quality of pictures over a data set."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tqdm

from icm_jax import ops
from icm_jax.data import geometry
from icm_jax.engine import sharding
from icm_jax.measure import draws, metrics
from icm_jax.measure.coded import drawn_rates, of_sizes
from icm_jax.tasks import views


def distortion(
    source: Any,
    through: Callable[[np.ndarray], tuple[np.ndarray, dict]],
    *,
    title: str,
    workers: int,
    side: int | tuple[int, int] = 0,
    canvas: int | tuple[int, int] = 0,
) -> dict:
    """Means over the images of a source, each process at its share: images, psnr, ssim_db and
    ms_ssim_db (see `metrics.decibels`), and rates as `coded.of_sizes` gives them; of each score and
    of bpp also its "draws", see `icm_jax.measure.draws`.

    SSIM and MS-SSIM are left out where an image is too small for them.

    Args:
      source: of `icm_jax.data`. through: uint8 [h, w, 3] -> (the same after coding, its size).
      title: of the progress bar. workers: threads that call `through`.
      side: images are fitted to the canvas and their middle of so many pixels is cut out, as for a
        network, so one compiled program serves all; 0: images have their full size.
    """

    def code(number: int) -> tuple:
        """(size, {metric: value}) of an image."""
        loaded = source.load(number)
        image = source.read(loaded["image"], loaded["name"], (0, 0))
        if side:
            fitted = geometry.fit(image, geometry.sides(canvas))
            image = np.asarray(views.centre(fitted[None], side))[0]
        given, size = through(image)
        scores = {"psnr": metrics.psnr(image, given)}
        for name, similarity, least in (
            ("ssim_db", metrics.ssim, ops.SSIM_WINDOW),
            ("ms_ssim_db", metrics.ms_ssim, metrics.SMALLEST),
        ):
            if min(image.shape[:2]) >= least:
                scores[name] = metrics.decibels(similarity(image, given))
        return size, scores

    numbers, hidden = sharding.share(source.length), jax.process_index() > 0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = pool.map(code, numbers)
        bar = tqdm.tqdm(results, title, len(numbers), unit="image", disable=hidden)
        mine = dict(zip(numbers, bar, strict=True))
    sizes, scores = map(list, zip(*sharding.gathered(mine), strict=True))
    record: dict = {"images": source.length}
    counts = draws.resamples(source.length)
    drawn = drawn_rates(sizes, counts)
    for key in ("psnr", "ssim_db", "ms_ssim_db"):
        values = np.array([found.get(key, np.nan) for found in scores])
        if not np.isnan(values).all():
            record[key] = float(np.nanmean(values))
            drawn |= {key: draws.means(values, counts)} if np.isfinite(record[key]) else {}
    return record | {"draws": draws.packed(drawn)} | of_sizes(sizes)
