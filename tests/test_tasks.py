"""Views, ResNet, InfoNCE and tasks against NumPy written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from icm_jax.errors import IcmError
from icm_jax.nets import resnet
from icm_jax.tasks import build_task, views
from icm_jax.tasks.contrastive import info_nce

RNG = np.random.default_rng(0)
MODEL = dict(
    variant="10",
    width=4,
    size=32,
    crop=(0.5, 1.0),
    dtype="float32",
)
FILTER = dict(name="omni_filter", variant="10", width=4, channels=4, widths=(4, 4, 4))
FEATURE = dict(name="omni_feature", variant="10", width=4, channels=4, widths=(4, 4))
FEATURE |= dict(filter_channels=4, filter_widths=(4, 4, 4), hyper_channels=4)
STAGE0 = dict(MODEL, name="filter_pretraining", codec=FILTER)
STAGE1 = dict(
    MODEL,
    codec=FILTER,
    projector_hidden=8,
    embedding=6,
    name="contrastive",
    negatives="both",
    queue=8,
    momentum=0.9,
    temperature=0.2,
    alpha=0.5,
    l1=0.0,
)
STAGE2 = dict(MODEL, name="compression", filter=FILTER, codec=FEATURE, relative=True)
STAGE2 |= dict(lmbda=3.0, feature_weights=(1.0, 1.0, 1.0))


def images(rows=4, side=32):
    return jnp.asarray(RNG.integers(0, 256, (rows, side, side, 3)).astype(np.uint8))


def initial(task, batch):
    return {**jax.jit(task.init)(jax.random.key(0), batch), "constants": dict(task.constants)}


def unit(*shape):
    x = RNG.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("negatives", ["queue", "batch", "both"])
def test_info_nce_equals_its_formula(negatives):
    q, k, queue, tau = unit(5, 7), unit(5, 7), unit(2, 5, 7), 0.3
    expected, right = [], []
    for i in range(5):
        positive = np.exp(q[i] @ k[i] / tau)
        others = [] if negatives == "queue" else [q[i] @ k[j] for j in range(5) if j != i]
        others += [] if negatives == "batch" else list((queue @ q[i]).ravel())
        expected.append(-np.log(positive / (positive + np.exp(np.array(others) / tau).sum())))
        right.append(q[i] @ k[i] > max(others))
    loss, accuracy = info_nce(q, k, queue, tau, negatives)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(right))
    direction, step = unit(5, 7), 1e-2
    of = lambda x: info_nce(x, k, queue, tau, negatives)[0]  # noqa: E731
    numeric = (of(q + step * direction) - of(q - step * direction)) / (2 * step)
    np.testing.assert_allclose((jax.grad(of)(q) * direction).sum(), numeric, rtol=1e-2, atol=1e-3)


def test_views_are_keyed_by_row_and_stay_in_range():
    batch = images()
    one = views.contrastive(batch, 24, key=jax.random.key(0))
    assert one.shape == (4, 24, 24, 3) and one.dtype == jnp.float32
    assert one.min() >= 0 and one.max() <= 255 + 1e-3
    # A row's view depends on its own image and place, not on the others.
    other = views.contrastive(batch.at[1:].set(0), 24, key=jax.random.key(0))
    np.testing.assert_allclose(one[0], other[0], atol=1e-3)
    assert np.abs(one[1] - views.contrastive(batch, 24, key=jax.random.key(1))[1]).max() > 1


def test_a_crop_of_everything_is_the_image_or_its_mirror():
    batch = images(6, 16)
    masks = batch[..., 0]
    view, mask = views.mild(batch, 16, masks, crop=(1.0, 1.0), key=jax.random.key(3))
    # Aspect may still shrink one side; where it does not, pixels are exact.
    square = jnp.zeros((16, 16))
    ramp = jnp.arange(16, dtype=jnp.float32)[None, :] + square
    window = (jnp.float32(0), jnp.float32(0), jnp.float32(16), jnp.float32(16))
    for flip in (False, True):
        given = views._resample(ramp[..., None], (*window, jnp.bool_(flip)), (16, 16))[..., 0]
        np.testing.assert_allclose(given, ramp[:, ::-1] if flip else ramp, atol=1e-5)
        given = views._nearest(masks[0], (*window, jnp.bool_(flip)), (16, 16))
        np.testing.assert_array_equal(given, masks[0][:, ::-1] if flip else masks[0])
    assert view.shape == (6, 16, 16, 3) and mask.dtype == jnp.uint8
    # Halving a ramp averages it: antialiased, no shift.
    half = views._resample(ramp[..., None], (*window, jnp.bool_(False)), (8, 8))[0, 2:-2, 0]
    np.testing.assert_allclose(half, np.arange(8)[2:-2] * 2 + 0.5, atol=1e-4)


def test_hue_turns_keep_luma():
    image = jnp.asarray(RNG.uniform(0.3, 0.7, (5, 5, 3)), jnp.float32)
    turned = views._rotate_hue(image, jnp.float32(0.4))
    luma = np.array(views.LUMA, np.float32)
    np.testing.assert_allclose(turned @ luma, image @ luma, atol=3e-3)
    np.testing.assert_allclose(views._rotate_hue(turned, jnp.float32(-0.4)), image, atol=1e-4)


def test_resnet_50_has_its_published_size():
    head, tail = resnet.Head("50"), resnet.Tail("50")
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    f, h = jax.eval_shape(lambda x: head.init_with_output(jax.random.key(0), x, train=False), x)
    c, t = jax.eval_shape(lambda f: tail.init_with_output(jax.random.key(0), f, train=False), f)
    count = sum(np.prod(p.shape) for p in jax.tree.leaves([h["params"], t["params"]]))
    assert count + 2048 * 1000 + 1000 == 25_557_032
    assert f.shape == (1, 56, 56, 256) and [x.shape[1] for x in c] == [28, 14, 7]


def test_dilated_tail_has_the_same_values_on_the_coarse_grid():
    f = jnp.asarray(RNG.normal(size=(1, 16, 16, 4)), jnp.float32)
    plain, dilated = (resnet.Tail("18", 4, output_stride=s) for s in (32, 8))
    variables = plain.init(jax.random.key(0), f, train=False)
    coarse = plain.apply(variables, f, train=False)[2]
    fine = dilated.apply(variables, f, train=False)[2]
    assert fine.shape == (1, 8, 8, 32)
    np.testing.assert_allclose(fine[:, ::4, ::4], coarse, atol=1e-4)


@pytest.fixture(scope="module")
def stage1():
    task = build_task(ConfigDict(STAGE1))
    batch = {"image": images()}
    variables = initial(task, batch)
    loss = jax.jit(task.loss)
    return task, variables, batch, loss


def test_alpha_is_data_and_weighs_the_rate(stage1):
    _, variables, batch, loss = stage1
    values = []
    for alpha in (0.0, 2.0):
        changed = {**variables, "constants": {"alpha": jnp.float32(alpha), "l1": jnp.float32(0)}}
        total, aux = loss(changed, batch, jax.random.key(1), jnp.int32(0))
        values.append(float(total))
    np.testing.assert_allclose(values[1] - values[0], 2 * aux.metrics["bpp"], rtol=1e-4)


def test_momentum_and_queue_follow_their_rules(stage1):
    _, variables, batch, loss = stage1
    moved = {**variables, "params": jax.tree.map(lambda p: p + 1, variables["params"])}
    for step, m in ((0, 0.0), (10, 0.5), (1000, 0.9)):  # a copy at first, config.momentum at last
        _, aux = loss(moved, batch, jax.random.key(1), jnp.int32(step))
        expected = jax.tree.map(lambda p, m=m: m * p + (1 - m) * (p + 1), variables["key_params"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            aux.collections["key_params"],
            expected,
        )
    first = aux.collections["queue"]
    assert first["next"] == 1 and first["keys"].shape == (2, 4, 6)  # of 8 keys, 4 in a batch
    np.testing.assert_array_equal(first["keys"][1], variables["queue"]["keys"][1])
    assert np.abs(first["keys"][0] - variables["queue"]["keys"][0]).max() > 0.01
    _, aux = loss({**moved, "queue": first}, batch, jax.random.key(2), jnp.int32(1))
    assert aux.collections["queue"]["next"] == 0
    np.testing.assert_array_equal(aux.collections["queue"]["keys"][0], first["keys"][0])
    np.testing.assert_allclose(np.linalg.norm(first["keys"], axis=2), 1, rtol=1e-5)


def test_a_key_depends_on_its_own_image_alone(stage1):
    """BatchNorm must not leak: keys pushed for image 0 ignore the other images of the batch."""
    _, variables, batch, loss = stage1
    changed = {"image": batch["image"].at[1:].set(7)}
    keys = [
        loss(variables, b, jax.random.key(1), jnp.int32(0))[1].collections["queue"]["keys"][0]
        for b in (batch, changed)
    ]
    np.testing.assert_allclose(keys[0][0], keys[1][0], atol=1e-5)
    assert np.abs(keys[0][1] - keys[1][1]).max() > 1e-3


def test_key_side_gets_no_gradient_and_every_query_part_does(stage1):
    task, variables, batch, _ = stage1

    def total(params, key_params):
        changed = {**variables, "params": params, "key_params": key_params}
        return task.loss(changed, batch, jax.random.key(1), jnp.int32(0))[0]

    own, key = jax.grad(total, argnums=(0, 1))(variables["params"], variables["key_params"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(key))
    for part in ("head", "filter", "tail", "projector"):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(own[part])) > 0


def test_bad_contrastive_configs_are_refused():
    with pytest.raises(IcmError, match="negatives"):
        build_task(ConfigDict(dict(STAGE1, negatives="none")))
    task = build_task(ConfigDict(STAGE1))
    with pytest.raises(IcmError, match="does not divide the queue"):
        jax.eval_shape(task.init, jax.random.key(0), {"image": images(3)})
    with pytest.raises(IcmError, match="unknown task"):
        build_task(ConfigDict(dict(name="nothing")))


def test_filter_pretraining_trains_the_filter_alone():
    task = build_task(ConfigDict(STAGE0))
    batch = {"image": images()}
    variables = initial(task, batch)
    total, aux = jax.jit(task.loss)(variables, batch, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(total, aux.metrics["bpp"] + 128 * aux.metrics["l1"], rtol=1e-5)
    assert {n: task.groups(n) for n in variables["params"]} == dict(filter="train", head="frozen")
    after, before = aux.collections["batch_stats"], variables["batch_stats"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after["head"], before["head"])
    assert any(jax.tree.leaves(moved))  # the filter sees features of the scale of stage 1


def test_stage_1_begins_with_the_head_and_filter_of_stage_0(stage1):
    """One seed draws the same weights for both; what a filter run leaves fits the next."""
    _, variables, batch, _ = stage1
    alone = initial(build_task(ConfigDict(STAGE0)), batch)
    for collection, name in (("params", "head"), ("params", "filter"), ("batch_stats", "head")):
        own, given = (tree[collection][name] for tree in (variables, alone))
        jax.tree.map(np.testing.assert_array_equal, own, given)


def test_stage_2_weighs_its_distortions():
    batch = {"image": images()}
    results = []
    for weights in ((0.0, 0.0, 0.0), (1.0, 2.0, 3.0)):
        task = build_task(ConfigDict(dict(STAGE2, feature_weights=weights)))
        variables = jax.jit(task.init)(jax.random.key(0), batch) | {
            "constants": dict(task.constants)
        }
        total, aux = jax.jit(task.loss)(variables, batch, jax.random.key(0), jnp.int32(0))
        np.testing.assert_allclose(
            total, aux.metrics["bpp"] + 3 * aux.metrics["distortion"], rtol=1e-4
        )
        results.append(aux.metrics)
    np.testing.assert_allclose(results[0]["distortion"], results[0]["distortion_f"], rtol=1e-5)
    assert results[1]["distortion"] > results[0]["distortion"]
    assert {n for n in variables["params"] if task.groups(n) == "train"} == {"feature_codec"}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(codec=FILTER, filter=FEATURE),
            "must contain those of the filter, too: feature_codec",
        ),
        (dict(codec=dict(name="image", kind="factorised", width=4, channels=6)), "and no feature"),
        (dict(filter=dict(FILTER, widths=(4, 4))), "takes widths"),
    ],
)
def test_stage_2_refuses_a_codec_without_its_filter(change, message):
    with pytest.raises(IcmError, match=message):
        build_task(ConfigDict(dict(STAGE2, **change)))


IMAGE = dict(name="image", kind="mean_scale_hyperprior", width=4, channels=6, levels=2)
CODEC = dict(
    name="image_compression",
    codec=IMAGE,
    metric="mse",
    ms_ssim_weight=1000.0,
    lambdas=(0.01, 1.0),
    size=32,
    straight_through=False,
)


def test_image_compression_weighs_each_image_by_its_own_quality():
    task = build_task(ConfigDict(CODEC))
    batch = {"image": images(rows=3)}
    variables = initial(task, batch)
    total, aux = jax.jit(task.loss)(variables, batch, jax.random.key(5), jnp.int32(0))
    low, high = (aux.metrics["bpp"] + l * aux.metrics["mse"] for l in CODEC["lambdas"])  # noqa: E741
    assert low < total < high
    np.testing.assert_allclose(aux.metrics["mse"], aux.metrics["distortion"], rtol=1e-6)
    # With both ends of λ equal, the weights are too.
    log_lambdas = jnp.log(jnp.full(2, 0.25))
    same = dict(variables, constants={"log_lambdas": log_lambdas})
    total, aux = jax.jit(task.loss)(same, batch, jax.random.key(5), jnp.int32(0))
    np.testing.assert_allclose(total, aux.metrics["bpp"] + 0.25 * aux.metrics["mse"], rtol=1e-5)


def test_both_measures_are_weighed_as_asked():
    fields = dict(
        CODEC, codec=dict(IMAGE, levels=1), lambdas=(0.1,), size=176, ms_ssim_weight=500.0
    )
    batch, distortions = {"image": images(side=176)}, {}
    for metric in ("mse", "ms_ssim", "both"):
        task = build_task(ConfigDict(dict(fields, metric=metric)))
        variables = initial(task, batch)
        loss = jax.jit(lambda v, task=task: task.loss(v, batch, jax.random.key(5), jnp.int32(0)))
        distortions[metric] = loss(variables)[1].metrics["distortion"]
    expected = distortions["mse"] + 500 * distortions["ms_ssim"]
    np.testing.assert_allclose(distortions["both"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(metric="psnr"), "unknown metric"),
        (dict(lambdas=(0.1,)), "two ends"),
        (dict(lambdas=(0.0, 1.0)), "positive"),
        (dict(codec=dict(IMAGE, levels=1)), "two ends"),
        (dict(metric="ms_ssim"), "176"),
        (dict(metric="both"), "176"),
        (dict(codec=dict(IMAGE, kind="context")), "no image codec 'context'"),
        (dict(codec=dict(IMAGE, width=0)), "at least 1"),
        (dict(codec=dict(IMAGE, width=(4, 4, 4))), "takes width"),
        (dict(codec=dict(IMAGE, depth=3)), "the codec 'image' is built by image\\(kind"),
        (dict(codec=dict(name="picture")), "unknown codec 'picture'"),
        (dict(codec=FILTER), "gives feature and no image"),
        (dict(codec=dict(IMAGE, last=7)), "sides 3 or 5"),
    ],
)
def test_bad_image_compression_configs_are_refused(change, message):
    with pytest.raises(IcmError, match=message):
        build_task(ConfigDict(dict(CODEC, **change)))


@pytest.mark.parametrize("frontend", ["pixels", "feature"])
def test_classification_scores_only_valid_rows(frontend):
    config = dict(MODEL, name="classification", frontend=frontend, mode="linear", classes=3)
    config |= dict(codec=FEATURE) if frontend == "feature" else {}
    task = build_task(ConfigDict(config))
    batch = {"image": images(), "label": jnp.array([0, 1, 2, 0]), "valid": jnp.array([True] * 4)}
    variables = initial(task, batch)
    loss = jax.jit(task.loss)
    half = {**batch, "valid": jnp.array([True, True, False, False])}
    wrong = {**half, "label": jnp.array([0, 1, 0, 1])}
    one, other = (loss(variables, b, jax.random.key(0), jnp.int32(0))[0] for b in (half, wrong))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    trained = {n for n in variables["params"] if task.groups(n) == "train"}
    assert trained == {"classifier"}
    assert task.predict(variables, batch)["logits"].shape == (4, 3)
    assert (task.codec is None) == (frontend == "pixels")


def test_segmentation_ignores_255():
    config = dict(
        MODEL,
        name="segmentation",
        frontend="pixels",
        mask_classes=3,
        aspp_rates=(1, 2),
        output_stride=8,
    )
    task = build_task(ConfigDict(config))
    mask = jnp.asarray(RNG.integers(0, 3, (4, 32, 32)).astype(np.uint8))
    batch = {"image": images(), "mask": mask, "valid": jnp.array([True] * 4)}
    variables = initial(task, batch)
    ignored = {**batch, "mask": jnp.full_like(mask, 255)}
    loss = jax.jit(task.loss)
    assert loss(variables, ignored, jax.random.key(0), jnp.int32(0))[0] == 0
    total = loss(variables, batch, jax.random.key(0), jnp.int32(0))[0]
    np.testing.assert_allclose(total, np.log(3), rtol=0.1)  # ASPP starts near zero logits
    assert task.predict(variables, {"image": images(side=24)})["logits"].shape == (4, 3, 3, 3)


def test_segmentation_loss_equals_numpy():
    """Cross-entropy over the known pixels of valid rows; the view is the identity in this test."""
    config = dict(MODEL, name="segmentation", frontend="pixels", mask_classes=3, aspp_rates=(1,))
    task = build_task(ConfigDict(dict(config, output_stride=8)))
    mask = RNG.integers(0, 3, (4, 32, 32)).astype(np.uint8)
    mask[:, :20] = 255
    batch = {"image": images(), "mask": jnp.asarray(mask), "valid": jnp.array([True] * 3 + [False])}
    variables = initial(task, batch)
    bias = np.array([0.1, -0.4, 0.9], np.float32)
    segmenter = jax.tree.map(jnp.zeros_like, variables["params"]["segmenter"])
    segmenter["rate1"]["bias"] = jnp.asarray(bias)  # every pixel has these logits, in any view
    variables["params"]["segmenter"] = segmenter
    total, aux = jax.jit(task.loss)(variables, batch, jax.random.key(4), jnp.int32(0))
    _, seen = views.mild(batch["image"], 32, batch["mask"], key=jax.random.key(4))
    seen = np.asarray(seen)[:3]
    known = seen[seen != 255]
    expected = (np.log(np.exp(bias).sum()) - bias)[known].mean()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["pixel_accuracy"], (known == 2).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dict(STAGE1, codec=dict(FILTER, dtype="bfloat16"), dtype="bfloat16"),
        dict(STAGE2, lmbda=100.0),
        dict(CODEC, straight_through=True),
        dict(CODEC, codec=dict(IMAGE, levels=1), lambdas=(10.0,), metric="ms_ssim", size=176),
    ],
    ids=["contrastive-bfloat16", "compression", "image_compression", "ms_ssim"],
)
def test_a_few_steps_lower_the_loss(config):
    """Noise, queue and keys are held, so that what is lowered stays the same function."""
    task = build_task(ConfigDict(config))
    batch = {"image": images(side=config["size"])}
    variables = initial(task, batch)
    frozen = {n: p for n, p in variables["params"].items() if task.groups(n) != "train"}
    trained = {n: p for n, p in variables["params"].items() if n not in frozen}

    @jax.jit
    def step(trained):
        def loss_of(trained):
            own = {**variables, "params": {**frozen, **trained}}
            return task.loss(own, batch, jax.random.key(0), jnp.int32(1000))[0]

        loss, gradient = jax.value_and_grad(loss_of)(trained)
        # By signs, as Adam's first step: alike for parameters of all scales.
        return loss, jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), trained, gradient)

    losses = []
    for _ in range(8):
        loss, trained = step(trained)
        losses.append(float(loss))
    assert np.isfinite(losses).all() and min(losses[-2:]) < losses[0]
