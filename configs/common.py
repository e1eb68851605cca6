"""What the experiments share: scales by name, the embedded data, the loop's settings.

Every function returns a new dict (or what is made of one), so that a scale may change its own.
"""

from collections.abc import Callable

import ml_collections

from icm_jax import data
from icm_jax.errors import IcmError
from icm_jax.measure.classical import FORMATS
from icm_jax.measure.coded import MODELS


def scales(*functions: Callable[[], dict]) -> Callable[[str], ml_collections.ConfigDict]:
    """`get_config` of a file: settings of the scale that stands behind the colon, or the first."""
    known = {scale.__name__.replace("_", "-"): scale for scale in functions}

    def get_config(arg: str = next(iter(known))) -> ml_collections.ConfigDict:
        """Settings of one scale; every field can be overridden on the command line."""
        if arg not in known:
            raise IcmError(f"there is no scale {arg!r}; choose one of {', '.join(known)}")
        return overridable(known[arg]())

    return get_config


def overridable(config: dict) -> ml_collections.ConfigDict:
    """An experiment whose command may give a canvas or a size as one number or as (height, width),
    and wherever there is `data` or "..._data" the fields of any data set; those that it has no
    value for are None, which is not given."""
    fields = {*data.BATCH_FIELDS, *(f for known in data.DATASETS.values() for f in known.fields)}

    def every():  # a reference of its own for each set
        return {field: ml_collections.config_dict.placeholder(object) for field in fields}

    def opened(tree: dict) -> dict:
        found = {key: opened(v) if isinstance(v, dict) else v for key, v in tree.items()}
        for key in found:
            if key == "data" or key.endswith("_data"):
                found[key] = every() | found[key]
        for key in found.keys() & {"canvas", "size"}:
            found[key] = ml_collections.FieldReference(found[key], field_type=object)
        return found

    return ml_collections.ConfigDict(opened(config))


def own_data(config: ml_collections.ConfigDict, name: str, like: str = "") -> dict | None:
    """Fields of the data set that an experiment's "..._data" names; None where it names none. Those
    of batches are as in `config[like]` where it does not give them."""
    return fields_of(config[name], config[like] if like else None)


def fields_of(
    own: ml_collections.ConfigDict, like: ml_collections.ConfigDict | None = None
) -> dict | None:
    """Those of a data set, as `own_data`."""
    given = own.copy_and_resolve_references().to_dict()
    if not given["name"]:
        return None
    shared = {} if like is None else data.data_fields(like)
    found = {field: shared[field] for field in data.BATCH_FIELDS if field in shared}
    return found | data.data_fields(given)


def scenes(train: int, validation: int, canvas: int = 96, **fields) -> dict:
    """The embedded data set: so many images, of `canvas` pixels; `fields` are of the pipeline."""
    data = dict(name="scenes", path="", canvas=canvas, **fields)
    return data | dict(size=canvas, train=train, validation=validation, seed=0, quality=95)


def label_keys(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """What the images of `config.data` come with; a data set that TFDS knows: classes."""
    known = config.data.name in data.DATASETS
    return data.label_keys(data.data_fields(config.data)) if known else ("label",)


def left_out(config: ml_collections.ConfigDict, needs: dict[str, str]) -> list[str]:
    """Sentences on tasks whose labels the data lack; `needs`: {task: kind of label}."""
    has = label_keys(config)
    return [
        f"No {task} task: {config.data.name} has no {label.removesuffix('s')}s."
        for task, label in needs.items()
        if label not in has
    ]


def files(**qualities: tuple) -> dict[str, tuple]:
    """Qualities of the files that a codec is compared with, for every format there is.

    heif (HEVC intra), vvc (VVC intra, by quantisation parameters) and jxl need the extra `formats`.
    icm is the model in the package, or any other: (20, 50, ("a.icmc", 50), ("of_one_rate.icmc",
    None)); aimed the same, each file written for the detector that is to read it.
    """
    return {name: qualities.get(name, ()) for name in (*FORMATS, *MODELS)}


def foreign(weights: ml_collections.ConfigDict) -> tuple[str, str] | None:
    """`Run.weights` of the fields reader and path; None where no path is given."""
    return (weights.reader, weights.path) if weights.path else None


def loop(**changes) -> dict:
    """The part of `train` that all runs of an experiment share."""
    settings = dict(batch_size=16, log_every=20, save_every=200, clip_norm=1.0)
    settings |= dict(fsdp=1, remat="none", accumulate=1, ema=0.0)
    return settings | changes


def stage(*, learning_rate: float, warmup_steps: int, **more) -> dict:
    """The optimiser of one kind of run, its `steps`, and `more` that is its alone."""
    return dict(learning_rate=learning_rate, optimiser="adamw", warmup_steps=warmup_steps) | more


def few(batch_size: int = 4, save_every: int = 4) -> dict:
    """Changes of `train` with which a test is over in a few steps."""
    return dict(batch_size=batch_size, log_every=2, save_every=save_every)
