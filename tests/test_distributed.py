"""torchrun train.py STAGE: several processes equal one. Here they are forked, and talk by gloo."""

import multiprocessing
import os
import random
import shutil
import sys
import time

import pytest
from conftest import close
from test_train import FAST, SMALL, SMALL_VAE, lines, run_stage, same, state
from torch.distributed import fsdp  # noqa: F401 (so that no child has to import it)

import orthus
import sample
import train
import vae

STEPS = dict(FAST, steps=5, micro_batches=4, log_every=1, save_every=2, validate_every=3,
             seed=5, lr=2e-3, grad_clip=0.5, ema=0.5)  # fmt: skip
ENDLESS = 400  # steps
STAGES = {"chameleon": "adamw", "base": "adamw", "posttrain": "muon"}  # with their optimisers
MORE = {"base": {"validate_every": 5}}  # the other head's five ranges of noise are posttrain's too


@pytest.fixture(autouse=True, scope="module")
def road(tmp_path_factory):
    """Small presets, and what each stage starts from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(orthus.PRESETS, "nano", orthus.PRESETS["nano"] | SMALL)
        patch.setitem(vae.PRESETS, "nano", vae.PRESETS["nano"] | SMALL_VAE)
        patch.setattr(os, "fsync", lambda file: None)
        root, inits, init = tmp_path_factory.mktemp("road"), {}, None
        for name in ("vae", "chameleon", "base"):
            inits[name], init = init, run_stage(name, root / name, init, steps=1)
        yield inits | {"posttrain": init}


def flags(name, run, init, **changes) -> list[str]:
    pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in (STEPS | changes).items()]
    return [name, "--out", str(run), "--init", str(init), *sum(map(list, pairs), [])]


def start(count: int, *commands: list[str], slow: float = 0.0) -> list:
    """Processes as torchrun starts them; each step takes `slow` seconds more. They run one command
    after the other, since most of their time goes into the first step of the first."""
    context = multiprocessing.get_context("fork")
    below = random.SystemRandom().sample(range(10000, 32000), len(commands))  # gloo's own are above
    ports = [str(port) for port in below]

    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
        update = train.update_average
        train.update_average = lambda *a: (time.sleep(slow), update(*a))
        for os.environ["MASTER_PORT"], command in zip(ports, commands, strict=True):
            sys.argv = ["train.py", *command]
            train.main()

    children = [context.Process(target=body, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    return children


def codes(children: list) -> list[int]:
    """What the processes end with."""
    for child in children:
        child.join(200)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def wait_for(path, children: list) -> None:
    limit = time.time() + 600
    while not path.exists() and all(c.is_alive() for c in children) and time.time() < limit:
        time.sleep(0.01)
    assert path.exists()


@pytest.fixture(scope="module")
def runs(road, tmp_path_factory):
    """The transformer's stages by one process, and by two. The two go on with a run, "stopped",
    until the second is asked to end, and with another, "killed", until both are killed."""
    roots = [tmp_path_factory.mktemp("runs") for _ in range(2)]
    alone, both = ([flags(name, root / name, road[name], optimizer=o, **MORE.get(name, {}))
                    for name, o in STAGES.items()] for root in roots)  # fmt: skip
    assert codes(start(1, *alone)) == [0]
    two, init = roots[1], road["posttrain"]
    both += [flags("posttrain", two / "stopped", init, steps=ENDLESS),
             flags("posttrain", two / "killed", init, optimizer="muon")]  # fmt: skip
    children = start(2, *both, slow=0.05)
    wait_for(two / "stopped" / "step-00000002", children)
    children[1].terminate()
    wait_for(two / "killed" / "step-00000002", children)  # so both ended the one before well
    time.sleep(random.Random(time.time_ns()).uniform(0, 0.15))
    for child in children:
        child.kill()
    codes(children)
    return roots


def compare(one, two) -> None:
    """Logs, weights, averages and moments are equal within rounding."""
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys()
        timed = ("examples_per_second", "tokens_per_second", "waiting")
        for key in a.keys() - {"stage", *timed}:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-6), (key, a["step"])
    one, two = state(one), state(two)
    for part in ("weights", "average"):
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            close(two[part][name], tensor, 1e-3)
    a, b = one["optimizer"], two["optimizer"]
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for number, moments in a["state"].items():
        for key, moment in moments.items():
            close(b["state"][number][key], moment, 2e-3 * moment.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", STAGES)
def test_two_processes_are_one(runs, name):
    one, two = (root / name for root in runs)
    compare(one, two)
    sample.load(two)


def test_a_killed_run_goes_on_with_one_process_or_as_many(runs, tmp_path):
    run, whole = runs[1] / "killed", runs[1] / "posttrain"
    for count in (1, 2):
        again = tmp_path / str(count)
        shutil.copytree(run, again)
        if train.newest_save(run).name != "step-00000005":
            command = ["posttrain", "--out", str(again), "--resume"]
            assert codes(start(count, command)) == [0] * count
        compare(whole, again)
        assert [d["step"] for d in lines(again)] == [1, 2, 3, 4, 5]
    assert same(state(whole), state(tmp_path / "2"))


def test_sigterm_to_one_process_ends_all_well_at_one_step(runs):
    run = runs[1] / "stopped"
    step = lines(run)[-1]["step"]
    assert train.newest_save(run).name == f"step-{step:08d}" and step < ENDLESS
    assert (runs[1] / "killed" / "run.json").is_file()  # all went on to the next run


WRONG = {"vae": "leave out torchrun", "posttrain --compile": "leave out torchrun",
         "posttrain --micro-batches 1": "a multiple of the 2 processes"}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_shared_out_is_said_in_one_line(road, tmp_path, capfd, wrong):
    name, *more = wrong.split()
    ends = codes(start(2, [*flags(name, tmp_path / "run", road["posttrain"]), *more]))
    assert 2 in ends and 0 not in ends  # the last one may see a lost connection first
    assert any(WRONG[wrong] in line for line in capfd.readouterr().err.splitlines())
    assert not (tmp_path / "run").exists()
