"""Two processes on the CPU: the routers' balance under data parallelism, and the tensor- and expert-parallel plans.

One pair of processes runs all checks, for starting them takes most of the time; each test reads what its check found.
"""

import json
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
from model_conformance import LAZY_DECODER
from torch.distributed.tensor import DTensor

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration

WORLD_SIZE = 2


def small_model(**overrides) -> OneRecForConditionalGeneration:
    torch.manual_seed(0)
    settings = {"initializer_range": 0.3, "history_items": 4, "session_items": 2, "dropout": 0.0} | overrides
    return OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", **settings))


def batch(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 29, (2, rows, 7), generator=generator)
    return {"input_ids": tokens[0], "labels": tokens[1]}


def check_balance(rank: int, folder: str) -> None:
    """Two micro-batches on each of two ranks move the biases as the four micro-batches do in one process."""
    micro_batches = [batch(3, seed) for seed in range(4)]
    alone = small_model().train()
    # The processes hold the same weights, so the experts that a micro-batch chooses are the same in each of them.
    for inputs in micro_batches:
        alone(**inputs)
    routers = [layer.moe.gate for layer in alone.model.decoder.layers]
    counts = torch.stack([router.tokens_per_expert for router in routers]).float()
    expected = alone.config.expert_bias_update_rate * torch.sign(counts.mean(1, keepdim=True) - counts)

    model = small_model().train()
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with parallel.no_sync():
        parallel(**micro_batches[2 * rank]).loss.backward()
    parallel(**micro_batches[2 * rank + 1]).loss.backward()
    load = model.model.update_expert_bias()
    for layer, bias in zip(model.model.decoder.layers, expected, strict=True):
        torch.testing.assert_close(layer.moe.gate.expert_bias, bias)
        assert layer.moe.gate.tokens_per_expert.sum() == 0
    torch.testing.assert_close(load["expert_load"], counts / counts.mean(1, keepdim=True))
    # The bias goes into the checkpoint, the counts do not.
    state = model.state_dict()
    assert torch.equal(state["model.decoder.layers.0.moe.gate.expert_bias"], expected[0])
    assert not any("tokens_per_expert" in name for name in state)


def check_sharded(rank: int, folder: str, sharded_names: set[str], **sizes) -> None:
    """Logits, loss, gradients and generated tokens of a sharded model are those of the whole one."""
    from transformers.distributed.configuration_utils import DistributedConfig

    whole = OneRecForConditionalGeneration.from_pretrained(folder)
    sharded = OneRecForConditionalGeneration.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
    inputs = batch(3)
    outputs = [model.train()(**inputs) for model in (whole, sharded)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    for output in outputs:
        output.loss.backward()
    found = set()
    for (name, parameter), shard in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        gradient = shard.grad.full_tensor() if isinstance(shard.grad, DTensor) else shard.grad
        local = shard.to_local() if isinstance(shard, DTensor) else shard
        if local.shape != parameter.shape:
            found |= {part for part in sharded_names if part in name}
        expected = parameter.grad
        if gradient.shape != expected.shape:  # this rank's experts
            expected = expected.chunk(WORLD_SIZE)[rank]
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4, msg=name)
    assert found == sharded_names
    options = {"num_beams": 3, "min_new_tokens": 7, "max_new_tokens": 7}
    tokens = [model.eval().generate(inputs["input_ids"], **options) for model in (whole, sharded)]
    assert torch.equal(*tokens)


def check_tensor_parallel(rank: int, folder: str) -> None:
    check_sharded(rank, folder, {"q_proj", "o_proj", "mlp.gate_proj", "experts.down_proj", "lm_head"}, tp_size=2)


def check_expert_parallel(rank: int, folder: str) -> None:
    check_sharded(rank, folder, {"q_proj", "experts.gate_up_proj", "experts.down_proj"}, tp_size=2, ep_size=2)


def check_lazy_tensor_parallel(rank: int, folder: str) -> None:
    """The cross-attention, whose keys and values fewer heads share, is whole on every rank."""
    check_sharded(rank, f"{folder}/lazy", {"self_attn.q_proj", "experts.down_proj", "lm_head"}, tp_size=2)


CHECKS = {
    "balance": check_balance,
    "tensor_parallel": check_tensor_parallel,
    "lazy_tensor_parallel": check_lazy_tensor_parallel,
    "expert_parallel": check_expert_parallel,
}


def run_checks(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    found = {}
    for name, check in CHECKS.items():
        try:
            check(rank, folder)
            found[name] = "passed"
        except Exception:
            found[name] = traceback.format_exc()
            if name != list(CHECKS)[-1]:
                # The other process may wait for this one in a collective: later checks would hang.
                break
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, str]]:
    folder = str(tmp_path_factory.mktemp("whole"))
    small_model(encoder_layers=2).save_pretrained(folder)
    small_model(**LAZY_DECODER).save_pretrained(f"{folder}/lazy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_checks, (folder, port), nprocs=WORLD_SIZE)
    return [json.load(open(f"{folder}/rank{rank}.json")) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(found, check):
    for outcomes in found:
        assert outcomes.get(check) == "passed", outcomes
