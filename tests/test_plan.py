"""Plans against hand-counted programs, real batches and real states."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_main import ROOT, main

from icm_jax import ops
from icm_jax.data import DATASETS, open_source, pipeline
from icm_jax.engine import fields, plan, sharding, train
from icm_jax.engine.run import Run
from icm_jax.errors import IcmError
from icm_jax.main import load_experiment
from icm_jax.nets.layers import GDN
from icm_jax.tasks import build_task
from icm_jax.tasks.contrastive import info_nce
from icm_jax.tasks.task import Aux, Task

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # orbax's and optax's own


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def tiny_run(experiment, name, tmp_path, **changes):
    module = load_experiment(str(ROOT / "configs" / f"{experiment}.py"))
    config = module.get_config("tiny")
    config.data.path = str(tmp_path)
    run = next(run for run in module.runs(config) if run.name == name)
    return dataclasses.replace(run, **changes)


def small_run(remat):
    """A run with what `make_step` reads."""
    empty = ConfigDict()
    return Run("small", 0, empty, empty, empty, 2, 4, log_every=1, save_every=1, remat=remat)


PROGRAM = """
HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %r = f32[8,4]{1,0} all-reduce(%g), replica_groups=[2,4]<=[8], to_apply=%sum
}

%fused (p: bf16[4]) -> bf16[4] {
  %q = bf16[10]{0} all-gather(%p), replica_groups={{0,1,2,3,4}}, dimensions={0}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %t2 = (f32[100]{0}, f32[50,2]{1,0:T(8,128)}) all-reduce(%a, %b), replica_groups=[1,8]<=[8]
  %f = bf16[10] fusion(%x), kind=kLoop, calls=%fused
  %st = ((f32[16]{0}, s8[4]), (f32[128]{0}, s8[32])) all-gather-start(%x, %y), replica_groups={}
  %cs = (f32[9]{0}, f32[9]{0}, u32[], u32[]) collective-permute-start(%x)
  %dn = f32[128]{0} all-gather-done(%st)
  %rs = f32[16]{0} reduce-scatter(%x), replica_groups={}, to_apply=%sum
  %m = f32[4]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  %n = f32[4]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, to_apply=%sum
  %o = f32[4]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
  ROOT %cp = f32[7]{0} collective-permute(%x), source_target_pairs={{0,1}}
}
"""


def test_collectives_are_counted_as_by_hand():
    found = list(plan.collectives(PROGRAM, 8))
    assert found == [
        ("all-reduce", 128, 4, 3),
        ("all-reduce", 800, 8, 1),
        ("all-gather", 20, 5, 1),
        ("all-gather", 544, 8, 1),
        ("collective-permute", 36, 2, 1),
        ("reduce-scatter", 64, 8, 1),
        ("all-reduce", 16, 4, 1),
        ("all-reduce", 16, 4, 1),
        ("all-gather", 16, 4, 1),
        ("collective-permute", 28, 2, 1),
    ]
    assert plan.sent(PROGRAM, 8) == pytest.approx(
        {
            "all-reduce": 3 * 2 * 128 * 3 / 4 + 2 * 800 * 7 / 8 + 4 * 16 * 3 / 4,
            "all-gather": 20 * 4 / 5 + 544 * 7 / 8 + 16 * 3 / 4,
            "reduce-scatter": 64 * 7,
            "collective-permute": 36 + 28,
        }
    )


def test_groups_that_cannot_be_read_are_not_guessed():
    with pytest.raises(ValueError, match="cannot read the groups"):
        plan.sent(PROGRAM.replace("{{0,1,2,3,4}}", "<new>"), 8)


@pytest.mark.parametrize("options", [{}, {"boxes": 3}, {"coefficients": "90"}, {"masks": False}])
def test_layout_is_that_of_real_batches(tmp_path, options):
    run = tiny_run("omni_icm", "seed0/omni/stage1", tmp_path)
    source = open_source(run.data, "train")
    spec = pipeline.BatchSpec(4, (32, 48), **options)
    batches = pipeline.batches(source, spec, seed=0, stop=1)
    real = {name: (value.shape, value.dtype) for name, value in next(batches).items()}
    assert real == pipeline.layout(DATASETS["scenes"].keys, spec)
    counts = len(source.classes), len(source.mask_classes)
    assert counts == (DATASETS["scenes"].classes, DATASETS["scenes"].mask_classes)


def test_a_plan_is_of_the_state_and_sends_gradients_and_keys_alone(tmp_path):
    """No activations, and not the queue."""
    run = tiny_run("omni_icm", "seed0/omni/stage1", tmp_path)
    run.task.update(negatives="both", queue=4096)
    record = plan.plan(run, plan.Target("two", jax.devices(), None))
    task = build_task(plan.counted(run))
    init, _ = train.initial(train.prepare(run, task))
    state = jax.eval_shape(init, jax.random.key(0), dict(task.constants))
    size = {
        "parameters": plan_bytes(state.variables["params"]),
        "optimiser": plan_bytes(state.opt_state),
    }
    assert {name: record[name] for name in size} == size
    assert record["peak"] >= sum(size.values()) + record["others"] and record["flops"] > 0
    weights = plan_bytes(train.trained_part(task, state.variables["params"]))
    assert weights <= record["sent"]["all-reduce"] < 1.5 * weights + 2**16
    keys = 4 * run.batch_size * run.task.embedding
    gathered = {kind: size for kind, size in record["largest"].items() if kind != "all-reduce"}
    assert gathered and max(gathered.values()) <= keys, gathered


@pytest.mark.parametrize("negatives", ["queue", "both"])
def test_negatives_of_all_devices_stay_where_they_are(negatives):
    n, k, d = 8, 512, 16
    rng = np.random.default_rng(0)
    query, keys, queue = (rng.normal(size=s).astype("f") for s in [(n, d), (n, d), (k // n, n, d)])
    of = jax.value_and_grad(lambda *a: info_nce(*a, 4.0, negatives), has_aux=True)
    mesh = sharding.make_mesh()
    rows = sharding.batch_sharding(mesh)
    slots = sharding.state_shardings(mesh, {"queue": queue})["queue"]
    with ops.traced_on(mesh):
        places = (rows, rows, slots)
        compiled = jax.jit(of, in_shardings=places).lower(query, keys, queue).compile()
    given = compiled(*map(jax.device_put, (query, keys, queue), places))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), given, of(query, keys, queue)
    )
    program = compiled.as_text()
    assert max(own.size for own in plan.collectives(program, mesh.size)) <= 3 * query.nbytes
    local = f"f32[{n},{k // n},{n // mesh.size}]"
    assert local in program and f"f32[{n},{k // n},{n}]" not in program


def test_eight_devices_gather_neither_queue_nor_activations(tmp_path):
    flags = ("--only=*/omni/stage1", "--config.train.batch_size=16", "--config.stage1.queue=8192")
    flags += ("--mode=plan", "--topology=cpu:8", "--config.stage1.negatives=both")
    done = main(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = json.loads((tmp_path / "plan.json").read_text())
    keys, queue = (4 * rows * 16 for rows in (16, 8192))  # float32 [rows, embedding]
    assert record["largest"].pop("all-reduce") <= record["parameters"]
    assert max(record["largest"].values()) <= keys
    assert record["sent"]["all-reduce"] < 2 * record["parameters"] + keys
    assert record["others"] < queue / 8 + 2 * record["parameters"]


def plan_bytes(tree):
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("remat", ["convolutions", "blocks"])
def test_remat_computes_again_and_changes_no_result(remat):
    layer = GDN()

    def init(key, batch):
        del batch
        return {"params": {"gdn": layer.init(key, jnp.zeros((1, 3)))["params"]}}

    def loss(variables, batch, key, step):
        del key, step
        own = {"params": variables["params"]["gdn"]}
        x = jnp.sin(layer.apply(own, jnp.sin(layer.apply(own, batch["x"]))))
        return jnp.square(x).mean(), Aux({}, {})

    task = Task(init, loss, None, lambda name: "train")
    sgd = optax.sgd(0.1)
    params = init(jax.random.key(0), None)["params"]
    state = train.TrainState(jnp.zeros((), jnp.int32), {"params": params}, sgd.init(params), {})
    arguments = state, {"x": jnp.linspace(-2, 2, 12).reshape(4, 3)}, jax.random.key(0)
    found, programs = {}, {}
    for own in ("none", remat):
        step = train.make_step(task, sgd, small_run(remat=own))
        found[own] = step(*arguments)
        programs[own] = str(jax.make_jaxpr(step)(*arguments))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
        found[remat][0].variables,
        found["none"][0].variables,
    )
    assert programs[remat].count(" sin ") > programs["none"].count(" sin ")


def test_an_unknown_remat_is_refused():
    with pytest.raises(IcmError, match="remat is 'all'; it must be one of none, conv"):
        small_run(remat="all")
    assert tuple(train.REMAT) == fields.REMAT


@pytest.mark.parametrize("topology", ["v9z:4x4", "v5e", "v5e:four", "cpu:"])
def test_a_strange_topology_is_one_clear_error(topology):
    with pytest.raises(IcmError, match=r"topology|shape"):
        plan.prepare_host(topology)


def test_the_command_prints_tables_and_writes_json(tmp_path):
    done = main(tmp_path, "--mode=plan", "--topology=cpu:4", name="hyperprior")
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = [r for r in json.loads((tmp_path / "plan.json").read_text())][:1]
    assert record["devices"] == 4 and record["sent"]["all-reduce"] > 0
    assert "| run | batch |" in done.stdout and str(tmp_path / "plan.json") in done.stdout


@pytest.mark.skipif(
    not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")),
    reason="needs libtpu: pip install 'icm_jax[tpu]'",
)
def test_a_tpu_slice_is_planned_without_a_tpu(tmp_path):
    done = main(tmp_path, "--mode=plan", "--topology=v5e:2x2", name="hyperprior")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "plan.json").read_text())[0]
    assert record["devices"] == 4 and 0 < record["peak"] < record["memory"]
    assert record["bound"] in ("compute", "traffic", "network") and record["seconds"] > 0


def test_without_libtpu_one_line_says_what_to_install(tmp_path):
    code = (
        "from icm_jax.engine import plan; plan.prepare_host('v5e:2x2'); plan.open_target('v5e:2x2')"
    )
    hidden = "import sys; sys.modules['libtpu'] = None; T = 'v5e:2x2'\n"
    environment = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", hidden + code], capture_output=True, text=True, env=environment
    )
    assert done.returncode and "icm_jax[tpu]" in done.stderr.splitlines()[-1]
