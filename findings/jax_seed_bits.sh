#!/usr/bin/env bash
# jax 0.10.2: of a seed, random.key takes the low 32 bits and drops the others without a word.
#
# Guess: the key's two words of 32 bits hold a seed of 64 bits, as the key's size suggests; a seed
# that does not fit is an error or a warning, as it is for an array's element.
# Seen: key(s) equals key(s + 2**32), so seeds made from a hash or a clock in nanoseconds can be one
# and the same, and the first word is always 0; -1 is 2**32 - 1. Only from 2**63 on there is an
# error. With jax_enable_x64 both words are used: then s and s + 2**32 differ, and -1 has another key
# than without, so that flag alone changes what a negative or large seed draws.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > "$folder/see.py" <<'PYTHON'
import warnings

import jax

warnings.simplefilter("error")


def words(seed):
    return jax.random.key_data(jax.random.key(seed)).tolist()


print("jax", jax.__version__)
for seed in (5, 5 + 2**32, -1, 2**32 - 1):
    print(f"key({seed}): {words(seed)}")
assert words(5) == words(5 + 2**32) == [0, 5]
assert words(-1) == words(2**32 - 1) == [0, 2**32 - 1]
try:
    words(2**63)
except OverflowError as error:
    print(f"key(2**63): OverflowError: {error}")
else:
    raise AssertionError("2**63 is taken")
with jax.enable_x64(True):
    print(f"with jax_enable_x64: key({5 + 2**32}): {words(5 + 2**32)}, key(-1): {words(-1)}")
    assert words(5 + 2**32) == [1, 5] and words(-1) == [2**32 - 1] * 2
PYTHON
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/see.py"
