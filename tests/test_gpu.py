"""What only a GPU can show; skipped elsewhere. python -m pytest tests/test_gpu.py"""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_sampler import Letters, build, forward_logprobs, ids_of, run, some_requests

from slm import lora, model
from slm.attention import Packed
from slm.episode import Request, Sampling
from slm.formats import configs
from slm.sampling import Sampler, fast
from slm.sampling.draw import choose
from slm.sampling.flash import FlashDecode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BIG = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_size": 64, "positions": 512}


def on_gpu(seed=0, dtype=torch.float32, **shape):
    return build(seed, **shape).to("cuda", dtype)


def random(*shape, dtype=torch.bfloat16, std=1.0):
    return torch.randn(*shape, device="cuda", dtype=dtype) * std


@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_fused_operations_give_the_bits_of_single_ones(tokens):
    x, delta, weight = random(tokens, 256), random(tokens, 256), random(256)
    shape = model.Config(8, 64, 8, 1, 1, 1, 64)
    cos, sin = model.rope(torch.arange(tokens, device="cuda"), shape, torch.bfloat16)
    for function, arguments in ((fast.norm, (x, None, weight, 1e-6)), (fast.norm, (x, delta, weight, 1e-6)),
                                (fast.turn, (x.view(-1, 4, 64), cos, sin)), (fast.gated, (x, delta))):
        single = function(*arguments)
        with torch.inference_mode():
            fused = function(*arguments)
        for got, want in zip(*(y if isinstance(y, tuple) else [y] for y in (fused, single))):
            assert torch.equal(got, want), (function, (got - want).abs().max())


def test_fused_drawing_draws_the_same():
    logits, rows = random(64, 50_000, std=3.0), torch.arange(64, device="cuda")
    greedy, temperature = rows % 3 == 0, 0.5 + rows / 64
    for arguments in ((logits, None, greedy, None, rows), (logits, temperature, None, rows, rows),
                      (logits, temperature, greedy, rows, rows)):
        want = choose(*arguments)
        with torch.inference_mode():
            got = choose(*arguments)
        assert (got[0] == want[0]).float().mean() > 0.98  # a sum rounded otherwise may move a border
        same = got[0] == want[0]
        torch.testing.assert_close(got[1][same], want[1][same], atol=1e-4, rtol=1e-4)


def test_float32_greedy_equals_transformers_on_the_gpu():
    transformers = pytest.importorskip("transformers")
    ours = on_gpu(seed=3, **BIG)
    config = transformers.Qwen2Config(**configs.write(ours.config))
    theirs = transformers.Qwen2ForCausalLM(config).cuda().eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    requests = some_requests(20, seed=3, temperatures=(0.0,))
    for request, group in zip(requests, Sampler(ours, Letters()).generate(requests, progress=False)):
        ids = torch.tensor([request.ids], device="cuda")
        expected = theirs.generate(ids, max_new_tokens=request.sampling.max_tokens, do_sample=False,
                                   eos_token_id=0, pad_token_id=0)[0, ids.shape[1]:].tolist()
        assert all(reply.ids == expected for reply in group)


def test_the_gpu_samples_what_the_cpu_samples():
    ours, requests = build(seed=6), some_requests(30, seed=8)
    sampler = Sampler(copy.deepcopy(ours).cuda(), Letters())
    expected = ids_of(run(ours, requests))
    for _ in range(2):
        assert ids_of(sampler.generate(requests, progress=False)) == expected
    assert sampler.recorded.kept


def difference(ours, replies):
    """|dlogp| of all sampled tokens between the sampler and the training forward: mean, largest."""
    ours = copy.deepcopy(ours)
    found = [(forward_logprobs(ours, r, 1.0) - torch.tensor(r.logprobs, device="cuda")).abs()
             for group in replies for r in group]
    return float(torch.cat(found).mean()), float(torch.cat(found).max())


@pytest.mark.parametrize("options", [{}, {"max_batch": 3}, {"cache_tokens": 400}])
def test_bfloat16_stays_near_the_training_forward_on_the_gpu(options):
    """Flash attention over the cache with common prefixes, fused kernels, recordings, preemption."""
    ours = on_gpu(seed=2, dtype=torch.bfloat16, **BIG)
    system = list(range(1, 41))
    requests = [Request(ids=system + r.ids, n=r.n, sampling=r.sampling)
                for r in some_requests(24, seed=5, temperatures=(1.0,))]
    sampler = Sampler(ours, Letters(), **options)
    assert sampler.decode_by is FlashDecode
    for _ in range(2):
        mean, largest = difference(ours, sampler.generate(requests, progress=False))
        print(f"|dlogp| {mean:.4f}, at most {largest:.3f}")
        assert mean < 0.03 and largest < 0.6


def test_recordings_outlive_an_optimizer_step_and_see_it():
    ours = on_gpu(seed=4, dtype=torch.bfloat16, **BIG)
    lora.add(ours, r=8)
    lora.add(ours, r=4, name="other")
    for p in lora.parameters(ours, "default") + lora.parameters(ours, "other"):
        torch.nn.init.normal_(p, std=0.1)
    sampler = Sampler(ours, Letters())
    request = lambda name: Request(ids=list(range(1, 30)), n=3, sampling=Sampling(40, 1.0), adapter=name)
    recordings, before = [], None
    for name in ("default", "other", "default", "other"):
        for p in lora.parameters(ours, "default"):
            p.grad = torch.randn_like(p)
        with torch.no_grad():
            torch.optim.SGD(lora.parameters(ours, "default"), lr=0.02).step()
        replies = sampler.generate([request(name)], progress=False)
        with lora.use(ours, name):
            mean, _ = difference(ours, replies)
        assert mean < 0.03, name
        assert ids_of(replies) != before
        before = ids_of(replies)
        recordings.append(list(sampler.recorded.kept.values()))
    assert recordings[0] and recordings[3][:len(recordings[0])] == recordings[0]


def test_memory_stays_flat_while_batches_come_and_go():
    ours = on_gpu(seed=2, dtype=torch.bfloat16, **BIG)
    sampler, used = Sampler(ours, Letters()), []
    for seed in range(6):
        sampler.generate(some_requests(40, seed=seed), progress=False)
        sampler.forget()
        used.append(torch.cuda.memory_allocated())
    assert max(used[2:]) <= used[1] * 1.2


def test_forgetting_drops_recordings():
    ours = on_gpu(seed=2, dtype=torch.bfloat16, **BIG)
    sampler = Sampler(ours, Letters())
    first = ids_of(sampler.generate(some_requests(20, seed=1), progress=False))
    sampler.forget()
    assert not sampler.recorded.kept
    assert ids_of(sampler.generate(some_requests(20, seed=1), progress=False)) == first


def test_packed_flash_attention_equals_one_sequence_at_a_time():
    lengths, groups = [5, 1, 70, 13], 2
    q, k, v = random(89, 4, 64), random(89, 2, 64), random(89, 2, 64)
    out = Packed(lengths, "cuda")(0, q, k, v)
    start = 0
    for n in lengths:
        one = [x[start:start + n].transpose(0, 1)[None].float() for x in (q, k, v)]
        one[1:] = [x.repeat_interleave(groups, 1) for x in one[1:]]
        want = F.scaled_dot_product_attention(*one, is_causal=True)[0].transpose(0, 1)
        torch.testing.assert_close(out[start:start + n].float(), want, atol=2e-2, rtol=2e-2)
        start += n
