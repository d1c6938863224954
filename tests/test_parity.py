"""The same numbers as transformers and peft. Random configs always; real weights with SLM_REAL_MODELS=folder.

`make test-parity` prints the largest error of each check.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_sft
from slm import checkpoint, lora, problems, training
from slm.attention import Packed
from slm.checkpoint import TINY
from slm.episode import Reply, Request, Sampling
from slm.formats import lora_files
from slm.runs.cli import TARGETS
from slm.sampling import Sampler
from slm.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.parity

SMOL, CODER = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"
DATA = Path(os.environ.get("SLM_DATA", Path(__file__).parents[2] / "shared" / "data"))
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def within(check: str, error: float, bound: float) -> None:
    print(f"\nparity: {check}: largest error {error:.2e}, bound {bound:.2e}", end="")
    assert error <= bound, f"{check}: {error:.2e} > {bound:.2e}"


@torch.no_grad()
def ours(model, *sequences):
    device = model.model.embed_tokens.weight.device
    attend = Packed([len(s) for s in sequences], device)
    return model.logits(model(torch.cat(sequences).to(device), attend.positions, attend))


@torch.no_grad()
def theirs(peer, ids):
    return peer(ids[None].to(peer.device)).logits[0]


def difference(a, b) -> float:
    """The largest one. transformers has logits for the ids that its embedding has and the tokenizer lacks;
    ours end before them."""
    known = min(a.shape[-1], b.shape[-1])
    return float((a[..., :known].float() - b[..., :known].float()).abs().max())


FAMILIES = {"qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def peer_model(tmp_path, seed=0, family="qwen2", **config):
    """A random model of transformers, saved with the built-in tokenizer beside it: (model, directory)."""
    shape = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
             "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096} | config
    torch.manual_seed(seed)
    kind = FAMILIES[family]
    peer = kind[1](kind[0](**shape)).eval()
    for name, p in peer.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.15)
    peer.save_pretrained(tmp_path / "peer")
    for path in TINY.glob("token*.json"):
        shutil.copy(path, tmp_path / "peer")
    return peer, tmp_path / "peer"


# ---- random models -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [
    {"tie_word_embeddings": True}, {"tie_word_embeddings": False},
    {"family": "llama"}, {"family": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    {"family": "qwen3"}, {"family": "qwen3", "head_dim": 32, "num_key_value_heads": 4},
    {"num_key_value_heads": 1}, {"num_key_value_heads": 4, "rope_theta": 1e6}, {"num_key_value_heads": 8},
    {"head_dim": 32, "rope_theta": 5e5, "rms_norm_eps": 1e-5}], ids=str)
def test_logits_of_random_models(tmp_path, config, device):
    peer, directory = peer_model(tmp_path, **config)
    model, _ = checkpoint.load(directory, device)
    ids = torch.randint(0, 2000, (200,))
    within(f"float32 logits, {config}", difference(ours(model, ids), theirs(peer.to(device), ids)), 2e-4)


@pytest.mark.parametrize("config", [{"family": "llama", "rope_parameters": LLAMA3}, {"family": "qwen3"}],
                         ids=str)
def test_other_families_are_sampled_and_saved_as_they_are(tmp_path, config):
    peer, directory = peer_model(tmp_path, **config)
    model, tokenizer = checkpoint.load(directory)
    prompts = torch.randint(0, 1000, (3, 70))
    known = model.config.ids
    found = Sampler(model, tokenizer).generate(
        [Request(ids=ids, sampling=Sampling(30, 0.0)) for ids in prompts.tolist()], progress=False)
    for ids, [reply] in zip(prompts, found):
        with torch.no_grad():
            logits = peer(torch.cat((ids, torch.tensor(reply.ids)))[None]).logits[0, 69:-1, :known]
        assert logits.argmax(-1).tolist() == reply.ids
    checkpoint.save(model, tokenizer, tmp_path / "again")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(twin) is type(peer)
    within("logits of a saved model", difference(theirs(twin, prompts[0]), theirs(peer, prompts[0])), 1e-5)


def test_logits_at_context_4096(tmp_path):
    peer, directory = peer_model(tmp_path, rope_theta=1e6)
    model, _ = checkpoint.load(directory)
    ids = torch.randint(0, 2000, (4096,))
    within("float32 logits, 4,096 tokens", difference(ours(model, ids), theirs(peer, ids)), 2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_logits_as_close_as_transformers_is_to_itself(tmp_path, device):
    _, directory = peer_model(tmp_path)
    peer = load_peer(directory, torch.bfloat16).to(device)
    model, _ = checkpoint.load(directory, device, torch.bfloat16)
    ids = torch.randint(0, 2000, (300,))
    sdpa = theirs(peer, ids)
    peer.set_attn_implementation("eager")
    within("bfloat16 logits", difference(ours(model, ids), sdpa), difference(theirs(peer, ids), sdpa))


def test_gradients_are_those_of_transformers(tmp_path):
    peer, directory = peer_model(tmp_path)
    model, _ = checkpoint.load(directory)
    known = model.config.ids
    ids, attend = torch.randint(0, known, (60,)), Packed([60])
    for logits in (model.logits(model(ids, attend.positions, attend)), peer(ids[None]).logits[0, :, :known]):
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()
    grads = dict(peer.named_parameters())
    error = max(difference(p.grad, grads[name].grad) for name, p in model.named_parameters())
    within("float32 gradients", error, 1e-4)


@pytest.mark.parametrize("shard", [10**9, 100_000])
@pytest.mark.parametrize("tied", [True, False])
def test_what_we_save_loads_in_transformers(random_model, tmp_path, tied, shard):
    model, tokenizer = random_model(vocab=2000, tied=tied, positions=1024), Tokenizer.load(TINY)
    checkpoint.save(model, tokenizer, tmp_path / "model", shard_bytes=shard)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(100)
    within("logits of a saved model", difference(ours(model, ids), theirs(peer, ids)), 1e-5)
    assert set(peer.generation_config.eos_token_id) == tokenizer.stop_ids
    assert peer.config.rope_parameters["rope_theta"] == 1e4 and peer.config.max_position_embeddings == 1024
    twin = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    assert twin.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) \
        == tokenizer.render(messages)
    text = "Tom has 12 apples.\n"
    assert twin(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


def test_what_transformers_saves_in_shards_loads_here(tmp_path):
    peer, directory = peer_model(tmp_path, tie_word_embeddings=False)
    peer.save_pretrained(directory, max_shard_size="200KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    assert len(list(directory.glob("*.safetensors"))) > 2
    model, _ = checkpoint.load(directory)
    ids = torch.arange(100)
    within("logits of a sharded model", difference(ours(model, ids), theirs(peer, ids)), 2e-4)


def spoil(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def own_head(directory):
    spoil(directory, lambda weights: weights.update({"lm_head.weight": torch.randn(2000, 64)}))


def head_twice(directory):
    spoil(directory, lambda weights: weights.update(
        {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))


def stale_index(directory):
    names = load_file(directory / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def stale_index_and_shard(directory):
    stale_index(directory)
    weights = {name: tensor + 1 for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model-00001-of-00001.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [own_head, head_twice, stale_index, stale_index_and_shard])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_directory_that_contradicts_itself_is_read_as_transformers_reads_it(tmp_path, change, dtype):
    _, directory = peer_model(tmp_path, tie_word_embeddings=True)
    change(directory)
    peer, (model, _) = load_peer(directory, dtype), checkpoint.load(directory, dtype=dtype)
    assert torch.equal(peer.lm_head.weight, getattr(model, "lm_head", model.model.embed_tokens).weight)
    assert torch.equal(peer.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(peer.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


# ---- LoRA --------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
           {"target_modules": r".*\.layers\.[02]\..*(down|o)_proj"}, {"lora_alpha": 7, "r": 3},
           {"target_modules": ["q_proj", "c_attn", "wte"]}, {"target_modules": "all-linear"},
           {"exclude_modules": ["layers.1.self_attn.q_proj", "v_proj"]},
           {"exclude_modules": r".*layers\.[01]\..*"}, {"layers_to_transform": [0, 2]},
           {"layers_to_transform": 1, "layers_pattern": "layers"},
           {"layers_to_transform": [0], "target_modules": ["q_proj", "lm_head"]},
           {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 12}, "alpha_pattern": {"v_proj": 5}},
           {"rank_pattern": {"q_proj": 2}, "use_rslora": True,
            "alpha_pattern": {"v_proj": 5, "^q_proj": 100, ".*down_proj": 3}},
           {"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["embed_tokens"]},
           {"fan_in_fan_out": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_adapters_of_peft_load_here(tmp_path, options):
    peer, directory = peer_model(tmp_path, tie_word_embeddings=False)
    model, _ = checkpoint.load(directory)
    config = peft.LoraConfig(**({"r": 8, "lora_alpha": 16, "target_modules": list(lora.ALL)} | options),
                             init_lora_weights=False, task_type="CAUSAL_LM")
    peer = peft.get_peft_model(peer, config).eval()
    peer.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(150)
    base = ours(model, ids)
    lora_files.load(model, tmp_path / "adapter")
    within(f"logits of peft's adapter, {options}", difference(ours(model, ids), theirs(peer, ids)), 2e-4)
    with lora.off(model):
        assert torch.equal(ours(model, ids), base)


@pytest.mark.parametrize("options", [
    {}, {"rslora": True}, {"targets": ["q_proj", "v_proj"], "dropout": 0.1},
    {"targets": r".*layers\.1\..*_proj"}], ids=str)
def test_our_adapters_load_in_peft(tmp_path, options):
    peer, directory = peer_model(tmp_path)
    model, _ = checkpoint.load(directory)
    lora.add(model, r=4, alpha=12, **options)
    for p in lora.parameters(model):
        torch.nn.init.normal_(p, 0, 0.1)
    lora_files.save(model, tmp_path / "adapter", base=directory)
    peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    ids = torch.arange(150)
    within(f"logits of our adapter in peft, {options}", difference(ours(model, ids), theirs(peer, ids)), 2e-4)
    lora.merge(model)
    merged = theirs(peer.merge_and_unload(), ids)
    within("logits merged, here and in peft", difference(ours(model, ids), merged), 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_exported_run_loads_in_transformers_with_all_its_files(tmp_path, dtype):
    """vLLM and llama.cpp's converter ask for the files that transformers' Auto classes read."""
    checkpoint.save(checkpoint.load("tiny", dtype=dtype)[0], Tokenizer.load(TINY), tmp_path / "run" / "base")
    model, tok = checkpoint.load(tmp_path / "run" / "base", dtype=dtype)
    lora.add(model, r=4, alpha=8)
    torch.manual_seed(0)
    for p in lora.parameters(model):
        torch.nn.init.normal_(p, 0, 0.02)
    lora_files.save(model, tmp_path / "run" / "adapter", base=tmp_path / "run" / "base")
    in_peft = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter", dtype=dtype).eval()
    checkpoint.export(tmp_path / "run", tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert peer.dtype == dtype and type(peer).__name__ == "Qwen2ForCausalLM"
    assert set(peer.generation_config.eos_token_id) == tok.stop_ids
    twin, messages = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), MESSAGES[0]
    text = twin.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == tok.render(messages)
    ids = torch.tensor(tok.chat(messages))
    merged, apart = theirs(peer, ids), theirs(in_peft, ids)
    in_peft = theirs(in_peft.merge_and_unload(), ids)
    within(f"exported in {dtype}, against merged in peft", difference(merged, in_peft), 1e-5)
    within(f"exported in {dtype}, not merged", difference(merged, apart), 4 * torch.finfo(dtype).eps ** 0.5)


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
    {"init_lora_weights": "olora"}, {"trainable_token_indices": [3, 4]}], ids=str)
def test_what_peft_can_and_we_cannot_is_refused_by_name(tmp_path, change):
    peer, directory = peer_model(tmp_path)
    model, _ = checkpoint.load(directory)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **change)
    peer = peft.get_peft_model(peer, config)
    for name, p in peer.named_parameters():
        if "modules_to_save" in name:  # a trained head
            torch.nn.init.normal_(p)
    peer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(checkpoint.BadInput, match=next(iter(change))):
        lora_files.load(model, tmp_path / "adapter")


# ---- supervised fine-tuning --------------------------------------------------------------------------------

def losses_of_peer(peer, batches, rates, clip: float, decay: float) -> list[float]:
    """The usual loop around transformers: each row alone, labels of -100 where nothing is trained."""
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=decay)
    told = []
    for batch, rate in zip(batches, rates):
        count, total = sum(sum(row.mask) for row in batch), 0.0
        for row in batch:
            ids, mask = torch.tensor([row.ids]), torch.tensor([row.mask])
            loss = peer(ids, labels=ids.masked_fill(mask == 0, -100)).loss * (sum(row.mask) / count)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        told.append(total)
    return told


@pytest.mark.parametrize("how, rate", [("qkvo", 1e-3), ("all", 1e-3), ("full", 1e-4)])
@pytest.mark.parametrize("name", ["tiny", pytest.param(SMOL, marks=pytest.mark.slow)])
def test_twenty_steps_of_sft_have_the_losses_of_transformers_and_peft(request, tmp_path, name, how, rate):
    """Real weights: the shortest rows, one a step. Each step multiplies a difference that rounding made, the
    more the higher the rate: on the built-in model it grows to 2e-5 in 20 steps at 1e-3, to 4e-4 at 3e-3."""
    directory = TINY if name == "tiny" else request.getfixturevalue("real_model")(name)
    model, tok = checkpoint.load(directory)
    peer = load_peer(directory).train()  # in float32, as ours
    if how != "full":
        torch.manual_seed(0)
        lora.add(model, 16, 32, TARGETS[how])
        lora_files.save(model, tmp_path / "start", base=directory)
        peer = peft.PeftModel.from_pretrained(peer, tmp_path / "start", is_trainable=True)
    talks = [train_sft.conversation(p.question, p.solution) for p in problems.load("tiny", "train", 32)]
    rows = [train_sft.encode(tok, talk) for talk in talks]
    if name == "tiny":
        plan = training.batches(len(rows), 2, 2, seed=0)[:20]
        batches = [[rows[i] for i in step] for step in plan]
    else:
        batches = [[row] for row in sorted(rows, key=lambda row: len(row.ids))[:10]] * 2
    rates = [rate * training.cosine(step, 20, 0.1) for step in range(20)]
    args = SimpleNamespace(micro_tokens=300, clip=1.0, lr=rate)
    _, optimizer = training.start(model.train(), 0.01)
    got = [train_sft.one_step(model, batch, optimizer, lr, contextlib.nullcontext(), args)["loss"]
           for batch, lr in zip(batches, rates)]
    expected = losses_of_peer(peer, batches, rates, 1.0, 0.01)
    assert sum(got[10:]) < 0.9 * sum(got[:10])  # as many rows as before
    within(f"{name}, {how}: 20 losses", max(abs(a - b) for a, b in zip(got, expected, strict=True)), 1e-4)


# ---- tokenizer and chat ------------------------------------------------------------------------------------

def varied_strings(n: int, seed: int = 0) -> list[str]:
    """Words, numbers, code, LaTeX, many scripts, emoji, white space, control characters, special tokens."""
    rng = random.Random(seed)
    pieces = ["the price is $", "def f(x):\n    return x", r"\frac{1}{2}", r"\boxed{42}", " 3.14159",
              "1,234,567", "don't", "I'LL", "  ", "\n\n\n", "\t", "\r\n", "中文字符", "日本語テキスト",
              "한국어", "العربية", "עברית", "हिन्दी", "ไทย", "Ελληνικά", "naïve café", "e\u0301",
              "\u1e9b\u0323", "🙂👩‍👩‍👧", "\u200b", "\ufeff", "\x00", "\x7f", "<|im_start|>",
              "<|im_end|>", "<|endoftext|>", "<tool_call>", "<|fim_prefix|>", "<|im_", "end|>", "½", "Ⅷ",
              "٣", "a" * 40]
    ranges = [(32, 127), (160, 592), (1024, 1280), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF),
              (1, 0x2FFF)]

    def part() -> str:
        low, high = rng.choice(ranges)
        return rng.choice([
            rng.choice(pieces), rng.choice(" \n'-"), str(rng.randint(0, 10**rng.randint(1, 9))),
            "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))])

    return ["".join(part() for _ in range(rng.randint(1, 12))) for _ in range(n)]


MESSAGES = [
    [{"role": "user", "content": "What is 2 + 3?"}],
    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": "Hi <b>&amp;</b> 'quoted' \"text\"\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "ü\n\n中文 🙂"},
     {"role": "assistant", "content": " x "}, {"role": "user", "content": "  "},
     {"role": "assistant", "content": "```python\nprint(1)\n```"}, {"role": "user", "content": "again"}],
]


@pytest.fixture(params=["tiny", "qwen2.5-math", SMOL, CODER])
def tokenizers(request):
    """(our tokenizer, transformers' own reading of the same tokenizer.json)."""
    directory = {"tiny": TINY, "qwen2.5-math": DATA / "tokenizer"}.get(request.param)
    directory = directory or Path(os.environ.get("SLM_REAL_MODELS", "/nowhere")) / request.param
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer of {request.param} here")
    tok = Tokenizer.load(directory)
    twin = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"),
                                                clean_up_tokenization_spaces=False, **tok.named)
    twin.chat_template = tok.template
    return tok, twin


def test_two_thousand_strings_encode_and_decode_as_in_transformers(tokenizers):
    tok, twin = tokenizers
    wrong = 0
    for text in varied_strings(2000):
        ids = tok.encode(text)
        wrong += ids != twin(text, add_special_tokens=False).input_ids
        wrong += tok.decode(ids, skip_special=False) != twin.decode(ids)
        wrong += tok.decode(ids) != twin.decode(ids, skip_special_tokens=True)
    within("strings that differ", wrong, 0)


def test_chats_render_byte_for_byte_as_in_transformers(tokenizers):
    tok, twin = tokenizers
    for messages, generation in itertools.product(MESSAGES, (True, False)):
        text = twin.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        assert tok.render(messages, generation) == text
        ids = twin.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
        assert tok.chat(messages, generation) == ids
    started = MESSAGES[0] + [{"role": "assistant", "content": "The sum"}]
    text = twin.apply_chat_template(started, tokenize=False, continue_final_message=True)
    assert tok.render(started) == text


def test_appending_turns_gives_the_ids_of_the_whole_conversation(tokenizers):
    tok, _ = tokenizers
    assert tok.appends
    for messages in MESSAGES[2:]:
        talk = []
        for message in messages:
            if message["role"] == "assistant":
                ids = [*tok.encode(message["content"]), tok.end_of_turn]
                message = Reply(message["content"], ids, prompt_ids=tok.chat(talk)).message()
            talk.append(message)
        assert tok.chat(talk) == tok.chat(messages)
        seen = next(m["reply"] for m in reversed(talk) if "reply" in m)
        assert tok.chat(talk)[:len(seen.prompt_ids + seen.ids)] == seen.prompt_ids + seen.ids


def test_qwen_stops_at_both_of_its_ends(tokenizers):
    tok, _ = tokenizers
    assert {"<|endoftext|>", "<|im_end|>"} == set(tok.stop_texts)
    if tok.directory.name == "tokenizer":
        assert tok.stop_ids == {151643, 151645}


# ---- real weights ------------------------------------------------------------------------------------------

def questions(n: int) -> list[str]:
    path = DATA / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip("no gsm8k/test.jsonl under SLM_DATA")
    return [json.loads(line)["question"] for line in path.read_text().splitlines()[:n]]


def load_peer(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.fixture(params=[SMOL, CODER])
def real(request, real_model):
    return real_model(request.param)


@pytest.mark.slow
def test_real_logits_float32(real):
    model, tok = checkpoint.load(real)
    peer = load_peer(real)
    sequences = [torch.tensor(tok.chat([{"role": "user", "content": q}])) for q in questions(6)]
    reference = [theirs(peer, ids)[:, :model.config.ids] for ids in sequences]  # ids that the tokenizer has
    alone = [ours(model, ids) for ids in sequences]
    within(f"{real.name}: float32 logits", max(map(difference, alone, reference)), 2e-4)
    probabilities = max(difference(a.log_softmax(-1), b.log_softmax(-1)) for a, b in zip(alone, reference))
    within(f"{real.name}: float32 log-probs", probabilities, 2e-4)
    within(f"{real.name}: packed against alone", difference(ours(model, *sequences), torch.cat(alone)), 1e-5)


@pytest.mark.slow
def test_real_logits_bfloat16(real):
    model, tok = checkpoint.load(real, dtype=torch.bfloat16)
    peer = load_peer(real, torch.bfloat16)
    ids = torch.tensor(tok.chat([{"role": "user", "content": questions(1)[0]}]))
    sdpa = theirs(peer, ids)[:, :model.config.ids]
    peer.set_attn_implementation("eager")
    bound = difference(theirs(peer, ids)[:, :model.config.ids], sdpa)
    within(f"{real.name}: bfloat16 logits", difference(ours(model, ids), sdpa), bound)


@pytest.mark.slow
@pytest.mark.parametrize("name, prompts, tokens", [(SMOL, 40, 128), (CODER, 8, 128)])
def test_greedy_answers_are_token_identical(real_model, name, prompts, tokens):
    """A difference is excused only where the two best logits are within 0.01 of each other."""
    from slm.sampling import Sampler
    directory = real_model(name)
    model, tok = checkpoint.load(directory)
    requests = [Request([{"role": "user", "content": q}], Sampling(max_tokens=tokens))
                for q in questions(prompts)]
    replies = [rows[0] for rows in Sampler(model, tok, max_batch=8).generate(requests)]
    peer, ties = load_peer(directory), 0
    for reply in replies:
        prompt = torch.tensor([reply.prompt_ids])
        out = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
                            do_sample=False, temperature=None, top_p=None, top_k=None)
        ids = out[0, prompt.shape[1]:].tolist()
        if ids != reply.ids:
            same = [a == b for a, b in zip(ids, reply.ids)] + [False]
            at = same.index(False)
            best = theirs(peer, out[0, :prompt.shape[1] + at])[-1].topk(2).values
            assert best[0] - best[1] < 0.01, f"token {at} of {reply.text[:60]!r}"
            ties += 1
    within(f"{name}: greedy answers of {prompts} that differ at a tie", ties, prompts // 4)


@pytest.mark.slow
def test_real_adapters_both_ways(real_model, tmp_path):
    directory = real_model(SMOL)
    model, tok = checkpoint.load(directory)
    lora.add(model, r=8, alpha=16)
    torch.manual_seed(0)
    for p in lora.parameters(model):
        torch.nn.init.normal_(p, 0, 0.02)
    lora_files.save(model, tmp_path / "adapter", base=directory)
    peer = peft.PeftModel.from_pretrained(load_peer(directory), tmp_path / "adapter").eval()
    ids = torch.tensor(tok.chat([{"role": "user", "content": questions(1)[0]}]))
    apart, apart_in_peft = ours(model, ids), theirs(peer, ids)
    within(f"{SMOL}: our adapter in peft", difference(apart, apart_in_peft), 2e-4)
    lora.merge(model)
    merged, merged_in_peft = ours(model, ids), theirs(peer.merge_and_unload(), ids)
    within(f"{SMOL}: merged, here and in peft", difference(merged, merged_in_peft), 2e-4)
    rounding = difference(merged_in_peft, apart_in_peft)  # of W + s B A to float32, in any program
    within(f"{SMOL}: merged against not, bound by peft's own", difference(merged, apart), 1.1 * rounding)


@pytest.mark.slow
def test_real_sampled_log_probs_are_those_of_the_forward_pass(real_model):
    """Decoding multiplies few rows at a time, which BLAS sums in another order than many."""
    from slm.sampling import Sampler
    model, tok = checkpoint.load(real_model(SMOL))
    requests = [Request([{"role": "user", "content": q}], Sampling(max_tokens=40, temperature=1.0))
                for q in questions(6)]
    errors = []
    for [reply] in Sampler(model, tok).generate(requests, progress=False):
        start = len(reply.prompt_ids)
        logits = ours(model, torch.tensor(reply.prompt_ids + reply.ids))[start - 1:-1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(reply.ids)[:, None])[:, 0]
        errors.append((chosen - torch.tensor(reply.logprobs)).abs())
    within(f"{SMOL}: log-probs of sampled tokens, mean", float(torch.cat(errors).mean()), 1e-5)
    within(f"{SMOL}: log-probs of sampled tokens, largest", float(torch.cat(errors).max()), 5e-5)
