"""Weights of the codec `compressai` under CompressAI's names, by its own rules; files of them."""

import json

import flax.traverse_util
import numpy as np

TYPES = {"float16": "F16", "float32": "F32", "int32": "I32"}
STEMS = dict(analysis="g_a", synthesis="g_s", hyper_analysis="h_a", hyper_synthesis="h_s")
PLURALS = dict(matrix="matrices", bias="biases", factor="factors")


def exported(variables) -> dict[str, np.ndarray]:
    """The state dict, float32 by name, without tables."""
    state = {}
    for place, value in flax.traverse_util.flatten_dict(variables["params"]["compressai"]).items():
        network, layer, leaf = (*place, "", "")[:3]
        value = np.asarray(value)
        if network == "median":
            around = np.array([-9, 0, 9], np.float32)
            state["entropy_bottleneck.quantiles"] = value[:, None, None] + around
            continue
        kind, number = layer.split("_")
        if network == "prior":
            state[f"entropy_bottleneck.{PLURALS[kind]}.{number}"] = value
            continue
        at = dict(Down=range(0, 8, 2), TransposedUp=range(0, 8, 2), GDN=(1, 3, 5), Conv=(4,))
        if network == "hyper_analysis":
            at = dict(Conv=(0,), Down=(2, 4))
        if leaf == "kernel":
            value = value.transpose((2, 3, 0, 1) if kind == "TransposedUp" else (3, 2, 0, 1))
        name = f"{STEMS[network]}.{at[kind][int(number)]}"
        state[f"{name}.{'weight' if leaf == 'kernel' else leaf}"] = (
            value.T if leaf == "gamma" else value
        )
    return {name: np.ascontiguousarray(value, np.float32) for name, value in state.items()}


def saved(path, state):
    """`path`, written as a .safetensors file of these arrays."""
    header, data = {}, []
    for name, array in state.items():
        begin = sum(map(len, data))
        data.append(array.tobytes())
        offsets = [begin, begin + len(data[-1])]
        kind = TYPES[array.dtype.name]
        header[name] = dict(dtype=kind, shape=array.shape, data_offsets=offsets)
    text = json.dumps(header).encode()
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *data]))
    return path
