"""Speed and size of the range coder on the latents of a 768×512 image: 192 channels of 32×48.

    python benchmarks/bench_range_coder.py

294,912 symbols in 64 Gaussian scales, about 78 % zeros, one stream. Prints bytes against the
entropy of the true densities, and symbols/s of the native coder in the same minute as of its peers
where they are installed: the official ops (extra `tfc`; called bare, without this package's checks)
and CompressAI's rANS coder (16 bits only; on lists, which it takes, made beforehand).
"""

import argparse
import importlib.util
import time

import numpy as np

from icm_jax.coding import range_coder, tables
from icm_jax.errors import IcmError

COUNT = 192 * 32 * 48
ROUNDS = 40


def main():
    description = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=description).parse_args()
    rng = np.random.default_rng(0)
    indexes = np.clip(rng.normal(9, 9, COUNT), 0, 63).astype(np.int32)
    symbols = np.rint(rng.normal(0, tables.SCALES[indexes])).astype(np.int32)
    bound = bits(symbols, indexes) / 8
    print(f"{COUNT:,} symbols, {np.mean(symbols == 0):.0%} zeros, bound {bound:,.0f} bytes")
    for precision, tail_mass in ((16, tables.TAIL_MASS), (12, 2.0**-8)):
        start = time.perf_counter()
        table = tables.gaussian_tables(precision=precision, tail_mass=tail_mass)
        built = time.perf_counter() - start
        data = range_coder.encode(symbols, indexes, table)
        print(
            f"\n{precision} bits, tail mass {tail_mass:.2g}: tables in {1e3 * built:.0f} ms, "
            f"{len(data):,} bytes = {len(data) / bound:.4f} × bound"
        )
        compare(symbols, indexes, table, data, precision)


def bits(symbols, indexes) -> float:
    """Information of the symbols under the densities they were drawn from."""
    total = 0.0
    for row in np.unique(indexes):
        values, counts = np.unique(symbols[indexes == row], return_counts=True)
        total -= counts @ np.log2(tables.gaussian_pmf(values, tables.SCALES[row]))
    return total


def compare(symbols, indexes, table, data, precision):
    """Times the coders in turn, so that all of them meet the same machine."""
    native = (
        lambda: range_coder.encode(symbols, indexes, table),
        lambda: range_coder.decode(data, indexes, table),
    )
    coders = {"native": native}
    try:
        coders["tfc"] = official(symbols, indexes, table, data)
    except IcmError as error:
        print(f"  tfc: {error}")
    if importlib.util.find_spec("compressai") and precision == 16:
        coders["rans"] = compressai(symbols, indexes, table)
    best = {name: [np.inf, np.inf] for name in coders}
    for name, (encode, decode) in coders.items():
        written = encode()
        assert written == data or name == "rans", name
        print(f"  {name:6} {len(written):,} bytes")
        np.testing.assert_array_equal(decode(), symbols)
    for _ in range(ROUNDS):
        for name, calls in coders.items():
            for way, call in enumerate(calls):
                start = time.perf_counter()
                call()
                best[name][way] = min(best[name][way], time.perf_counter() - start)
    for name, seconds in best.items():
        speeds = [COUNT / second / 1e6 for second in seconds]
        print(f"  {name:6} encode {speeds[0]:6.1f}, decode {speeds[1]:6.1f} M symbols/s")
    for name in set(best) - {"native"}:
        ratios = [theirs / ours for theirs, ours in zip(best[name], best["native"], strict=True)]
        print(f"  native / {name}: encode {ratios[0]:.2f} ×, decode {ratios[1]:.2f} ×")


def official(symbols, indexes, table, data):
    ops = range_coder._tfc_ops()
    values = symbols - table.offsets[indexes]

    def encode():
        handle = ops.create_range_encoder([], table.cdf)
        handle = ops.entropy_encode_index(handle, indexes, values)
        return ops.entropy_encode_finalize(handle).numpy()

    def decode():
        handle = ops.create_range_decoder(data, table.cdf)
        handle, decoded = ops.entropy_decode_index(handle, indexes, [COUNT], np.int32)
        assert ops.entropy_decode_finalize(handle).numpy()
        return decoded.numpy() + table.offsets[indexes]

    return encode, decode


def compressai(symbols, indexes, table):
    from compressai import ans

    spans = zip(table.starts, table.lengths, strict=True)
    rows = [table.cdf[start + 1 : start + 2 + length].tolist() for start, length in spans]
    model = (indexes.tolist(), rows, [len(row) for row in rows], table.offsets.tolist())
    values = symbols.tolist()
    data = ans.RansEncoder().encode_with_indexes(values, *model)
    return (
        lambda: ans.RansEncoder().encode_with_indexes(values, *model),
        lambda: ans.RansDecoder().decode_with_indexes(data, *model),
    )


if __name__ == "__main__":
    main()
