"""How much of one latent another already tells: the uncertainty coefficient of fibres.

    U(A | B) = I(A; B) / H(A) = 1 - H(A | B) / H(A),   0 independent, 1 A follows from B

Özyılkan et al. 2023, section 5: latents are cut into fibres of 1×1×C, those of B grouped by
k-means, and H(A | B) is the mean over groups of the entropy of A there; entropies are those of a
trained factorised prior. It is trained on half of the pairs and asked about the other half, so that
many groups do not look like much knowledge.
"""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.cluster.vq

from icm_jax.entropy import Factorised
from icm_jax.errors import IcmError

CLUSTERS = 16


def uncertainty_coefficient(
    a: np.ndarray, b: np.ndarray, *, clusters: int = CLUSTERS, steps: int = 500, seed: int = 0
) -> float:
    """U(A | B) of fibres at the same places, between 0 and 1.

    Args:
      a: rounded latents, [n, C_a]. b: [n, C_b]. clusters: groups of b. steps: of training.
      seed: of the halves and of k-means.

    Raises: IcmError if there are fewer than 4 fibres for a cluster, or not as many in a as in b.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float64)
    if len(a) != len(b) or len(a) < 4 * clusters:
        raise IcmError(
            f"{len(a)} fibres of one latent and {len(b)} of the other; redundancy needs as many of "
            f"both, and at least {4 * clusters} for {clusters} clusters"
        )
    order = np.random.default_rng(seed).permutation(len(a))
    a, b = a[order], b[order]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster may be left empty; it then has no weight
        # SciPy 1.15 names the seed anew and takes the old name too, of which its types say nothing.
        kmeans: Callable = scipy.cluster.vq.kmeans2
        _, groups = kmeans(b, clusters, minit="++", seed=seed)
    half = len(a) // 2
    one = np.zeros(len(a), np.int32)
    whole = _cross_entropy(a, one, 1, half, steps)
    if whole <= 0:
        return 1.0  # A is known beforehand
    return float(np.clip(1 - _cross_entropy(a, groups, clusters, half, steps) / whole, 0, 1))


def fibres(latent: np.ndarray) -> np.ndarray:
    """[N, h, w, C] -> [N·h·w, C].

    >>> fibres(np.zeros((2, 4, 4, 48))).shape
    (32, 48)
    """
    return np.asarray(latent).reshape(-1, latent.shape[-1])


def _cross_entropy(a, groups, count: int, half: int, steps: int) -> float:
    """Bits of a fibre of the second half, under priors (one a group) learnt on the first."""
    params = _fit(*_by_group(a[:half], groups[:half], count), steps)
    return float(_bits(params, jnp.asarray(a[half:]), jnp.asarray(groups[half:])))


def _by_group(a, groups, count: int):
    """Fibres [n, C] sorted by group, and where each group begins and how many it has, [K]."""
    sizes = np.bincount(groups, minlength=count)
    return a[np.argsort(groups, kind="stable")], np.cumsum(sizes) - sizes, sizes


@jax.jit
def _bits(params, a, groups):
    """Mean bits of fibres [n, C], each under the prior of its group [n]."""

    def add(total, number):
        group = jax.tree.map(lambda leaf: leaf[number], params)
        bits = Factorised().apply({"params": group}, a).sum(-1)
        return total + jnp.where(groups == number, bits, 0.0).sum(), None

    count = len(jax.tree.leaves(params)[0])
    return jax.lax.scan(add, jnp.float32(0), jnp.arange(count))[0] / len(a)


_BATCH = 1024  # fibres of a step, shared among the groups


@functools.partial(jax.jit, static_argnums=3)
def _fit(a, begins, sizes, steps: int):
    # One start for all: where a group has no fibres, its prior stays near it.
    first = Factorised().init(jax.random.key(0), a[:1])["params"]
    params = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(sizes)), first)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps))
    rows = max(1, _BATCH // len(sizes))
    one = jax.vmap(lambda group, x: Factorised().apply({"params": group}, x).sum(-1).mean())

    def step(carry, number):
        params, state = carry
        turn = (number * rows + jnp.arange(rows)).reshape(1, -1)  # fibres in turn, group by group
        places = begins.reshape(-1, 1) + turn % jnp.maximum(sizes, 1).reshape(-1, 1)
        fibres = a[jnp.minimum(places, len(a) - 1)]
        gradient = jax.grad(lambda p: one(p, fibres).sum())(params)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), jnp.arange(steps))
    return params
