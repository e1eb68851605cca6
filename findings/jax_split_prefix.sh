#!/usr/bin/env bash
# jax 0.10.2: random.split of one key for two and for four gives the same first two keys.
#
# Guess: keys split off for different counts have nothing in common, as with jax 0.4, where the
# count went into the hash; whoever splits the same key twice by mistake, once for 2 and once for 4,
# would at least draw different numbers.
# Seen: with the partitionable Threefry, the default since jax 0.5, split(key, 2) is the beginning of
# split(key, 4), and fold_in(key, i) is key i of both. With jax_threefry_partitionable off they
# differ, as they did. So a key that is split twice repeats its noise, and on the other hand a
# function may split for fewer keys without a change of what it draws.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > "$folder/see.py" <<'PYTHON'
import jax


def same():
    key = jax.random.key(7)
    two, four = (jax.random.key_data(jax.random.split(key, n)) for n in (2, 4))
    folded = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(2)]
    return bool((two == four[:2]).all()), all(bool((a == b).all()) for a, b in zip(folded, two))


print("jax", jax.__version__)
print("default: split(2) begins split(4):", same()[0], "; fold_in gives the same keys:", same()[1])
assert same() == (True, True)
with jax.threefry_partitionable(False):
    print("not partitionable: split(2) begins split(4):", same()[0])
    assert not same()[0]
PYTHON
JAX_PLATFORMS=cpu "$folder/env/bin/python" "$folder/see.py"
