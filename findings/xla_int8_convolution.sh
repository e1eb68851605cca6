#!/usr/bin/env bash
# jax 0.9.0 on CPUs: a convolution of int8 takes tens of times as long as the same in float32.
#
# Guess: int8 operands with int32 sums are at worst as slow as float32, and a quarter of the memory;
# that is why integer networks and quantised layers are written so.
# Seen (two cores of x86-64, 1 x 32 x 40 x 112 by 3 x 3 x 112 x 64): 94 ms for int8, 1.1 for float32
# of the same numbers, with equal results, as sums of 2^24 / 127^2 = 1,040 products are exact in
# float32. 0.6.2, 0.7.2 and 0.8.2 behave so, too. With 0.10.2 both take 1.2 ms. As nine matrix
# products int8 took 1.2 ms with 0.9.0 and 9.9 with 0.6.2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/see.py" <<'PYTHON'
import time

import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
x = rng.integers(-127, 128, (1, 32, 40, 112)).astype(np.int8)
kernel = rng.integers(-127, 128, (3, 3, 112, 64)).astype(np.int8)


def convolution(dtype, sums):
    def run(x, kernel):
        found = jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=sums,
        )
        return found.astype(jnp.int32)

    return jax.jit(run)


def least(run):
    result, times = np.asarray(run(x, kernel)), []
    for _ in range(7):
        began = time.perf_counter()
        jax.block_until_ready(run(x, kernel))
        times.append(time.perf_counter() - began)
    return result, min(times)


(one, integers), (other, floats) = (
    least(convolution(jnp.int8, jnp.int32)),
    least(convolution(jnp.float32, jnp.float32)),
)
assert np.array_equal(one, other)
ratio = integers / floats
print(f"jax {jax.__version__}: int8 {1e3 * integers:.1f} ms, float32 {1e3 * floats:.1f} ms, {ratio:.1f} x")
assert ratio > 10 if jax.__version__ == "0.9.0" else ratio < 4
PYTHON
for version in 0.9.0 0.10.2; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install --quiet --disable-pip-version-check \
        "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/see.py"
done
