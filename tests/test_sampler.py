"""The sampler, against transformers, against the training forward, and against itself in other company."""

import copy
import math
import random
import warnings
from dataclasses import replace
from itertools import chain

import pytest
import torch

from slm import BadInput, lora
from slm.attention import Packed
from slm.episode import Request, Sampling
from slm.formats import configs
from slm.losses import token_logprobs, warp
from slm.model import Config, Qwen2
from slm.sampling import Sampler, drafts, draw, graphs, slots
from slm.sampling import flash as flash_room
from slm.sampling import sampler as module
from slm.sampling.cache import KVCache
from slm.sampling.draw import categorical, uniform
from slm.sampling.flash import FlashDecode, FlashPrefill

torch.set_num_threads(1)


class Letters:
    """A tokenizer whose ids are code points; 0 ends a reply."""
    stop_ids = frozenset([0])

    def decode(self, ids, skip_special=True):
        return "".join(chr(i) for i in ids if i or not skip_special)

    def encode(self, text):
        return [ord(c) for c in text]

    def chat(self, messages):
        return self.encode("".join(m["content"] for m in messages))


def build(seed=0, vocab=96, dtype=torch.float32, **shape):
    torch.manual_seed(seed)
    small = {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8}
    config = Config(**{"vocab": vocab, **small, "positions": 128, **shape})
    model = Qwen2(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def some_requests(count=24, seed=0, vocab=96, temperatures=(0.0, 1.0, 0.7), **sampling):
    rng = random.Random(seed)
    ids = lambda: [rng.randrange(1, vocab) for _ in range(rng.randrange(1, 40))]
    return [Request(ids=ids(), n=rng.choice([1, 1, 3]), sampling=Sampling(
        rng.randrange(1, 30), rng.choice(temperatures), seed=i, **sampling)) for i in range(count)]


def ids_of(replies):
    return [[reply.ids for reply in group] for group in replies]


def run(model, requests, **options):
    return Sampler(model, Letters(), **options).generate(requests, progress=False)


def drain(sampler):
    out = []
    while sampler.pending:
        out += sampler.step()
    return [reply for *_, reply in sorted(out, key=lambda x: x[:2])]


def forward_logprobs(model, reply, temperature):
    """The training side's log-probs of a reply's ids."""
    ids = torch.tensor(reply.prompt_ids + reply.ids, device=next(model.parameters()).device)
    with torch.no_grad():
        attend = Packed([len(ids)], ids.device)
        hidden = model(ids, attend.positions, attend)
        span = slice(len(reply.prompt_ids) - 1, -1)
        return token_logprobs(model, hidden[span], ids[len(reply.prompt_ids):], temperature or 1.0)[0]


COMPANY = [{}, {"max_batch": 1}, {"max_batch": 5}, {"cache_tokens": 300},
           {"cache_tokens": 90, "max_batch": 3}]


# ---- exactness -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [
    {}, {"heads": 6, "kv_heads": 2}, {"kv_heads": 4, "tied": False}, {"heads": 3, "kv_heads": 1, "layers": 3},
    {"bias": False, "head_size": 16}, {"bias": False, "head_norm": True}])
def test_greedy_equals_transformers_token_for_token(shape):
    transformers = pytest.importorskip("transformers")
    model = build(seed=len(shape), **shape)
    told = configs.write(model.config)
    config = transformers.AutoConfig.for_model(**told)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    requests = some_requests(9, temperatures=(0.0,))
    expected = []
    for r in requests:
        out = peer.generate(torch.tensor([r.ids]), max_new_tokens=r.sampling.max_tokens, do_sample=False,
                            eos_token_id=0, pad_token_id=0, attention_mask=torch.ones(1, len(r.ids)))
        expected.append([out[0, len(r.ids):].tolist()] * r.n)
    for options in COMPANY:
        assert ids_of(run(model, requests, **options)) == expected, options
    shuffled = list(enumerate(requests))
    random.Random(1).shuffle(shuffled)
    replies = run(model, [r for _, r in shuffled], max_batch=5)
    assert ids_of(replies) == [expected[i] for i, _ in shuffled]


def test_a_sampled_reply_depends_on_its_own_seed_only():
    model, requests = build(), some_requests(24)
    together = ids_of(run(model, requests))
    for options in COMPANY:
        assert ids_of(run(model, requests, **options)) == together, options
    alone = [ids_of(run(model, [r]))[0] for r in requests[:8]]
    assert alone == together[:8]
    other = [Request(ids=r.ids, n=r.n, sampling=replace(r.sampling, seed=999)) for r in requests]
    assert ids_of(run(model, other)) != together
    spread = run(model, [Request(ids=[5, 6, 7], n=20, sampling=Sampling(8, 1.0))])[0]
    assert len({tuple(reply.ids) for reply in spread}) > 15
    late = run(model, [Request(ids=[5, 6, 7], sampling=Sampling(8, 1.0, seed=7))])[0][0]
    assert late.ids == spread[7].ids  # sample i uses seed + i


@pytest.mark.parametrize("options", COMPANY)
def test_logprobs_are_those_of_the_training_forward(options):
    model, requests = build(seed=3), some_requests(24, seed=5)
    for request, group in zip(requests, run(model, requests, **options)):
        for reply in group:
            expected = forward_logprobs(model, reply, request.sampling.temperature)
            torch.testing.assert_close(torch.tensor(reply.logprobs), expected, atol=1e-5, rtol=0)


def test_truncated_sampling_reports_the_distribution_it_drew_from():
    model = build(seed=4)
    requests = some_requests(12, temperatures=(0.9,), top_k=5, top_p=0.8) + some_requests(4, seed=1)
    replies = run(model, requests)
    assert ids_of(run(model, requests, max_batch=3)) == ids_of(replies)
    for group in replies[:12]:
        for reply in group:
            ids = torch.tensor(reply.prompt_ids + reply.ids)
            with torch.no_grad():
                logits = model.logits(model(ids, torch.arange(len(ids)), Packed([len(ids)])))
            logits = warp(logits[len(reply.prompt_ids) - 1:-1], 0.9, 5, 0.8)
            expected = logits.log_softmax(-1).gather(1, torch.tensor(reply.ids)[:, None]).squeeze(1)
            assert expected.isfinite().all()
            torch.testing.assert_close(torch.tensor(reply.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_drawn_in_parts_are_drawn_as_at_once(mixed, monkeypatch):
    model = build(seed=4)
    requests = some_requests(12, temperatures=(0.9,), top_k=5, top_p=0.8) + some_requests(8, seed=1)
    requests = requests if mixed else requests[12:]
    want = run(model, requests)
    monkeypatch.setattr(draw, "PART", 3 * model.config.vocab + 1)
    got = run(model, requests)
    assert [[(x.ids, x.logprobs) for x in group] for group in got] == [
        [(x.ids, x.logprobs) for x in group] for group in want]


def test_drawing_follows_the_probabilities():
    torch.manual_seed(0)
    p = torch.randn(1, 300).mul(2).softmax(-1)
    p[0, 17] = p[0, -1] = 0
    p /= p.sum()
    u = uniform(torch.full((40000,), 123456789), torch.arange(40000))
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.005 and 0 <= u.min() and u.max() < 1
    counts = torch.bincount(categorical(p.expand(40000, -1), u), minlength=300)[:300]
    assert counts[p[0] == 0].sum() == 0
    common = p[0] * 40000 > 5
    chi2 = ((counts - p[0] * 40000) ** 2 / (p[0] * 40000))[common].sum()
    assert chi2 < common.sum() + 5 * math.sqrt(2 * common.sum())
    edges = categorical(p.expand(2, -1), torch.tensor([0.0, 1 - 2.0 ** -24]))
    assert (p[0, edges] > 0).all()


def test_bfloat16_stays_near_the_training_forward():
    model = build(dtype=torch.bfloat16)
    requests = some_requests(12)
    differences = []
    for request, group in zip(requests, run(model, requests)):
        for reply in group:
            expected = forward_logprobs(model, reply, request.sampling.temperature)
            differences.append((torch.tensor(reply.logprobs) - expected).abs())
    assert torch.cat(differences).mean() < 0.03


@pytest.mark.parametrize("options", COMPANY)
def test_drafts_change_no_reply_and_save_steps(options, monkeypatch):
    model, requests = build(seed=7), some_requests(16, seed=3, temperatures=(0.0, 0.5, 1.0))
    requests += some_requests(4, seed=9, temperatures=(1.0,), top_k=7, top_p=0.9)
    for request in requests:
        request.sampling = replace(request.sampling, max_tokens=50)
    plain = Sampler(model, Letters(), **options)
    plain.drafts = None
    expected = plain.generate(requests, progress=False)
    monkeypatch.setattr(drafts, "ROWS", 99)
    monkeypatch.setattr(drafts, "FIXED", 1e9)  # whatever is guessed is tried
    sampler = Sampler(model, Letters(), **options)
    replies = sampler.generate(requests, progress=False)
    assert ids_of(replies) == ids_of(expected)
    for got, want in zip(chain(*replies), chain(*expected)):
        assert got.logprobs == pytest.approx(want.logprobs, abs=2e-5) and got.finish == want.finish
    assert sampler.drafts.counted > 20 and sampler.steps < plain.steps + (not options)
    assert sampler.tokens == plain.tokens


def test_a_reply_that_ends_inside_a_draft_ends_there():
    """The script repeats itself, so it is drafted; what a draft holds behind the end is not part of it."""
    lines = "ab ab ab ab ab ab ab ab"
    for text, sampling, finish in (
            (lines + "\0" + lines, {}, "stop"), (lines * 3, {"max_tokens": 20}, "length"),
            (lines[:-1] + "$ ab ab", {"stop": ("$",)}, "stop_string")):
        sampler = Sampler(Script("?" + text), Letters())
        reply = sampler.generate([Request(ids=[63], sampling=Sampling(**sampling))], progress=False)[0][0]
        shown = {"stop": lines, "length": (lines * 3)[:20], "stop_string": lines[:-1]}[finish]
        assert (reply.finish, reply.text) == (finish, shown)
        assert sampler.steps < len(reply.ids) == len(reply.logprobs) == sampler.tokens


def flash(cache, layer, q, bounds, starts, seen, most):
    """What flash.flash promises, one sequence and query at a time."""
    keys, values = (x.reshape(-1, cache.size) for x in cache.kv[:, layer])
    out = torch.full_like(q, torch.nan)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (bounds, starts, seen))
    for first, end, start, count in zip(bounds, bounds[1:], starts, seen):
        assert 1 <= end - first <= most
        for i in range(first, end):
            span = slice(start, start + count - (end - 1 - i))
            out[i] = (q[i] @ keys[span].T * cache.size ** -0.5).softmax(-1) @ values[span]
    return out


@pytest.mark.parametrize("with_flash", [False, True])
@pytest.mark.parametrize("options", COMPANY)
def test_the_way_of_a_gpu_changes_nothing(options, with_flash, monkeypatch):
    """With stand-ins for its graphs and its attention: rows that fill up a batch, several rounds at once."""
    def record(run, controls, others):
        before = copy.deepcopy(controls)
        results = run()  # warm-up and recording leave their traces in the cache
        results = run()
        controls.take(before)

        class Graph:
            def replay(self):
                for kept, new in zip(results, run()):
                    kept.copy_(new)
        recorded.append(len(controls.last))
        return Graph(), results

    monkeypatch.setattr(graphs, "record", record)
    recorded, model, requests = [], build(seed=6), some_requests(30, seed=8)
    requests += some_requests(4, seed=9, temperatures=(1.0,), top_k=7)
    expected = run(model, requests)
    sampler = Sampler(model, Letters(), **options)
    sampler.recorded, sampler.burst, sampler.cache.spare, sampler.drafts = graphs.Recordings(), 4, 1, None
    sampler.slots.recorded = True
    if with_flash:
        sampler.prefill_by, sampler.decode_by = FlashPrefill, FlashDecode
        monkeypatch.setattr(flash_room, "flash", flash)
    sampler.cache.clear()
    for _ in range(2):  # the second time from kept prefixes
        replies = sampler.generate(requests, progress=False)
        assert ids_of(replies) == ids_of(expected)
        for got, want in zip(chain(*replies), chain(*expected)):
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5) and got.finish == want.finish
    assert options or set(recorded) <= {*slots.ROWS, sampler.cache.slots}


# ---- what is computed, and with which weights ------------------------------------------------------------

@pytest.fixture
def prefilled(monkeypatch):
    """Counts the tokens that go through prefill."""
    counts = []

    class Counting(module.Prefill):
        def __init__(self, cache, segments):
            counts.append(sum(n for *_, n in segments))
            super().__init__(cache, segments)

    monkeypatch.setattr(module, "Prefill", Counting)
    return counts


def test_samples_of_one_prompt_prefill_it_once(prefilled):
    sampler = Sampler(build(), Letters(), max_batch=6)
    sampler.submit(Request(ids=list(range(1, 61)), n=8, sampling=Sampling(5, 1.0)))
    replies = drain(sampler)
    assert len({tuple(r.ids) for r in replies}) > 1
    assert sum(prefilled) == 60 + 1  # two come later, together, and need the last token's hidden state


def test_a_growing_conversation_prefills_only_what_is_new(prefilled):
    model = build()
    sampler, ids = Sampler(model, Letters(), max_batch=4), list(range(1, 50))
    for _ in range(3):
        sampler.submit(Request(ids=ids, sampling=Sampling(10)))
        for i in range(5):  # others come and go
            sampler.submit(Request(ids=[90, i + 1], sampling=Sampling(4)))
        reply = drain(sampler)[0]
        assert reply.ids == run(model, [Request(ids=ids, sampling=Sampling(10))])[0][0].ids
        ids = ids + reply.ids + [70, 71, 72]
        prefilled.clear()
    assert len(ids) > 80
    sampler.submit(Request(ids=ids, sampling=Sampling(3)))
    drain(sampler)
    assert prefilled == [4]  # the reply's last token was never fed to the model


def test_a_common_system_prompt_is_computed_once(prefilled):
    system = list(range(1, 51))
    requests = [Request(ids=[*system, 60 + i, 7], sampling=Sampling(6)) for i in range(10)]
    replies = run(build(), requests)
    assert sum(prefilled) == 52 + 9 * 2
    assert ids_of(replies) == [ids_of(run(build(), [r]))[0] for r in requests]


def test_the_next_sample_uses_the_new_weights():
    model = build().train()
    sampler, request = Sampler(model, Letters()), Request(ids=list(range(1, 60)), sampling=Sampling(12))
    before, places = sampler.generate([request], False), [p.data_ptr() for p in model.parameters()]
    assert model.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(9), torch.arange(9), Packed([9])).pow(2).sum().backward()
    optimizer.step()
    after = sampler.generate([request], False)
    assert places == [p.data_ptr() for p in model.parameters()]
    assert after[0][0].ids == run(model, [request])[0][0].ids != before[0][0].ids
    torch.testing.assert_close(torch.tensor(after[0][0].logprobs), forward_logprobs(model, after[0][0], 0.0),
                               atol=1e-5, rtol=0)


@pytest.mark.parametrize("replace_them", [
    lambda model, new: [setattr(p, "data", x) for p, x in zip(lora.parameters(model), new)],
    lambda model, new: model.load_state_dict({
        name: next(new) if "lora_" in name else p for name, p in model.state_dict().items()}, assign=True)])
def test_the_next_sample_uses_parameters_that_were_replaced(replace_them):
    """Under the same names, at any address; and then changed in place."""
    model = build()
    lora.add(model, r=4, alpha=4)
    sampler, request = Sampler(model, Letters()), Request(ids=list(range(1, 60)), sampling=Sampling(12))
    sampler.generate([request], False)
    replace_them(model, iter([torch.randn_like(p) * 0.3 for p in lora.parameters(model)]))
    for _ in range(3):
        reply = sampler.generate([request], False)[0][0]
        with torch.enable_grad():
            expected = forward_logprobs(copy.deepcopy(model), reply, 0.0)
        torch.testing.assert_close(torch.tensor(reply.logprobs), expected, atol=1e-5, rtol=0)
        with torch.no_grad():
            for p in lora.parameters(model):
                p.mul_(-1.3)


def test_another_parameter_at_the_same_address_is_seen():
    model = build()
    lora.add(model, r=4, alpha=4, targets=["k_proj"])
    sampler, request = Sampler(model, Letters()), Request(ids=list(range(1, 60)), sampling=Sampling(12))
    sampler.generate([request], False)
    for layer in model.modules():
        for name, p in list(getattr(layer, "lora_B", {}).items()):
            p.data.normal_()  # without a new version
            layer.lora_B[name] = torch.nn.Parameter(p.data)
    reply = sampler.generate([request], False)[0][0]
    expected = forward_logprobs(copy.deepcopy(model), reply, 0.0)
    torch.testing.assert_close(torch.tensor(reply.logprobs), expected, atol=1e-5, rtol=0)


def test_each_row_has_its_own_adapter():
    model = build()
    for name in ("solver", "checker"):
        lora.add(model, r=4, alpha=4, name=name)
        for p in lora.parameters(model, name):
            torch.nn.init.normal_(p, std=0.2)
    prompts = [r.ids for r in some_requests(9)]
    names = [None, "solver", "checker"] * 3
    requests = [Request(ids=ids, adapter=a, sampling=Sampling(12)) for ids, a in zip(prompts, names)]
    with lora.off(model):
        mixed = run(model, requests)
    for ids, name, group in zip(prompts, names, mixed):
        with lora.use(model, name):
            assert group[0].ids == run(model, [Request(ids=ids, sampling=Sampling(12))])[0][0].ids
            expected = forward_logprobs(model, group[0], 0.0)
            torch.testing.assert_close(torch.tensor(group[0].logprobs), expected, atol=1e-5, rtol=0)
    long = list(range(1, 60))  # the same prompt under two adapters must not share its cache
    pair = run(model, [Request(ids=long, adapter=a, sampling=Sampling(12)) for a in ("solver", "checker")])
    assert pair[0][0].ids != pair[1][0].ids


def test_a_row_s_adapter_includes_its_head():
    """Adapters on an untied head, in one batch, against a model into which the adapter was merged."""
    model = build(tied=False)
    for name in ("solver", "checker"):
        lora.add(model, r=4, alpha=4, name=name, targets=["lm_head", "v_proj"])
        for p in lora.parameters(model, name):
            torch.nn.init.normal_(p, std=0.3)
    requests = [replace(r, adapter=name) for r, name in zip(some_requests(9, temperatures=(0.0,)),
                                                            [None, "solver", "checker"] * 3)]
    with lora.off(model):
        replies = run(model, requests)
    for request, group in zip(requests, replies):
        merged = copy.deepcopy(model)
        if request.adapter:
            lora.merge(merged, request.adapter)
        with lora.off(merged):
            assert ids_of([group]) == ids_of(run(merged, [replace(request, adapter=None)]))


# ---- how a reply ends ------------------------------------------------------------------------------------

class Script(torch.nn.Module):
    """Writes the text, whatever the prompt: the token at position i is text[i]."""

    def __init__(self, text, vocab=9000):
        super().__init__()
        self.config = Config(vocab, hidden=8, intermediate=8, layers=1, heads=1, kv_heads=1, head_size=8,
                             positions=100)
        self.text = torch.nn.Parameter(torch.tensor([float(ord(c)) for c in text] + [0.0] * 100))

    def forward(self, ids, positions, attend):
        return self.text[positions + 1][:, None]

    def logits(self, hidden):
        return 20.0 * torch.nn.functional.one_hot(hidden[:, 0].long(), self.config.vocab).float()


@pytest.mark.parametrize("text, sampling, reply, finish", [
    ("the end\0more", {}, "the end", "stop"),
    ("the end", {"max_tokens": 3}, "the", "length"),
    ("so \\boxed{\\frac{1}{2}}.\nMore", {"stop_at_box": True}, "so \\boxed{\\frac{1}{2}}.\n", "box"),
    ("a \\boxed{ {x} \\} }\n b", {"stop_at_box": True}, "a \\boxed{ {x} \\} }\n", "box"),
    ("\\boxed{}\n\\boxed{4} or \\boxed{5}\n b", {"stop_at_box": True},
     "\\boxed{}\n\\boxed{4} or \\boxed{5}\n", "box"),
    (r"{no} box} \boxed 4" + "\0", {"stop_at_box": True}, r"{no} box} \boxed 4", "stop"),
    ("code\n```output\n5", {"stop": ("```output", "zzz")}, "code\n", "stop_string"),
    ("a b c", {"stop": ("b ", "a ")}, "", "stop_string"),
    ("prix: 5 €, non", {"stop": ("€",)}, "prix: 5 ", "stop_string"),
])
def test_a_reply_ends_where_it_should(text, sampling, reply, finish):
    got = run(Script("?" + text), [Request(ids=[63], sampling=Sampling(**sampling))])[0][0]
    assert (got.text, got.finish) == (reply, finish)
    assert got.prompt_ids == [63] and got.tokens_in == 1
    assert got.tokens_out == len(got.ids) == len(got.logprobs)
    assert ("?" + text).startswith(Letters().decode([63, *got.ids], skip_special=False))  # ids: all it wrote


def test_the_end_of_context_or_cache_ends_a_reply():
    model = build()
    for options, room in ({}, 128), ({"cache_tokens": 70}, 70):
        reply = run(model, [Request(ids=[3] * 50, sampling=Sampling(1000))], **options)[0][0]
        assert reply.finish in ("length", "stop") and len(reply.ids) <= room - 50
        assert reply.finish == "stop" or len(reply.ids) == room - 50


# ---- faults ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("request_, words", [
    (Request(ids=[]), "an empty prompt"),
    (Request(ids=[1] * 128), "a prompt of 128 tokens; expected fewer than 128"),
    (Request(ids=[1, 96]), "outside the vocabulary"),
    (Request(ids=[1], sampling=Sampling(max_tokens=0)), "max_tokens 0"),
    (Request(ids=[1], sampling=Sampling(temperature=-1)), "temperature -1"),
    (Request(ids=[1], sampling=Sampling(temperature=math.nan)), "temperature nan"),
    (Request(ids=[1], sampling=Sampling(top_p=0)), "top_p 0"),
    (Request(ids=[1], sampling=Sampling(top_k=-2)), "top_k -2"),
    (Request(ids=[1], sampling=Sampling(stop=["a", ""])), "an empty stop string"),
    (Request(ids=[1], n=0), "0 samples"),
    (Request(ids=[1], adapter="judge"), "adapter 'judge'"),
])
def test_what_cannot_be_sampled_is_refused_by_name(request_, words):
    sampler = Sampler(build(), Letters())
    with pytest.raises(BadInput, match=words):
        sampler.submit(request_)
    with pytest.raises(BadInput, match="request 1 has"):
        sampler.generate([Request(ids=[1]), request_], progress=False)
    assert not sampler.pending


def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch):
    model, requests = build(), some_requests(20)
    expected = ids_of(run(model, requests))

    class Greedy(module.Decode):
        def __call__(self, layer, q, k, v):
            if layer == 1 and len(self.counts) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(layer, q, k, v)

    monkeypatch.setattr(module, "Decode", Greedy)
    sampler = Sampler(model, Letters(), max_batch=32)
    with pytest.warns(UserWarning, match="out of memory"):
        replies = sampler.generate(requests, progress=False)
    assert ids_of(replies) == expected and 1 < sampler.slots.max_rows <= 4


def test_out_of_memory_with_one_row_is_raised(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(module.Decode, "__call__", fail)
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("ignore")
        run(build(), some_requests(5, temperatures=(0.0,)))


def test_out_of_memory_while_rows_move_loses_no_reply(monkeypatch):
    model, requests = build(), some_requests(12)
    expected, move, calls = ids_of(run(model, requests)), KVCache.move, []

    def failing(cache, *arguments):
        calls.append(arguments)
        if len(calls) in (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(cache, *arguments)

    monkeypatch.setattr(KVCache, "move", failing)
    with pytest.warns(UserWarning, match="out of memory"):
        assert ids_of(run(model, requests)) == expected
    assert len(calls) > 4


def test_ctrl_c_returns_what_is_finished(monkeypatch, capsys):
    model = build()
    sampler, step = Sampler(model, Letters()), Sampler.step

    def interrupted(self):
        if self.steps == 6:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Sampler, "step", interrupted)
    requests = [Request(ids=[5, i + 1], sampling=Sampling(3 if i % 2 else 50, 1.0)) for i in range(6)]
    replies = sampler.generate(requests, progress=False)
    assert [len(group) for group in replies[1::2]] == [1, 1, 1]
    assert sum(map(len, replies)) < 6 and not sampler.pending
    assert "of 6 replies are finished" in capsys.readouterr().out


def test_ctrl_c_between_the_end_of_a_reply_and_its_handing_out_keeps_it(monkeypatch):
    sampler, leave = Sampler(build(), Letters()), Sampler._leave

    def interrupted(self):
        leave(self)
        if self.finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "_leave", interrupted)
    requests = [Request(ids=[5, i + 1], sampling=Sampling(3 if i % 2 else 50, 1.0)) for i in range(6)]
    replies = sampler.generate(requests, progress=False)
    assert [len(group) for group in replies[1::2]] == [1, 1, 1] and not sampler.pending


def test_nan_logits_name_the_request_and_the_step(monkeypatch):
    model = build()
    sampler, calls = Sampler(model, Letters()), []
    logits = sampler.network.logits

    def poisoned(hidden, chosen):
        calls.append(0)
        out = logits(hidden, chosen)
        if len(calls) == 4:
            out[1] = float("nan")
        return out

    monkeypatch.setattr(sampler.network, "logits", poisoned)
    with pytest.raises(FloatingPointError, match=r"request 1, sample 0: .* NaN at token 3 .*step 2"):
        sampler.generate([Request(ids=[5, i + 1], sampling=Sampling(20, 1.0)) for i in range(3)], False)
