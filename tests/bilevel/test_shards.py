"""Ranks that hold shards of θ are one process: the same θ, φ and figures, up to the order of sums.

The one process takes the functional execution, which shares no pass and no step with the resident
one over shards.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bilevel import (
    SGD,
    Auto,
    BilevelSolver,
    Dot,
    Ghost,
    Jvp,
    OneStep,
    PerExample,
    Replicas,
    ResidentSolver,
    Shards,
    Unrolled,
    checkpoint,
    fit,
    functional,
    load_shards,
    save_shards,
    saving_shards,
    sharded,
    tree,
)
from bilevel.replicas import is_apart
from bilevel.shards import checkpoint as shard_files
from tests.bilevel import shard_cases, shard_checkpoints
from tests.rank_processes import fork_ranks, run_ranks

CASES = shard_cases.cases()
RUNS = [(ranks, name) for ranks in (2, 3) for name in CASES]
PARAMETERS = sum(
    leaf.numel()
    for leaf in shard_cases.model_of(shard_cases.Case()).parameters()
    if leaf.requires_grad
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of 2, and each of 3, found."""
    folder, result = tmp_path_factory.mktemp("shards"), {}
    fork_ranks("tests.bilevel.shard_cases", folder, 2, 3)
    for ranks in (2, 3):
        result[ranks] = [torch.load(folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    return result


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_shards_are_one_process(found, name, ranks):
    one = shard_cases.alone(CASES[name], ranks)
    first = found[ranks][0][name]["run"]
    assert first.keys() == one.keys()
    assert int(one["upper_steps"]) >= 2
    for key, expected in one.items():
        difference = (first[key].double() - expected.double()).nan_to_num().norm()
        assert torch.equal(first[key].isnan(), expected.isnan()), key
        scale = max(1.0, expected.double().nan_to_num().norm())
        assert difference <= 1e-12 * scale, (key, float(difference))


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_every_rank_holds_the_same_bits_of_the_whole(found, name, ranks):
    first, *others = (rank[name]["run"] for rank in found[ranks])
    for other in others:
        assert other.keys() == first.keys()
        for key, value in first.items():
            assert torch.equal(value.nan_to_num(7.0), other[key].nan_to_num(7.0)), key


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_holds_its_shards_alone(found, ranks):
    """In the module's own memory; at most the rows of ``Shard(0)``, rounded up."""
    for name in CASES:
        held = [rank[name]["held"] for rank in found[ranks]]
        assert sum(held) == PARAMETERS
        assert max(held) < PARAMETERS / ranks + 0.2 * PARAMETERS
        assert all(rank[name]["in the module"] for rank in found[ranks])


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """What each of two ranks met, by the fault."""
    folder = tmp_path_factory.mktemp("faults")
    for status, output in run_ranks("tests.bilevel.shard_faults", 2, folder):
        assert status == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("a step", "step 1"),
        ("an empty part", "ValueError: upper_batch: the ranks have [1, 0] examples"),
        ("places", "rank 0 at the lower gradient, rank 1 at the upper gradient"),
        ("micro-batches", "the ranks have [1, 2] micro-batches of one example each"),
        ("mixed precision", "mixed precision and offloading are not done"),
    ],
)
def test_what_cannot_be_done_over_ranks_is_an_error_on_all_of_them(faults, fault, expected):
    assert all(expected in rank[fault] for rank in faults)


def test_a_parameter_that_one_rank_does_not_use_is_an_error(faults):
    assert "ValueError: Shards: the loss does not depend on a parameter" in faults[1]["a branch"]
    assert "RankError: another rank is gone or does not answer" in faults[0]["a branch"]


# In one process, of which everything else is refused.


@pytest.fixture
def group(tmp_path):
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


VIEWS = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
CASE = shard_cases.Case("net")


def started(method=CASE.method, kind=ResidentSolver, change=lambda problem: problem):
    """A solver over one rank, its state and its module."""
    f = sharded(shard_cases.spread(CASE, 1))
    problem, phi = shard_cases.problem_of(CASE, f)
    solver = kind(
        change(problem), CASE.lower, SGD(0.5), method, collective=Shards(f, shard_cases.upper_size)
    )
    return solver, solver.init(f.module_params, phi), f


def batch(rows=1):
    return shard_cases.batch_of(rows, torch.Generator().manual_seed(0))


@VIEWS
def test_one_rank_is_one_process(group):
    _, state, figures = shard_cases.in_shards(CASE, 0, 1)
    one = shard_cases.alone(CASE, 1)
    for key, value in {**tree.flatten(state), **figures}.items():
        torch.testing.assert_close(value, one[key], rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (OneStep(Dot()), r"order lower-first over Shards .* choose order='upper-first'"),
        (OneStep(Ghost(), "upper-first"), r"route Ghost\(.*\) over Shards .* choose Dot\(\)"),
        (OneStep(Auto(), "upper-first"), r"route Auto\(\) over Shards .* choose Dot\(\)"),
        (OneStep(Jvp(), "upper-first"), r"route Jvp\(\) over Shards .* choose Dot\(\)"),
        (OneStep(PerExample(), "upper-first"), r"route PerExample\(.*\) over Shards"),
        (Unrolled(), "ResidentSolver: Unrolled, which keeps θ of several steps"),
    ],
)
def test_what_is_not_proven_over_shards_is_refused_by_name(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        started(method)


@pytest.mark.usefixtures("group")
def test_a_solver_that_hands_parameters_over_is_refused():
    with pytest.raises(ValueError, match=r"Shards joins shards .* choose ResidentSolver"):
        started(kind=BilevelSolver)


@pytest.mark.usefixtures("group")
def test_a_module_is_read_whole_tensor_by_tensor_tied_ones_once():
    whole = shard_cases.model_of(CASE).state_dict()
    read = list(sharded(shard_cases.spread(CASE, 1)).whole())
    assert {name: tuple(names) for names, _ in read for name in names} == {
        name: ("embedding.weight", "tied.weight")
        if name in ("embedding.weight", "tied.weight")
        else (name,)
        for name in whole
    }
    for names, leaf in read:
        assert type(leaf) is torch.Tensor
        assert torch.equal(leaf, whole[names[0]])


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("over_shards", "told"), [(True, []), (False, ["OSError: gone"])])
def test_an_error_over_shards_is_told_to_nobody(monkeypatch, over_shards, told):
    """The others may stand in an exchange of parameters, where a word would be taken for one."""
    shards, sent = Shards(sharded(shard_cases.spread(CASE, 1))), []
    monkeypatch.setattr(Replicas, "_fail", lambda self, reason: sent.append(reason))

    def fail():
        with shards.replicas.together(), shards.together() if over_shards else nullcontext():
            raise OSError("gone")

    with pytest.raises(OSError, match="gone") as caught:
        fail()
    assert sent == told
    assert is_apart(caught.value) == over_shards


@pytest.mark.usefixtures("group")
def test_parameters_that_the_module_would_ignore_are_refused():
    solver, state, f = started()
    others = tree.map(torch.clone, state.lower_params)
    sentence = "'blocks.0.narrow.weight' is not the module's own shard"
    with pytest.raises(ValueError, match=sentence):
        f(others, batch()["tokens"])
    with pytest.raises(ValueError, match=sentence):
        solver.init(others, state.upper_params)
    with pytest.raises(ValueError, match="fully_shard, which computes with parameters of its own"):
        functional(f.module)


@VIEWS
@pytest.mark.usefixtures("group")
def test_a_loss_that_uses_a_shard_itself_is_refused():
    def decayed(problem):
        def per_example_loss(theta, batch):
            losses, features = problem.per_example_loss(theta, batch)
            return losses + theta["head.weight"].square().sum(), features

        return dataclasses.replace(problem, per_example_loss=per_example_loss)

    solver, state, _ = started(change=decayed)
    with pytest.raises(ValueError, match=r"the loss uses 'head.weight' itself beside the module"):
        solver.step(state, [batch()])


@VIEWS
@pytest.mark.usefixtures("group")
def test_a_parameter_without_a_gradient_is_refused():
    def constant(problem):
        def per_example_loss(theta, batch):
            losses, features = problem.per_example_loss(theta, batch)
            return losses.detach() + f.module.blocks[0](torch.ones(1, 5).double()).sum(), features

        return dataclasses.replace(problem, per_example_loss=per_example_loss)

    solver, state, f = started(change=constant)
    with pytest.raises(ValueError, match=r"does not depend on blocks.1.narrow.weight, .* more"):
        solver.step(state, [batch()])


@VIEWS
@pytest.mark.usefixtures("group")
def test_micro_batches_of_several_examples_are_refused():
    solver, state, _ = started()
    with pytest.raises(ValueError, match=r"route Dot\(\): expected micro-batches of 1 example"):
        solver.step(state, [batch(2)])


@VIEWS
@pytest.mark.usefixtures("group")
def test_a_backward_pass_beside_the_solver_is_refused():
    """The gradients of such a module are no mean any more."""
    _, state, f = started()
    with pytest.raises(RuntimeError, match="got a gradient outside of a step"):
        f(state.lower_params, batch()["tokens"]).sum().backward()


@pytest.mark.usefixtures("group")
def test_running_statistics_are_refused():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    f = sharded(module)
    with pytest.raises(ValueError, match=r"changed the buffer '1\.num_batches_tracked'"):
        f(f.module_params, torch.ones(4, 3))


@pytest.mark.usefixtures("group")
def test_modules_that_are_sharded_otherwise_are_refused():
    with pytest.raises(TypeError, match=r"on which torch.distributed.fsdp.fully_shard was called"):
        sharded(torch.nn.Linear(2, 2))
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
    with pytest.raises(ValueError, match=r"replicated groups .* are not done"):
        sharded(fully_shard(torch.nn.Linear(2, 2), mesh=both))
    module = torch.nn.Linear(2, 2)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)), ignored_params={module.bias})
    with pytest.raises(ValueError, match=r"expected 'bias' sharded .* found not at all"):
        sharded(module)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="expected trained parameters"):
        sharded(fully_shard(frozen, mesh=init_device_mesh("cpu", (1,))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with what 1, 2 and 3 ranks have saved, before and while they went on."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "saved").mkdir()
    fork_ranks("tests.bilevel.shard_checkpoints", folder / "saved", 1, 2, 3)
    return folder


@pytest.fixture(scope="module")
def resumed(saved):
    """What ranks found that went on from what others saved, by the numbers of both."""
    folder, found = saved / "resumed", {}
    folder.mkdir()
    fork_ranks("tests.bilevel.shard_checkpoints", folder, 1, 2)
    for ranks in (1, 2):
        for by in (1, 2, 3):
            found[by, ranks] = torch.load(folder / f"{by}-{ranks}-0.pt")
    return found


@pytest.mark.parametrize(("by", "ranks"), [(2, 1), (1, 2), (3, 2), (2, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(resumed, by, ranks):
    """The state is loaded in place, and so into the module."""
    found, expected = resumed[by, ranks], resumed[by, 3 - ranks]["loaded"]
    assert int(found["loaded"]["lower_steps"]) == shard_checkpoints.SAVED
    for name, value in found["loaded"].items():
        assert torch.equal(value, expected[name]), name
    one = shard_cases.alone(shard_checkpoints.CASE, shard_checkpoints.MICRO_BATCHES)
    for name, value in found["end"].items():
        torch.testing.assert_close(value, one[name], rtol=1e-11, atol=1e-13)


def test_a_module_that_an_evaluation_left_whole_sees_what_was_loaded(resumed):
    """``fully_shard`` keeps the outermost module whole after a pass without a backward pass."""
    found = resumed[1, 2]
    assert not torch.allclose(found["before"], found["after"], rtol=1e-3)
    f = functional(shard_cases.model_of(shard_checkpoints.CASE))
    loaded = {name: found["loaded"][f"lower_params/{name}"] for name in f.names}
    tokens = shard_cases.batch_of(2, torch.Generator().manual_seed(0))["tokens"]
    torch.testing.assert_close(f(loaded, tokens).detach(), found["after"], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_written_while_training_goes_on_is_the_state_before(saved, ranks):
    """Bit for bit what was written before the next step."""
    both = [saved / "saved" / f"{name}-{ranks}" for name in ("by", "aside")]
    files = sorted(path.name for path in both[0].iterdir())
    assert len(files) == ranks + 1
    assert files == sorted(path.name for path in both[1].iterdir())
    assert files[0] == "seal.json"
    for name in files[1:]:
        assert name.endswith(".safetensors")
        one, other = (load_file(path / name) for path in both)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
    assert not list((saved / "saved").glob(".*"))


@pytest.mark.usefixtures("group")
def test_checkpoints_that_are_not_as_written_are_refused(tmp_path):
    _, state, f = started()
    path = tmp_path / "state"
    save_shards(path, f, state)
    with pytest.raises(FileExistsError, match="exists; a checkpoint over shards needs a new"):
        save_shards(path, f, state)
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    before = tree.map(torch.clone, state)
    with pytest.raises(ValueError, match=rf"{file.name} is not as it was written"):
        load_shards(path, f, state)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is not as it was written"):
        load_shards(path, f, state)
    with pytest.raises(FileNotFoundError):
        load_shards(tmp_path / "other", f, state)
    assert all(map(torch.equal, tree.leaves(state), tree.leaves(before)))


@pytest.mark.usefixtures("group")
def test_checkpoints_of_another_optimizer_are_refused(tmp_path):
    _, state, f = started()
    save_shards(tmp_path / "state", f, state)
    plain = SGD(0.1).init(state.lower_params)
    sentence = r"'lower_optimizer/first_moment/.*' is torch.float64 \(.*\) in the .* missing here"
    with pytest.raises(ValueError, match=sentence):
        load_shards(tmp_path / "state", f, state._replace(lower_optimizer=plain))


@VIEWS
@pytest.mark.usefixtures("group")
def test_a_folder_that_cannot_be_written_leaves_no_checkpoint(tmp_path, monkeypatch):
    """The writer waits until its folder is gone: otherwise it may be ahead of this test."""
    _, state, f = started()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_shards(tmp_path / "file" / "state", f, state)
    gone, write = threading.Event(), shard_files._write
    monkeypatch.setattr(shard_files, "_write", lambda *given: (gone.wait(60), write(*given))[1])
    saving = saving_shards(tmp_path / "state", f, state)
    shutil.rmtree(tmp_path / ".state.unfinished")
    (tmp_path / ".state.unfinished").write_text("")
    gone.set()
    with pytest.raises(OSError, match="unfinished"):
        saving.finish()
    assert not (tmp_path / "state").exists()


@VIEWS
@pytest.mark.usefixtures("group")
def test_a_file_of_one_rank_is_refused(tmp_path):
    """``bilevel.checkpoint`` would write the shards of whoever comes last."""
    solver, state, _ = started()
    with pytest.raises(ValueError, match=r"checkpoint: θ lies in shards .*save_shards"):
        fit(
            solver,
            state,
            [batch()],
            [batch(3)],
            steps=1,
            callbacks=[checkpoint(tmp_path / "state.pt", every=1)],
        )
