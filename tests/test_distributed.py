"""torchrun train.py STAGE: several processes equal one. Here they are forked, and talk by gloo."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time

import pytest

from conftest import close
from torch.distributed import fsdp  # noqa: F401 (so that no child has to import it)
from test_train import FAST, SMALL, SMALL_VAE, lines, run_stage, same, state

import orthus
import sample
import train
import vae

STEPS = dict(FAST, steps=4, micro_batches=4, log_every=1, save_every=2, validate_every=2,
             seed=5, lr=2e-3, grad_clip=0.5, ema=0.5)  # fmt: skip


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


def resume(run, *more) -> list[str]:
    return ["posttrain", "--out", str(run), "--resume", *more]


def start(count: int, args: list[str], slow: float = 0.0) -> list:
    """Processes as torchrun starts them; each step takes `slow` seconds more."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")

    def body(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                       "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
        update = train.update_average
        train.update_average = lambda *a: (time.sleep(slow), update(*a))
        sys.argv = ["train.py", *args]
        train.main()

    children = [context.Process(target=body, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    return children


def run_to_the_end(count: int, args: list[str]) -> list[int]:
    children = start(count, args)
    for child in children:
        child.join(60)
        child.kill()
    return [child.exitcode for child in children]


def compare(one, two) -> None:
    """Logs, weights, averages and moments are equal within rounding."""
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys()
        timed = ("examples_per_second", "tokens_per_second", "waiting")
        for key in a.keys() - {"stage", *timed}:
            assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-6), (key, a["step"])
    for part in ("weights", "average"):
        for name, tensor in state(one)[part].items():
            close(state(two)[part][name], tensor, 1e-3)
    for a, b in zip(state(one)["optimizer"], state(two)["optimizer"], strict=True):
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        for number, moments in a["state"].items():
            for key, moment in moments.items():
                size = moment.abs().max().item()
                close(b["state"][number][key], moment, 2e-3 * size + 1e-9)


@pytest.mark.parametrize("name, optimizer", [("chameleon", "adamw"), ("base", "adamw"),
                                             ("posttrain", "muon")])  # fmt: skip
def test_two_processes_are_one(road, tmp_path, name, optimizer):
    for count in (1, 2):
        run = tmp_path / str(count)
        args = flags(name, run, road[name], optimizer=optimizer)
        assert run_to_the_end(count, args) == [0] * count
    compare(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_run_goes_on_with_as_many_processes_or_others(road, tmp_path, count):
    run = tmp_path / "run"
    args = flags("posttrain", run, road["posttrain"], steps=6)
    assert run_to_the_end(2, [a.replace(str(run), str(tmp_path / "whole")) for a in args]) == [0, 0]
    children, limit = start(2, args, slow=0.05), time.time() + 30
    while not (run / "step-00000002").exists() and time.time() < limit:
        time.sleep(0.01)
    time.sleep(random.Random(time.time_ns()).uniform(0, 0.2))
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    if train.newest_save(run).name != "step-00000006":
        assert run_to_the_end(count, resume(run)) == [0] * count
    compare(tmp_path / "whole", run)
    assert count == 1 or same(state(tmp_path / "whole"), state(run))
    assert [d["step"] for d in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert sample.load(run).model.config.image_head == "diffusion"


def test_sigterm_to_one_process_ends_all_well_at_one_step(road, tmp_path):
    children = start(2, flags("posttrain", tmp_path, road["posttrain"], steps=400), slow=0.02)
    while not (tmp_path / "step-00000002").exists():
        time.sleep(0.01)
    os.kill(children[1].pid, signal.SIGTERM)
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    assert train.newest_save(tmp_path).name == f"step-{lines(tmp_path)[-1]['step']:08d}"


@pytest.mark.parametrize("name, micro, problem", [("vae", 4, "leave out torchrun"),
                                                  ("posttrain", 1, "a multiple of")])
def test_what_cannot_be_shared_out_is_said_in_one_line(road, tmp_path, capfd, name, micro, problem):
    run = tmp_path / "run"
    assert run_to_the_end(2, flags(name, run, road["posttrain"], micro_batches=micro)) == [2, 2]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and all(problem in line for line in said) and not run.exists()
